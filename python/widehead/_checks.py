"""Checks of arguments that are no arrays: each error names the argument, its value and what is valid."""

from __future__ import annotations

from typing import Any

_LARGEST, _LEAST = 3.4028234663852886e38, 1.5e-45  # of float32, in which kernels have them
LONGEST = 2**31 - 1  # lengths are int32


def is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def yes(name: str, value: Any) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return value


def number(name: str, value: Any) -> float:
    """Finite in float32."""
    if isinstance(value, (str, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    real = float(value)
    if not abs(real) <= _LARGEST:
        raise ValueError(f"{name} is {value}; it must be finite, and is kept in float32")
    return real


def softcap_of(value: Any) -> float:
    """0 where there is none."""
    if value is None:
        return 0.0
    real = number("softcap", value)
    if real != 0 and real < _LEAST:
        raise ValueError(f"softcap is {value}; it must be positive in float32, or 0 or None for none")
    return real
