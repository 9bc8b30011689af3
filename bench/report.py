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
`python3 bench/peers/compare.py cpu-prefill cpu-decode` puts other libraries beside it.
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
    return "" if row["guarded"] else " ~"


def share(row, name):
    return f"{100 * row[name]:.0f} %" if name in row else "in cache"


def suite_table(document):
    has_plain = any("times_plain" in row for row in document["rows"])
    head = ["problem", "chosen", "ms", "GFLOP/s", "of peak", "GB/s", "of reads", "workspace"]
    head += ["x plain"] if has_plain else ["unfused ms", "speed-up", "unfused's workspace", "16384 would choose"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, kernels in problems(document["rows"]):
        chosen = next((row for row in kernels.values() if row["chosen"]), None)
        if chosen is None or "refused" in chosen:
            reason = "nothing" if chosen is None else chosen["refused"]
            lines.append(f"| {name} | {reason} |" + " |" * (len(head) - 2))
            continue
        cells = [name, chosen["kernel"], milliseconds(chosen["best_us"]) + undisturbed(chosen), f"{chosen['gflops']:.0f}",
                 share(chosen, "peak_share"), f"{chosen['kv_gbytes_per_s']:.1f}", share(chosen, "read_share"),
                 gibibytes(chosen["workspace_bytes"])]
        if has_plain:
            cells.append(f"{chosen['times_plain']:.2f}" if "times_plain" in chosen else "")
        else:
            cells += unfused_cells(chosen, next((row for row in kernels.values() if row["kernel"].endswith("_unfused")), None))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def unfused_cells(chosen, unfused):
    threshold = chosen["threshold_would_choose"]
    if unfused is None or unfused is chosen:
        return ["-", "-", "-", threshold]
    if "best_us" not in unfused:
        return [unfused["refused"], "-", gibibytes(unfused["workspace_bytes"]), threshold]
    return [milliseconds(unfused["best_us"]) + undisturbed(unfused), f"{unfused['best_us'] / chosen['best_us']:.2f}",
            gibibytes(unfused["workspace_bytes"]), threshold]


def routing_text(document):
    rows = document["routing"]
    regrets = sorted(row["regret"] for row in rows)
    errors = sorted(abs(row["estimated_us"] / row["measured_us"] - 1) for row in rows)
    text = (f"Regret (time of the chosen kernel over that of the fastest) over {len(rows)} problems: median "
            f"{statistics.median(regrets):.3f}, worst {regrets[-1]:.2f}. Estimates are off by "
            f"{100 * statistics.median(errors):.0f} % (median), {100 * errors[-1]:.0f} % (worst).")
    worst = [row for row in sorted(rows, key=lambda row: -row["regret"]) if row["regret"] > 1.02][:12]
    if not worst:
        return text
    lines = ["", "| problem | chosen | fastest | regret | estimated us | measured us |", "|---" * 6 + "|"]
    lines += [f"| {row['problem']} | {row['chosen']} | {row['fastest']} | {row['regret']:.2f} | "
              f"{row['estimated_us']:.1f} | {row['measured_us']:.1f} |" for row in worst]
    return text + "\n" + "\n".join(lines)


def section(folder):
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    first = next(iter(documents.values()))
    peak = max(document["multiply_add_gflops"] for document in documents.values())
    reads = max(document["read_gbytes_per_s"] for document in documents.values())
    yield (f"## {first['device']}, {first['isa']}, {first['threads']} threads, {folder.name[-10:]}\n\n"
           f"Peak {peak:.0f} GFLOP/s, reads {reads:.1f} GB/s.")
    for suite, document in documents.items():
        yield f"### {suite}"
        if document["multiply_add_gflops"] < 0.95 * peak:
            yield (f"This suite's own peak was {document['multiply_add_gflops']:.0f} GFLOP/s: cores were shared while it ran, and its "
                   "shares and times are to be read with that.")
        chart = folder / f"{suite}.svg"
        if chart.exists():
            yield f"![{suite}](../{chart})"
        yield routing_text(document) if suite.startswith("routing") and "routing" in document else suite_table(document)


def main():
    parts = [INTRODUCTION.strip()]
    for folder in sorted(Path("bench/results").iterdir()):
        if folder.is_dir() and any(folder.glob("*.json")):
            parts += section(folder)
    Path("docs/benchmarks.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
