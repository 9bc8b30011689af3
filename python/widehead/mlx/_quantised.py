"""Attention over mlx-lm's quantised caches, whose format (MLX's affine groups) no kernel reads.

mlx-lm stores the scores, and where heads share keys it copies the packed cache once for each of
them. Widehead's kernels are faster over numbers that were widened for one call, even for a single
query, so what decides is memory: they serve where those numbers take no more than that.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

Packed = tuple[mx.array, mx.array, mx.array]  # codes in uint32, scales, biases

_BITS = (2, 4, 8)  # whole codes in a byte


def why_not(q: mx.array, k: Packed, v: Packed, mask: Any, bits: int) -> str | None:
    """Why mlx-lm's own products must serve; None: they need not."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return "quantised caches are measured on the CPU alone"
    if bits not in _BITS:
        return f"a cache has {bits} bits, and Widehead widens 2, 4 and 8"
    if isinstance(mask, mx.array) and mask.ndim == 3 and mask.shape[0] != 1:
        return "a mask of rank 3 is one of each query head of a group there"
    group = q.shape[1] // k[0].shape[1]
    packed = sum(each.nbytes for each in (*k, *v))
    scores = q.size // q.shape[-1] * k[0].shape[-2] * q.itemsize
    own = scores + (group * packed if group > 1 else 0)
    widened = sum(each[0].nbytes * 8 // bits * each[1].itemsize for each in (k, v))
    if widened > own:
        return f"its copies and scores take {own} bytes, widened keys and values {widened}"
    return None


def widened(tensor: Packed, group_size: int, bits: int) -> mx.array:
    """``mx.dequantize``, the same bits: on the CPU that takes as much as its result again beside it,
    and several times the time."""
    packed, scales, biases = tensor
    if bits == 8:
        codes = packed.view(mx.uint8)
    else:
        # In integers of the result's size, every step takes the memory of the one before.
        word = mx.uint32 if scales.itemsize == 4 else mx.uint16
        shifts = mx.arange(0, 8 * scales.itemsize, bits, dtype=word)
        codes = (packed.view(word)[..., None] >> shifts) & (2**bits - 1)
    groups = codes.reshape(*scales.shape, group_size)
    return (groups * scales[..., None] + biases[..., None]).flatten(-2)
