"""On an NVIDIA GPU: results, streams, graphs, devices. Skipped where there is none."""

import numpy as np
import pytest
import widehead

torch = pytest.importorskip("torch")

import engine_steps  # noqa: E402
import widehead.torch  # noqa: E402
from oracle import BOUNDS, oracle, qkv, relative_rms  # noqa: E402
from test_serving import LEN_K, LEN_Q, LENGTHS, OFFSETS, Batch, check  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or all(each.device != "cuda" for each in widehead.kernels()),
    reason="needs an NVIDIA GPU and a build with CUDA",
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SLEEP_CYCLES = 1 << 30  # about 0.6 s


def tensors(seed=0, dtype=torch.bfloat16, **shapes):
    return tuple(torch.from_numpy(array).to("cuda", dtype) for array in qkv(seed, **shapes))


def numpy_of(*arrays):
    return tuple(array.detach().float().cpu().numpy() for array in arrays)


def error(out, arrays, **options):
    """Of `out` on the GPU against float64, and that it holds nothing but numbers."""
    assert out.is_cuda and torch.isfinite(out).all()
    return relative_rms(*numpy_of(out), oracle(*numpy_of(*arrays), **options)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [(64, 64), (100, 36), (192, 128), (256, 256), (512, 512)])
@pytest.mark.parametrize("length", [(1, 300), (70, 300), (300, 300)])
def test_results_match_float64(dtype, dim, length):
    arrays = tensors(dtype=DTYPES[dtype], length=length, dim=dim)
    out, log_sum_exp = widehead.sdpa(*arrays, causal=True, return_log_sum_exp=True)
    assert out.dtype == DTYPES[dtype] and log_sum_exp.dtype == torch.float32
    assert error(out, arrays, causal=True) <= BOUNDS[dtype]
    expected = oracle(*numpy_of(*arrays), causal=True)[1]
    np.testing.assert_allclose(log_sum_exp.cpu().numpy(), expected, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gradients_match_pytorch_in_float64(dtype, dim):
    def gradients(attention, arrays):
        leaves = [array.detach().requires_grad_() for array in arrays]
        out = attention(*leaves, is_causal=True)
        return torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-1) / dim)

    arrays = [torch.randn(2, 4, 150, dim, device="cuda", dtype=DTYPES[dtype]) for _ in range(3)]
    expected = gradients(
        torch.nn.functional.scaled_dot_product_attention, [each.double() for each in arrays]
    )
    for have, want in zip(gradients(widehead.torch.sdpa, arrays), expected):
        assert have.is_cuda and have.dtype == DTYPES[dtype]
        assert relative_rms(*numpy_of(have, want)) <= 3 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 512])
def test_packed_gradients_are_those_of_each_sequence(dtype, dim):
    lengths_q, lengths_k = (33, 0, 1, 150), (77, 12, 1, 150)
    kind = {"device": "cuda", "dtype": DTYPES[dtype], "requires_grad": True}
    q, k, v = (
        torch.randn(sum(lengths), heads, dim, **kind)
        for lengths, heads in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2))
    )
    offsets = {
        name: torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        for name, lengths in (("query_offsets", lengths_q), ("key_offsets", lengths_k))
    }
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    alone = [
        widehead.sdpa(*(x.transpose(0, 1)[None] for x in part), causal=True)[0].transpose(0, 1)
        for part in parts
    ]
    expected = torch.autograd.grad(torch.cat(alone).sin().sum(), (q, k, v))
    out = widehead.sdpa(q, k, v, **offsets, len_q=150, len_k=150, causal=True)
    for have, want in zip(torch.autograd.grad(out.sin().sum(), (q, k, v)), expected):
        assert relative_rms(*numpy_of(have, want)) <= 3 * BOUNDS[dtype]


