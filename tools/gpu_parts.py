"""The parts of tools/gpu_check, each in processes of its own."""

import concurrent.futures
import copy
import datetime
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from racecheck import unknown_races

ROOT = Path(__file__).resolve().parent.parent
Json = dict[str, Any]
# Of the CI cases on a Hopper card, for each kernel and in all.
LEAST_CHECKED = {"sm90_prefill": 800, "sm90_prefill_wide": 1000, "sm90_decode": 1100,
                 "cuda_portable": 2700, "cuda_unfused": 2700}
LEAST_CHECKED_IN_ALL = 5000
# Of the ragged ones: all that each takes.
LEAST_RAGGED = {"sm90_prefill": 18, "sm90_prefill_wide": 24, "sm90_decode": 24, "cuda_portable": 24}
LEAST_GRADIENTS = {"sm90_backward": 800, "sm90_backward_wide": 900, "cuda_portable_backward": 2000}
SUITES = ("chunked", "square", "decode-sweep", "full-sweep", "routing-boundary")
# Median and worst regret, median and worst error of the estimates.
ROUTING_GOALS = {"median_regret": 1.01, "worst_regret": 1.10, "median_error": 0.15,
                 "worst_error": 0.40}
SMALL_SHARED_BYTES = 101376  # of a block on compute capability 8.6, 8.9 and 12.0
INSTANCES = ("a part of the instances, as where tools/test sees no GPU; configure with "
             "-DWIDEHEAD_CUDA_INSTANCES=all")
PYTHON_TESTS = ("test_cuda.py", "test_torch_serving.py")
QUIET_SECONDS = 25  # a case that takes longer hangs


@dataclass
class Outcome:
    """Of one part. It passed when it was not skipped and nothing failed."""

    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    data: Any = None
    seconds: float = 0

    @property
    def status(self) -> str:
        return "failed" if self.failures else "skipped" if self.skipped else "passed"


def all_passed(outcome: Outcome) -> Outcome:
    """The same, where a test that was skipped is a failure."""
    skipped = outcome.data["skipped"] if outcome.data else []
    outcome.failures += [f"{name} was skipped" for name in skipped]
    return outcome


def missing(what: str) -> Outcome:
    """What a part needs: nobody asked to do without it."""
    return Outcome(failures=[f"{what}; --skip leaves the part out"])


@dataclass
class Finished:
    code: int | None  # None: ended because its time was over
    out: str
    err: str

    def why(self) -> str:
        how = "did not end in time" if self.code is None else f"exit code {self.code}"
        return f"{how}: " + " | ".join(self.err.strip().splitlines()[-3:])


