"""Whole models of mlx-lm with random weights: Widehead in the place of MLX's attention."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn  # noqa: E402
import tiny_mlx_models  # noqa: E402
import widehead.mlx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step  # noqa: E402
from mlx_lm.models import base  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    KVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

LENGTH = 50  # past the windows of 24
NEW_TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def without_compiling():
    """On the CPU mx.compile runs a C++ compiler for every small product: minutes for these models."""
    assert widehead.mlx.why_no_primitive is None
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module", params=tiny_mlx_models.NAMES)
def model(request):
    return tiny_mlx_models.tiny_model(request.param)


@pytest.fixture(scope="module")
def tokens():
    return mx.random.randint(3, tiny_mlx_models.VOCABULARY, (2, LENGTH), key=mx.random.key(1))


class Calls(list):
    """What reached the primitive: (len_q, len_k, causal, window, has a mask, has key starts)."""


@pytest.fixture
def calls(monkeypatch):
    seen = Calls()
    original = widehead.mlx._primitive

    class Spy:
        def __getattr__(self, name):
            return getattr(original, name)

        def attention(self, q, k, v, scale, causal, window, softcap, mask, sinks, starts, *rest):
            seen.append((q.shape[2], k.shape[2], causal, window, mask is not None, starts is not None))
            return original.attention(
                q, k, v, scale, causal, window, softcap, mask, sinks, starts, *rest
            )

    monkeypatch.setattr(widehead.mlx, "_primitive", Spy())
    return seen


def both(function):
    """(MLX's own answer, Widehead's)."""
    own = function()
    with widehead.mlx.override_sdpa():
        return own, function()


def numpy_of(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def error(actual, expected):
    actual, expected = numpy_of(actual), numpy_of(expected)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def chunked(model, tokens, cache, step=16):
    parts = [model(tokens[:, i : i + step], cache=cache) for i in range(0, tokens.shape[1], step)]
    return mx.concatenate(parts, axis=1)


def greedy(model, prompt, **options):
    options = {"max_tokens": NEW_TOKENS, "prefill_step_size": 16} | options
    return [int(token) for token, _ in generate_step(prompt, model, **options)]


def test_logits(model, tokens, calls):
    own, ours = both(lambda: model(tokens))
    assert error(ours, own) <= 1e-5
    assert calls


def test_a_step_of_training(model, tokens):
    """Gradients of every weight, the sinks' among them."""

    def gradients():
        loss = nn.losses.cross_entropy
        step = nn.value_and_grad(model, lambda: loss(model(tokens[:, :-1]), tokens[:, 1:]).mean())
        return mx.concatenate([each.flatten() for _, each in tree_flatten(step()[1])])

    own, ours = both(gradients)
    assert error(ours, own) <= 1e-4


def test_logits_in_chunks_over_a_cache(model, tokens):
    """The second step's queries begin within the windows, the last ones' beyond."""
    own, ours = both(lambda: chunked(model, tokens[:1], make_prompt_cache(model)))
    assert error(ours, own) <= 1e-5
    assert error(chunked(model, tokens[:1], make_prompt_cache(model)), own) == 0


def test_logits_in_bfloat16(model, tokens, request):
    name = request.node.callspec.params["model"]
    rounded = tiny_mlx_models.tiny_model(name, mx.bfloat16)
    exact = tiny_mlx_models.tiny_model(name)
    for one, other in zip(flat(rounded), flat(exact), strict=True):
        other[:] = one.astype(other.dtype)
    expected = numpy_of(exact(tokens))
    try:
        own, ours = (numpy_of(logits) for logits in both(lambda: rounded(tokens)))
    except RuntimeError as failure:
        assert "GatherMM" in str(failure)
        pytest.skip(f"MLX's experts on this CPU: {failure}")

    def median_error(actual):  # rounding may tip one token between two experts that nearly tie
        rows = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        return np.median(rows)

    assert median_error(ours) <= 1.2 * median_error(own)


def flat(model):
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(model.parameters())]


def test_greedy_tokens(model, tokens):
    own, ours = both(lambda: greedy(model, tokens[0]))
    assert len(own) == NEW_TOKENS and ours == own


