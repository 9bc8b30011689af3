"""What the caller allows a call to take."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal

from widehead import _core

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_UNITS |= {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes_of(workspace: int | str | None) -> int | None:
    if workspace is not None and not isinstance(workspace, (int, str)):
        raise TypeError(
            f"workspace is {workspace!r}; it must be bytes as an int, a size as in '512MiB', "
            "or None"
        )
    if workspace is None or isinstance(workspace, int):
        if workspace is not None and workspace < 0:
            raise ValueError(f"workspace is {workspace}; it must be bytes from 0 on, or None")
        return workspace
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", workspace.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"workspace is {workspace!r}; it must be bytes, or a size as in '512MiB' "
            f"({', '.join(unit for unit in _UNITS if unit)})"
        )
    return int(float(match[1]) * _UNITS[match[2]])


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


@lru_cache(maxsize=64)
def backward_limits(limits: Limits) -> Limits:
    """What the backward pass may take: a kernel is forced, and a policy chosen, for the forward
    pass alone."""
    return replace(limits, kernel=None, policy="automatic")
