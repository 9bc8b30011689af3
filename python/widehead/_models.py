"""The table of models' attention shapes, the same that the command line reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Layer:
    """A kind of attention layer. ``window`` is (left, right) in keys; ``scale`` None: by dim_qk.

    Of ``count`` layers ``cached`` keep a cache of their own. Latent layers are there twice, with the
    ``phase`` "prefill" (expanded) and "decode" (absorbed), and cache what the second reads.
    """

    kind: str
    count: int
    cached: int
    phase: str | None
    heads_q: int
    heads_kv: int
    dim_qk: int
    dim_v: int
    window: tuple[int, int] | None
    softcap: float | None
    scale: float | None
    sinks: bool


@dataclass(frozen=True)
class Model:
    """A model's kinds of layers, and where the shapes come from."""

    name: str
    source: str
    linear_layers: int  # without attention
    layers: tuple[Layer, ...]


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.replace(",", "/").partition("/")
    return int(first), int(second or first)


def _layer(row: dict[str, str | float | bool]) -> Layer:
    heads_q, heads_kv = _pair(str(row["heads"]))
    dim_qk, dim_v = _pair(str(row["dim"]))
    return Layer(
        kind=str(row["kind"]),
        count=int(row["count"]),
        cached=int(row.get("cached", row["count"])),
        phase=str(row["phase"]) if "phase" in row else None,
        heads_q=heads_q,
        heads_kv=heads_kv,
        dim_qk=dim_qk,
        dim_v=dim_v,
        window=_pair(str(row["window"])) if "window" in row else None,
        softcap=float(row["softcap"]) if "softcap" in row else None,
        scale=float(row["scale"]) if "scale" in row else None,
        sinks=bool(row.get("sinks", False)),
    )


@cache
def models() -> dict[str, Model]:
    """Attention shapes of known models by name.

    >>> gemma = widehead.models()["gemma-4-31b"]
    >>> [(layer.heads_q, layer.dim_qk) for layer in gemma.layers]
    [(32, 512), (32, 256)]
    """
    table = json.loads((Path(__file__).parent / "models.json").read_text())
    return {
        name: Model(
            name,
            row["source"],
            row.get("linear_layers", 0),
            tuple(_layer(layer) for layer in row["layers"]),
        )
        for name, row in table.items()
        if not name.startswith("_")
    }
