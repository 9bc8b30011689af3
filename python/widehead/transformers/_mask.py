"""The mask of transformers as structure: causal, window, padding; never len_q x len_k.

transformers asks a mask function once a forward for each kind of layer, and hands its answer to
every attention call. Only the mask function knows where the queries stand: an attention call sees
keys of a cache, of which the tail may be unwritten, and cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    causal_mask_function,
    eager_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.utils import logging

from widehead.transformers._models import mask_form

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class StructuredMask(BlockMask):
    """A causal mask of [batch, 1, len_q, len_k] by what it says.

    The last query stands on the last present key, ``key_lengths[b] - 1`` or ``len_k - 1``;
    ``is_top_left``: the first query stands on the first key.

    Whoever computes with it gets the boolean tensor that it stands for: it answers to the functions,
    methods and operators of one. It is a BlockMask to pass for a ready mask where transformers looks
    for one, and nothing else of a BlockMask holds; models that ask for its class never get it.
    """

    batch: int
    len_q: int
    len_k: int
    window: int | None = None  # keys that a query sees, itself included
    is_top_left: bool = False
    key_lengths: Tensor | None = None  # int32 [batch]
    key_starts: Tensor | None = None  # int32 [batch]
    keys: Tensor | None = None  # bool [batch, 1, 1, len_k], where padding is no range
    device: torch.device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, 1, self.len_q, self.len_k)

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.batch * self.len_q * self.len_k

    def contiguous(self) -> StructuredMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> StructuredMask:
        """Where a model lies on several devices, masks follow its hidden states."""
        kwargs.pop("dtype", None)
        moved = {
            name: tensor.to(*args, **kwargs)
            for name in ("key_lengths", "key_starts", "keys")
            if (tensor := getattr(self, name)) is not None
        }
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        return replace(self, **moved, device=device or self.device)

    def __getitem__(self, index: Any) -> Any:
        """``mask[:, :, -n:, :]``, the last n queries, stays structure: models whose layers share keys
        take it. Everything else is of the dense mask."""
        everything = slice(None)
        if not isinstance(index, tuple) or len(index) != 4 or index[:2] != (everything,) * 2:
            return self.dense()[index]
        if not isinstance(index[2], slice) or not isinstance(index[3], slice):
            return self.dense()[index]
        queries = range(self.len_q)[index[2]]
        keys = range(self.len_k)[index[3]]
        is_tail = queries.step == 1 and (queries.stop == self.len_q or len(queries) == 0)
        if not is_tail or keys != range(self.len_k):
            return self.dense()[index]
        if len(queries) == self.len_q:
            return self
        if not self.is_top_left:
            return replace(self, len_q=len(queries))
        # Fewer queries no longer begin at the first key: what ended by length ends by mask.
        positions = torch.arange(self.len_k, device=self.device)
        present = positions < self._column(self.key_lengths, self.len_q)
        mask = present[:, None, None, :]
        lengths = torch.full((self.batch,), self.len_q, dtype=torch.int32, device=mask.device)
        return replace(
            self,
            len_q=len(queries),
            is_top_left=False,
            key_lengths=lengths,
            keys=mask if self.keys is None else mask & self.keys,
        )

    def dense(self) -> Tensor:
        """Boolean [batch, 1, len_q, len_k]: for what cannot be said by structure, and for tests."""
        key = torch.arange(self.len_k, device=self.device)[None, None, None, :]
        query = torch.arange(self.len_q, device=self.device)[None, None, :, None]
        lengths = self._column(self.key_lengths, self.len_k)[:, :, None, None]
        diagonal = query if self.is_top_left else query + lengths - self.len_q
        visible = (key <= diagonal) & (key < lengths)
        visible = visible & (key >= self._column(self.key_starts, 0)[:, :, None, None])
        if self.window is not None:
            visible = visible & (key > diagonal - self.window)
        if self.keys is not None:
            visible = visible & self.keys
        return visible.expand(self.shape)

    def _column(self, values: Tensor | None, default: int) -> Tensor:
        if values is None:
            return torch.full((1, 1), default, device=self.device)
        return values[:, None]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)


def _of_dense(name: str) -> Callable[..., Any]:
    def operator(self: StructuredMask, *others: Any) -> Any:
        return getattr(self.dense(), name)(*others)

    return operator


for _name in ("and", "or", "xor", "add", "sub", "mul", "truediv"):
    for _side in ("", "r"):
        setattr(StructuredMask, f"__{_side}{_name}__", _of_dense(f"__{_side}{_name}__"))
for _name in ("invert", "eq", "ne", "lt", "le", "gt", "ge", "len", "iter"):
    setattr(StructuredMask, f"__{_name}__", _of_dense(f"__{_name}__"))
StructuredMask.__hash__ = object.__hash__  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Pattern:
    window: int | None


def _pattern_of(mask_function: Callable[..., Any]) -> _Pattern | None:
    """Causal, or causal with a window; None for everything else.

    The functions of transformers are closures without names of their own. A window is recognised
    by the code and the closed-over values that its factory makes.
    """
    if mask_function is causal_mask_function:
        return _Pattern(window=None)
    window = _window_of(mask_function, _REFERENCE)
    return None if window is None else _Pattern(window=window)


def _window_of(mask_function: Callable[..., Any], reference: Callable[..., Any]) -> int | None:
    """The window of what was made as ``reference`` was, sliding_window_causal_mask_function(1)."""
    parts = (_closed_over(mask_function, reference) or {}).get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    own = (_closed_over(reference, reference) or {})["mask_functions"][0]
    window = (_closed_over(parts[0], own) or {}).get("sliding_window")
    return window if isinstance(window, int) else None


def _closed_over(
    function: Callable[..., Any], reference: Callable[..., Any]
) -> dict[str, Any] | None:
    """The closure of a function that was made where ``reference`` was; None if it was not."""
    code = getattr(function, "__code__", None)
    is_same = code is not None and code is getattr(reference, "__code__", None)
    if not is_same:
        return None
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells)}


_REFERENCE = sliding_window_causal_mask_function(1)


@dataclass(frozen=True)
class _Padding:
    key_starts: Tensor | None = None
    key_ends: Tensor | None = None
    keys: Tensor | None = None


def _padding_of(present: Tensor, len_k: int) -> _Padding:
    """``present``, bool [batch, keys], as a range of keys for each of the batch where it is one."""
    count = present.shape[1]
    if bool(present.all()):  # 5 us where the rest takes 45, for each kind of layer and token
        return _Padding()
    total = present.sum(dim=1)
    first = present.to(torch.int8).argmax(dim=1)
    last = count - 1 - present.flip(1).to(torch.int8).argmax(dim=1)
    is_empty = total == 0
    starts = torch.where(is_empty, count, first)
    ends = torch.where(is_empty, count, last + 1)
    # One transfer for all questions: each waits for the device.
    is_range, from_first, to_last = torch.stack(
        [((ends - starts == total) | is_empty).all(), (starts == 0).all(), (ends == count).all()]
    ).tolist()
    if not is_range:
        return _Padding(keys=_spread(present, len_k))
    return _Padding(
        key_starts=None if from_first else starts.to(torch.int32),
        key_ends=None if to_last else ends.to(torch.int32),
    )


def _spread(present: Tensor, len_k: int) -> Tensor:
    """Bool [batch, 1, 1, len_k]: keys that the 2-D mask does not reach are absent."""
    keys = torch.nn.functional.pad(present, (0, len_k - present.shape[1]))
    return keys[:, None, None, :]


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Any:
    """The mask function: a :class:`StructuredMask` for causal masks, else what ``sdpa`` would get.

    Query i stands at position ``q_offset + i``, key j at ``kv_offset + j``. Masks that are neither
    causal nor causal with a window (chunks, packed sequences, images) become boolean tensors, and
    those of encoders broadcast over the queries. So do those for models that ask what a mask is;
    models that declare no attention functions get what ``eager`` would: they add it to scores.
    """
    config = kwargs.get("config")
    form = "structured" if config is None else mask_form(type(config).__module__)
    pattern = _pattern_of(mask_function)
    if pattern is None or form != "structured":
        if pattern is None and _window_of(_REFERENCE, _REFERENCE) is None:
            logger.warning_once(
                "widehead does not know the window masks of this version of transformers: windows "
                "become masks of queries by keys, right but slow."
            )
        # True for encoders alone, which may also need no mask at all: None.
        kwargs["allow_is_causal_skip"] = False
        make_mask = eager_mask if form == "additive" else sdpa_mask
        return make_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a tensor for a static cache
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
    # The queries' own keys are the last present ones: what follows is unwritten cache.
    present = q_offset + q_length - kv_offset
    # Decoding from a static cache is what gets compiled: a field that is now a tensor and now None
    # would cost a new graph. transformers withholds this permission then.
    is_compiled_decode = q_length == 1 and not kwargs.get("allow_is_causal_skip", True)
    key_lengths = None
    if isinstance(present, Tensor):
        # A static cache counts in this tensor, in place: `present` is a copy by now. Its value
        # stays a tensor, so that compiled decoding needs no new graph for every token.
        key_lengths = present.to(device=device, dtype=torch.int32).expand(batch_size).contiguous()
    elif present != kv_length or is_compiled_decode:
        key_lengths = torch.full((batch_size,), present, dtype=torch.int32, device=device)
    mask = StructuredMask(
        batch=batch_size,
        len_q=q_length,
        len_k=kv_length,
        window=pattern.window,
        key_lengths=key_lengths,
        device=torch.device(device),
    )
    if attention_mask is None:
        return mask
    local = attention_mask[:, kv_offset : kv_offset + kv_length]
    if torch.compiler.is_compiling():
        return replace(mask, keys=_spread(local, kv_length))
    count = int(present)
    if local.shape[1] < count:
        return replace(mask, keys=_spread(local, kv_length))
    padding = _padding_of(local[:, :count], kv_length)
    if padding.key_ends is None and is_compiled_decode and padding.keys is None:
        starts = padding.key_starts
        if starts is None:
            starts = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return replace(mask, key_starts=starts)
    if padding.key_ends is None:
        return replace(mask, key_starts=padding.key_starts, keys=padding.keys)
    if count == q_length:
        # Queries and keys begin together: the first query stands on the first key.
        return replace(
            mask, is_top_left=True, key_starts=padding.key_starts, key_lengths=padding.key_ends
        )
    return replace(mask, keys=_spread(local[:, :count], kv_length))
