"""That tools/racecheck.py knows the kernels' statements as they stand, and lets nothing else pass."""

import re
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import racecheck  # noqa: E402


def line_of(kernel: str, statement: str) -> tuple[str, int]:
    folder = ROOT / "src/cuda" / kernel.replace("sm90_", "sm90/")
    shared = [path for name in ("ptx", "common", "sm90/common", "sm90/backward") for path in sorted((ROOT / "src/cuda" / name).glob("*.cuh"))]
    for path in (*sorted(folder.glob("*.cuh")), *shared):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if statement in line:
                return path.name, number
    raise AssertionError(f"no file of {folder} has {statement}")


def report(kernel: str, first: tuple[str, str, int], second: tuple[str, str, int]) -> str:
    """As compute-sanitizer writes it."""
    where = f"void wh::cuda::{kernel}<(int)64, (int)64>(wh::cuda::PrefillMaps)"
    return (f"========= Error: Race reported between {first[0]} access at {where}+0x1c30 in "
            f"{first[1]}:{first[2]}\n"
            f"=========     and {second[0]} access at {where}+0x2f40 in {second[1]}:{second[2]} "
            f"[4 hazards]\n========= \n"
            f"========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n")


class Racecheck(unittest.TestCase):
    def test_known_statements_are_in_the_kernels_and_pass(self) -> None:
        for one in racecheck.KNOWN:
            write, other = line_of(one.kernel, one.write), line_of(one.kernel, one.other)
            log = report(one.kernel, ("Write", *write), ("Read", *other))
            self.assertEqual(racecheck.unknown_races(log, ROOT), [], one)
            log = report(one.kernel, ("Read", *other), ("Write", *write))
            self.assertEqual(racecheck.unknown_races(log, ROOT), [], one)

    def test_kernels_over_codes_are_those_over_elements(self) -> None:
        for one in racecheck.KNOWN:
            if one.kernel not in ("sm90_prefill", "sm90_prefill_wide"):
                continue
            write, other = line_of(one.kernel, one.write), line_of(one.kernel, one.other)
            log = report(f"{one.kernel}_codes", ("Write", *write), ("Read", *other))
            self.assertEqual(racecheck.unknown_races(log, ROOT), [], one)

    def test_kernels_are_known_by_their_parts(self) -> None:
        parts = {"sm90_prefill": "PrefillBlock<(int)64, (int)64>::Consumer::run()",
                 "sm90_prefill_wide": "WideRight<wh::cuda::WideBlock<(int)576, (int)512>>::values()",
                 "sm90_backward": "GradientBlock<(wh::cuda::Side)1, (int)256>::KeysConsumer::run()",
                 "sm90_backward_wide": "WideGradientBlock<(wh::cuda::Gradient)1, (int)512>::Left::run()"}
        for one in racecheck.KNOWN:
            write, other = line_of(one.kernel, one.write), line_of(one.kernel, one.other)
            log = report(one.kernel, ("Write", *write), ("Read", *other))
            for kernel, part in parts.items():
                named = re.sub(r"void wh::cuda::sm90_\w+<[^>]*>\([^)]*\)", f"wh::cuda::{part}", log)
                self.assertIn(part, named)
                is_known = any((kernel, one.write, one.other) == (other.kernel, other.write, other.other)
                               for other in racecheck.KNOWN)
                self.assertEqual(not racecheck.unknown_races(named, ROOT), is_known, one)

    def test_functions_that_several_kernels_call_are_known_by_the_other_side(self) -> None:
        one = next(one for one in racecheck.KNOWN if "descriptor" in one.other)
        write, other = line_of(one.kernel, one.write), line_of(one.kernel, one.other)
        for kernel, is_known in ((one.kernel, True), ("sm90_prefill", False)):
            log = report(kernel, ("Write", *write), ("Read", *other))
            log = log.replace(f"and Read access at void wh::cuda::{kernel}", "and Read access at void wh::cuda::issue_scores")
            self.assertEqual(not racecheck.unknown_races(log, ROOT), is_known, kernel)

    def test_other_statements_and_kernels_fail(self) -> None:
        one = racecheck.KNOWN[0]
        write, other = line_of(one.kernel, one.write), line_of(one.kernel, one.other)
        for log in (report(one.kernel, ("Write", *write), ("Read", "kernel.cuh", 1)),
                    report(one.kernel, ("Read", *write), ("Read", *other)),
                    report("sm90_decode", ("Write", *write), ("Read", *other))):
            self.assertEqual(len(racecheck.unknown_races(log, ROOT)), 1)

    def test_reports_without_lines_fail(self) -> None:
        log = ("========= Error: Race reported between Write access at sm90_prefill()+0x10\n"
               "=========     and Read access at sm90_prefill()+0x20 [4 hazards]\n"
               "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n")
        self.assertTrue(any("-lineinfo" in one for one in racecheck.unknown_races(log, ROOT)))
        # One without a line is known by the other, and by nothing else.
        known = next(one for one in racecheck.KNOWN if one.kernel == "sm90_backward_wide")
        for statement, is_known in ((known.write, True), ("const Block", False)):
            name, number = line_of(known.kernel, statement)
            where = f"void wh::cuda::{known.kernel}<(int)512>(wh::cuda::Maps)"
            log = (f"========= Error: Race reported between Write access at {where}+0x10 in {name}:{number}\n"
                   f"=========     and Read access at {where}+0x20 [4 hazards]\n"
                   "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n")
            self.assertEqual(not racecheck.unknown_races(log, ROOT), is_known, statement)
        log = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"
        self.assertEqual(len(racecheck.unknown_races(log, ROOT)), 1)
        log = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
        self.assertEqual(racecheck.unknown_races(log, ROOT), [])


if __name__ == "__main__":
    unittest.main()
