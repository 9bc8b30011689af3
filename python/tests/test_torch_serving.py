"""Serving layouts and quantised caches in PyTorch's tensors, on a CPU and on an NVIDIA GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import widehead

torch = pytest.importorskip("torch")

import widehead.torch  # noqa: E402
from oracle import BOUNDS, relative_rms  # noqa: E402
from test_append import SLOTS, expected, new  # noqa: E402
from test_serving import HEADS_KV, HEADS_Q, LEN_K, LEN_Q, LENGTHS, OFFSETS, OPTIONS, Batch, check  # noqa: E402

HAS_CUDA = torch.cuda.is_available() and any(each.device == "cuda" for each in widehead.kernels())
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not HAS_CUDA, reason="needs an NVIDIA GPU and a build with CUDA"),
    ),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Those of 16 bits are of Hopper's own kernels too.
CASES = [("float32", (48, 40)), ("float32", (256, 256)), ("bfloat16", (64, 64)), ("bfloat16", (256, 256))]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


class Tensors:
    """A batch on a device, in numbers that the element type holds."""

    def __init__(self, device, dtype="float32", dims=(48, 40)):
        self.device, self.dtype = device, dtype
        self.batch = Batch(dims=dims)
        self.batch.sequences = [tuple(map(self.rounded, each)) for each in self.batch.sequences]
        self.batch.q, self.batch.k, self.batch.v = map(
            self.rounded, (self.batch.q, self.batch.k, self.batch.v)
        )

    def rounded(self, array):
        return torch.from_numpy(array).to(DTYPES[self.dtype]).float().numpy()

    def elements(self, *arrays):
        """With the strides that they have."""
        return [torch.from_numpy(each).to(self.device, DTYPES[self.dtype]) for each in arrays]

    def numbers(self, **arrays):
        return {name: torch.from_numpy(np.ascontiguousarray(each)).to(self.device)
                for name, each in arrays.items()}  # fmt: skip

    def options(self, name):
        return {key: torch.from_numpy(each).to(self.device) if isinstance(each, np.ndarray) else each
                for key, each in OPTIONS[name].items()}  # fmt: skip

    def check(self, actual, name):
        assert all(each.device.type == self.device for each in actual)
        out, log_sum_exp = (each.float().cpu().numpy() for each in actual)
        check((out, log_sum_exp), self.batch.expected(**OPTIONS[name]), self.dtype)


@pytest.mark.parametrize(("dtype", "dims"), CASES)
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_queries_over_packed_keys(device, dtype, dims, name):
    tensors = Tensors(device, dtype, dims)
    q, k, v = tensors.elements(tensors.batch.q, tensors.batch.k, tensors.batch.v)
    numbers = tensors.numbers(
        query_offsets=OFFSETS, key_offsets=np.array([0, *np.cumsum(LEN_K)], np.int32)
    )
    actual = widehead.sdpa(
        q, k, v, **numbers, len_q=max(LEN_Q), len_k=max(LEN_K), return_log_sum_exp=True,
        **tensors.options(name),
    )  # fmt: skip
    tensors.check(actual, name)


@pytest.mark.parametrize(("dtype", "dims"), CASES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("page_size", "order"), [(1, "NHD"), (16, "NHD"), (16, "HND"), (48, "NHD"), (64, "HND")])
def test_pages(device, dtype, dims, name, page_size, order):
    """Pages that nobody lists, and what lies past a sequence's end, are NaN; the table has no page there."""
    tensors = Tensors(device, dtype, dims)
    k, v, table = tensors.batch.pools(page_size, order)
    q, k, v = tensors.elements(tensors.batch.q, k, v)
    numbers = tensors.numbers(query_offsets=OFFSETS, page_table=table, key_lengths=LENGTHS)
    actual = widehead.sdpa(
        q, k, v, **numbers, len_q=max(LEN_Q), return_log_sum_exp=True, **tensors.options(name)
    )
    tensors.check(actual, name)


