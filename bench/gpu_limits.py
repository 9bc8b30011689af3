"""Holds the CUDA kernels to what a plan promises: the longest step, and the memory.

    python3 bench/gpu_limits.py LIBRARY RESULT.json [--parts steps,memory]

Steps: a chunk of 2048 queries over 204,800 keys under limits of 50 and 5 ms. The profiler says how
long the longest kernel ran, the callback how long the longest pause between two reports was; no
kernel may run longer than 1.2 times the limit, a cancelled run must say so, and the answer must be
that of the run without a limit. Memory: the most that the device held during a run must be inputs,
output and the plan's bytes, within one piece that the driver hands out.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
from gpu_library import (CANCELLED, DTYPES, KERNELS, TOLERANCES, Row, Run, Widehead, WideheadError,
                         problem, random_tensors, relative_rms, shapes)

STEP_ROW = problem("chunk d256 64/2, 2048 x 204800", (64, 2), 256, 2048, 204800, True)
STEPS_MS = (50, 5)
MOST_OF_LIMIT = 1.2
GRANULE_BYTES = 2 << 20
MEMORY_ROWS = [
    problem("chunk d256 64/2, 2048 x 32768", (64, 2), 256, 2048, 32768, True),
    problem("chunk d256 64/2, 2048 x 204800", (64, 2), 256, 2048, 204800, True),
    problem("d256 8/8, 2048 x 131072", (8, 8), 256, 2048, 131072, True),
    problem("d256 2/2, 32768 causal", (2, 2), 256, 32768, 32768, True),
    problem("d256 64/2, 1 x 131072", (64, 2), 256, 1, 131072),
    problem("d512 32/4, 4096 causal", (32, 4), 512, 4096, 4096, True),
    problem("f32 d128 16/16, 4096 causal", (16, 16), 128, 4096, 4096, True, dtype="f32"),
]


def longest_kernel_ms(run: Run) -> float | None:
    """None where the profiler sees nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    durations = [event.duration_ns() * 1e-6 for event in profile.profiler.kineto_results.events()
                 if event.device_type() == torch.autograd.DeviceType.CUDA]
    return max(durations, default=None)


def watch(run: Run) -> tuple[list[float], float]:
    """The fractions that were reported, and the longest pause between two reports in ms."""
    fractions: list[float] = []
    times = [time.perf_counter()]

    def report(fraction: float) -> bool:
        fractions.append(fraction)
        times.append(time.perf_counter())
        return False

    run(report)
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    return fractions, 1e3 * max(after - before for before, after in zip(times, times[1:]))


def cancel(run: Run) -> str:
    """What is wrong with a run that is cancelled at its first report; empty: nothing."""
    try:
        run(lambda _: True)
    except WideheadError as error:
        if error.status != CANCELLED:
            return f"answered with status {error.status}: {error}"
        return "" if "out is" in str(error) else f"does not say what out holds: {error}"
    finally:
        torch.cuda.synchronize()
    return "was not cancelled"


def check_steps(widehead: Widehead, kernel: str | None, step_ms: float,
                inputs: list[torch.Tensor], answer: torch.Tensor) -> Row:
    result: Row = dict(problem=STEP_ROW["name"], kernel=kernel or "planner's choice",
                       limit_ms=step_ms, failures=[])
    failures = result["failures"]
    try:
        run = widehead.run(STEP_ROW, inputs, kernel, longest_step_us=1e3 * step_ms)
    except WideheadError as error:
        result["refused"] = str(error)
        if kernel is None:
            failures.append("the planner finds no kernel within the limit")
        return result
    result["kernel"] = run.kernel
    run()
    torch.cuda.synchronize()
    result["relative_rms"] = relative_rms(run.out, answer)
    if not result["relative_rms"] <= 2 * TOLERANCES[STEP_ROW["dtype"]]:
        failures.append("the answer is not that of the run without steps")
    first_bits = run.out.clone()
    fractions, result["longest_pause_ms"] = watch(run)
    result["reports"] = len(fractions)
    if not torch.equal(run.out, first_bits):
        failures.append("two runs gave different bits")
    if fractions != sorted(fractions) or (fractions and not 0 < fractions[-1] <= 1):
        failures.append(f"the fractions reported are {fractions[:20]}")
    try:
        result["longest_kernel_ms"] = longest_kernel_ms(run)
    except Exception as error:  # the profiler's, which not every machine has
        result["longest_kernel_ms"] = None
        result["profiler"] = str(error)
    longest = result["longest_kernel_ms"] or result["longest_pause_ms"]
    if longest > MOST_OF_LIMIT * step_ms:
        failures.append(f"the longest step took {longest:.1f} ms")
    if len(fractions) > 2:  # of two launches the last is on its way when the first is reported
        wrong = cancel(run)
        if wrong:
            failures.append(f"a cancelled run {wrong}")
    return result