def test_a_trimmed_prompt_cache(model, tokens):
    def continued():
        cache = make_prompt_cache(model)
        mx.eval(model(tokens[:1, :20], cache=cache))
        if not can_trim_prompt_cache(cache):
            return None
        trim_prompt_cache(cache, 7)
        return greedy(model, tokens[0, 13:], prompt_cache=cache)

    own, ours = both(continued)
    if own is None:
        pytest.skip("a cache of this model cannot be trimmed")
    assert ours == own


def batch(model, prompts):
    generator = BatchGenerator(model, max_tokens=NEW_TOKENS, prefill_step_size=16)
    uids = generator.insert(prompts)
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    generator.close()
    return [found[uid] for uid in uids]


def test_batches_of_unlike_prompts(model, tokens, request, calls):
    name = request.node.callspec.params["model"]
    prompts = [tokens[0].tolist(), tokens[1, :17].tolist(), tokens[1, :33].tolist()]
    if name == "llama4":
        with pytest.raises(ValueError, match="does not yet support batching"):
            batch(model, prompts)
        pytest.skip("mlx-lm has no batched cache of chunks")
    if name == "gemma2":  # whose own attention broadcasts a batch's mask over the wrong axis
        own = [greedy(model, mx.array(prompt)) for prompt in prompts]
    else:
        own = batch(model, prompts)
    with widehead.mlx.override_sdpa():
        ours = batch(model, prompts)
    assert [len(each) for each in own] == [NEW_TOKENS] * 3 and ours == own
    # Left padding reaches the kernels as numbers in decoding, but for the rotated keys of a window.
    # DeepSeek adds its own array of rotary scores to every mask.
    if name not in ("deepseek_v3", "glm4_moe_lite"):
        assert any(starts for len_q, *_, starts in calls if len_q == 1)


def test_speculative_decoding(model, tokens, request):
    name = request.node.callspec.params["model"]
    draft = tiny_mlx_models.tiny_model(name, seed=1)

    def drafted():
        steps = speculative_generate_step(
            tokens[0], model, draft, max_tokens=NEW_TOKENS, num_draft_tokens=3, prefill_step_size=16
        )
        return [int(token) for token, *_ in steps]

    if not can_trim_prompt_cache(make_prompt_cache(model)):
        with pytest.raises(ValueError, match="trimmable"):
            drafted()
        pytest.skip("a cache of this model cannot be trimmed")
    own, ours = both(drafted)
    assert len(own) == NEW_TOKENS and ours == own


def test_rotating_caches(tokens):
    model = tiny_mlx_models.tiny_model("llama")
    own, ours = both(lambda: greedy(model, tokens[0], max_kv_size=32))
    assert ours == own


def quantised_caches(model, bits):
    return [KVCache().to_quantized(group_size=64, bits=bits) for _ in model.layers]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_quantised_caches(tokens, calls, name, bits):
    """A prompt in chunks, then decoding token by token: windows too, which arrive as structure."""
    model = tiny_mlx_models.tiny_model(name)

    def logits(cache):
        prompt = chunked(model, tokens[:1], cache, step=LENGTH)
        return mx.concatenate([prompt, chunked(model, tokens[1:, :8], cache, step=1)], axis=1)

    own, ours = both(lambda: logits(quantised_caches(model, bits)))
    # The next layer's keys are rounded to codes, and those that nearly tie may tip: a part of what
    # rounding all of them does. The operation itself is compared with float64 below.
    assert error(ours, own) <= 0.5 * error(own, logits([KVCache() for _ in model.layers]))
    layers = len(model.layers)
    assert [call[:3] for call in calls[:layers]] == [(LENGTH, LENGTH, True)] * layers
    assert not any(has_mask for *_, has_mask, _ in calls)
    # Four heads of 256 share a key in Gemma: mlx-lm would copy it for each of them.
    decoded = layers * 8 if (name, bits) == ("gemma3_text", 8) else 0
    assert sum(len_q == 1 for len_q, *_ in calls) == decoded


@pytest.mark.parametrize("bits", [4, 8])
def test_greedy_tokens_of_quantised_caches(tokens, bits):
    model = tiny_mlx_models.tiny_model("llama")
    options = {"kv_bits": bits, "quantized_kv_start": 0, "prefill_step_size": 24}
    own, ours = both(lambda: greedy(model, tokens[0], **options))
    assert len(own) == NEW_TOKENS and ours == own


