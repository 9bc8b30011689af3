"""Packed sequences and paged keys against float64, each sequence as if it were alone."""

from __future__ import annotations

import engine_steps
import ml_dtypes
import numpy as np
import pytest
import widehead
from oracle import BOUNDS, oracle, relative_rms

HEADS_Q, HEADS_KV, DIM_QK, DIM_V = 4, 2, 48, 40
# A chunk of a prompt, one token, no token, a whole prompt, and no key at all.
LEN_Q = [20, 1, 0, 9, 3]
LEN_K = [53, 70, 12, 9, 0]
TOTAL_Q = sum(LEN_Q)
OFFSETS = np.array([0, *np.cumsum(LEN_Q)], np.int32)
LENGTHS = np.array(LEN_K, np.int32)
SINKS = np.array([0.5, -1, 2, 0], np.float32)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (6, None)},
    "both sides": {"window": (6, 2)},
    "softcap and sinks": {"causal": True, "softcap": 3.0, "sinks": SINKS, "scale": 0.3},
    "top-left": {"causal": "top_left"},
}


class Batch:
    """Sequences in float64 and in the layouts of an engine."""

    def __init__(self, dtype=np.float32, seed=0, dims=(DIM_QK, DIM_V)):
        self.rng = np.random.default_rng(seed)
        self.dtype, self.dims = dtype, dims
        self.sequences = [
            (self.draw(HEADS_Q, len_q, dims[0]), self.draw(HEADS_KV, len_k, dims[0]),
             self.draw(HEADS_KV, len_k, dims[1]))
            for len_q, len_k in zip(LEN_Q, LEN_K)
        ]  # fmt: skip
        self.q = np.concatenate([q.transpose(1, 0, 2) for q, _, _ in self.sequences])
        self.k, self.v = (
            np.concatenate([each[i].transpose(1, 0, 2) for each in self.sequences]) for i in (1, 2)
        )

    def draw(self, *shape):
        return self.rng.standard_normal(shape).astype(self.dtype)

    def pools(self, page_size, order="NHD"):
        """K and V in pages at random places of a pool of NaN, and the table, which holds what is no
        page where nothing looks."""
        counts = [-(-length // page_size) for length in LEN_K]
        pages = sum(counts) + 3
        table = np.full((len(counts), max(counts) + 2), 2**31 - 1, np.int32)
        free = list(self.rng.permutation(pages))
        pools = [np.full((pages, page_size, HEADS_KV, dim), np.nan, self.dtype) for dim in self.dims]
        for b, count in enumerate(counts):
            for i in range(count):
                table[b, i] = page = free.pop()
                rows = slice(i * page_size, min((i + 1) * page_size, LEN_K[b]))
                for pool, rows_of in zip(pools, self.sequences[b][1:]):
                    part = rows_of[:, rows].transpose(1, 0, 2)
                    pool[page, : len(part)] = part
        k, v = (pool.transpose(0, 2, 1, 3) for pool in pools)
        return (k, v, table) if order == "NHD" else (k.copy(), v.copy(), table)

    def expected(self, **options):
        """out [total_q, heads_q, dim_v] and the log-sum-exp [total_q, heads_q]."""
        outs, sums = zip(
            *(oracle(*(x[None] for x in each), **options) for each in self.sequences)
        )
        return (
            np.concatenate([out[0].transpose(1, 0, 2) for out in outs]),
            np.concatenate([each[0].T for each in sums]),
        )


def check(actual, expected, dtype="float32"):
    out, log_sum_exp = (np.asarray(each) for each in actual)
    wanted, wanted_sum = expected
    assert out.shape == wanted.shape and log_sum_exp.shape == wanted_sum.shape
    assert relative_rms(out, wanted) <= BOUNDS[dtype]
    seen = np.isfinite(wanted_sum)
    assert np.array_equal(np.isneginf(log_sum_exp), ~seen)
    np.testing.assert_allclose(log_sum_exp[seen], wanted_sum[seen], atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_packed_queries_over_packed_keys(name, dtype):
    batch = Batch(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    actual = widehead.sdpa(
        batch.q, batch.k, batch.v, query_offsets=OFFSETS,
        key_offsets=np.array([0, *np.cumsum(LEN_K)]), return_log_sum_exp=True, **OPTIONS[name],
    )  # fmt: skip
    check(actual, batch.expected(**OPTIONS[name]), dtype)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("page_size", [1, 2, 16, 48, 128])
@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_pages(name, page_size, order):
    batch = Batch()
    k, v, table = batch.pools(page_size, order)
    actual = widehead.sdpa(
        batch.q, k, v, query_offsets=OFFSETS, page_table=table, key_lengths=LENGTHS,
        return_log_sum_exp=True, **OPTIONS[name],
    )  # fmt: skip
    check(actual, batch.expected(**OPTIONS[name]))


@pytest.mark.parametrize("lists", [False, True])
def test_one_list_of_pages(lists):
    batch = Batch()
    k, v, table = batch.pools(16)
    rows = [row[: -(-length // 16)] for row, length in zip(table, LEN_K)]
    offsets = np.array([0, *np.cumsum([len(row) for row in rows])])
    numbers = {"query_offsets": OFFSETS, "key_lengths": LENGTHS, "page_offsets": offsets}
    if lists:
        numbers = {name: each.tolist() for name, each in numbers.items()}
    actual = widehead.sdpa(
        batch.q, k, v, page_table=np.concatenate(rows), causal=True, return_log_sum_exp=True, **numbers
    )
    check(actual, batch.expected(causal=True))


def test_pages_of_two_sequences_and_every_kind_of_table():
    batch = Batch()
    k, v, table = batch.pools(16)
    both = np.repeat(table[:1], 2, axis=0)
    q = batch.draw(2, HEADS_Q, 1, DIM_QK)
    first = batch.sequences[0]
    lengths = [53, 30]
    expected = np.concatenate(
        [oracle(q[i : i + 1], *(x[None, :, :n] for x in first[1:]))[0] for i, n in enumerate(lengths)]
    )
    wide = np.full((2, 2 * both.shape[1]), -(2**40))
    wide[:, ::2] = np.where(both == 2**31 - 1, -1, both)
    tables = {
        "int32": both,
        "int64": wide[:, ::2].copy(),
        "every second column": wide[:, ::2],
        "of one row": np.broadcast_to(table[0], both.shape),
        "cut": table[:2, :4],
    }
    tables["cut"][1] = table[0, :4]
    for name, each in tables.items():
        out = widehead.sdpa(q, k, v, page_table=each, key_lengths=lengths)
        assert relative_rms(out, expected) <= 4e-6, name


def test_masks_of_dense_queries_over_pages():
    batch = Batch()
    k, v, table = batch.pools(16)
    q = batch.draw(len(LEN_K), HEADS_Q, 3, DIM_QK)
    len_k = max(LEN_K)
    mask = batch.rng.random((len(LEN_K), 1, 3, len_k)) < 0.6
    out = widehead.sdpa(
        q, k, v, page_table=table, key_lengths=LENGTHS, len_k=len_k, mask=mask, key_starts=[0, 5, 0, 2, 0]
    )
    for b, (_, keys, values) in enumerate(batch.sequences):
        expected, _ = oracle(
            q[b : b + 1], keys[None], values[None], mask=mask[b : b + 1, ..., : LEN_K[b]],
            key_starts=[0 if b in (0, 2, 4) else 5 if b == 1 else 2],
        )  # fmt: skip
        assert relative_rms(out[b : b + 1], expected) <= 4e-6


def test_rows_of_no_sequence_are_left_alone():
    batch = Batch()
    q = np.concatenate([batch.q, np.full((7, HEADS_Q, DIM_QK), np.nan, np.float32)])
    out = np.full((TOTAL_Q + 7, HEADS_Q, DIM_V), 3, np.float32)
    k, v, table = batch.pools(16)
    widehead.sdpa(q, k, v, query_offsets=OFFSETS, page_table=table, key_lengths=LENGTHS, out=out)
    assert relative_rms(out[:TOTAL_Q], batch.expected()[0]) <= 4e-6
    assert (out[TOTAL_Q:] == 3).all()


def test_quantised_pools():
    batch = Batch()
    pages, page_size = 8, 16
    codes = batch.rng.integers(-128, 128, (2, pages, HEADS_KV, page_size, DIM_QK)).astype(np.int8)
    scales = (batch.rng.random((2, pages, HEADS_KV, page_size, 1)) / 64).astype(np.float32)
    k, v = (widehead.Quantised(codes[i], "int8", scales[i]) for i in range(2))
    options = {
        "query_offsets": [0, 4, 5], "page_table": np.array([[5, 2], [7, 5]], np.int32),
        "key_lengths": [30, 17], "causal": True,
    }  # fmt: skip
    q = batch.draw(5, HEADS_Q, DIM_QK)
    wanted = widehead.sdpa(q, *(codes * scales), **options)
    np.testing.assert_allclose(widehead.sdpa(q, k, v, **options), wanted, rtol=0, atol=2e-6)
    # The same as packed keys: tokens before heads, in codes and scales.
    flat = [x.transpose(0, 1, 3, 2, 4).reshape(2, -1, HEADS_KV, x.shape[-1]) for x in (codes, scales)]
    packed = {"query_offsets": [0, 4, 5], "key_offsets": [0, 100, 128], "causal": True}
    wanted = widehead.sdpa(q, *(flat[0] * flat[1]), **packed)
    k, v = (widehead.Quantised(flat[0][i], "int8", flat[1][i]) for i in range(2))
    np.testing.assert_allclose(widehead.sdpa(q, k, v, **packed), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("library", ["torch", "jax", "mlx"])
def test_libraries_answer_in_kind(library):
    pytest.importorskip(library)
    from test_arrays import LIBRARIES

    batch = Batch()
    k, v, table = batch.pools(16, "HND")
    make = LIBRARIES[library]
    q = make(batch.q)
    actual = widehead.sdpa(
        q, make(k), make(v), query_offsets=OFFSETS, page_table=table, key_lengths=LENGTHS,
        causal=True, return_log_sum_exp=True,
    )  # fmt: skip
    assert type(actual[0]) is type(q)
    check(actual, batch.expected(causal=True))


def test_plans_say_the_layout():
    q = widehead.Spec((64, 8, 128), "bfloat16")
    pool = widehead.Spec((1000, 2, 16, 128), "bfloat16")
    table, numbers = widehead.Spec((32, 256), "int32"), widehead.Spec((32,), "int32")
    plan = widehead.plan(
        q, pool, pool, query_offsets=widehead.Spec((33,), "int32"), len_q=33, page_table=table,
        key_lengths=numbers, causal=True,
    )  # fmt: skip
    problem = plan.to_dict()["problem"]
    wanted = {
        "query_layout": "packed", "key_layout": "paged", "batch": 32, "total_q": 64, "len_q": 33,
        "len_k": 4096, "page_size": 16, "pages": 1000,
    }  # fmt: skip
    assert {name: problem[name] for name in wanted} == wanted
    assert plan.kernel is not None
    # Numbers that are there are read.
    real = widehead.plan(
        q, pool, pool, query_offsets=[0, 40, 41], page_table=np.zeros(9, np.int32),
        page_offsets=[0, 4, 9], key_lengths=[64, 65],
    ).to_dict()["problem"]  # fmt: skip
    assert (real["batch"], real["len_q"], real["len_k"]) == (2, 40, 65)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_an_engine(dtype):
    """What vLLM asked for, replayed; test_cuda.py does so on a GPU."""
    kinds = set()
    for seed, step in enumerate(engine_steps.steps()):
        q, pool = engine_steps.arrays_of(step, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, seed)
        k, v = pool[..., : step["head_size"]], pool[..., step["head_size"] :]
        out = widehead.sdpa(q, k, v, **engine_steps.numbers_of(step), **engine_steps.options_of(step))
        assert relative_rms(out, engine_steps.expected(step, q, pool)) <= BOUNDS[dtype]
        lengths = np.diff(step["query_offsets"])
        kinds.add((step["window"] is None, int(lengths.max()) > 1, int(lengths.min()) == 1))
    assert len(kinds) >= 5  # windows and none; chunks, chunks beside tokens, tokens


Q, KV = np.zeros((6, 4, 8), np.float32), np.zeros((9, 2, 4, 8), np.float32)
PAGED = {"query_offsets": [0, 5, 6], "page_table": np.zeros((2, 3), np.int32), "key_lengths": [9, 4]}
WRONG = {
    "lengths missing": ({"key_lengths": None}, "key_lengths is None; page_table needs them"),
    "a length too many": ({"key_lengths": [9, 4, 1]}, r"key_lengths is \[3\]; it must be \[batch\], here \[2\]"),
    "length": ({"key_lengths": [9, 13]}, r"key_lengths\[1\] is 13; it must be between 0 and len_k, 12"),
    "page": ({"page_table": np.array([[0, 8, 9], [3, -1, -1]], np.int32)},
             r"page_table\[2\] is 9, page 2 of sequence 0; it must be between 0 and 8"),
    "negative page": ({"page_table": np.array([[0, 8, 1], [-3, 0, 0]])}, r"page_table\[3\] is -3"),
    "rows": ({"page_table": np.zeros((3, 3), np.int32)}, "page_table has 3 rows; it must be .*batch's 2"),
    "dimensions": ({"page_table": np.zeros(6, np.int32)}, r"page_table is \[6\]; it must be \[batch, pages"),
    "list": ({"page_table": [[0, 1], [2, 3]]}, "page_table is a list; it must be an int32 array"),
    "offsets begin": ({"query_offsets": [1, 5, 6]}, r"query_offsets\[0\] is 1; it must be 0"),
    "offsets fall": ({"query_offsets": [0, 7, 6]}, r"query_offsets\[1\] is 7; it must be between .* 0, and total_q, 6"),
    "negative offset": ({"query_offsets": [0, -1, 6]}, "query_offsets holds -1; each must be between 0 and q's tokens, 6"),
    "no offsets": ({"query_offsets": []}, r"query_offsets is empty; it must be \[batch \+ 1\]"),
    "len_q": ({"len_q": 4}, r"query_offsets\[1\] is 5, 5 after the one before; len_q, the most, is 4"),
    "len_k": ({"len_k": 13}, "len_k is 13; it must be at most 12, what a row of page_table holds"),
    "two layouts": ({"key_offsets": [0, 1, 2]}, "key_offsets is given beside page_table"),
    "mask": ({"mask": np.ones((6, 12), bool)}, "mask is given with query_offsets"),
    "page_offsets": ({"page_offsets": [0, 3, 4, 6], "page_table": np.zeros(6, np.int32)},
                     r"page_offsets is \[4\]; it must be \[batch \+ 1\], here \[3\]"),
    "short list": ({"page_offsets": [0, 2, 6], "page_table": np.zeros(6, np.int32)},
                   r"key_lengths\[0\] is 9; it must be at most 8, what the pages"),
    "stray page_offsets": ({"page_table": None, "page_offsets": [0, 1, 2]}, "page_offsets is given without page_table"),
    "stray len_q": ({"query_offsets": None, "len_q": 3, "q": np.zeros((2, 4, 3, 8), np.float32)},
                    "len_q is given without query_offsets"),
    "stray len_k": ({"page_table": None, "len_k": 3}, "len_k is given without key_offsets or page_table"),
    "dense q": ({"q": np.zeros((2, 4, 3, 8), np.float32)}, r"q is \[2, 4, 3, 8\]; it must have 3 dimensions: \[total_q"),
    "dense k": ({"k": np.zeros((2, 4, 8), np.float32)}, r"k is \[2, 4, 8\]; it must have 4 dimensions: \[pages, heads_kv"),
    "v": ({"v": np.zeros((8, 2, 4, 8), np.float32)}, r"v is \[8, 2, 4, 8\]; it must be \[pages, .*, here \[9, 2, 4, 8\]"),
    "out": ({"out": np.zeros((6, 2, 8), np.float32)}, r"out is \[6, 2, 8\]; it must be \[total_q, .* here \[6, 4, 8\]"),
    "len_q unknown": ({"query_offsets": widehead.Spec((3,), "int32")}, "len_q must be given, .*query_offsets cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    changes, message = WRONG[name]
    arguments = {"q": Q, "k": KV, "v": KV} | PAGED | changes
    with pytest.raises(ValueError, match=message):
        widehead.sdpa(**arguments)


def test_types_of_numbers():
    for name in ("query_offsets", "page_table", "key_lengths"):
        wrong = PAGED | {name: np.asarray(PAGED[name], np.float32)}
        with pytest.raises(TypeError, match=f"{name} is float32; it must be int32"):
            widehead.sdpa(Q, KV, KV, **wrong)


torch = pytest.importorskip("torch")


def test_the_operator_of_torch():
    batch = Batch()
    k, v, table = (torch.from_numpy(each) for each in batch.pools(16, "HND"))
    q = torch.from_numpy(batch.q)
    options = {
        "query_offsets": torch.from_numpy(OFFSETS), "page_table": table,
        "key_lengths": torch.from_numpy(LENGTHS), "causal": True, "return_log_sum_exp": True,
    }  # fmt: skip
    expected = batch.expected(causal=True)
    check(widehead.sdpa(q, k, v, **options), expected)
    compiled = torch.compile(widehead.sdpa, fullgraph=True, backend="aot_eager")
    check(compiled(q, k, v, **options), expected)
    q.requires_grad_()
    out, _ = widehead.sdpa(q, k, v, **options)
    with pytest.raises(NotImplementedError, match="no backward of paged tensors"):
        out.sum().backward()


def test_the_operator_keeps_pytorchs_rules():
    batch = Batch()
    k, v, table = (torch.from_numpy(each) for each in batch.pools(16, "HND"))
    k, v = k.nan_to_num(), v.nan_to_num()  # it compares inputs with themselves
    arguments = (torch.from_numpy(batch.q), k, v, None, None, torch.from_numpy(LENGTHS), None, None,
                 "bottom_right", -1, -1, None, True, "", torch.from_numpy(OFFSETS), None, table, None,
                 None, 80)  # fmt: skip
    torch.library.opcheck(torch.ops.widehead.attention, arguments)
