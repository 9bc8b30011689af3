"""Continuous batching of transformers over pages: its cache read by table, in place.

transformers writes the new keys into its pages and then copies the pages of every request out again,
for each layer and step; ``sdpa`` and ``eager`` attend over all requests at once under a dense mask.
Here its allocators hand out the pages and a list of them in place of the copy, and one call reads
them with each request's own lengths.

The attention function is told neither the cache nor which of its lists is a layer's; both are found
as the cache finds them. All of this is inside of transformers: the tests say for which versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)

from widehead import sdpa
from widehead._limits import Limits
from widehead.transformers._attention import expect_known, sinks_of

# transformers builds no mask for names with this word in them, and takes no others for its batches.
_NAME = "widehead_flash"
_NO_PAGE = 0  # a block of the cache's trash, which is never handed out


class _PageLists(FullAttentionCacheAllocator):
    """Lists a request's pages where the stock one lists every token, and hands out the whole pool
    where that copies the tokens out."""

    supports_block_table = False  # the kernel call that would write the cache itself

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        # The views of a layer count pages of all layers.
        pages_a_block = self.block_physical_stride // self.tokens_per_page
        count = -(-(past_length + query_length) // self.tokens_per_page)
        return [block * pages_a_block for block in self.block_table[request_id][:count]]

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        read_index: Tensor,
        write_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        k_cache, v_cache = self._kv_token_views[layer_idx]
        k_cache.index_copy_(0, write_index, key_states)
        v_cache.index_copy_(0, write_index, value_states)
        if read_index.numel() == 0:  # nobody has older keys
            return key_states, value_states
        k_pages, v_pages = self._kv_page_views[layer_idx]
        return k_pages, v_pages


class _SlidingPages(_PageLists, SlidingAttentionCacheAllocator):
    """Keeps the pages that a window still sees and gives the others back.

    The stock one is a ring of as many tokens as the window has, in which new keys take the places of
    some that the first queries of a chunk still see: hence its copy. Pages in order cost one page
    more a request, and a chunk's while it is computed.
    """

    def _pages(self, request_id: str, past_length: int, query_length: int) -> tuple[int, int, int]:
        """How many pages are given back, from which on they are seen, and how many there will be."""
        table = self.block_table.get(request_id, [])
        first_seen = max(0, past_length - self.sliding_window + 1) // self.tokens_per_page
        given_back = sum(block != _NO_PAGE for block in table[:first_seen])
        return given_back, first_seen, -(-(past_length + query_length) // self.tokens_per_page)

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        given_back, first_seen, count = self._pages(request_id, past_length, query_length)
        listed = len(self.block_table.get(request_id, []))
        return max(0, count - max(listed, first_seen) - given_back)

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        _, first_seen, count = self._pages(request_id, past_length, query_length)
        table = self.block_table.setdefault(request_id, [])
        unseen = [block for block in table[:first_seen] if block != _NO_PAGE]
        self.pool.free_blocks(self.index, unseen)
        kept = table[first_seen:]
        new = self.pool.get_free_blocks(self.index, max(0, count - first_seen - len(kept)))
        table[:] = [_NO_PAGE] * first_seen + kept + new

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        if request_id in self.block_table:
            table = self.block_table[request_id]
            self.block_table[request_id] = [block for block in table if block != _NO_PAGE]
        super().free_blocks(request_id, no_cache)

    # Tokens lie in order: as those of full attention.
    get_seqlen_k = FullAttentionCacheAllocator.get_seqlen_k
    get_write_indices = FullAttentionCacheAllocator.get_write_indices


def paged_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    read_index: list[Tensor],
    write_index: list[Tensor],
    limits: Limits,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the pages of :class:`_PageLists`, or over fresh keys where nobody has older ones.

    query [1, heads_q, tokens of all requests, dim]; key, value either the same of fresh keys, or the
    pool [1, page_size, pages, heads_kv, dim]. Returns ([1, tokens, heads_q, dim], None).
    """
    for name in ("block_table", "logits_indices", "logits_processor_args"):
        kwargs.pop(name, None)
    expect_known(module, kwargs)
    if dropout != 0.0 or attention_mask is not None or is_causal is False:
        raise ValueError(
            f"dropout is {dropout}, attention_mask {type(attention_mask).__name__} and is_causal "
            f"{is_causal}; over pages they must be 0, None and True"
        )
    group, layer_type = _group_of(module)
    window = module.config.sliding_window if layer_type == "sliding_attention" else None
    lengths = cu_seq_lens_k.diff()
    if key.dim() == 5:
        keys, values = (pool[0].permute(1, 2, 0, 3) for pool in (key, value))
        pages = (lengths + keys.shape[2] - 1) // keys.shape[2]
        layout: dict[str, Any] = {
            "page_table": read_index[group].to(torch.int32),
            "page_offsets": torch.nn.functional.pad(pages.cumsum(0), (1, 0)).to(torch.int32),
            "key_lengths": lengths,
            "len_k": max_length_k,
        }
    else:
        keys, values = (fresh[0].transpose(0, 1) for fresh in (key, value))
        layout = {"key_offsets": cu_seq_lens_q, "len_k": max_length_q}
    out = sdpa(
        query[0].transpose(0, 1),
        keys,
        values,
        scale=scaling,
        causal=True,
        window=None if window is None else (window - 1, None),
        softcap=softcap,
        sinks=sinks_of(s_aux),
        query_offsets=cu_seq_lens_q,
        len_q=max_length_q,
        limits=limits,
        **layout,
    )
    return out[None], None


def _group_of(module: Any) -> tuple[int, str]:
    """Which of the cache's allocators is the layer's, and of what kind it is."""
    for index, (kind, layers) in enumerate(group_layers_by_attn_type(module.config).items()):
        if module.layer_idx in layers:
            return index, kind
    raise ValueError(f"layer {module.layer_idx} belongs to no kind of layers of its model")


@contextmanager
def continuous_batching(model: Any, limits: Limits) -> Iterator[None]:
    """See :func:`widehead.transformers.continuous_batching`."""
    allocators = cache_module.ATTN_TYPE_TO_ALLOCATOR
    before, name = dict(allocators), model.config._attn_implementation
    AttentionInterface.register(_NAME, partial(paged_attention_forward, limits=limits))
    allocators |= {"full_attention": _PageLists, "sliding_attention": _SlidingPages}
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = name
        allocators |= before
