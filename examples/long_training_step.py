"""A training step of a few layers of a large model over a long text: the same loss, in less time and memory.

    pip install . torch transformers matplotlib
    python examples/long_training_step.py --model gemma-4-31b --chart step.svg
    python examples/long_training_step.py --model qwen3.5-27b --device cpu --shrink 16 --tokens 512

The shapes of the first layers of a model of gemma3_long_prompt.py with random weights, in bfloat16, its
vocabulary cut so that layers are what is measured; weights, gradients and AdamW's two averages are
bfloat16 too. Each attention implementation of transformers runs in a process of its own, ended when its
time is over: a short pass that nobody measures, then steps over the same random tokens, whose losses and
norms of gradients must agree. Prints a table, writes what it measured as JSON and, with --chart, as SVG.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from gemma3_fine_tune import loss_of
from gemma3_long_prompt import IMPLEMENTATIONS, SHAPES, PeakMemory, shape_config

LEARNING_RATE = 1e-4
WARM_UP_TOKENS = 2048  # more than the windows of 1024
TOLERANCE = 1e-2  # relative, of losses and norms: both sides round to bfloat16 all the way
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # of a GPU; of a CPU, which may also kill
STEP = "step: "  # begins a line of what is measured so far
PHASES = ("forward", "backward", "optimizer")
COLORS = ("#8c8c8c", "#2166ac", "#d1762f")


def config_of(options):
    """The model's first layers, or layers of one kind; widths and counts of heads divided by --shrink."""
    others = {
        name: max(1, value // options.shrink)
        for name, value in SHAPES[options.model][1].items()
        if name in ("hidden_size", "intermediate_size") or name.endswith("_heads")
    }
    if options.kind:
        others["layer_types"] = [options.kind] * options.layers
    return shape_config(options.model, options.layers, **others, vocab_size=options.vocabulary)


def scale_scores(model) -> None:
    """Gemma 4 leaves the scale of scores to the weights of its queries' norm. Random ones are 1: scores of
    a deviation of 16 and more are rounded so coarsely that every attention has gradients of its own."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
                module.q_norm.weight.fill_(module.head_dim**-0.5)


def measure(options) -> dict:
    import torch
    import transformers

    if options.one == "widehead":
        import widehead.transformers

        widehead.transformers.register()
    memory = PeakMemory(options.device)
    try:
        torch.manual_seed(0)
        with torch.device(options.device):
            model = transformers.AutoModelForCausalLM.from_config(
                config_of(options), attn_implementation=options.one, dtype=torch.bfloat16
            )
        scale_scores(model)
        model.train()
        if options.checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = torch.randint(options.vocabulary, (1, options.tokens), generator=torch.Generator().manual_seed(1))
        tokens = tokens.to(options.device)
        loss_of(model, tokens[:, :WARM_UP_TOKENS]).backward()  # loads every kernel
        model.zero_grad()
        memory.reset()
        return {
            "steps": steps(model, tokens, memory, options),
            "parameters": sum(each.numel() for each in model.parameters()),
            "layer_types": model.config.layer_types,
        }
    finally:
        memory.end()


def steps(model, tokens, memory, options) -> list[dict]:
    import torch

    def timed(work):
        begin = time.perf_counter()
        result = work()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - begin

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=options.device == "cuda")
    rows = []
    for _ in range(options.steps):
        loss, forward_s = timed(lambda: loss_of(model, tokens))
        _, backward_s = timed(loss.backward)
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()  # no part of a step
        del gradients
        _, optimizer_s = timed(update)
        seconds = {"forward_s": forward_s, "backward_s": backward_s, "optimizer_s": optimizer_s}
        row = {"loss": loss.item(), "gradient_norm": norm, "step_s": sum(seconds.values()), **seconds}
        rows.append(row | {"peak_bytes": memory.peak_bytes()})
        print(STEP + json.dumps(rows[-1]), file=sys.stderr, flush=True)
        del loss
    return rows


def run_in_child(implementation: str, options) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", implementation]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired as late:
        lines = (late.stderr or b"").decode(errors="replace").splitlines()
        rows = [json.loads(line.removeprefix(STEP)) for line in lines if line.startswith(STEP)]
        why = f"{len(rows)} of {options.steps} steps in {options.timeout:.0f} s"
        return {"steps": rows, "cut_short": why} if rows else {"failure": why, "ran_out_of": "time"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
    memory = [line for line in lines if any(words in line for words in OUT_OF_MEMORY)]
    row = {"failure": (memory or lines)[-1][:400]}
    return row | {"ran_out_of": "memory"} if memory or done.returncode == -signal.SIGKILL else row


def broken(rows: dict[str, dict]) -> list[str]:
    """What failed for another reason than that this machine has too little memory or was given too little time."""
    return [f"{name}: {row['failure']}" for name, row in rows.items() if "failure" in row and "ran_out_of" not in row]


def best_step(row: dict) -> dict:
    return min(row["steps"], key=lambda step: step["step_s"])


def peak_bytes(row: dict) -> int:
    return max(step["peak_bytes"] for step in row["steps"])


def disagreements(rows: dict[str, dict]) -> list[str]:
    """What differs from the first implementation's by more than rounding."""
    found, names = [], list(rows)
    for name in names[1:]:
        for number, (step, first) in enumerate(zip(rows[name]["steps"], rows[names[0]]["steps"], strict=False)):
            for key in ("loss", "gradient_norm"):
                if not abs(step[key] - first[key]) <= TOLERANCE * abs(first[key]):
                    found.append(f"{key} of step {number + 1}: {name} {step[key]:.5g}, {names[0]} {first[key]:.5g}")
    return found


def table(document: dict) -> str:
    lines = ["| attention | first loss | last loss | first norm of gradients | s a step | forward, backward, optimizer | tokens/s | peak GB |"]
    lines.append("|---" * 8 + "|")
    for name, row in document["rows"].items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} |" + " |" * 6)
            continue
        best, all_of = best_step(row), row["steps"]
        cut_short = f" ({row['cut_short']})" if "cut_short" in row else ""
        parts = ", ".join(f"{best[f'{phase}_s']:.2f}" for phase in PHASES)
        lines.append(
            f"| {name}{cut_short} | {all_of[0]['loss']:.4f} | {all_of[-1]['loss']:.4f} | {all_of[0]['gradient_norm']:.4f} | "
            f"{best['step_s']:.2f} | {parts} | {document['tokens'] / best['step_s']:.0f} | {peak_bytes(row) / 1e9:.2f} |"
        )
    return "\n".join(lines)


