"""New keys and values, written into caches."""

from __future__ import annotations

from typing import Any

from widehead import _core
from widehead._arrays import expect_writable, library_of
from widehead._quantised import Quantised


def append(k: Any, v: Any, new_k: Any, new_v: Any, slots: Any) -> None:
    """Writes the keys and values of new tokens into the caches ``k`` and ``v``, in place.

    k: a pool of pages, [pages, heads_kv, page_size, dim_qk], by any strides, as :func:`widehead.sdpa`
        reads it with a page table; a dense cache [batch, heads_kv, len_k, dim_qk]; or packed keys
        [tokens, heads_kv, dim_qk]. float32, float16, bfloat16 or :class:`Quantised`, whose codes and,
        where each token and head has its own, scales are written.
    v: the same of the values. A slice of k, as in absorbed latent attention, is written with it.
    new_k: [tokens, heads_kv, dim_qk], float32, float16 or bfloat16: of the cache's type it is copied,
        otherwise rounded.
    new_v: [tokens, heads_kv, dim_v] of new_k's type. Not read, and may be None, where v is a slice of k.
    slots: int64 [tokens], where each goes: ``page * page_size + row``, in a dense cache
        ``batch * len_k + key``, in packed keys the token. Negative ones are skipped; no two are alike.

    Arrays of any library whose arrays can be written. On CUDA it runs on the caller's stream.
    """
    for name, cache in (("k", k), ("v", v)):
        stored = cache.codes if isinstance(cache, Quantised) else cache
        expect_writable(stored, name, "it must be of a library whose arrays can be written")
    _core.append(k, v, new_k, new_v, slots, library_of(new_k).stream(new_k))
