"""PyTorch: a custom operator, and ``F.scaled_dot_product_attention``'s signature on top of it.

``torch.ops.widehead.attention`` works under ``torch.compile(fullgraph=True)`` and in CUDA graphs.
It is differentiable, once, in everything but its mask, of packed sequences too. What has no
gradient raises when ``backward()`` reaches it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from widehead import _core
from widehead._arrays import Arguments, library_of_type
from widehead._errors import unreadable, unwritable
from widehead._limits import DEFAULT_LIMITS, Limits, backward_limits, limits_of

__all__ = ["attention_rows", "override_sdpa", "sdpa"]

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"PyTorch {torch.__version__} is too old for widehead: its tensors carry no exchange table "
        "of DLPack; 2.10 and later have it"
    )

# Calls of this process run on PyTorch's threads: ours beside them would be cores that both want, for
# a fifth of a millisecond of each layer's other work. Where its OpenMP has no entry, ours stay.
_core.use_torch_threads()

_PLAIN = (Tensor, torch.nn.Parameter)
# Where they are among the arguments.
_TENSORS = {
    "q": 0, "k": 1, "v": 2, "mask": 7, "sinks": 8, "key_lengths": 9, "key_starts": 10, "out": 13,
}  # fmt: skip
# Of widehead.sdpa's layouts: query_offsets, key_offsets, page_table, page_offsets, len_q, len_k.
_ALL_DENSE = (None,) * 6
_STRIDED = torch.strided
_LONGEST = 2**31 - 1  # lengths are int32
# By names of their own: looked up through three modules they would cost as much as they take.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack  # vmap, grad, functionalize
_is_grad_enabled = torch.is_grad_enabled


@lru_cache(maxsize=64)
def _limits_of(text: str) -> Limits:
    return Limits(**json.loads(text)) if text else DEFAULT_LIMITS


def _window_of(left: int, right: int) -> tuple[int | None, int | None] | None:
    if left < 0 and right < 0:
        return None
    return (left if left >= 0 else None, right if right >= 0 else None)


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    if q.dim() == 3:  # packed
        return q.new_empty((*q.shape[:2], v.shape[-1]))
    # Models take the heads of a position side by side next: in this layout that is a view.
    batch, heads, length, _ = q.shape
    return q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_sinks = q.new_empty((0,) if sinks is None else (q.shape[1],), dtype=torch.float32)
    # Tokens past the last sequence's have gradients too, 0, and are not written.
    made = [torch.empty_like(x) if x.dim() == 4 else torch.zeros_like(x) for x in (q, k, v)]
    return made[0], made[1], made[2], d_sinks


@torch.library.custom_op("widehead::attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    scale: float | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float | None,
    wants_log_sum_exp: bool,
    limits: str,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    page_table: Tensor | None = None,
    page_offsets: Tensor | None = None,
    len_q: int | None = None,
    len_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    layouts = (query_offsets, key_offsets, page_table, page_offsets, len_q, len_k)
    result = _core.sdpa(
        q, k, v, scale, causal or False, _window_of(window_left, window_right), softcap, mask,
        sinks, key_lengths, key_starts, layouts, wants_log_sum_exp, _empty_out(q, v),
        _limits_of(limits)._core, torch.get_num_threads(), None, None,
    )  # fmt: skip
    if wants_log_sum_exp:
        return result  # type: ignore[no-any-return]
    return result, q.new_empty((0,), dtype=torch.float32)


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    scale: float | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float | None,
    wants_log_sum_exp: bool,
    limits: str,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    log_sum_exp_shape = q.shape[:-1] if wants_log_sum_exp else (0,)
    return _empty_out(q, v), q.new_empty(log_sum_exp_shape, dtype=torch.float32)


@torch.library.custom_op("widehead::attention_backward", mutates_args=())
def _backward_operator(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    scale: float | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float | None,
    limits: str,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    len_q: int | None = None,
    len_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, d_sinks = _empty_gradients(q, k, v, sinks)
    _core.backward(
        q, k, v, scale, causal or False, _window_of(window_left, window_right), softcap, mask,
        sinks, key_lengths, key_starts,
        (query_offsets, key_offsets, None, None, len_q, len_k), out, log_sum_exp, d_out, dq, dk, dv,
        None if sinks is None else d_sinks, backward_limits(_limits_of(limits))._core,
        torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv, d_sinks


@_backward_operator.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v, sinks)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, sinks, key_lengths, key_starts, *options = inputs[: -len(_ALL_DENSE)]
    query_offsets, key_offsets, page_table, _, *ctx.most = inputs[-len(_ALL_DENSE) :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        q, k, v, *output, mask, sinks, key_lengths, key_starts, query_offsets, key_offsets
    )
    *options, ctx.has_log_sum_exp, limits = options
    ctx.options = (*options, limits)
    ctx.is_paged = page_table is not None


def _backward(context: Any, d_out: Tensor | None, d_log_sum_exp: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 20
    *saved, query_offsets, key_offsets = context.saved_tensors  # once: checkpointing computes them anew
    q = saved[0]
    if q.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"widehead has no backward on {q.device.type} yet: call it under torch.no_grad() or "
            "torch.inference_mode(), or use F.scaled_dot_product_attention to train"
        )
    if context.is_paged:
        raise NotImplementedError(
            "widehead has no backward of paged tensors: pass dense or packed ones to train"
        )
    if context.needs_input_grad[3]:
        raise NotImplementedError(
            "widehead has no gradient of masks: detach the mask, or use "
            "F.scaled_dot_product_attention to train it"
        )
    if d_log_sum_exp is not None:
        raise NotImplementedError(
            "widehead has no backward through the log-sum-exp: detach it, or use it without gradients"
        )
    if d_out is None:
        return nothing
    if not context.has_log_sum_exp:
        raise RuntimeError("backward needs the log-sum-exp: call the operator with wants_log_sum_exp")
    dq, dk, dv, d_sinks = torch.ops.widehead.attention_backward(
        d_out, *saved, *context.options, query_offsets, key_offsets, *context.most
    )
    return (dq, dk, dv, None, d_sinks if context.needs_input_grad[4] else None, *nothing[5:])


def _no_second_backward(context: Any, *gradients: Any) -> NoReturn:
    raise NotImplementedError(
        "widehead has no double backward: use F.scaled_dot_product_attention with the math backend"
    )


_operator.register_autograd(_backward, setup_context=_save_for_backward)
_backward_operator.register_autograd(_no_second_backward)


def _needs_operator(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> bool:
    """Whether PyTorch has to see the call: it compiles, traces, transforms or differentiates it, or
    wraps the tensors. ``others``: what else the call reads, None where it is absent."""
    if _is_compiling() or q.is_meta:
        return True
    if _dispatch_modes() > 0 or _tracing_state() is not None or _transform() is not None:
        return True
    differentiates = _is_grad_enabled()
    for tensor in (q, k, v, *others):
        if tensor is None:
            continue
        if type(tensor) in _PLAIN:
            if differentiates and tensor.requires_grad:
                return True
        elif isinstance(tensor, Tensor):
            return True
    return False


def _refuse_tangents(arguments: Arguments) -> None:
    """Inside ``dual_level`` and ``torch.func.jvp``: a tangent would be dropped without a word."""
    for name, index in _TENSORS.items():
        value = arguments[index]
        if not isinstance(value, Tensor):
            continue
        while torch._C._functorch.is_batchedtensor(value):  # vmap has no rule for the question
            value = torch._C._functorch.get_unwrapped(value)
        if torch._VF._unpack_dual(value, level=forward_ad._current_level)[1] is not None:
            raise NotImplementedError(
                f"{name} carries a tangent of forward-mode differentiation, which widehead does not "
                "have; use F.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
            )


def _expect_dense(name: str, tensor: Any) -> None:
    """The operator's part of what the direct call says itself."""
    if isinstance(tensor, Tensor) and (tensor.layout is not torch.strided or tensor.is_nested):
        raise unreadable(name, tensor)