class GpuCheck:
    def __init__(self, build: Path, translated: Path, results: Path, device: str,
                 seconds: float) -> None:
        self.device, self.translated_build = device, translated
        self.end = time.monotonic() + seconds
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu_check_"))
        self.take(build)
        name = re.sub(r"[^a-z0-9]+", "-", self.facts["name"].lower()).strip("-")
        self.stem = results / f"{name}-{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
        results.mkdir(parents=True, exist_ok=True)

    def take(self, build: Path) -> None:
        self.build, self.cli = build, build / "cli" / "widehead"
        libraries = f"{build / 'lib'}:{build}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        python = f"{build / 'python-site'}:{ROOT / 'bench'}:{os.environ.get('PYTHONPATH', '')}"
        self.environment = {**os.environ, "LD_LIBRARY_PATH": libraries, "PYTHONPATH": python,
                            "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(self.scratch / "cache")}
        self.facts = self.device_facts()

    def device_facts(self) -> Json:
        rows = json.loads(self.run([self.cli, "list", "devices", "--json"], 60).out)
        for row in rows:
            if row["device"].startswith(self.device) and row["name"] != "-":
                return row
        sys.exit(f"gpu_check: no {self.device} device can be used: {rows}")

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def kernels_of(self, direction: str) -> list[str]:
        """All but the oracles, which take minutes on large cases."""
        rows = json.loads(self.run([self.cli, "list", "kernels", "--json"], 60).out)
        return [row["kernel"] for row in rows if row["device"] == self.device
                and row["pass"] == direction and row["role"] != "reference"]

    @property
    def kernels(self) -> list[str]:
        return self.kernels_of("forward")

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, command: list[Any], seconds: float,
            quiet_seconds: float = float("inf")) -> Finished:
        """Ends the command, and what it started, when its time is over or stderr stays quiet."""
        with (tempfile.TemporaryFile("w+", dir=self.scratch, errors="replace") as out,
              tempfile.TemporaryFile("w+", dir=self.scratch, errors="replace") as err):
            process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=out,
                                       stderr=err, stdin=subprocess.DEVNULL, start_new_session=True,
                                       env=self.environment)
            code = self.wait(process, max(1, min(seconds, self.left())), err, quiet_seconds)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
            return Finished(code, *texts)

    @staticmethod
    def wait(process: subprocess.Popen[bytes], seconds: float, err: Any,
             quiet_seconds: float) -> int | None:
        heard, size, end = time.monotonic(), 0, time.monotonic() + seconds
        while True:
            try:
                return process.wait(0.2)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if os.fstat(err.fileno()).st_size > size:
                heard, size = now, os.fstat(err.fileno()).st_size
            if now > end or now - heard > quiet_seconds:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None

    def check(self, seconds: float, *options: Any, kernels: list[str] | None = None,
              in_front: list[Any] = []) -> Outcome:
        """`widehead check`, again without the kernel that hangs or loses the device."""
        outcome, begin = Outcome(data=[]), time.monotonic()
        kernels = list(kernels or self.kernels)
        while kernels:
            left = seconds - (time.monotonic() - begin)
            if left < 5:
                outcome.failures.append(f"no time is left for {', '.join(kernels)}")
                break
            done = self.run([*in_front, self.cli, "check", "--device", self.device, "--kernel",
                             ",".join(kernels), "--json", "--verbose", "--seconds", left * 0.9,
                             *options], left, QUIET_SECONDS if not in_front else seconds)
            document = parse(done.out)
            if document is not None:
                outcome.data.append(document)
                outcome.failures += [f"{one['kernel']} on {one['case']}: {one['message']}"
                                     for one in document["wrong"]]
                if "device_failed" not in document:
                    if done.code not in (0, 1):
                        outcome.failures.append(done.why())
                    if document["cases_run"] < document["case_count"]:
                        outcome.failures.append(f"{document['cases_run']} of "
                                                f"{document['case_count']} cases ran in time")
                    break
            # The last line says who ran, on what.
            in_hand = [line for line in done.err.splitlines() if line.startswith("runs ")][-1:]
            culprit = next((one for one in kernels if in_hand and in_hand[0].split()[1] == one), "")
            outcome.failures.append(f"{done.why()}; it {in_hand[0] if in_hand else 'ran nothing'}")
            if not culprit:
                break
            kernels.remove(culprit)
        return outcome

    # The parts.

    def run_tests(self, program: str, seconds: float, kind: str = "*") -> Outcome:
        """The tests of a GoogleTest program, those like `kind` alone; none that passes is a failure."""
        path = self.build / "tests" / program
        if not path.exists():
            return Outcome(failures=[f"{path} is missing"])
        report = self.scratch / f"{program}-{kind.strip('*/.')}.json"
        done = self.run([path, f"--gtest_filter={kind}", f"--gtest_output=json:{report}"], seconds)
        outcome = Outcome(data={"passed": 0, "skipped": []})
        suites = json.loads(report.read_text())["testsuites"] if report.exists() else []
        for test in (one for suite in suites for one in suite["testsuite"]):
            name = f"{test['classname']}.{test['name']}"
            if "failures" in test:
                text = test["failures"][0]["failure"].replace("\n", " ")
                outcome.failures.append(f"{name}: {text[:400]}")
            elif test.get("result") == "SKIPPED":
                outcome.data["skipped"].append(name)
            else:
                outcome.data["passed"] += 1
        if not suites or done.code not in (0, 1):
            outcome.failures.append(f"{program} {kind}: {done.why()} {done.out[-300:]}")
        return outcome

    def tests(self, seconds: float, kernels: list[str] | None = None) -> Outcome:
        outcome, begin = Outcome(data={"passed": 0, "skipped": []}), time.monotonic()
        for suffix in kernels or (*self.kernels, "ADeviceThatDoesNotExistIsRefused"):
            ran = self.run_tests("widehead_gpu_tests", seconds - time.monotonic() + begin,
                                 f"*{'.' if suffix[0] == 'A' else '/'}{suffix}")
            outcome.failures += ran.failures
            if ran.data:
                outcome.data["passed"] += ran.data["passed"]
                outcome.data["skipped"] += ran.data["skipped"]
        if outcome.data["passed"] == 0:
            outcome.failures.append("no test ran")
        return outcome

    def ranks(self, seconds: float) -> Outcome:
        """Every strategy on 1 to 8 ranks, threads that share one card, against float64."""
        return all_passed(self.run_tests("widehead_gpu_parallel_tests", seconds))

    def translated(self, seconds: float) -> Outcome:
        """Kernels that others follow on the stream, in the build that tools/test makes: for sm_80 and
        sm_86, so that cards of another kind run what the driver translates."""
        if not (self.translated_build / "cli" / "widehead").exists():
            return missing(f"no build in {self.translated_build}")
        other, begin = copy.copy(self), time.monotonic()
        other.take(self.translated_build)
        kernels = [name for name in other.kernels if name in ("sm90_decode", "cuda_portable")]
        tests = other.tests(seconds / 2, kernels)
        smoke = other.check(seconds - (time.monotonic() - begin), "--cases", "smoke", "--seed", 7,
                            kernels=kernels)
        failures = tests.failures + smoke.failures
        if self.is_hopper() and not other.facts["code"].startswith("translated"):
            failures.append(f"{self.translated_build} is {other.facts['code']}")
        if other.facts["instances"] != "all":
            failures.append(f"{self.translated_build}: {INSTANCES}")
        return Outcome(failures, data={"code": other.facts["code"], "tests": tests.data,
                                       "smoke": smoke.data})

    def python(self, seconds: float) -> Outcome:
        tests = [ROOT / "python" / "tests" / name for name in PYTHON_TESTS]
        absent = [one.name for one in tests if not one.exists()]
        found = self.run([sys.executable, "-c", "import widehead, torch, pytest, ml_dtypes"], 60)
        if absent or found.code != 0:
            return missing(f"no {', '.join(absent)}" if absent else found.why())
        done = self.run([sys.executable, "-m", "pytest", "--disable-warnings", "-k", "not cpu", *tests],
                        seconds)
        last = done.out.strip().splitlines()[-1:]
        failures = [] if done.code == 0 else [done.why() + " " + done.out[-1500:]]
        if "passed" not in " ".join(last):
            failures.append(f"no test passed: {last}")
        return Outcome(failures, data=last)

    @staticmethod
    def sanitizer() -> str:
        """Empty: there is none."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        return tool if Path(tool).exists() else ""

    def sanitizers(self, seconds: float) -> Outcome:
        tool = self.sanitizer()
        if not tool:
            return missing("compute-sanitizer is not on the PATH")
        hopper = [name for name in self.kernels if name.startswith("sm90")]
        others = [name for name in self.kernels if name not in hopper]
        # initcheck does not see what TMA writes: sm90_decode's shares and cuBLASLt's products. That
        # nothing of a workspace is read before it is written, a workspace full of NaN shows in
        # `check`. synccheck wants the whole block at one bar.sync, and ends sm90_decode, whose warps
        # meet at three of them, which bar.sync allows.
        tma = ("sm90_decode", "cuda_unfused")
        jobs = [("memcheck", self.kernels),
                ("initcheck", [name for name in self.kernels if name not in tma]),
                ("synccheck", [name for name in self.kernels if name != "sm90_decode"]),
                ("racecheck", others), ("racecheck", hopper)]
        jobs = [(name, kernels) for name, kernels in jobs if kernels != hopper or self.is_hopper()]
        return self.sanitize_beside(tool, jobs, seconds)

    def sanitize_beside(self, program: str, jobs: list[tuple[str, list[str]]], seconds: float,
                        *more: str) -> Outcome:
        """Each tool on its kernels, all at once: most of the time the host makes float64's answers."""
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
            outcomes = list(pool.map(lambda job: self.sanitize(program, *job, seconds, *more), jobs))
        return Outcome([failure for one in outcomes for failure in one.failures],
                       data=[one.data for one in outcomes])

    def sanitize(self, program: str, tool: str, kernels: list[str], seconds: float,
                 *more: str) -> Outcome:
        log = self.scratch / f"{tool}-{kernels[0]}.log"
        options = ["--cases", "smoke", *more, *(["--leave-workspace"] if tool == "initcheck" else [])]
        limit = 10_000 if tool == "racecheck" else 20  # every hazard is looked up
        outcome = self.check(seconds, *options, kernels=kernels, in_front=[
            program, "--tool", tool, "--print-limit", limit, "--log-file", log])
        text = log.read_text(errors="replace") if log.exists() else ""
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
        runs = sum(row["checked"] for one in outcome.data for row in one["kernels"])
        # What did not run in time is not wrong: the rest of the cases runs elsewhere.
        outcome.failures = [one for one in outcome.failures if "cases ran in time" not in one]
        if not found:
            outcome.failures.append("no summary: " + text[-300:])
        elif tool == "racecheck":
            outcome.failures += unknown_races(text, ROOT)[:12]
        elif any(int(count) for count in found):
            lines = [line.lstrip("= ") for line in text.splitlines() if line.strip("= ")]
            outcome.failures += [f"{found[-1]} errors", *lines[:12]]
        if runs == 0:
            outcome.failures.append("nothing ran")
        outcome.failures = [f"{tool}, {' '.join(kernels)}: {one}" for one in outcome.failures]
        outcome.data = {"tool": tool, "kernels": kernels, "runs": runs, "errors": found}
        return outcome

    def check_cases(self, seconds: float) -> Outcome:
        begin = time.monotonic()
        corner = self.check(seconds / 6, "--cases", "corner", "--seed", 7)
        ragged = self.check(seconds / 5, "--cases", "ragged", "--seed", 7)
        layouts = self.check(seconds / 3, "--cases", "layouts", "--seed", 7)
        ci = self.check(seconds - (time.monotonic() - begin), "--cases",
                        "ci" if self.is_gpu else "smoke", "--seed", 7)
        counts: dict[str, int] = {}
        for document in ci.data:
            for row in document["kernels"]:
                counts[row["kernel"]] = max(counts.get(row["kernel"], 0), row["checked"])
        failures = corner.failures + ragged.failures + layouts.failures + ci.failures
        if self.is_gpu:
            failures += self.too_few({row["kernel"]: row["checked"] for document in ragged.data
                                      for row in document["kernels"]}, LEAST_RAGGED)
            failures += self.too_few(counts, LEAST_CHECKED)
            if sum(counts.values()) < LEAST_CHECKED_IN_ALL:
                failures.append(f"{sum(counts.values())} checked in all, fewer than "
                                f"{LEAST_CHECKED_IN_ALL}")
        return Outcome(failures, data=corner.data + ragged.data + layouts.data + ci.data)

    def too_few(self, checked: dict[str, int], least: dict[str, int]) -> list[str]:
        return [f"{kernel} was checked on {checked.get(kernel, 0)} cases, fewer than {count}"
                for kernel, count in least.items()
                if checked.get(kernel, 0) < count
                and (self.is_hopper() or not kernel.startswith("sm90"))]

    def is_hopper(self) -> bool:
        return bool(self.facts["kernels_use"] == "sm_90")

    def large(self, seconds: float) -> Outcome:
        return self.check(seconds, "--cases", "large", "--seed", 7, "--shrink",
                          1 if self.is_gpu else 32)

    def repeat(self, seconds: float) -> Outcome:
        begin, runs = time.monotonic(), 100 if self.is_gpu else 3
        # Half of it is copies: at half the shrinking, 14 of 36 cases took 80 s on an H200's host.
        large = self.check(seconds * 0.7, "--cases", "large", "--seed", 8, "--runs", runs,
                           "--shrink", 16 if self.is_gpu else 64)
        # Many tiles of next to nothing: what blocks tell each other is then all that they wait for.
        walks = [name for name in self.kernels if name.startswith("sm90_prefill")]
        tiny = self.check(seconds * 0.15, "--cases", "large", "--seed", 1, "--runs", 3 * runs,
                          "--shrink", 64, kernels=walks) if walks else Outcome(data=[])
        smoke = self.check(seconds - (time.monotonic() - begin), "--cases", "smoke", "--seed", 8,
                           "--runs", runs)
        return Outcome(large.failures + tiny.failures + smoke.failures,
                       data=large.data + tiny.data + smoke.data)

    def gradients(self, seconds: float) -> Outcome:
        """The kernels of the backward pass: every gradient against float64, the same bits a hundred
        times, tiles for small cards, what sanitizers see, and large cases, sampled."""
        kernels, begin = self.kernels_of("backward"), time.monotonic()
        small = ["--shared-bytes", SMALL_SHARED_BYTES] if self.is_gpu else []
        steps = [("smoke", "--runs", 100 if self.is_gpu else 3), ("corner",), ("layouts",),
                 ("smoke", "--seed", 9, *small), ("ci" if self.is_gpu else "smoke", "--seed", 7),
                 ("large", "--shrink", 4 if self.is_gpu else 64)]
        outcome = Outcome(data=[])
        for cases, *options in steps:
            one = self.check(seconds - (time.monotonic() - begin), "--backward", "--cases", cases,
                             *options, kernels=kernels)
            outcome.failures += one.failures
            outcome.data += one.data
        if not self.is_gpu:
            return outcome
        checked = {name: sum(row["checked"] for document in outcome.data
                             for row in document["kernels"] if row["kernel"] == name)
                   for name in kernels}
        outcome.failures += self.too_few(checked, LEAST_GRADIENTS)
        tests = self.tests(seconds - (time.monotonic() - begin), kernels)
        outcome.failures += tests.failures
        outcome.data.append(tests.data)
        tool = self.sanitizer()
        if not tool:
            outcome.failures.append("compute-sanitizer is not on the PATH")
            return outcome
        jobs = [(name, kernels) for name in ("memcheck", "synccheck", "racecheck")]
        sanitized = self.sanitize_beside(tool, jobs, seconds - (time.monotonic() - begin),
                                         "--backward")
        outcome.failures += sanitized.failures
        outcome.data += sanitized.data
        return outcome

    def backward(self, seconds: float) -> Outcome:
        """Gradients beside PyTorch's backward, which this part is nothing without."""
        begin = time.monotonic()
        if self.run([sys.executable, "-c", "import torch"], 60).code != 0:
            return missing("no PyTorch here")
        done = self.run([sys.executable, ROOT / "bench" / "backward.py", self.cli, "--device",
                         self.device, "--seconds", 0.7], seconds)
        Path(f"{self.stem}-backward.md").write_text(done.out)
        outcome = Outcome([] if done.code == 0 else [done.why()], data=done.out.splitlines())
        if self.is_hopper():
            left = seconds - (time.monotonic() - begin)
            paths = [f"{self.stem}-backward-sm90.{ending}" for ending in ("json", "md")]
            each = self.run([sys.executable, ROOT / "bench" / "gpu_backward.py", *paths,
                             "--seconds", left * 0.85], left)
            outcome.data += each.out.splitlines()
            if each.code != 0:
                outcome.failures.append(each.why())
        return outcome

    def small(self, seconds: float) -> Outcome:
        kernels = ["cuda_portable"] if self.is_gpu else ["cpu_prefill"]
        begin = time.monotonic()
        parts = []
        for cases in ("corner", "smoke"):
            parts.append(self.check(seconds - (time.monotonic() - begin), "--cases", cases,
                                    "--seed", 9, "--shared-bytes", SMALL_SHARED_BYTES,
                                    kernels=kernels))
        return Outcome([failure for one in parts for failure in one.failures],
                       data=[document for one in parts for document in one.data])

    def script(self, seconds: float, name: str, paths: list[str], *options: Any) -> Outcome:
        if self.run([sys.executable, "-c", "import torch"], 60).code != 0:
            return missing("no PyTorch here")
        done = self.run([sys.executable, ROOT / "bench" / name, self.build / "libwidehead.so.0",
                         *paths, *options], seconds)
        failures = [] if done.code == 0 else [done.why()]
        return Outcome(failures, data=done.err.splitlines()[-40:] if failures else None)

    def kernels_beside_pytorch(self, seconds: float) -> Outcome:
        paths = [f"{self.stem}-kernels.{ending}" for ending in ("json", "md")]
        return self.script(seconds, "gpu.py", paths, "--seconds", seconds * 0.85)

    def limits(self, seconds: float) -> Outcome:
        return self.script(seconds, "gpu_limits.py", [f"{self.stem}-limits.json"])

    def bench(self, suite: str, seconds: float, *options: Any) -> Finished:
        """Leaves the suite's JSON and chart where bench/report.py looks for them."""
        folder = Path(self.stem)
        folder.mkdir(parents=True, exist_ok=True)
        done = self.run([self.cli, "bench", suite, "--device", self.device, "--json", "--svg",
                         folder / f"{suite}.svg", *options], seconds)
        if parse(done.out) is not None:
            (folder / f"{suite}.json").write_text(done.out)
        return done

    def tune(self, seconds: float) -> Outcome:
        """The profile that `routing` then uses, which data/profiles/ may ship."""
        done = self.run([self.cli, "tune", "--device", self.device, "--seconds", seconds * 0.8,
                         "--json"], seconds)
        profile = parse(done.out)
        if profile is None:
            return Outcome([done.why()])
        Path(f"{self.stem}-profile.json").write_text(done.out)
        return Outcome(data={name: len(points) for name, points in profile["kernels"].items()})

    def routing(self, seconds: float) -> Outcome:
        limits = (("--samples", 15, "--seconds", 0.4) if self.is_gpu else
                  ("--samples", 1, "--seconds", 0.01, "--skip-over", 0.002))
        done = self.bench("routing", seconds, *limits)
        document = parse(done.out)
        if document is None:
            return Outcome([done.why()])
        rows = document["routing"]
        regrets = [row["regret"] for row in rows]
        errors = [abs(row["estimated_us"] / row["measured_us"] - 1) for row in rows]
        data = {"problems": len(rows),
                "median_regret": statistics.median(regrets), "worst_regret": max(regrets),
                "median_error": statistics.median(errors), "worst_error": max(errors)}
        goals = ROUTING_GOALS if self.is_gpu else {}
        failures = [f"{name} is {data[name]:.3f}, the goal {goal}" for name, goal in goals.items()
                    if data[name] > goal]
        return Outcome(failures, data=data)

    def suites(self, seconds: float) -> Outcome:
        begin, outcome = time.monotonic(), Outcome(data=[])
        against = "cuda_unfused" if self.is_gpu else "cpu_unfused"
        limits = (("--samples", 9, "--seconds", 0.6, "--skip-over", 5) if self.is_gpu else
                  ("--samples", 1, "--seconds", 0.01, "--skip-over", 0.002))
        for suite in SUITES:
            done = self.bench(suite, seconds - (time.monotonic() - begin), "--against", against,
                              *limits)
            if done.code != 0:
                outcome.failures.append(f"{suite}: {done.why()}")
            else:
                outcome.data.append(suite)
        return outcome


def parse(text: str) -> Json | None:
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None
