"""Makes docs/real-scenario.md and its charts of what gemma3_long_prompt.py wrote.

    python examples/long_prompt_report.py bench/results/*-long-prompt*.json --folder docs

A section for each model, type and machine; documents that share all three make one. Every sentence
with a number in it is made of the documents' numbers.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLORS = {"eager": "#8c8c8c", "sdpa": "#d1762f", "widehead": "#2166ac"}
IMPLEMENTATIONS = tuple(COLORS)
TITLES = {
    "gemma-3-270m": "Gemma 3 270M",
    "qwen3.5-27b": "Qwen3.5-27B, random weights",
    "gemma-4-31b": "Gemma 4 31B, random weights",
}
# The rest of the model is the same work beside sdpa and Widehead; further apart than this, the page
# says so.
REST_TOLERANCE = 1.25

HEAD = """# A real model with a long prompt

A model through transformers with `attn_implementation` set to each of its names and nothing else
changed: a prefill, whole or in chunks, then 64 decoded tokens. Each measurement is a process of its
own; with `--repeats` the implementations take turns and each phase's fastest run counts, because
processes that run minutes apart on a machine that others use too may differ by more than attention
does. `eager` is transformers' own matmul, softmax, matmul; `sdpa` is PyTorch's
`scaled_dot_product_attention`, which gets every window as an L x L mask.