def _causal_of(causal: Any) -> str:
    """As the operator takes it. The messages are those of the direct call, which compiled code and
    fake tensors never reach."""
    if causal is False or causal == "":
        return ""
    if causal is True:
        return "bottom_right"
    if isinstance(causal, str) and causal in ("bottom_right", "top_left"):
        return causal
    raise ValueError(
        f"causal is {causal!r}; valid: False, True (the same as \"bottom_right\"), "
        '"bottom_right", "top_left"'
    )


def _sides_of(window: Any) -> tuple[int, int]:
    """A window as the operator takes it: -1 for a side without limit."""
    if window is None:
        return -1, -1
    if not isinstance(window, tuple) or len(window) != 2:
        raise ValueError(f"window is {window!r}; it must be a tuple (left, right) of keys")
    for side in window:
        if side is not None and not 0 <= side <= _LONGEST:
            raise ValueError(
                f"window is {window!r}; each side must be a number of keys from 0 to {_LONGEST}, or "
                "None for no limit"
            )
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def _keys_tensor(keys: Any, q: Tensor) -> Tensor | None:
    if keys is None:
        return None
    return torch.as_tensor(keys, device=q.device).to(torch.int32)


def attention(arguments: Arguments, limits: Limits) -> Any:
    """:func:`widehead.sdpa` on tensors; its arguments in their order."""
    (
        q, k, v, scale, causal, window, softcap, mask, sinks, key_lengths, key_starts,
        layouts, return_log_sum_exp, out,
    ) = arguments  # fmt: skip
    *integers, len_q, len_k = layouts or _ALL_DENSE
    if forward_ad._current_level >= 0:
        _refuse_tangents(arguments)
    if not _needs_operator(q, k, v, mask, sinks, key_lengths, key_starts, out, *integers):
        return _core.sdpa(*arguments, limits._core, torch.get_num_threads(), None, None)
    for name, index in _TENSORS.items():
        _expect_dense(name, arguments[index])
    if out is not None and (out.is_neg() or out._is_zerotensor()):
        raise unwritable("out")
    if sinks is not None and not _is_compiling() and sinks._is_zerotensor():
        sinks = sinks.clone()  # the dispatcher makes it real with a stride of 0, which is refused
    left, right = _sides_of(window)
    # The backward pass reads it.
    wants_log_sum_exp = return_log_sum_exp or (
        _is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (q, k, v, mask, sinks))
    )
    result, log_sum_exp = torch.ops.widehead.attention(
        q, k, v, mask, sinks, _keys_tensor(key_lengths, q), _keys_tensor(key_starts, q), scale,
        _causal_of(causal), left, right, softcap, wants_log_sum_exp, limits.text,
        *(_keys_tensor(each, q) for each in integers), len_q, len_k,
    )  # fmt: skip
    if out is not None:
        result = out.copy_(result)
    return (result, log_sum_exp) if return_log_sum_exp else result


def attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: str = "",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Tensor:
    """:func:`widehead.sdpa` with a result of [batch, len_q, heads_q, dim_v], contiguous.

    ``causal`` is ``""``, ``"bottom_right"`` or ``"top_left"``.
    """
    direct = not _needs_operator(q, k, v, mask, sinks, key_lengths, key_starts)
    out = _empty_out(q, v) if direct else None
    result: Tensor = attention(
        (q, k, v, scale, causal or False, window, softcap, mask, sinks, key_lengths, key_starts,
         None, False, out),
        limits,
    )  # fmt: skip
    return result.transpose(1, 2)


def _has_autocast(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast hands to PyTorch's attention. A mask stays as precise as it is."""
    if not _has_autocast(tensor):
        return tensor
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _batched(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """The three with 4 dimensions and one batch, and the leading dimensions that it stands for.

    Leading dimensions and heads of 1 stand for any number, as in PyTorch. One kv head is not
    repeated: it serves every query head as it is.
    """
    if query.dim() == key.dim() == value.dim() == 4 and key.shape[:3] == value.shape[:3]:
        if query.shape[:2] == key.shape[:2]:
            return query, key, value, query.shape[:1]
    tensors = tuple(
        tensor if tensor.dim() > 2 else tensor.unsqueeze(-3) for tensor in (query, key, value)
    )
    heads_q, heads_k, heads_v = (tensor.shape[-3] for tensor in tensors)
    heads_kv = max(heads_k, heads_v)
    if min(heads_k, heads_v) not in (1, heads_kv):
        raise ValueError(f"key has {heads_k} heads and value {heads_v}; they must be equal, or 1")
    if heads_q != heads_kv and heads_kv != 1 and not enable_gqa:
        if heads_q != 1:
            raise ValueError(
                f"query has {heads_q} heads and key {heads_kv}; they must be equal, or 1, or "
                "enable_gqa True"
            )
        heads_q = heads_kv
    try:
        leading = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        shapes = [list(tensor.shape[:-3]) for tensor in tensors]
        raise ValueError(
            f"query, key and value have leading dimensions {shapes[0]}, {shapes[1]} and {shapes[2]}; "
            "they must be equal, or 1"
        ) from error
    batch = math.prod(leading)  # -1 would be ambiguous for tensors of no elements
    q, k, v = (
        tensor.expand((*leading, heads, *tensor.shape[-2:])).reshape(
            (batch, heads, *tensor.shape[-2:])
        )
        for tensor, heads in zip(tensors, (heads_q, heads_kv, heads_kv))
    )
    return q, k, v, leading


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    limits: Limits | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` by Widehead.

    The same arguments and meaning: leading dimensions as in PyTorch, broadcast where they or the
    heads are 1, ``is_causal`` aligned top-left, boolean masks attend where True, query, key and
    value cast to autocast's type where it is on. Beyond it: ``is_causal`` may be combined with a
    mask, rows without a visible key are 0 instead of NaN, and ``limits``.

    query: [..., heads_q, len_q, dim_qk]; key, value: [..., heads_kv, len_k, dim]; without
    ``enable_gqa`` the numbers of heads must be equal, or 1. Raises ValueError for dropout.
    """
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be 0: widehead has no dropout")
    if not isinstance(is_causal, (bool, torch.SymBool)):
        raise TypeError(f"is_causal is {is_causal!r}; it must be True or False")
    for name, each in (("query", query), ("key", key), ("value", value)):
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} is a {type(each).__name__}; it must be a torch.Tensor")
    is_strided = query.layout is key.layout is value.layout is _STRIDED
    if not is_strided or query.is_nested or key.is_nested or value.is_nested:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            _expect_dense(name, tensor)
    q, k, v, leading = _batched(_autocast(query), _autocast(key), _autocast(value), enable_gqa)
    mask = attn_mask
    if mask is not None:
        _expect_dense("attn_mask", mask)
        is_short = mask.dtype in (torch.float16, torch.bfloat16)
        if is_short and mask.dtype != q.dtype and _has_autocast(mask):
            mask = mask.float()  # PyTorch rounds it to q's type
        if len(leading) > 1 and mask.dim() > 3:
            mask = mask.expand((*leading, *mask.shape[-3:])).reshape((-1, *mask.shape[-3:]))
    out: Tensor = attention(
        (q, k, v, scale, "top_left" if is_causal else False, None, None, mask, None, None, None,
         None, False, None),
        limits_of(limits),
    )  # fmt: skip
    heads = out.shape[1:2] if max(query.dim(), key.dim(), value.dim()) > 2 else ()
    shape = (*leading, *heads, *out.shape[2:])
    return out if out.shape == shape else out.reshape(shape)


@contextmanager
def override_sdpa(limits: Limits | None = None) -> Iterator[None]:
    """Puts :func:`sdpa` in the place of ``F.scaled_dot_product_attention``, for every thread.

    Nothing falls back: what Widehead does not do (dropout, float64) raises.

    >>> with widehead.torch.override_sdpa():
    ...     model(tokens)
    """
    limits_of(limits)  # an error here, not in a model's first layer
    original = F.scaled_dot_product_attention

    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        return sdpa(*args, **kwargs, limits=limits)

    F.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


# Known from here on: found by the first call, they would be a change that makes PyTorch compile
# again what it has just compiled. A trace that imports this module must not see them appear.
if torch._guards.TracingContext.try_get() is None:
    for _kind in _PLAIN:
        library_of_type(_kind)
