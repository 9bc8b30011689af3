"""Partial results over different keys, merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

_NAMESPACES = {"numpy": "numpy", "torch": "torch", "jax": "jax.numpy", "jaxlib": "jax.numpy"}
_NAMESPACES |= {"mlx": "mlx.core", "cupy": "cupy"}


def merge(parts: Iterable[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Merges attention over parts of the keys into attention over all of them.

    parts: ``(out, log_sum_exp)`` pairs as ``sdpa(..., return_log_sum_exp=True)`` answers them, of
        one shape and library: out [batch, heads_q, len_q, dim_v], log_sum_exp
        [batch, heads_q, len_q]. Sinks belong to one part alone.

    Returns ``(out, log_sum_exp)`` in the parts' types, computed in float32:
    ``out = sum_i exp(l_i - l) out_i`` with ``l = log sum_i exp(l_i)``. Rows that no part saw stay 0
    with a log-sum-exp of minus infinity.
    """
    pairs = list(parts)
    if not pairs:
        raise ValueError("parts is empty; it must hold at least one (out, log_sum_exp)")
    first = pairs[0][0]
    root = type(first).__module__.partition(".")[0]
    if root not in _NAMESPACES:
        raise TypeError(f"parts hold {type(first).__name__}; valid: {', '.join(_NAMESPACES)} arrays")
    xp = import_module(_NAMESPACES[root])
    for out, log_sum_exp in pairs:
        if tuple(out.shape) != tuple(first.shape) or (
            tuple(log_sum_exp.shape) != tuple(first.shape)[:-1]
        ):
            raise ValueError(
                f"a part is {tuple(out.shape)} with a log_sum_exp of {tuple(log_sum_exp.shape)}; "
                f"each must be {tuple(first.shape)} with {tuple(first.shape)[:-1]}"
            )
    highest = pairs[0][1]
    for _, log_sum_exp in pairs[1:]:
        highest = xp.maximum(highest, log_sum_exp)
    # Where no part saw a key the weights would be exp(-inf + inf): there 0 stands in for it.
    is_empty = highest == -float("inf")
    pivot = xp.where(is_empty, xp.zeros_like(highest), highest)
    weights = [xp.exp(log_sum_exp - pivot) for _, log_sum_exp in pairs]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    divisor = xp.where(is_empty, xp.ones_like(total), total)
    merged = pairs[0][0] * (weights[0] / divisor)[..., None]
    for (out, _), weight in zip(pairs[1:], weights[1:]):
        merged = merged + out * (weight / divisor)[..., None]
    log_total = pivot + xp.where(is_empty, highest, xp.log(divisor))
    cast = merged.to(first.dtype) if root == "torch" else merged.astype(first.dtype)
    return cast, log_total
