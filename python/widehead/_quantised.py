"""Keys and values of fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["e4m3", "int8", "q8_0", "q4_0"]


@dataclass(frozen=True, eq=False)
class Quantised:
    """Keys or values as codes, for ``k`` or ``v`` of :func:`widehead.sdpa` and its plans.

    They are read in place: no copy in another type is made. The answer is attention over code times
    scale.

    codes: [batch, heads_kv, len_k, dim]: float8_e4m3fn or its bytes as uint8, or int8. Of ``q8_0``
        and ``q4_0`` uint8 [batch, heads_kv, len_k, dim / 32 * 34] and [..., dim / 32 * 18]: ggml's
        blocks as they are.
    format: ``"e4m3"``, ``"int8"``, ``"q8_0"`` or ``"q4_0"``.
    scales: float32 that broadcasts to [batch, heads_kv, len_k, 1], one a token and head, or to
        [batch, heads_kv, 1, dim], one a channel; [1] for the tensor. None: the codes are the
        numbers. Blocks have their own.
    """

    codes: Any
    format: Format
    scales: Any = None
