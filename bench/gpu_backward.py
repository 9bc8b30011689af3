"""Times the kernels of the backward pass on a GPU beside PyTorch's, alternating, in one process.

    python3 bench/gpu_backward.py RESULT.json RESULT.md [--only d128,d256] [--seconds 60] [--sustained 1]

Needs `import widehead`. The backward pass alone, by CUDA events, the median of several calls, in another
order each round; out and the log-sum-exp come from Widehead's forward pass, and for a rival from its own.
FlashAttention-3 runs beside PyTorch's where `flash_attn_interface` is installed, as it comes and
deterministic. TFLOP/s count visible pairs and five products, whatever a kernel multiplies. Every kernel's
gradients are compared with PyTorch's, and its bits with those of its other runs; what is off makes the
script fail, or is no rival. What refuses is written down with its reason. With --sustained the kernels
that are near the fastest run alone for so many seconds, behind one that is not counted: at the power
limit. The results are written after every row; rows left out for time make the script fail too.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import STILL_A_RIVAL, sustained_ms, time_alternating
from gpu_rivals import is_installed
from torch.nn.attention import SDPBackend, sdpa_kernel

import widehead
from widehead import _core

KERNELS = ("sm90_backward", "sm90_backward_wide", "cuda_portable_backward")
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
            "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}
FLASH_3 = {"FlashAttention-3": False, "FlashAttention-3, deterministic": True}
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


def flash_3_call(deterministic: bool, inputs: list[torch.Tensor], d_out: torch.Tensor, causal: bool) -> Call:
    """In its layout, [batch, length, heads, dim]."""
    if not is_installed("flash_attn_interface"):
        raise NotImplementedError("is not installed")
    from flash_attn_interface import flash_attn_func

    theirs = [tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in inputs]
    out = flash_attn_func(*theirs, causal=causal, deterministic=deterministic)
    out = out[0] if isinstance(out, tuple) else out
    d_theirs = d_out.transpose(1, 2).contiguous()
    return lambda: tuple(each.transpose(1, 2) for each in torch.autograd.grad(out, theirs, d_theirs, retain_graph=True))


def calls_of(inputs: list[torch.Tensor], d_out: torch.Tensor, causal: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """What runs, PyTorch's first, and why the others do not."""
    calls, refusals = {}, {}
    makers = [*((name, torch_call, backend) for name, backend in BACKENDS.items()),
              *((name, flash_3_call, is_deterministic) for name, is_deterministic in FLASH_3.items()),
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


def gives_the_same_bits(call: Call) -> bool:
    first = [tensor.clone() for tensor in call()]
    return all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, call(), strict=True))


def measure(row: tuple, sustained_s: float) -> dict[str, Any]:
    batch, heads, (dim_qk, dim_v), causal = row
    generator = torch.Generator("cuda").manual_seed(7)

    def random(dim: int) -> torch.Tensor:
        return torch.randn(batch, heads, LENGTH, dim, dtype=torch.bfloat16, device="cuda", generator=generator)

    inputs = [random(dim).requires_grad_() for dim in (dim_qk, dim_qk, dim_v)]
    d_out = random(dim_v)
    calls, refusals = calls_of(inputs, d_out, causal)
    theirs = next((name for name in calls if name in BACKENDS), None)
    want = None if theirs is None else calls[theirs]()
    wrong = []
    if want is None:
        wrong.append("nothing of PyTorch's to compare with")
    if not any(kernel in calls for kernel in KERNELS):
        wrong.append("every kernel of Widehead's refuses it")
    differences, same_bits = {}, {}
    for name in [name for name in calls if name not in BACKENDS]:
        same_bits[name] = gives_the_same_bits(calls[name])
        if name in KERNELS and not same_bits[name]:
            wrong.append(f"{name} gives other bits on another run")
        if want is None:
            continue
        differences[name] = difference(calls[name](), want)
        if not differences[name] <= TOLERANCE:
            off = f"{differences[name]:.1e} off {theirs}"
            if name in KERNELS:
                wrong.append(f"{name} is {off}")
            else:
                refusals[name] = off
                del calls[name]
    milliseconds = time_alternating(calls, 1)
    held = {}
    if sustained_s > 0:
        most_ms = STILL_A_RIVAL * min(milliseconds.values(), default=0)
        held = {name: sustained_ms(calls[name], ms, sustained_s) for name, ms in milliseconds.items() if ms <= most_ms}

    def rates(times: dict[str, float]) -> dict[str, float]:
        return {name: 1e3 * tera_flops(row) / ms for name, ms in times.items()}

    return {"name": name_of(row), "ms": milliseconds, "tflops": rates(milliseconds), "sustained_ms": held,
            "sustained_tflops": rates(held), "difference": differences, "same_bits": same_bits, "refused": refusals,
            "wrong": wrong}


def table(rows: list[dict[str, Any]], rates: str) -> str:
    columns = [*KERNELS, *FLASH_3, *BACKENDS]
    lines = [f"| TFLOP/s | {' | '.join(columns)} | off |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [f"{row[rates][name]:.0f}" if name in row[rates] else "-" for name in columns]
        off = ", ".join(f"{row['difference'][name]:.1e}" for name in columns if name in row["difference"])
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {off} |")
    return "\n".join(lines)


def report(document: dict[str, Any]) -> str:
    rows = document["rows"]
    parts = [f"{document['device']}, PyTorch {document['torch']}, bf16", "In bursts:", table(rows, "tflops")]
    if any(row["sustained_tflops"] for row in rows):
        parts += ["Alone, at the power limit; -: too far behind in a burst:", table(rows, "sustained_tflops")]
    others = sorted({name for row in rows for name, is_same in row["same_bits"].items() if not is_same})
    parts += [f"Gave other bits on another run: {', '.join(others) or 'none'}."]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["refused"].items():
            reasons.setdefault((name, reason), []).append(row["name"])
    parts += ["\n".join(f"- {name}, {len(where)} of {len(rows)} rows, the first {where[0]}: {reason}"
                        for (name, reason), where in reasons.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("json", type=Path)
    flags.add_argument("markdown", type=Path)
    flags.add_argument("--only", default="", help="rows that begin so: d128,d256")
    flags.add_argument("--seconds", type=float, default=60, help="no row begins after so many")
    flags.add_argument("--sustained", type=float, default=0, help="seconds alone too, of what is near the fastest")
    options = flags.parse_args()
    selected = [row for row in ROWS if name_of(row).startswith(tuple(options.only.split(",")))]
    if not selected:
        flags.error(f"--only {options.only} is none of {', '.join(map(name_of, ROWS))}")
    begin, rows, left_out = time.perf_counter(), [], []
    for row in selected:
        if time.perf_counter() - begin > options.seconds:
            left_out.append(name_of(row))
        else:
            rows.append(measure(row, options.sustained))
            print(json.dumps({key: rows[-1][key] for key in ("name", "tflops", "sustained_tflops", "refused", "wrong")}), flush=True)
        torch.cuda.empty_cache()
        document = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows, "left_out": left_out}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        options.markdown.write_text(report(document))
    for name in left_out:
        print(f"left out for time: {name}")
    wrong = [f"{row['name']}: {one}" for row in rows for one in row["wrong"]]
    for one in wrong:
        print(f"WRONG {one}")
    return 1 if wrong or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
