"""Plans, limits, refusals, merging, and the tables."""

import pickle

import ml_dtypes
import numpy as np
import pytest
import widehead
from oracle import oracle, qkv, relative_rms


def test_plan_says_what_runs_and_why_nothing_else_does():
    q, k, v = qkv()
    plan = widehead.plan(q, k, v, causal=True)
    chosen = [each for each in plan.candidates if each.verdict == "chosen"]
    assert [each.kernel for each in chosen] == [plan.kernel]
    assert {each.kernel for each in plan.candidates} == {
        each.name for each in widehead.kernels() if each.device == "cpu"
    }
    assert all(each.reason for each in plan.candidates if each.verdict == "refused")
    assert plan.workspace_bytes == chosen[0].workspace_bytes
    document = plan.to_dict()
    assert document["problem"]["causal"] == "bottom-right"
    assert document["problem"]["dim_v"] == 48
    assert plan.kernel in plan.explain() and "verdict" in plan.explain()
    assert str(plan) == plan.explain() == widehead.explain(q, k, v, causal=True)
    assert plan._repr_html_().startswith("<pre>")


def test_values_that_are_a_slice_of_the_keys_are_seen():
    q, k, v = qkv()
    assert not widehead.plan(q, k, v).to_dict()["problem"]["values_in_keys"]
    inside = k[..., : v.shape[-1]]
    assert widehead.plan(q, k, inside).to_dict()["problem"]["values_in_keys"]
    assert not widehead.plan(q, k, k[..., 1:]).to_dict()["problem"]["values_in_keys"]
    np.testing.assert_array_equal(widehead.sdpa(q, k, inside), widehead.sdpa(q, k, inside.copy()))


def test_plan_of_shapes_without_memory():
    q = widehead.Spec((1, 32, 2048, 512), "bfloat16")
    cache = widehead.Spec((1, 4, 262144, 512), "bfloat16")
    plan = widehead.plan(q, cache, cache, causal=True, limits=widehead.Limits(policy="fused"))
    assert plan.kernel is not None
    problem = plan.to_dict()["problem"]
    assert (problem["len_k"], problem["dtype"]) == (262144, "bf16")
    with pytest.raises(ValueError, match="q is null"):
        widehead.sdpa(q, cache, cache, out=np.zeros((1, 32, 2048, 512), ml_dtypes.bfloat16))


def test_plan_of_gradients():
    q, k, v = qkv()
    plan = widehead.plan(q, k, v, causal=True, gradients=True)
    assert plan.kernel == "cpu_backward" and plan.to_dict()["problem"]["pass"] == "backward"
    packed_q = q[0].swapaxes(0, 1)
    packed = widehead.plan(packed_q, k, v, query_offsets=[0, 20, 33], gradients=True)
    assert packed.kernel == "cpu_backward" and packed.to_dict()["problem"]["total_q"] == 33
    pages = {"page_table": np.zeros((2, 1), np.int32), "key_lengths": [1, 2]}
    with pytest.raises(ValueError, match="caches are not trained"):
        widehead.plan(packed_q, k, v, query_offsets=[0, 20, 33], **pages, gradients=True)


def test_plan_is_the_one_that_sdpa_takes():
    q, k, v = qkv()
    limits = widehead.Limits(workspace=0)
    plan = widehead.plan(q, k, v, limits=limits)
    if plan.kernel is None:
        with pytest.raises(widehead.Refused):
            widehead.sdpa(q, k, v, limits=limits)
    else:
        assert plan.workspace_bytes == 0


def test_refused_carries_the_candidates():
    q, k, v = qkv(length=(512, 512))
    limits = widehead.Limits(kernel="cpu_unfused", workspace="1KiB")
    plan = widehead.plan(q, k, v, limits=limits)
    assert plan.kernel is None
    with pytest.raises(widehead.Refused, match="cpu_unfused: wants .* the limit is 1.00 KiB") as caught:
        widehead.sdpa(q, k, v, limits=limits)
    by_name = {each.kernel: each for each in caught.value.candidates}
    assert by_name["cpu_unfused"].verdict == "over_budget"
    assert by_name["cpu_unfused"].workspace_bytes > 1024
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.candidates == caught.value.candidates and str(copy) == str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"), [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2kB", 2000), (77, 77)]
)
def test_limits_read_sizes(text, count):
    q, k, v = qkv()
    limits = widehead.Limits(workspace=text)
    assert widehead.plan(q, k, v, limits=limits).to_dict()["limits"]["workspace_bytes"] == count


