"""widehead.mlx.sdpa over the options of MLX's fast attention, against float64; and its place in MLX."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from oracle import BOUNDS, oracle

mx = pytest.importorskip("mlx.core")

import widehead  # noqa: E402
import widehead.mlx  # noqa: E402
from mlx_arrays import DTYPES, arrays, error, numpy_of  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def primitive():
    assert widehead.mlx.why_no_primitive is None


RANDOM = np.random.default_rng(7)
BOOLEAN = RANDOM.random((2, 4, 33, 77)) < 0.7
ADDITIVE = RANDOM.standard_normal((2, 4, 33, 77)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, "causal", "boolean", "additive"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_masks_and_sinks_in_every_type(dtype, mask, with_sinks):
    tensors, exact = arrays(dtype)
    options = {"causal": mask == "causal"}
    if mask in ("boolean", "additive"):
        array = mx.array(BOOLEAN if mask == "boolean" else ADDITIVE)
        mask = array if array.dtype == mx.bool_ else array.astype(DTYPES[dtype])
        options["mask"] = BOOLEAN if array.dtype == mx.bool_ else numpy_of(mask)
    sinks = mx.array([0.5, -1, 2, 0]).astype(DTYPES[dtype]) if with_sinks else None
    if with_sinks:
        options["sinks"] = numpy_of(sinks)
    out = widehead.mlx.sdpa(*tensors, scale=0.1, mask=mask, sinks=sinks)
    assert out.dtype == DTYPES[dtype]
    assert error(out, oracle(*exact, scale=0.1, **options)[0]) <= BOUNDS[dtype]


@pytest.mark.parametrize("shape", [(77,), (1,), (33, 77), (33, 1), (1, 77), (4, 33, 77), (1, 33, 77),
                                   (2, 1, 33, 77), (1, 4, 1, 77), (2, 1, 1, 77)])  # fmt: skip
@pytest.mark.parametrize("full", [BOOLEAN, ADDITIVE])
def test_masks_of_every_rank(shape, full):
    tensors, exact = arrays()
    mask = full[tuple(slice(size) for size in (1, 1, 1, 1)[: 4 - len(shape)] + shape)].reshape(shape)
    out = widehead.mlx.sdpa(*tensors, scale=0.1, mask=mx.array(mask))
    assert error(out, oracle(*exact, scale=0.1, mask=mask)[0]) <= BOUNDS["float32"]


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16, mx.int32, mx.uint8])
def test_masks_of_types_that_promote_are_added(kind):
    tensors, exact = arrays()
    mask = mx.array(RANDOM.integers(0, 4, (33, 77))).astype(kind)
    own = mx.fast.scaled_dot_product_attention(*tensors, scale=0.1, mask=mask)
    out = widehead.mlx.sdpa(*tensors, scale=0.1, mask=mask)
    assert error(out, numpy_of(own)) <= 2e-6


def test_minus_infinity_hides_keys_and_what_they_hold():
    (q, k, v), exact = arrays()
    mask = np.where(BOOLEAN, ADDITIVE, -np.inf)
    mask[..., 5] = -np.inf
    poisoned = mx.array(np.where(np.arange(77)[:, None] == 5, np.nan, exact[2]).astype(np.float32))
    for given in (mx.array(mask.astype(np.float32)), mx.array(np.isfinite(mask))):
        expected = mask if given.dtype != mx.bool_ else np.isfinite(mask)
        out = widehead.mlx.sdpa(q, k, poisoned, scale=0.1, mask=given)
        assert error(out, oracle(*exact, scale=0.1, mask=expected)[0]) <= BOUNDS["float32"]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("length", [(1, 300), (5, 300), (200, 300), (33, 33)])
@pytest.mark.parametrize("dim", [(64, 64), (256, 256), (512, 512), (192, 128)])
def test_grouped_heads_lengths_and_dimensions(heads, length, dim):
    tensors, exact = arrays(heads=heads, length=length, dim=dim)
    out = widehead.mlx.sdpa(*tensors, scale=0.06, mask="causal")
    assert error(out, oracle(*exact, scale=0.06, causal=True)[0]) <= BOUNDS["float32"]


def test_beyond_mlx():
    tensors, exact = arrays()
    options = {"scale": 0.3, "softcap": 2.0, "key_starts": [3, 70]}
    out = widehead.mlx.sdpa(
        *tensors, mask="causal", window=9, **(options | {"key_starts": mx.array([3, 70])})
    )
    expected = oracle(*exact, causal=True, window=(9, None), **options)[0]
    assert error(out, expected) <= BOUNDS["float32"]


def test_types_promote_as_mlx_promotes_them():
    (q, k, v), exact = arrays()
    for kinds in ((mx.bfloat16, mx.float32, mx.float32), (mx.float16, mx.bfloat16, mx.float16)):
        mixed = [each.astype(kind) for each, kind in zip((q, k, v), kinds, strict=True)]
        own = mx.fast.scaled_dot_product_attention(*mixed, scale=0.1)
        ours = widehead.mlx.sdpa(*mixed, scale=0.1)
        assert ours.dtype == own.dtype == mx.float32
        assert error(ours, numpy_of(own)) <= 2e-6


def test_a_cache_that_is_longer_than_what_is_in_it():
    (q, k, v), exact = arrays(length=(33, 256))
    out = widehead.mlx.sdpa(q, k[:, :, :77], v[:, :, :77], scale=0.1, mask="causal")
    expected = oracle(exact[0], *(each[:, :, :77] for each in exact[1:]), scale=0.1, causal=True)[0]
    assert error(out, expected) <= BOUNDS["float32"]


def test_transposed_and_reversed_views():
    (q, k, v), exact = arrays()
    rows = mx.contiguous(q.swapaxes(1, 2)).swapaxes(1, 2)  # as a projection leaves it
    out = widehead.mlx.sdpa(rows, k[:, ::-1, ::-1], v[:, ::-1, ::-1], scale=0.1)
    reversed_ = [each[:, ::-1, ::-1] for each in exact[1:]]
    assert error(out, oracle(exact[0], *reversed_, scale=0.1)[0]) <= BOUNDS["float32"]


@pytest.mark.parametrize("is_boolean", [True, False])
def test_reversed_masks(is_boolean):
    tensors, exact = arrays()
    numbers = np.random.default_rng(5).standard_normal((4, 33, 77)).astype(np.float32)
    mask = numbers > 0 if is_boolean else numbers
    for axes in (np.s_[:, :, ::-1], np.s_[:, ::-1], np.s_[::-1, ::-1, ::-2]):
        keys = np.s_[:, :, : mask[axes].shape[-1]]
        q, k, v = tensors[0], tensors[1][keys], tensors[2][keys]
        out = widehead.mlx.sdpa(q, k, v, scale=0.1, mask=mx.array(mask)[axes])
        of_exact = (exact[0], exact[1][keys], exact[2][keys])
        assert error(out, oracle(*of_exact, scale=0.1, mask=mask[axes])[0]) <= BOUNDS["float32"]

    def loss(q, mask):
        return widehead.mlx.sdpa(q, *tensors[1:], scale=0.1, mask=mask).sum()

    gradient = mx.grad(loss)(tensors[0], mx.array(mask)[:, :, ::-1])
    expected = mx.grad(loss)(tensors[0], mx.array(np.ascontiguousarray(mask[:, :, ::-1])))
    assert mx.array_equal(gradient, expected)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"q": np.zeros((2, 4, 33, 64), np.float32)}, "q is a ndarray; it must be an mlx.core.array"),
        ({"mask": [[True]]}, "mask is a list; it must be an mlx.core.array or None"),
        ({"key_starts": [1, 2]}, "key_starts is a list; it must be an mlx.core.array or None"),
        ({"key_starts": mx.array([1.5, 2])}, "key_starts is mlx.core.float32; it must be of whole"),
        ({"scale": None}, "scale is None; it must be a number"),
        ({"scale": float("nan")}, "scale is nan; it must be finite"),
        ({"softcap": -1.0}, "softcap is -1.0; it must be positive"),
        ({"softcap": 1e-60}, "softcap is 1e-60; it must be positive in float32"),
        ({"window": 1.5}, "window is 1.5; it must be a number of keys from 0 to 2147483647, or None"),
        ({"window": 2**40}, "window is 1099511627776; it must be a number of keys"),
        ({"window": "x"}, "window is 'x'; it must be a number of keys"),
        ({"stream": "x"}, "stream is 'x'; it must be a stream or device of mlx.core, such as"),
        ({"stream": 0}, "stream is 0; it must be a stream or device of mlx.core"),
    ],
)
def test_arguments_of_another_type_are_named_at_once(options, words):
    given = dict(zip("qkv", arrays()[0], strict=True)) | {"scale": 0.1} | options
    with pytest.raises((TypeError, ValueError)) as raised:
        widehead.mlx.sdpa(**given)
    assert words in str(raised.value)


def test_limits_of_another_type_are_no_limits():
    with pytest.raises(TypeError, match="limits is {}"):
        widehead.mlx.install(limits={})


def test_nothing_to_do():
    q, k, v = (mx.zeros((1, 2, length, 16)) for length in (0, 5, 5))
    assert widehead.mlx.sdpa(q, k, v, scale=1.0).shape == (1, 2, 0, 16)
    out = widehead.mlx.sdpa(k, q, q, scale=1.0)  # no keys
    assert mx.array_equal(out, mx.zeros((1, 2, 5, 16)))


def test_a_row_without_keys_is_zero():
    tensors, _ = arrays()
    mask = mx.zeros((33, 77), mx.bool_)
    assert mx.array_equal(widehead.mlx.sdpa(*tensors, scale=1.0, mask=mask), mx.zeros((2, 4, 33, 48)))


def test_the_result_joins_its_heads_without_a_copy():
    tensors, exact = arrays()
    out = widehead.mlx.sdpa(*tensors, scale=0.1)
    mx.eval(out)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    joined = out.swapaxes(1, 2).reshape(2, 33, -1)
    mx.eval(joined)
    assert mx.get_peak_memory() - before < joined.nbytes
    expected = oracle(*exact, scale=0.1)[0].transpose(0, 2, 1, 3).reshape(2, 33, -1)
    assert error(joined, expected) <= BOUNDS["float32"]


def test_scores_are_never_in_memory():
    q, k, v = (mx.random.normal((1, 4, length, 256)) for length in (512, 4096, 4096))
    mx.eval(q, k, v)

    def peak(function):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(function(q, k, v, scale=0.06, mask="causal"))
        return mx.get_peak_memory() - before

    scores_bytes = 4 * 512 * 4096 * 4
    assert peak(widehead.mlx.sdpa) < scores_bytes / 4
    assert peak(mx.fast.scaled_dot_product_attention) > scores_bytes


def test_laziness(capfd):
    """What nobody asks for is never planned, let alone computed."""
    script = """
