"""Arrays of every library that installs on a CPU: zero-copy in, the same kind out."""

import ml_dtypes
import numpy as np
import pytest
import widehead
from oracle import oracle, qkv, relative_rms


def _jax(array):
    return pytest.importorskip("jax.numpy").asarray(array)


def _torch(array):
    torch = pytest.importorskip("torch")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _mlx(array):
    mx = pytest.importorskip("mlx.core")
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def _to_numpy(array):
    if hasattr(array, "float"):  # PyTorch
        return array.float().numpy()
    if type(array).__module__.startswith("mlx"):
        return np.array(array.astype(pytest.importorskip("mlx.core").float32))
    return np.asarray(array).astype(np.float32)


LIBRARIES = {"numpy": lambda array: array, "torch": _torch, "jax": _jax, "mlx": _mlx}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_same_kind_of_array_comes_back(library, dtype):
    convert = LIBRARIES[library]
    arrays = qkv(dtype=DTYPES[dtype])
    expected, expected_lse = widehead.sdpa(*arrays, causal=True, return_log_sum_exp=True)
    q, k, v = (convert(array) for array in arrays)
    out, log_sum_exp = widehead.sdpa(q, k, v, causal=True, return_log_sum_exp=True)
    assert type(out) is type(q) and type(log_sum_exp) is type(q)
    assert out.dtype == q.dtype and "float32" in str(log_sum_exp.dtype)
    # The planner may give another library's call other threads, which must not change a bit.
    assert np.array_equal(_to_numpy(out), expected.astype(np.float32))
    assert np.array_equal(_to_numpy(log_sum_exp), expected_lse)


@pytest.mark.parametrize("library", LIBRARIES)
def test_options_arrive(library):
    convert = LIBRARIES[library]
    arrays = qkv()
    mask = np.random.default_rng(2).random((2, 1, 33, 77)) < 0.5
    sinks = np.array([0.5, -1, 2, 0], np.float32)
    lengths = np.array([70, 20], np.int32)
    out = widehead.sdpa(
        *(convert(array) for array in arrays),
        mask=convert(mask),
        sinks=convert(sinks),
        key_lengths=convert(lengths),
        key_starts=convert(np.array([1, 2], np.int32)),
    )
    expected, _ = oracle(*arrays, mask=mask, sinks=sinks, key_lengths=lengths, key_starts=[1, 2])
    assert relative_rms(_to_numpy(out), expected) <= 4e-6


@pytest.mark.parametrize("library", LIBRARIES)
def test_merge_of_every_library(library):
    convert = LIBRARIES[library]
    q, k, v = qkv(dtype=np.float16)
    parts = [
        widehead.sdpa(
            convert(q), convert(k[:, :, a:b].copy()), convert(v[:, :, a:b].copy()),
            return_log_sum_exp=True,
        )
        for a, b in ((0, 30), (30, 77))
    ]  # fmt: skip
    out, log_sum_exp = widehead.merge(parts)
    expected, expected_lse = oracle(q, k, v)
    assert out.dtype == parts[0][0].dtype
    assert relative_rms(_to_numpy(out), expected) <= 9e-4
    np.testing.assert_allclose(_to_numpy(log_sum_exp), expected_lse, atol=1e-3)


def test_torch_is_read_and_written_in_place():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(array) for array in qkv())
    cache = torch.full((2, 2, 100, 64), torch.nan)
    cache[:, :, :77] = k
    out = torch.empty(2, 33, 4, 48).transpose(1, 2)
    result = widehead.sdpa(q, cache[:, :, :77], v, out=out)
    assert result is out
    assert relative_rms(out.numpy(), oracle(q, k, v)[0]) <= 4e-6


def test_jax_result_is_adopted_not_copied_and_stays_alive():
    jax = pytest.importorskip("jax")
    arrays = qkv()
    results = [widehead.sdpa(*(_jax(array) for array in arrays)) for _ in range(20)]
    expected = widehead.sdpa(*arrays)
    for result in results:
        assert np.array_equal(np.asarray(result), expected)
    # Computed on, as any other array of JAX.
    assert np.allclose(jax.jit(lambda x: x + 1)(results[0]), expected + 1)


