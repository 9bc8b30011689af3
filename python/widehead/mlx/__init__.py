"""MLX: ``mx.fast.scaled_dot_product_attention`` by Widehead, for mlx-lm and everything else.

>>> import widehead.mlx
>>> with widehead.mlx.override_sdpa():
...     mlx_lm.generate(model, tokenizer, prompt)

The work is an MLX primitive, compiled for the installed MLX at the first import and kept in the
user's cache; ``python -m widehead.mlx`` does the same and says what it found. Where it cannot be
compiled, arrays travel by DLPack: evaluated at every call, and no mx.grad, mx.vmap or mx.compile.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import mlx.core as mx

import widehead
from widehead._checks import LONGEST, is_whole, number, softcap_of
from widehead._errors import expect_kernel
from widehead._limits import Limits, backward_limits, limits_of
from widehead._plan import Plan
from widehead.mlx import _build, _dlpack, _mlx_lm, _quantised
from widehead.mlx._masks import Masks

__all__ = ["install", "override_sdpa", "plan", "sdpa", "uninstall", "why_no_primitive"]

_LARGEST_DIM = 1024
_TYPES = (mx.float32, mx.float16, mx.bfloat16)
# MLX's StreamOrDevice; it has streams of threads since 0.32.
_STREAMS = (mx.Stream, mx.Device, mx.DeviceType, getattr(mx, "ThreadLocalStream", mx.Stream))


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("WIDEHEAD_MLX") == "dlpack":
        return None, "the environment says WIDEHEAD_MLX=dlpack"
    try:
        return _build.load(), None
    except _build.CannotBuild as error:
        warnings.warn(f"widehead.mlx copies through DLPack: {error}", stacklevel=3)
        return None, str(error)


_primitive, why_no_primitive = _load()
_masks = Masks(_primitive) if _primitive is not None else None


@lru_cache(maxsize=64)
def _primitive_limits(limits: Limits) -> Any:
    assert _primitive is not None
    return _primitive.limits(**limits.core_values())


def sdpa(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    force_fused: bool = False,
    stream: Any = None,
    softcap: float | None = None,
    window: int | None = None,
    key_starts: mx.array | None = None,
    limits: Limits | None = None,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention`` by Widehead, lazily and on MLX's stream.

    The same arguments and meaning: q [batch, heads_q, len_q, dim_qk], k and v [batch, heads_kv,
    len_k, dim], promoted to their common type; mask None, ``"causal"`` (aligned bottom-right) or an
    array of rank 1 to 4 that broadcasts to [batch, heads_q, len_q, len_k], boolean or additive;
    sinks [heads_q]. A row that sees no key is 0. ``force_fused`` refuses kernels that store the
    scores. Beyond MLX's:

    softcap: scores become softcap * tanh(score / softcap), before masks.
    window: keys to the left of the diagonal that stay visible beside the query's own.
    key_starts: [batch]: keys before it are not read (left padding).
    limits: what the call may take; see :class:`widehead.Limits`.

    Strided arrays are read where they are. Reversed ones, masks too, are copied on the CPU, and refused
    on a GPU when they are evaluated, as MLX tells strides no sooner: pass mx.contiguous() of them.
    Works under mx.compile, shapeless too. q, k, v and sinks have gradients that store no scores;
    those of an additive mask, of heads beyond 512 on a GPU, second ones, mx.jvp and mx.vmap take
    MLX's own operations, which do. Raises ValueError with the argument, its value and what would be valid, and
    :class:`widehead.Refused` when the limits allow no kernel.
    """
    _expect_arrays(q, k, v, mask, sinks, key_starts)
    if stream is not None and not isinstance(stream, _STREAMS):
        raise TypeError(
            f"stream is {stream!r}; it must be a stream or device of mlx.core, such as mlx.core.cpu, "
            "or None"
        )
    scale, softcap = number("scale", scale), softcap_of(softcap)
    if window is not None and not (is_whole(window) and 0 <= window <= LONGEST):
        raise ValueError(
            f"window is {window!r}; it must be a number of keys from 0 to {LONGEST}, or None"
        )
    if force_fused:
        limits = replace(limits_of(limits), policy="fused")
    causal = isinstance(mask, str)
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask is {mask!r}; valid: None, \"causal\", an array")
    array = None if isinstance(mask, str) else mask
    if array is not None and _masks is not None:
        structure = _masks.structure_of(array, q.shape[-2], k.shape[-2])
        if structure is not None and window is None and key_starts is None:
            array, causal = None, True
            window, key_starts = structure.window_left, structure.key_starts
    if limits is not None:
        _expect_allowed(
            q, k, v, limits, scale=scale, mask="causal" if causal else array, sinks=sinks,
            softcap=softcap, window=window, key_starts=key_starts,
        )  # fmt: skip
    chosen = limits_of(limits)
    if _primitive is None:
        options = {
            "scale": scale,
            "causal": causal,
            "window": None if window is None else (window, None),
            "softcap": softcap,
        }
        return _dlpack.attention(q, k, v, array, sinks, key_starts, chosen, options)
    result: mx.array = _primitive.attention(
        q, k, v, scale, causal, -1 if window is None else window, softcap, array, sinks,
        key_starts, _primitive_limits(chosen), stream,
    )  # fmt: skip
    return result