def test_options_match_float64():
    q, k, v = tensors()
    rng = np.random.default_rng(2)
    mask = rng.random((2, 1, 33, 77)) < 0.7
    options = {
        "window": (20, 4),
        "softcap": 5.0,
        "mask": mask,
        "sinks": rng.standard_normal(4).astype(np.float32),
        "key_starts": np.array([1, 2], np.int32),
    }
    on_device = {
        name: torch.from_numpy(value).cuda() if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    out = widehead.sdpa(q, k, v, **on_device)
    assert error(out, (q, k, v), **options) <= BOUNDS["bfloat16"]


def test_key_lengths_are_read_on_the_device_and_hide_nan():
    q, k, v = tensors()
    lengths = torch.tensor([60, 40], dtype=torch.int32, device="cuda")
    for new in ([60, 40], [77, 35]):
        lengths.copy_(torch.tensor(new))
        cache_k, cache_v = k.clone(), v.clone()
        for row, length in enumerate(new):
            cache_k[row, :, length:] = cache_v[row, :, length:] = torch.nan
        out = widehead.sdpa(q, cache_k, cache_v, causal=True, key_lengths=lengths)
        assert error(out, (q, k, v), causal=True, key_lengths=new) <= BOUNDS["bfloat16"]


def test_rows_without_keys_are_zero():
    q, k, v = tensors()
    hidden = torch.zeros(33, 77, dtype=torch.bool, device="cuda")
    out, log_sum_exp = widehead.sdpa(q, k, v, mask=hidden, return_log_sum_exp=True)
    assert not out.any() and torch.isneginf(log_sum_exp).all()


def test_work_goes_to_the_current_stream():
    q, k, v = tensors()
    expected = widehead.sdpa(q, k, v)
    side = torch.cuda.Stream()
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    # The default stream is busy: work that went there would end after it.
    torch.cuda._sleep(SLEEP_CYCLES)
    default_ends = torch.cuda.Event()
    default_ends.record()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES // 8)
        late.copy_(q)  # must be waited for without a word
        out = widehead.sdpa(late, k, v)
    side.synchronize()
    assert not default_ends.query()
    assert torch.equal(out, expected)
    torch.cuda.synchronize()


def test_a_call_does_not_wait_for_the_device():
    q, k, v = tensors()
    widehead.sdpa(q, k, v)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    sleep_ends = torch.cuda.Event()
    sleep_ends.record()
    widehead.sdpa(q, k, v)
    assert not sleep_ends.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("length", [(1, 5000), (200, 700)])
def test_a_graph_replays_with_new_inputs(length):
    q, k, v = tensors(length=length, dim=(256, 256))
    lengths = torch.full((2,), length[1], dtype=torch.int32, device="cuda")

    def attend():
        return widehead.sdpa(q, k, v, causal=True, key_lengths=lengths)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for seed in (1, 2, 3):
        for tensor, new in zip((q, k, v), tensors(seed, length=length, dim=(256, 256))):
            tensor.copy_(new)
        lengths.fill_(length[1] - 7 * seed)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        options = {"causal": True, "key_lengths": lengths.tolist()}
        assert error(out, (q, k, v), **options) <= BOUNDS["bfloat16"]


def test_compiled_with_cuda_graphs():
    def attend(q, k, v):
        return widehead.sdpa(q * 2, k, v, causal=True, window=(40, None)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # warm-up, recording, and two replays
        q, k, v = tensors(seed)
        torch.compiler.cudagraph_mark_step_begin()
        actual = compiled(q, k, v).clone()
        torch.testing.assert_close(actual, attend(q, k, v), rtol=1e-2, atol=1e-2)
        options = {"causal": True, "window": (40, None)}
        assert error(actual - 1, (q * 2, k, v), **options) <= 2 * BOUNDS["bfloat16"]


def test_sdpa_means_what_pytorchs_means():
    q, k, v = tensors(heads=(4, 4), dim=(64, 64))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    with widehead.torch.override_sdpa():
        actual = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cuda", torch.float16):
        assert widehead.torch.sdpa(q.float(), k.float(), v.float()).dtype == torch.float16


WRONG = {
    "k": ({"k": "cpu"}, {}, "k is on cpu; it must be where q is, on cuda:0"),
    "v": ({"v": "cpu"}, {}, "v is on cpu; it must be where q is, on cuda:0"),
    "q": ({"q": "cpu"}, {}, "k is on cuda:0; it must be where q is, on cpu"),
    "mask": ({}, {"mask": torch.ones(33, 77) > 0}, "mask is on cpu; it must be where q is"),
    "sinks": ({}, {"sinks": torch.zeros(4)}, "sinks is on cpu; it must be where q is"),
    "out": ({}, {"out": torch.zeros(2, 4, 33, 48)}, "out is on cpu; it must be where q is"),
    "lengths": (
        {}, {"key_lengths": torch.ones(2, dtype=torch.int32)}, "key_lengths is on cpu; it must be",
    ),
    "a list": ({}, {"key_lengths": [1, 2]}, "key_lengths is a list; it must be an int32 array on CUDA"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_devices_are_named(case):
    moved, options, message = WRONG[case]
    arrays = dict(zip("qkv", tensors()))
    arrays |= {name: arrays[name].to(device) for name, device in moved.items()}
    with pytest.raises(ValueError, match=message):
        widehead.sdpa(**arrays, **options)


def test_wide_key_lengths_are_named():
    lengths = torch.ones(2, dtype=torch.int64, device="cuda")
    with pytest.raises(TypeError, match="key_lengths is int64; it must be int32"):
        widehead.sdpa(*tensors(), key_lengths=lengths)


def test_numpy_beside_the_gpu_is_named():
    q, k, v = tensors(dtype=torch.float32)
    with pytest.raises(ValueError, match="k is on cpu; it must be where q is, on cuda:0"):
        widehead.sdpa(q, *numpy_of(k, v))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu():
    arrays = tuple(array.to("cuda:1") for array in tensors())
    assert error(widehead.sdpa(*arrays), arrays) <= BOUNDS["bfloat16"]
    with pytest.raises(ValueError, match="k is on cuda:0; it must be where q is, on cuda:1"):
        widehead.sdpa(arrays[0], arrays[1].to("cuda:0"), arrays[2])


def test_cupy_arrays_and_their_stream():
    cupy = pytest.importorskip("cupy")
    arrays = qkv()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        q, k, v = (cupy.asarray(array) for array in arrays)
        out = widehead.sdpa(q, k, v, causal=True)
        stream.synchronize()
    assert isinstance(out, cupy.ndarray)
    assert relative_rms(cupy.asnumpy(out), oracle(*arrays, causal=True)[0]) <= BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_steps_of_an_engine(dtype):
    """What vLLM asked for, over its layouts; offsets, lengths and tables lie on the GPU."""
    for seed, step in enumerate(engine_steps.steps()):
        q, pool = (
            torch.from_numpy(each).to("cuda", DTYPES[dtype])
            for each in engine_steps.arrays_of(step, np.float32, seed)
        )
        numbers = {name: torch.from_numpy(each).cuda() for name, each in engine_steps.numbers_of(step).items()}
        wanted = engine_steps.expected(step, *numpy_of(q, pool))
        for order in ("heads first", "tokens first"):
            if order == "tokens first":
                pool = pool.transpose(1, 2).contiguous().transpose(1, 2)
            k, v = pool[..., : step["head_size"]], pool[..., step["head_size"] :]
            out = widehead.sdpa(q, k, v, **numbers, **engine_steps.options_of(step))
            assert relative_rms(*numpy_of(out), wanted) <= BOUNDS[dtype]


def serving_call(dims=(64, 64)):
    """A batch over pages of 16 with what widehead.sdpa takes: NaN is where no sequence has a key."""
    batch = Batch(dims=dims)
    k, v, table = batch.pools(16, "HND")
    arrays = {"q": batch.q, "k": k, "v": v, "query_offsets": OFFSETS, "page_table": table, "key_lengths": LENGTHS}
    tensors = {name: torch.from_numpy(each).cuda() for name, each in arrays.items()}
    return batch, tensors | {"len_q": max(LEN_Q), "causal": True, "return_log_sum_exp": True}


def checked(actual, expected):
    check([each.cpu().numpy() for each in actual], expected)


def test_a_call_over_pages_does_not_wait_for_the_device():
    batch, call = serving_call()
    widehead.sdpa(**call)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    sleep_ends = torch.cuda.Event()
    sleep_ends.record()
    actual = widehead.sdpa(**call)
    assert not sleep_ends.query()
    torch.cuda.synchronize()
    checked(actual, batch.expected(causal=True))


@pytest.mark.parametrize("dims", [(48, 40), (64, 64), (256, 256)])
def test_a_graph_follows_offsets_lengths_and_tables(dims):
    """Captured over the batch; replayed over others that have their sequences in another order."""
    batch, call = serving_call(dims)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        widehead.sdpa(**call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, log_sum_exp = widehead.sdpa(**call)
    table = call["page_table"].clone()
    for order in ([4, 2, 0, 3, 1], [1, 0, 2, 3, 4]):
        lengths = [LEN_Q[each] for each in order]
        call["query_offsets"].copy_(torch.tensor([0, *np.cumsum(lengths)]))
        call["key_lengths"].copy_(torch.tensor([LEN_K[each] for each in order]))
        call["page_table"].copy_(table[order])
        call["q"].copy_(torch.from_numpy(np.concatenate([batch.sequences[each][0].transpose(1, 0, 2)
                                                         for each in order])))  # fmt: skip
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        other = Batch(dims=dims)
        other.sequences = [batch.sequences[each] for each in order]
        checked((out, log_sum_exp), other.expected(causal=True))


def test_pages_in_compiled_functions():
    """Where offsets and tables are known by their shapes alone."""
    batch, call = serving_call()
    torch._dynamo.reset()
    compiled = torch.compile(widehead.sdpa, fullgraph=True, backend="aot_eager")
    checked(compiled(**call), batch.expected(causal=True))
