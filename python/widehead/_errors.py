"""Exceptions of the package. Wrong arguments are ValueError or TypeError, with the C API's message."""

from __future__ import annotations

import json
from typing import Any

from widehead._plan import Candidate, candidates_of


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
