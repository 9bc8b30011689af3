"""widehead.jax.sdpa beside jax.nn.dot_product_attention, and its gradients."""

import numpy as np
import pytest
from oracle import BOUNDS, oracle, oracle_gradients, relative_rms

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import widehead  # noqa: E402
import widehead.jax  # noqa: E402

own, ours = jax.nn.dot_product_attention, widehead.jax.sdpa


def arrays(batch=2, heads=(4, 2), lengths=(33, 77), dims=(64, 64), dtype=jnp.float32):
    """query, key and value, [batch, length, heads, dim]."""
    shapes = [(batch, length, h, dim) for length, h, dim in (
        (lengths[0], heads[0], dims[0]), (lengths[1], heads[1], dims[0]), (lengths[1], heads[1], dims[1])
    )]  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def numpy_of(array):
    return np.asarray(array).astype(np.float64)


def assert_close(have, want, bound):
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert relative_rms(numpy_of(one), numpy_of(other)) <= bound


RANDOM = np.random.default_rng(3)
MASK = jnp.asarray(RANDOM.random((2, 1, 33, 77)) < 0.8)
BIAS = jnp.asarray(RANDOM.standard_normal((1, 4, 33, 77)).astype(np.float32))
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "local_window_size": (9, 0)},
    "mask": {"mask": MASK},
    "bias": {"bias": jax.lax.stop_gradient(BIAS)},
    "mask and bias": {"mask": MASK, "bias": BIAS},
    "lengths": {"query_seq_lengths": [20, 33], "key_value_seq_lengths": [40, 77], "is_causal": True},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_outputs_and_gradients_are_those_of_jax(case):
    options = {name: jnp.asarray(each, jnp.int32) if name.endswith("lengths") else each
               for name, each in OPTIONS[case].items()}  # fmt: skip
    tensors = arrays()

    def loss(function):
        def of(*tensors):
            out = function(*tensors, **options)
            return jnp.sin(3 * out).sum(), out

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True))

    assert_close(loss(ours)(*tensors), loss(own)(*tensors), 2e-5)


def test_windows_on_both_sides():
    tensors = arrays(lengths=(50, 50))
    for window in (7, (3, 9)):
        expected = own(*tensors, local_window_size=window)
        for given in (window, np.int64(7) if window == 7 else list(window)):
            assert_close(ours(*tensors, local_window_size=given), expected, 1e-5)


def test_numbers_may_be_arrays():
    tensors = arrays()
    have = ours(*tensors, scale=jnp.float32(0.5), softcap=np.float32(2))
    assert_close(have, ours(*tensors, scale=0.5, softcap=2.0), 0)
    assert_close(ours(*tensors, softcap=jnp.float32(2)), ours(*tensors, softcap=2), 0)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("dims", [(256, 256), (192, 128)])
def test_float64_in_every_type_softcap_and_sinks(dtype, dims):
    tensors = [*arrays(dims=dims, dtype=dtype), jnp.asarray([0.5, -1, 2, 0], jnp.float32)]
    exact = [numpy_of(each).swapaxes(1, 2) for each in tensors[:3]]
    options = {"scale": 0.05, "softcap": 2.0}

    def function(q, k, v, sinks):
        return ours(q, k, v, is_causal=True, sinks=sinks, **options)

    out, pull = jax.vjp(jax.jit(function), *tensors)
    options |= {"causal": "top_left", "sinks": numpy_of(tensors[3])}
    assert out.dtype == dtype
    assert relative_rms(numpy_of(out).swapaxes(1, 2), oracle(*exact, **options)[0]) <= BOUNDS[dtype]
    d_out = jax.random.normal(jax.random.key(1), out.shape).astype(dtype)
    expected = oracle_gradients(*exact, numpy_of(d_out).swapaxes(1, 2), **options)
    for have, want, tensor in zip(pull(d_out), expected, tensors, strict=True):
        assert have.dtype == tensor.dtype
        have = numpy_of(have).swapaxes(1, 2) if have.ndim == 4 else numpy_of(have)
        assert relative_rms(have, want) <= 4 * BOUNDS[dtype]


def test_without_a_batch_and_with_the_residual():
    tensors = arrays()
    singles = [each[0] for each in tensors]
    assert_close(ours(*singles, is_causal=True), ours(*tensors, is_causal=True)[0], 0)
    assert_close(ours(*tensors, return_residual=True), own(*tensors, return_residual=True), 1e-5)
    assert_close(ours(*singles, return_residual=True), own(*singles, return_residual=True), 1e-5)


def test_checkpoints_and_maps():
    tensors = arrays(batch=3)

    def loss(*tensors):
        return jnp.sin(ours(*tensors)).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    expected = gradients(*tensors)
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))(*tensors), expected, 0)
    assert_close(jax.vmap(gradients)(*tensors), expected, 1e-6)  # of three without a batch


