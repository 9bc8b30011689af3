"""Trains a small transformer with Widehead's attention and with PyTorch's: the same losses.

    pip install . torch
    python examples/train_small.py --device cuda
    python examples/train_small.py --device cpu --width 256 --dim 64 --tokens 1024

A model of bytes, made anew from one seed for each attention, learns the text of this repository's docs: the
same batches, AdamW, grouped queries; on a GPU in bfloat16, on a CPU in float32. The kernels of PyTorch's
`scaled_dot_product_attention` run one by one: as they round in other places, how far their losses part is
what Widehead's may be held to. Prints a table and writes what it measured as JSON and, with --chart, as SVG.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import widehead.torch

ROOT = Path(__file__).parents[1]
LEARNING_RATE = 1e-3
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def by_widehead(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return widehead.torch.sdpa(q, k, v, is_causal=True, enable_gqa=True)


def by_torch(backend: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return attention


# PyTorch's by name: the first one is what the others are compared with.
RIVALS = {"cuda": {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION},
          "cpu": {"PyTorch, flash": SDPBackend.FLASH_ATTENTION, "PyTorch, math": SDPBackend.MATH}}
COLORS = ("#d1762f", "#8c8c8c", "#2166ac")


class Layer(torch.nn.Module):
    def __init__(self, width: int, heads: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.before_attention, self.before_mlp = torch.nn.RMSNorm(width), torch.nn.RMSNorm(width)
        self.qkv = torch.nn.Linear(width, (heads[0] + 2 * heads[1]) * dim, bias=False)
        self.out = torch.nn.Linear(heads[0] * dim, width, bias=False)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        batch, length, _ = x.shape
        heads_q, heads_kv = self.heads
        all_heads = self.qkv(self.before_attention(x)).view(batch, length, -1, self.dim).transpose(1, 2)
        q, k, v = all_heads.split((heads_q, heads_kv, heads_kv), dim=1)
        seen = attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.out(seen)
        return x + self.mlp(self.before_mlp(x))


class Model(torch.nn.Module):
    def __init__(self, layers: int, width: int, heads: tuple[int, int], dim: int, length: int) -> None:
        super().__init__()
        self.bytes, self.places = torch.nn.Embedding(256, width), torch.nn.Embedding(length, width)
        self.layers = torch.nn.ModuleList(Layer(width, heads, dim) for _ in range(layers))
        self.head = torch.nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor, attention: Attention) -> torch.Tensor:
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, attention)
        return self.head(F.rms_norm(x, x.shape[-1:]))


def text_of_docs() -> torch.Tensor:
    pages = sorted((ROOT / "docs").glob("*.md"))
    return torch.frombuffer(bytearray(b"".join(page.read_bytes() for page in pages)), dtype=torch.uint8)


def train(attention: Attention, options: argparse.Namespace) -> dict:
    torch.manual_seed(1)
    device = options.device
    text = text_of_docs().to(device).long()
    heads = tuple(int(number) for number in options.heads.split("/"))
    model = Model(options.layers, options.width, heads, options.dim, options.tokens).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    starts = torch.randint(len(text) - options.tokens - 1, (options.steps, options.batch), generator=torch.Generator().manual_seed(2))
    losses, times = [], []
    for step in range(options.steps):
        pieces = torch.stack([text[start : start + options.tokens + 1] for start in starts[step].tolist()])
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            scores = model(pieces[:, :-1], attention)
            loss = F.cross_entropy(scores.float().flatten(0, 1), pieces[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the step
        times.append(time.perf_counter() - begin)
    return {"losses": losses, "step_ms": 1e3 * statistics.median(times[2:])}


def draw(rows: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "widehead"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    first = next(iter(rows))
    for color, (name, row) in zip(COLORS, rows.items(), strict=False):
        left.plot(row["losses"], label=name, color=color)
        if name != first:
            right.semilogy(differences(row, rows[first]), label=f"{name} from {first}", color=color)
    left.set(xlabel="step", ylabel="loss, nats a byte")
    right.set(xlabel="step", ylabel="difference of the losses")
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def differences(row: dict, other: dict) -> list[float]:
    return [abs(a - b) for a, b in zip(row["losses"], other["losses"], strict=True)]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=tuple(RIVALS), default="cuda")
    flags.add_argument("--steps", type=int, default=50)
    flags.add_argument("--layers", type=int, default=4)
    flags.add_argument("--width", type=int, default=1024)
    flags.add_argument("--heads", default="8/4", help="of queries, and of keys and values")
    flags.add_argument("--dim", type=int, default=128)
    flags.add_argument("--batch", type=int, default=2)
    flags.add_argument("--tokens", type=int, default=4096)
    flags.add_argument("--out", type=Path, default=Path("train-small.json"))
    flags.add_argument("--chart", type=Path)
    options = flags.parse_args()
    attentions = {name: by_torch(backend) for name, backend in RIVALS[options.device].items()}
    attentions["Widehead"] = by_widehead
    rows, refused = {}, {}
    for name, attention in attentions.items():
        try:
            rows[name] = train(attention, options)
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "chart")}
    document = {"machine": machine, "torch": torch.__version__, **settings, "rows": rows, "refused": refused}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    first = next(iter(rows.values()))
    print("| attention | first loss | last loss | largest difference | ms a step |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['losses'][0]:.4f} | {row['losses'][-1]:.4f} | {max(differences(row, first)):.1e} | {row['step_ms']:.1f} |")
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    if options.chart is not None:
        draw(rows, options.chart)


if __name__ == "__main__":
    main()
