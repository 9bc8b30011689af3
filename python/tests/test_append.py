"""widehead.append: new keys and values in caches of every layout."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import widehead

HEADS, DIM_QK, DIM_V, TOKENS = 2, 24, 16, 7
# Of 5 pages of 8 rows: any order, the second one nowhere.
SLOTS = np.array([39, -1, 0, 17, 8, 7, 30], np.int64)


def draw(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def new(dtype=np.float32):
    return draw(TOKENS, HEADS, DIM_QK, dtype=dtype), draw(TOKENS, HEADS, DIM_V, dtype=dtype, seed=1)


def expected(cache, rows, slots=SLOTS):
    """Of a cache [pages, heads_kv, page_size, dim]."""
    wanted = cache.copy()
    for slot, row in zip(slots, rows):
        if slot >= 0:
            wanted[slot // cache.shape[2], :, slot % cache.shape[2]] = row.astype(cache.dtype)
    return wanted


POOLS = {
    "heads before tokens": lambda dim: np.full((5, HEADS, 8, dim), 9, np.float32),
    "tokens before heads": lambda dim: np.full((5, 8, HEADS, dim), 9, np.float32).transpose(0, 2, 1, 3),
    "with room between": lambda dim: np.full((5, HEADS, 8, 2 * dim), 9, np.float32)[..., dim:],
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_pools(pool, dtype):
    k, v = POOLS[pool](DIM_QK), POOLS[pool](DIM_V)
    new_k, new_v = new(dtype)
    wanted = expected(k, new_k), expected(v, new_v)
    widehead.append(k, v, new_k, new_v, SLOTS)
    np.testing.assert_array_equal(k, wanted[0])
    np.testing.assert_array_equal(v, wanted[1])


def test_packed_and_dense_caches():
    k, v = draw(40, HEADS, DIM_QK, seed=2), draw(40, HEADS, DIM_V, seed=3)
    new_k, new_v = new()
    wanted = k.copy()
    wanted[SLOTS[SLOTS >= 0]] = new_k[SLOTS >= 0]
    widehead.append(k, v, new_k, new_v, SLOTS)
    np.testing.assert_array_equal(k, wanted)
    dense_k, dense_v = draw(2, HEADS, 20, DIM_QK), draw(2, HEADS, 20, DIM_V)
    wanted = expected(dense_v, new_v)
    widehead.append(dense_k, dense_v, new_k, new_v, SLOTS.astype(np.int32))
    np.testing.assert_array_equal(dense_v, wanted)


def test_values_that_lie_in_keys():
    k = draw(5, HEADS, 8, DIM_QK)
    new_k, _ = new()
    wanted = expected(k, new_k)
    widehead.append(k, k[..., :DIM_V], new_k, None, SLOTS)
    np.testing.assert_array_equal(k, wanted)


def test_quantised_rows_have_their_own_scales():
    codes = np.zeros((2, 5, HEADS, 8, DIM_QK), np.int8)
    scales = np.zeros((2, 5, HEADS, 8, 1), np.float32)
    k, v = (widehead.Quantised(codes[i], "int8", scales[i]) for i in range(2))
    new_k, _ = new()
    widehead.append(k, v, new_k, new_k, SLOTS)
    stored = codes[0] * scales[0]
    wanted = expected(np.zeros_like(stored), new_k)
    assert np.abs(stored - wanted).max() <= np.abs(new_k).max() / 127 / 2 * 1.001
    np.testing.assert_array_equal(codes[0], codes[1])
    q = draw(1, HEADS, DIM_QK)
    out = widehead.sdpa(
        q, k, v, query_offsets=[0, 1], page_table=np.array([[0, 1]], np.int32), key_lengths=[16]
    )
    assert np.isfinite(out).all() and out.any()


def test_what_is_appended_is_read():
    """A decode loop over pages equals attention over the whole."""
    rng = np.random.default_rng(4)
    length, page_size = 21, 4
    keys, values = (rng.standard_normal((length, HEADS, 16)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((length, HEADS, 16)).astype(np.float32)
    k, v = (np.full((9, page_size, HEADS, 16), np.nan, np.float32).transpose(0, 2, 1, 3) for _ in range(2))
    table = np.array([[5, 2, 8, 0, 1, 7]], np.int32)
    rows = []
    for t in range(length):
        slot = [int(table[0, t // page_size]) * page_size + t % page_size]
        widehead.append(k, v, keys[t : t + 1], values[t : t + 1], np.array(slot))
        rows.append(
            widehead.sdpa(
                q[t : t + 1], k, v, query_offsets=[0, 1], page_table=table, key_lengths=[t + 1], causal=True
            )
        )
    offsets = [0, length]
    whole = widehead.sdpa(q, keys, values, query_offsets=offsets, key_offsets=offsets, causal=True)
    np.testing.assert_allclose(np.concatenate(rows), whole, atol=2e-6)


K, V = np.zeros((5, HEADS, 8, DIM_QK), np.float32), np.zeros((5, HEADS, 8, DIM_V), np.float32)
NEW_K, NEW_V = new()
WRONG = {
    "slot": ({"slots": np.array([0, 1, 2, 3, 40, 5, 6])}, r"slots\[4\] is 40"),
    "slots": ({"slots": SLOTS[:3]}, r"slots is \[3\]; it must be \[tokens\], here \[7\]"),
    "heads": ({"new_k": NEW_K[:, :1]}, r"new_k is \[7, 1, 24\]; it must be .*here \[7, 2, 24\]"),
    "dim": ({"new_v": NEW_V[..., 1:]}, r"new_v is \[7, 2, 15\]; it must be .*here \[7, 2, 16\]"),
    "dimensions": ({"new_k": NEW_K[None]}, r"new_k is \[1, 7, 2, 24\]; it must be \[tokens"),
    "cache": ({"k": K[0, 0]}, r"k is \[8, 24\]; it must be \[pages, heads_kv, page_size, dim_qk\]"),
    "values": ({"v": V[:4]}, r"v is \[4, 2, 8, 16\]; it must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    changes, message = WRONG[name]
    arguments = {"k": K, "v": V, "new_k": NEW_K, "new_v": NEW_V, "slots": SLOTS} | changes
    with pytest.raises(ValueError, match=message):
        widehead.append(**arguments)
    assert not K.any() and not V.any()


def test_types_and_read_only_caches():
    with pytest.raises(TypeError, match="slots is float32; it must be int64"):
        widehead.append(K, V, NEW_K, NEW_V, SLOTS.astype(np.float32))
    with pytest.raises(TypeError, match="new_v is float16; it must be of new_k's type, float32"):
        widehead.append(K, V, NEW_K, NEW_V.astype(np.float16), SLOTS)
    with pytest.raises(TypeError, match="it must be float32, float16 or bfloat16"):
        widehead.append(K, V, NEW_K.astype(np.float64), NEW_V.astype(np.float64), SLOTS)
    fixed = K.copy()
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="k is read-only"):
        widehead.append(fixed, V, NEW_K, NEW_V, SLOTS)
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match="v is a .*immutable"):
        widehead.append(K, jax.numpy.asarray(V), NEW_K, NEW_V, SLOTS)


def test_torch():
    torch = pytest.importorskip("torch")
    k, v = torch.zeros(5, HEADS, 8, DIM_QK, dtype=torch.bfloat16), torch.zeros(5, HEADS, 8, DIM_V, dtype=torch.bfloat16)
    new_k, new_v = (torch.from_numpy(each).to(torch.bfloat16) for each in new())
    widehead.append(k, v, new_k, new_v, torch.from_numpy(SLOTS))
    kept = SLOTS >= 0
    assert torch.equal(k[SLOTS[kept] // 8, :, SLOTS[kept] % 8], new_k[kept])
    assert torch.equal(v.count_nonzero(), new_v[kept].count_nonzero())
