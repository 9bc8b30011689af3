"""Gradients on the CPU beside PyTorch's backward alone (`scaled_dot_product_attention`, its forward pass not counted), by the suite
`backward`: the two take turns, problem by problem, with as many threads.

    python bench/backward.py build/cli/widehead [--seconds 3]

Prints a table; a share is of the multiply-add peak that the same run measured. Nothing else should run meanwhile.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from peer import measure  # noqa: E402

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def problems():
    for row in json.loads((Path(__file__).parent / "suites.json").read_text())["backward"]["rows"]:
        for dtype in row["dtype"]:
            for dim in row["dim"]:
                for causal in row["causal"]:
                    yield {"heads": row["heads"], "dim": dim, "queries": row["queries"], "keys": row["keys"], "causal": causal,
                           "dtype": dtype}


def widehead_row(program, problem, seconds):
    flags = [f"--{name}={value}" for name, value in problem.items()]
    answer = subprocess.run([program, "bench", *flags, "--backward", "--json", f"--seconds={seconds}", "--samples=50"],
                            check=True, capture_output=True, text=True)
    document = json.loads(answer.stdout)
    return document, document["rows"][0]


def torch_us(problem, threads, seconds):
    torch.set_num_threads(threads)
    heads, dim = int(problem["heads"].split("/")[0]), int(problem["dim"])

    def random(length):
        return torch.randn(1, heads, length, dim, dtype=DTYPES[problem["dtype"]], requires_grad=True)

    q, k, v = random(problem["queries"]), random(problem["keys"]), random(problem["keys"])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=problem["causal"] != "none")
    d_out = torch.randn_like(out)
    return measure(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True), seconds)


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("widehead", help="the command line: build/cli/widehead")
    flags.add_argument("--seconds", type=float, default=3, help="of each, on each problem")
    options = flags.parse_args()
    is_first = True
    for problem in problems():
        document, row = widehead_row(options.widehead, problem, options.seconds)
        theirs = torch_us(problem, document["threads"], options.seconds)
        if is_first:
            print(f"{document['device']}, {document['threads']} threads, PyTorch {torch.__version__}\n")
            print("| problem | best ms | GFLOP/s | share of peak | PyTorch ms | times as fast |\n|---|---|---|---|---|---|")
            is_first = False
        disturbed = "" if row["guarded"] and theirs["guarded"] else ", disturbed"
        print(f"| {row['problem']}{disturbed} | {row['best_us'] / 1e3:.1f} | {row['gflops']:.0f} | {100 * row['peak_share']:.0f} % of "
              f"{document['multiply_add_gflops']:.0f} | {theirs['best_us'] / 1e3:.1f} | {theirs['best_us'] / row['best_us']:.2f} |",
              flush=True)


if __name__ == "__main__":
    main()
