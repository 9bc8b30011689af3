"""What transformers hands to an attention function and how it can be misread, a trap a test."""

import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
import widehead.transformers  # noqa: E402
from oracle import oracle, relative_rms  # noqa: E402
from torch_calls import Causal, tensors  # noqa: E402
from transformers import AttentionInterface, StaticCache  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    AttentionMaskInterface,
    sliding_window_causal_mask_function,
)
from widehead.transformers import StructuredMask, attention_forward, attention_mask  # noqa: E402


class Recorder:
    """Registers Widehead under a name that keeps what every attention call got."""

    def __init__(self):
        self.calls = []
        widehead.transformers.register("widehead_recorded")
        inner = AttentionInterface()["widehead_recorded"]

        def forward(module, query, key, value, mask, **kwargs):
            self.calls.append((query, key, value, mask, kwargs))
            return inner(module, query, key, value, mask, **kwargs)

        AttentionInterface.register("widehead_recorded", forward)

    def model(self, name):
        model = tiny_models.tiny_model(name)
        model.set_attn_implementation("widehead_recorded")
        return model


@pytest.fixture
def recorder():
    return Recorder()


def tokens(length=40, batch=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, tiny_models.VOCABULARY, (batch, length), generator=generator)


def left_padding(ids, count=7):
    mask = torch.ones_like(ids)
    mask[0, :count] = 0
    return mask


