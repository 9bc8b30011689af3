"""Times pages and packed tensors beside dense ones of the same contents on a GPU, alternating, in one run.

    python3 bench/gpu_serving.py LIBRARY RESULT.json [--only decode,ragged,mixed] [--kv-dtype bf16,e4m3] [--beside LIBRARY] [--kernel sm90_decode] [--batch-invariant] [--rivals flashinfer]

Every layout holds the same tokens, each as [token, head, dim], pages in random order, and what no
sequence lists is NaN. Its answer is compared with that of the dense tensors, or of the first layout
where lengths of queries differ; one that is off makes the script fail. Times are medians of replays
of CUDA graphs over several sets of tensors, which L2 does not hold. Where lengths differ, the rate
is held against a plain read of as many bytes; a batch of prompts and single tokens against two calls
for either. --beside runs another build of the library too, which had better be as fast. Pages of 16
and 64 are read by the libraries of gpu_rivals.py that are installed too, each through its own front
end, over pages that are 0 where ours are NaN. One that refuses is written down with its reason, one
that answers something else with how far that is off. --kv-dtype e4m3 rounds keys and values to codes
with one scale for either, under queries of bf16 as ever.
"""

import argparse
import ctypes
import json
import math
import sys
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from gpu import Graph, first_line, time_alternating
from gpu_library import (E4M3, KEYS_PACKED, KEYS_PAGED, QUERIES_PACKED, SCALES_TENSOR, TOLERANCES,
                         USES_KEY_LENGTHS, USES_VALUES_IN_KEYS, I64x4, Limits, Problem, Run,
                         Tensors, Widehead, relative_rms)
from gpu_rivals import PAGED_MODULES, PAGED_RIVALS, Paged, rivals_text, starts, versions

# Of keys and values.
KV_DTYPES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
E4M3_HIGHEST = 448
E4M3_NAN = 0x7f
# The most that a rival may be off by and still be timed: queries and weights rounded to e4m3, each
# by up to a sixteenth, stay below it.
MOST_ERROR = 0.1


@dataclass
class Batch:
    """What a call works on: heads, dimensions, and of each sequence its queries and keys."""

    name: str
    heads: tuple[int, int]
    dims: tuple[int, int]
    queries: list[int]
    keys: list[int]
    values_in_keys: bool = False
    most_keys: int = 0  # that the plan is made for; 0: as many as there are
    layouts: tuple[str, ...] = ("dense", "packed", "pages of 16", "pages of 64", "pages of 256")
    kv_dtype: str = "bf16"

    @property
    def len_k(self) -> int:
        return self.most_keys or max(self.keys)

    @property
    def kv_bytes(self) -> int:
        width = self.dims[0] + (0 if self.values_in_keys else self.dims[1])
        return KV_DTYPES[self.kv_dtype].itemsize * sum(self.keys) * self.heads[1] * width

    @property
    def is_quantised(self) -> bool:
        return self.kv_dtype == "e4m3"

    def part(self, chosen: list[int]) -> "Batch":
        return replace(self, queries=[self.queries[i] for i in chosen],
                       keys=[self.keys[i] for i in chosen])

    def over(self, kv_dtype: str) -> "Batch":
        name = self.name if kv_dtype == self.kv_dtype else f"{self.name}, {kv_dtype}"
        return replace(self, name=name, kv_dtype=kv_dtype)


def log_uniform(count: int, least: int, most: int) -> list[int]:
    random = torch.rand(count, generator=torch.Generator().manual_seed(1))
    return [round(least * (most / least) ** float(x)) for x in random]


