"""Times Widehead beside PyTorch's scaled_dot_product_attention on a GPU, alternating, in one run.

    python3 bench/gpu.py LIBRARY RESULT.json RESULT.md [--groups prefill,decode,portable]
                         [--seconds 120] [--sustained 1.5]

Prefill: CUDA events, the median of several calls, in another order each round: what follows a slow
kernel finds a cooler card. Decode and short calls: replays of a CUDA graph,
for decode over several sets of K and V, so that they come from memory and not from L2. TFLOP/s
count visible pairs only. The libraries of gpu_rivals.py that are installed run beside PyTorch. A
rival that refuses, or answers something else, is written down with its reason. Every kernel's answer
is compared with that of the planner's choice; one that is off makes the script fail. The results are
written after every row.
"""

import argparse
import datetime
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_library import (DTYPES, KERNELS, TOLERANCES, Row, Widehead, problem, random_tensors,
                         relative_rms)
from gpu_rivals import MODULES, RIVALS, event_ms, rivals_text, versions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

Call = Callable[[], Any]


def dims_text(dim: int | tuple[int, int]) -> str:
    return "/".join(str(one) for one in dim) if isinstance(dim, tuple) else str(dim)


PREFILL = [
    *[problem(f"chunk d256 64/2, 2048 x {n}", (64, 2), 256, 2048, n, True)
      for n in (32768, 131072)],
    *[problem(f"d{dims_text(d)} {b} x {h} heads, 8192 {'causal' if c else 'full'}", (h, h), d,
              8192, 8192, c, b)
      for d, b, h in ((256, 2, 16), (192, 2, 16), ((192, 128), 2, 16), (128, 2, 16), (64, 2, 32),
                      ((192, 256), 1, 16), ((320, 256), 1, 16))
      for c in (False, True)],
    problem("d512 32/4, 4096 causal", (32, 4), 512, 4096, 4096, True),
    problem("d512 32/32, 8192 full", (32, 32), 512, 8192, 8192),
    problem("d512 32/4 chunk, 2048 x 32768", (32, 4), 512, 2048, 32768, True),
    problem("576/512 128/1, 2048 x 4096 causal", (128, 1), (576, 512), 2048, 4096, True),
    problem("d256 8/2, 512 causal", (8, 2), 256, 512, 512, True),
    problem("f16 chunk d256 64/2, 2048 x 32768", (64, 2), 256, 2048, 32768, True, dtype="f16"),
    problem("f16 d128 2 x 16 heads, 8192 causal", (16, 16), 128, 8192, 8192, True, 2, "f16"),
]
DECODE = [
    *[problem(f"d256 64/2, {n} keys", (64, 2), 256, 1, n)
      for n in (1024, 4096, 16384, 65536, 262144)],
    problem("d128 32/8, 65536 keys", (32, 8), 128, 1, 65536),
    problem("d128 32/8, 16 x 8192 keys", (32, 8), 128, 1, 8192, batch=16),
    problem("d512 32/4, 65536 keys", (32, 4), 512, 1, 65536),
    problem("576/512 128/1, 65536 keys", (128, 1), (576, 512), 1, 65536),
    problem("576/512 128/1, 65536 keys, V in K", (128, 1), (576, 512), 1, 65536,
            values_in_keys=True),
    problem("f16 d256 64/2, 65536 keys", (64, 2), 256, 1, 65536, dtype="f16"),
]
# What cards without wgmma run, and float32.
PORTABLE = [
    problem(f"{dtype} d{d} {b} x {h} heads, {n} {'causal' if c else 'full'}", (h, h), d, n, n, c, b,
            dtype)
    for dtype, d, b, h, n in (("bf16", 64, 2, 32, 4096), ("bf16", 128, 2, 16, 4096),
                              ("bf16", 256, 2, 16, 4096), ("bf16", 512, 1, 16, 4096),
                              ("f32", 64, 1, 16, 4096), ("f32", 128, 1, 16, 4096),
                              ("f32", 256, 1, 16, 4096))
    for c in (False, True)
] + [problem("bf16 d128 32/8, 1 x 32768", (32, 8), 128, 1, 32768),
     problem("f32 d128 32/8, 1 x 32768", (32, 8), 128, 1, 32768, dtype="f32")]
GROUPS = {"prefill": PREFILL, "decode": DECODE, "portable": PORTABLE}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}
# The planner's choice, told that all keys but the last are older than the kernel in front.
FRESH = "widehead fresh"
# What is slower than this times Widehead in a burst is not held at the power limit.
STILL_A_RIVAL = 1.3


def torch_call(row: Row, backend: SDPBackend, inputs: list[torch.Tensor]) -> Call:
    q, k, v = inputs
    is_square = row["len_q"] == row["len_k"]
    bias = (causal_lower_right(row["len_q"], row["len_k"])
            if row["causal"] and not is_square else None)

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=row["causal"] and is_square,
                enable_gqa=row["heads_q"] != row["heads_kv"])
    return run


def is_ours(name: str) -> bool:
    return not name.startswith("torch") and name not in RIVALS


