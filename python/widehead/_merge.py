"""Partial results over different keys, merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from widehead._arrays import library_of


def merge(parts: Iterable[tuple[Any, Any]], *, sinks: Any = None) -> tuple[Any, Any]:
    """Merges attention over parts of the keys into attention over all of them.

    parts: ``(out, log_sum_exp)`` pairs as ``sdpa(..., return_log_sum_exp=True)`` answers them without
        sinks, of one shape: out [batch, heads_q, len_q, dim_v], float32, float16 or bfloat16,
        log_sum_exp float32 [batch, heads_q, len_q], natural. Where a log-sum-exp is minus infinity,
        out is not read.
    sinks: float32 [heads_q], joined once, here and in none of the parts.

    Returns new ``(out, log_sum_exp)`` of the first part's type and library:
    ``out = sum_i exp(l_i - l) out_i`` with ``l = log(exp(sink) + sum_i exp(l_i))``, summed in float32
    in the order of the parts. Rows that no part saw are 0, their log-sum-exp the sink or minus infinity.
    """
    if not isinstance(parts, Iterable):
        raise TypeError(f"parts is {parts!r}; it must be a list of (out, log_sum_exp)")
    pairs = list(parts)
    if not pairs:
        raise ValueError("parts is empty; it must hold at least one (out, log_sum_exp)")
    return library_of(pairs[0][0]).merge(pairs, sinks)
