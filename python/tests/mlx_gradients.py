"""Gradients of widehead.mlx.sdpa against float64, on whatever device MLX works."""

import mlx.core as mx
import widehead.mlx
from mlx_arrays import numpy_of
from oracle import oracle_gradients, relative_rms


def attend(options):
    """``widehead.mlx.sdpa`` of q, k, v and maybe the sinks."""

    def function(q, k, v, *sinks):
        return widehead.mlx.sdpa(q, k, v, **options, **({"sinks": sinks[0]} if sinks else {}))

    return function


def assert_gradients(tensors, options, tolerance, **exact_options):
    """Those of ``tensors``, q, k, v and maybe the sinks, are float64's."""
    out = attend(options)(*tensors)
    d_out = mx.random.normal(out.shape, key=mx.random.key(1)).astype(out.dtype)
    _, actual = mx.vjp(attend(options), tensors, [d_out])
    if len(tensors) == 4:
        exact_options["sinks"] = numpy_of(tensors[3])
    expected = oracle_gradients(
        *map(numpy_of, tensors[:3]), numpy_of(d_out), scale=options["scale"], **exact_options
    )
    names = ("q", "k", "v", "sinks")
    for name, tensor, have, want in zip(names, tensors, actual, expected, strict=False):
        assert have.dtype == tensor.dtype and have.shape == tensor.shape
        assert relative_rms(numpy_of(have), want) <= tolerance, name