def _expect_arrays(q: Any, k: Any, v: Any, mask: Any, sinks: Any, key_starts: Any) -> None:
    needed = {"q": q, "k": k, "v": v}
    optional = {"mask": mask, "sinks": sinks, "key_starts": key_starts}
    for name, each in (needed | optional).items():
        if isinstance(each, mx.array) or (each is None and name in optional):
            continue
        if isinstance(each, str) and name == "mask":
            continue
        or_none = " or None" if name in optional else ""
        raise TypeError(f"{name} is a {type(each).__name__}; it must be an mlx.core.array{or_none}")
    if key_starts is not None and not mx.issubdtype(key_starts.dtype, mx.integer):
        raise ValueError(f"key_starts is {key_starts.dtype}; it must be of whole numbers")


def plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    mask: Any = None,
    sinks: Any = None,
    softcap: float | None = None,
    window: int | None = None,
    key_starts: Any = None,
    gradients: bool = False,
    limits: Limits | None = None,
) -> Plan:
    """What :func:`sdpa` would do with the same arguments: kernel, bytes, time, and why no other;
    with ``gradients``, what mx.grad would in its backward pass.

    Evaluates nothing: only shapes and types are read, those of contiguous arrays, where MLX's default
    device is. Any array may be a :class:`widehead.Spec`.
    """
    where = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "cuda"
    arrays = [each for each in (q, k, v) if isinstance(each, mx.array)]
    kind = mx.result_type(*arrays) if arrays else None

    def spec(array: Any, dtype: Any = None) -> Any:
        if not isinstance(array, mx.array):
            return array
        name = str(dtype or array.dtype).rpartition(".")[2]
        return widehead.Spec(array.shape, "bool" if name == "bool_" else name, where)

    causal = isinstance(mask, str)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = spec(mask, kind)
    return widehead.plan(
        *(spec(each, kind) for each in (q, k, v)),
        scale=scale,
        causal=causal,
        window=None if window is None else (window, None),
        softcap=softcap,
        mask=None if causal else spec(mask),
        sinks=spec(sinks, mx.float32),
        key_starts=spec(key_starts, mx.int32),
        gradients=gradients,
        limits=backward_limits(limits) if gradients and limits is not None else limits,
    )


def _expect_allowed(
    q: mx.array, k: mx.array, v: mx.array, limits: Limits, **options: Any
) -> None:
    """Raises here what would otherwise come out of mx.eval, where MLX makes it a RuntimeError."""
    expect_kernel(plan(q, k, v, limits=limits, **options))


def _out_of_reach(q: mx.array, v: mx.array, kind: mx.Dtype) -> str | None:
    """Why MLX's own function must serve; None: it need not."""
    if _primitive is None and mx.default_device().type != mx.DeviceType.cpu:
        return "without its primitive Widehead serves MLX on the CPU alone"
    dim = max(q.shape[-1], v.shape[-1])
    if dim > _LARGEST_DIM:
        return f"a head has {dim} dimensions, and Widehead takes at most {_LARGEST_DIM}"
    if kind not in _TYPES:
        return f"q, k and v promote to {kind}, and Widehead takes float32, float16 and bfloat16"
    return None


@lru_cache(maxsize=1024)  # once each
def _log(q_shape: tuple[int, ...], len_k: int, what: str) -> None:
    if os.environ.get("WIDEHEAD_LOG") == "plan":
        print(f"widehead: {list(q_shape)} x {len_k}: {what}", file=sys.stderr)


