"""What mlx-lm computes by itself and Widehead replaces."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import mlx.core as mx


def modules() -> dict[str, Any]:
    """mlx-lm's modules that take part, by name; empty where it is not installed."""
    if importlib.util.find_spec("mlx_lm") is None:
        return {}
    names = ("base", "cache", "gemma2")
    return {name: importlib.import_module(f"mlx_lm.models.{name}") for name in names}


def gemma2_attention(sdpa: Any) -> Any:
    """``mlx_lm.models.gemma2.Attention.__call__``: its softcap is why it calls no fast attention."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        def heads(projected: mx.array) -> mx.array:
            return projected.reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)

        offset = 0 if cache is None else cache.offset
        q = self.rope(heads(self.q_proj(x)), offset=offset)
        k = self.rope(heads(self.k_proj(x)), offset=offset)
        v = heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = sdpa(q, k, v, scale=self.scale, softcap=self.attn_logit_softcapping, mask=mask)
        projected: mx.array = self.o_proj(out.swapaxes(1, 2).reshape(*x.shape[:2], -1))
        return projected

    return call
