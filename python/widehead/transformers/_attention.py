"""The attention function of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from widehead._limits import DEFAULT_LIMITS, Limits
from widehead.torch import attention_rows
from widehead.transformers._mask import StructuredMask
from widehead.transformers._models import is_taken

logger = logging.get_logger(__name__)

# Other arguments that change nothing here, with the reason. A new one may be a bias, a sink, a
# choice of keys: whatever is not on this list is refused.
_HARMLESS = {
    "position_ids": "positions are in the rotated queries and keys, packed sequences in the mask",
    "sliding_window": "the mask has it",
    "use_cache": "the cache is updated before",
    "cache_position": "the mask has it",
    "output_attentions": "answered with a warning",
    "output_hidden_states": "of the layers around",
    "output_router_logits": "of the layers around",
    "return_dict": "of the layers around",
    "logits_to_keep": "of the layers behind",
    "num_items_in_batch": "of the loss",
    "labels": "of the loss",
    "deterministic": "this attention always is",
    "seq_idx": "for convolutions and state spaces; the mask has it",
}


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | StructuredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it.

    query [batch, heads_q, len_q, dim_qk]; key, value [batch, heads_kv, len_k, dim], not repeated.
    Windows arrive in the mask, which alone knows where the queries stand. ``indices``: the only keys
    that each query sees beside the mask, [batch, len_q, count]. Of the other arguments those that
    change nothing are dropped, and those that are not known are refused.

    Returns ([batch, len_q, heads_q, dim_v], None): there are no weights to hand out.
    """
    if dropout != 0.0:
        raise ValueError(f"dropout is {dropout}; it must be 0: widehead has no dropout")
    if kwargs.pop("cache", None) is not None:
        raise ValueError(
            "cache is given to the attention function; batches over pages are for "
            "widehead.transformers.continuous_batching(model)"
        )
    expect_known(module, kwargs)
    if kwargs.get("output_attentions", False):
        logger.warning_once("widehead has no attention weights to return; use eager for them.")
    if value.dtype != key.dtype:
        value = value.to(key.dtype)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": sinks_of(s_aux)}
    if isinstance(attention_mask, StructuredMask):
        options |= _structure(attention_mask, query, key)
        mask = attention_mask.keys
    else:
        mask = attention_mask
        if mask is None:
            key, value, causal = _unmasked(module, query, key, value, is_causal)
            options["causal"] = causal
        else:
            mask = mask[..., : key.shape[2]]
    if indices is not None:
        mask = _selected(mask, indices, key.shape[2])
    if position_bias is not None:
        mask = _biased(mask, position_bias[..., : key.shape[2]])
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        mask = mask.to(torch.float32)
    return attention_rows(query, key, value, mask=mask, limits=limits, **options), None


def sinks_of(s_aux: Tensor | None) -> Tensor | None:
    return None if s_aux is None else s_aux.to(torch.float32).reshape(-1)


def expect_known(module: torch.nn.Module, others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and name not in _HARMLESS:
            raise ValueError(
                f"{type(module).__name__} passes {name}, which widehead does not know and could only "
                "ignore; use eager for this model"
            )
    kind = type(module)
    if not is_taken(kind.__module__):
        raise ValueError(
            f"{kind.__name__} belongs to a model that declares neither _supports_sdpa nor "
            "_supports_attention_backend, and whose attention has not been compared with widehead's; "
            "use eager for this model"
        )


def _selected(mask: Tensor | None, indices: Tensor, len_k: int) -> Tensor:
    """The mask where each query sees the keys of ``indices`` alone, as an indexer chooses them."""
    if indices.dim() != 3:
        raise ValueError(
            f"indices is {list(indices.shape)}; it must be [batch, len_q, count]: chosen keys"
        )
    batch, len_q, _ = indices.shape
    chosen = torch.zeros((batch, len_q, len_k), dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, -torch.inf)


def _structure(mask: StructuredMask, query: Tensor, key: Tensor) -> dict[str, Any]:
    if mask.len_q != query.shape[2] or mask.len_k != key.shape[2]:
        raise ValueError(
            f"the mask is for {mask.len_q} queries and {mask.len_k} keys; this layer has "
            f"{query.shape[2]} and {key.shape[2]}"
        )
    return {
        "causal": "top_left" if mask.is_top_left else "bottom_right",
        "window": None if mask.window is None else (mask.window - 1, None),
        "key_lengths": mask.key_lengths,
        "key_starts": mask.key_starts,
    }


def _unmasked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, is_causal: bool | None
) -> tuple[Tensor, Tensor, str]:
    """What no mask at all means in transformers: a causal module's first queries and keys begin
    together, and keys past them are unwritten; a single query sees every key."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    len_q = query.shape[2]
    if not is_causal or len_q == 1:
        return key, value, ""
    return key[:, :, :len_q], value[:, :, :len_q], "top_left"


def _biased(mask: Tensor | None, position_bias: Tensor) -> Tensor:
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, -torch.inf)
    return mask + position_bias