def test_jax_computation_in_flight_is_waited_for():
    jax = pytest.importorskip("jax")
    arrays = [_jax(array) for array in qkv()]
    slow = jax.jit(lambda x: x + 0 * sum((x @ x.mT).sum() for _ in range(50)))
    big = jax.numpy.ones((800, 800))
    q = arrays[0] + 0 * slow(big)[0, 0]
    assert np.array_equal(widehead.sdpa(q, *arrays[1:]), widehead.sdpa(*arrays))


def test_jax_tracing_is_refused_with_the_way_out():
    jax = pytest.importorskip("jax")
    q, k, v = (_jax(array) for array in qkv())
    with pytest.raises(TypeError, match="pure_callback"):
        jax.jit(widehead.sdpa)(q, k, v)
    shape = jax.ShapeDtypeStruct((2, 4, 33, 48), np.float32)
    through = jax.jit(lambda *arrays: jax.pure_callback(widehead.sdpa, shape, *arrays))
    assert np.array_equal(through(q, k, v), widehead.sdpa(*qkv()))


class _Foreign:
    """An array of no known library: DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, stream=None):  # as before DLPack 1.0
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_any_dlpack_array_with_an_out():
    q, k, v = qkv()
    out = np.empty((2, 4, 33, 48), np.float32)
    assert widehead.sdpa(_Foreign(q), _Foreign(k), _Foreign(v), out=out) is out
    assert np.array_equal(out, widehead.sdpa(q, k, v))
    with pytest.raises(TypeError, match=r"q is a _Foreign.* pass out= of shape \(2, 4, 33, 48\)$"):
        widehead.sdpa(_Foreign(q), k, v)
    with pytest.raises(TypeError, match="q is a _Foreign.* no return_log_sum_exp"):
        widehead.sdpa(_Foreign(q), k, v, out=out, return_log_sum_exp=True)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("empty", ["batch", "len_q", "len_k"])
def test_zero_sizes(library, empty):
    convert = LIBRARIES[library]
    sizes = {"batch": {"batch": 0}, "len_q": {"length": (0, 77)}, "len_k": {"length": (33, 0)}}
    arrays = tuple(convert(array) for array in qkv(**sizes[empty]))
    out, log_sum_exp = widehead.sdpa(*arrays, return_log_sum_exp=True)
    assert type(out) is type(arrays[0]) and out.dtype == arrays[0].dtype
    assert tuple(out.shape) == (*arrays[0].shape[:3], 48)
    assert tuple(log_sum_exp.shape) == tuple(out.shape[:3])
    assert not _to_numpy(out).any() and np.isneginf(_to_numpy(log_sum_exp)).all()


@pytest.mark.parametrize("library", ["jax", "mlx"])
def test_an_immutable_out_is_refused(library):
    arrays = qkv()
    out = LIBRARIES[library](np.zeros((2, 4, 33, 48), np.float32))
    with pytest.raises(TypeError, match=f"out is a .* of {library}.*, whose arrays are immutable"):
        widehead.sdpa(*arrays, out=out)
    assert not _to_numpy(out).any()


class _Broken:
    def __init__(self, error):
        self.error = error

    def __dlpack__(self, **_):
        raise self.error


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sinks", "key_lengths", "key_starts", "out"])
def test_an_export_that_fails_is_named(name):
    q, k, v = qkv()
    error = RuntimeError("memory is elsewhere")
    arguments = {"q": q, "k": k, "v": v, "out": np.empty((2, 4, 33, 48), np.float32)}
    arguments[name] = _Broken(error)
    with pytest.raises(BufferError, match=f"^{name} cannot be read: memory is elsewhere$") as caught:
        widehead.sdpa(**arguments)
    assert caught.value.__cause__ is error
    arguments[name] = _Broken(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        widehead.sdpa(**arguments)


def test_libraries_mix():
    q, k, v = qkv()
    out = widehead.sdpa(q, _torch(k), _mlx(v))
    assert type(out) is np.ndarray
    assert np.array_equal(out, widehead.sdpa(q, k, v))


def test_other_devices_are_named():
    torch = pytest.importorskip("torch")
    q, k, v = (_torch(array) for array in qkv())
    with pytest.raises(ValueError, match="^k is on meta, without memory; it must be on the CPU"):
        widehead.sdpa(q, k.to("meta"), v)
    spec = widehead.Spec((2, 2, 77, 64), "float32", "cuda:1")
    with pytest.raises(ValueError, match="k is on cuda:1; it must be where q is, on cpu"):
        widehead.plan(q, spec, v)
