"""Makes docs/benchmarks.md of the folders that tools/bench_cpu writes.

    python3 bench/report.py bench/results/CPU-DATE [...]
"""

import json
import statistics
import sys
from pathlib import Path

INTRODUCTION = """# Benchmarks

`tools/bench_cpu` times every CPU suite beside the unfused path (any CBLAS, head by head, a vectorised softmax) and writes JSON and
charts; `python3 bench/report.py FOLDER` makes this page of them. Times are the best of samples that a probe of the multiply-add rate and
the count of preemptions found undisturbed. *Peak* is the multiply-add rate of all cores in f32 and *reads* the rate at which they
read memory, both measured in the same run; GFLOP/s count visible query-key pairs only.
`python3 bench/peers/compare.py cpu-prefill cpu-decode` puts other libraries beside it.
GPU results are tables of their own in [bench/results](../bench/results).
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


def suite_table(document):
    lines = ["| problem | chosen | ms | GFLOP/s | of peak | GB/s | of reads | unfused ms | speed-up | workspace | "
             "unfused's | 16384 would choose |", "|---" * 12 + "|"]
    for name, kernels in problems(document["rows"]):
        chosen = next((row for row in kernels.values() if row["chosen"]), None)
        if chosen is None or "refused" in chosen:
            reason = "nothing" if chosen is None else chosen["refused"]
            lines.append(f"| {name} | {reason} |" + " |" * 10)
            continue
        unfused = kernels.get("cpu_unfused", {})
        time = "-" if chosen is unfused else milliseconds(unfused["best_us"]) if "best_us" in unfused \
            else unfused.get("refused", "-")
        speed_up = f"{unfused['best_us'] / chosen['best_us']:.2f}" if "best_us" in unfused else "-"
        lines.append(
            f"| {name} | {chosen['kernel']} | {milliseconds(chosen['best_us'])} | {chosen['gflops']:.0f} | "
            f"{100 * chosen['peak_share']:.0f} % | {chosen['kv_gbytes_per_s']:.1f} | "
            f"{100 * chosen['read_share']:.0f} % | {time} | {speed_up} | "
            f"{gibibytes(chosen['workspace_bytes'])} | {gibibytes(unfused.get('workspace_bytes', 0))} | "
            f"{chosen['threshold_would_choose']} |")
    return "\n".join(lines)


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
    date = folder.name[-10:]
    yield (f"## {first['device']}, {first['isa']}, {first['threads']} threads, {date}\n\n"
           f"Peak {first['multiply_add_gflops']:.0f} GFLOP/s, reads {first['read_gbytes_per_s']:.1f} GB/s.")
    for suite, document in documents.items():
        yield f"### {suite}"
        if suite == "routing":
            yield routing_text(document)
            continue
        chart = folder / f"{suite}.svg"
        if chart.exists():
            yield f"![{suite}](../{chart})"
        yield suite_table(document)


def main():
    parts = [INTRODUCTION.strip()]
    for folder in sys.argv[1:]:
        parts += section(Path(folder))
    text = "\n\n".join(parts) + "\n"
    Path("docs/benchmarks.md").write_text(text)


if __name__ == "__main__":
    main()
