"""widehead.mlx: gradients by the backward pass, against float64 and beside those of MLX's formula."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from oracle import oracle_gradients, qkv, relative_rms

mx = pytest.importorskip("mlx.core")

import widehead  # noqa: E402
import widehead.mlx  # noqa: E402
from mlx_gradients import assert_gradients, attend, numpy_of  # noqa: E402

# The type, and what gradients of N(0, 1) data may be off by.
TYPES = {"float32": (mx.float32, 4e-6), "float16": (mx.float16, 3e-3), "bfloat16": (mx.bfloat16, 2e-2)}


@pytest.fixture(scope="module", autouse=True)
def primitive():
    assert widehead.mlx.why_no_primitive is None


def arrays(dtype="float32", **shape):
    return [mx.array(each).astype(TYPES[dtype][0]) for each in qkv(**shape)]


RANDOM = np.random.default_rng(7)
BOOLEAN = RANDOM.random((2, 1, 33, 77)) < 0.7
BOOLEAN[:, :, 4] = False  # a row that sees nothing
ADDITIVE = RANDOM.standard_normal((33, 77)).astype(np.float16)
CASES = {
    "plain": ({}, {}),
    "causal": ({"mask": "causal"}, {"causal": True}),
    "window": ({"mask": "causal", "window": 20}, {"causal": True, "window": (20, None)}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "key starts": ({"key_starts": mx.array([3, 70])}, {"key_starts": [3, 70]}),
    "boolean mask": ({"mask": mx.array(BOOLEAN)}, {"mask": BOOLEAN}),
    "additive mask": ({"mask": mx.array(ADDITIVE)}, {"mask": ADDITIVE}),
    "all": (
        {"mask": "causal", "window": 30, "softcap": 3.0, "key_starts": mx.array([3, 20])},
        {"causal": True, "window": (30, None), "softcap": 3.0, "key_starts": [3, 20]},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_match_float64(case, dtype, with_sinks):
    kind, tolerance = TYPES[dtype]
    options, exact = CASES[case]
    if case == "additive mask":
        mask = options["mask"].astype(kind)
        options, exact = {"mask": mask}, {"mask": numpy_of(mask)}
    sinks = [mx.array([0.5, -1, 2, 0]).astype(kind)] if with_sinks else []
    assert_gradients([*arrays(dtype), *sinks], {"scale": 0.1} | options, tolerance, **exact)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("length", [(1, 300), (200, 300), (33, 33), (40, 9)])  # the last: empty rows
@pytest.mark.parametrize("dim", [(64, 64), (256, 256), (512, 512), (192, 128)])
def test_grouped_heads_lengths_and_dimensions(heads, length, dim):
    tensors = arrays(heads=heads, length=length, dim=dim)
    assert_gradients(tensors, {"scale": 0.06, "mask": "causal"}, 4e-6, causal=True)


def test_strides():
    q, k, v = arrays()
    rows = mx.contiguous(q.swapaxes(1, 2)).swapaxes(1, 2)  # as a projection leaves it
    cache = mx.concatenate([k, mx.zeros((2, 2, 50, 64))], axis=2)[:, :, :77]
    assert_gradients([rows, cache, v[:, ::-1, ::-1]], {"scale": 0.1}, 4e-6)
    for strided in (lambda out: out[:, :, ::-1], lambda out: out.swapaxes(1, 2)):  # gradients of out

        def loss(function, q, strided=strided):
            out = strided(function(q, k, v, scale=0.1))
            return (out * mx.arange(out.size).reshape(out.shape)).sum() / out.size

        own, ours = mx.fast.scaled_dot_product_attention, widehead.mlx.sdpa
        expected = mx.grad(lambda q: loss(own, q))(q)  # noqa: B023
        assert relative_rms(numpy_of(mx.grad(lambda q: loss(ours, q))(q)), numpy_of(expected)) <= 1e-5  # noqa: B023
    one = mx.grad(lambda v: widehead.mlx.sdpa(q, k, v, scale=0.1).sum())(v)  # one number for all
    expected = oracle_gradients(*map(numpy_of, (q, k, v)), np.ones((2, 4, 33, 48)), scale=0.1)[2]
    assert relative_rms(numpy_of(one), expected) <= 4e-6


def test_gradients_come_with_joined_heads():
    """What projections need next, a transposition and a reshape, is a view."""
    q, k, v = arrays()
    gradient = mx.grad(lambda q: widehead.mlx.sdpa(q, k, v, scale=0.1).sum())(q)
    mx.eval(gradient)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    joined = gradient.swapaxes(1, 2).reshape(2, 33, -1)
    mx.eval(joined)
    assert mx.get_peak_memory() - before < joined.nbytes
    assert mx.array_equal(joined.reshape(2, 33, 4, 64).swapaxes(1, 2), gradient)


def test_nothing_to_do():
    def loss(q, k):
        return widehead.mlx.sdpa(q, k, k, scale=1.0).sum()

    some, none = mx.ones((1, 2, 5, 16)), mx.zeros((1, 2, 0, 16))
    for tensors in ((none, some), (some, none)):
        for gradient, tensor in zip(mx.grad(loss, argnums=(0, 1))(*tensors), tensors, strict=True):
            assert mx.array_equal(gradient, mx.zeros(tensor.shape))


def test_the_same_bits_on_every_run_and_for_any_number_of_threads():
    tensors = arrays(length=(300, 700))

    def gradients(limits=None):
        function = attend({"scale": 0.1, "mask": "causal", "limits": limits})
        return mx.grad(lambda *a: mx.sin(function(*a)).sum(), argnums=(0, 1, 2))(*tensors)

    first = gradients()
    for limits in (None, None, widehead.Limits(threads=1)):
        for have, want in zip(gradients(limits), first, strict=True):
            assert mx.array_equal(have, want)


def own_and_ours(argument, **options):
    """A loss of q, k, v and maybe ``argument``, by MLX's function and by Widehead's."""

    def loss(function):
        def of(q, k, v, *others):
            extra = {argument: others[0]} if others else {}
            return (function(q, k, v, scale=0.1, **options, **extra) ** 2).sum()

        return of

    return loss(mx.fast.scaled_dot_product_attention), loss(widehead.mlx.sdpa)


def test_additive_masks_have_the_formulas_gradients():
    tensors = [*arrays(), mx.array(ADDITIVE).astype(mx.float32)]
    own, ours = (mx.grad(each, argnums=(0, 1, 2, 3)) for each in own_and_ours("mask"))
    for have, want in zip(ours(*tensors), own(*tensors), strict=True):
        assert relative_rms(numpy_of(have), numpy_of(want)) <= 1e-5


def test_masks_that_the_graph_computes():
    """Comparisons of what is differentiated have no gradient, and stop none of the others."""
    q, k, v = arrays()

    def loss(function, q):
        mask = q[..., :1] + k[:, :1, :, 0][:, :, None] > 0
        return (function(q, k, v, scale=0.1, mask=mask) ** 2).sum()

    own, ours = mx.fast.scaled_dot_product_attention, widehead.mlx.sdpa
    expected = mx.grad(lambda q: loss(own, q))(q)
    # MLX gives rows that see no key the mean of all values.
    sees = np.array((q[..., :1] + k[:, :1, :, 0][:, :, None] > 0).any(-1))
    have = numpy_of(mx.grad(lambda q: loss(ours, q))(q))
    assert not have[~sees].any() and sees.mean() > 0.9
    assert relative_rms(have[sees], numpy_of(expected)[sees]) <= 1e-5


@pytest.mark.parametrize("shapeless", [False, True])
def test_compiled_and_checkpointed(shapeless):
    _, ours = own_and_ours(None, mask="causal")
    value_and_grad = mx.value_and_grad(ours, argnums=(0, 1, 2))
    compiled = mx.compile(value_and_grad, shapeless=shapeless)
    again = mx.value_and_grad(mx.checkpoint(ours), argnums=(0, 1, 2))
    for length in ((33, 77), (20, 40)):
        tensors = arrays(length=length)
        value, expected = value_and_grad(*tensors)
        for have_value, have in (compiled(*tensors), again(*tensors)):
            assert mx.array_equal(have_value, value)
            for one, two in zip(have, expected, strict=True):
                assert mx.array_equal(one, two)


def test_streams_and_threads():
    tensors = arrays()
    _, ours = own_and_ours(None, mask="causal")
    expected = numpy_of(mx.grad(ours)(*tensors))
    stream = mx.new_stream(mx.cpu)
    _, on_another = own_and_ours(None, mask="causal", stream=stream)
    assert np.array_equal(numpy_of(mx.grad(on_another)(*tensors)), expected)
    results = []

    def work():
        with mx.stream(mx.new_stream(mx.cpu)):
            copies = [mx.array(numpy_of(each).astype(np.float32)) for each in tensors]
            for _ in range(10):
                results.append(np.array_equal(numpy_of(mx.grad(ours)(*copies)), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


def test_scores_are_never_in_memory():
    tensors = [mx.random.normal((1, 4, length, 256)) for length in (512, 4096, 4096)]
    mx.eval(tensors)

    def peak(loss):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss, argnums=(0, 1, 2))(*tensors))
        return mx.get_peak_memory() - before

    own, ours = own_and_ours(None, mask="causal")
    scores_bytes = 4 * 512 * 4096 * 4
    gradients_bytes = sum(each.nbytes for each in tensors)
    # Beside the gradients: out, its square, d_out, log-sum-exps.
    assert peak(ours) < gradients_bytes + 6 * tensors[0].nbytes
    assert peak(own) > 2 * scores_bytes + gradients_bytes


def test_higher_derivatives_and_maps_are_the_formulas():
    q, k, v = arrays()
    direction = mx.random.normal(q.shape, key=mx.random.key(2))
    several = mx.stack([q, 2 * q, -q])
    results = []
    for loss in own_and_ours(None, mask="causal"):

        def steepness(q, loss=loss):
            return sum((each**2).sum() for each in mx.grad(loss, argnums=(0, 1, 2))(q, k, v))

        def gradient(q, loss=loss):
            return mx.grad(loss)(q, k, v)

        results.append([
            mx.grad(steepness)(q),
            mx.jvp(steepness, [q], [direction])[1][0],
            mx.vmap(gradient)(several),
            mx.grad(lambda q: mx.vmap(lambda q: loss(q, k, v))(q).sum())(several),  # noqa: B023
        ])
    for want, have in zip(*results, strict=True):
        assert relative_rms(numpy_of(have), numpy_of(want)) <= 1e-5


def test_sinks_have_second_derivatives_and_maps_too():
    q, k, v = arrays()
    sinks = mx.array([0.5, -1, 2, 0])
    several = mx.stack([sinks, -sinks])
    results = []
    for loss in own_and_ours("sinks"):

        def steepness(sinks, loss=loss):
            return (mx.grad(loss, argnums=3)(q, k, v, sinks) ** 2).sum()

        results.append([
            mx.grad(steepness)(sinks),
            mx.vmap(lambda s: mx.grad(loss, argnums=3)(q, k, v, s))(several),  # noqa: B023
        ])
    for want, have in zip(*results, strict=True):
        assert relative_rms(numpy_of(have), numpy_of(want)) <= 1e-4


def test_memory_is_known_before_and_limited():
    tensors = arrays()
    options = {"scale": 0.1, "mask": "causal"}
    plan = widehead.mlx.plan(*tensors, **options, gradients=True)
    assert plan.kernel == "cpu_backward" and plan.workspace_bytes > 0
    assert plan.to_dict()["problem"]["pass"] == "backward"
    forward = widehead.mlx.plan(*tensors, **options)
    assert forward.workspace_bytes < plan.workspace_bytes - 1
    between = widehead.Limits(workspace=plan.workspace_bytes - 1)
    assert widehead.mlx.plan(*tensors, **options, gradients=True, limits=between).kernel != "cpu_backward"

    def gradient(limits):
        return mx.grad(lambda q: attend(options | {"limits": limits})(q, *tensors[1:]).sum())(tensors[0])

    least = min(each.workspace_bytes for each in plan.candidates if each.verdict != "refused")
    with pytest.raises(RuntimeError, match="cpu_backward"):
        gradient(widehead.Limits(workspace=least - 1))
    expected = gradient(None)
    # A kernel by name and a policy are the forward pass's.
    for limits in (widehead.Limits(kernel="cpu_unfused"), widehead.Limits(policy="fused")):
        assert relative_rms(numpy_of(gradient(limits)), numpy_of(expected)) <= 1e-5
        assert widehead.mlx.plan(*tensors, **options, gradients=True, limits=limits).kernel == plan.kernel


def test_only_what_is_differentiated_runs_backward():
    script = """
import sys, mlx.core as mx, widehead.mlx
q = mx.random.normal((1, 2, 7, 48))
attend = lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0).sum()
with widehead.mlx.override_sdpa():
    mx.eval(attend(q), mx.compile(attend)(q))
    print("differentiated", file=sys.stderr, flush=True)
    mx.eval(mx.grad(attend)(q))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env=os.environ | {"WIDEHEAD_LOG": "plan"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("differentiated")
    assert "7 x 7" in before and "backward" not in before
    assert after.count("backward, 2/2 heads") == 1 and after.count("2/2 heads") == 1, after
