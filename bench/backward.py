"""Gradients beside PyTorch's backward alone (`scaled_dot_product_attention`, its forward pass not counted), by the suite
`backward`, or on a GPU by `backward-gpu`: the two take turns, problem by problem, on a CPU with as many threads.

    python bench/backward.py build/cli/widehead [--device cpu] [--seconds 3]

Prints a table; a share is of the device's multiply-add peak, on a CPU as the same run measured it. Nothing else should run meanwhile.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from peer import measure  # noqa: E402

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def problems(suite):
    for row in json.loads((Path(__file__).parent / "suites.json").read_text())[suite]["rows"]:
        for dtype in row["dtype"]:
            for dim in row["dim"]:
                for causal in row["causal"]:
                    shape = {name: row[name] for name in ("batch", "heads", "queries", "keys") if name in row}
                    yield {"batch": 1, **shape, "dim": dim, "causal": causal, "dtype": dtype}


def widehead_row(program, problem, device, seconds):
    flags = [f"--device={device}", *(f"--{name}={value}" for name, value in problem.items())]
    answer = subprocess.run([program, "bench", *flags, "--backward", "--json", f"--seconds={seconds}", "--samples=50"],
                            check=True, capture_output=True, text=True)
    document = json.loads(answer.stdout)
    return document, document["rows"][0]


def torch_us(problem, device, threads, seconds):
    is_cpu = device == "cpu"
    if is_cpu:
        torch.set_num_threads(threads)
    heads, dim = int(problem["heads"].split("/")[0]), int(problem["dim"])

    def random(length):
        return torch.randn(problem["batch"], heads, length, dim, dtype=DTYPES[problem["dtype"]], device=device, requires_grad=True)

    q, k, v = random(problem["queries"]), random(problem["keys"]), random(problem["keys"])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=problem["causal"] != "none")
    d_out = torch.randn_like(out)

    def run():
        torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    return measure(run, seconds) if is_cpu else measure_events(run, seconds)


def measure_events(run, seconds):
    """By the GPU's clock: launches of the next run hide behind the one before."""
    for _ in range(3):
        run()
    samples = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 3:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        samples += [1e3 * begin.elapsed_time(done) for begin, done in zip(marks, marks[1:])]
    samples.sort()
    return {"best_us": samples[0], "median_us": samples[len(samples) // 2], "guarded": True}


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("widehead", help="the command line: build/cli/widehead")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument("--seconds", type=float, default=3, help="of each, on each problem")
    options = flags.parse_args()
    is_first = True
    for problem in problems("backward" if options.device == "cpu" else "backward-gpu"):
        document, row = widehead_row(options.widehead, problem, options.device, options.seconds)
        if "refused" in row:
            print(f"| {row['problem']} | {row['refused']} |", flush=True)
            continue
        theirs = torch_us(problem, options.device, document["threads"], options.seconds)
        if is_first:
            workers = "threads" if options.device == "cpu" else "multiprocessors"
            print(f"{document['device']}, {document['threads']} {workers}, PyTorch {torch.__version__}\n")
            print("| problem | best ms | GFLOP/s | share of peak | PyTorch ms | times as fast |\n|---|---|---|---|---|---|")
            is_first = False
        disturbed = "" if row["guarded"] and theirs["guarded"] else ", disturbed"
        print(f"| {row['problem']}{disturbed} | {row['best_us'] / 1e3:.2f} | {row['gflops']:.0f} | {100 * row['peak_share']:.0f} % of "
              f"{document['multiply_add_gflops']:.0f} | {theirs['best_us'] / 1e3:.2f} | {theirs['best_us'] / row['best_us']:.2f} |",
              flush=True)


if __name__ == "__main__":
    main()