def forward(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def test_01_the_mask_function_is_registered_too(recorder):
    assert AttentionMaskInterface()["widehead_recorded"] is attention_mask
    ids = tokens()
    forward(recorder.model("gemma3"), ids, attention_mask=left_padding(ids))
    masks = [call[3] for call in recorder.calls]
    assert [mask.window for mask in masks] == [24, None, 24, None]
    assert all(mask.key_starts.tolist() == [7, 0] for mask in masks)


def test_02_no_mask_is_top_left_and_the_tail_is_not_read():
    q, k, v = tensors(length=(30, 77))
    k[:, :, 30:] = v[:, :, 30:] = torch.nan
    out, weights = attention_forward(Causal(), q, k, v, None)
    assert weights is None
    expected, _ = oracle(q, k[:, :, :30], v[:, :, :30], causal="top_left")
    assert relative_rms(out.transpose(1, 2), expected) <= 4e-6


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4"])
def test_02_unwritten_memory_of_a_static_cache_is_not_read(name, recorder):
    model = recorder.model(name)
    ids = tokens(20)
    expected = forward(model, ids).logits
    cache = StaticCache(config=model.config, max_cache_len=64)
    forward(model, ids, past_key_values=cache)
    cache.reset()
    for layer in cache.layers:
        if layer.keys is not None:  # not a layer that shares another's
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
    assert torch.allclose(forward(model, ids, past_key_values=cache).logits, expected, atol=1e-4)


def test_03_the_counter_of_a_static_cache_is_copied():
    counter = torch.tensor(11)
    mask = attention_mask(2, 5, 32, q_offset=counter)
    counter.add_(5)
    assert mask.key_lengths.tolist() == [16, 16]


def test_04_masks_made_before_the_forward_survive(recorder):
    mask = attention_mask(2, 5, 5, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1] * 5]) > 0)
    assert mask.contiguous() is mask
    # A model of one kind of layers hands its mask back where a 4-D mask may stand.
    model = recorder.model("llama")
    ids = tokens()
    model.generate(
        ids,
        attention_mask=left_padding(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        cache_implementation="static",
        disable_compile=True,
    )
    for call in recorder.calls:
        assert isinstance(call[3], StructuredMask)
        assert call[3].key_starts.tolist() == [7, 0]


def test_05_layers_that_share_keys_get_fewer_queries(recorder):
    model = recorder.model("gemma4")
    ids = tokens(40)
    model.generate(ids, attention_mask=left_padding(ids), max_new_tokens=2, min_new_tokens=2)
    prefill = recorder.calls[:4]
    assert [call[0].shape[2] for call in prefill] == [40, 40, 1, 1]
    assert [call[1].shape[2] for call in prefill] == [40] * 4
    assert [call[3].len_q for call in prefill] == [40, 40, 1, 1]
    # Position ids are no help: they may be those of all queries.
    q, k, v = tensors(length=(1, 40))
    mask = attention_mask(2, 40, 40)[:, :, -1:, :]
    out, _ = attention_forward(Causal(), q, k, v, mask, position_ids=torch.arange(40)[None])
    assert relative_rms(out.transpose(1, 2), oracle(q, k, v, causal=True)[0]) <= 4e-6


def test_06_gemma4s_two_kinds_of_layers(recorder):
    model = recorder.model("gemma4")
    forward(model, tokens())
    shapes = [(call[0].shape[3], call[1].shape[1], call[4]["scaling"]) for call in recorder.calls]
    assert shapes == [(256, 2, 1.0), (512, 1, 1.0)] * 2
    # V is the keys' projection before its norm and rotation, not a view of K.
    _, key, value, _, _ = recorder.calls[1]
    assert key.data_ptr() != value.data_ptr() and not torch.equal(key, value)


def test_07_a_window_counts_the_query_itself(recorder):
    q, k, v = tensors(length=(40, 40))
    mask = attention_mask(2, 40, 40, mask_function=sliding_window_causal_mask_function(5))
    out, _ = attention_forward(Causal(), q, k, v, mask, sliding_window=5)
    expected, _ = oracle(q, k, v, causal=True, window=(4, None))
    assert relative_rms(out.transpose(1, 2), expected) <= 4e-6
    for name in ("gemma2", "gemma3", "gpt_oss", "mimo_v2_flash"):
        recorder.calls.clear()
        forward(recorder.model(name), tokens())
        windows = [call[3].window for call in recorder.calls]
        assert windows == [call[4].get("sliding_window") for call in recorder.calls]
        assert set(windows) >= {24}


def test_08_a_window_cache_begins_past_the_first_token(recorder):
    model = recorder.model("gemma3")
    ids = tokens(48)
    expected = forward(model, ids).logits
    recorder.calls.clear()
    cache = transformers.DynamicCache(config=model.config)
    parts = [forward(model, ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 30), (30, 48))]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-4)
    assert [call[1].shape[2] for call in recorder.calls[4:]] == [41, 48, 41, 48]
    # A static window cache: shorter than its window, with an unwritten tail, and longer.
    for length in (10, 48):
        cache = StaticCache(config=model.config, max_cache_len=64)
        recorder.calls.clear()
        actual = forward(model, ids[:, :length], past_key_values=cache).logits
        assert torch.allclose(actual, expected[:, :length], atol=1e-4)
        assert recorder.calls[0][1].shape[2] == max(24, length)


def test_09_the_other_arguments(recorder):
    q, k, v = tensors()
    sinks = torch.nn.Parameter(torch.tensor([0.5, -1, 2, 0], dtype=torch.bfloat16))
    mask = attention_mask(2, 33, 77, q_offset=44)
    out, _ = attention_forward(
        Causal(), q, k, v, mask, scaling=0.2, softcap=3.0, s_aux=sinks, use_cache=True,
        output_router_logits=False, position_ids=torch.arange(33)[None], sliding_window=None,
    )  # fmt: skip
    expected, _ = oracle(
        q, k, v, causal=True, scale=0.2, softcap=3.0, sinks=sinks.detach().float().numpy()
    )
    assert out.requires_grad  # sinks are learned
    assert relative_rms(out.detach().transpose(1, 2), expected) <= 4e-6
    with pytest.raises(ValueError, match="dropout is 0.1"):
        attention_forward(Causal(), q, k, v, mask, dropout=0.1)
    forward(recorder.model("gemma2"), tokens())
    assert all(call[4]["softcap"] == 5.0 for call in recorder.calls)
    recorder.calls.clear()
    forward(recorder.model("gpt_oss"), tokens())
    assert all(isinstance(call[4]["s_aux"], torch.nn.Parameter) for call in recorder.calls)


