"""vLLM's engine with Widehead in it beside vLLM's own backend: greedy tokens, on the CPU.

All engines share this process, as importing vLLM takes longer than any of them runs. A test that only
compares tokens passes without Widehead, which vLLM may ignore: calls are counted.

WIDEHEAD_GEMMA3 names a folder of Gemma 3 270M as transformers saves it; its test fails without one
unless -k leaves it out. WIDEHEAD_RECORD names the file that python/tests/engine_steps.py replays.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections import Counter
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
import pytest
import torch
import transformers
import vllm
import widehead
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.plugins import load_general_plugins
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout
from widehead_vllm import backend, register

VOCABULARY = 128
COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCABULARY, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**COMMON),
    "gemma2": transformers.Gemma2Config(**COMMON, sliding_window=24, attn_logit_softcapping=5.0),
    "gemma3": transformers.Gemma3TextConfig(
        **COMMON, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    ),
}
NEW_TOKENS = 24


def prompts(lengths=(6, 150, 142), shared=140):
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [draw[0], draw[1], draw[1][:shared] + draw[2][shared:]]  # the last two begin alike


@pytest.fixture(scope="session", params=MODELS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(MODELS[request.param]).save_pretrained(path)
    return path


def run(folder, tokens, new_tokens=NEW_TOKENS, **options):
    """(tokens of each prompt, seconds), of an engine with the backend that is registered."""
    selector._cached_get_attn_backend.cache_clear()
    options = {"max_model_len": 512, "block_size": 32} | options
    engine = LLM(str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    results = engine.generate([{"prompt_token_ids": each} for each in tokens], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return [list(each.outputs[0].token_ids) for each in results], seconds


def stock(*args, **options):
    load_general_plugins()  # once a process: an engine would register Widehead again
    AttentionBackendEnum.CPU_ATTN.clear_override()
    result = run(*args, **options)
    assert "widehead" not in AttentionBackendEnum.CPU_ATTN.get_path()
    return result


@pytest.fixture(scope="session")
def expected(folder):
    """What vLLM's own backend answers."""
    tokens, _ = stock(folder, prompts())
    assert len({tuple(each) for each in tokens}) == 3
    return tokens


@pytest.fixture
def calls(monkeypatch):
    """What Widehead was asked for, by name."""
    seen = {"sdpa": [], "append": []}
    for name, counted in seen.items():

        def counting(*args, _function=getattr(widehead, name), _seen=counted, **kwargs):
            # The engine's tensors of numbers live on and change.
            then = {name: x.clone() if isinstance(x, torch.Tensor) and name != "out" else x for name, x in kwargs.items()}
            _seen.append((args, then))
            return _function(*args, **kwargs)

        monkeypatch.setattr(backend, name, counting)
    return seen


def ours(*args, **options):
    register()
    return run(*args, **options)


def expect_calls(calls, layers, steps):
    assert len(calls["sdpa"]) == len(calls["append"]) >= layers * steps


CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}


@pytest.mark.parametrize(
    ("options", "mixes"),
    [({}, False), (CHUNKS, True), ({"block_size": 16} | CHUNKS, True)],
    ids=["whole prompts", "chunks", "pages of 16"],
)
def test_tokens_are_those_of_vllms_backend(folder, expected, calls, options, mixes):
    actual, _ = ours(folder, prompts(), **options)
    assert actual == expected
    expect_calls(calls, 2, NEW_TOKENS)
    offsets = [kwargs["query_offsets"].diff().tolist() for _, kwargs in calls["sdpa"]]
    assert any(max(each) > 1 for each in offsets) and any(max(each) == 1 for each in offsets)
    assert mixes == any(min(each) == 1 and max(each) > 1 and sum(each) > 8 for each in offsets if len(each) > 2)
    tables = [kwargs["page_table"] for _, kwargs in calls["sdpa"] if len(kwargs["page_table"]) == 3]
    assert tables
    if folder.name.startswith("llama"):  # windowed layers have given those pages back
        # The common beginning of two prompts is stored once.
        assert any((each[1, :4] == each[2, :4]).all() and each[1, 0] != 0 for each in tables)
    page_sizes = Counter(args[1].shape[2] for args, _ in calls["sdpa"])
    assert set(page_sizes) == {options.get("block_size", 32)}


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC])
def test_both_layouts(folder, expected, calls, layout, monkeypatch):
    monkeypatch.setattr(backend.WideheadBackend, "supported_kv_cache_layouts", classmethod(lambda cls: (layout,)))
    actual, _ = ours(folder, prompts())
    assert actual == expected
    expect_calls(calls, 2, NEW_TOKENS)
    (_, k, v), _ = calls["sdpa"][-1]
    heads_first = layout is KVCacheLayout.LBHNC
    assert (k.stride(1) > k.stride(2)) == heads_first and k.stride() == v.stride()