*x sdpa* is Widehead's rate over sdpa's. *attention* and *rest* split the time of a token: attention
with the making of its masks, and everything else, which is the same work for every implementation.
*if free* is what *x sdpa* would be if Widehead's attention took no time at all. *peak* is the most
memory from the prefill to the last decoded token, weights included: resident memory on a CPU, and
all that is taken on the device on a GPU, by PyTorch's allocator or not. The *loss* is the mean
negative log-likelihood of the prompt's last 1,024 tokens: it must agree. This page is made by
`examples/long_prompt_report.py` of the documents in `bench/results`.
"""


@dataclass(frozen=True)
class Goal:
    """A ratio that was set before anything was measured, on the CPU with Gemma 3 270M."""

    text: str
    length: int
    is_chunked: bool
    key: str
    least: float


GOALS = (
    Goal("prefill of 8K whole", 8192, False, "prefill", 2.5),
    Goal("prefill of 32K whole", 32768, False, "prefill", 5.0),
    Goal("prefill of 8K in chunks", 8192, True, "prefill", 1.5),
    Goal("prefill of 32K in chunks", 32768, True, "prefill", 2.5),
    *(Goal(f"decode behind {n // 1024}K", n, n > 2048, "decode", 1.0)
      for n in (2048, 8192, 16384, 32768)),
)  # fmt: skip
STEADY_SHARE = 0.6  # of the rate at 2K that is left at 32K


class Section:
    """The documents of one model, type and machine."""

    def __init__(self, documents: list[dict]) -> None:
        documents = sorted(documents, key=lambda document: -len(document["rows"]))
        self.documents = documents
        self.machine = documents[0]["machine"]
        self.model = documents[0]["model"]
        self.dtype = dtype_of(documents[0])
        self.rows = [row for document in documents for row in document["rows"]]
        self.lengths = sorted({row["length"] for row in self.rows})
        self.chunk = max(row["chunk"] for row in self.rows)  # 0 where none was chunked
        layers = {row["layers"] for row in self.rows if "layers" in row}
        if len(layers) > 1:
            raise SystemExit(f"{self.model}: rows of {sorted(layers)} layers cannot be compared")
        self.layers = layers.pop()
        self.slug = re.sub(r"[^a-z0-9]+", "-", f"{self.model} {self.machine['device']}".lower())

    def row(self, implementation: str, length: int, chunk: int) -> dict | None:
        key = (implementation, length, chunk)
        for row in self.rows:
            if (row["implementation"], row["length"], row["chunk"]) == key:
                return row
        return None

    def pair(self, length: int, chunk: int) -> tuple[dict, dict] | None:
        """(Widehead's, sdpa's), where both ran to their end."""
        ours, theirs = (self.row(name, length, chunk) for name in ("widehead", "sdpa"))
        if ours is None or theirs is None or "failure" in ours or "failure" in theirs:
            return None
        return ours, theirs

    def decode_chunk(self, length: int) -> int:
        return self.chunk if self.row("widehead", length, self.chunk) else 0


def dtype_of(document: dict) -> str:
    # The first documents did not say.
    return document.get("dtype", "float32" if document["model"] == "gemma-3-270m" else "bfloat16")


@dataclass(frozen=True)
class Time:
    """Milliseconds a token."""

    attention: float
    rest: float

    @property
    def whole(self) -> float:
        return self.attention + self.rest


def time_of(row: dict, phase: str) -> Time:
    whole = 1e3 / row[f"{phase}_tokens_per_s"]
    attention = whole * row[f"{phase}_attention_share"]
    return Time(attention, whole - attention)


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cell(row: dict | None, text) -> str:
    if row is None:
        return "not run"
    return row["failure"] if "failure" in row else text(row)


def loss_text(row: dict) -> str:
    return "-" if row["loss"] is None else f"{row['loss']:.5f}"


def times_cells(found: dict[str, dict | None], phase: str, digits: int) -> list[str]:
    """Milliseconds a token of sdpa's and Widehead's attention, then of both their rests."""
    pair = [found["sdpa"], found["widehead"]]
    attention = [cell(r, lambda r: f"{time_of(r, phase).attention:.{digits}f}") for r in pair]
    return attention + [cell(r, lambda r: f"{time_of(r, phase).rest:.{digits}f}") for r in pair]


def ratio_cells(pair: tuple[dict, dict] | None, phase: str) -> list[str]:
    if pair is None:
        return ["-", "-"]
    ours, theirs = (time_of(row, phase) for row in pair)
    return [f"{theirs.whole / ours.whole:.2f}", f"{theirs.whole / ours.rest:.2f}"]


TIME_HEADS = ["sdpa attention, ms", "ours", "sdpa rest, ms", "ours"]


def prefill_table(section: Section, chunk: int) -> str:
    heads = ["tokens", "layers", *(f"{name}, tokens/s" for name in IMPLEMENTATIONS), "x sdpa"]
    heads += ["if free", *TIME_HEADS, *(f"{name}, peak GB" for name in IMPLEMENTATIONS)]
    heads += ["loss sdpa", "loss widehead"]
    rows = []
    for length in section.lengths:
        found = {name: section.row(name, length, chunk) for name in IMPLEMENTATIONS}
        if all(row is None for row in found.values()):
            continue
        cells = [str(length), str(section.layers)]
        cells += [cell(row, lambda r: f"{r['prefill_tokens_per_s']:.0f}") for row in found.values()]
        cells += ratio_cells(section.pair(length, chunk), "prefill")
        cells += times_cells(found, "prefill", 3)
        cells += [cell(row, lambda r: f"{r['peak_bytes'] / 1e9:.2f}") for row in found.values()]
        rows.append(cells + [cell(found[name], loss_text) for name in ("sdpa", "widehead")])
    return table(heads, rows)


def decode_table(section: Section) -> str:
    heads = ["tokens in the cache", *(f"{name}, tokens/s" for name in IMPLEMENTATIONS)]
    heads += ["x sdpa", "if free", *TIME_HEADS]
    rows = []
    for length in section.lengths:
        chunk = section.decode_chunk(length)
        found = {name: section.row(name, length, chunk) for name in IMPLEMENTATIONS}
        cells = [str(length)]
        cells += [cell(row, lambda r: f"{r['decode_tokens_per_s']:.1f}") for row in found.values()]
        cells += ratio_cells(section.pair(length, chunk), "decode")
        rows.append(cells + times_cells(found, "decode", 1))
    return table(heads, rows)


def why_missed(ours: Time, theirs: Time, least: float) -> str:
    """Where the time of a missed goal goes."""
    text = (
        f"of {ours.whole:.3g} ms a token the rest of the model takes {ours.rest:.3g} and attention "
        f"{ours.attention:.3g} (sdpa: {theirs.rest:.3g} and {theirs.attention:.3g}), "
    )
    allowed = theirs.whole / least
    if ours.rest >= allowed:
        text += f"and the goal allows {allowed:.3g} for both: out of reach of any attention"
    else:
        text += f"and the goal allows attention {allowed - ours.rest:.3g}"
    if max(ours.rest, theirs.rest) > REST_TOLERANCE * min(ours.rest, theirs.rest):
        text += "; the rest is the same work and took unlike times: not attention's doing"
    return text


def goals_table(section: Section) -> str:
    rows = []
    for goal in GOALS:
        pair = section.pair(goal.length, section.chunk if goal.is_chunked else 0)
        if pair is None:
            continue
        ours, theirs = (time_of(row, goal.key) for row in pair)
        ratio = theirs.whole / ours.whole
        is_met = ratio >= goal.least
        why = "" if is_met else why_missed(ours, theirs, goal.least)
        measured = f"{ratio:.2f}" if is_met else f"**{ratio:.2f}**"
        rows.append([goal.text, f"{goal.least} x sdpa", measured, why])
    first = section.row("widehead", 2048, 0)
    for chunk in (0, section.chunk):
        last = section.row("widehead", 32768, chunk)
        if first is None or last is None or "failure" in first or "failure" in last:
            continue
        begin, end = time_of(first, "prefill"), time_of(last, "prefill")
        share = begin.whole / end.whole
        is_met = share >= STEADY_SHARE
        why = "" if is_met else (
            f"attention grows from {begin.attention:.3g} to {end.attention:.3g} ms a token, the "
            f"rest from {begin.rest:.3g} to {end.rest:.3g}"
        )  # fmt: skip
        rows.append(
            [f"rate at 32K {'in chunks' if chunk else 'whole'}",
             f"{STEADY_SHARE:.0%} of that at 2K",
             f"{share:.0%}" if is_met else f"**{share:.0%}**", why]
        )  # fmt: skip
    return table(["goal", "at least", "measured", "where it goes"], rows)

# Seen on a Zen 5 with /proc/self/status after each chunk.
RESIDENT = (
    ". On a Zen 5, where it was looked for, that is memory that is free, which glibc's malloc keeps between blocks that are not: in "
    "chunks of 2048 over 6144 tokens the peaks were 2.14 (sdpa) and 2.23 GB, and `malloc_trim(0)` left 1.87 and 1.88; over 4096 they "
    "were 2.08 and 2.16 GB, and 2.03 and 2.04 with `MALLOC_MMAP_THRESHOLD_=2097152`, which hands every freed tensor back at once."
)


def memory_text(section: Section) -> str:
    """Where Widehead's peak is below sdpa's and where it is not."""
    below, above = [], []
    for length in section.lengths:
        for chunk in sorted({0, section.chunk}):
            pair = section.pair(length, chunk)
            if pair is None:
                continue
            ours, theirs = pair
            gigabytes = (theirs["peak_bytes"] - ours["peak_bytes"]) / 1e9
            name = f"{length}{' in chunks' if chunk else ' whole'}"
            (below if gigabytes > 0 else above).append(f"{name} by {abs(gigabytes):.2f} GB")
    parts = []
    if below:
        parts.append("Widehead's peak is below sdpa's at " + ", ".join(below) + ".")
    if above:
        parts.append(
            ("It is above at " if below else "Widehead's peak is above sdpa's at ")
            + ", ".join(above)
            + (RESIDENT if section.machine.get("isa") else "; these documents do not say what holds it.")
        )
    return " ".join(parts)


def disturbed_text(section: Section) -> str:
    """Rows whose ratio is not attention's alone."""
    names = []
    for length in section.lengths:
        runs = [("prefill", chunk) for chunk in sorted({0, section.chunk})]
        for phase, chunk in [*runs, ("decode", section.decode_chunk(length))]:
            pair = section.pair(length, chunk)
            if pair is None:
                continue
            ours, theirs = (time_of(row, phase).rest for row in pair)
            if max(ours, theirs) > REST_TOLERANCE * min(ours, theirs):
                way = {"prefill": " in chunks" if chunk else " whole", "decode": " decode"}[phase]
                names.append(f"{length}{way} ({theirs:.3g} and {ours:.3g} ms)")
    if not names:
        return ""
    return (
        "The rest of the model, which is the same work, took unlike times beside sdpa and Widehead "
        "at " + ", ".join(names) + ": the ratios there are not attention's alone."
    )  # fmt: skip