def test_09_a_position_bias_is_added():
    q, k, v = tensors()
    bias = torch.randn(1, 4, 33, 77)
    hidden = torch.rand(2, 1, 33, 77) < 0.3
    out, _ = attention_forward(Causal(), q, k, v, ~hidden, position_bias=bias)
    expected, _ = oracle(q, k, v, mask=np.where(hidden, -np.inf, bias).astype(np.float32))
    assert relative_rms(out.transpose(1, 2), expected) <= 4e-6


def test_10_heads_and_dimensions_differ_between_layers(recorder):
    forward(recorder.model("mimo_v2_flash"), tokens())
    kinds = {(call[3].window, call[1].shape[1]) for call in recorder.calls}
    windows = {heads for window, heads in kinds if window is not None}
    whole = {heads for window, heads in kinds if window is None}
    assert len(windows) == 1 and len(whole) == 1 and windows != whole
    for name, dims in (("deepseek_v3", (192, 128)), ("glm4_moe_lite", (256, 256))):
        recorder.calls.clear()
        forward(recorder.model(name), tokens())
        assert {(c[1].shape[3], c[2].shape[3]) for c in recorder.calls} == {dims}


def test_11_no_mask_of_queries_by_keys_is_made(recorder):
    model = recorder.model("gemma3")
    ids = tokens(48)
    cache = transformers.DynamicCache(config=model.config)
    for a, b in ((0, 30), (30, 47), (47, 48)):
        forward(model, ids[:, a:b], past_key_values=cache, attention_mask=left_padding(ids)[:, :b])
    for _, _, _, mask, _ in recorder.calls:
        held = [mask.key_lengths, mask.key_starts, mask.keys]
        assert all(each is None or each.numel() <= 2 for each in held)


def test_12_left_padding_is_a_key_start_and_empty_rows_are_zero():
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :7] = False
    mask = attention_mask(2, 40, 40, attention_mask=padding)
    assert mask.key_starts.tolist() == [7, 0]
    assert mask.key_lengths is None and mask.keys is None
    q, k, v = tensors(length=(40, 40))
    k[0, :, :7] = v[0, :, :7] = torch.nan
    out, _ = attention_forward(Causal(), q, k, v, mask)
    assert torch.isfinite(out).all()
    assert not out[0, :7].any() and out[1, :7].all()


def test_13_decoding_from_a_static_cache_takes_no_mask(recorder):
    model = recorder.model("llama")
    ids = tokens()
    model.generate(ids, max_new_tokens=3, min_new_tokens=3, cache_implementation="static",
                   disable_compile=True)  # fmt: skip
    decode = [call for call in recorder.calls if call[0].shape[2] == 1]
    assert [call[3].key_lengths.tolist() for call in decode] == [[41] * 2] * 4 + [[42] * 2] * 4
    assert all(call[3].keys is None for call in decode)
    assert {call[1].shape[2] for call in decode} == {42}


@pytest.mark.parametrize("name", ["sinks", "block_indices", "attention_bias", "cu_seq_lens_q"])
def test_unknown_arguments_are_refused_by_name(name):
    q, k, v = tensors()
    mask = attention_mask(2, 33, 77, q_offset=44)
    attention_forward(Causal(), q, k, v, mask, **{name: None})
    with pytest.raises(ValueError, match=f"^Causal passes {name}, which widehead does not know"):
        attention_forward(Causal(), q, k, v, mask, **{name: torch.ones(4)})