def steps(widehead: Widehead) -> list[Row]:
    inputs = random_tensors(STEP_ROW)
    answer = widehead.run(STEP_ROW, inputs)().clone()
    torch.cuda.synchronize()
    return [guarded(lambda: check_steps(widehead, kernel, step_ms, inputs, answer),
                    dict(problem=STEP_ROW["name"], kernel=kernel, limit_ms=step_ms))
            for step_ms in STEPS_MS for kernel in (None, *KERNELS)]


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def check_memory(widehead: Widehead, row: Row, kernel: str | None) -> Row:
    result: Row = dict(problem=row["name"], kernel=kernel or "planner's choice", failures=[])
    try:
        run = widehead.run(row, random_tensors(row), kernel)
    except WideheadError as error:
        return dict(result, refused=str(error))
    result["kernel"], workspace_bytes = run.kernel, run.workspace_bytes
    run()  # loads the kernels and what cuBLASLt keeps, which are no call's
    torch.cuda.synchronize()
    plan = run.plan
    del run
    torch.cuda.empty_cache()
    before = used_bytes()
    # All in one piece, so that nothing but its end is rounded up.
    sizes = [torch.Size(shape).numel() * DTYPES[row["dtype"]].itemsize for shape in shapes(row)]
    offsets, total = [], 0
    for size in (*sizes, workspace_bytes):
        offsets.append(total)
        total += -(-size // 256) * 256
    arena = torch.empty(total, dtype=torch.uint8, device="cuda")
    inputs = [arena[offset:offset + size].view(DTYPES[row["dtype"]]) for offset, size in
              zip(offsets[:3], sizes)]
    for one in inputs:
        one.normal_()
    placed = Run.at(widehead, plan, [arena.data_ptr() + offset for offset in offsets],
                    workspace_bytes, arena)
    done = torch.cuda.Event()
    placed()
    done.record()
    peak = used_bytes()
    while not done.query():
        peak = max(peak, used_bytes())
    result.update(inputs_and_out_bytes=sum(sizes), workspace_bytes=workspace_bytes,
                  peak_bytes=max(peak, used_bytes()) - before)
    result["excess_bytes"] = result["peak_bytes"] - total
    if not 0 <= result["excess_bytes"] <= GRANULE_BYTES:
        result["failures"].append(f"the device held {result['excess_bytes']} bytes more than "
                                  "inputs, output and the plan's bytes")
    return result


def memory(widehead: Widehead) -> list[Row]:
    return [guarded(lambda: check_memory(widehead, row, kernel),
                    dict(problem=row["name"], kernel=kernel))
            for row in MEMORY_ROWS for kernel in (None, "cuda_unfused", "cuda_portable")]


def guarded(check: Any, context: Row) -> Row:
    """One failing row must not lose the others."""
    try:
        result = check()
    except Exception as error:
        result = dict(context, failures=[f"{type(error).__name__}: {error}"])
    torch.cuda.empty_cache()
    words = "; ".join(result["failures"]) or ("refused" if "refused" in result else "fine")
    print(f"{result['problem']}, {result['kernel']}: {words}", file=sys.stderr, flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library")
    parser.add_argument("json_path")
    parser.add_argument("--parts", default="steps,memory")
    arguments = parser.parse_args()
    widehead = Widehead(arguments.library)
    torch.manual_seed(0)
    document: Row = dict(device=torch.cuda.get_device_name())
    for name in arguments.parts.split(","):
        document[name] = {"steps": steps, "memory": memory}[name](widehead)
        with open(arguments.json_path, "w") as file:
            json.dump(document, file, indent=1)
    failed = any(row["failures"] for name in arguments.parts.split(",") for row in document[name])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
