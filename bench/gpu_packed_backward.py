"""Times gradients of packed batches on a GPU beside padding, one sequence at a time, and PyTorch's `varlen_attn`.

    python3 bench/gpu_packed_backward.py RESULT.json RESULT.md [--seconds 60]

Needs `import widehead`. Causal, bf16, the backward pass alone, by CUDA events, the median of several calls, in another
order each round. `padded` is a dense batch of the longest with key lengths, whose d_out of absent queries is 0: the
gradients are the same. TFLOP/s count the pairs that there are and five products. Gradients are compared with those of
one sequence at a time by `cuda_portable_backward`: one of Widehead's that is off makes the script fail, `varlen_attn` is
written down as refused with how far it is off.
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import time_alternating
from gpu_backward import KERNELS, TOLERANCE, Call, difference, gives_the_same_bits

import widehead
from widehead import _core

EVEN = [2048] * 8
# Fine-tuning: many short answers, few long documents.
UNEVEN = [64, 96, 200, 333, 512, 700, 1024, 1500, 2048, 3000, 4096, 8192]
ROWS = [(lengths, heads, dim) for heads, dim in (((32, 8), 64), ((32, 8), 128), ((16, 4), 192), ((16, 2), 256), ((16, 4), 512))
        for lengths in (EVEN, UNEVEN)]


def name_of(lengths: list[int], heads: tuple[int, int], dim: int) -> str:
    return f"d{dim} {heads[0]}/{heads[1]}, {len(lengths)} sequences of {min(lengths)} to {max(lengths)}"


def pack(dense: list[torch.Tensor]) -> torch.Tensor:
    """[1, heads, length, dim] of each sequence."""
    return torch.cat([one[0].transpose(0, 1) for one in dense])


class Batch:
    """Packed q, k, v and d_out, [tokens, heads, dim], and the same padded."""

    def __init__(self, lengths: list[int], heads: tuple[int, int], dim: int) -> None:
        generator = torch.Generator("cuda").manual_seed(7)
        self.lengths, self.longest = lengths, max(lengths)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        self.offsets = starts.to("cuda", torch.int32)
        self.places = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        self.packed = [torch.randn(int(starts[-1]), count, dim, dtype=torch.bfloat16, device="cuda", generator=generator)
                       for count in (heads[0], heads[1], heads[1], heads[0])]

    def sequence(self, i: int) -> list[torch.Tensor]:
        begin, end = self.places[i]
        return [tensor[begin:end].transpose(0, 1).contiguous()[None] for tensor in self.packed]

    def padded(self) -> list[torch.Tensor]:
        return [torch.cat([torch.nn.functional.pad(one, (0, 0, 0, self.longest - one.shape[2])) for one in each])
                for each in zip(*map(self.sequence, range(len(self.lengths))), strict=True)]

    def packed_again(self, padded: list[torch.Tensor]) -> list[torch.Tensor]:
        return [pack([tensor[i : i + 1, :, :length] for i, length in enumerate(self.lengths)]) for tensor in padded]


def widehead_call(kernel: str | None, tensors: list[torch.Tensor], lengths: torch.Tensor | None = None,
                  offsets: torch.Tensor | None = None, longest: int | None = None) -> Call:
    q, k, v, d_out = tensors
    # Top-left: padded rows have as many keys before them as packed ones.
    out, log_sum_exp = widehead.sdpa(q, k, v, causal="top_left", key_lengths=lengths, query_offsets=offsets, key_offsets=offsets,
                                     len_q=longest, len_k=longest, return_log_sum_exp=True)
    gradients = tuple(map(torch.zeros_like, (q, k, v)))
    limits = widehead.Limits(kernel=kernel)

    def run() -> tuple[torch.Tensor, ...]:
        _core.backward(q, k, v, None, "top_left", None, None, None, None, lengths, None,
                       (offsets, offsets, None, None, longest, longest), out, log_sum_exp, d_out, *gradients, None, limits._core, 1)
        return gradients
    return run


def one_at_a_time(kernel: str | None, batch: Batch) -> Callable[[], list[tuple[torch.Tensor, ...]]]:
    calls = [widehead_call(kernel, batch.sequence(i)) for i in range(len(batch.lengths))]

    def run() -> list[tuple[torch.Tensor, ...]]:
        return [call() for call in calls]
    return run


def packed_gradients(sequences: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    return [pack(list(each)) for each in zip(*sequences, strict=True)]


def padded(batch: Batch) -> Call:
    lengths = torch.tensor(batch.lengths, dtype=torch.int32, device="cuda")
    return widehead_call(None, batch.padded(), lengths=lengths)


def varlen(batch: Batch) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, d_out = (tensor.clone() for tensor in batch.packed)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    # Some releases ask whether heads are grouped, others see it.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out = varlen_attn(*inputs, batch.offsets, batch.offsets, batch.longest, batch.longest, window_size=(-1, 0), **grouped)
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)


def reason(name: str, error: Exception) -> str:
    """Of a message that names every kernel, this one's line."""
    lines = [line.strip() for line in str(error).splitlines()] or [repr(error)]
    return next((line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")), lines[0])[:200]


def measure(lengths: list[int], heads: tuple[int, int], dim: int) -> dict[str, Any]:
    batch = Batch(lengths, heads, dim)
    dense = padded(batch)
    makers = {**{kernel: lambda kernel=kernel: widehead_call(kernel, batch.packed, offsets=batch.offsets, longest=batch.longest)
                 for kernel in KERNELS},
              "padded": lambda: dense, "one at a time": lambda: one_at_a_time(None, batch), "varlen_attn": lambda: varlen(batch)}
    want = packed_gradients(one_at_a_time("cuda_portable_backward", batch)())
    calls, refused, wrong, off = {}, {}, [], {}
    for name, make in makers.items():
        try:
            call = make()
            have = call()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, NotImplementedError, ImportError, TypeError) as error:
            refused[name] = reason(name, error)
            continue
        if name == "padded":
            have = batch.packed_again(list(have))
        elif name == "one at a time":
            have = packed_gradients(have)
        off[name] = difference(tuple(have), tuple(want))
        if not off[name] <= TOLERANCE:
            if name == "varlen_attn":
                refused[name] = f"{off[name]:.1e} off"
            else:
                wrong.append(f"{name} is {off[name]:.1e} off")
            continue
        if name in KERNELS and not gives_the_same_bits(call):
            wrong.append(f"{name} gives other bits on another run")
        calls[name] = call
    if not any(kernel in calls for kernel in KERNELS):
        wrong.append("every kernel of Widehead's refuses it")
    milliseconds = time_alternating(calls, 1)
    tera_flops = 2 * heads[0] * sum(n * (n + 1) / 2 for n in lengths) * 5 * dim / 1e12
    return {"name": name_of(lengths, heads, dim), "lengths": lengths, "ms": milliseconds, "off": off, "refused": refused, "wrong": wrong,
            "tflops": {name: 1e3 * tera_flops / ms for name, ms in milliseconds.items()}}


def report(document: dict[str, Any]) -> str:
    columns = [*KERNELS, "padded", "one at a time", "varlen_attn"]
    lines = [f"{document['device']}, PyTorch {document['torch']}, bf16, causal, ms of the backward pass (TFLOP/s)", "",
             f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in document["rows"]:
        cells = [f"{row['ms'][name]:.3f} ({row['tflops'][name]:.0f})" if name in row["ms"] else "-" for name in columns]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    reasons = {(name, reason) for row in document["rows"] for name, reason in row["refused"].items()}
    return "\n".join([*lines, "", *(f"- {name}: {reason}" for name, reason in sorted(reasons))]) + "\n"


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("json", type=Path)
    flags.add_argument("markdown", type=Path)
    flags.add_argument("--seconds", type=float, default=60, help="no row begins after so many")
    options = flags.parse_args()
    begin, rows, left_out = time.perf_counter(), [], []
    for row in ROWS:
        if time.perf_counter() - begin > options.seconds:
            left_out.append(name_of(*row))
            continue
        rows.append(measure(*row))
        print(json.dumps({key: rows[-1][key] for key in ("name", "ms", "refused", "wrong")}), flush=True)
        torch.cuda.empty_cache()
        document = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows, "left_out": left_out}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        options.markdown.write_text(report(document))
    wrong = [f"{row['name']}: {one}" for row in rows for one in row["wrong"]]
    for one in [*(f"LEFT OUT for time: {name}" for name in left_out), *(f"WRONG {one}" for one in wrong)]:
        print(one)
    return 1 if wrong or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