def test_limits_are_values():
    limits = widehead.Limits(workspace="1MiB", threads=3, precision="high")
    assert limits == widehead.Limits(workspace="1MiB", threads=3, precision="high")
    assert pickle.loads(pickle.dumps(limits)) == limits
    assert hash(limits) == hash(pickle.loads(pickle.dumps(limits)))
    q, k, v = qkv()
    seen = widehead.plan(q, k, v, limits=limits).to_dict()["limits"]
    assert (seen["threads"], seen["precision"]) == (3, "high")
    with pytest.raises(AttributeError):
        limits.threads = 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workspace": "12 parsec"}, "workspace is '12 parsec'"),
        ({"workspace": -1}, "workspace is -1"),
        ({"policy": "fast"}, 'policy is "fast"; valid: automatic, fused, fused_above'),
        ({"precision": "low"}, 'precision is "low"'),
    ],
)
def test_wrong_limits_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        widehead.Limits(**arguments)


def test_a_workspace_of_another_type_is_named():
    with pytest.raises(TypeError, match="workspace is 1000000000.0; it must be bytes as an int"):
        widehead.Limits(workspace=1e9)


def test_a_promise_about_fresh_keys_reaches_the_planner():
    q, k, v = qkv()
    for promise, number in ((None, -1), (0, 0), (64, 64)):
        limits = widehead.Limits(fresh_keys=promise)
        assert widehead.plan(q, k, v, limits=limits).to_dict()["limits"]["fresh_keys"] == number
    with pytest.raises(ValueError, match="fresh_keys is -5"):
        widehead.plan(q, k, v, limits=widehead.Limits(fresh_keys=-5))


def test_policies_reach_the_planner():
    q, k, v = qkv(length=(64, 100))
    above = widehead.Limits(policy="fused_above", fused_above=101)
    assert widehead.plan(q, k, v, limits=above).kernel == "cpu_unfused"
    fused = widehead.Limits(policy="fused_above", fused_above=100)
    assert widehead.plan(q, k, v, limits=fused).kernel != "cpu_unfused"


@pytest.mark.parametrize("cuts", [(0, 77), (0, 1, 40, 77), (0, 10, 20, 20, 77)])
def test_merge_of_parts_is_the_whole(cuts):
    q, k, v = qkv()
    mask = np.random.default_rng(3).random((2, 1, 33, 77)) < 0.1
    mask[:, :, :5] = False
    mask[:, :, 5, :40] = False
    parts = [
        widehead.sdpa(
            q, k[:, :, a:b], v[:, :, a:b], mask=mask[..., a:b], return_log_sum_exp=True
        )
        for a, b in zip(cuts, cuts[1:])
    ]
    out, log_sum_exp = widehead.merge(parts)
    expected, expected_lse = oracle(q, k, v, mask=mask)
    assert relative_rms(out, expected) <= 4e-6
    assert np.isneginf(log_sum_exp[:, :, :5]).all() and not out[:, :, :5].any()
    np.testing.assert_allclose(log_sum_exp[:, :, 5:], expected_lse[:, :, 5:], atol=1e-5)


def test_merge_joins_the_sinks_once():
    q, k, v = qkv()
    sinks = np.array([0.5, -1, 2, 0], np.float32)
    parts = [
        widehead.sdpa(q, k[:, :, a:b], v[:, :, a:b], return_log_sum_exp=True)
        for a, b in ((0, 20), (20, 77))
    ]
    out, log_sum_exp = widehead.merge(parts, sinks=sinks)
    expected, expected_lse = oracle(q, k, v, sinks=sinks)
    assert relative_rms(out, expected) <= 4e-6
    np.testing.assert_allclose(log_sum_exp, expected_lse, atol=1e-5)


def test_merge_names_what_does_not_fit():
    q, k, v = qkv()
    part = out, log_sum_exp = widehead.sdpa(q, k, v, return_log_sum_exp=True)
    with pytest.raises(ValueError, match="parts is empty"):
        widehead.merge([])
    with pytest.raises(ValueError, match=r"parts\[1\].out is \[1, .*it must be"):
        widehead.merge([part, (out[:1], log_sum_exp[:1])])
    with pytest.raises(TypeError, match=r"parts\[0\].log_sum_exp is float16; it must be float32"):
        widehead.merge([(out, log_sum_exp.astype(np.float16))])
    with pytest.raises(ValueError, match=r"parts\[1\] is .*must be a tuple"):
        widehead.merge([part, out])
    with pytest.raises(ValueError, match=r"sinks is \[3\]; it must be \[heads_q\]"):
        widehead.merge([part], sinks=np.zeros(3, np.float32))
    with pytest.raises(TypeError, match=r"parts\[0\].out is a int; it must be an array"):
        widehead.merge([(1, 2)])


