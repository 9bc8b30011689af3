"""The backend: one call of widehead.append and one of widehead.sdpa for each layer and step.

vLLM's cache of a layer is [pages, heads_kv, page_size, 2 * head_size] by strides, whichever of its
layouts it has; the first half of a row is the key here and the rest the value. Prompts, chunks of them
and single tokens come in one batch, packed, and so they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from widehead import Spec, append, plan, sdpa

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class WideheadMetadata(AttentionMetadata):
    """Of a step, for the layers that share a page table. Tensors are on the engine's device."""

    tokens: int
    query_offsets: Tensor  # int32 [requests + 1]
    key_lengths: Tensor  # int32 [requests], the new tokens included
    page_table: Tensor  # int32 [requests, pages of the longest request that may come]
    len_q: int  # the most of one request
    len_k: int


class WideheadBuilder(AttentionMetadataBuilder[WideheadMetadata]):
    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> WideheadMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError("widehead-vllm computes causal attention alone; this batch is not")
        return WideheadMetadata(
            tokens=batch.num_actual_tokens,
            query_offsets=batch.query_start_loc,
            key_lengths=batch.seq_lens,
            page_table=batch.block_table_tensor,
            len_q=batch.max_query_len,
            len_k=batch.max_seq_len,
        )


def _refusal(
    heads: tuple[int, int], head_size: int, dtype: torch.dtype, page_size: int, **options: Any
) -> str | None:
    """Why no kernel would run a chunk of 16 tokens over pages, in the planner's words; None where one
    does. Reads no memory and runs nothing."""
    device = current_platform.device_type
    name = _DTYPES[dtype]
    pool = Spec((64, heads[1], page_size, head_size), name, device)
    try:
        made = plan(
            Spec((16, heads[0], head_size), name, device), pool, pool, causal=True, len_q=16,
            query_offsets=Spec((2,), "int32", device), key_lengths=Spec((1,), "int32", device),
            page_table=Spec((1, 64), "int32", device), **options,
        )  # fmt: skip
    except RuntimeError as error:  # there is no such device
        return str(error)
    if made.kernel is not None:
        return None
    return "; ".join(f"{each.kernel} {each.reason}" for each in made.candidates)


class WideheadImpl(AttentionImpl[WideheadMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        # vLLM's platform for CPUs asks no backend what it can: what cannot be is refused here.
        if alibi_slopes is not None:
            raise NotImplementedError("widehead-vllm has no ALiBi slopes")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"attention is of type {attn_type}; widehead-vllm has decoder attention alone")
        if not WideheadBackend.supports_kv_cache_dtype(kv_cache_dtype):
            raise NotImplementedError(
                f"kv_cache_dtype is {kv_cache_dtype}; widehead-vllm takes "
                + ", ".join(WideheadBackend.supported_kv_cache_dtypes)
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        # It counts the query itself.
        self.window = None if sliding_window is None else (sliding_window - 1, None)
        self.softcap = logits_soft_cap or None
        self.sinks = sinks
        config = get_current_vllm_config()
        reason = _refusal(
            (num_heads, self.num_kv_heads), head_size, config.model_config.dtype,
            config.cache_config.block_size or 16, window=self.window, softcap=self.softcap,
        )  # fmt: skip
        if reason is not None:
            raise NotImplementedError(f"widehead has no kernel for these layers: {reason}")

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        return kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        tokens = slot_mapping.shape[0]  # key and value may be padded
        append(*self._caches(kv_cache), key[:tokens], value[:tokens], slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: WideheadMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("widehead-vllm writes outputs as they are, not quantised")
        if attn_metadata is None:  # a run for its memory, before there is a cache
            return output.zero_()
        batch = attn_metadata
        if self.sinks is not None and self.sinks.dtype != torch.float32:
            self.sinks = self.sinks.float()  # weights are loaded by now
        k, v = self._caches(kv_cache)
        sdpa(
            query[: batch.tokens], k, v, scale=self.scale, causal=True, window=self.window,
            softcap=self.softcap, sinks=self.sinks, query_offsets=batch.query_offsets,
            len_q=batch.len_q, page_table=batch.page_table, key_lengths=batch.key_lengths,
            len_k=batch.len_k, out=output[: batch.tokens],
        )  # fmt: skip
        return output


class WideheadBackend(AttentionBackend):
    forward_includes_kv_cache_update = False  # the layer has them written first
    supported_dtypes: ClassVar[list[torch.dtype]] = list(_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        # A layer looks it up among vLLM's own names.
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[WideheadImpl]:
        return WideheadImpl

    @staticmethod
    def get_builder_cls() -> type[WideheadBuilder]:
        return WideheadBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1 if current_platform.is_cpu() else 16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A head's rows side by side first: what is read together lies together.
        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= 1024

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Why no kernel of Widehead would run, kernel by kernel; None where one does. Part of what
        ``validate_configuration`` answers."""
        if dtype not in _DTYPES or not cls.supports_head_size(head_size):
            return None  # said already
        sinks = Spec((8,), "float32", current_platform.device_type) if has_sink else None
        return _refusal((8, 1), head_size, dtype, block_size or 16, sinks=sinks)
