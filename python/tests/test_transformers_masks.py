"""What a structured mask says is what transformers' dense one says, whoever touches it."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from oracle import oracle, relative_rms  # noqa: E402
from torch_calls import Causal, tensors  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from widehead.transformers import StructuredMask, attention_forward, attention_mask  # noqa: E402


@settings(max_examples=300, deadline=None)
@given(
    len_q=st.integers(1, 12),
    past=st.integers(0, 12),
    tail=st.integers(0, 5),
    window=st.one_of(st.none(), st.integers(1, 20)),
    cut_off=st.integers(0, 6),
    counted_by_tensor=st.booleans(),
    padding=st.sampled_from([None, "none", "left", "right", "both", "holes", "short"]),
    compiled_decode=st.booleans(),
    kept=st.integers(1, 12),
    data=st.data(),
)
def test_structure_says_what_the_dense_mask_says(
    len_q, past, tail, window, cut_off, counted_by_tensor, padding, compiled_decode, kept, data
):
    """Against transformers' own boolean mask, for queries that are no padding themselves.

    ``cut_off``: keys that a window cache has let go of already.
    """
    count = past + len_q
    kv_offset = min(cut_off, past)
    len_k = count - kv_offset + tail
    present = None
    if padding is not None:
        present = torch.ones(2, count, dtype=torch.bool)
        cut = data.draw(st.integers(0, count))
        if padding in ("left", "both"):
            present[0, :cut] = False
        if padding in ("right", "both"):
            present[1, cut:] = False
        if padding == "holes":
            present = torch.tensor(
                data.draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count),
                                   min_size=2, max_size=2))
            )  # fmt: skip
        if padding == "short":
            present = present[:, :cut]
    function = causal_mask_function
    if window is not None:
        function = sliding_window_causal_mask_function(window)
    arguments = {
        "batch_size": 2,
        "q_length": len_q,
        "kv_length": len_k,
        "q_offset": torch.tensor(past) if counted_by_tensor else past,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": present,
        "allow_is_causal_skip": not compiled_decode,
    }
    mask = attention_mask(**copy.copy(arguments), local_size=window)
    arguments["allow_is_causal_skip"] = False
    expected = sdpa_mask(**arguments)
    assert isinstance(mask, StructuredMask)
    assert mask.shape == tuple(expected.shape) and len(mask.shape) == 4
    assert torch.equal(mask.dense(), expected)
    kept = min(kept, len_q)
    assert torch.equal(mask[:, :, -kept:, :].dense(), expected[:, :, -kept:, :])


@pytest.mark.parametrize(
    "function",
    [
        chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
        bidirectional_mask_function,
        and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0),
    ],
)
def test_other_patterns_become_boolean_masks(function):
    q, k, v = tensors(length=(10, 10))
    mask = attention_mask(2, 10, 10, mask_function=function)
    expected = sdpa_mask(2, 10, 10, mask_function=function, allow_is_causal_skip=False)
    assert torch.equal(mask, expected)
    out, _ = attention_forward(Causal(), q, k, v, mask)
    assert relative_rms(out.transpose(1, 2), oracle(q, k, v, mask=expected.numpy())[0]) <= 4e-6


def test_a_mask_of_another_shape_is_refused():
    q, k, v = tensors(length=(10, 20))
    with pytest.raises(ValueError, match="the mask is for 10 queries and 10 keys"):
        attention_forward(Causal(), q, k, v, attention_mask(2, 10, 10))


def test_unknown_window_functions_become_boolean_masks(monkeypatch):
    """As if transformers made its window masks in another way: slower, not wrong."""
    from widehead.transformers import _mask

    monkeypatch.setattr(_mask, "_REFERENCE", lambda batch, head, q, k: k <= q)
    function = sliding_window_causal_mask_function(5)
    expected = sdpa_mask(2, 10, 10, mask_function=function, allow_is_causal_skip=False)
    warnings = []
    monkeypatch.setattr(_mask.logger, "warning_once", warnings.append)
    assert torch.equal(attention_mask(2, 10, 10, mask_function=function), expected)
    assert len(warnings) == 1 and "does not know the window masks" in warnings[0]
    assert isinstance(attention_mask(2, 10, 10), StructuredMask)


MASK = dict(batch_size=2, q_length=10, kv_length=14, q_offset=4)
TOUCHES = {
    "first head": lambda mask: mask[:, 0],
    "other queries": lambda mask: mask[:, :, :4, :],
    "fewer keys": lambda mask: mask[..., :9],
    "a row": lambda mask: mask[1, 0, 3],
    "not": lambda mask: ~mask,
    "and": lambda mask: mask & torch.ones(14, dtype=torch.bool),
    "and, on the right": lambda mask: torch.ones(14, dtype=torch.bool) & mask,
    "added": lambda mask: torch.zeros(14) + mask,
    "compared": lambda mask: mask == 0,
    "compared otherwise": lambda mask: mask != 0,
    "function": lambda mask: torch.where(mask, 0.0, -1.0),
    "method of scores": lambda mask: torch.zeros(2, 3, 10, 14).masked_fill(mask, 1.0),
    "in a list": lambda mask: torch.cat([mask, mask], dim=-1),
    "method": lambda mask: mask.logical_not(),
    "conversion": lambda mask: mask.float(),
    "view": lambda mask: mask.expand(2, 3, 10, 14),
    "type": lambda mask: mask.dtype,
    "shape": lambda mask: (*mask.shape, mask.dim(), mask.ndim, mask.size(-1), mask.numel(), len(mask)),
    "device": lambda mask: mask.device,
}  # fmt: skip


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_mask_that_is_computed_with_is_the_boolean_tensor(touch):
    padding = torch.ones(2, 14, dtype=torch.bool)
    padding[0, :3] = False
    mask = attention_mask(**MASK, attention_mask=padding)
    assert isinstance(mask, StructuredMask)
    expected = sdpa_mask(**MASK, attention_mask=padding, allow_is_causal_skip=False)
    actual, wanted = TOUCHES[touch](mask), TOUCHES[touch](expected)
    assert torch.equal(actual, wanted) if isinstance(wanted, torch.Tensor) else actual == wanted


def test_a_dense_mask_lies_where_it_was_asked_for():
    mask = attention_mask(**MASK, device="meta")
    assert mask.dense().device.type == mask.device.type == "meta"
    assert mask.to("cpu").dense().device.type == mask.to("cpu").device.type == "cpu"
