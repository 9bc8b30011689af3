"""Continuous batching of transformers: the tokens of eager, from the pages where they lie."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_models  # noqa: E402
import transformers  # noqa: E402
import widehead.transformers  # noqa: E402
from transformers import ContinuousBatchingConfig, GenerationConfig  # noqa: E402
from widehead.transformers import _paged as paged  # noqa: E402

# Full attention alone, windows beside it, softcap, sinks; and windows alone.
MODELS = ("llama", "gemma2", "gemma3", "gpt_oss")
NEW_TOKENS = 40


def prompts(lengths=(70, 3, 41, 55, 9), shared=20):
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randint(3, tiny_models.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [draw[0][:shared] + each for each in draw]  # a common beginning


def generate(model, **options):
    options = {"page_size": 8, "num_blocks": 200, "max_batch_tokens": 48} | options
    results = model.generate_batch(
        prompts(),
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(auto_switch_to_flash=False, **options),
    )
    in_order = sorted(results, key=lambda name: int(name.rpartition("_")[2]))
    return [results[name].generated_tokens for name in in_order]


@pytest.fixture
def calls(monkeypatch):
    """What widehead.sdpa was asked for: a result that transformers computed by itself proves nothing."""
    seen = []

    def counting(*args, **kwargs):
        seen.append(kwargs)
        return widehead.sdpa(*args, **kwargs)

    monkeypatch.setattr(paged, "sdpa", counting)
    return seen


def with_eager(model):
    model.set_attn_implementation("eager")
    return generate(model)


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_eagers(name, page_size, calls):
    model = tiny_models.tiny_model(name)
    expected = with_eager(model)
    assert all(len(each) == NEW_TOKENS for each in expected)
    assert len({tuple(each) for each in expected}) > 1
    assert not calls
    with widehead.transformers.continuous_batching(model):
        actual = generate(model, page_size=page_size)
    assert actual == expected
    # Every layer of every step: chunks of 48 tokens, then tokens one by one.
    assert len(calls) >= NEW_TOKENS * model.config.num_hidden_layers
    assert all("page_table" in call for call in calls[model.config.num_hidden_layers :])
    assert max(call["len_q"] for call in calls) > 1
    assert {call["window"] for call in calls} == {
        (model.config.sliding_window - 1, None) if kind == "sliding_attention" else None
        for kind in getattr(model.config, "layer_types", None) or ["full_attention"]
    }


def test_windows_alone(calls):
    config = transformers.MistralConfig(
        hidden_size=64, intermediate_size=96, vocab_size=tiny_models.VOCABULARY, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    expected = with_eager(model)
    with widehead.transformers.continuous_batching(model):
        assert generate(model) == expected
    assert {call["window"] for call in calls} == {(23, None)}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_pool_that_is_too_small_for_all_at_once(name, calls):
    model = tiny_models.tiny_model(name)
    expected = with_eager(model)
    with widehead.transformers.continuous_batching(model):
        assert generate(model, num_blocks=36) == expected
    assert calls


def test_windows_give_pages_back():
    model = tiny_models.tiny_model("gemma3")
    held = []

    class Watched(paged._SlidingPages):
        def allocate_cache_to_request(self, request_id, past_length, query_length):
            super().allocate_cache_to_request(request_id, past_length, query_length)
            table = self.block_table[request_id]
            held.append((sum(block != 0 for block in table), query_length))
            real = [block for each in self.block_table.values() for block in each if block != 0]
            assert len(set(real)) == len(real)  # nobody's page is another's

    with widehead.transformers.continuous_batching(model):
        paged.cache_module.ATTN_TYPE_TO_ALLOCATOR["sliding_attention"] = Watched
        generate(model, page_size=8)
    window = model.config.sliding_window
    assert held
    assert all(pages <= (window - 1 + query) // 8 + 2 for pages, query in held)
    assert max(pages for pages, query in held if query == 1) <= (window - 1) // 8 + 2


def test_it_ends_as_it_began():
    from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR

    model = tiny_models.tiny_model("llama")
    before = dict(ATTN_TYPE_TO_ALLOCATOR)
    name = model.config._attn_implementation
    with pytest.raises(KeyError), widehead.transformers.continuous_batching(model):
        assert ATTN_TYPE_TO_ALLOCATOR != before
        raise KeyError
    assert ATTN_TYPE_TO_ALLOCATOR == before and model.config._attn_implementation == name


def test_limits_reach_the_calls(calls):
    model = tiny_models.tiny_model("llama")
    limits = widehead.Limits(threads=1)
    with widehead.transformers.continuous_batching(model, limits=limits):
        generate(model)
    assert calls and all(call["limits"] is limits for call in calls)
