"""PyTorch: the operator, the borrowed signature, compilation, gradients, threads."""

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


def test_sdpa_says_what_it_does_not_do():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="dropout_p is 0.5"):
        widehead.torch.sdpa(q, k, v, dropout_p=0.5)
    with pytest.raises(ValueError, match="query has 4 heads and key 2"):
        widehead.torch.sdpa(q, k, v)


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


def test_backward_says_that_it_is_not_there():
    q, k, v = tensors()
    q.requires_grad_()
    out = widehead.sdpa(q, k, v)
    with pytest.raises(NotImplementedError, match="widehead has no backward yet"):
        out.sum().backward()
    with torch.no_grad():
        silent = widehead.sdpa(q, k, v)
    assert not silent.requires_grad
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


def test_subclasses_go_through_the_operator():
    class Named(torch.Tensor):
        pass

    q, k, v = tensors()
    out = widehead.sdpa(q.as_subclass(Named), k, v)
    assert np.array_equal(out.as_subclass(torch.Tensor).numpy(), widehead.sdpa(q, k, v).numpy())
