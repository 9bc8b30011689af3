"""Times widehead.mlx.sdpa beside MLX's own attention at the shapes of real models, in one run.

    python3 bench/mlx_attention.py RESULT.json [--models qwen3.5-27b gemma-4-31b]
        [--lengths 8192 32768 131072] [--dtype bfloat16] [--seconds 300]

On MLX's default device. In float32 on a CPU, preload OpenBLAS (docs/mlx.md), or MLX's side says nothing.

For each shape a chunk of 2048 queries at the end of a prompt, and one query (decode). Calls
are chained, each one's answer the next one's query, so that none runs beside another; a sample is the
wall time of a chain over its calls, and the median of five is kept. Rows of both answers, chosen at
random, are compared with float64, and an answer that is off makes the script fail. What MLX cannot
do is written down in its words. The result is written after every row.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

import widehead
import widehead.mlx

CHUNK = 2048
SAMPLES = 5
# Relative RMS that the contract allows.
BOUNDS = {"float32": 4e-6, "bfloat16": 7e-3}
# Model, kind of layer: query heads, kv heads, dimension, window; as data/models.json has them.
SHAPES = {
    ("qwen3.5-27b", "full"): (24, 4, 256, None),
    ("gemma-4-31b", "global"): (32, 4, 512, None),
    ("gemma-4-31b", "sliding"): (32, 16, 256, 1024),
    ("gemma-3-270m", "global"): (4, 1, 256, None),
    ("gemma-3-270m", "sliding"): (4, 1, 256, 512),
}


def tensors(heads_q, heads_kv, dim, len_q, len_k, dtype):
    """As caches hold them: slices of buffers with room for 256 more."""
    keys = [mx.random.normal((1, heads_kv, len_k + 256, dim)).astype(dtype) for _ in "kv"]
    q = mx.random.normal((1, heads_q, len_q, dim)).astype(dtype)
    mx.eval(q, keys)
    return [q, *(each[:, :, :len_k] for each in keys)]


def calls(len_q, len_k, window):
    """(MLX's call, Widehead's) of q, k and v. A window is an array for MLX, as mlx-lm makes it."""
    mask, structure = ("causal" if len_q > 1 else None), {}
    if window is not None and len_q > 1:
        rows = mx.arange(len_k - len_q, len_k)[:, None]
        keys = mx.arange(len_k)[None]
        mask = (rows >= keys) & (rows < keys + window)
        mx.eval(mask)
        structure = {"mask": "causal", "window": window - 1}
    own = mx.fast.scaled_dot_product_attention
    return {
        "mlx": lambda q, k, v, scale: own(q, k, v, scale=scale, mask=mask),
        "widehead": lambda q, k, v, scale: widehead.mlx.sdpa(
            q, k, v, scale=scale, **({"mask": mask} | structure)
        ),
    }


def exact_rows(q, k, v, scale, window, count=6):
    """[(head, row, float64 answer)] of rows at random."""
    random = np.random.default_rng(1)
    found = []
    heads_q, len_q = q.shape[1:3]
    len_k, group = k.shape[2], heads_q // k.shape[1]
    for _ in range(count):
        head, row = int(random.integers(heads_q)), int(random.integers(len_q))
        diagonal = row + len_k - len_q
        begin = 0 if window is None or len_q == 1 else max(0, diagonal - window + 1)
        one = np.array(q[0, head, row].astype(mx.float32)).astype(np.float64)
        keys, values = (
            np.array(each[0, head // group, begin : diagonal + 1].astype(mx.float32))
            for each in (k, v)
        )
        scores = scale * (keys.astype(np.float64) @ one)
        weights = np.exp(scores - scores.max())
        found.append((head, row, weights @ values.astype(np.float64) / weights.sum()))
    return found


def error_of(out, rows):
    actual = np.stack([np.array(out[0, head, row].astype(mx.float32)) for head, row, _ in rows])
    expected = np.stack([answer for _, _, answer in rows])
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def measure(call, q, k, v, scale, rows, seconds):
    """A call's time, its memory beyond the inputs, and its error."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = call(q, k, v, scale)
    mx.eval(out)
    measured = {"peak_bytes": mx.get_peak_memory() - before, "error": error_of(out, rows)}

    def chain(count):
        begin = time.perf_counter()
        query = q
        for _ in range(count):
            query = call(query, k, v, scale)
        mx.eval(query)
        return (time.perf_counter() - begin) / count

    chain(1)
    count = max(1, min(200, int(seconds / SAMPLES / max(chain(2), 1e-6))))
    samples = [chain(count) for _ in range(SAMPLES)]
    return measured | {
        "us": statistics.median(samples) * 1e6, "fastest_us": min(samples) * 1e6, "calls": count
    }  # fmt: skip


