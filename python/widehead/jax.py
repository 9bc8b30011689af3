"""JAX: ``jax.nn.dot_product_attention``'s names and layout, on the CPU, by a callback that jit keeps.

>>> import widehead.jax
>>> out = jax.jit(widehead.jax.sdpa, static_argnames="is_causal")(query, key, value, is_causal=True)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

import widehead
from widehead import _core
from widehead._checks import LONGEST, is_whole, number, softcap_of, yes
from widehead._errors import expect_kernel
from widehead._limits import Limits, backward_limits, limits_of

__all__ = ["sdpa"]

_Shape: Any = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class _Options:
    """What a call computes beyond its arrays. Equal ones share what JAX has compiled."""

    scale: float | None
    causal: Any
    window: tuple[int, int] | None
    softcap: float
    limits: Limits

    def expect_kernel(self, arrays: tuple[Any, ...], *, gradients: bool = False) -> None:
        """Raises ValueError for wrong arrays, and Refused where the limits allow no kernel."""
        q, k, v = (jax.eval_shape(_heads_first, each) for each in arrays[:3])
        q, k, v, mask, sinks, key_lengths = map(_spec, (q, k, v, *arrays[3:]))
        made = widehead.plan(
            q, k, v, mask=mask, sinks=sinks, key_lengths=key_lengths, scale=self.scale,
            causal=self.causal, window=self.window, softcap=self.softcap, gradients=gradients,
            limits=backward_limits(self.limits) if gradients else self.limits,
        )  # fmt: skip
        expect_kernel(made)


def _heads_first(array: Any) -> Any:
    return array.swapaxes(1, 2)


def _spec(array: Any) -> widehead.Spec | None:
    return None if array is None else widehead.Spec(array.shape, str(array.dtype))


def _numpy(*arrays: Any) -> list[Any]:
    return [None if each is None else np.asarray(each) for each in arrays]


@dataclass(frozen=True)
class _Forward:
    """The host's part: out, laid out as query, and the log-sum-exp [batch, heads, length]."""

    options: _Options

    def __call__(self, *arrays: Any) -> tuple[Any, Any]:
        q, k, v, mask, sinks, key_lengths = _numpy(*arrays)
        out = np.empty((*q.shape[:3], v.shape[3]), q.dtype)
        o = self.options
        _, log_sum_exp = widehead.sdpa(
            *map(_heads_first, (q, k, v)), scale=o.scale, causal=o.causal, window=o.window,
            softcap=o.softcap, mask=mask, sinks=sinks, key_lengths=key_lengths,
            return_log_sum_exp=True, out=_heads_first(out), limits=o.limits,
        )  # fmt: skip
        return out, log_sum_exp


@dataclass(frozen=True)
class _Backward:
    """The host's part: gradients of q, k, v and, where there are any, the sinks."""

    options: _Options

    def __call__(self, d_out: Any, saved: Any, out: Any, log_sum_exp: Any) -> list[Any]:
        q, k, v, mask, sinks, key_lengths = _numpy(*saved)
        gradients = [None if each is None else np.empty_like(each) for each in (q, k, v, sinks)]
        d_out, out, log_sum_exp = _numpy(d_out, out, log_sum_exp)
        o = self.options
        dq, dk, dv = map(_heads_first, gradients[:3])
        _core.backward(
            *map(_heads_first, (q, k, v)), o.scale, o.causal, o.window, o.softcap, mask, sinks,
            key_lengths, None, None, _heads_first(out), log_sum_exp, _heads_first(d_out), dq, dk, dv,
            gradients[3], backward_limits(o.limits)._core, 0,
        )  # fmt: skip
        return [each for each in gradients if each is not None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, *arrays: Any) -> tuple[Any, Any]:
    q, _, v, *_ = arrays
    batch, length, heads, _ = q.shape
    shapes = (
        _Shape((batch, length, heads, v.shape[3]), q.dtype),
        _Shape((batch, heads, length), jnp.float32),
    )
    result: tuple[Any, Any] = jax.pure_callback(
        _Forward(options), shapes, *arrays, vmap_method="sequential"
    )
    return result


