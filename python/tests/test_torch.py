"""PyTorch: the operator, the borrowed signature, compilation, gradients, threads."""

import subprocess
import sys

import numpy as np
import pytest
import widehead

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
import widehead.torch  # noqa: E402
from oracle import qkv  # noqa: E402

LIMITS = widehead.Limits(threads=1)


def tensors(**shapes):
    return tuple(torch.from_numpy(array) for array in qkv(**shapes))


def test_operator_keeps_pytorchs_rules():
    q, k, v = tensors()
    for wants_log_sum_exp in (False, True):
        arguments = (q, k, v, None, None, None, None, None, "bottom_right", -1, -1, None,
                     wants_log_sum_exp, "")  # fmt: skip
        torch.library.opcheck(torch.ops.widehead.attention, arguments)


SDPA_CASES = {
    "plain": ((2, 4, 33, 64), (2, 4, 77, 64), {}),
    "causal": ((2, 4, 33, 64), (2, 4, 77, 64), {"is_causal": True}),
    "three dimensions": ((4, 33, 64), (4, 77, 64), {}),
    "two dimensions": ((33, 64), (77, 64), {"is_causal": True}),
    "five dimensions": ((3, 2, 4, 33, 64), (3, 2, 4, 77, 64), {}),
    "grouped": ((2, 8, 33, 64), (2, 2, 77, 64), {"enable_gqa": True}),
    "scale": ((2, 4, 33, 64), (2, 4, 77, 64), {"scale": 0.3}),
    "boolean mask": ((2, 4, 33, 64), (2, 4, 77, 64), {"attn_mask": torch.rand(33, 77) < 0.8}),
    "additive mask": ((2, 4, 33, 64), (2, 4, 77, 64), {"attn_mask": torch.randn(2, 1, 33, 77)}),
    "five-dimensional mask": (
        (3, 2, 4, 33, 64), (3, 2, 4, 77, 64), {"attn_mask": torch.randn(3, 2, 1, 33, 77)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SDPA_CASES)
def test_sdpa_means_what_pytorchs_means(case):
    q_shape, k_shape, options = SDPA_CASES[case]
    torch.manual_seed(0)
    q, k, v = torch.randn(q_shape), torch.randn(k_shape), torch.randn(k_shape)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    actual = widehead.torch.sdpa(q, k, v, **options)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 4, 33, 64), (2, 4, 0, 64), (0, 2, 4, 33, 64)])
def test_sdpa_of_no_elements(shape):
    q = torch.randn(shape)
    k = torch.randn((*shape[:-2], 77, 64))
    expected = F.scaled_dot_product_attention(q, k, k)
    actual = widehead.torch.sdpa(q, k, k)
    assert actual.shape == expected.shape and not actual.any()
    no_keys = widehead.torch.sdpa(k, q[..., :0, :], q[..., :0, :])
    assert no_keys.shape == k.shape and not no_keys.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpa_obeys_autocast(dtype):
    q, k, v = tensors(heads=(4, 4), dim=(64, 64))
    mask = torch.randn(33, 77)
    with torch.autocast("cpu", dtype):
        expected = F.scaled_dot_product_attention(q, k, v.to(dtype), mask)
        actual = widehead.torch.sdpa(q, k, v.to(dtype), mask)
        with widehead.torch.override_sdpa(LIMITS):
            overridden = F.scaled_dot_product_attention(q, k, v, mask)
        compile_ = torch.compile(widehead.torch.sdpa, fullgraph=True, backend="eager")
        compiled = compile_(q, k, v, mask)
    assert expected.dtype == actual.dtype == overridden.dtype == compiled.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(overridden, actual) and torch.equal(compiled, actual)


def test_sdpa_says_what_it_does_not_do():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="dropout_p is 0.5"):
        widehead.torch.sdpa(q, k, v, dropout_p=0.5)
    with pytest.raises(ValueError, match="query has 4 heads and key 2"):
        widehead.torch.sdpa(q, k, v)