def test_tables():
    names = [each.name for each in widehead.kernels()]
    assert "cpu_prefill" in names and names.index("cpu_prefill") < names.index("cpu_reference")
    gemma = widehead.models()["gemma-4-31b"]
    assert [(layer.heads_q, layer.heads_kv, layer.dim_qk) for layer in gemma.layers] == [
        (32, 4, 512),
        (32, 16, 256),
    ]
    assert gemma.layers[1].window == (1023, 0) and gemma.layers[0].scale == 1.0
    assert [layer.count for layer in gemma.layers] == [10, 50]
    shared = widehead.models()["gemma-4-e2b"].layers[1]
    assert (shared.count, shared.cached, shared.phase) == (28, 12, None)
    qwen = widehead.models()["qwen3.5-122b-a10b"]
    assert (qwen.layers[0].count, qwen.linear_layers) == (12, 36)
    deepseek = widehead.models()["deepseek-v3"].layers[0]
    assert (deepseek.dim_qk, deepseek.dim_v) == (192, 128)
    assert (deepseek.count, deepseek.phase) == (61, "prefill")
    assert widehead.device("cpu")["cores"] >= 1
    with pytest.raises(ValueError, match="device is 'tpu'"):
        widehead.device("tpu")
    assert widehead.__version__.count(".") == 2


@pytest.mark.parametrize("limits", [{}, {"threads": 2}, "threads=2", 0])
def test_limits_of_another_type_name_the_argument(limits):
    q = np.zeros((1, 1, 2, 8), np.float32)
    for call in (widehead.sdpa, widehead.plan):
        with pytest.raises(TypeError) as raised:
            call(q, q, q, limits=limits)
        assert str(raised.value).startswith(f"limits is {limits!r}; it must be a widehead.Limits")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"threads": "2"}, "threads is '2'; it must be a whole number from 0 to 4096"),
        ({"threads": 1.5}, "threads is 1.5; it must be a whole number from 0 to 4096"),
        ({"threads": True}, "threads is True; it must be a whole number from 0 to 4096"),
        ({"threads": 10**12}, "threads is 1000000000000; it must be a whole number from 0 to 4096"),
        ({"threads": -1}, "threads is -1; it must be a whole number from 0 to 4096"),
        ({"fused_above": None}, "fused_above is None; it must be a whole number from 0 to"),
        ({"fresh_keys": 2**70}, "fresh_keys is 1180591620717411303424; it must be a whole number"),
        ({"workspace": True}, "workspace is True; it must be bytes as an int"),
        ({"workspace": 10**30}, "it must be bytes from 0 to 18446744073709551615, or None"),
        ({"policy": 3}, "policy is 3; it must be a string"),
        ({"kernel": 3}, "kernel is 3; it must be a string or None"),
        ({"precision": None}, "precision is None; it must be a string"),
        ({"batch_invariant": "no"}, "batch_invariant is 'no'; it must be True or False"),
        ({"longest_step_ms": "1"}, "longest_step_ms is '1'; it must be a number of milliseconds"),
        ({"longest_step_ms": float("nan")}, "longest_step_ms is nan; it must be a number of"),
    ],
)
def test_limits_name_the_value_and_what_is_valid(values, words):
    with pytest.raises((TypeError, ValueError)) as raised:
        widehead.Limits(**values)
    assert words in str(raised.value)


def test_limits_take_numbers_of_numpy_and_any_size():
    assert widehead.Limits(threads=np.int64(2)) == widehead.Limits(threads=2)
    assert widehead.Limits(workspace="99999999999TiB").core_values()["workspace_bytes"] == 2**64 - 1


def test_what_is_no_bool_or_shape_says_so():
    q = np.zeros((1, 1, 2, 8), np.float32)
    with pytest.raises(TypeError, match="return_log_sum_exp is 'yes'; it must be True or False"):
        widehead.sdpa(q, q, q, return_log_sum_exp="yes")
    with pytest.raises(TypeError, match="gradients is 1; it must be True or False"):
        widehead.plan(q, q, q, gradients=1)
    with pytest.raises(TypeError, match=r"shape is \(1, 2.5\); it must be a tuple of whole numbers"):
        widehead.Spec((1, 2.5))
    with pytest.raises(TypeError, match="dtype is 3; it must be a string"):
        widehead.Spec((1, 2), 3)
    with pytest.raises(TypeError, match="key_lengths is 3.5; it must be a whole number"):
        widehead.sdpa(q, q, q, key_lengths=[3.5])


def test_wrong_types_of_the_small_functions_are_named():
    q, codes = np.zeros((1, 1, 2, 8), np.float32), np.zeros((1, 1, 2, 8), np.uint8)
    new, slots = np.zeros((1, 1, 8), np.float32), np.zeros(1, np.int64)
    wrong = [
        (lambda: widehead.sdpa(q, widehead.Quantised(codes, None), q), "k has the format None; it must"),
        (lambda: widehead.merge(5), "parts is 5; it must be a list of (out, log_sum_exp)"),
        (lambda: widehead.device(3), "device is 3; it must be a string"),
        (lambda: widehead.append(None, q, new, new, slots), "k is a NoneType; it must be"),
        (lambda: widehead.append(q, q.copy(), None, new, slots), "new_k is a NoneType; it must be"),
        (lambda: widehead.append(q, q.copy(), new, new, None), "slots is a NoneType; it must be"),
    ]
    for call, words in wrong:
        with pytest.raises(TypeError) as raised:
            call()
        assert words in str(raised.value)
