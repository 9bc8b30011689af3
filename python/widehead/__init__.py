"""Exact attention for any head dimension and any context length, planned before it runs.

>>> import numpy as np, widehead
>>> q = np.random.randn(1, 8, 2048, 256).astype("float32")
>>> k, v = np.random.randn(2, 1, 2, 2048, 256).astype("float32")
>>> out = widehead.sdpa(q, k, v, causal=True)
>>> print(widehead.explain(q, k, v, causal=True))
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from widehead import _core
from widehead._append import append
from widehead._arrays import expect_writable, library_of
from widehead._checks import yes
from widehead._errors import Refused
from widehead._limits import Limits, limits_of
from widehead._merge import merge
from widehead._models import Layer, Model, models
from widehead._plan import Candidate, Plan
from widehead._quantised import Quantised

__version__ = _core.version()
__all__ = [
    "Candidate",
    "Kernel",
    "Layer",
    "Limits",
    "Model",
    "Plan",
    "Quantised",
    "Refused",
    "Spec",
    "append",
    "device",
    "explain",
    "kernels",
    "merge",
    "models",
    "plan",
    "sdpa",
]

Causal = Literal[False, True, "bottom_right", "top_left"]
Window = tuple[int | None, int | None]
Spec = _core.Spec


def sdpa(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window: Window | None = None,
    softcap: float | None = None,
    mask: Any = None,
    sinks: Any = None,
    key_lengths: Any = None,
    key_starts: Any = None,
    query_offsets: Any = None,
    key_offsets: Any = None,
    page_table: Any = None,
    page_offsets: Any = None,
    len_q: int | None = None,
    len_k: int | None = None,
    return_log_sum_exp: bool = False,
    out: Any = None,
    limits: Limits | None = None,
) -> Any:
    """Scaled dot-product attention: ``softmax(mask(softcap(scale * q k^T))) v``.

    Takes any array that supports DLPack (NumPy, PyTorch, JAX, MLX, CuPy, bfloat16 of ml_dtypes)
    without copying it, and answers with an array of q's kind; MLX adopts no memory and copies the
    result. CUDA arrays run on the caller's stream; CPU arrays run without the GIL. Plans are cached
    by shape and limits.

    q: [batch, heads_q, len_q, dim_qk], float32, float16 or bfloat16. Dimensions from 1 to 1024.
        Any strides that are not negative, here and below: a reversed view must be copied.
    k: [batch, heads_kv, len_k, dim_qk]; heads_q is a multiple of heads_kv, and query head h reads
        kv head h // (heads_q // heads_kv).
    v: [batch, heads_kv, len_k, dim_v], of k's type; k or v may be :class:`Quantised`. A slice
        ``k[..., :dim_v]``, as in absorbed latent attention, is seen as such: kernels on CUDA read it
        once.
    scale: default 1 / sqrt(dim_qk).
    causal: True or ``"bottom_right"``: query i sees key j when j <= i + len_k - len_q;
        ``"top_left"``: when j <= i.
    window: (left, right) keys around the same diagonal that stay visible beside the query's own;
        None for a side without limit.
    softcap: scores become softcap * tanh(score / softcap), before masks.
    mask: broadcasts to [batch, heads_q, len_q, len_k]; bool (True attends), or float32 or q's type
        (added to the scores; minus infinity hides the key).
    sinks: float32 [heads_q]: one more logit a head, in the denominator only.
    key_lengths: int32 [batch]: keys from there on are not read, and causal and window align to it
        in place of len_k.
    key_starts: int32 [batch]: keys before it are not read (left padding).
    query_offsets: int32 [batch + 1], ascending from 0: sequences of unequal lengths one after
        another. q and out are then [total_q, heads_q, dim], the log-sum-exp is [total_q, heads_q],
        and sequence b has the tokens from query_offsets[b] on, to before query_offsets[b + 1]. Each
        has a diagonal of its own; masks are for dense queries.
    key_offsets: the same of k and v, which are then [total_k, heads_kv, dim].
    page_table: int32 [batch, pages of a sequence]: k and v are pools of pages, [pages, heads_kv,
        page_size, dim], tokens before heads as ``pool.transpose(1, 2)``, and sequence b has key_lengths[b]
        keys in the pages of its row, in order. Pages may be shared. What no length makes visible, in the
        table and in the pages, is never read.
    page_offsets: int32 [batch + 1]: page_table is one list of pages, [entries], cut as
        query_offsets cuts q.
    len_q, len_k: the most queries and keys of one sequence. By default what query_offsets,
        key_offsets, a row of page_table and, with page_offsets, key_lengths say; these must be on
        the CPU for that, but for page_table.
    return_log_sum_exp: also returns float32 [batch, heads_q, len_q], natural log, sinks included.
    out: [batch, heads_q, len_q, dim_v] of q's type, written in place of a new array. JAX and MLX
        arrays are immutable and refused.
    limits: what the call may take; see :class:`Limits`.

    Returns out, or (out, log_sum_exp). A row that sees no key is 0, its log-sum-exp minus infinity.

    Raises :class:`Refused` when the limits allow no kernel, ValueError and TypeError with the
    argument, its value and what would be valid, MemoryError, RuntimeError when a device fails.

    The formula is that of Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1, with
    the cap on scores of Gemma 2 and the sinks of gpt-oss; docs/semantics.md is the contract,
    docs/serving.md shows packed sequences and pages.
    """
    if out is not None:
        expect_writable(out)
    yes("return_log_sum_exp", return_log_sum_exp)
    return library_of(q).sdpa(
        (q, k, v, scale, causal, window, softcap, mask, sinks, key_lengths, key_starts,
         _layouts(query_offsets, key_offsets, page_table, page_offsets, len_q, len_k),
         return_log_sum_exp, out),
        limits_of(limits),
    )  # fmt: skip


def plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window: Window | None = None,
    softcap: float | None = None,
    mask: Any = None,
    sinks: Any = None,
    key_lengths: Any = None,
    key_starts: Any = None,
    query_offsets: Any = None,
    key_offsets: Any = None,
    page_table: Any = None,
    page_offsets: Any = None,
    len_q: int | None = None,
    len_k: int | None = None,
    return_log_sum_exp: bool = False,
    out: Any = None,
    gradients: bool = False,
    limits: Limits | None = None,
) -> Plan:
    """What :func:`sdpa` would do with the same arguments; with ``gradients``, what the backward
    pass behind it would, whose gradients are contiguous. Runs nothing, and reads no memory but
    offsets and lengths, for a ``len_q`` or ``len_k`` that is not given.

    Any array may be a :class:`Spec`, a shape without memory::

        cache = widehead.Spec((1, 4, 131072, 512), "bfloat16")
        widehead.plan(widehead.Spec((1, 32, 2048, 512), "bfloat16"), cache, cache, causal=True)
    """
    library = library_of(q)
    text, plan_json = _core.plan(
        q, k, v, scale, causal, window, softcap, mask, sinks, key_lengths, key_starts,
        _layouts(query_offsets, key_offsets, page_table, page_offsets, len_q, len_k),
        return_log_sum_exp, out, gradients, limits_of(limits)._core,
        library.threads(), library.stream(q),
    )  # fmt: skip
    return Plan(text, plan_json)


def _layouts(
    query_offsets: Any,
    key_offsets: Any,
    page_table: Any,
    page_offsets: Any,
    len_q: int | None,
    len_k: int | None,
) -> tuple[Any, ...] | None:
    """As the extension module takes them: None where everything is dense."""
    if query_offsets is key_offsets is page_table is page_offsets is len_q is len_k is None:
        return None
    return query_offsets, key_offsets, page_table, page_offsets, len_q, len_k


def explain(q: Any, k: Any, v: Any, **options: Any) -> str:
    """The table of :meth:`Plan.explain` for the arguments of :func:`sdpa`."""
    return plan(q, k, v, **options).explain()


@dataclass(frozen=True)
class Kernel:
    """A kernel by name, the device that it runs on, and what it is in a line."""

    name: str
    device: str
    summary: str


def kernels() -> list[Kernel]:
    """Every kernel of this build, in the order in which the planner offers them."""
    return [
        Kernel(name, device, summary)
        for index, device in enumerate(("cpu", "cuda"))
        for name, summary in _core.kernels(index)
    ]


def device(name: str = "cpu") -> dict[str, Any]:
    """What the planner knows of ``"cpu"``, ``"cuda"`` or ``"cuda:1"``: name, cores, rates.

    Raises RuntimeError with the reason when there is none.
    """
    if not isinstance(name, str):
        raise TypeError(f"device is {name!r}; it must be a string: cpu, cuda, cuda:0 ...")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index == "" or index.isdigit()):
        raise ValueError(f"device is {name!r}; valid: cpu, cuda, cuda:0 ...")
    facts: dict[str, Any] = json.loads(_core.device_json(int(kind == "cuda"), int(index or 0)))
    return facts