def test_one_compilation_serves_later_calls_and_large_arrays():
    tensors = arrays(batch=1, heads=(8, 2), lengths=(1024, 1024), dims=(256, 256))
    traces = []

    @jax.jit
    def gradients(*tensors):
        traces.append(1)
        return jax.grad(lambda *a: ours(*a, is_causal=True).sum(), argnums=(0, 1, 2))(*tensors)

    first = gradients(*tensors)
    for _ in range(5):
        assert_close(gradients(*tensors), first, 0)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"query": (33, 64)}, "query is [33, 64]; it must be [B, T, N, H] or [T, N, H]"),
        ({"key": (2, 77, 2, 32)}, "key is [2, 77, 2, 32]; it must be [B = 2, S, K, H = 64]"),
        ({"value": (2, 76, 2, 64)}, "value is [2, 76, 2, 64]; it must be [B = 2, S = 77, K = 2, H]"),
        ({"key_value_seq_lengths": (3,)}, "key_value_seq_lengths is [3]; it must be [B = 2]"),
        ({"query_seq_lengths": (2,)}, "query_seq_lengths is float32; it must be of whole numbers"),
        ({"mask": (2, 4, 33, 77)}, "mask is float32; it must be bool"),
        ({"bias": (32, 77)}, "bias is [32, 77]; it must broadcast to [B, N, T, S], here [2, 4, 33, 77]"),
        ({"bias": (33, 77), "mask": (3, 1, 1, 77)}, "mask is [3, 1, 1, 77]; it must broadcast to"),
        ({"bias": (1, 1, 1, 33, 77)}, "bias is [1, 1, 1, 33, 77]; it must broadcast to"),
        ({"sinks": (3,)}, "sinks is [3]; it must be [heads_q], here [4]"),
    ],
)
def test_messages(change, words):
    given = dict(zip(("query", "key", "value"), arrays(), strict=True))
    given |= {name: jnp.zeros(shape, jnp.int32 if shape == (3,) and name.endswith("lengths") else None)
              for name, shape in change.items()}  # fmt: skip
    for function in (ours, jax.jit(ours)):
        with pytest.raises(ValueError) as raised:
            function(**given)
        assert words in str(raised.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scale": "x"}, "scale is 'x'; it must be a number"),
        ({"scale": float("nan")}, "scale is nan; it must be finite"),
        ({"softcap": "x"}, "softcap is 'x'; it must be a number"),
        ({"softcap": -1}, "softcap is -1; it must be positive"),
        ({"softcap": 1e-60}, "softcap is 1e-60; it must be positive in float32"),
        ({"is_causal": "yes"}, "is_causal is 'yes'; it must be True or False"),
        ({"local_window_size": "x"}, "local_window_size is 'x'; it must be a number of keys"),
        ({"local_window_size": -1}, "local_window_size is -1; it must be a number of keys from 0"),
        ({"local_window_size": (1,)}, "local_window_size is (1,); it must be a number of keys"),
        ({"query": None}, "query is None; it must be an array"),
        ({"query": jnp.zeros((2, 33, 4, 64), jnp.int32)}, "query is int32; it must be float32"),
        ({"value": jnp.zeros((2, 77, 2, 64), jnp.float16)}, "value is float16; it must be of key's"),
    ],
)
def test_options_of_another_type_are_named(options, words):
    given = dict(zip(("query", "key", "value"), arrays(), strict=True)) | options
    with pytest.raises((TypeError, ValueError)) as raised:
        ours(**given)
    assert words in str(raised.value)


def test_what_is_refused_says_so(monkeypatch):
    tensors = arrays()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(NotImplementedError, match="default device is a gpu"):
            ours(*tensors)
        with jax.default_device(jax.devices("cpu")[0]):
            assert_close(ours(*tensors), own(*tensors), 1e-5)
    with pytest.raises(ValueError, match="local_window_size is 3 over 33 queries and 77 keys"):
        ours(*tensors, local_window_size=3)
    with pytest.raises(NotImplementedError, match="bias has no gradient"):
        jax.grad(lambda bias: ours(*tensors, bias=bias).sum())(BIAS)
    with pytest.raises(NotImplementedError, match="the residual"):
        jax.grad(lambda q: ours(q, *tensors[1:], return_residual=True)[1].sum())(tensors[0])
    assert jax.grad(lambda q: ours(q, *tensors[1:], return_residual=True)[0].sum())(tensors[0]).any()
    plan = widehead.plan(*(np.asarray(each).swapaxes(1, 2) for each in tensors), gradients=True)
    least = min(each.workspace_bytes for each in plan.candidates if each.verdict != "refused")
    for workspace, transform in ((0, lambda function: function), (least - 1, jax.grad)):
        limits = widehead.Limits(workspace=workspace)

        def total(q, limits=limits):
            return ours(q, *tensors[1:], limits=limits).sum()

        with pytest.raises(widehead.Refused):
            jax.jit(transform(total))(tensors[0])
