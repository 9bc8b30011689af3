"""MLX's arrays for tests, and the float64 numbers that they hold."""

import mlx.core as mx
import numpy as np
from oracle import qkv, relative_rms

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def numpy_of(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def arrays(dtype="float32", **shape):
    """q, k and v as MLX's, and as float64."""
    made = [mx.array(each).astype(DTYPES[dtype]) for each in qkv(**shape)]
    return made, [numpy_of(each) for each in made]


def error(actual, expected):
    return relative_rms(numpy_of(actual), expected)