def test_what_is_no_tensor_bool_or_limits_is_named():
    q = torch.zeros(1, 2, 4, 16)
    wrong = [
        (lambda: widehead.torch.sdpa(None, q, q), "query is a NoneType; it must be a torch.Tensor"),
        (lambda: widehead.torch.sdpa(q, q.numpy(), q), "key is a ndarray; it must be a torch.Tensor"),
        (lambda: widehead.torch.sdpa(q, q, q, is_causal="yes"), "is_causal is 'yes'; it must be True or False"),
        (lambda: widehead.torch.sdpa(q, q, q, limits={}), "limits is {}; it must be a widehead.Limits"),
        (lambda: widehead.torch.override_sdpa(limits={}).__enter__(), "limits is {}"),
        (
            lambda: widehead.sdpa(q.requires_grad_(), q, q, return_log_sum_exp="yes"),
            "return_log_sum_exp is 'yes'; it must be True or False",
        ),
    ]
    for call, words in wrong:
        with pytest.raises(TypeError) as raised:
            call()
        assert words in str(raised.value)


def test_override_is_opt_in_and_ends():
    q, k, v = tensors(heads=(4, 4), dim=(64, 64))
    original = F.scaled_dot_product_attention
    expected = original(q, k, v)
    hidden = torch.zeros(33, 77, dtype=torch.bool)
    with widehead.torch.override_sdpa(LIMITS):
        assert F.scaled_dot_product_attention is not original
        actual = F.scaled_dot_product_attention(q, k, v)
        assert not F.scaled_dot_product_attention(q, k, v, attn_mask=hidden).any()
        layer = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        layer(q[:, 0], k[:, 0], k[:, 0], need_weights=False)
    assert F.scaled_dot_product_attention is original
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(ZeroDivisionError), widehead.torch.override_sdpa():
        1 / 0  # noqa: B018
    assert F.scaled_dot_product_attention is original


@pytest.mark.slow
def test_compiles_in_one_graph():
    q, k, v = tensors()
    sinks, lengths = torch.randn(4), torch.tensor([60, 3], dtype=torch.int32)

    def attend(q, k, v):
        out, log_sum_exp = widehead.sdpa(
            q * 2, k, v, causal=True, window=(20, None), sinks=sinks, key_lengths=lengths,
            softcap=4.0, return_log_sum_exp=True, limits=LIMITS,
        )  # fmt: skip
        return out + 1, log_sum_exp

    expected = attend(q, k, v)
    torch._dynamo.reset()
    actual = torch.compile(attend, fullgraph=True)(q, k, v)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_fake_tensors_get_shapes():
    q, k, v = (tensor.to("meta") for tensor in tensors())
    out, log_sum_exp = widehead.sdpa(q, k, v, return_log_sum_exp=True)
    assert out.is_meta and out.shape == (2, 4, 33, 48) and log_sum_exp.shape == (2, 4, 33)


def test_no_grad_keeps_nothing():
    q, k, v = tensors()
    q.requires_grad_()
    out = widehead.sdpa(q, k, v)
    with torch.no_grad():
        silent = widehead.sdpa(q, k, v)
    assert out.requires_grad and not silent.requires_grad
    assert torch.equal(silent, out)


def test_threads_are_pytorchs_unless_the_limits_say():
    q, k, v = tensors()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert widehead.plan(q, k, v).to_dict()["limits"]["threads"] == 1
        torch.set_num_threads(2)
        assert widehead.plan(q, k, v).to_dict()["limits"]["threads"] == 2
        assert widehead.plan(q, k, v, limits=LIMITS).to_dict()["limits"]["threads"] == 1
    finally:
        torch.set_num_threads(before)
    assert widehead.plan(*qkv()).to_dict()["limits"]["threads"] == 0