def sustained_ms(run: Call, one_ms: float, seconds: float) -> float:
    """At the power limit: alone, back to back, once a second of it is over."""
    def several(duration_s: float) -> int:
        count = max(1, int(duration_s * 1e3 / one_ms))
        for _ in range(count):
            run()
        return count
    several(1.0)
    torch.cuda.synchronize()
    counts: list[int] = []
    return event_ms(lambda: counts.append(several(seconds))) / counts[0]


class Graph:
    """Each of `runs` once, captured."""

    def __init__(self, runs: list[Call]) -> None:
        self.runs = runs  # their tensors are the graph's
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            runs[0]()
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                for run in runs:
                    run()

    def __call__(self) -> None:
        self.graph.replay()


def time_alternating(candidates: dict[str, Call], calls: int,
                     seconds: float = 0.8) -> dict[str, float]:
    """Median milliseconds of each of `candidates`, which run `calls` calls at once."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    torch.cuda.synchronize()
    first = sum(event_ms(run) for run in candidates.values())
    order = random.Random(0)
    for _ in range(max(5, min(30, int(seconds * 1e3 / max(first, 1e-3))))):
        for name in order.sample(list(candidates), len(candidates)):
            times[name].append(event_ms(candidates[name]) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def work(row: Row) -> tuple[float, float]:
    """Flops of the visible pairs, and bytes of K and V."""
    pairs = row["len_q"] * row["len_k"]
    if row["causal"]:
        pairs -= row["len_q"] * (row["len_q"] - 1) // 2
    dims = row["dim_qk"] + row["dim_v"]
    width = row["dim_qk"] if row["values_in_keys"] else dims
    kv_bytes = DTYPES[row["dtype"]].itemsize * row["batch"] * row["heads_kv"] * row["len_k"] * width
    return 2 * row["batch"] * row["heads_q"] * pairs * dims, kv_bytes


def bench_row(widehead: Widehead, row: Row, sustained_seconds: float) -> Row:
    flops, kv_bytes = work(row)
    is_decode = row["len_q"] == 1
    is_short = is_decode or flops < 2e11  # the way from the host shows beside it
    sets = max(2, min(16, -(-200_000_000 // int(kv_bytes)))) if is_decode else 1
    data = [random_tensors(row) for _ in range(sets)]
    makers: dict[str, Callable[[list[torch.Tensor]], Call]] = {
        "widehead": lambda inputs: widehead.run(row, inputs)}
    if is_decode:
        makers[FRESH] = lambda inputs: widehead.run(row, inputs, fresh_keys=1)
    for name, backend in BACKENDS.items():
        makers["torch " + name] = lambda inputs, backend=backend: torch_call(row, backend, inputs)
    for name, rival in RIVALS.items():
        makers[name] = lambda inputs, rival=rival: rival(row, inputs)
    for forced in KERNELS:  # beside the planner's choice: what it should have chosen
        makers[forced] = lambda inputs, forced=forced: widehead.run(row, inputs, kernel=forced)
    refusals: dict[str, str] = {}
    candidates: dict[str, Call] = {}
    errors: dict[str, float] = {}
    kernel, workspace, answer = "", 0, None
    for name, make in makers.items():
        if name == kernel:
            continue
        try:
            runs = [make(inputs) for inputs in data]
            out = runs[0]()
            torch.cuda.synchronize()
            if name == "widehead":
                kernel, workspace = runs[0].kernel, runs[0].workspace_bytes
            if answer is None:
                answer = out.clone()
            errors[name] = relative_rms(out, answer)
            # Both of the two answers are rounded. not (a <= b): NaN is wrong.
            if not errors[name] <= 2 * TOLERANCES[row["dtype"]] and not is_ours(name):
                raise ValueError(f"another answer, by a relative RMS of {errors[name]:.3g}")
            candidates[name] = Graph(runs) if is_short else runs[0]
        except Exception as error:  # a rival's refusal is a result
            refusals[name] = first_line(error)
    times = time_alternating(candidates, sets)
    sustained: dict[str, float] = {}
    if not is_short and sustained_seconds > 0:
        sustained = {name: sustained_ms(run, times[name], sustained_seconds)
                     for name, run in candidates.items()
                     if name == "widehead" or not is_ours(name)
                     and times[name] <= STILL_A_RIVAL * times["widehead"]}
    ours = {name: ms for name, ms in times.items() if is_ours(name) and name != FRESH}
    fastest = min(ours, key=lambda name: ours[name])
    wrong = [name for name in errors
             if is_ours(name) and not errors[name] <= 2 * TOLERANCES[row["dtype"]]]
    return dict(row, kernel=kernel, workspace_bytes=workspace, refused=refusals, wrong=wrong,
                fastest_kernel=kernel if fastest == "widehead" else fastest,
                regret=times["widehead"] / ours[fastest],
                results={name: dict(median_us=ms * 1e3, tflops=flops / ms * 1e-9,
                                    kv_gbytes_per_s=kv_bytes / ms * 1e-6,
                                    relative_rms_to_widehead=errors[name],
                                    **({"sustained_us": sustained[name] * 1e3,
                                        "sustained_tflops": flops / sustained[name] * 1e-9}
                                       if name in sustained else {}))
                         for name, ms in times.items()})


def table(rows: list[Row], unit: str, field: str, *ours: str) -> str:
    names = [*ours, *("torch " + name for name in BACKENDS), *RIVALS]
    lines = [f"| {unit} | kernel | us | " + " | ".join(names) + " | regret |",
             "|---" * (4 + len(names)) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} |" + " |" * (2 + len(names)))
            continue
        results = dict(row["results"])
        results.setdefault(row["kernel"], results["widehead"])
        us = row["results"]["widehead"]["median_us"]
        lines.append(f"| {row['name']} | {row['kernel']} | {us:.1f} | " +
                     " | ".join(cells(results, names, field)) + f" | {row['regret']:.2f} |")
    return "\n".join(lines)


def cells(results: dict[str, Row], names: list[str], field: str) -> list[str]:
    return ["refused" if name not in results else
            f"{results[name][field]:.0f}" if field in results[name] else "" for name in names]


def sustained_table(rows: list[Row]) -> str:
    """Rows that were held at the power limit, beside what was fast enough to be."""
    names = ["widehead", *("torch " + name for name in BACKENDS), *RIVALS]
    lines = ["| at the power limit, TFLOP/s | " + " | ".join(names) + " | widehead / best other |",
             "|---" * (2 + len(names)) + "|"]
    for row in rows:
        rates = {name: result["sustained_tflops"] for name, result in row.get("results", {}).items()
                 if "sustained_tflops" in result}
        if len(rates) < 2:
            continue
        best = max(rate for name, rate in rates.items() if name != "widehead")
        lines.append(f"| {row['name']} | " +
                     " | ".join(cells(row["results"], names, "sustained_tflops")) +
                     f" | {rates['widehead'] / best:.2f} |")
    return "\n".join(lines)


def kernels_table(rows: list[Row]) -> str:
    """Microseconds of every kernel that takes the dimensions which two of them hold."""
    lines = ["| us | " + " | ".join(KERNELS) + " |", "|---" * (1 + len(KERNELS)) + "|"]
    for row in rows:
        if "error" in row:
            continue
        results = dict(row["results"])
        results.setdefault(row["kernel"], results["widehead"])
        cells = [f"{results[name]['median_us']:.1f}" if name in results else "refused"
                 for name in KERNELS]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(document: Row, json_path: str, markdown_path: str) -> None:
    with open(json_path, "w") as file:
        json.dump(document, file, indent=1)
    prefill, decode, portable = (document.get(group, []) for group in GROUPS)
    with open(markdown_path, "w") as file:
        file.write(
            f"# {document['device']}, {document['date']}\n\nMedians, one run, alternating; PyTorch "
            f"{document['torch']}, {rivals_text(document['rivals'])}; bf16 where nothing else is "
            "said. TFLOP/s on visible pairs, GB/s of K and V from memory.\n\n"
            + table(prefill, "prefill, TFLOP/s", "tflops", "widehead") + "\n\n"
            + (sustained_table(prefill) + "\n\n" if document["sustained_seconds"] else "")
            + table(decode, "decode, GB/s", "kv_gbytes_per_s", "widehead", FRESH) + "\n\n"
            + table(portable, "cuda_portable, TFLOP/s", "tflops", "cuda_portable") + "\n\n"
            + kernels_table([*prefill, *decode])
            + "\n\nRegret: time of the planner's choice over that of the fastest kernel here. "
              f"`{FRESH}`: the caller promises that all keys but the last are older than the "
              "kernel in front. In float32 PyTorch may use TF32 only where told to; it is not. At the "
              f"power limit: each alone, what was at most {STILL_A_RIVAL} times slower in the burst "
              "above.\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library")
    parser.add_argument("json_path")
    parser.add_argument("markdown_path")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after this long")
    parser.add_argument("--sustained", type=float, default=0, metavar="SECONDS",
                        help="time prefill at the power limit too, Widehead and what is at most "
                             f"{STILL_A_RIVAL} times slower, each alone for so long (sustained_us "
                             "beside median_us)")
    arguments = parser.parse_args()
    begin = time.monotonic()
    widehead = Widehead(arguments.library)
    torch.manual_seed(0)
    document: Row = dict(device=torch.cuda.get_device_name(),
                         date=datetime.date.today().isoformat(), torch=torch.__version__,
                         rivals=versions(MODULES), sustained_seconds=arguments.sustained)
    failures = []
    for group in arguments.groups.split(","):
        document[group] = []
        for row in GROUPS[group]:
            if time.monotonic() - begin > arguments.seconds:
                failures.append(f"no time for {row['name']}")
                continue
            print(f"{time.monotonic() - begin:5.0f} s  {row['name']}", file=sys.stderr, flush=True)
            try:
                result = bench_row(widehead, row, arguments.sustained)
                failures += [f"{row['name']}: {name} is off" for name in result["wrong"]]
            except Exception as error:  # one row must not lose the others
                result = dict(row, error=first_line(error))
                failures.append(f"{row['name']}: {first_line(error)}")
            document[group].append(result)
            write(document, arguments.json_path, arguments.markdown_path)
            torch.cuda.empty_cache()
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