def draw(document: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "widehead"
    import matplotlib.pyplot as plt

    rows = {name: row for name, row in document["rows"].items() if "failure" not in row}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.8 + 0.5 * len(rows)), layout="constrained", sharey=True)
    begin = [0.0] * len(rows)
    for phase, color in zip(PHASES, COLORS, strict=True):
        seconds = [best_step(row)[f"{phase}_s"] for row in rows.values()]
        left.barh(list(rows), seconds, left=begin, label=phase, color=color)
        begin = [a + b for a, b in zip(begin, seconds, strict=True)]
    right.barh(list(rows), [peak_bytes(row) / 1e9 for row in rows.values()], color=COLORS[1])
    left.set(xlabel=f"seconds a step of {document['tokens']} tokens")
    right.set(xlabel="peak memory, GB")
    left.invert_yaxis()
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", choices=tuple(SHAPES), default="gemma-4-31b")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    flags.add_argument("--layers", type=int, default=4, help="the model's first ones")
    flags.add_argument("--kind", help="layers of this kind alone, such as full_attention")
    flags.add_argument("--tokens", type=int, default=32768)
    flags.add_argument("--steps", type=int, default=3)
    flags.add_argument("--vocabulary", type=int, default=16384, help="words, of the 250,000 and more of the models")
    flags.add_argument("--shrink", type=int, default=1, help="divide widths and heads by this, to try it out")
    flags.add_argument("--checkpoint", action="store_true", help="keep what goes into a layer alone, and compute it once more")
    flags.add_argument("--implementations", default="sdpa,widehead", help=", ".join(IMPLEMENTATIONS))
    flags.add_argument("--timeout", type=float, default=600, help="seconds an implementation may take")
    flags.add_argument("--out", type=Path, default=Path("long-training-step.json"))
    flags.add_argument("--chart", type=Path)
    flags.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    options = flags.parse_args()
    for name in ("layers", "tokens", "steps", "vocabulary", "shrink", "timeout"):
        if not getattr(options, name) > 0:
            flags.error(f"--{name} is {getattr(options, name)}; it must be above 0")
    if wrong := [name for name in options.implementations.split(",") if name not in IMPLEMENTATIONS]:
        flags.error(f"--implementations is {','.join(wrong)}; valid: {', '.join(IMPLEMENTATIONS)}")
    if options.one:
        print(json.dumps(measure(options)))
        return 0
    import torch
    import transformers

    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "chart", "one")}
    document = {"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__, **settings, "rows": {}}
    for implementation in options.implementations.split(","):
        document["rows"][implementation] = run_in_child(implementation, options)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{implementation} ran", file=sys.stderr, flush=True)
    print(table(document))
    done = {name: row for name, row in document["rows"].items() if "failure" not in row}
    if options.chart is not None and done:
        draw(document, options.chart)
    wrong = broken(document["rows"]) + disagreements(done)
    for one in wrong:
        print(f"WRONG {one}")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())