def draw(section: Section, key: str, label: str, scale: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in IMPLEMENTATIONS:
        for chunk, style in ((0, "-"), (section.chunk, "--")):
            found = [section.row(name, length, chunk) for length in section.lengths]
            points = [(r["length"], r[key] * scale) for r in found if r and "failure" not in r]
            if points:
                label_of_line = f"{name}, {f'chunks of {chunk}' if chunk else 'one piece'}"
                axes.plot(*zip(*points), style, marker="o", color=COLORS[name], label=label_of_line)
    axes.set_xscale("log", base=2)
    axes.set_xticks(section.lengths, [f"{length // 1024}K" for length in section.lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def section_text(section: Section, folder: Path) -> str:
    machine = section.machine
    prefill_chart = memory_chart = ""
    if len(section.lengths) > 1:  # one would be a lone dot
        prefill = f"real-scenario-{section.slug}-prefill.svg"
        memory = f"real-scenario-{section.slug}-memory.svg"
        draw(section, "prefill_tokens_per_s", "prefill, tokens/s", 1, folder / prefill)
        draw(section, "peak_bytes", "peak memory, GB", 1e-9, folder / memory)
        prefill_chart = f"![prefill rate over prompt length]({prefill})"
        memory_chart = f"![peak memory over prompt length]({memory})"
    facts = [f"{machine['cores']} cores ({machine['isa']})"] if machine.get("isa") else []
    versions = {"PyTorch": "torch", "transformers": "transformers", "Python": "python"}
    facts += [f"{name} {machine[key]}" for name, key in versions.items()]
    whole = section.documents[0].get("layers_of_model", section.layers)
    commands = "\n".join(document["command"].strip() for document in section.documents)
    parts = [
        f"## {TITLES.get(section.model, section.model)}, {section.dtype}: {machine['device']}",
        f"{section.layers} of {whole} layers. {', '.join(facts)}.",
        f"```\n{commands}\n```",
        prefill_chart,
    ]
    for chunk in sorted({row["chunk"] for row in section.rows}):
        way = f"in chunks of {chunk} tokens" if chunk else "in one piece"
        parts += [f"### Prefill {way}", prefill_table(section, chunk)]
    parts += [
        memory_text(section),
        memory_chart,
        "### Decode behind the prompt",
        decode_table(section),
        disturbed_text(section),
    ]
    if section.model == "gemma-3-270m" and "isa" in machine:
        parts += [
            "### Goals",
            "Set before anything was measured; what was missed is bold, with where its time goes.",
            goals_table(section),
        ]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="+")
    parser.add_argument("--folder", default="docs")
    arguments = parser.parse_args()
    groups: dict[tuple, list[dict]] = {}
    for path in arguments.documents:
        document = json.loads(Path(path).read_text())
        key = (document["model"], dtype_of(document), document["machine"]["device"])
        groups.setdefault(key, []).append(document)
    sections = [Section(documents) for documents in groups.values()]
    folder = Path(arguments.folder)
    texts = [HEAD, *(section_text(section, folder) for section in sections)]
    (folder / "real-scenario.md").write_text("\n".join(text.strip() + "\n" for text in texts))


if __name__ == "__main__":
    main()
