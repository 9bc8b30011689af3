"""Attention and its gradients in float64 NumPy, written from the contract alone; and data to try them on."""

from __future__ import annotations

import numpy as np


def heads(
    q,
    k,
    v,
    *,
    scale=None,
    causal=False,
    window=None,
    softcap=None,
    mask=None,
    sinks=None,
    key_lengths=None,
    key_starts=None,
):
    """(batch, query head, kv head, weights, log-sum-exp, d capped / d score) of each query head."""
    batch, heads_q, len_q, dim_qk = q.shape
    heads_kv, len_k = k.shape[1:3]
    scale = 1 / np.sqrt(dim_qk) if scale is None else scale
    left, right = window if window is not None else (None, None)
    query, key = np.arange(len_q)[:, None], np.arange(len_k)[None, :]
    whole = None if mask is None else np.broadcast_to(mask, (batch, heads_q, len_q, len_k))
    for b in range(batch):
        length = len_k if key_lengths is None else int(key_lengths[b])
        start = 0 if key_starts is None else int(key_starts[b])
        diagonal = query + (0 if causal == "top_left" else length - len_q)
        visible = (key < length) & (key >= start) & np.ones((len_q, 1), bool)
        if causal:
            visible &= key <= diagonal
        if left is not None:
            visible &= key >= diagonal - left
        if right is not None and not causal:
            visible &= key <= diagonal + right
        for h in range(heads_q):
            group = h // (heads_q // heads_kv)
            scores = scale * (q[b, h] @ k[b, group].T)
            slope = np.ones_like(scores)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
                slope = 1 - (scores / softcap) ** 2
            seen = visible
            if whole is not None and whole.dtype == bool:
                seen = visible & whole[b, h]
            elif whole is not None:
                bias = whole[b, h].astype(np.float64)
                seen = visible & (bias != -np.inf)
                scores = scores + np.where(seen, bias, 0)
            scores = np.where(seen, scores, -np.inf)
            highest = scores.max(axis=1, initial=-np.inf)
            if sinks is not None:
                highest = np.maximum(highest, sinks[h])
            pivot = np.where(np.isinf(highest), 0, highest)
            weights = np.exp(scores - pivot[:, None])
            total = weights.sum(axis=1)
            if sinks is not None:
                total = total + np.exp(sinks[h] - pivot)
            some = total > 0
            weights[some] /= total[some, None]
            log_sum_exp = np.full(len_q, -np.inf)
            log_sum_exp[some] = pivot[some] + np.log(total[some])
            yield b, h, group, weights, log_sum_exp, slope


def oracle(q, k, v, **options):
    """(out, log_sum_exp) in float64. Loops over the batch and heads; rows see keys by name."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    log_sum_exp = np.zeros(q.shape[:3])
    for b, h, group, weights, log_sum_exp[b, h], _ in heads(q, k, v, **options):
        out[b, h] = weights @ v[b, group]
    return out, log_sum_exp


def oracle_gradients(q, k, v, d_out, **options):
    """dq, dk, dv and d_sinks (zeros without sinks) in float64, by the contract's formulas."""
    q, k, v, d_out = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_out))
    scale, sinks = options.get("scale"), options.get("sinks")
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    dq, dk, dv, d_sinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(q.shape[1])
    for b, h, group, weights, log_sum_exp, slope in heads(q, k, v, **options):
        d_weights = d_out[b, h] @ v[b, group].T
        delta = (weights * d_weights).sum(axis=1)
        d_scores = scale * weights * (d_weights - delta[:, None]) * slope
        dv[b, group] += weights.T @ d_out[b, h]
        dq[b, h] = d_scores @ k[b, group]
        dk[b, group] += d_scores.T @ q[b, h]
        if sinks is not None:
            d_sinks[h] -= (np.exp(sinks[h] - log_sum_exp) * delta).sum()
    return dq, dk, dv, d_sinks


def relative_rms(actual, expected):
    """Of the whole array; 0 for two empty or two zero arrays."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    error, size = np.sqrt(np.sum((actual - expected) ** 2)), np.sqrt(np.sum(expected**2))
    return error / size if size > 0 else error


# What the contract promises against float64 on N(0, 1) data.
BOUNDS = {"float32": 4e-6, "float16": 9e-4, "bfloat16": 7e-3}


def qkv(seed=0, batch=2, heads=(4, 2), length=(33, 77), dim=(64, 48), dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(
        rng.standard_normal(shape).astype(dtype)
        for shape in (
            (batch, heads[0], length[0], dim[0]),
            (batch, heads[1], length[1], dim[0]),
            (batch, heads[1], length[1], dim[1]),
        )
    )
