"""Times the kernels of the backward pass on a GPU beside PyTorch's, alternating, in one process.

    python3 bench/gpu_backward.py RESULT.json RESULT.md [--only d128,d256] [--seconds 60]

Needs `import widehead`. The backward pass alone, by CUDA events, the median of several calls; out and
the log-sum-exp come from Widehead's forward pass, and for PyTorch from its own. TFLOP/s count visible
pairs and five products, whatever a kernel multiplies. Every kernel's gradients are compared with
PyTorch's, and its bits with those of its other runs; what is off makes the script fail. What refuses is
written down with its reason. The results are written after every row; rows left out for time make it
fail too.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_rivals import event_ms
from torch.nn.attention import SDPBackend, sdpa_kernel

import widehead
from widehead import _core

KERNELS = ("sm90_backward", "sm90_backward_wide", "cuda_portable_backward")
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
            "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}
# Both sides round the weights and the results to bf16.
TOLERANCE = 2e-2
LENGTH = 8192
ROWS = [(batch, heads, dims, causal) for batch, heads, dims in
        ((2, 32, (64, 64)), (2, 16, (128, 128)), (2, 16, (192, 128)), (2, 16, (192, 192)), (2, 16, (256, 256)),
         (1, 16, (512, 512)))
        for causal in (False, True)]
Call = Callable[[], tuple[torch.Tensor, ...]]


def name_of(row: tuple) -> str:
    batch, heads, (dim_qk, dim_v), causal = row
    dims = f"d{dim_qk}" if dim_qk == dim_v else f"d{dim_qk}/{dim_v}"
    return f"{dims} {batch} x {heads} heads, {LENGTH} {'causal' if causal else 'full'}"


def tera_flops(row: tuple) -> float:
    batch, heads, (dim_qk, dim_v), causal = row
    pairs = LENGTH * (LENGTH + 1) / 2 if causal else LENGTH**2
    return 2 * batch * heads * pairs * (3 * dim_qk + 2 * dim_v) / 1e12


def widehead_call(kernel: str, inputs: list[torch.Tensor], d_out: torch.Tensor, causal: bool) -> Call:
    """By the module's own call: PyTorch's autograd passes no kernel on."""
    q, k, v = (tensor.detach() for tensor in inputs)
    out, log_sum_exp = widehead.sdpa(q, k, v, causal=causal, return_log_sum_exp=True)
    gradients = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
    limits = widehead.Limits(kernel=kernel)

    def run() -> tuple[torch.Tensor, ...]:
        _core.backward(q, k, v, None, causal, None, None, None, None, None, None, out, log_sum_exp, d_out,
                       *gradients, None, limits._core, 1)
        return gradients
    return run


def torch_call(backend: SDPBackend, inputs: list[torch.Tensor], d_out: torch.Tensor, causal: bool) -> Call:
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)


def calls_of(inputs: list[torch.Tensor], d_out: torch.Tensor, causal: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """What runs, PyTorch's first, and why the others do not."""
    calls, refusals = {}, {}
    makers = [*((name, torch_call, backend) for name, backend in BACKENDS.items()),
              *((kernel, widehead_call, kernel) for kernel in KERNELS)]
    for name, make, which in makers:
        try:
            call = make(which, inputs, d_out, causal)
            call()
            torch.cuda.synchronize()
            calls[name] = call
        except (RuntimeError, ValueError, NotImplementedError) as error:
            refusals[name] = (str(error).splitlines() or [repr(error)])[0][:200]
    return calls, refusals


def difference(have: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(have, want, strict=True))


def measure(row: tuple) -> dict[str, Any]:
    batch, heads, (dim_qk, dim_v), causal = row
    generator = torch.Generator("cuda").manual_seed(7)

    def random(dim: int) -> torch.Tensor:
        return torch.randn(batch, heads, LENGTH, dim, dtype=torch.bfloat16, device="cuda", generator=generator)

    inputs = [random(dim).requires_grad_() for dim in (dim_qk, dim_qk, dim_v)]
    d_out = random(dim_v)
    calls, refusals = calls_of(inputs, d_out, causal)
    theirs = next((name for name in calls if name not in KERNELS), None)
    want = None if theirs is None else calls[theirs]()
    wrong = []
    if want is None:
        wrong.append("nothing of PyTorch's to compare with")
    if not any(kernel in calls for kernel in KERNELS):
        wrong.append("every kernel of Widehead's refuses it")
    differences = {}
    for name in (kernel for kernel in KERNELS if kernel in calls):
        first = [tensor.clone() for tensor in calls[name]()]
        if want is not None:
            differences[name] = difference(first, want)
            if not differences[name] <= TOLERANCE:
                wrong.append(f"{name} is {differences[name]:.1e} off {theirs}")
        if any(not torch.equal(a, b) for _ in range(3) for a, b in zip(first, calls[name](), strict=True)):
            wrong.append(f"{name} gives other bits on another run")
    samples = {name: [] for name in calls}
    for _ in range(7):
        for name, call in calls.items():
            samples[name].append(event_ms(call))
    medians = {name: statistics.median(all_of[1:]) for name, all_of in samples.items()}
    return {"name": name_of(row), "ms": medians, "tflops": {name: 1e3 * tera_flops(row) / ms for name, ms in medians.items()},
            "difference": differences, "refused": refusals, "wrong": wrong}


def table(rows: list[dict[str, Any]]) -> str:
    columns = [*KERNELS, *BACKENDS]
    lines = [f"| TFLOP/s | {' | '.join(columns)} | off |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [f"{row['tflops'][name]:.0f}" if name in row["tflops"] else "-" for name in columns]
        off = ", ".join(f"{one:.1e}" for one in row["difference"].values())
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {off} |")
    return "\n".join(lines)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("json", type=Path)
    flags.add_argument("markdown", type=Path)
    flags.add_argument("--only", default="", help="rows that begin so: d128,d256")
    flags.add_argument("--seconds", type=float, default=60, help="no row begins after so many")
    options = flags.parse_args()
    selected = [row for row in ROWS if name_of(row).startswith(tuple(options.only.split(",")))]
    if not selected:
        flags.error(f"--only {options.only} is none of {', '.join(map(name_of, ROWS))}")
    begin, rows, left_out = time.perf_counter(), [], []
    for row in selected:
        if time.perf_counter() - begin > options.seconds:
            left_out.append(name_of(row))
        else:
            rows.append(measure(row))
            print(json.dumps({key: rows[-1][key] for key in ("name", "tflops", "refused", "wrong")}), flush=True)
        torch.cuda.empty_cache()
        document = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows, "left_out": left_out}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        options.markdown.write_text(f"{document['device']}, PyTorch {document['torch']}, bf16\n\n{table(rows)}\n")
    for name in left_out:
        print(f"left out for time: {name}")
    wrong = [f"{row['name']}: {one}" for row in rows for one in row["wrong"]]
    for one in wrong:
        print(f"WRONG {one}")
    return 1 if wrong or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
