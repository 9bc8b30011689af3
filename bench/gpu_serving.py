"""Times pages and packed tensors beside dense ones of the same contents on a GPU, alternating, in one run.

    python3 bench/gpu_serving.py LIBRARY RESULT.json [--only decode,ragged,mixed] [--beside LIBRARY] [--kernel sm90_decode] [--batch-invariant] [--rivals flashinfer]

Every layout holds the same tokens, each as [token, head, dim], pages in random order, and what no
sequence lists is NaN. Its answer is compared with that of the dense tensors, or of the first layout
where lengths of queries differ; one that is off makes the script fail. Times are medians of replays
of CUDA graphs over several sets of tensors, which L2 does not hold. Where lengths differ, the rate
is held against a plain read of as many bytes; a batch of prompts and single tokens against two calls
for either. --beside runs another build of the library too, which had better be as fast. Decode over
pages of 16 and 64 runs by the libraries of gpu_rivals.py that are installed too, each through its own
front end, over pages that are 0 where ours are NaN. One that refuses, or answers something else, is
written down with its reason.
"""

import argparse
import ctypes
import json
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu import Graph, first_line, time_alternating
from gpu_library import (KEYS_PACKED, KEYS_PAGED, QUERIES_PACKED, TOLERANCES, USES_KEY_LENGTHS,
                         USES_VALUES_IN_KEYS, I64x4, Limits, Problem, Run, Tensors, Widehead,
                         relative_rms)
from gpu_rivals import PAGED_MODULES, PAGED_RIVALS, PagedDecode, rivals_text, versions


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

    @property
    def len_k(self) -> int:
        return self.most_keys or max(self.keys)

    @property
    def kv_bytes(self) -> int:
        width = self.dims[0] + (0 if self.values_in_keys else self.dims[1])
        return 2 * sum(self.keys) * self.heads[1] * width

    @property
    def has_rivals(self) -> bool:
        return set(self.queries) == {1} and not self.values_in_keys

    def part(self, chosen: list[int]) -> "Batch":
        return Batch(self.name, self.heads, self.dims, [self.queries[i] for i in chosen],
                     [self.keys[i] for i in chosen], self.values_in_keys, self.most_keys)


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
RIVALS_LAYOUTS = ("pages of 64", "pages of 16")
GROUPS = {"decode": DECODE, "ragged": RAGGED, "mixed": MIXED}


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32,
                        device="cuda")


@dataclass
class Served:
    """The tokens of a batch, laid out in any way."""

    batch: Batch
    q: torch.Tensor = field(init=False)
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        b = self.batch
        def random(tokens: int, heads: int, dim: int) -> torch.Tensor:
            return torch.randn(tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
        self.q = random(sum(b.queries), b.heads[0], b.dims[0])
        self.k = random(sum(b.keys), b.heads[1], b.dims[0])
        self.v = (self.k[..., :b.dims[1]] if b.values_in_keys
                  else random(sum(b.keys), b.heads[1], b.dims[1]))

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, len_k, heads, dim] with NaN past each sequence's end."""
        b = self.batch
        out = torch.full((len(b.keys), b.len_k, *tokens.shape[1:]), math.nan, dtype=tokens.dtype,
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

    def for_rivals(self, page_size: int) -> PagedDecode:
        k, v, table = self.pages(page_size, 0)
        return PagedDecode(self.q, k, v, table.clamp(min=0), self.batch.keys)

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
            t.query_offsets = pointer(offsets(b.queries))
        # [token, head, dim] in all of them: strides of heads and tokens are the same.
        k, v = self.k, self.v
        if is_dense:
            k, v = self.rows(k), v if b.values_in_keys else self.rows(v)
        elif layout == "packed":
            p.key_layout, p.total_k = KEYS_PACKED, len(k)
            t.key_offsets = pointer(offsets(b.keys))
        else:
            p.key_layout, p.page_size = KEYS_PAGED, int(layout.split()[-1])
            k, v, table = self.pages(p.page_size, math.nan)
            p.pages, t.page_table = len(k), pointer(table.cuda())
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
    """What each of them answers or refuses, and calls of those that are right."""
    pools = [one.for_rivals(page_size) for one in sets]
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Graph] = {}
    for name in names:
        try:
            runs = [PAGED_RIVALS[name](pool) for pool in pools]
            error = relative_rms(runs[0](), answer)
            torch.cuda.synchronize()
            if not error <= 2 * TOLERANCES["bf16"]:
                raise ValueError(f"another answer, by a relative RMS of {error:.3g}")
            calls[name] = Graph(runs)
            results[name] = dict(error=error)
        except Exception as error:  # a refusal is a result
            results[name] = dict(refused=first_line(error))
    return results, calls


def bench(libraries: dict[str, Widehead], batch: Batch, limits: dict[str, Any],
          rivals: list[str]) -> dict[str, Any]:
    """`libraries` by what follows a layout's name."""
    sets = [Served(batch) for _ in range(max(1, min(8, -(-400_000_000 // batch.kv_bytes))))]
    calls: dict[str, Graph] = {}
    row: dict[str, Any] = dict(name=batch.name, kv_bytes=batch.kv_bytes, layouts={})
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
    for layout in RIVALS_LAYOUTS if batch.has_rivals and answer is not None else ():
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
                    + ("  WRONG" if one.get("is_wrong") else ""))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("result")
    parser.add_argument("--only", default=",".join(GROUPS))
    parser.add_argument("--beside", help="another build of the library")
    parser.add_argument("--kernel")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--rivals", default=",".join(PAGED_MODULES), help="those that may run")
    options = parser.parse_args()
    for name, value, valid in (("--only", options.only, GROUPS), ("--rivals", options.rivals, PAGED_MODULES)):
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
        for batch in GROUPS[group]:
            rows.append(bench(libraries, batch, limits, there))
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
