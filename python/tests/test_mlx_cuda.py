"""widehead.mlx on MLX's CUDA backend: against float64, in graphs of many nodes. Skipped without one."""

import numpy as np
import pytest
from oracle import BOUNDS, oracle

mx = pytest.importorskip("mlx.core")
if not mx.is_available(mx.gpu) or not mx.cuda.is_available():
    pytest.skip("needs MLX's CUDA backend", allow_module_level=True)

import mlx_arrays  # noqa: E402
import widehead  # noqa: E402
import widehead.mlx  # noqa: E402
from mlx_arrays import DTYPES, error, numpy_of  # noqa: E402
from mlx_gradients import assert_gradients, attend  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def primitive():
    assert widehead.mlx.why_no_primitive is None
    mx.set_default_device(mx.gpu)


def arrays(dtype="bfloat16", **shape):
    return mlx_arrays.arrays(dtype, **shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [(64, 64), (100, 36), (192, 128), (256, 256), (512, 512)])
@pytest.mark.parametrize("length", [(1, 300), (70, 300), (300, 300)])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_results_match_float64(dtype, dim, length, mask):
    tensors, exact = arrays(dtype, length=length, dim=dim)
    out = widehead.mlx.sdpa(*tensors, scale=0.06, mask=mask)
    assert out.dtype == DTYPES[dtype]
    expected = oracle(*exact, scale=0.06, causal=mask == "causal")[0]
    assert error(out, expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_options_match_float64(dtype):
    tensors, exact = arrays(dtype)
    random = np.random.default_rng(2)
    boolean = random.random((2, 1, 33, 77)) < 0.7
    sinks = mx.array(random.standard_normal(4)).astype(DTYPES[dtype])
    additive = mx.array(random.standard_normal((33, 77))).astype(DTYPES[dtype])
    for given, expected in (
        ({"mask": mx.array(boolean)}, {"mask": boolean}),
        ({"mask": additive}, {"mask": numpy_of(additive)}),
        ({"sinks": sinks, "mask": "causal"}, {"sinks": numpy_of(sinks), "causal": True}),
        (
            {"mask": "causal", "window": 9, "softcap": 2.0, "key_starts": mx.array([3, 40])},
            {"causal": True, "window": (9, None), "softcap": 2.0, "key_starts": [3, 40]},
        ),
    ):
        out = widehead.mlx.sdpa(*tensors, scale=0.1, **given)
        assert error(out, oracle(*exact, scale=0.1, **expected)[0]) <= BOUNDS[dtype]


@pytest.mark.parametrize("dim", [64, 256, 512])
def test_every_kernel_by_name(dim):
    tensors, exact = arrays(heads=(4, 2), length=(5, 700), dim=(dim, dim))
    expected = oracle(*exact, scale=0.06, causal=True)[0]
    plan = widehead.mlx.plan(*tensors, scale=0.06, mask="causal")
    able = [each.kernel for each in plan.candidates if each.verdict in ("chosen", "slower")]
    assert "cuda_unfused" in able and len(able) > 1
    for kernel in able:
        limits = widehead.Limits(kernel=kernel)
        out = widehead.mlx.sdpa(*tensors, scale=0.06, mask="causal", limits=limits)
        assert error(out, expected) <= BOUNDS["bfloat16"], kernel


def test_a_graph_of_many_nodes():
    """Inputs that the graph itself makes, results that it uses, and no evaluation in between. Times
    1.5 in place of 0.9 the steps would spread an f32 rounding to 0.07 of the answer."""
    (q, k, v), exact = arrays("float32", heads=(4, 4), length=(64, 64), dim=(64, 64))
    out, expected = q, exact[0]
    for i in range(150):  # more than MLX puts into one graph
        keys = k * (1 + i / 150)  # made just before
        out = widehead.mlx.sdpa(out + 0.1, keys, v, scale=0.1, mask="causal") * 0.9
        one = oracle(expected + 0.1, exact[1] * (1 + i / 150), exact[2], scale=0.1, causal=True)[0]
        expected = one * 0.9
    assert error(out, expected) <= 1e-4


def test_a_growing_cache():
    """As mlx-lm decodes: a strided slice of a buffer that is written in place, many steps in flight."""
    heads, dim = 2, 256
    buffers = [mx.zeros((1, heads, 512, dim), mx.bfloat16) for _ in range(2)]
    news = [numpy_of(mx.random.normal((1, heads, 1, dim)).astype(mx.bfloat16)) for _ in range(300)]
    outs = []
    for i, new in enumerate(news):
        for buffer in buffers:
            buffer[..., i : i + 1, :] = mx.array(new).astype(mx.bfloat16)
        keys, values = (buffer[..., : i + 1, :] for buffer in buffers)
        query = mx.repeat(mx.array(new).astype(mx.bfloat16), 4, axis=1)
        outs.append(widehead.mlx.sdpa(query, keys, values, scale=0.06))
        mx.async_eval(outs[-1])
    whole = np.concatenate(news, axis=2)
    for i in (0, 1, 100, 299):
        query = np.repeat(news[i], 4, axis=1)
        keys = whole[:, :, : i + 1]
        assert error(outs[i], oracle(query, keys, keys, scale=0.06)[0]) <= BOUNDS["bfloat16"]


def test_compiled_and_other_streams():
    tensors, exact = arrays()
    expected = oracle(*exact, scale=0.1, causal=True)[0]

    @mx.compile
    def twice(q, k, v):  # the workspaces of the two must not be one
        one = widehead.mlx.sdpa(q, k, v, scale=0.1, mask="causal")
        two = widehead.mlx.sdpa(q, k, v, scale=0.1)
        return one, two

    for _ in range(3):
        one, two = twice(*tensors)
        assert error(one, expected) <= BOUNDS["bfloat16"]
        assert error(two, oracle(*exact, scale=0.1)[0]) <= BOUNDS["bfloat16"]
    stream = mx.new_stream(mx.gpu)
    out = widehead.mlx.sdpa(*tensors, scale=0.1, mask="causal", stream=stream)
    assert error(out, expected) <= BOUNDS["bfloat16"]
    on_cpu = widehead.mlx.sdpa(*tensors, scale=0.1, mask="causal", stream=mx.cpu)
    assert error(on_cpu, expected) <= BOUNDS["bfloat16"]


def test_memory_is_the_outputs_and_the_workspace():
    q, k, v = (mx.random.normal((1, h, n, 256)).astype(mx.bfloat16) for h, n in ((8, 1024), (2, 16384), (2, 16384)))
    mx.eval(q, k, v, widehead.mlx.sdpa(q, k, v, scale=0.06, mask="causal"))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(widehead.mlx.sdpa(q, k, v, scale=0.06, mask="causal"))
    plan = widehead.mlx.plan(q, k, v, scale=0.06, mask="causal")
    assert mx.get_peak_memory() - before <= q.nbytes + plan.workspace_bytes + (1 << 20)


def test_reversed_views_are_refused_in_words():
    (q, k, v), exact = arrays()
    with pytest.raises((ValueError, RuntimeError), match="negative stride"):
        mx.eval(widehead.mlx.sdpa(q, k[:, :, ::-1], v, scale=0.1))
    out = widehead.mlx.sdpa(q, k, v, scale=0.1)
    assert error(out, oracle(*exact, scale=0.1)[0]) <= BOUNDS["bfloat16"]


def test_the_override():
    tensors, exact = arrays()
    with widehead.mlx.override_sdpa(widehead.Limits(policy="fused")):
        out = mx.fast.scaled_dot_product_attention(*tensors, scale=0.1, mask="causal")
        # MLX refuses here what it has no fused kernel for.
        forced = mx.fast.scaled_dot_product_attention(*tensors, scale=0.1, force_fused=True)
        mx.eval(out, forced)
    assert error(out, oracle(*exact, scale=0.1, causal=True)[0]) <= BOUNDS["bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [(64, 64), (100, 36), (192, 128), (256, 256), (512, 512)])
@pytest.mark.parametrize("length", [(1, 300), (300, 300)])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_gradients_match_float64(dtype, dim, length, mask):
    tensors, _ = arrays(dtype, length=length, dim=dim)
    options = {"scale": 0.06, "mask": mask}
    assert_gradients(tensors, options, 4 * BOUNDS[dtype], causal=mask == "causal")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_options_match_float64(dtype):
    tensors, _ = arrays(dtype)
    boolean = np.random.default_rng(2).random((2, 1, 33, 77)) < 0.7
    additive = mx.random.normal((33, 77)).astype(DTYPES[dtype])
    sinks = mx.array([0.5, -1, 2, 0]).astype(DTYPES[dtype])
    structure = {"mask": "causal", "window": 20, "softcap": 3.0, "key_starts": mx.array([3, 40])}
    for options, exact in (
        ({"mask": mx.array(boolean)}, {"mask": boolean}),
        ({"mask": additive}, {"mask": numpy_of(additive)}),
        (structure, {"causal": True, "window": (20, None), "softcap": 3.0, "key_starts": [3, 40]}),
    ):
        for given in (tensors, [*tensors, sinks]):
            assert_gradients(given, {"scale": 0.1} | options, 4 * BOUNDS[dtype], **exact)


def test_gradients_of_strided_arrays():
    (q, k, v), _ = arrays()
    rows = mx.contiguous(q.swapaxes(1, 2)).swapaxes(1, 2)
    cache = mx.concatenate([k, mx.zeros((2, 2, 50, 64), k.dtype)], axis=2)[:, :, :77]
    assert_gradients([rows, cache, v], {"scale": 0.1}, 4 * BOUNDS["bfloat16"])


def test_the_formula_has_the_gradients_beyond_the_kernels():
    """No kernel of the backward pass takes more than 512 dimensions; and masks have one by the formula."""
    own, ours = mx.fast.scaled_dot_product_attention, widehead.mlx.sdpa
    tensors = [*arrays("float32", dim=(576, 576))[0], mx.random.normal((33, 77))]

    def gradients(function):
        def loss(q, k, v, mask):
            return (function(q, k, v, scale=0.05, mask=mask) ** 2).sum()

        some = mx.grad(lambda q, k, v: loss(q, k, v, "causal"), argnums=(0, 1, 2))(*tensors[:3])
        return *some, *mx.grad(loss, argnums=(0, 1, 2, 3))(*tensors)

    for have, want in zip(gradients(ours), gradients(own), strict=True):
        assert error(have, numpy_of(want)) <= 1e-2  # both of MLX's products in TF32


def test_gradients_in_a_graph_of_many_nodes():
    """Sixty calls, each one's answer the next one's query, forward and back without an evaluation in
    between: as one call and its gradient at a time."""
    (q, k, v), _ = arrays("float32", heads=(4, 4), length=(64, 64), dim=(64, 64))
    steps = [1 + i / 60 for i in range(60)]
    direction = mx.random.normal(q.shape)

    def step(q, factor):
        return widehead.mlx.sdpa(q + 0.1, k * factor, v, scale=0.1, mask="causal") * 0.9

    def whole(q):
        for factor in steps:
            q = step(q, factor)
        return (q * direction).sum()

    gradient = mx.grad(whole)(q)
    queries = [q]
    for factor in steps:
        queries.append(step(queries[-1], factor))
        mx.eval(queries[-1])
    expected = direction
    for query, factor in zip(reversed(queries[:-1]), reversed(steps), strict=True):
        expected = mx.vjp(lambda q: step(q, factor), [query], [expected])[1][0]  # noqa: B023
        mx.eval(expected)
    assert mx.array_equal(gradient, expected)


def test_compiled_checkpointed_and_repeated_gradients():
    tensors, _ = arrays(length=(300, 300))

    def loss(q, k, v, stream=None):
        out = attend({"scale": 0.1, "mask": "causal", "stream": stream})(q, k, v)
        return mx.sin(out.astype(mx.float32)).sum()

    gradients = mx.grad(loss, argnums=(0, 1, 2))
    expected = gradients(*tensors)
    stream = mx.new_stream(mx.gpu)
    for again in (
        gradients,
        mx.compile(gradients),
        mx.grad(mx.checkpoint(loss), argnums=(0, 1, 2)),
        lambda *given: gradients(*given, stream),
    ):
        for _ in range(3):
            for have, want in zip(again(*tensors), expected, strict=True):
                assert mx.array_equal(have, want)


def test_memory_of_gradients_is_known_before():
    heads, lengths = (8, 2, 2), (1024, 16384, 16384)
    q, k, v = (mx.random.normal((1, h, n, 256)).astype(mx.bfloat16) for h, n in zip(heads, lengths))
    options = {"scale": 0.06, "mask": "causal"}

    d_out = mx.random.normal(q.shape).astype(mx.bfloat16)

    def gradients():
        mx.eval(mx.vjp(attend(options), [q, k, v], [d_out]))

    mx.eval(q, k, v, d_out)
    gradients()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    gradients()
    plans = [widehead.mlx.plan(q, k, v, **options, gradients=each) for each in (False, True)]
    workspace = max(plan.workspace_bytes for plan in plans)
    assert plans[1].kernel is not None and plans[1].kernel != plans[0].kernel
    # out, its log-sum-exp, and the gradients.
    tensors = 2 * q.nbytes + 4 * 8 * 1024 + k.nbytes + v.nbytes
    assert mx.get_peak_memory() - before <= tensors + workspace + (1 << 20)