def test_calls_run_on_pytorchs_own_threads():
    """Threads of ours beside them would want the same cores: a call starts none."""
    program = """if True:
        import os, torch, widehead
        torch.set_num_threads(2)
        torch.rand(1 << 22).exp_()
        q = torch.rand(1, 16, 512, 64)
        threads = set(os.listdir("/proc/self/task"))
        out = widehead.sdpa(q, q, q, causal=True)
        assert set(os.listdir("/proc/self/task")) == threads
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.testing.assert_close(out, expected)
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("first", [
    "widehead.sdpa(q, q, q)",
    "torch.rand(1 << 22).exp_()",
    "import widehead.torch; torch.rand(1 << 22).exp_()",
])
def test_a_forked_process_does_not_wait_for_its_parents_threads(first):
    """Whoever had started them, and whether PyTorch's tensors were met before or not."""
    program = f"""if True:
        import os, signal, torch, widehead
        torch.set_num_threads(2)
        q, out = torch.rand(1, 16, 512, 64), torch.zeros(1, 16, 512, 64).share_memory_()
        {first}
        assert len(os.listdir("/proc/self/task")) > 1
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            widehead.sdpa(q, q, q, out=out)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert widehead.sdpa(q, q, q).numpy().tobytes() == out.numpy().tobytes()
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_subclasses_go_through_the_operator():
    class Named(torch.Tensor):
        pass

    q, k, v = tensors()
    out = widehead.sdpa(q.as_subclass(Named), k, v)
    assert np.array_equal(out.as_subclass(torch.Tensor).numpy(), widehead.sdpa(q, k, v).numpy())


def test_dispatch_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    q, k, v = tensors()
    with Record():
        widehead.sdpa(q, k, v)
    assert "widehead.attention.default" in seen


def test_transforms_see_the_operator():
    q, k, v = (torch.stack([tensor, 2 * tensor]) for tensor in tensors())
    out = torch.func.vmap(lambda q, k, v: widehead.sdpa(q, k, v, causal=True))(q, k, v)
    for i in range(2):
        assert torch.equal(out[i], widehead.sdpa(q[i], k[i], v[i], causal=True))
    functional = torch.func.functionalize(lambda q: widehead.sdpa(q, k[0], v[0]) + 1)
    assert torch.equal(functional(q[0]), widehead.sdpa(q[0], k[0], v[0]) + 1)


def test_tracing_records_the_operator():
    q, k, v = tensors()
    traced = torch.jit.trace(lambda q: widehead.sdpa(q, k, v), (q,), check_trace=False)
    assert torch.equal(traced(2 * q), widehead.sdpa(2 * q, k, v))


WRONG = {
    "causal": ({"causal": "left"}, ValueError),
    "causal by number": ({"causal": 1}, ValueError),
    "window": ({"window": 7}, ValueError),
    "window list": ({"window": [7, 0]}, ValueError),
    "window side": ({"window": (-2, 0)}, ValueError),
    "window side past every length": ({"window": (0, 2**31)}, ValueError),
    "window side past 64 bits": ({"window": (2**64, None)}, ValueError),
    "three sides": ({"window": (1, 2, 3)}, ValueError),
    "scale": ({"scale": float("nan")}, ValueError),
    "lengths": ({"key_lengths": [1, 78]}, ValueError),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_operator_says_what_the_direct_call_says(case):
    options, error = WRONG[case]
    q, k, v = tensors()
    with pytest.raises(error) as direct:
        widehead.sdpa(q, k, v, **options)
    with pytest.raises(error) as through_operator:
        widehead.sdpa(q.requires_grad_(), k, v, **options)
    assert str(through_operator.value) == str(direct.value)
    assert "-1" not in str(direct.value) and "window_" not in str(direct.value)


def negated(tensor):
    """The same numbers as a lazily negated view: its memory holds the others."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sinks"])
@pytest.mark.parametrize("route", ["direct", "operator", "from NumPy"])
def test_negated_views_are_read_by_their_value(name, route):
    arguments = dict(zip("qkv", tensors()), mask=torch.randn(33, 77), sinks=torch.randn(4))
    expected = widehead.sdpa(**arguments)
    arguments[name] = negated(arguments[name])
    if route == "operator":
        arguments["q"].requires_grad_()
    if route == "from NumPy" and name != "q":
        arguments["q"] = arguments["q"].numpy()
    actual = widehead.sdpa(**arguments)
    assert torch.equal(torch.as_tensor(actual), expected)
    assert widehead.plan(**arguments).kernel is not None


def test_negated_views_are_read_by_their_value_in_pytorchs_signature():
    q, k, v = tensors(heads=(4, 4), dim=(64, 64))
    mask = torch.randn(33, 77)
    expected = widehead.torch.sdpa(q, k, v, mask)
    actual = widehead.torch.sdpa(negated(q), negated(k), negated(v), negated(mask))
    assert torch.equal(actual, expected)
    fewer = widehead.torch.attention_rows(negated(q), negated(k), negated(v), mask=negated(mask))
    assert torch.equal(fewer.transpose(1, 2), expected)