def quantised_attention(q, k, v, mask, bits, group_size):
    q = mx.array(q)  # mlx-lm's own scales it in place
    return base.quantized_scaled_dot_product_attention(
        q, k, v, scale=q.shape[-1] ** -0.5, mask=mask, group_size=group_size, bits=bits
    )


def quantised_problem(heads_q, heads_kv, dim, len_q, len_k, bits, group_size, dtype=mx.float32):
    """q and, as caches hold them, slices of keys and values with room for more."""
    mx.random.seed(3)
    q = mx.random.normal((2, heads_q, len_q, dim)).astype(dtype)
    buffers = [mx.random.normal((2, heads_kv, len_k + 9, dim)).astype(dtype) for _ in "kv"]
    packed = [mx.quantize(each, group_size=group_size, bits=bits) for each in buffers]
    mx.eval(q, packed)
    return [q, *(tuple(each[:, :, :len_k] for each in tensor) for tensor in packed)]


def attention_in_float64(q, k, v, mask, bits, group_size):
    k, v = (numpy_of(mx.dequantize(*each, group_size=group_size, bits=bits)) for each in (k, v))
    q = numpy_of(q)
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(each, group, axis=1) for each in (k, v))
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    if isinstance(mask, str):
        mask = mx.array(np.tri(*scores.shape[-2:], scores.shape[-1] - scores.shape[-2], dtype=bool))
    if mask is not None:
        boolean = mask.dtype == mx.bool_
        scores = np.where(np.array(mask), scores, -np.inf) if boolean else scores + numpy_of(mask)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return mx.array((weights / weights.sum(axis=-1, keepdims=True) @ v).astype(np.float32))


@pytest.mark.parametrize("mask", [None, "causal", "boolean", "additive", "of each sequence"])
@pytest.mark.parametrize("bits,group_size", [(2, 64), (4, 32), (4, 128), (8, 64), (8, 32)])
@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (2, 2)])
def test_attention_over_quantised_caches(calls, heads, bits, group_size, mask):
    problem = quantised_problem(*heads, 128, 256, 300, bits, group_size)
    seen = mx.random.uniform(shape=(256, 300)) > 0.3
    array = {
        "boolean": seen,
        "additive": mx.random.normal((256, 300)),
        "of each sequence": mx.stack([seen, mx.arange(300) != seen])[:, None],
    }
    mask = array.get(mask, mask)
    own, ours = both(lambda: quantised_attention(*problem, mask, bits, group_size))
    exact = attention_in_float64(*problem, mask, bits, group_size)
    assert len(calls) == 1
    assert error(ours, exact) <= 1e-6
    assert error(own, exact) <= 1e-5


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_attention_over_quantised_caches_in_16_bits(calls, dtype, bits):
    problem = quantised_problem(8, 1, 128, 5, 300, bits, 64, dtype)
    own, ours = both(lambda: quantised_attention(*problem, "causal", bits, 64))
    assert len(calls) == 1 and ours.dtype == own.dtype == dtype
    exact = attention_in_float64(*problem, "causal", bits, 64)
    assert error(ours, exact) <= 1.2 * error(own, exact)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_widened_as_mlx_does(dtype, bits):
    from widehead.mlx import _quantised

    tensor = quantised_problem(1, 2, 128, 1, 50, bits, 32, dtype)[1]
    expected = mx.dequantize(*tensor, group_size=32, bits=bits)
    assert mx.array_equal(_quantised.widened(tensor, 32, bits), expected)


