"""Steps of a real engine, replayed: vLLM 0.32 serving Gemma 3 270M, chunks beside single tokens.

engine_steps.json holds what the attention of a windowed and of a full layer was called with: offsets,
lengths and page tables as they were, but for the pages' numbers, which count only those that are listed.
integrations/vllm/tests records it. Queries, keys and values are drawn anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from oracle import oracle

PATH = Path(__file__).parent / "engine_steps.json"


def steps() -> list[dict]:
    return json.loads(PATH.read_text())["steps"]


def arrays_of(step: dict, dtype, seed: int = 0):
    """q [tokens, heads, dim], and K and V as vLLM has them: one allocation, a key and a value a row."""
    rng = np.random.default_rng(seed)
    dim = step["head_size"]
    q = rng.standard_normal((step["query_offsets"][-1], step["heads_q"], dim)).astype(dtype)
    shape = (step["pages"], step["heads_kv"], step["page_size"], 2 * dim)
    pool = rng.standard_normal(shape).astype(dtype)
    return q, pool


def numbers_of(step: dict):
    return {name: np.array(step[name], np.int32) for name in ("query_offsets", "page_table", "key_lengths")}


def options_of(step: dict) -> dict:
    window = step["window"]
    return {
        "causal": True,
        "scale": step["scale"],
        "window": None if window is None else (window, None),
        "len_q": step["len_q"],
        "len_k": step["len_k"],
    }


def expected(step: dict, q, pool):
    """In float64, each request as if it were alone: [tokens, heads, dim]."""
    dim = step["head_size"]
    outs = []
    options = {name: options_of(step)[name] for name in ("causal", "scale", "window")}
    for b, length in enumerate(step["key_lengths"]):
        begin, end = step["query_offsets"][b : b + 2]
        pages = pool[step["page_table"][b][: -(-length // step["page_size"])]]
        rows = pages.transpose(1, 0, 2, 3).reshape(step["heads_kv"], -1, 2 * dim)[:, :length]
        queries = q[begin:end].transpose(1, 0, 2)
        out, _ = oracle(queries[None], rows[None, ..., :dim], rows[None, ..., dim:], **options)
        outs.append(out[0].transpose(1, 0, 2))
    return np.concatenate(outs)
