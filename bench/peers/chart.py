"""Draws what compare.py wrote: every library's time over Widehead's of the same type, problem by problem.

    pip install matplotlib
    python bench/peers/chart.py bench/results/NAME-peers-*.json --svg bench/results/NAME-peers.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLORS = {"torch": "#d1762f", "onnxruntime Attention": "#2f8f5b", "onnxruntime GroupQueryAttention": "#8bc34a", "mlx": "#8c6bb1",
          "onednn": "#2166ac", "ggml": "#c2185b", "unfused": "#8c8c8c"}
LABELS = {"torch": "PyTorch", "onnxruntime Attention": "ONNX Runtime", "onnxruntime GroupQueryAttention": "its GroupQueryAttention",
          "mlx": "MLX", "onednn": "oneDNN", "ggml": "ggml", "unfused": "OpenBLAS and a softmax"}
MARKERS = {"f32": "o", "bf16": "s", "f16": "D"}


def label_of(row):
    dims = f"{row['dim_qk']}" + (f"/{row['dim_v']}" if row["dim_v"] != row["dim_qk"] else "")
    causal = ", causal" if "causal" in row["features"] else ""
    return f"{row['heads_q']}/{row['heads_kv']} heads of {dims}\n{row['len_q']} x {row['len_k']}{causal}"


def points_of(row):
    """(library, type, its time over Widehead's), of several OpenBLAS cores the fastest."""
    best = {}
    for name, found in row["results"].items():
        library, _, kind = name.partition(",")[0].rpartition(" ")
        if library != "widehead" and "best_us" in found:
            ratio = found["best_us"] / row["results"][f"widehead {kind}"]["best_us"]
            best[library, kind] = min(ratio, best.get((library, kind), ratio))
    return [(*key, ratio) for key, ratio in best.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--svg", type=Path, required=True)
    options = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in options.documents]
    rows = [row for document in documents for row in document["rows"]]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.55 * len(rows)))
    seen = set()
    for y, row in enumerate(rows):
        for library, kind, ratio in points_of(row):
            axes.plot(ratio, y, MARKERS[kind], color=COLORS[library], markersize=6, alpha=0.85,
                      markerfacecolor=COLORS[library] if kind == "f32" else "none")
            seen.add((library, kind))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [label_of(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g} x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time over Widehead's with the same type; left of the line: faster than Widehead")
    axes.set_title(f"{documents[0]['device']}, {documents[0]['isa']}, {documents[0]['threads']} threads", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    for library, kind in sorted(seen, key=lambda one: (list(COLORS).index(one[0]), one[1] != "f32")):
        axes.plot([], [], MARKERS[kind], color=COLORS[library], label=f"{LABELS[library]}, {kind}",
                  markerfacecolor=COLORS[library] if kind == "f32" else "none")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(options.svg, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