def _in_place_of(original: Callable[..., mx.array], limits: Limits | None) -> Any:
    def scaled_dot_product_attention(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: str | mx.array | None = None,
        sinks: mx.array | None = None,
        force_fused: bool = False,
        stream: Any = None,
    ) -> mx.array:
        reason = _out_of_reach(q, v, mx.result_type(q, k, v))
        if reason is None:
            return sdpa(
                q, k, v, scale=scale, mask=mask, sinks=sinks, force_fused=force_fused,
                stream=stream, limits=limits,
            )  # fmt: skip
        _log(tuple(q.shape), k.shape[-2], f"MLX's own; {reason}")
        return original(
            q, k, v, scale=scale, mask=mask, sinks=sinks, force_fused=force_fused, stream=stream
        )

    return scaled_dot_product_attention


def _in_place_of_quantised(original: Callable[..., mx.array], limits: Limits | None) -> Any:
    """Of ``mlx_lm.models.base.quantized_scaled_dot_product_attention``."""

    def quantized_scaled_dot_product_attention(
        queries: mx.array,
        q_keys: _quantised.Packed,
        q_values: _quantised.Packed,
        scale: float,
        mask: str | mx.array | None,
        group_size: int = 64,
        bits: int = 8,
    ) -> mx.array:
        shape, len_k = tuple(queries.shape), q_keys[0].shape[-2]
        reason = _quantised.why_not(queries, q_keys, q_values, mask, bits)
        if reason is None:
            k, v = (_quantised.widened(each, group_size, bits) for each in (q_keys, q_values))
            reason = _out_of_reach(queries, v, mx.result_type(queries, k, v))
        if reason is None:
            _log(shape, len_k, f"keys and values of {bits} bits are widened for this call")
            return sdpa(queries, k, v, scale=scale, mask=mask, limits=limits)
        _log(shape, len_k, f"mlx-lm's own; {reason}")
        return original(queries, q_keys, q_values, scale, mask, group_size, bits)

    return quantized_scaled_dot_product_attention


@contextmanager
def override_sdpa(limits: Limits | None = None) -> Iterator[None]:
    """Puts :func:`sdpa` in the place of ``mx.fast.scaled_dot_product_attention``, for every thread.

    Where mlx-lm is installed, its windows and left padding reach the kernels as structure, and Gemma
    2's own attention and that over quantised caches are replaced too. What is out of reach (dimensions above 1024, float64) goes to
    MLX's own function; WIDEHEAD_LOG=plan in the environment shows that, and every plan, on stderr.
    Attention over quantised caches stays mlx-lm's on GPUs, and where keys and values that are widened
    for the call would take more memory than it. All of it is put back at the end.

    A function of ``mx.compile`` keeps what its first call found.
    """
    limits_of(limits)  # an error here, not in a model's first layer
    with ExitStack() as originals:

        def put(owner: Any, name: str, replacement: Any) -> None:
            originals.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)

        own = mx.fast.scaled_dot_product_attention
        put(mx.fast, "scaled_dot_product_attention", _in_place_of(own, limits))
        mlx_lm = _mlx_lm.modules()
        if mlx_lm:
            if _masks is not None:
                for module in (mlx_lm["base"], mlx_lm["cache"]):  # each knows it by value
                    create = _masks.remembering(module.create_causal_mask)
                    put(module, "create_causal_mask", create)

            def with_softcap(*args: Any, **kwargs: Any) -> mx.array:
                return sdpa(*args, **kwargs, limits=limits)

            name = "quantized_scaled_dot_product_attention"
            own = getattr(mlx_lm["base"], name)
            put(mlx_lm["base"], name, _in_place_of_quantised(own, limits))
            attention = _mlx_lm.gemma2_attention(with_softcap)
            put(mlx_lm["gemma2"].Attention, "__call__", attention)
        yield


_installed: list[ExitStack] = []


def install(limits: Limits | None = None) -> None:
    """:func:`override_sdpa` until :func:`uninstall`."""
    stack = ExitStack()
    stack.enter_context(override_sdpa(limits))
    _installed.append(stack)


def uninstall() -> None:
    """Takes back the last :func:`install`."""
    if not _installed:
        raise RuntimeError("widehead.mlx is not installed; call install() first")
    _installed.pop().close()
