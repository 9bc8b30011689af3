"""Makes docs/benchmarks.md of every folder in bench/results: a section a machine and day.

    python3 bench/report.py
"""

import json
import statistics
from pathlib import Path

INTRODUCTION = """# Benchmarks

`tools/bench_cpu` times the CPU suites, fused beside unfused (any CBLAS, head by head, a vectorised softmax), and writes JSON and charts
into a folder of [bench/results](../bench/results); `python3 bench/report.py` makes this page of all of them. Times are the best of the samples that a probe of the
multiply-add rate, before and after each, and the count of preemptions found undisturbed; rows where none was are marked ~. *Peak* is the
multiply-add rate of all cores in f32 and *reads* the rate at which they read memory, both measured in the same run; GFLOP/s count visible
query-key pairs only. "In cache": keys and values fit the last level of cache, where repeated samples find them.
What bounds the CPU kernels is on the pages of [decode](cpu-decode.md#what-bounds-it) and [prefill](cpu-prefill.md#what-bounds-it).
`python3 bench/peers/compare.py cpu-prefill cpu-decode` puts other libraries beside it; on a Zen 5 PyTorch, ONNX Runtime, oneDNN, ggml and MLX
([table](../bench/results/amd-epyc-avx3-2026-11-29-peers.md)):

![every library's time over Widehead's](../bench/results/amd-epyc-avx3-2026-11-29-peers.svg)
"""


def milliseconds(us):
    return f"{us / 1e3:.3g}"


def gibibytes(value):
    return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.2f} MiB"


def problems(rows):
    """Rows by problem, in order."""
    found = {}
    for row in rows:
        found.setdefault(row["problem"], {})[row["kernel"]] = row
    return found.items()


def undisturbed(row):
    return "" if row.get("guarded", True) else " ~"


def role_of(row):
    """What the kernel is to the others; results from before rows said it have no other kernels than these."""
    return row.get("role") or {"cpu_unfused": "baseline", "cpu_reference": "reference"}.get(row["kernel"], "fused")


def fastest(rows):
    ran = [row for row in rows if "best_us" in row]
    return min(ran, key=lambda row: row["best_us"]) if ran else next(iter(rows), None)


def read_share(row, reads):
    rate = row["kv_gbytes_per_s"] / reads
    # Older files do not say what fits the cache, but memory is not faster than memory.
    return "in cache" if row.get("kv_cached", rate > 1) else f"{100 * rate:.0f} %"


def peak_of(row, document, peak):
    return document.get("bf16_gflops", peak) if row["kernel"] == "cpu_prefill_bf16" else peak


def fused_cells(row, peak, reads):
    if row is None or "best_us" not in row:
        return ["-" if row is None else row["kernel"], "-" if row is None else row["refused"]] + [""] * 5
    return [row["kernel"], milliseconds(row["best_us"]) + undisturbed(row), f"{row['gflops']:.0f}",
            f"{100 * row['gflops'] / peak:.0f} %", f"{row['kv_gbytes_per_s']:.1f}", read_share(row, reads),
            gibibytes(row["workspace_bytes"])]


def unfused_cells(fused, unfused):
    if unfused is None:
        return ["-", "-", "-"]
    if "best_us" not in unfused:
        return [unfused["refused"], "-", gibibytes(unfused["workspace_bytes"])]
    speed_up = f"{unfused['best_us'] / fused['best_us']:.2f}" if fused and "best_us" in fused else "-"
    return [milliseconds(unfused["best_us"]) + undisturbed(unfused), speed_up, gibibytes(unfused["workspace_bytes"])]


def suite_table(document, peak, reads):
    has_plain = any("times_plain" in row for row in document["rows"])
    head = ["problem", "fused", "ms", "GFLOP/s", "of peak", "GB/s", "of reads", "workspace"]
    head += ["x plain"] if has_plain else ["unfused ms", "speed-up", "unfused's workspace", "chosen", "16384 would choose"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, kernels in problems(document["rows"]):
        rows = list(kernels.values())
        fused = fastest([row for row in rows if role_of(row) == "fused"])
        cells = [name] + fused_cells(fused, peak_of(fused, document, peak) if fused else peak, reads)
        if has_plain:
            cells.append(f"{fused['times_plain']:.2f}" if fused and "times_plain" in fused else "")
        else:
            unfused = next((row for row in rows if role_of(row) == "baseline"), None)
            chosen = next((row["kernel"] for row in rows if row["chosen"]), "-")
            cells += unfused_cells(fused, unfused) + [chosen, rows[0].get("threshold_would_choose", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def routing_text(document):
    every = document["routing"]
    rows = [row for row in every if row.get("guarded", True)]
    if not rows:
        return f"All {len(every)} problems were disturbed."
    regrets = sorted(row["regret"] for row in rows)
    errors = sorted(abs(row["estimated_us"] / row["measured_us"] - 1) for row in rows)
    rest = f" {len(every) - len(rows)} more problems were disturbed." if len(rows) < len(every) else ""
    estimates = document["rows"][0].get("estimates", "")
    text = (f"Regret (time of the chosen kernel over that of the fastest) over {len(rows)} problems: median "
            f"{statistics.median(regrets):.3f}, worst {regrets[-1]:.2f}. Estimates{f' ({estimates})' if estimates else ''} are off by "
            f"{100 * statistics.median(errors):.0f} % (median), {100 * errors[-1]:.0f} % (worst).{rest}")
    worst = [row for row in sorted(rows, key=lambda row: -row["regret"]) if row["regret"] > 1.02][:12]
    if not worst:
        return text
    lines = ["", "| problem | chosen | fastest | regret | estimated us | measured us |", "|---" * 6 + "|"]
    lines += [f"| {row['problem']} | {row['chosen']} | {row['fastest']} | {row['regret']:.2f} | "
              f"{row['estimated_us']:.1f} | {row['measured_us']:.1f} |" for row in worst]
    return text + "\n" + "\n".join(lines)


def section(folder):
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    documents = {name: document for name, document in documents.items() if "multiply_add_gflops" in document}
    if not documents:
        return
    first = next(iter(documents.values()))
    peak = max(document["multiply_add_gflops"] for document in documents.values())
    reads = max(document["read_gbytes_per_s"] for document in documents.values())
    blas = f" Unfused multiplies with {first['blas']}." if "blas" in first else ""
    yield (f"## {first['device']}, {first['isa']}, {first['threads']} threads, {folder.name[-10:]}\n\n"
           f"Peak {peak:.0f} GFLOP/s, reads {reads:.1f} GB/s: the most that any of these runs measured, and what all shares "
           f"are of.{blas}")
    for suite, document in documents.items():
        yield f"### {suite}"
        if "warning" in document:
            yield f"Beware: {document['warning']}."
        if document["multiply_add_gflops"] < 0.95 * peak:
            yield (f"This suite's own peak was {document['multiply_add_gflops']:.0f} GFLOP/s: cores were shared while it ran, and its "
                   "shares and times are to be read with that.")
        chart = folder / f"{suite}.svg"
        if chart.exists():
            yield f"![{suite}](../{chart})"
        yield routing_text(document) if "routing" in document else suite_table(document, peak, reads)


def main():
    parts = [INTRODUCTION.strip()]
    for folder in sorted(Path("bench/results").iterdir()):
        if folder.is_dir():
            parts += section(folder)
    Path("docs/benchmarks.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