def _attention_forward(options: _Options, *primals: Any) -> Any:
    arrays = tuple(None if each is None else each.value for each in primals)
    if primals[3] is not None and primals[3].perturbed:
        raise NotImplementedError(
            "bias has no gradient here: pass jax.lax.stop_gradient(bias), or train it with "
            "jax.nn.dot_product_attention"
        )
    out, log_sum_exp = _attention(options, *arrays)
    return (out, log_sum_exp), (arrays, out, log_sum_exp)


def _attention_backward(options: _Options, saved: Any, gradients: Any) -> tuple[Any, ...]:
    d_out, d_log_sum_exp = gradients
    if not isinstance(d_log_sum_exp, SymbolicZero):
        raise NotImplementedError(
            "the residual, the log-sum-exp, has no gradient: pass it through jax.lax.stop_gradient"
        )
    arrays, out, log_sum_exp = saved
    if isinstance(d_out, SymbolicZero):
        return (None,) * len(arrays)
    options.expect_kernel(arrays, gradients=True)
    q, k, v, _, sinks, _ = arrays
    shapes = [_Shape(each.shape, each.dtype) for each in (q, k, v, sinks) if each is not None]
    dq, dk, dv, *d_sinks = jax.pure_callback(
        _Backward(options), shapes, d_out, arrays, out, log_sum_exp, vmap_method="sequential"
    )
    return dq, dk, dv, None, d_sinks[0] if d_sinks else None, None


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


def _expect_cpu() -> None:
    """A callback would take arrays of another device through the host without a word."""
    device = getattr(jax.config, "jax_default_device", None) or jax.default_backend()
    platform = getattr(device, "platform", device)
    if platform != "cpu":
        raise NotImplementedError(
            f"widehead.jax works on the CPU, and JAX's default device is a {platform}: call it within "
            'jax.default_device(jax.devices("cpu")[0])'
        )


def _expect_shape(name: str, array: Any, shape: tuple[int | None, ...], letters: str) -> None:
    """``None`` in the shape: any size."""
    fits = len(array.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(
            letter if size is None else f"{letter} = {size}"
            for letter, size in zip(letters, shape, strict=True)
        )
        raise ValueError(f"{name} is {list(array.shape)}; it must be [{wanted}]")


def _expect_broadcast(name: str, array: Any, shape: tuple[int, ...]) -> None:
    have = array.shape[::-1]
    if len(have) > 4 or any(a not in (1, b) for a, b in zip(have, shape[::-1], strict=False)):
        raise ValueError(
            f"{name} is {list(array.shape)}; it must broadcast to [B, N, T, S], here {list(shape)}"
        )


def _expect_dtypes(q: Any, k: Any, v: Any) -> None:
    for name, array in (("query", q), ("key", k), ("value", v)):
        if str(array.dtype) not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"{name} is {array.dtype}; it must be float32, float16 or bfloat16")
    if k.dtype != v.dtype:
        raise ValueError(f"value is {v.dtype}; it must be of key's type, {k.dtype}")


