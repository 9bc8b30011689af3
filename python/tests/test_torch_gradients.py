"""PyTorch: gradients beside those of the definition, in float64 by PyTorch's own derivatives."""

import pytest
import widehead

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
import widehead.torch  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

LENGTHS = (33, 77)


def inputs(heads=(4, 2), dims=(64, 48), dtype=torch.float32, batch=2):
    torch.manual_seed(0)
    shapes = [
        (batch, heads[0], LENGTHS[0], dims[0]),
        (batch, heads[1], LENGTHS[1], dims[0]),
        (batch, heads[1], LENGTHS[1], dims[1]),
    ]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def definition(q, k, v, scale=None, causal=False, window=None, softcap=None, mask=None, sinks=None):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    diagonal = torch.arange(q.shape[-2])[:, None] + k.shape[-2] - q.shape[-2]
    keys = torch.arange(k.shape[-2])
    hidden = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bool)
    if causal:
        hidden |= keys > diagonal
    if window is not None:
        hidden |= (keys < diagonal - window[0]) | (keys > diagonal + window[1])
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[-2]] @ v


def assert_same_gradients(tensors, options, tolerance):
    out = widehead.sdpa(*tensors[:3], **options)
    d_out = torch.randn(out.shape).to(out.dtype)
    actual = torch.autograd.grad(out, tensors, d_out)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    names = ["q", "k", "v", "sinks"][: len(wide)]
    wide_options = {
        name: option.double() if isinstance(option, torch.Tensor) and option.is_floating_point() else option
        for name, option in options.items()
    } | ({"sinks": wide[3]} if len(wide) == 4 else {})
    expected = torch.autograd.grad(definition(*wide[:3], **wide_options), wide, d_out.double())
    for name, have, want in zip(names, actual, expected, strict=True):
        error = (have.double() - want).norm() / want.norm()
        assert error <= tolerance, f"{name}: {error}"


CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (20, 0)},
    "softcap": {"softcap": 2.0},
    "boolean mask": {"mask": torch.rand(LENGTHS) < 0.8},
    "additive mask": {"mask": torch.randn(2, 1, *LENGTHS)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 4e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
def test_gradients_are_the_definitions(case, dtype, tolerance):
    assert_same_gradients(inputs(dtype=dtype), CASES[case], tolerance)


LEN_Q, LEN_K = (33, 0, 1, 20, 7), (77, 12, 20, 0, 5)  # none of one side or the other, too
PACKED = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": "top_left"},
    "window": {"causal": True, "window": (20, 0)},
    "both sides": {"window": (4, 3)},
    "softcap and sinks": {"causal": True, "softcap": 2.0, "sinks": True},
    "lengths and starts": {
        "causal": True, "key_lengths": [70, 12, 20, 0, 4], "key_starts": [0, 3, 5, 0, 1]
    },
}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed_inputs(dtype=torch.float32, tail=3):
    """Tokens by heads; the last ones are no sequence's, and NaN."""
    torch.manual_seed(0)
    shapes = [(sum(LEN_Q), 4, 64), (sum(LEN_K), 2, 64), (sum(LEN_K), 2, 48)]
    padding = [torch.full((tail, *shape[1:]), torch.nan) for shape in shapes]
    return [
        torch.cat([torch.randn(shape), nan]).to(dtype).requires_grad_()
        for shape, nan in zip(shapes, padding)
    ]


def one_by_one(q, k, v, **options):
    """Each sequence as a dense batch of one."""
    lengths, starts = options.pop("key_lengths", None), options.pop("key_starts", None)
    outs, first_q, first_k = [], 0, 0
    for b, (len_q, len_k) in enumerate(zip(LEN_Q, LEN_K)):
        rows = [
            x[first : first + length].transpose(0, 1)[None]
            for x, first, length in ((q, first_q, len_q), (k, first_k, len_k), (v, first_k, len_k))
        ]
        keys = {"key_lengths": [lengths[b]], "key_starts": [starts[b]]} if lengths else {}
        outs.append(widehead.sdpa(*rows, **options, **keys)[0].transpose(0, 1))
        first_q, first_k = first_q + len_q, first_k + len_k
    return torch.cat(outs)


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 4e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
def test_packed_gradients_are_those_of_each_sequence(case, dtype, tolerance):
    tensors, options = packed_inputs(dtype), dict(PACKED[case])
    if "sinks" in options:
        options["sinks"] = torch.randn(4).requires_grad_()
        tensors.append(options["sinks"])
    layouts = {"query_offsets": offsets(LEN_Q), "key_offsets": offsets(LEN_K)}
    d_out = torch.randn(sum(LEN_Q), 4, 48).to(dtype)
    expected = torch.autograd.grad(one_by_one(*tensors[:3], **options), tensors, d_out)
    out = widehead.sdpa(*tensors[:3], **layouts, **options)
    actual = torch.autograd.grad(out[: sum(LEN_Q)], tensors, d_out)
    for name, have, want in zip("q k v sinks".split(), actual, expected):
        error = (have.double() - want.double()).norm() / want.double().norm()
        assert error <= tolerance, f"{name}: {error}"


