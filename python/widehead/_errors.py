"""Exceptions of the package. Wrong arguments are ValueError or TypeError, with the C API's message."""

from __future__ import annotations

import json
from typing import Any

from widehead._plan import Candidate, Plan, candidates_of


class Refused(RuntimeError):
    """The limits allow no kernel for this problem, or the machine has none.

    The message lists every candidate with its reason; ``candidates`` holds the same as data.
    """

    candidates: tuple[Candidate, ...]

    def __init__(self, message: str, plan_json: str = "") -> None:
        super().__init__(message)
        self._plan_json = plan_json
        plan: dict[str, Any] = json.loads(plan_json) if plan_json else {"candidates": []}
        self.candidates = candidates_of(plan)

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        return (Refused, (str(self), self._plan_json))


def expect_kernel(plan: Plan) -> None:
    """Raises :class:`Refused` where the plan's limits allow none."""
    if plan.kernel is None:
        raise Refused(plan.explain(), json.dumps(plan.to_dict()))


def unreadable(name: str, array: Any, cause: BaseException | None = None) -> Exception:
    """The error for an array that has no plain memory to be read or written: by its name, with what
    it is and what would be valid. ``cause``: what its library said."""
    layout = str(getattr(array, "layout", "torch.strided"))  # only PyTorch's tensors have one
    device = getattr(array, "device", None)
    error: Exception
    if getattr(array, "is_nested", False):
        error = TypeError(
            f"{name} is a nested tensor; it must be dense: pass {name}.to_padded_tensor(0.0) and key "
            "lengths"
        )
    elif layout != "torch.strided":
        error = TypeError(f"{name} is a {layout} tensor; it must be dense: pass {name}.to_dense()")
    elif getattr(device, "type", None) == "meta":
        error = ValueError(f"{name} is on meta, without memory; it must be on the CPU or on a CUDA device")
    else:
        error = BufferError(f"{name} cannot be read: {cause}")
    error.__cause__ = cause
    return error


def unwritable(name: str) -> Exception:
    """The error for a lazy tensor of PyTorch as an output."""
    return TypeError(
        f"{name} is a lazily negated view or a lazy zero tensor, whose memory is not its value; it "
        "must be a tensor with memory of its own"
    )