def test_a_plan_makes_no_values_real():
    q, k, v = tensors()
    huge = torch.zeros(1).expand(2, 2, 77, 64)
    view = torch.complex(huge, huge)[:, :, ::7].conj().imag
    assert widehead.plan(q, view, view).to_dict() == widehead.plan(
        q, torch.empty_like(view), torch.empty_like(view)
    ).to_dict()


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sinks"])
@pytest.mark.parametrize("route", ["direct", "operator"])
def test_zero_tensors_are_zeros(name, route):
    arguments = dict(zip("qkv", tensors()), mask=torch.randn(33, 77), sinks=torch.randn(4))
    shape = arguments[name].shape
    expected = widehead.sdpa(**{**arguments, name: torch.zeros(shape)})
    arguments[name] = torch._efficientzerotensor(shape)
    if route == "operator":
        arguments["k" if name == "q" else "q"].requires_grad_()
    assert torch.equal(widehead.sdpa(**arguments), expected)
    assert widehead.plan(**arguments).kernel is not None


@pytest.mark.parametrize("route", ["direct", "operator"])
@pytest.mark.parametrize("kind", ["negated", "zero"])
def test_a_lazy_out_is_refused(kind, route):
    q, k, v = tensors()
    shape = (2, 4, 33, 48)
    out = negated(torch.zeros(shape)) if kind == "negated" else torch._efficientzerotensor(shape)
    if route == "operator":
        q.requires_grad_()
    with pytest.raises(TypeError, match="out is a lazily negated view or a lazy zero tensor"):
        widehead.sdpa(q, k, v, out=out)
    if route == "direct":
        with pytest.raises(TypeError, match="out is a lazily negated view or a lazy zero tensor"):
            widehead.plan(q, k, v, out=out)