def test_a_head_size_that_vllms_backend_has_not(tmp_path, calls):
    """The oracle is transformers, as vLLM's own backend refuses it."""
    config = transformers.LlamaConfig(**(COMMON | {"head_dim": 40}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    actual, _ = ours(tmp_path, prompts())
    expect_calls(calls, 2, NEW_TOKENS)
    for prompt, tokens in zip(prompts(), actual):
        answer = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        assert answer[0, len(prompt) :].tolist() == tokens


def test_vllm_finds_it_by_its_entry_point():
    (found,) = entry_points(group="vllm.general_plugins", name="widehead")
    assert found.load() is register
    register()
    assert AttentionBackendEnum.CPU_ATTN.get_class() is backend.WideheadBackend
    assert AttentionBackendEnum.CUSTOM.get_class() is backend.WideheadBackend


def validate(**changes):
    arguments = {
        "head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16,
        "use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "device_capability": None, "attn_type": "decoder",
    }  # fmt: skip
    return backend.WideheadBackend.validate_configuration(**(arguments | changes))


def test_configurations_are_answered_with_reasons(monkeypatch):
    assert validate() == []
    assert validate(has_sliding_window=True, has_sink=True, head_size=512, block_size=528) == []
    assert "head_size not supported" in validate(head_size=2000)
    assert "kv_cache_dtype not supported" in validate(kv_cache_dtype="fp8")
    assert any("MLA" in reason for reason in validate(use_mla=True))
    # The planner's words, where it has no kernel: as for a device that this build has not.
    elsewhere = SimpleNamespace(device_type="cuda", is_cpu=lambda: False)
    monkeypatch.setattr(backend, "current_platform", elsewhere)
    (reason,) = validate(head_size=96)
    assert "CUDA" in reason
    monkeypatch.undo()
    unfused = partial(widehead.plan, limits=widehead.Limits(kernel="cpu_unfused"))
    monkeypatch.setattr(backend, "plan", unfused)
    (reason,) = validate(head_size=96)
    assert "cpu_unfused" in reason and "dense" in reason


def test_what_cannot_be_is_refused_where_vllm_does_not_ask():
    with pytest.raises(NotImplementedError, match="no ALiBi"):
        backend.WideheadImpl(4, 32, 1.0, 2, alibi_slopes=[0.5] * 4)
    with pytest.raises(NotImplementedError, match="type encoder_only"):
        backend.WideheadImpl(4, 32, 1.0, 2, attn_type="encoder_only")
    with pytest.raises(NotImplementedError, match="kv_cache_dtype is fp8; widehead-vllm takes auto, float16"):
        backend.WideheadImpl(4, 32, 1.0, 2, kv_cache_dtype="fp8")


def record(calls, path):
    """What a windowed and the first full layer of Gemma were called with, in some of the steps, for
    python/tests/engine_steps.py."""
    kept = []
    for begin in range(0, len(calls["sdpa"]) - 17, 18 * 6):
        for (q, k, _), options in (calls["sdpa"][begin], calls["sdpa"][begin + 5]):
            lengths, rows = options["key_lengths"].tolist(), options["page_table"].numpy()
            counts = [-(-length // k.shape[2]) for length in lengths]
            table = rows[:, : max(counts)].copy()
            listed = np.zeros(table.shape, bool)
            for b, count in enumerate(counts):
                listed[b, :count] = True
            table[~listed] = table[listed].min()
            pages, numbers = np.unique(table, return_inverse=True)
            kept.append({
                "heads_q": q.shape[1], "heads_kv": k.shape[1], "head_size": q.shape[2],
                "page_size": k.shape[2], "pages": len(pages), "scale": options["scale"],
                "window": options["window"] and options["window"][0],
                "query_offsets": options["query_offsets"].tolist(), "key_lengths": lengths,
                "page_table": numbers.reshape(table.shape).tolist(), "len_q": options["len_q"],
                "len_k": options["len_k"],
            })  # fmt: skip
    document = {"engine": f"vLLM {vllm.__version__}", "model": "Gemma 3 270M", "steps": kept}
    Path(path).write_text(json.dumps(document) + "\n")


def test_gemma3_270m(calls, capsys):
    """The real model, prompts of up to 1200 tokens past its windows of 512, in chunks of 256."""
    folder = os.environ.get("WIDEHEAD_GEMMA3")
    if not folder:
        pytest.fail("WIDEHEAD_GEMMA3 must name a folder of Gemma 3 270M")
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    words = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    lengths, tokens, at = (1200, 40, 700, 9), [], 1
    for length in lengths:
        tokens.append([2, *words[at : at + length - 1]])  # the model babbles without its first token
        at += length
    options = {"max_num_batched_tokens": 256, "max_num_seqs": 8, "max_model_len": 2048}
    (expected, stock_seconds), (actual, our_seconds) = (
        each(folder, tokens, 32, **options) for each in (stock, ours)
    )
    assert actual == expected
    expect_calls(calls, 18, 32)
    total = sum(lengths) + 32 * len(lengths)
    if path := os.environ.get("WIDEHEAD_RECORD"):
        record(calls, path)
    with capsys.disabled():
        print(
            f"\nGemma 3 270M, {total} tokens, vLLM {vllm.__version__}: its own backend "
            f"{total / stock_seconds:.0f} tokens/s, Widehead {total / our_seconds:.0f}"
        )
