"""Parts of a check, one after another, and the file that says what became of each."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gpu_parts import GpuCheck, Outcome

Part = tuple[Callable[[Any, float], Outcome], float]  # what it does, and for how many seconds


class Session:
    def __init__(self, checks: GpuCheck, parts: Mapping[str, Part], names: list[str],
                 gpu_only: Collection[str], file_suffix: str) -> None:
        self.checks, self.parts, self.names = checks, parts, names
        self.gpu_only, self.file_suffix = gpu_only, file_suffix
        self.begin = time.monotonic()
        self.outcomes: dict[str, Outcome] = {}

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:5.0f} s  {text}", flush=True)

    def run_part(self, name: str) -> Outcome:
        part, seconds = self.parts[name]
        begin = time.monotonic()
        if not self.checks.is_gpu and name in self.gpu_only:
            return Outcome(skipped="for GPUs")
        if self.checks.left() < 5:
            return Outcome(failures=["no time was left"])
        self.say(f"{name}, at most {min(seconds, self.checks.left()):.0f} s")
        try:
            outcome = part(self.checks, seconds)
        except Exception as error:  # a part that fails must not lose the others
            outcome = Outcome(failures=[f"{type(error).__name__}: {error}"])
        outcome.seconds = time.monotonic() - begin
        return outcome

    def record(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self.say(f"{name} {outcome.status} after {outcome.seconds:.0f} s {outcome.skipped}")
        for failure in outcome.failures[:10]:
            print(f"         {failure[:300]}", flush=True)
        document = {"device": self.checks.facts, "seconds": time.monotonic() - self.begin,
                    "parts": {part: {"status": one.status, "seconds": round(one.seconds, 1),
                                     "skipped": one.skipped, "failures": one.failures,
                                     "data": one.data} for part, one in self.outcomes.items()},
                    "left_out": [part for part in self.parts if part not in self.names]}
        Path(f"{self.checks.stem}{self.file_suffix}").write_text(
            json.dumps(document, indent=1) + "\n")

    def run(self) -> None:
        for name in self.names:
            self.record(name, self.run_part(name))

    def summary(self) -> int:
        """Prints it, and answers with the exit code."""
        for name, outcome in self.outcomes.items():
            print(f"{name:<12}{outcome.status:<9}{outcome.seconds:5.0f} s  {outcome.skipped}")
        return 1 if any(one.failures for one in self.outcomes.values()) else 0
