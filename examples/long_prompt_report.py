"""Makes docs/real-scenario.md and its charts of what gemma3_long_prompt.py wrote.

    python examples/long_prompt_report.py real-scenario.json [more.json ...] --folder docs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLORS = {"eager": "#8c8c8c", "sdpa": "#d1762f", "widehead": "#2166ac"}
IMPLEMENTATIONS = tuple(COLORS)

TEXT = """# A real model with a long prompt

{model} over a real text, through transformers {transformers} with `attn_implementation` set to each of its names and nothing else changed:
{prefill_note}
Each measurement is a process of its own. `eager` is transformers' own matmul, softmax, matmul; `sdpa` is PyTorch's
`scaled_dot_product_attention`, which gets every window as an L x L mask.

{device}, {cores} cores ({isa}), PyTorch {torch}, transformers {transformers}, Python {python}, float32.

```
{commands}
```

![prefill rate over prompt length](real-scenario-prefill.svg)

## Prefill in one piece

{whole}

## Prefill in chunks of 2048 tokens

{chunked}

`x sdpa` is Widehead's rate over sdpa's. *attention* is the share of the time spent in attention and in making its masks. *peak* is the
process's largest resident memory from the prefill to the last of 64 decoded tokens, weights included, and with it what glibc's allocator
keeps of what was freed, which varies by 0.2 GB with the order of allocations: with `MALLOC_MMAP_THRESHOLD_=1000000` the two differ by less
than 1 % at 8K in chunks. The *loss* is the mean negative log-likelihood of the prompt's last 1,024 tokens: it must agree.

![peak memory over prompt length](real-scenario-memory.svg)

## Decode: 64 tokens behind the prompt

{decode}

At decode the model's weights bound the rate (1.1 GB a token in float32); attention is a tenth of it.
"""


def row_of(rows, implementation, length, chunk):
    for row in rows:
        if (row["implementation"], row["length"], row["chunk"]) == (implementation, length, chunk):
            return row
    return None


def cell(row, key, text) -> str:
    if row is None:
        return "not run"
    return row["failure"] if "failure" in row else text(row[key])


def ratio(rows, key, length, chunk) -> str:
    ours, theirs = (row_of(rows, name, length, chunk) for name in ("widehead", "sdpa"))
    if ours is None or theirs is None or "failure" in ours or "failure" in theirs:
        return "-"
    return f"{ours[key] / theirs[key]:.2f}"


def gigabytes(value) -> str:
    return f"{value / 1e9:.2f}"


def prefill_table(rows, lengths, is_chunked) -> str:
    lines = [
        "| tokens | " + " | ".join(f"{name}, tokens/s" for name in IMPLEMENTATIONS) + " | x sdpa | "
        + " | ".join(f"{name}, attention" for name in IMPLEMENTATIONS[1:]) + " | "
        + " | ".join(f"{name}, peak GB" for name in IMPLEMENTATIONS) + " | loss sdpa | loss widehead |",
        "|---" * (8 + 2 * len(IMPLEMENTATIONS) - 1) + "|",
    ]
    for length in lengths:
        chunk = 2048 if is_chunked else 0
        found = {name: row_of(rows, name, length, chunk) for name in IMPLEMENTATIONS}
        if all(row is None for row in found.values()):
            continue
        cells = [f"{length}"]
        cells += [cell(found[n], "prefill_tokens_per_s", lambda x: f"{x:.0f}") for n in found]
        cells.append(ratio(rows, "prefill_tokens_per_s", length, chunk))
        for name in IMPLEMENTATIONS[1:]:
            cells.append(cell(found[name], "prefill_attention_share", lambda x: f"{100 * x:.0f} %"))
        cells += [cell(found[n], "peak_bytes", gigabytes) for n in found]
        for name in IMPLEMENTATIONS[1:]:
            cells.append(cell(found[name], "loss", lambda x: f"{x:.5f}"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decode_table(rows, lengths) -> str:
    lines = [
        "| tokens in the cache | " + " | ".join(f"{name}, tokens/s" for name in IMPLEMENTATIONS)
        + " | x sdpa | " + " | ".join(f"{name}, attention" for name in IMPLEMENTATIONS[1:]) + " |",
        "|---" * (2 + len(IMPLEMENTATIONS) + 2) + "|",
    ]
    for length in lengths:
        chunk = 2048 if row_of(rows, "widehead", length, 2048) else 0
        found = {name: row_of(rows, name, length, chunk) for name in IMPLEMENTATIONS}
        cells = [f"{length}"]
        cells += [cell(found[n], "decode_tokens_per_s", lambda x: f"{x:.1f}") for n in found]
        cells.append(ratio(rows, "decode_tokens_per_s", length, chunk))
        for name in IMPLEMENTATIONS[1:]:
            cells.append(cell(found[name], "decode_attention_share", lambda x: f"{100 * x:.0f} %"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows, lengths, key, label, scale, path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in IMPLEMENTATIONS:
        for chunk, style in ((0, "-"), (2048, "--")):
            found = [row_of(rows, name, length, chunk) for length in lengths]
            points = [(r["length"], r[key] * scale) for r in found if r and "failure" not in r]
            if points:
                axes.plot(*zip(*points), style, marker="o", color=COLORS[name],
                          label=f"{name}, {'chunks of 2048' if chunk else 'one piece'}")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="+")
    parser.add_argument("--folder", default="docs")
    arguments = parser.parse_args()
    documents = [json.loads(Path(path).read_text()) for path in arguments.documents]
    documents.sort(key=lambda document: -len(document["rows"]))
    rows = [row for document in documents for row in document["rows"]]
    lengths = sorted({row["length"] for row in rows})
    folder = Path(arguments.folder)
    draw(rows, lengths, "prefill_tokens_per_s", "prefill, tokens/s", 1,
         folder / "real-scenario-prefill.svg")  # fmt: skip
    draw(rows, lengths, "peak_bytes", "peak resident memory, GB", 1e-9,
         folder / "real-scenario-memory.svg")  # fmt: skip
    text = TEXT.format(
        **documents[0]["machine"],
        model="Gemma 3 270M",
        prefill_note="a prefill of 2K to 32K tokens, whole and in chunks, then 64 decoded tokens.",
        commands="\n".join(document["command"] for document in documents),
        whole=prefill_table(rows, lengths, False),
        chunked=prefill_table(rows, lengths, True),
        decode=decode_table(rows, lengths),
    )
    (folder / "real-scenario.md").write_text(text)


if __name__ == "__main__":
    main()