DECODE = [
    Batch("decode d128 32/8, 16 x 8192", (32, 8), (128, 128), [1] * 16, [8192] * 16),
    Batch("decode d256 64/2, 4 x 65536", (64, 2), (256, 256), [1] * 4, [65536] * 4),
    Batch("decode d512 32/4, 4 x 16384", (32, 4), (512, 512), [1] * 4, [16384] * 4),
    Batch("decode 576/512 128/1, 16 x 8192, V in K", (128, 1), (576, 512), [1] * 16, [8192] * 16,
          True),
    Batch("decode d64 64/8, 16 x 8192", (64, 8), (64, 64), [1] * 16, [8192] * 16),
]
RAGGED = [
    Batch(f"64 sequences of 128 to 65536 keys, d{dim} {heads[0]}/{heads[1]}", heads, (dim, dim),
          [1] * 64, log_uniform(64, 128, 65536), False, 65536,
          ("packed", "pages of 64", "pages of 16"))
    for heads, dim in (((32, 8), 128), ((64, 2), 256))
]
MIXED = [
    Batch("4 chunks of 512 and 60 tokens over 8192 keys, d128 32/8", (32, 8), (128, 128),
          [512] * 4 + [1] * 60, [8192] * 64, layouts=("packed", "pages of 64")),
    Batch("chunks of 2048 over 8192 keys, 4 of them, d256 16/4", (16, 4), (256, 256), [2048] * 4,
          [8192] * 4),
]
BATCHES = [
    Batch(f"decode d{dim} {heads[0]}/{heads[1]}, 32 x 8192", heads, (dim, dim), [1] * 32,
          [8192] * 32)
    for heads, dim in (((32, 8), 128), ((64, 2), 256))
]
PREFILL = [
    Batch(f"prefill d{dim} 16/16, 2 x 8192", (16, 16), (dim, dim), [8192] * 2, [8192] * 2,
          layouts=("dense", "packed", "pages of 64", "pages of 16"))
    for dim in (128, 256)
]
RIVALS_LAYOUTS = ("pages of 64", "pages of 16")
GROUPS = {"decode": DECODE, "ragged": RAGGED, "mixed": MIXED, "batches": BATCHES,
          "prefill": PREFILL}