def test_one_list_of_pages(device):
    tensors = Tensors(device)
    k, v, table = tensors.batch.pools(16)
    rows = [row[: -(-length // 16)] for row, length in zip(table, LEN_K)]
    offsets = np.array([0, *np.cumsum([len(row) for row in rows])], np.int32)
    q, k, v = tensors.elements(tensors.batch.q, k, v)
    numbers = tensors.numbers(
        query_offsets=OFFSETS, page_table=np.concatenate(rows), page_offsets=offsets, key_lengths=LENGTHS
    )
    actual = widehead.sdpa(
        q, k, v, **numbers, len_q=max(LEN_Q), len_k=max(LEN_K), causal=True, return_log_sum_exp=True
    )
    tensors.check(actual, "causal")


def quantised(rng, kind, *shape):
    """A cache of random codes, [..., tokens, dim], and the numbers that it holds."""
    *rows, dim = shape
    if kind == "e4m3":
        numbers = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        codes, scales = numbers.to(torch.float8_e4m3fn), torch.tensor([0.25])
        return widehead.Quantised(codes, "e4m3", scales), codes.float() * scales
    if kind == "int8":
        codes = torch.from_numpy(rng.integers(-128, 128, shape).astype(np.int8))
        scales = torch.from_numpy((rng.random((*rows, 1)) / 64).astype(np.float32))
        return widehead.Quantised(codes, "int8", scales), codes.float() * scales
    blocks = int(np.prod(shape)) // 32
    scales = (rng.random((blocks, 1)) / 64).astype(np.float16)
    if kind == "q8_0":
        codes = rng.integers(-127, 128, (blocks, 32)).astype(np.int8)
        numbers = codes.astype(np.float32)
    else:
        codes = rng.integers(0, 256, (blocks, 16)).astype(np.uint8)
        numbers = np.hstack([codes & 15, codes >> 4]).astype(np.float32) - 8
    stored = np.hstack([scales.view(np.uint8), codes.view(np.uint8)]).reshape(*rows, -1)
    numbers = (numbers * scales.astype(np.float32)).reshape(shape)
    return widehead.Quantised(torch.from_numpy(stored), kind), torch.from_numpy(numbers)


def moved(cache, device):
    scales = None if cache.scales is None else cache.scales.to(device)
    return widehead.Quantised(cache.codes.to(device), cache.format, scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["e4m3", "int8", "q8_0", "q4_0"])
@pytest.mark.parametrize("len_q", [1, 40])
def test_quantised_caches(device, dtype, kind, len_q):
    rng = np.random.default_rng(7)
    q = torch.from_numpy(rng.standard_normal((2, HEADS_Q, len_q, 64)).astype(np.float32)).to(DTYPES[dtype])
    caches = [quantised(rng, kind, 2, HEADS_KV, 70, 64) for _ in range(2)]
    lengths = torch.tensor([70, 41], dtype=torch.int32)
    wanted = widehead.sdpa(q.float(), *(numbers for _, numbers in caches), causal=True, key_lengths=lengths)
    out = widehead.sdpa(
        q.to(device), *(moved(cache, device) for cache, _ in caches), causal=True,
        key_lengths=lengths.to(device),
    )  # fmt: skip
    assert out.device.type == device and out.dtype == DTYPES[dtype]
    assert relative_rms(out.float().cpu().numpy(), wanted.numpy()) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["e4m3", "int8", "q8_0", "q4_0"])
def test_quantised_pools(device, dtype, kind):
    rng = np.random.default_rng(8)
    q = torch.from_numpy(rng.standard_normal((5, HEADS_Q, 64)).astype(np.float32)).to(DTYPES[dtype])
    caches = [quantised(rng, kind, 8, HEADS_KV, 16, 64) for _ in range(2)]
    numbers = {
        "query_offsets": torch.tensor([0, 4, 5], dtype=torch.int32),
        "page_table": torch.tensor([[5, 2], [7, 5]], dtype=torch.int32),
        "key_lengths": torch.tensor([30, 17], dtype=torch.int32),
    }
    options = {"len_q": 4, "causal": True}
    wanted = widehead.sdpa(q.float(), *(each for _, each in caches), **numbers, **options)
    on_device = {name: each.to(device) for name, each in numbers.items()}
    out = widehead.sdpa(q.to(device), *(moved(cache, device) for cache, _ in caches), **on_device, **options)
    assert relative_rms(out.float().cpu().numpy(), wanted.numpy()) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_appended_rows(device, dtype, order):
    """Bit by bit, where the slots say and nowhere else."""
    rows = [torch.from_numpy(each).to(DTYPES[dtype]) for each in new()]
    heads = rows[0].shape[1]
    shape = (5, 8, heads) if order == "NHD" else (5, heads, 8)
    pools = [torch.full((*shape, each.shape[2]), 9, dtype=DTYPES[dtype], device=device) for each in rows]
    k, v = (pool.transpose(1, 2) if order == "NHD" else pool for pool in pools)
    wanted = [expected(pool.float().cpu().numpy(), each.float().numpy()) for pool, each in zip((k, v), rows)]
    widehead.append(k, v, *(each.to(device) for each in rows), torch.from_numpy(SLOTS).to(device))
    for have, want in zip((k, v), wanted):
        np.testing.assert_array_equal(have.float().cpu().numpy(), want)