def visible_pairs(len_q, len_k, window):
    diagonals = np.arange(len_k - len_q, len_k) + 1
    return int((diagonals if window is None else np.minimum(diagonals, window)).sum())


def row_of(kind, len_q, context, dtype, seconds):
    heads_q, heads_kv, dim, window = SHAPES[kind]
    # A rotating cache keeps the window less one of what is old.
    len_k = context if window is None else min(context, window - 1 + len_q)
    if window is not None and len_q == 1:
        len_k = min(context, window)
    q, k, v = tensors(heads_q, heads_kv, dim, len_q, len_k, dtype)
    scale = dim**-0.5
    rows = exact_rows(q, k, v, scale, window)
    row = {"model": ", ".join(kind), "heads": f"{heads_q}/{heads_kv}", "dim": dim, "window": window,
           "len_q": len_q, "len_k": len_k, "context": context,
           "flop": 4 * dim * heads_q * visible_pairs(len_q, len_k, window)}  # fmt: skip
    options = {"mask": "causal"} if len_q > 1 else {}
    if window is not None and len_q > 1:
        options["window"] = window - 1
    row["kernel"] = widehead.mlx.plan(q, k, v, scale=scale, **options).kernel
    for which, call in calls(len_q, len_k, window).items():
        try:
            row[which] = measure(call, q, k, v, scale, rows, seconds)
        except (RuntimeError, ValueError) as failure:
            row[which] = {"failure": str(failure).splitlines()[0][:300]}
    # Whether MLX has a fused kernel here: it refuses in words where it has none.
    try:
        mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, force_fused=True))
        row["mlx_has_fused"] = True
    except (RuntimeError, ValueError):
        row["mlx_has_fused"] = False
    return row


def device_name():
    if mx.default_device().type == mx.DeviceType.cpu:
        return widehead.device("cpu")["name"]
    return widehead.device("cuda")["name"]


def driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        return lines[0].strip() if lines else None  # a line for each GPU
    except (OSError, subprocess.CalledProcessError):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    models = sorted({model for model, _ in SHAPES})
    parser.add_argument("--models", nargs="+", choices=models, default=["qwen3.5-27b", "gemma-4-31b"])
    parser.add_argument("--dtype", choices=BOUNDS, default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--seconds", type=float, default=300, help="no row begins after so many")
    options = parser.parse_args()
    mx.random.seed(0)
    began = time.monotonic()
    document = {
        "machine": {
            "device": device_name(),
            "driver": driver(),
            "python": platform.python_version(),
            "mlx": mx.__version__,
            "preloaded": os.environ.get("LD_PRELOAD", ""),
            "mlx_use_cuda_graphs": os.environ.get("MLX_USE_CUDA_GRAPHS", "default"),
            "widehead": widehead.__version__,
        },
        "command": "python bench/mlx_attention.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "dtype": options.dtype,
        "rows": [],
        "not_run": [],
    }
    off = []
    dtype = getattr(mx, options.dtype)
    for kind in (each for each in SHAPES if each[0] in options.models):
        window = SHAPES[kind][3]
        for len_q in (options.chunk, 1):
            # A window's work is the same at every length.
            for context in options.lengths if window is None else options.lengths[:1]:
                if time.monotonic() - began > options.seconds:
                    document["not_run"].append([*kind, len_q, context])
                    continue
                row = row_of(kind, len_q, context, dtype, 1.0)
                document["rows"].append(row)
                if row["widehead"].get("error", 1.0) > BOUNDS[options.dtype]:
                    off.append(row)
                print(json.dumps(row), flush=True)
                options.result.write_text(json.dumps(document, indent=1) + "\n")
    if off:
        sys.exit(f"{len(off)} of Widehead's answers are off or missing")


if __name__ == "__main__":
    main()