def _window_of(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = (size, size) if is_whole(size) else size
    fits = isinstance(sides, (tuple, list)) and len(sides) == 2
    if not fits or not all(is_whole(side) and 0 <= side <= LONGEST for side in sides):
        raise ValueError(
            f"local_window_size is {size!r}; it must be a number of keys from 0 to {LONGEST}, or a "
            "pair of them"
        )
    return int(sides[0]), int(sides[1])


def _lengths_of(name: str, lengths: Any, batch: int) -> Any:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{name} is {lengths.dtype}; it must be of whole numbers")
    _expect_shape(name, lengths, (batch,), "B")
    return lengths.astype(jnp.int32)


def _mask_of(bias: Any, mask: Any, dtype: Any) -> Any:
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool (true attends); biases are added")
    if bias is None:
        return mask
    if bias.dtype != jnp.float32:
        bias = bias.astype(dtype)
    return bias if mask is None else jnp.where(mask, bias, -jnp.inf)


def sdpa(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
    limits: Limits | None = None,
) -> Any:
    """``jax.nn.dot_product_attention`` by Widehead: the same arguments, meaning and result, without
    the scores in memory.

    query [B, T, N, H], key [B, S, K, H] and value [B, S, K, H_v], or all without B; float32, float16
    or bfloat16. bias and mask (boolean) broadcast to [B, N, T, S]. Causal and windows count from the
    first query and key. return_residual: also the log-sum-exp, float32 [B, T, N]. A row that sees no
    key is 0. Beyond JAX's:

    softcap: scores become softcap * tanh(score / softcap), before masks.
    sinks: float32 [N]: one more logit a head, in the denominator only.
    limits: what the call may take; see :class:`widehead.Limits`.

    Works under jax.jit, jax.grad, jax.checkpoint and, one call after another, jax.vmap. q, k, v and
    sinks have gradients, by the backward pass, which stores no scores either; bias and the residual
    have none and say so. Raises ValueError with the argument, its value and what would be valid, and
    :class:`widehead.Refused` when the limits allow no kernel, all while JAX traces.
    """
    _expect_cpu()
    arrays = {"query": query, "key": key, "value": value, "bias": bias, "mask": mask, "sinks": sinks}
    for name in ("query", "key", "value"):
        if arrays[name] is None:
            raise TypeError(f"{name} is None; it must be an array")
    arrays = {name: None if each is None else jnp.asarray(each) for name, each in arrays.items()}
    q, k, v = arrays["query"], arrays["key"], arrays["value"]
    if q.ndim not in (3, 4):
        raise ValueError(f"query is {list(q.shape)}; it must be [B, T, N, H] or [T, N, H]")
    is_single = q.ndim == 3
    letters = "BSKH"[is_single:]
    _expect_shape("key", k, (*q.shape[: 1 - is_single], None, None, q.shape[-1]), letters)
    _expect_shape("value", v, (*k.shape[:-1], None), letters)
    _expect_dtypes(q, k, v)
    if is_single:
        q, k, v = (each[None] for each in (q, k, v))
    for name in ("bias", "mask"):
        if arrays[name] is not None:
            _expect_broadcast(name, arrays[name], (*q.shape[:3:2], q.shape[1], k.shape[1]))
    lengths = [
        _lengths_of("query_seq_lengths", query_seq_lengths, q.shape[0]),
        _lengths_of("key_value_seq_lengths", key_value_seq_lengths, q.shape[0]),
    ]
    window = _window_of(local_window_size)
    if window is not None and not is_causal and (q.shape[1] != k.shape[1] or lengths[1] is not None):
        raise ValueError(
            f"local_window_size is {local_window_size} over {q.shape[1]} queries and {k.shape[1]} keys; "
            "without is_causal it needs as many of both, and no key_value_seq_lengths"
        )
    options = _Options(
        None if scale is None else number("scale", scale),
        "top_left" if yes("is_causal", is_causal) else False, window, softcap_of(softcap),
        limits_of(limits),
    )  # fmt: skip
    given = (q, k, v, _mask_of(arrays["bias"], arrays["mask"], q.dtype), arrays["sinks"], lengths[1])
    options.expect_kernel(given)
    out, log_sum_exp = _attention(options, *given)
    log_sum_exp = _heads_first(log_sum_exp)
    if lengths[0] is not None:  # padding, which JAX leaves 0
        exists = jnp.arange(q.shape[1]) < lengths[0][:, None]
        out = jnp.where(exists[:, :, None, None], out, 0)
    if is_single:
        out, log_sum_exp = out[0], log_sum_exp[0]
    return (out, log_sum_exp) if return_residual else out