@pytest.mark.parametrize("heads,dim,dtype,len_q,bits", [
    ((4, 1), 256, mx.float32, 1, 8), ((4, 1), 256, mx.float32, 1, 4),
    ((4, 1), 256, mx.bfloat16, 1, 4), ((2, 2), 64, mx.float32, 1, 8),
    ((2, 2), 64, mx.float32, 160, 4), ((4, 1), 256, mx.float32, 64, 4),
    ((16, 2), 64, mx.float32, 1, 4), ((16, 2), 64, mx.bfloat16, 16, 8),
])  # fmt: skip
def test_quantised_caches_take_no_more_memory(calls, heads, dim, dtype, len_q, bits):
    problem = quantised_problem(*heads, dim, len_q, 2048, bits, 64, dtype)

    def peak():
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(quantised_attention(*problem, "causal", bits, 64))
        return mx.get_peak_memory() - before

    # Where MLX's thread is late, mlx-lm's copy of the keys is gone before that of the values is made.
    own, ours = both(lambda: max(peak() for _ in range(8)))
    assert ours <= own
    # mlx-lm's own, unless it copies the cache for every head or has scores of many queries.
    stays = (heads == (2, 2) and len_q == 1) or (len_q, bits, dtype) == (1, 4, mx.float32) and dim == 256
    assert len(calls) == (0 if stays else 8)


def test_the_log_says_who_serves_quantised_caches(monkeypatch, capfd):
    monkeypatch.setenv("WIDEHEAD_LOG", "plan")
    for bits in (4, 8):
        problem = quantised_problem(4, 1, 256, 1, 77, bits, 64)
        both(lambda: quantised_attention(*problem, None, bits, 64))  # noqa: B023
    log = capfd.readouterr().err
    assert "[2, 4, 1, 256] x 77: mlx-lm's own; its copies and scores take" in log
    assert "[2, 4, 1, 256] x 77: keys and values of 8 bits are widened for this call" in log


def test_wrong_arguments_over_quantised_caches():
    problem = quantised_problem(4, 1, 256, 8, 77, 8, 64)
    with widehead.mlx.override_sdpa(), pytest.raises(ValueError, match='mask is "?\'?diagonal'):
        quantised_attention(*problem, "diagonal", 8, 64)
    with widehead.mlx.override_sdpa(), pytest.raises(ValueError, match="mask"):
        quantised_attention(*problem, mx.zeros((3, 5)), 8, 64)


def test_windows_arrive_as_structure(tokens, calls):
    """No array where mlx-lm would make queries x keys booleans, and none is ever computed."""
    model = tiny_mlx_models.tiny_model("gemma3_text")
    with widehead.mlx.override_sdpa():
        mx.eval(chunked(model, tokens[:1], make_prompt_cache(model)))
    assert not any(has_mask for *_, has_mask, _ in calls)
    windows = [window for len_q, *_, window, _, _ in calls if len_q > 1]
    assert tiny_mlx_models.WINDOW - 1 in windows and -1 in windows
    # Attention that is given another array than the one that was made takes the array.
    q = mx.random.normal((1, 2, 8, 16))
    with widehead.mlx.override_sdpa():
        mask = base.create_causal_mask(8, window_size=3)
        calls.clear()
        whole = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=mask)
        mask &= mx.arange(8) != 2  # the same object, another array
        less = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=mask)
    assert [call[4] for call in calls] == [False, True]
    rows = mx.arange(8)[:, None]
    window = (mx.arange(8) <= rows) & (mx.arange(8) > rows - 3)
    own = mx.fast.scaled_dot_product_attention
    assert error(whole, own(q, q, q, scale=1.0, mask=window)) <= 1e-6
    expected = own(q, q, q, scale=1.0, mask=window & (mx.arange(8) != 2))
    assert error(less[:, :, 3:], expected[:, :, 3:]) <= 1e-6  # row 2 sees keys 0 and 1 alone
    assert error(less[:, :, :3], expected[:, :, :3]) <= 1e-6


def test_masks_are_forgotten():
    with widehead.mlx.override_sdpa():
        for _ in range(100):
            base.create_causal_mask(8, window_size=3)
    assert len(widehead.mlx._masks._known) <= 1


def test_everything_is_given_back():
    from mlx_lm.models import cache, gemma2

    def patched():
        return (
            base.create_causal_mask, cache.create_causal_mask, gemma2.Attention.__call__,
            mx.fast.scaled_dot_product_attention, base.quantized_scaled_dot_product_attention,
        )  # fmt: skip

    before = patched()
    with widehead.mlx.override_sdpa():
        assert not set(map(id, patched())) & set(map(id, before))
    assert patched() == before