import mlx.core as mx, widehead.mlx
q = mx.random.normal((1, 2, 7, 48))
out = widehead.mlx.sdpa(q, q, q, scale=1.0)
print("built", flush=True)
import sys
if len(sys.argv) > 1: mx.eval(out)
"""
    def lines(*arguments):
        done = run_python(script, *arguments, WIDEHEAD_LOG="plan")
        return [line for line in done.stderr.splitlines() if "7 x 7" in line]

    assert lines() == []
    assert len(lines("evaluate")) == 1


def run_python(script, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_what_is_compiled_for_any_shape_checks_later_ones():
    """Else a mask, sinks or starts of other sizes would be read beyond their ends."""

    @lambda function: mx.compile(function, shapeless=True)
    def attend(q, mask, sinks, starts):
        return widehead.mlx.sdpa(q, q, q, scale=1.0, mask=mask, sinks=sinks, key_starts=starts)

    def of(shape, length, heads, batch):
        mask = mx.ones((length, length), mx.bool_)
        return attend(mx.ones((*shape, 16)), mask, mx.ones((heads,)), mx.zeros((batch,), mx.int32))

    mx.eval(of((2, 2, 4), 4, 2, 2), of((3, 4, 9), 9, 4, 3))
    for others, words in (((4, 2, 2), "mask is"), ((9, 4, 2), "sinks is"), ((9, 2, 3), "key_starts is")):
        with pytest.raises(ValueError, match=words):
            of((2, 2, 9), *others)


@pytest.mark.parametrize("shapeless", [False, True])
def test_compiled(shapeless):
    """Calls that differ in an option alone stay two calls; another length needs no new trace."""
    traces = []

    @lambda function: mx.compile(function, shapeless=shapeless)
    def both(q, k, v):
        traces.append(1)
        one = widehead.mlx.sdpa(q, k, v, scale=0.1, mask="causal")
        two = widehead.mlx.sdpa(q, k, v, scale=0.1)
        same = widehead.mlx.sdpa(q, k, v, scale=0.1)
        return one, two + same

    for length in ((33, 77), (20, 40)):
        (q, k, v), exact = arrays(length=length)
        one, two = both(q, k, v)
        assert error(one, oracle(*exact, scale=0.1, causal=True)[0]) <= BOUNDS["float32"]
        assert error(two, 2 * oracle(*exact, scale=0.1)[0]) <= BOUNDS["float32"]
    assert len(traces) == (1 if shapeless else 2)


def test_streams_and_threads():
    tensors, exact = arrays()
    expected = oracle(*exact, scale=0.1)[0]
    devices = (mx.cpu, mx.Device(mx.cpu, 0))
    for stream in (mx.new_stream(mx.cpu), mx.new_thread_local_stream(mx.cpu), *devices):
        assert error(widehead.mlx.sdpa(*tensors, scale=0.1, stream=stream), expected) <= 4e-6
    errors = []

    def work():
        with mx.stream(mx.new_stream(mx.cpu)):
            copies = [mx.array(numpy_of(each).astype(np.float32)) for each in tensors]
            for _ in range(20):
                errors.append(error(widehead.mlx.sdpa(*copies, scale=0.1), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 80 and max(errors) <= BOUNDS["float32"]


def test_chained_calls_are_one_graph():
    (q, _, _), exact = arrays(heads=(4, 4), length=(33, 33), dim=(64, 64))
    out, expected = q, exact[0]
    for _ in range(4):
        out = widehead.mlx.sdpa(out, q, q, scale=0.1)
        expected = oracle(expected, exact[0], exact[0], scale=0.1)[0]
    assert error(out, expected) <= 1e-5


@pytest.mark.parametrize(
    "change, words",
    [
        ({"q": (2, 33, 64)}, "q is (2,33,64); it must have 4 dimensions"),
        ({"k": (2, 2, 77, 32)}, "k is (2,2,77,32); it must have q's batch and last dimension"),
        ({"v": (2, 2, 76, 48)}, "v is (2,2,76,48); it must have k's batch, heads and length"),
        ({"q": (2, 5, 33, 64)}, "q has 5 heads and k 2; q's must be a multiple"),
        ({"v": (2, 2, 77, 1025)}, "a head has 1025 dimensions; valid: 1 to 1024"),
        ({"mask": (32, 77)}, "mask is (32,77); it must broadcast to"),
        ({"mask": (1, 2, 4, 33, 77)}, "mask is (1,2,4,33,77); it must broadcast to"),
        ({"sinks": (3,)}, "sinks is (3); it must be [heads_q], here [4]"),
        ({"key_starts": (3,)}, "key_starts is (3); it must be [batch], here [2]"),
    ],
)
def test_messages(change, words):
    tensors, exact = arrays()
    given = dict(zip("qkv", tensors, strict=True)) | {
        name: mx.zeros(shape, mx.int32 if name == "key_starts" else mx.float32)
        for name, shape in change.items()
    }
    with pytest.raises(ValueError) as raised:
        widehead.mlx.sdpa(given.pop("q"), given.pop("k"), given.pop("v"), scale=1.0, **given)
    assert words in str(raised.value)
    # The stream is as good as before.
    out = widehead.mlx.sdpa(*tensors, scale=0.1)
    assert error(out, oracle(*exact, scale=0.1)[0]) <= BOUNDS["float32"]


def test_messages_of_values_and_types():
    (q, k, v), _ = arrays()
    half = [each.astype(mx.float16) for each in (q, k, v)]
    for call, words in (
        (lambda: widehead.mlx.sdpa(q, k, v, scale=1.0, mask="top"), "mask is 'top'; valid"),
        (lambda: widehead.mlx.sdpa(q, k, v, scale=1.0, window=-1), "window is -1; it must be"),
        (lambda: widehead.mlx.sdpa(*half, scale=1.0, mask=mx.zeros((33, 77))),
         "mask is float32; it must be bool or promote to float16"),
        (lambda: widehead.mlx.sdpa(*half, scale=1.0, sinks=mx.zeros((4,))),
         "sinks is float32; it must promote to float16"),
        (lambda: widehead.mlx.sdpa(*(each.astype(mx.int32) for each in half), scale=1.0),
         "q, k and v promote to int32"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as raised:
            call()
        assert words in str(raised.value)


def test_a_failure_while_running_leaves_the_stream_usable():
    tensors, exact = arrays()
    limits = widehead.mlx._primitive_limits(widehead.Limits())
    with pytest.raises(RuntimeError, match="scale"):  # the C API's own check, on MLX's stream
        mx.eval(widehead.mlx._primitive.attention(
            *tensors, float("nan"), False, -1, 0.0, None, None, None, limits, None
        ))  # fmt: skip
    out = widehead.mlx.sdpa(*tensors, scale=0.1)
    assert error(out, oracle(*exact, scale=0.1)[0]) <= BOUNDS["float32"]


def test_limits():
    tensors, exact = arrays()
    with pytest.raises(widehead.Refused) as refused:
        widehead.mlx.sdpa(*tensors, scale=0.1, limits=widehead.Limits(workspace=0))
    assert "cpu_prefill" in {each.kernel for each in refused.value.candidates}
    for limits in (widehead.Limits(kernel="cpu_unfused"), widehead.Limits(threads=1)):
        out = widehead.mlx.sdpa(*tensors, scale=0.1, limits=limits)
        assert error(out, oracle(*exact, scale=0.1)[0]) <= BOUNDS["float32"]
    out = widehead.mlx.sdpa(*tensors, scale=0.1, force_fused=True)
    assert error(out, oracle(*exact, scale=0.1)[0]) <= BOUNDS["float32"]


def test_plan():
    q, k, v = (mx.zeros((1, heads, length, 256)) for heads, length in ((8, 64), (2, 9000), (2, 9000)))
    plan = widehead.mlx.plan(q, k, v, mask="causal")
    assert plan.kernel == widehead.plan(*map(numpy_of_f32, (q, k, v)), causal=True).kernel
    assert plan.workspace_bytes > 0 and "causal" in plan.explain()
    half = [each.astype(mx.bfloat16) for each in (q, k, v)]
    assert "bf16" in widehead.mlx.plan(*half, sinks=mx.zeros((8,)), softcap=3.0).explain()
    assert widehead.mlx.plan(q, k, v, limits=widehead.Limits(workspace=0)).kernel is None
    cache = widehead.Spec((1, 2, 131072, 512), "bfloat16")  # which need not exist
    long = widehead.mlx.plan(widehead.Spec((1, 8, 1, 512), "bfloat16"), cache, cache)
    assert long.kernel == "cpu_decode"


def numpy_of_f32(array):
    return np.array(array)


@pytest.mark.parametrize("options", [{}, {"mask": "causal"}, {"mask": BOOLEAN}, {"mask": ADDITIVE},
                                     {"sinks": np.float32([0.5, -1, 2, 0])}])  # fmt: skip
def test_gradients_and_maps_are_those_of_mlx(options):
    (q, k, v), _ = arrays()
    options = {
        name: mx.array(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }

    def loss(function):
        return lambda q, k, v: (function(q, k, v, scale=0.1, **options) ** 2).sum()

    own, ours = mx.fast.scaled_dot_product_attention, widehead.mlx.sdpa
    for one, two in zip(
        mx.grad(loss(ours), argnums=(0, 1, 2))(q, k, v),
        mx.grad(loss(own), argnums=(0, 1, 2))(q, k, v),
        strict=True,
    ):
        assert error(one, numpy_of(two)) <= 1e-5
    tangents = [mx.random.normal(each.shape) for each in (q, k, v)]
    _, (one,) = mx.jvp(lambda *a: ours(*a, scale=0.1, **options), [q, k, v], tangents)
    _, (two,) = mx.jvp(lambda *a: own(*a, scale=0.1, **options), [q, k, v], tangents)
    assert error(one, numpy_of(two)) <= 1e-5
    several = mx.stack([q, 2 * q, -q])
    mapped = mx.vmap(lambda q: ours(q, k, v, scale=0.1, **options))(several)
    for i in range(3):
        one = ours(several[i], k, v, scale=0.1, **options)
        assert error(mapped[i], numpy_of(one)) <= 1e-5


def test_gradients_of_what_mlx_lacks():
    """Softcap, window and key starts, by finite differences."""
    (q, k, v), _ = arrays(batch=2, heads=(2, 1), length=(3, 9), dim=(8, 8))

    def loss(q):
        out = widehead.mlx.sdpa(
            q, k, v, scale=0.5, mask="causal", window=4, softcap=2.0, key_starts=mx.array([0, 5])
        )
        return (out * mx.cos(mx.arange(out.size).reshape(out.shape))).sum()

    gradient = mx.grad(loss)(q)
    direction = mx.random.normal(q.shape, key=mx.random.key(3))
    step = 1e-2
    numeric = (loss(q + step * direction) - loss(q - step * direction)) / (2 * step)
    assert abs(numeric.item() - (gradient * direction).sum().item()) <= 2e-3 * abs(numeric.item()) + 1e-3


def test_override_takes_and_gives_back():
    own = mx.fast.scaled_dot_product_attention
    tensors, exact = arrays()
    with widehead.mlx.override_sdpa():
        assert mx.fast.scaled_dot_product_attention is not own
        out = mx.fast.scaled_dot_product_attention(*tensors, scale=0.1, mask="causal")
        with widehead.mlx.override_sdpa(widehead.Limits(workspace=0)):
            with pytest.raises(widehead.Refused):
                mx.fast.scaled_dot_product_attention(*tensors, scale=0.1)
    assert mx.fast.scaled_dot_product_attention is own
    assert error(out, oracle(*exact, scale=0.1, causal=True)[0]) <= BOUNDS["float32"]
    with pytest.raises(ZeroDivisionError), widehead.mlx.override_sdpa():
        1 / 0
    assert mx.fast.scaled_dot_product_attention is own
    widehead.mlx.install()
    assert mx.fast.scaled_dot_product_attention is not own
    widehead.mlx.uninstall()
    assert mx.fast.scaled_dot_product_attention is own
    with pytest.raises(RuntimeError, match="not installed"):
        widehead.mlx.uninstall()


def test_what_is_out_of_reach_goes_to_mlx_and_the_log_says_so():
    script = """