def test_packed_queries_of_dense_keys_and_dense_queries_of_packed_keys():
    q, k, v = packed_inputs(tail=0)
    dense_k, dense_v = (torch.randn(5, 2, 30, x.shape[-1]).requires_grad_() for x in (k, v))
    outs = [
        widehead.sdpa(rows.transpose(0, 1)[None], dense_k[b : b + 1], dense_v[b : b + 1], causal=True)[0]
        for b, rows in enumerate(q.split(LEN_Q))
    ]
    tensors = (q, dense_k, dense_v)
    expected = torch.autograd.grad(torch.cat([each.transpose(0, 1) for each in outs]).sin().sum(), tensors)
    packed = widehead.sdpa(*tensors, query_offsets=offsets(LEN_Q), causal=True)
    for have, want in zip(torch.autograd.grad(packed.sin().sum(), tensors), expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)

    dense_q = torch.randn(5, 4, 9, 64).requires_grad_()
    outs = [
        widehead.sdpa(dense_q[b : b + 1], *(x.transpose(0, 1)[None] for x in rows), causal=True)
        for b, rows in enumerate(zip(k.split(LEN_K), v.split(LEN_K)))
    ]
    tensors = (dense_q, k, v)
    expected = torch.autograd.grad(torch.cat(outs).sin().sum(), tensors)
    packed = widehead.sdpa(*tensors, key_offsets=offsets(LEN_K), causal=True)
    for have, want in zip(torch.autograd.grad(packed.sin().sum(), tensors), expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_packed_gradients_of_compiled_code_and_checkpoints():
    tensors = packed_inputs(tail=0)
    layouts = {"query_offsets": offsets(LEN_Q), "key_offsets": offsets(LEN_K), "len_q": 33, "len_k": 77}

    def loss(q, k, v):
        return widehead.sdpa(q, k, v, causal=True, **layouts).sin().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    again = checkpoint(loss, *tensors, use_reentrant=False)
    for actual in (torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(again, tensors)):
        for have, want in zip(actual, expected, strict=True):
            assert torch.equal(have, want)


def test_gradients_of_tokens_that_are_no_sequences_are_zero():
    tensors = packed_inputs()
    out = widehead.sdpa(*tensors, query_offsets=offsets(LEN_Q), key_offsets=offsets(LEN_K))
    for gradient in torch.autograd.grad(out[: sum(LEN_Q)].sum(), tensors):
        assert gradient.isfinite().all() and gradient[-3:].eq(0).all()


def test_sinks_have_gradients():
    sinks = torch.randn(4).requires_grad_()
    assert_same_gradients([*inputs(), sinks], {"causal": True, "sinks": sinks}, 4e-6)


def test_strides_do_not_matter():
    q, k, v = (tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs())
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    assert_same_gradients(tensors, {"causal": True}, 4e-6)
    # A sum hands on one number for all.
    assert torch.autograd.grad(widehead.sdpa(q, k, v).sum(), v)[0].isfinite().all()


def test_gradcheck_with_a_loose_step():
    q, k, v = (tensor[:1, :, :5, :8].detach().requires_grad_() for tensor in inputs())

    def attend(q, k, v):
        return widehead.sdpa(q, k, v, softcap=3.0)

    assert torch.autograd.gradcheck(
        attend, (q, k, v), eps=1e-2, atol=2e-3, rtol=2e-2, check_batched_grad=False
    )


def test_sdpa_trains_as_pytorchs():
    q, k, v = inputs(heads=(4, 4))
    for options in ({}, {"is_causal": True}):
        expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, **options).sin().sum(), (q, k, v))
        actual = torch.autograd.grad(widehead.torch.sdpa(q, k, v, **options).sin().sum(), (q, k, v))
        for have, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_compiled_code_has_the_same_gradients():
    q, k, v = inputs()

    def loss(q, k, v):
        return widehead.sdpa(q, k, v, causal=True).sin().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    actual = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(q, k, v), (q, k, v))
    for have, want in zip(actual, expected, strict=True):
        assert torch.equal(have, want)


def test_checkpoints_compute_the_same():
    q, k, v = inputs()
    expected = torch.autograd.grad(widehead.sdpa(q, k, v).sum(), (q, k, v))
    again = checkpoint(lambda *tensors: widehead.sdpa(*tensors), q, k, v, use_reentrant=False)
    for have, want in zip(torch.autograd.grad(again.sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(have, want)


def test_what_has_no_gradient_says_so():
    q, k, v = inputs()
    mask = torch.randn(LENGTHS).requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient of masks"):
        widehead.sdpa(q, k, v, mask=mask).sum().backward()
    _, log_sum_exp = widehead.sdpa(q, k, v, return_log_sum_exp=True)
    with pytest.raises(NotImplementedError, match="through the log-sum-exp"):
        log_sum_exp.sum().backward()
    (dq,) = torch.autograd.grad(widehead.sdpa(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        dq.sum().backward()


def test_limits_for_the_forward_pass_leave_the_backward_pass_alone():
    q, k, v = inputs()
    limits = widehead.Limits(kernel="cpu_unfused", threads=1)
    expected = torch.autograd.grad(widehead.sdpa(q, k, v).sum(), (q, k, v))
    actual = torch.autograd.grad(widehead.sdpa(q, k, v, limits=limits).sum(), (q, k, v))
    for have, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_merge_says_that_it_has_no_gradient():
    out = torch.randn(1, 2, 3, 4, requires_grad=True)
    part = (out, torch.zeros(1, 2, 3))
    with pytest.raises(NotImplementedError, match="merge has no backward"):
        widehead.merge([part])
    with torch.no_grad():
        assert torch.equal(widehead.merge([part])[0], out)
