"""mlx-lm's masks as structure.

Every window of mlx-lm, and every left padding, becomes an array of booleans in
``create_causal_mask``. The one here answers with the same array and remembers what it means, so
that attention over that very array takes the structure, and MLX never computes the array at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Structure:
    """Causal, aligned bottom-right, over len_q queries and len_k keys."""

    len_q: int
    len_k: int
    window_left: int | None
    key_starts: mx.array | None  # [batch]


class Masks:
    """What is known of the masks that are alive."""

    def __init__(self, primitive: ModuleType) -> None:
        self._primitive = primitive
        # By the Python object. The handle tells whether it still is the array that it was made as:
        # ``mask &= other`` keeps the object and changes the array.
        self._known: dict[int, tuple[weakref.ref[mx.array], mx.array, Structure]] = {}

    def remembering(self, create: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """``create``, which is mlx-lm's create_causal_mask, with a memory."""

        def create_causal_mask(
            N: int,
            offset: int = 0,
            window_size: int | None = None,
            right_padding: mx.array | None = None,
            left_padding: mx.array | None = None,
        ) -> mx.array:
            mask = create(N, offset, window_size, right_padding, left_padding)
            # Right padding moves the end of the keys but not the diagonal: it stays an array.
            if right_padding is None and isinstance(offset, int) and (window_size or 1) > 0:
                starts = None if left_padding is None else self._primitive.handle(left_padding)
                left = None if window_size is None else window_size - 1
                self._remember(mask, Structure(N, offset + N, left, starts))
            return mask

        return create_causal_mask

    def _remember(self, mask: mx.array, structure: Structure) -> None:
        key = id(mask)
        reference = weakref.ref(mask, lambda _: self._known.pop(key, None))
        self._known[key] = (reference, self._primitive.handle(mask), structure)

    def structure_of(self, mask: Any, len_q: int, len_k: int) -> Structure | None:
        """What this mask means over so many queries and keys; None: take it as the array it is."""
        known = self._known.get(id(mask))
        if known is None:
            return None
        reference, handle, structure = known
        if reference() is not mask or not self._primitive.is_same(mask, handle):
            return None
        return structure if (structure.len_q, structure.len_k) == (len_q, len_k) else None
