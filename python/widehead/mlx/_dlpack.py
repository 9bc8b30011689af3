"""Without the primitive: the arrays are evaluated, handed over by DLPack, and the result is copied."""

from __future__ import annotations

from typing import Any, NoReturn

import mlx.core as mx

import widehead
from widehead._limits import Limits


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: mx.array | None,
    sinks: mx.array | None,
    key_starts: mx.array | None,
    limits: Limits,
    options: dict[str, Any],
) -> mx.array:
    """:func:`widehead.sdpa` with ``options``, under MLX's rules of types. Refuses tracers."""
    kind = mx.result_type(q, k, v)
    extras = {}
    if mask is not None:
        extras["mask"] = mask if mask.dtype == mx.bool_ else mask.astype(kind)
    if sinks is not None:
        extras["sinks"] = sinks.astype(mx.float32)
    if key_starts is not None:
        extras["key_starts"] = mx.maximum(key_starts, 0).astype(mx.int32)

    def call(*arrays: mx.array) -> mx.array:
        try:
            mx.eval(arrays)
        except ValueError as error:
            raise _no_transformation() from error
        q, k, v, *rest = arrays
        given: dict[str, Any] = dict(zip(extras, rest, strict=True)) | options
        result: mx.array = widehead.sdpa(q, k, v, **given, limits=limits)
        return result

    # MLX evaluates a tracer of mx.grad like any array, and the graph would end here in silence.
    function = mx.custom_function(call)
    function.vjp(_refuse_transformation)
    function.jvp(_refuse_transformation)
    function.vmap(_refuse_transformation)
    tensors = (each.astype(kind) for each in (q, k, v))
    result: Any = function(*tensors, *extras.values())
    return result  # type: ignore[no-any-return]


def _no_transformation() -> ValueError:
    return ValueError(
        "widehead.mlx without its primitive takes no mx.grad, mx.vmap and mx.compile; "
        "`python -m widehead.mlx` says what is missing"
    )


def _refuse_transformation(*_: Any) -> NoReturn:
    raise _no_transformation()
