"""Plans as data: what will run, why nothing else will, and what it takes."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A kernel that the planner looked at.

    ``verdict`` is ``chosen``, ``slower``, ``refused`` or ``over_budget``; ``reason`` says why.
    ``workspace_bytes`` and ``estimated_us`` are 0 where the kernel cannot run at all.
    """

    kernel: str
    verdict: str
    reason: str
    workspace_bytes: int
    estimated_us: float


def candidates_of(plan: dict[str, Any]) -> tuple[Candidate, ...]:
    """The candidates of a plan's JSON document."""
    return tuple(
        Candidate(
            kernel=row["kernel"],
            verdict=row["verdict"],
            reason=row["reason"],
            workspace_bytes=row["workspace_bytes"],
            estimated_us=row["estimated_us"],
        )
        for row in plan["candidates"]
    )


class Plan:
    """What :func:`widehead.sdpa` would do with the same arguments.

    ``kernel`` is None when the limits allow none; ``candidates`` says why, and
    :func:`widehead.sdpa` would raise :class:`widehead.Refused`.
    """

    kernel: str | None
    workspace_bytes: int
    estimated_us: float
    candidates: tuple[Candidate, ...]

    def __init__(self, text: str, plan_json: str) -> None:
        self._text = text
        self._json = plan_json
        document = self.to_dict()
        self.kernel = document["kernel"] or None
        self.workspace_bytes = document["workspace_bytes"]
        self.estimated_us = document["estimated_us"]
        self.candidates = candidates_of(document)

    def explain(self) -> str:
        """The choice and every candidate with verdict, reason, workspace and estimate: a table."""
        return self._text

    def to_dict(self) -> dict[str, Any]:
        """The whole plan, problem and limits included, as the command line's ``plan --json``."""
        document: dict[str, Any] = json.loads(self._json)
        return document

    def __repr__(self) -> str:
        return (
            f"Plan(kernel={self.kernel!r}, workspace_bytes={self.workspace_bytes}, "
            f"estimated_us={self.estimated_us:.3g})"
        )

    def __str__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self._text)}</pre>"
