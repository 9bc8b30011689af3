"""Every option of widehead.sdpa against float64, and what it says about wrong arguments."""

import ml_dtypes
import numpy as np
import pytest
import widehead
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BOUNDS, oracle, qkv, relative_rms

RNG = np.random.default_rng(1)
MASK = RNG.random((2, 4, 33, 77)) < 0.7
BIAS = np.where(MASK, RNG.standard_normal(MASK.shape), -np.inf).astype(np.float32)
SINKS = RNG.standard_normal(4).astype(np.float32)

OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True},
    "causal_top_left": {"causal": "top_left"},
    "window": {"window": (7, 3)},
    "window_left_alone": {"window": (5, None)},
    "causal_window": {"causal": True, "window": (6, None)},
    "softcap": {"softcap": 2.0},
    "boolean_mask": {"mask": MASK},
    "broadcast_mask": {"mask": MASK[:1, :1]},
    "mask_of_two_dimensions": {"mask": MASK[0, 0]},
    "keys_mask": {"mask": MASK[:, :1, :1]},
    "additive_mask": {"mask": BIAS},
    "mask_and_causal": {"mask": MASK, "causal": True},
    "sinks": {"sinks": SINKS},
    "key_lengths": {"key_lengths": np.array([60, 3], np.int32)},
    "key_lengths_causal": {"key_lengths": np.array([60, 3], np.int32), "causal": True},
    "key_starts": {"key_starts": np.array([0, 70], np.int32), "causal": True},
    "all": {
        "causal": True,
        "window": (20, None),
        "softcap": 5.0,
        "mask": BIAS,
        "sinks": SINKS,
        "key_lengths": np.array([77, 50], np.int32),
        "key_starts": np.array([4, 0], np.int32),
        "scale": 0.2,
    },
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match_float64(name, dtype):
    q, k, v = qkv(dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    out, log_sum_exp = widehead.sdpa(q, k, v, return_log_sum_exp=True, **OPTIONS[name])
    expected, expected_lse = oracle(q, k, v, **OPTIONS[name])
    assert out.dtype == q.dtype and log_sum_exp.dtype == np.float32
    assert relative_rms(out, expected) <= BOUNDS[dtype]
    seen = np.isfinite(expected_lse)
    assert np.array_equal(np.isneginf(log_sum_exp), ~seen)
    np.testing.assert_allclose(log_sum_exp[seen], expected_lse[seen], atol=1e-4)
    assert not np.asarray(out, np.float32)[~seen].any()


@pytest.mark.parametrize("kernel", [k.name for k in widehead.kernels() if k.device == "cpu"])
def test_every_kernel_can_be_forced(kernel):
    q, k, v = qkv(length=(4, 77))
    limits = widehead.Limits(kernel=kernel)
    if widehead.plan(q, k, v, limits=limits).kernel is None:
        with pytest.raises(widehead.Refused):
            widehead.sdpa(q, k, v, limits=limits)
        return
    assert relative_rms(widehead.sdpa(q, k, v, limits=limits), oracle(q, k, v)[0]) <= 4e-6


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads_kv=st.integers(1, 3),
    group=st.integers(1, 4),
    len_q=st.integers(0, 40),
    len_k=st.integers(0, 90),
    dim_qk=st.integers(1, 70),
    dim_v=st.integers(1, 70),
    order=st.permutations(range(4)),
    step=st.integers(1, 3),
    causal=st.sampled_from([False, True, "top_left"]),
    window=st.one_of(
        st.none(),
        st.tuples(*[st.one_of(st.none(), st.integers(0, 50))] * 2),
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(
    batch, heads_kv, group, len_q, len_k, dim_qk, dim_v, order, step, causal, window, seed
):
    rng = np.random.default_rng(seed)

    def strided(*shape):
        """An array in any order of dimensions, with gaps."""
        memory = rng.standard_normal([shape[i] * step for i in order]).astype(np.float32)
        array = memory[tuple(slice(None, None, step) for _ in shape)]
        return array.transpose(np.argsort(order))

    q = strided(batch, heads_kv * group, len_q, dim_qk)
    k = strided(batch, heads_kv, len_k, dim_qk)
    v = strided(batch, heads_kv, len_k, dim_v)
    out = widehead.sdpa(q, k, v, causal=causal, window=window)
    expected, _ = oracle(q, k, v, causal=causal, window=window)
    assert out.shape == expected.shape
    assert relative_rms(out, expected) <= 4e-6


@settings(max_examples=200, deadline=None)
@given(
    group=st.integers(1, 3),
    len_q=st.integers(1, 20),
    len_k=st.integers(1, 40),
    scale=st.one_of(st.none(), st.floats(-0.5, 0.5, width=32)),
    causal=st.sampled_from([False, True, "bottom_right", "top_left"]),
    window=st.one_of(st.none(), st.tuples(*[st.one_of(st.none(), st.integers(0, 25))] * 2)),
    softcap=st.one_of(st.none(), st.floats(0.5, 50, width=32)),
    mask=st.sampled_from([None, "boolean", "additive", "of q's type"]),
    mask_is_one=st.tuples(*[st.booleans()] * 4),
    sinks=st.booleans(),
    lengths=st.one_of(st.none(), st.tuples(st.integers(0, 40), st.integers(0, 40))),
    starts=st.one_of(st.none(), st.tuples(st.integers(0, 40), st.integers(0, 40))),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 1000),
)
def test_any_combination_of_options(
    group, len_q, len_k, scale, causal, window, softcap, mask, mask_is_one, sinks, lengths, starts,
    dtype, seed,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    q, k, v = qkv(seed, heads=(2 * group, 2), length=(len_q, len_k), dim=(32, 24), dtype=kind)
    options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    if mask is not None:
        whole = (2, 2 * group, len_q, len_k)
        shape = tuple(1 if is_one else size for is_one, size in zip(mask_is_one, whole))
        options["mask"] = rng.random(shape) < 0.7
        if mask != "boolean":
            bias = np.where(options["mask"], rng.standard_normal(shape), -np.inf)
            options["mask"] = bias.astype(np.float32 if mask == "additive" else kind)
    if sinks:
        options["sinks"] = rng.standard_normal(2 * group).astype(np.float32)
    if lengths is not None:
        options["key_lengths"] = np.minimum(lengths, len_k).astype(np.int32)
    if starts is not None:
        options["key_starts"] = np.array(starts, np.int32)
    out, log_sum_exp = widehead.sdpa(q, k, v, return_log_sum_exp=True, **options)
    expected, expected_lse = oracle(q, k, v, **options)
    # A result of few numbers may be off by more of its size than a large one.
    assert relative_rms(out, expected) <= 2 * BOUNDS[dtype]
    seen = np.isfinite(expected_lse)
    assert np.array_equal(np.isneginf(log_sum_exp), ~seen)
    np.testing.assert_allclose(log_sum_exp[seen], expected_lse[seen], atol=1e-4)


def test_out_is_written_in_place_and_returned():
    q, k, v = qkv()
    memory = np.full((2, 33, 4, 48), np.nan, np.float32)
    out = memory.transpose(0, 2, 1, 3)
    result, log_sum_exp = widehead.sdpa(q, k, v, out=out, return_log_sum_exp=True)
    assert result is out
    assert relative_rms(out, oracle(q, k, v)[0]) <= 4e-6
    assert log_sum_exp.shape == (2, 4, 33)


def test_read_only_inputs():
    q, k, v = qkv()
    expected = widehead.sdpa(q, k, v)
    for array in (q, k, v):
        array.flags.writeable = False
    assert np.array_equal(widehead.sdpa(q, k, v), expected)
    frozen = np.zeros_like(expected)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        widehead.sdpa(q, k, v, out=frozen)


def test_half_precision_cache_under_float32_queries():
    q, k, v = qkv()
    out = widehead.sdpa(q, k.astype(np.float16), v.astype(np.float16))
    assert out.dtype == np.float32
    expected, _ = oracle(q, k.astype(np.float16), v.astype(np.float16))
    assert relative_rms(out, expected) <= 9e-4


def test_key_lengths_of_other_kinds():
    q, k, v = qkv()
    expected = widehead.sdpa(q, k, v, key_lengths=np.array([60, 3], np.int32))
    wide = np.array([60, 0, 3, 0], np.int64)[::2]
    for lengths in ([60, 3], (60, 3), wide, wide.astype(np.int32)):
        assert np.array_equal(widehead.sdpa(q, k, v, key_lengths=lengths), expected)


WRONG = {
    "q of 3 dimensions": (lambda q, k, v: ((q[0], k, v), {}), ValueError, "q is .* 4 dimensions"),
    "k of other dim": (lambda q, k, v: ((q, k[..., 1:], v), {}), ValueError, "k is .*dim_qk"),
    "v of other length": (lambda q, k, v: ((q, k, v[:, :, 1:]), {}), ValueError, "v is .*length"),
    "heads": (lambda q, k, v: ((q[:, :3], k, v), {}), ValueError, "heads_q is 3; .* multiple"),
    "float64": (lambda q, k, v: ((q.astype("f8"), k, v), {}), TypeError, "q is float64; it must"),
    "int": (lambda q, k, v: ((q.astype("i4"), k, v), {}), TypeError, "q is int32; it must"),
    "v of other type": (lambda q, k, v: ((q, k, v.astype("f2")), {}), TypeError, "v is float16"),
    "a list": (lambda q, k, v: ((q.tolist(), k, v), {}), TypeError, "q is a list; .*DLPack"),
    "None": (lambda q, k, v: ((None, k, v), {}), TypeError, "q is a NoneType"),
    "causal": (lambda q, k, v: ((q, k, v), {"causal": "left"}), ValueError, "causal is 'left'"),
    "window": (lambda q, k, v: ((q, k, v), {"window": 7}), ValueError, "window is 7; .*tuple"),
    "window side": (lambda q, k, v: ((q, k, v), {"window": (-2, 0)}), ValueError, "each side"),
    "scale": (lambda q, k, v: ((q, k, v), {"scale": "1"}), TypeError, "scale is '1'"),
    "scale nan": (lambda q, k, v: ((q, k, v), {"scale": np.nan}), ValueError, "scale is nan"),
    "softcap": (lambda q, k, v: ((q, k, v), {"softcap": -1.0}), ValueError, "softcap is -1"),
    "softcap of 0": (lambda q, k, v: ((q, k, v), {"softcap": 1e-60}), ValueError,
                     "softcap is 1e-60; it is 0 in float32"),
    "mask shape": (lambda q, k, v: ((q, k, v), {"mask": MASK[..., 1:]}), ValueError, "mask is .*33, 77"),
    "mask type": (lambda q, k, v: ((q, k, v), {"mask": MASK.astype("i4")}), TypeError, "mask is int32"),
    "sinks type": (lambda q, k, v: ((q, k, v), {"sinks": np.zeros(4)}), TypeError, "sinks is float64"),
    "sinks shape": (lambda q, k, v: ((q, k, v), {"sinks": SINKS[1:]}), ValueError, "sinks is .3.;"),
    "lengths": (lambda q, k, v: ((q, k, v), {"key_lengths": [1, 78]}), ValueError, "key_lengths.1. is 78"),
    "starts": (lambda q, k, v: ((q, k, v), {"key_starts": [-1, 0]}), ValueError, "key_starts holds -1"),
    "out shape": (lambda q, k, v: ((q, k, v), {"out": q}), ValueError, "out is .*33, 48"),
    "out type": (
        lambda q, k, v: ((q, k, v), {"out": np.zeros((2, 4, 33, 48))}), TypeError, "out is float64",
    ),
    "overlap": (
        lambda q, k, v: ((q[..., :48], k[..., :48], v), {"out": q[..., :48]}), ValueError, "overlap",
    ),
    "kernel": (
        lambda q, k, v: ((q, k, v), {"limits": widehead.Limits(kernel="cpu_prefil")}),
        ValueError, 'did you mean "cpu_prefill"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    make, error, message = WRONG[case]
    arrays, options = make(*qkv())
    with pytest.raises(error, match=message):
        widehead.sdpa(*arrays, **options)


def test_negative_strides_are_named():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="stride_q"):
        widehead.sdpa(q[:, :, ::-1], k, v)
