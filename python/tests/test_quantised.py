"""Quantised keys and values: the answer is that over the cache that was widened before."""

from __future__ import annotations

import numpy as np
import pytest
import widehead
from widehead import Quantised

BATCH, HEADS_Q, HEADS_KV, LEN_K, DIM = 2, 6, 2, 70, 64
SCALES = {
    "tensor": (1,),
    "head": (HEADS_KV, 1, 1),
    "batch and head": (BATCH, HEADS_KV, 1, 1),
    "token": (BATCH, HEADS_KV, LEN_K, 1),
    "channel": (HEADS_KV, 1, DIM),
}


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def queries(random: np.random.Generator, len_q: int) -> np.ndarray:
    return random.standard_normal((BATCH, HEADS_Q, len_q, DIM)).astype(np.float32)


@pytest.mark.parametrize("len_q", [1, 40])
@pytest.mark.parametrize("scales", SCALES)
def test_int8(random, len_q, scales):
    codes = random.integers(-128, 128, (2, BATCH, HEADS_KV, LEN_K, DIM)).astype(np.int8)
    scale = (random.random((2, *SCALES[scales])) / 64).astype(np.float32)
    q = queries(random, len_q)
    k, v = (Quantised(codes[i], "int8", scale[i]) for i in range(2))
    have = widehead.sdpa(q, k, v, causal=True)
    wanted = widehead.sdpa(
        q,
        *(
            codes.astype(np.float32)
            * scale.reshape(2, *([1] * (5 - scale.ndim)), *scale.shape[1:])
        ),
        causal=True,
    )
    np.testing.assert_allclose(have, wanted, rtol=0, atol=2e-6)


def test_ggml_blocks(random):
    blocks = BATCH * HEADS_KV * LEN_K * DIM // 32
    scale = (random.random((blocks, 1)) / 64).astype(np.float16)
    eight = random.integers(-127, 128, (blocks, 32)).astype(np.int8)
    four = random.integers(0, 256, (blocks, 16)).astype(np.uint8)
    shape = (BATCH, HEADS_KV, LEN_K, -1)
    k = Quantised(
        np.hstack([scale.view(np.uint8), eight.view(np.uint8)]).reshape(shape), "q8_0"
    )
    v = Quantised(np.hstack([scale.view(np.uint8), four]).reshape(shape), "q4_0")
    nibbles = np.hstack([four & 15, four >> 4]).astype(np.float32) - 8
    widened = [
        (x * scale.astype(np.float32)).reshape(shape)
        for x in (eight.astype(np.float32), nibbles)
    ]
    q = queries(random, 3)
    np.testing.assert_allclose(
        widehead.sdpa(q, k, v), widehead.sdpa(q, *widened), rtol=0, atol=2e-6
    )


def test_float8_of_torch(random):
    torch = pytest.importorskip("torch")
    k = torch.from_numpy(
        random.standard_normal((BATCH, HEADS_KV, LEN_K, DIM)).astype(np.float32)
    )
    codes = k.to(torch.float8_e4m3fn)
    q = torch.from_numpy(queries(random, 1))
    stored = Quantised(codes.view(torch.uint8), "e4m3")
    have = widehead.sdpa(q, stored, stored)
    torch.testing.assert_close(have, widehead.sdpa(q, codes.float(), codes.float()))


def test_plans_say_what_is_stored(random):
    codes = np.zeros((1, 1, 8, 64), np.uint8)
    k = Quantised(codes, "e4m3", np.ones(1, np.float32))
    v = np.zeros((1, 1, 8, 64), np.float16)
    problem = widehead.plan(np.zeros((1, 1, 1, 64), np.float16), k, v).to_dict()[
        "problem"
    ]
    assert (problem["quantised_k"], problem["scales_k"]) == ("e4m3", "tensor")
    assert (problem["quantised_v"], problem["kv_dtype"]) == ("none", "f16")


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (
            Quantised(np.zeros((1, 1, 8, 64), np.int8), "int4"),
            "it must be e4m3, int8, q8_0 or q4_0",
        ),
        (Quantised(np.zeros((1, 1, 8, 64), np.uint8), "q8_0"), "blocks of 34 bytes"),
        (
            Quantised(
                np.zeros((1, 1, 8, 64), np.int8), "int8", np.ones((8, 64), np.float32)
            ),
            "must broadcast to",
        ),
    ],
)
def test_what_is_no_cache(k, message):
    with pytest.raises(ValueError, match=message):
        widehead.sdpa(np.zeros((1, 1, 1, 64), np.float32), k, k)


def test_codes_of_another_type():
    k = Quantised(np.zeros((1, 1, 8, 64), np.float32), "e4m3")
    with pytest.raises(
        TypeError, match="k is float32; codes of e4m3 must be float8_e4m3fn or uint8"
    ):
        widehead.sdpa(np.zeros((1, 1, 1, 64), np.float32), k, k)
