"""Makes docs/mlx-scenario.md and its charts of what mlx_long_prompt.py and bench/mlx_attention.py wrote.

    python examples/mlx_long_prompt_report.py bench/results/*-mlx-*.json --folder docs

Every sentence with a number in it is made of the documents' numbers.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from long_prompt_report import TITLES, table

COLORS = {"mlx": "#d1762f", "widehead": "#2166ac", "none": "#8c8c8c"}
LABELS = {"mlx": "MLX's attention", "widehead": "Widehead", "none": "no attention"}

HEAD = """# MLX: a real model with a long prompt

mlx-lm's own loop (`mlx_lm.generate.generate_step`) fed in chunks of 2048 tokens, then greedy decoding, with
`mx.fast.scaled_dot_product_attention` as it is and after `widehead.mlx.install()`. Each measurement is a process of its own.

*x* is Widehead's rate over MLX's. *if free* is what it would be if attention took no time: the rate of the same model with
`q * 0` in attention's place, over MLX's. *attention* is the share of MLX's time that this saves. *CPU s* are the processor seconds of
the prefill, of all threads, which other work on the machine changes least. *peak* is the most memory that MLX held from the prefill to
the last token, weights included; resident memory, which counts Widehead's workspace too, stands behind it.
The *loss* is the mean negative log-likelihood of the prompt's last 1,024 tokens, of a run of its own. This page is made by
`examples/mlx_long_prompt_report.py` of the documents in `bench/results`.
"""

# Set before anything was measured, for Gemma 3 270M in float32 on a CPU.
PREFILL_GOALS = {8192: 2.3, 16384: 2.8}


def slug_of(document: dict) -> str:
    parts = (document["model"], document["dtype"], document["machine"]["device"])
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower())


class Scenario:
    def __init__(self, document: dict) -> None:
        self.document = document
        timed = [row for row in document["rows"] if "loss" not in row]
        self.lengths = sorted({row["length"] for row in timed if not row.get("cached")})
        self.last_chunks = sorted({row["length"] for row in timed if row.get("cached")})
        self._rows: dict[tuple, dict] = {}
        self._losses: dict[tuple, float] = {}
        for row in document["rows"]:
            key = row["implementation"], row["length"]
            if "loss" in row:
                self._losses[key] = row["loss"]
            else:
                self._rows[*key, bool(row.get("cached"))] = row

    def row(self, implementation: str, length: int, is_last: bool = False) -> dict | None:
        return self._rows.get((implementation, length, is_last))

    def cell(self, implementation: str, length: int, key: str, text: str = "{:.0f}") -> str:
        row = self.row(implementation, length)
        if row is None:
            return "not run"
        if "failure" in row:
            return row["failure"]
        return "-" if row.get(key) is None else text.format(row[key])

    def ratio(self, over: str, length: int, key: str, is_last: bool = False) -> float | None:
        """`over`'s rate over MLX's own."""
        rows = [self.row(name, length, is_last) for name in (over, "mlx")]
        if any(row is None or row.get(key) is None for row in rows):
            return None
        return rows[0][key] / rows[1][key]

    def ratio_cell(self, over: str, length: int, key: str, is_last: bool = False) -> str:
        ratio = self.ratio(over, length, key, is_last)
        return "-" if ratio is None else f"{ratio:.2f}"

    def share_cell(self, length: int) -> str:
        ratio = self.ratio("none", length, "prefill_tokens_per_s")
        return "-" if ratio is None else f"{1 - 1 / ratio:.0%}"

    def loss_cell(self, implementation: str, length: int) -> str:
        loss = self._losses.get((implementation, length))
        return "-" if loss is None else f"{loss:.5f}"

    def gigabytes_cell(self, implementation: str, length: int) -> str:
        row = self.row(implementation, length)
        if row is None or "failure" in row:
            return "-"
        resident = row["resident_peak_bytes"]
        text = f"{row['mlx_peak_bytes'] / 1e9:.2f}"
        return text if resident is None else f"{text} ({resident / 1e9:.2f})"

    def prefill_table(self) -> str:
        key = "prefill_tokens_per_s"
        heads = ["tokens", "MLX, tokens/s", "Widehead, tokens/s", "x", "if free", "attention",
                 "MLX, CPU s", "Widehead, CPU s", "none, CPU s", "MLX, peak GB", "Widehead, peak GB", "loss MLX", "loss Widehead"]  # fmt: skip
        rows = [
            [str(n), self.cell("mlx", n, key), self.cell("widehead", n, key),
             self.ratio_cell("widehead", n, key), self.ratio_cell("none", n, key),
             self.share_cell(n),
             *(self.cell(name, n, "prefill_cpu_s") for name in COLORS), self.gigabytes_cell("mlx", n), self.gigabytes_cell("widehead", n),
             self.loss_cell("mlx", n), self.loss_cell("widehead", n)]
            for n in self.lengths
        ]  # fmt: skip
        return table(heads, rows)

    def decode_table(self) -> str:
        key = "decode_tokens_per_s"
        heads = ["tokens in the cache", "MLX, tokens/s", "Widehead, tokens/s", "x", "if free",
                 "same tokens"]  # fmt: skip
        rows = [
            [str(n), self.cell("mlx", n, key, "{:.1f}"), self.cell("widehead", n, key, "{:.1f}"),
             self.ratio_cell("widehead", n, key), self.ratio_cell("none", n, key), self.same_cell(n)]
            for n in self.lengths
        ]  # fmt: skip
        return table(heads, rows)

    def last_chunk_table(self) -> str:
        """MLX is slow enough that a long prompt's last chunk may be all that was measured of it."""
        heads = ["tokens", "of them cached before", "", "tokens/s", "x", "CPU s", "peak GB", "same tokens"]
        key, rows = "prefill_tokens_per_s", []
        for length in self.last_chunks:
            for name, label in LABELS.items():
                row = self.row(name, length, True)
                if row is None:
                    continue
                found = [row["failure"]] * 5 if "failure" in row else [
                    f"{row[key]:.0f}", self.ratio_cell(name, length, key, True), f"{row['prefill_cpu_s']:.1f}",
                    f"{row['mlx_peak_bytes'] / 1e9:.2f}",
                    self.same_cell(length, True) if name == "widehead" else "",
                ]  # fmt: skip
                rows.append([str(length), str(row["cached"]), label, *found])
        return table(heads, rows)

    def same_cell(self, length: int, is_last: bool = False) -> str:
        rows = [self.row(name, length, is_last) for name in ("widehead", "mlx")]
        if any(row is None or "failure" in row for row in rows):
            return "-"
        ours, theirs = (row["tokens"] for row in rows)
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
        return f"{same} of {len(ours)}"

    def goals(self) -> str:
        if self.document["model"] != "gemma-3-270m" or self.document["dtype"] != "float32":
            return ""
        rows = []
        for length, least in PREFILL_GOALS.items():
            ratio = self.ratio("widehead", length, "prefill_tokens_per_s")
            free = self.ratio("none", length, "prefill_tokens_per_s")
            if ratio is None:
                continue
            text = f"{ratio:.2f}" if ratio >= least else f"**{ratio:.2f}**"
            note = "" if ratio >= least or free is None else f"free attention would give {free:.2f}"
            rows.append([f"prefill of {length}", f"{least} x", text, note])
        for length in self.lengths:
            ratio = self.ratio("widehead", length, "decode_tokens_per_s")
            if ratio is None:
                continue
            text = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
            free = self.ratio("none", length, "decode_tokens_per_s")
            note = "" if ratio >= 1 or free is None else f"free attention would give {free:.2f}"
            rows.append([f"decode behind {length}", "1 x", text, note])
        if not rows:
            return ""
        return (
            "Set before anything was measured; what was missed is bold.\n\n"
            + table(["goal", "at least", "measured", ""], rows)
        )

    def draw(self, key: str, label: str, scale: float, path: Path) -> None:
        figure, axes = plt.subplots(figsize=(7, 4))
        for name in COLORS:
            rows = [self.row(name, length) for length in self.lengths]
            points = [(r["length"], r[key] * scale) for r in rows if r and r.get(key)]
            if points and not (key.endswith("bytes") and name == "none"):
                axes.plot(*zip(*points), marker="o", color=COLORS[name], label=LABELS[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.lengths, [f"{length // 1024}K" for length in self.lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)

    def text(self, folder: Path) -> str:
        document, machine = self.document, self.document["machine"]
        name = f"mlx-scenario-{slug_of(document)}"
        layers = next(row["layers"] for row in document["rows"] if "layers" in row)
        facts = [f"{machine['cores']} cores ({machine['isa']})"] if machine.get("isa") else []
        facts += [f"MLX {machine['mlx']}, mlx-lm {machine['mlx_lm']}, Python {machine['python']}"]
        facts += [f"BLAS: {machine['blas']}"] if machine.get("isa") else []
        charts = ""
        if len(self.lengths) > 1:
            self.draw("prefill_tokens_per_s", "prefill, tokens/s", 1, folder / f"{name}-prefill.svg")
            self.draw("mlx_peak_bytes", "MLX's peak memory, GB", 1e-9, folder / f"{name}-memory.svg")
            charts = (
                f"![prefill rate over prompt length]({name}-prefill.svg)\n\n"
                f"![peak memory over prompt length]({name}-memory.svg)"
            )
        parts = [
            f"## {TITLES[document['model']]}, {document['dtype']}: {machine['device']}",
            f"{layers} layers, chunks of {document['chunk']}. {', '.join(facts)}. {document['date']}.",
            f"```\n{document['command']}\n```",
            charts, "### Prefill", self.prefill_table(), "### Decode behind the prompt",
            self.decode_table(),
        ]  # fmt: skip
        if self.last_chunks:
            parts += ["### The last chunk of a longer prompt", self.last_chunk_table()]
        parts += [self.goals(), document.get("note", "")]  # fmt: skip
        return "\n\n".join(part for part in parts if part)


def milliseconds(found: dict) -> str:
    return found["failure"] if "failure" in found else f"{found['us'] / 1e3:.3f}"


def megabytes(found: dict) -> str:
    return "-" if "failure" in found else f"{found['peak_bytes'] / 1e6:.1f}"


def calls_text(document: dict) -> str:
    """bench/mlx_attention.py's rows: the operation alone."""
    heads = ["model", "heads", "dim", "queries x keys", "kernel", "MLX, ms", "Widehead, ms", "x",
             "Widehead, TFLOP/s", "MLX, MB", "Widehead, MB", "error MLX", "error Widehead"]  # fmt: skip
    rows = []
    for row in document["rows"]:
        own, ours = row["mlx"], row["widehead"]
        failed = "failure" in own or "failure" in ours
        rows.append([
            row["model"], row["heads"], str(row["dim"]), f"{row['len_q']} x {row['len_k']}",
            str(row["kernel"]), milliseconds(own), milliseconds(ours),
            "-" if failed else f"{own['us'] / ours['us']:.1f}",
            "-" if "failure" in ours else f"{row['flop'] / ours['us'] / 1e6:.3g}",
            megabytes(own), megabytes(ours),
            *("-" if "failure" in each else f"{each['error']:.1e}" for each in (own, ours)),
        ])  # fmt: skip
    machine = document["machine"]
    where = f"driver {machine['driver']}, CUDA graphs {machine['mlx_use_cuda_graphs']}"
    if machine["driver"] is None:
        where = f"preloaded: {machine['preloaded'] or 'nothing'}"
    fused = sum(row["mlx_has_fused"] for row in document["rows"])
    return "\n\n".join([
        f"## The operation alone, {document['dtype']}: {machine['device']}",
        f"MLX {machine['mlx']}, {where}. {document['date']}. "
        "Each call's answer is the next one's query; memory beyond the inputs, the answer included; error: relative RMS of six "
        f"rows against float64. MLX has a fused kernel for {fused} of these {len(document['rows'])}, by its own "
        "`force_fused=True`.",
        f"```\n{document['command']}\n```",
        table(heads, rows),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    texts = [HEAD]
    documents = [json.loads(path.read_text()) for path in arguments.documents]
    for document in sorted(documents, key=lambda document: "model" not in document):
        if "model" in document:
            texts.append(Scenario(document).text(arguments.folder))
        else:
            texts.append(calls_text(document))
    page = "\n".join(text.strip() + "\n" for text in texts)
    (arguments.folder / "mlx-scenario.md").write_text(page)


if __name__ == "__main__":
    main()