def to_e4m3(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, as bytes, and the scale of all of them."""
    scale = tokens.abs().max().float().view(1) / E4M3_HIGHEST
    return (tokens.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


@dataclass
class Served:
    """The tokens of a batch, laid out in any way; codes are bytes."""

    batch: Batch
    q: torch.Tensor = field(init=False)
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)
    scales: list[torch.Tensor] = field(init=False)  # of K and V, [1] each

    def __post_init__(self) -> None:
        b = self.batch
        def random(tokens: int, heads: int, dim: int) -> torch.Tensor:
            return torch.randn(tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
        self.q = random(sum(b.queries), b.heads[0], b.dims[0])
        self.k = random(sum(b.keys), b.heads[1], b.dims[0])
        v = None if b.values_in_keys else random(sum(b.keys), b.heads[1], b.dims[1])
        self.scales = [torch.ones(1, device="cuda")] * 2
        if b.is_quantised:
            self.k, scale_k = to_e4m3(self.k)
            v, scale_v = (None, scale_k) if v is None else to_e4m3(v)
            self.scales = [scale_k, scale_v]
        self.v = self.k[..., :b.dims[1]] if v is None else v

    @property
    def nan(self) -> float:
        return E4M3_NAN if self.batch.is_quantised else math.nan

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, len_k, heads, dim] with NaN past each sequence's end."""
        b = self.batch
        out = torch.full((len(b.keys), b.len_k, *tokens.shape[1:]), self.nan, dtype=tokens.dtype,
                         device="cuda")
        for row, one in zip(out, tokens.split(b.keys), strict=True):
            row[:len(one)] = one
        return out

    def pages(self, page_size: int, unlisted: float) -> tuple[torch.Tensor, ...]:
        """K and V [pages, page_size, heads, dim], and the table on the host: pages in random order,
        `unlisted` where no token is."""
        b = self.batch
        counts = [-(-length // page_size) for length in b.keys]
        place = torch.randperm(sum(counts) + 3)[:sum(counts)].to(torch.int32)
        rows = torch.cat([
            (pages[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
            for pages, length in zip(place.long().split(counts), b.keys, strict=True)]).cuda()

        def pool(tokens: torch.Tensor) -> torch.Tensor:
            out = torch.full((len(place) + 3, page_size, *tokens.shape[1:]), unlisted,
                             dtype=tokens.dtype, device="cuda")
            out.flatten(0, 1)[rows] = tokens
            return out
        k = pool(self.k)
        table = torch.full((len(counts), -(-b.len_k // page_size)), -1, dtype=torch.int32)
        for row, one in zip(table, place.split(counts), strict=True):
            row[:len(one)] = one
        return k, k[..., :b.dims[1]] if b.values_in_keys else pool(self.v), table

    def for_rivals(self, page_size: int) -> Paged:
        k, v, table = self.pages(page_size, 0)
        dtype = KV_DTYPES[self.batch.kv_dtype]
        return Paged(self.q, k.view(dtype), v.view(dtype), table.clamp(min=0), self.batch.queries,
                     self.batch.keys, *(float(scale) for scale in self.scales))

    def run(self, library: Widehead, layout: str, fields: dict[str, Any]) -> Run:
        """`fields` are those of wh_limits."""
        b = self.batch
        p, t, limits = Problem(), Tensors(size=ctypes.sizeof(Tensors)), Limits()
        library.check(library.c.wh_problem_init(ctypes.byref(p), ctypes.sizeof(p)))
        library.check(library.c.wh_limits_init(ctypes.byref(limits), ctypes.sizeof(limits)))
        for name, value in fields.items():
            setattr(limits, name, value)
        p.device, p.dtype_q, p.dtype_kv, p.causal = 1, 2, 2, 1
        p.batch, p.len_q, p.len_k = len(b.queries), max(b.queries), b.len_k
        p.heads_q, p.heads_kv = b.heads
        p.dim_qk, p.dim_v = b.dims
        p.uses = USES_KEY_LENGTHS | (USES_VALUES_IN_KEYS if b.values_in_keys else 0)
        keep: list[torch.Tensor] = []

        def pointer(tensor: torch.Tensor) -> int:
            keep.append(tensor)
            return tensor.data_ptr()
        is_dense = layout == "dense"
        if not is_dense:
            p.query_layout, p.total_q = QUERIES_PACKED, len(self.q)
            t.query_offsets = pointer(starts(b.queries))
        # [token, head, dim] in all of them: strides of heads and tokens are the same.
        k, v = self.k, self.v
        if is_dense:
            k, v = self.rows(k), v if b.values_in_keys else self.rows(v)
        elif layout == "packed":
            p.key_layout, p.total_k = KEYS_PACKED, len(k)
            t.key_offsets = pointer(starts(b.keys))
        else:
            p.key_layout, p.page_size = KEYS_PAGED, int(layout.split()[-1])
            k, v, table = self.pages(p.page_size, self.nan)
            p.pages, t.page_table = len(k), pointer(table.cuda())
        if b.is_quantised:
            p.quantised_k = p.quantised_v = E4M3
            p.scales_k = p.scales_v = SCALES_TENSOR
            t.scales_k = pointer(self.scales[0])
            t.scales_v = None if b.values_in_keys else pointer(self.scales[1])
        library.check(library.c.wh_problem_set_dense(ctypes.byref(p)))
        if is_dense:
            for length, heads, dim, strides in (
                    (p.len_q, p.heads_q, p.dim_qk, ("q",)), (p.len_q, p.heads_q, p.dim_v, ("out",)),
                    (p.len_k, p.heads_kv, p.dim_qk, ("k",)),
                    (p.len_k, p.heads_kv, p.dim_qk if b.values_in_keys else p.dim_v, ("v",))):
                for name in strides:
                    setattr(p, "stride_" + name, I64x4(length * heads * dim, dim, heads * dim, 1))
        plan = library.create(p, limits)
        out = torch.empty(len(self.q), b.heads[0], b.dims[1], dtype=torch.bfloat16, device="cuda")
        size = library.c.wh_plan_workspace_bytes(plan)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
        t.q, t.k, t.out, t.workspace = (pointer(one) for one in (self.q, k, out, workspace))
        t.v = None if b.values_in_keys else pointer(v)
        t.workspace_bytes = size
        t.key_lengths = pointer(torch.tensor(b.keys, dtype=torch.int32, device="cuda"))
        return Run(library, plan, t, out, keep)


def plain_read_ms(size: int) -> float:
    """Of so many bytes, by PyTorch's maximum of 32-bit words."""
    words = torch.ones(size // 4, dtype=torch.int32, device="cuda")
    return time_alternating({"read": Graph([words.max])}, 1)["read"]


def rivals_over(sets: list[Served], page_size: int, names: list[str], answer: torch.Tensor
                ) -> tuple[dict[str, dict[str, Any]], dict[str, Graph]]:
    """What each of them answers or refuses, and calls of those that answer."""
    pools = [one.for_rivals(page_size) for one in sets]
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Graph] = {}
    for name in names:
        try:
            runs = [PAGED_RIVALS[name](pool) for pool in pools]
            error = relative_rms(runs[0](), answer)
            torch.cuda.synchronize()
            if not error <= MOST_ERROR:
                raise ValueError(f"another answer, by a relative RMS of {error:.3g}")
            calls[name] = Graph(runs)
            results[name] = dict(error=error, is_another_answer=error > 2 * TOLERANCES["bf16"])
        except Exception as error:  # a refusal is a result
            results[name] = dict(refused=first_line(error))
    return results, calls


def bench(libraries: dict[str, Widehead], batch: Batch, limits: dict[str, Any],
          rivals: list[str]) -> dict[str, Any]:
    """`libraries` by what follows a layout's name."""
    sets = [Served(batch) for _ in range(max(1, min(8, -(-400_000_000 // batch.kv_bytes))))]
    calls: dict[str, Graph] = {}
    row: dict[str, Any] = dict(name=batch.name, kv_dtype=batch.kv_dtype, kv_bytes=batch.kv_bytes,
                               layouts={})
    answer = None
    for layout in batch.layouts:
        for suffix, library in libraries.items():
            try:
                runs = [one.run(library, layout, limits) for one in sets]
                out = runs[0]().clone()
                torch.cuda.synchronize()
                answer = out if answer is None else answer
                error = relative_rms(out, answer)
                row["layouts"][layout + suffix] = dict(
                    kernel=runs[0].kernel, error=error, workspace_bytes=runs[0].workspace_bytes,
                    is_wrong=not error <= 2 * TOLERANCES["bf16"])
                calls[layout + suffix] = Graph(runs)
            except Exception as error:  # a refusal is a result
                row["layouts"][layout + suffix] = dict(refused=first_line(error))
    for layout in RIVALS_LAYOUTS:
        if layout not in batch.layouts or batch.values_in_keys or answer is None:
            continue
        results, runs = rivals_over(sets, int(layout.split()[-1]), rivals, answer)
        row["layouts"] |= {f"{layout}, {name}": dict(result, beside=layout)
                           for name, result in results.items()}
        calls |= {f"{layout}, {name}": run for name, run in runs.items()}
    prompts = [i for i, length in enumerate(batch.queries) if length > 1]
    tokens = [i for i, length in enumerate(batch.queries) if length == 1]
    if prompts and tokens:
        library = next(iter(libraries.values()))
        halves = [(Served(batch.part(prompts)), Served(batch.part(tokens))) for _ in sets]
        runs = [half.run(library, batch.layouts[-1], limits) for pair in halves for half in pair]
        halves_out = [runs[0](), runs[1]()]
        torch.cuda.synchronize()
        row["layouts"]["two calls"] = dict(kernel=", ".join(one.kernel for one in runs[:2]),
                                           is_wrong=not all(bool(out.isfinite().all())
                                                            for out in halves_out))
        calls["two calls"] = Graph(runs)
    times = time_alternating(calls, len(sets)) if calls else {}
    for layout, ms in times.items():
        row["layouts"][layout].update(us=ms * 1e3, kv_gbytes_per_s=batch.kv_bytes / ms * 1e-6)
    if len(set(batch.keys)) > 1:
        row["read_gbytes_per_s"] = batch.kv_bytes / plain_read_ms(batch.kv_bytes) * 1e-6
    return row


def lines(row: dict[str, Any]) -> str:
    """The ratio is to the first layout, a rival's to ours over pages of as many tokens."""
    layouts = row["layouts"]
    first = next((name for name, one in layouts.items() if "us" in one), "")
    text = [row["name"] + (f", a plain read {row['read_gbytes_per_s']:.0f} GB/s"
                           if "read_gbytes_per_s" in row else "")]
    for layout, one in layouts.items():
        if "us" not in one:
            text.append(f"  {layout:27} refused: {one['refused']}")
            continue
        beside = layouts[one.get("beside", first)]
        ratio = f"{one['us'] / beside['us']:6.3f}" if "us" in beside else "      "
        text.append(f"  {layout:27} {one['us']:9.1f} us  {ratio}  "
                    f"{one['kv_gbytes_per_s']:6.0f} GB/s  {one.get('kernel', '')}  "
                    + (f"error {one['error']:.1e}" if "error" in one else "")
                    + ("  WRONG" if one.get("is_wrong") else "")
                    + ("  ANOTHER ANSWER" if one.get("is_another_answer") else ""))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("result")
    parser.add_argument("--only", default=",".join(GROUPS))
    parser.add_argument("--kv-dtype", default="bf16", help="of keys and values: bf16,e4m3")
    parser.add_argument("--beside", help="another build of the library")
    parser.add_argument("--kernel")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--rivals", default=",".join(PAGED_MODULES), help="those that may run")
    options = parser.parse_args()
    for name, value, valid in (("--only", options.only, GROUPS),
                               ("--kv-dtype", options.kv_dtype, KV_DTYPES),
                               ("--rivals", options.rivals, PAGED_MODULES)):
        if wrong := [one for one in value.split(",") if one and one not in valid]:
            parser.error(f"{name} is {','.join(wrong)}; valid: {', '.join(valid)}")
    libraries = {"": Widehead(options.library)}
    if options.beside:
        libraries[" beside"] = Widehead(options.beside)
    limits = dict(kernel=options.kernel.encode() if options.kernel else None,
                  batch_invariant=int(options.batch_invariant))
    rivals = {name: version for name, version in versions(PAGED_MODULES).items()
              if name in options.rivals.split(",")}
    print(rivals_text(rivals), flush=True)
    there = [name for name, version in rivals.items() if version]
    rows = []
    for group in options.only.split(","):
        for batch, kv_dtype in product(GROUPS[group], options.kv_dtype.split(",")):
            rows.append(bench(libraries, batch.over(kv_dtype), limits, there))
            print(lines(rows[-1]), flush=True)
            with open(options.result, "w") as file:
                json.dump(dict(device=torch.cuda.get_device_name(), torch=torch.__version__,
                               rivals=rivals, rows=rows), file, indent=1)
            torch.cuda.empty_cache()
    if any(one.get("is_wrong") for row in rows for one in row["layouts"].values()):
        sys.exit("gpu_serving: another answer than that of the first layout")
    refused = [row["name"] for row in rows if not any("us" in one for one in row["layouts"].values())]
    if refused:
        sys.exit(f"gpu_serving: every layout of {', '.join(refused)} is refused")


if __name__ == "__main__":
    main()