def test_chosen_keys_are_the_only_ones():
    q, k, v = tensors()
    mask = attention_mask(2, 33, 77, q_offset=44)
    indices = torch.rand(2, 33, 77).argsort(dim=-1)[..., :20].to(torch.int32)
    chosen = torch.zeros(2, 33, 77, dtype=torch.bool).scatter(-1, indices.long(), True)[:, None]
    out, _ = attention_forward(Causal(), q, k, v, mask, indices=indices)
    expected, _ = oracle(q, k, v, causal=True, mask=chosen.numpy())
    assert relative_rms(out.transpose(1, 2), expected) <= 4e-6
    bias = torch.randn(2, 1, 33, 77)
    out, _ = attention_forward(Causal(), q, k, v, bias, indices=indices)
    expected, _ = oracle(q, k, v, mask=torch.where(chosen, bias, -torch.inf).numpy())
    assert relative_rms(out.transpose(1, 2), expected) <= 4e-6
    with pytest.raises(ValueError, match=r"indices is \[2, 4, 33, 20\]; it must be \[batch, len_q"):
        attention_forward(Causal(), q, k, v, mask, indices=indices[:, None].expand(2, 4, 33, 20))


def in_module(name, **flags):
    """A layer in a module beside a model that declares these flags."""
    module = types.ModuleType(name)
    model = type("Model", (transformers.PreTrainedModel,), {"__module__": name, **flags})
    layer = type("Attention", (Causal,), {"__module__": name})
    module.Model, module.Attention = model, layer
    sys.modules[name] = module
    return layer()


def test_models_that_declare_nothing_are_refused():
    q, k, v = tensors(length=(10, 10))
    mask = attention_mask(2, 10, 10)
    for flag in ("_supports_sdpa", "_supports_attention_backend"):
        layer = in_module(f"some.{flag}.modeling", **{flag: True})
        assert attention_forward(layer, q, k, v, mask)[0].shape == (2, 10, 4, 48)
    with pytest.raises(ValueError, match="Attention belongs to a model that declares neither"):
        attention_forward(in_module("some.model.modeling"), q, k, v, mask)


def same_as_eager(name, ids, **inputs):
    """The model and Widehead's logits, which are eager's where a token is no padding."""
    model = tiny_models.tiny_model(name)
    widehead.transformers.register()
    results = []
    for implementation in ("eager", "widehead"):
        model.set_attn_implementation(implementation)
        results.append(forward(model, ids, **inputs).logits)
    seen = slice(None)
    if "attention_mask" in inputs and "decoder_input_ids" not in inputs:
        seen = inputs["attention_mask"].bool()
    eager, ours = (each[seen] for each in results)
    assert relative_rms(ours, eager) <= 1e-4
    return model, results[1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["doge", "deepseek_v32", "deepseek_v4", "minimax_m3"])
def test_models_that_touch_masks_get_what_they_know(name, padded):
    """Doge asks for a BlockMask and then skips it: every query saw the future. DeepSeek V3.2 takes
    mask[:, 0] and passes indices=; V4 extends it by a bias in the mask's own type; MiniMax M3 asks
    for the class too."""
    ids = tokens()
    inputs = {"attention_mask": left_padding(ids)} if padded else {}
    model, logits = same_as_eager(name, ids, **inputs)
    changed = ids.clone()
    changed[:, -1] = 3 + (ids[:, -1] - 2) % 100
    other = forward(model, changed, **inputs).logits
    seen = slice(7 if padded else 0, -1)
    assert torch.allclose(other[:, seen], logits[:, seen], atol=1e-4)
    assert not torch.allclose(other[:, -1], logits[:, -1], atol=1e-2)


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_that_adds_its_mask_gets_numbers_to_add(padded):
    """BigBirdPegasus' encoder; its decoder takes the same masks to the attention function."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0
    inputs = {"attention_mask": mask} if padded else {}
    same_as_eager("bigbird_pegasus", ids, decoder_input_ids=tokens(20).flip(1), **inputs)


def test_sinks_of_every_query_are_refused():
    model = tiny_models.tiny_model("inkling2")
    widehead.transformers.register()
    model.set_attn_implementation("widehead")
    with pytest.raises(ValueError, match="passes sinks, which widehead does not know"):
        forward(model, tokens())


def test_blocks_of_keys_are_refused():
    model = tiny_models.tiny_model("minimax_m3_sparse")
    widehead.transformers.register()
    model.set_attn_implementation("widehead")
    with pytest.raises(ValueError, match="passes block_indices, which widehead does not know"):
        forward(model, tokens())