UNREADABLE = {
    "sparse": (lambda x: x.to_sparse(), "is a torch.sparse_coo tensor; it must be dense: pass"),
    "compressed": (lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(), "is a torch.sparse_csr tensor"),
    "nested": (
        lambda x: torch.nested.as_nested_tensor(list(x.unsqueeze(0))), "is a nested tensor; it must be dense: pass",
    ),
    "jagged": (
        lambda x: torch.nested.as_nested_tensor(list(x.unsqueeze(0)), layout=torch.jagged),
        "is a nested tensor; it must be dense: pass",
    ),
    "conjugate": (lambda x: torch.complex(x, x).conj(), "is complex64; it must be"),
    "complex": (lambda x: torch.complex(x, x), "is complex64; it must be"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sinks", "out"])
def test_what_has_no_plain_memory_is_refused_by_name(name, kind):
    make, message = UNREADABLE[kind]
    arguments = dict(zip("qkv", tensors()), mask=torch.randn(33, 77), sinks=torch.randn(4))
    arguments["out"] = torch.empty(2, 4, 33, 48)
    arguments[name] = make(arguments[name])
    with pytest.raises(TypeError, match=f"^{name} {message}"):
        widehead.plan(**arguments)
    with pytest.raises(TypeError, match=f"^{name} {message}"):
        widehead.sdpa(**arguments)


@pytest.mark.parametrize("kind", ["sparse", "nested", "jagged"])
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_pytorchs_signature_refuses_by_its_own_names(name, kind):
    make, message = UNREADABLE[kind]
    q, k, v = tensors(heads=(4, 4))
    arguments = {"query": q, "key": k, "value": v, "attn_mask": torch.randn(33, 77)}
    arguments[name] = make(arguments[name])
    with pytest.raises(TypeError, match=f"^{name} {message}"):
        widehead.torch.sdpa(**arguments)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sinks"])
def test_tangents_are_refused_by_name(name):
    arguments = dict(zip("qkv", tensors()), mask=torch.randn(33, 77), sinks=torch.randn(4))
    expected = widehead.sdpa(**arguments)
    value, tangent = arguments[name], torch.ones_like(arguments[name])
    message = f"^{name} carries a tangent of forward-mode differentiation"
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(widehead.sdpa(**arguments), expected)  # none of them carries one
        dual = {**arguments, name: torch.autograd.forward_ad.make_dual(value, tangent)}
        with pytest.raises(NotImplementedError, match=message):
            widehead.sdpa(**dual)
        if name in "qkv":
            with pytest.raises(NotImplementedError, match=message):
                widehead.torch.sdpa(dual["q"], dual["k"], dual["v"], enable_gqa=True)

    def of(x):
        return widehead.sdpa(**{**arguments, name: x})

    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(of, (value,), (tangent,))
    two = torch.stack([value, value])
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(torch.func.vmap(of), (two,), (torch.ones_like(two),))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.vmap(lambda x: torch.func.jvp(of, (x,), (tangent,))[1])(two)


BROADCAST = {
    "batch of keys": ((3, 4, 33, 64), (1, 4, 77, 64), (1, 4, 77, 64)),
    "batch of queries": ((1, 4, 33, 64), (3, 4, 77, 64), (3, 4, 77, 64)),
    "batch of values": ((3, 4, 33, 64), (3, 4, 77, 64), (1, 4, 77, 64)),
    "heads of keys": ((3, 4, 33, 64), (3, 1, 77, 64), (3, 4, 77, 64)),
    "heads of values": ((3, 4, 33, 64), (3, 4, 77, 64), (3, 1, 77, 64)),
    "heads of both": ((3, 4, 33, 64), (3, 1, 77, 64), (3, 1, 77, 64)),
    "heads of queries": ((3, 1, 33, 64), (3, 4, 77, 64), (3, 4, 77, 64)),
    "no batch of keys": ((3, 4, 33, 64), (4, 77, 64), (4, 77, 64)),
    "no batch of queries": ((4, 33, 64), (3, 4, 77, 64), (3, 4, 77, 64)),
    "no heads": ((33, 64), (3, 4, 77, 64), (77, 64)),
    "two leading": ((3, 2, 4, 33, 64), (3, 1, 4, 77, 64), (1, 2, 4, 77, 64)),
    "one and two leading": ((3, 2, 4, 33, 64), (2, 4, 77, 64), (1, 4, 77, 64)),
    "grouped": ((3, 4, 33, 64), (1, 2, 77, 64), (3, 2, 77, 64), True),
    "grouped values": ((3, 4, 33, 64), (3, 2, 77, 64), (3, 1, 77, 64), True),
}


@pytest.mark.parametrize("case", BROADCAST)
@pytest.mark.parametrize("mask", [None, (33, 77), (4, 1, 77), (1, 1, 33, 77)])
def test_sdpa_broadcasts_as_pytorchs_does(case, mask):
    q_shape, k_shape, v_shape, *grouped = BROADCAST[case]
    torch.manual_seed(0)
    q, k, v = torch.randn(q_shape), torch.randn(k_shape), torch.randn(v_shape)
    options = {"enable_gqa": bool(grouped), "attn_mask": None if mask is None else torch.randn(mask)}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
    actual = widehead.torch.sdpa(q, k, v, **options)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    if mask is None:
        torch._dynamo.reset()
        compiled = torch.compile(widehead.torch.sdpa, fullgraph=True, backend="eager")
        assert torch.equal(compiled(q, k, v, **options), actual)


def test_sdpa_says_what_does_not_broadcast():
    q = torch.randn(3, 4, 33, 64)
    for k_shape, v_shape, message in (
        ((3, 2, 77, 64), (3, 2, 77, 64), "query has 4 heads and key 2; they must be equal, or 1, or"),
        ((3, 4, 77, 64), (3, 2, 77, 64), "key has 4 heads and value 2; they must be equal, or 1"),
        ((2, 4, 77, 64), (2, 4, 77, 64), r"leading dimensions \[3\], \[2\] and \[2\]; they must"),
    ):
        k, v = torch.randn(k_shape), torch.randn(v_shape)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v)
        with pytest.raises(ValueError, match=message):
            widehead.torch.sdpa(q, k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masks_of_another_type_run_under_autocast(dtype, mask_dtype):
    q, k, v = tensors(heads=(4, 4), dim=(64, 64))
    mask = torch.randn(33, 77).to(mask_dtype)
    with torch.autocast("cpu", dtype):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        actual = widehead.torch.sdpa(q, k, v, mask)
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)


FIRST_CALL = """
import torch, widehead
IMPORT
q = torch.randn(1, 2, 8, 16)
attend = torch.compile(lambda q: widehead.sdpa(q, q, q) + 1, fullgraph=True, backend="eager")
for _ in range(3):
    out = attend(q)
assert torch.equal(out, widehead.sdpa(q, q, q) + 1)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.parametrize(("line", "graphs"), [("import widehead.torch", "1"), ("", "2")])
def test_the_first_call_of_a_process_may_be_compiled(line, graphs):
    """Without widehead.torch the first trace imports it, and the next call is traced again."""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_CALL.replace("IMPORT", line)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(result.stdout) <= int(graphs)
