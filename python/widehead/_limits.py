"""What the caller allows a call to take."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal

from widehead import _core
from widehead._checks import is_whole

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_UNITS |= {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


_WHOLES = {"fused_above": 2**63 - 1, "threads": 4096, "fresh_keys": 2**63 - 1}  # from 0 on
_TEXTS = ("policy", "kernel", "precision")
_OPTIONAL = ("kernel", "fresh_keys")
_MOST_BYTES = 2**64 - 1


def _expect(limits: Limits) -> None:
    """Raises where a value is of another type or, of a number, out of range."""

    def expect(error: type[Exception], fits: bool, name: str, words: str) -> None:
        if not fits:
            or_none = " or None" if name in _OPTIONAL else ""
            raise error(f"{name} is {getattr(limits, name)!r}; it must be {words}{or_none}")

    for name, most in _WHOLES.items():
        value = getattr(limits, name)
        if value is None and name in _OPTIONAL:
            continue
        words = f"a whole number from 0 to {most}"
        expect(TypeError, is_whole(value), name, words)
        expect(ValueError, 0 <= value <= most, name, words)
    for name in _TEXTS:
        value = getattr(limits, name)
        fits = isinstance(value, str) or (value is None and name in _OPTIONAL)
        expect(TypeError, fits, name, "a string")
    expect(TypeError, isinstance(limits.batch_invariant, bool), "batch_invariant", "True or False")
    step, words = limits.longest_step_ms, "a number of milliseconds from 0 to 1e12"
    is_number = hasattr(step, "__float__") and not isinstance(step, bool)
    expect(TypeError, is_number, "longest_step_ms", words)
    expect(ValueError, 0 <= step <= 1e12, "longest_step_ms", words)


def _bytes_of(workspace: int | str | None) -> int | None:
    if workspace is None:
        return None
    if not isinstance(workspace, str) and not is_whole(workspace):
        raise TypeError(
            f"workspace is {workspace!r}; it must be bytes as an int, a size as in '512MiB', "
            "or None"
        )
    if not isinstance(workspace, str):
        if not 0 <= workspace <= _MOST_BYTES:
            raise ValueError(
                f"workspace is {workspace}; it must be bytes from 0 to {_MOST_BYTES}, or None"
            )
        return workspace
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", workspace.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"workspace is {workspace!r}; it must be bytes, or a size as in '512MiB' "
            f"({', '.join(unit for unit in _UNITS if unit)})"
        )
    return min(int(float(match[1]) * _UNITS[match[2]]), _MOST_BYTES)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the caller allows. Immutable: make one and pass it to every call.

    workspace: the most bytes that a kernel may take beside its inputs and outputs, as a number or
        as in ``"512MiB"``; None: any.
    policy: ``"automatic"`` takes the fastest kernel that fits; ``"fused"`` refuses to store the
        score matrix; ``"fused_above"`` is fused from ``fused_above`` keys on and unfused below.
    kernel: forces a kernel of :func:`widehead.kernels` by name.
    threads: CPU threads; 0: PyTorch's number for its tensors, every core for other arrays.
    precision: ``"native"`` rounds the weights to the input's type where the hardware multiplies
        that type; ``"high"`` keeps them at float32's accuracy.
    longest_step_ms: of a piece of work that cannot be interrupted; 0: any.
    batch_invariant: a row's bits do not depend on the batch around it.
    fresh_keys: a promise for CUDA streams: the kernel in front in the stream writes no keys but the
        last so many of each sequence, and no key lengths, key starts, offsets or page tables. The
        rest may then be read before it has ended; too small a number is a race. None: no promise.
    """

    workspace: int | str | None = None
    policy: Literal["automatic", "fused", "fused_above"] = "automatic"
    fused_above: int = 16384
    kernel: str | None = None
    threads: int = 0
    precision: Literal["native", "high"] = "native"
    longest_step_ms: float = 0.0
    batch_invariant: bool = False
    fresh_keys: int | None = None
    _core: _core.Limits = field(init=False, repr=False, compare=False)
    text: str = field(init=False, repr=False, compare=False)  # for operators, which take no objects

    def __post_init__(self) -> None:
        _expect(self)
        for name in (*_WHOLES, "workspace"):  # NumPy's are no JSON
            if is_whole(value := getattr(self, name)):
                object.__setattr__(self, name, int(value))
        core = _core.Limits(**self.core_values())
        object.__setattr__(self, "_core", core)
        object.__setattr__(self, "text", json.dumps(self._values()))

    def core_values(self) -> dict[str, Any]:
        """As the extension modules take them."""
        return {
            "workspace_bytes": _bytes_of(self.workspace),
            "policy": self.policy,
            "fused_above": self.fused_above,
            "kernel": self.kernel or "",
            "threads": self.threads,
            "precision": self.precision,
            "longest_step_us": self.longest_step_ms * 1e3,
            "batch_invariant": self.batch_invariant,
            "fresh_keys": -1 if self.fresh_keys is None else self.fresh_keys,
        }

    def _values(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_make_limits, (self._values(),))


def _make_limits(values: dict[str, Any]) -> Limits:
    return Limits(**values)


DEFAULT_LIMITS = Limits()


def limits_of(given: Limits | None) -> Limits:
    """What a caller gave as ``limits``."""
    if given is None:
        return DEFAULT_LIMITS
    if not isinstance(given, Limits):
        raise TypeError(
            f"limits is {given!r}; it must be a widehead.Limits, as in Limits(threads=2), or None"
        )
    return given


@lru_cache(maxsize=64)
def backward_limits(limits: Limits) -> Limits:
    """What the backward pass may take: a kernel is forced, and a policy chosen, for the forward
    pass alone."""
    return replace(limits, kernel=None, policy="automatic")