import mlx.core as mx, widehead.mlx
q = mx.random.normal((1, 1, 3, 1100))
own = mx.fast.scaled_dot_product_attention(q, q, q, scale=0.02)
with widehead.mlx.override_sdpa():
    for _ in range(2):
        assert mx.array_equal(mx.fast.scaled_dot_product_attention(q, q, q, scale=0.02), own)
"""
    lines = run_python(script, WIDEHEAD_LOG="plan").stderr.splitlines()
    words = "[1, 1, 3, 1100] x 3: MLX's own; a head has 1100 dimensions"
    assert len([line for line in lines if words in line]) == 1


def test_layers_of_mlx_nn_take_it():
    nn = pytest.importorskip("mlx.nn")
    layer = nn.MultiHeadAttention(64, 4)
    x = mx.random.normal((2, 9, 64))
    mask = nn.MultiHeadAttention.create_additive_causal_mask(9)
    own = layer(x, x, x, mask)
    with widehead.mlx.override_sdpa():
        assert error(layer(x, x, x, mask), numpy_of(own)) <= 1e-5


WITHOUT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import widehead.mlx
import mlx.core as mx
print(len(caught), widehead.mlx.why_no_primitive)
q = mx.random.normal((1, 4, 9, 64))
own = mx.fast.scaled_dot_product_attention
sinks = mx.array([0.5, -1, 2, 0])
with widehead.mlx.override_sdpa():
    ours = mx.fast.scaled_dot_product_attention(q, q, q, scale=0.1, mask="causal", sinks=sinks)
assert mx.allclose(ours, own(q, q, q, scale=0.1, mask="causal", sinks=sinks), atol=1e-5)
mask = mx.random.normal((9, 9)).astype(mx.bfloat16)
half = q.astype(mx.bfloat16)
ours = widehead.mlx.sdpa(half, half, half, scale=0.1, mask=mask)
assert ours.dtype == mx.bfloat16 and mx.allclose(ours, own(half, half, half, scale=0.1, mask=mask), atol=0.05)
function = lambda q: widehead.mlx.sdpa(q, q, q, scale=0.1).sum()
for transformed in (mx.grad(function), mx.compile(function), mx.vmap(lambda q: function(q[None]))):
    try:
        mx.eval(transformed(q))
        raise SystemExit("a tracer was taken")
    except ValueError as error:
        assert "takes no mx.grad, mx.vmap and mx.compile" in str(error), error
"""


def test_without_a_primitive_by_choice():
    assert "0 the environment says" in run_python(WITHOUT, WIDEHEAD_MLX="dlpack").stdout


@pytest.mark.parametrize(
    "compiler, words", [("/nonexistent", "no C++ compiler"), ("false", "false failed: no message")]
)
def test_without_a_compiler(tmp_path, compiler, words):
    environment = {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    first = run_python(WITHOUT, **environment)
    assert first.stdout.startswith("1 ") and words in first.stdout
    # What failed is not tried again at every import, but by the command that is for it.
    again = run_python(WITHOUT, **environment)
    assert words in again.stdout and "building" not in again.stderr
    command = [sys.executable, "-m", "widehead.mlx"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1 and words in done.stdout


def test_the_command_names_the_primitive():
    done = subprocess.run([sys.executable, "-m", "widehead.mlx"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"a primitive for MLX {mx.__version__}" in done.stdout
