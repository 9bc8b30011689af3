"""What differs between array libraries: how a new array is made, streams, threads.

Reading is the same for all of them (DLPack) and lives in the extension module. A library is
imported only when one of its arrays arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from widehead import _core
from widehead._limits import Limits

Array = Any
# Of widehead.sdpa in their order, from query_offsets to len_k as one: a tuple, or None.
Arguments = tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any]


class Library:
    """The arrays of one library. This class serves every library with an array namespace."""

    is_immutable = False  # its arrays cannot be an ``out``

    def empty(self, q: Array, shape: tuple[int, ...], dtype: str) -> Array:
        """A writable array where q is, of q's dtype or float32."""
        if not hasattr(q, "__array_namespace__"):
            raise TypeError(
                f"q is a {type(q).__name__}, of a library that offers no way to make an array; "
                f"pass out= of shape {shape}" + (" and no return_log_sum_exp" if len(shape) < 4 else "")
            )
        namespace = q.__array_namespace__()
        kind = namespace.float32 if dtype == "float32" else q.dtype
        return namespace.empty(shape, dtype=kind, device=q.device)

    def finished(self, array: Array) -> Array:
        """What the caller gets for an array of :meth:`empty`."""
        return array

    def stream(self, q: Array) -> int | None:
        """The CUDA stream on which the caller works, where DLPack does not tell."""
        return None

    def threads(self) -> int:
        """CPU threads where the limits leave them open; 0: every core."""
        return 0

    def sdpa(self, arguments: Arguments, limits: Limits) -> Any:
        """Runs :func:`widehead.sdpa`, whose arguments these are, in their order."""
        result = _core.sdpa(
            *arguments, limits._core, self.threads(), self.stream(arguments[0]), self.empty
        )
        if isinstance(result, tuple):
            out, log_sum_exp = result
            own = out is not arguments[-1]
            return (self.finished(out) if own else out), self.finished(log_sum_exp)
        return result if result is arguments[-1] else self.finished(result)

    def merge(self, parts: list[tuple[Array, Array]], sinks: Array) -> tuple[Array, Array]:
        """Runs :func:`widehead.merge`."""
        out, log_sum_exp = _core.merge(parts, sinks, self.stream(parts[0][0]), self.empty)
        return self.finished(out), self.finished(log_sum_exp)


class _NumPy(Library):
    def empty(self, q: Array, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, np.float32 if dtype == "float32" else q.dtype)

    def sdpa(self, arguments: Arguments, limits: Limits) -> Any:
        return _core.sdpa(*arguments, limits._core, 0, None, self.empty)


class _CuPy(Library):
    def empty(self, q: Array, shape: tuple[int, ...], dtype: str) -> Array:
        import cupy

        return cupy.empty(shape, cupy.float32 if dtype == "float32" else q.dtype)

    def stream(self, q: Array) -> int | None:
        import cupy

        # DLPack numbers CUDA's legacy default stream 1; 0 would be ambiguous.
        return cupy.cuda.get_current_stream().ptr or 1


class _Jax(Library):
    is_immutable = True

    def empty(self, q: Array, shape: tuple[int, ...], dtype: str) -> Array:
        if next(iter(q.devices())).platform != "cpu":
            raise TypeError("q is a JAX array on a GPU; only those on the CPU are supported")
        return _core.empty(shape, dtype)

    def finished(self, array: Array) -> Array:
        import jax

        return jax.dlpack.from_dlpack(array)

    def sdpa(self, arguments: Arguments, limits: Limits) -> Any:
        import jax

        if isinstance(arguments[0], jax.core.Tracer):
            raise TypeError(
                "q is being traced by JAX; call widehead.jax.sdpa inside jax.jit, or widehead.sdpa "
                "through jax.pure_callback"
            )
        return super().sdpa(arguments, limits)


class _Mlx(Library):
    is_immutable = True

    def empty(self, q: Array, shape: tuple[int, ...], dtype: str) -> Array:
        return _core.empty(shape, dtype)

    def finished(self, array: Array) -> Array:
        import mlx.core as mx

        return mx.array(array)  # a copy: MLX adopts no memory


class _Torch(Library):
    # Outputs come from PyTorch's own allocator, through the exchange table of DLPack, which also
    # names the current stream.
    def __init__(self) -> None:
        import torch

        from widehead import torch as widehead_torch

        self._torch = torch
        self._module = widehead_torch

    def threads(self) -> int:
        return int(self._torch.get_num_threads())

    def sdpa(self, arguments: Arguments, limits: Limits) -> Any:
        return self._module.attention(arguments, limits)

    def merge(self, parts: list[tuple[Array, Array]], sinks: Array) -> tuple[Array, Array]:
        tensors = [tensor for part in (*parts, (sinks,)) for tensor in part]
        if self._torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in tensors
        ):
            raise NotImplementedError(
                "widehead.merge has no backward yet: detach its parts, or call it under torch.no_grad()"
            )
        return super().merge(parts, sinks)


# By the package that an array's type comes from.
_MAKERS: dict[str, Callable[[], Library]] = {
    "numpy": _NumPy,
    "torch": _Torch,
    "jax": _Jax,
    "jaxlib": _Jax,
    "mlx": _Mlx,
    "cupy": _CuPy,
}
_OTHER = Library()
_libraries: dict[type, Library] = {}


def library_of(array: Array) -> Library:
    """The library whose kind of array the result will be."""
    return library_of_type(type(array))


def library_of_type(kind: type) -> Library:
    """The library that arrays of this type belong to."""
    found = _libraries.get(kind)
    return found if found is not None else _find(kind)


def expect_writable(out: Array, name: str = "out", advice: str = "leave out= away and take the result") -> None:
    """Raises TypeError for arrays that their library promises never to change."""
    if library_of(out).is_immutable:
        kind = type(out)
        raise TypeError(
            f"{name} is a {kind.__name__} of {kind.__module__.partition('.')[0]}, whose arrays are "
            f"immutable; {advice}"
        )


def _find(kind: type) -> Library:
    for base in kind.__mro__:
        make = _MAKERS.get(base.__module__.partition(".")[0])
        if make is not None:
            _libraries[kind] = library = make()
            return library
    return _OTHER
