"""One attention over the ranks of a process group, each with a part of the tokens.

::

    torchrun --nproc-per-node 4 program.py

    tokens = parallel.zigzag(length, dist.get_world_size())
    q, k, v = (parallel.take(x, tokens, dist.get_rank()) for x in (q, k, v))   # or never whole
    out = parallel.sdpa(q, k, v, tokens=tokens, causal=True)                   # of this rank's queries

Over gloo tensors are of the CPU, over NCCL of a CUDA device each. Every rank calls, in the same
order; each call first agrees on what is computed, and raises on every rank where one rank says
otherwise. docs/parallel.md has the strategies.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from widehead import _core
from widehead._limits import Limits, limits_of

__all__ = ["Tokens", "contiguous", "gather", "sdpa", "take", "zigzag"]

# Of each rank the ranges of tokens that it holds, in the order in which its tensors have them.
Tokens = Sequence[Sequence[tuple[int, int]]]


def contiguous(length: int, ranks: int) -> list[list[tuple[int, int]]]:
    """Even parts, one a rank."""
    cuts = _cuts(length, ranks)
    return [[(cuts[rank], cuts[rank + 1])] for rank in range(ranks)]


def zigzag(length: int, ranks: int) -> list[list[tuple[int, int]]]:
    """Of twice as many parts as ranks one from the front and one from the end each: with
    ``causal`` all ranks then have about as much to do."""
    cuts, parts = _cuts(length, 2 * ranks), 2 * ranks
    return [
        [(cuts[i], cuts[i + 1]) for i in (rank, parts - 1 - rank)] for rank in range(ranks)
    ]


def _cuts(length: int, parts: int) -> list[int]:
    return [length // parts * i + min(i, length % parts) for i in range(parts + 1)]


def take(tensor: Tensor, tokens: Tokens, rank: int, dim: int = 2) -> Tensor:
    """A rank's part of a tensor that has all tokens."""
    parts = [tensor.narrow(dim, begin, end - begin) for begin, end in tokens[rank]]
    return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)


def gather(
    part: Tensor, tokens: Tokens, *, dim: int = 2, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The tensor that has all tokens, from each rank's part: what :func:`take` undoes. For masks of
    which a rank made the rows of its own queries."""
    rank = dist.get_rank(group)
    _expect_ranks("tokens", tokens, dist.get_world_size(group))
    end_of_last = 0
    for begin, end in sorted(both for ranges in tokens for both in ranges if both[0] < both[1]):
        if begin != end_of_last:
            owner = "two ranks" if begin < end_of_last else "no rank"
            token = min(begin, end_of_last)
            raise ValueError(f"token {token} belongs to {owner}; each must belong to one rank")
        end_of_last = end
    sizes = [sum(end - begin for begin, end in ranges) for ranges in tokens]
    if part.shape[dim] != sizes[rank]:
        raise ValueError(
            f"part has {part.shape[dim]} tokens in dimension {dim}; rank {rank} holds {sizes[rank]}"
        )
    # Parts must be of one size, and bool is no type of every backend.
    mine = part.movedim(dim, 0)
    padded = mine.new_zeros((max(sizes), *mine.shape[1:]))
    padded[: sizes[rank]] = mine
    is_bool = part.dtype == torch.bool
    sent = padded.view(torch.uint8) if is_bool else padded
    parts = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(parts, sent, group=group)
    whole = mine.new_empty((sum(sizes), *mine.shape[1:]))
    for ranges, theirs in zip(tokens, parts, strict=True):
        first = 0
        for begin, end in ranges:
            rows = theirs[first : first + end - begin]
            whole[begin:end] = rows.view(torch.bool) if is_bool else rows
            first += end - begin
    return whole.movedim(0, dim)


class _CudaMemory:
    """Bytes of a device, for PyTorch to see in place."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


class _Group:
    """What the library sends, as PyTorch sends it."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.device, self.is_host = group, device, device.type == "cpu"
        self.memory: Tensor | None = None
        self.works: dict[int, list[tuple[dist.Work, str]]] = {}
        self.arrivals: list[tuple[Tensor, Tensor]] = []  # of host memory that was sent by a device

    def workspace(self, size: int) -> int:
        """The address of so many bytes, on a boundary of 64."""
        self.memory = torch.empty(size + 64, dtype=torch.uint8, device=self.device)
        return -(-self.memory.data_ptr() // 64) * 64

    def start(self, exchange: int, transfers: list[tuple[int, bool, int, int]]) -> None:
        # PyTorch wants them in one batch, of which each pair of ranks has the same order.
        operations, whats = [], []
        for peer, is_send, address, size in transfers:
            at = self._of_host(address, size, is_send) if exchange < 0 else self._at(address, size)
            whose = peer if self.group is None else dist.get_global_rank(self.group, peer)
            call = dist.isend if is_send else dist.irecv
            operations.append(dist.P2POp(call, at, whose, self.group))
            whats.append(f"rank {peer} did not {'take' if is_send else 'send'} {size} bytes in time")
        if not operations:
            return
        works = dist.batch_isend_irecv(operations)
        # One for all of them, or one each.
        if len(works) != len(whats):
            whats = ["another rank did not send or take in time"] * len(works)
        self.works[exchange] = list(zip(works, whats, strict=True))

    def finish(self, exchange: int, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        for work, what in self.works.pop(exchange, []):
            try:
                if self.is_host:
                    work.wait(timedelta(seconds=max(0.001, end - time.monotonic())))
                    continue
                work.wait()  # by the stream
                while exchange < 0 and not work.is_completed():
                    if time.monotonic() > end:
                        raise TimeoutError
                    time.sleep(0)
            except (RuntimeError, TimeoutError) as error:
                raise TimeoutError(f"{what} {error}".strip()) from error
        if exchange < 0:
            for to, there in self.arrivals:
                to.copy_(there)
            self.arrivals.clear()

    def _at(self, address: int, size: int) -> Tensor:
        if self.is_host:
            return _host_bytes(address, size)
        return torch.as_tensor(_CudaMemory(address, size), device=self.device)

    def _of_host(self, address: int, size: int, is_send: bool) -> Tensor:
        host = _host_bytes(address, size)
        if self.is_host:
            return host
        if is_send:
            return host.to(self.device)
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.arrivals.append((host, there))
        return there


def _host_bytes(address: int, size: int) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tokens: Tokens,
    tokens_k: Tokens | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
    key_starts: Sequence[int] | None = None,
    return_log_sum_exp: bool = False,
    out: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    strategy: str | None = None,
    link: tuple[float, float] = (0.0, 0.0),
    timeout: float = 30.0,
    limits: Limits | None = None,
    explain: list[str] | None = None,
) -> Any:
    """Attention of this rank's queries to the keys of all ranks.

    q [batch, heads_q, tokens here, dim_qk], k and v the same with theirs. ``tokens`` says who has
    which of q, and of k and v too unless ``tokens_k`` does: the same on every rank. Everything else
    is of the whole sequence and as in :func:`widehead.sdpa`: ``causal``, ``window``, ``key_lengths``.

    mask: boolean (true attends) or additive, of the queries and keys of all ranks, or broadcasting
    to them; the same on every rank. Where each rank has made the rows of its own queries,
    ``gather(rows, tokens)`` is that.

    strategy: "ring", "gather", "heads", "queries" or "one_rank"; None: the planner chooses.
    link: GB/s each way and microseconds a message; (0, 0): measured, in a fraction of a second.
    timeout: seconds for which a rank waits for others.
    explain: a list, to which the plan's table is appended.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    tokens_k = tokens if tokens_k is None else tokens_k
    for name, given in (("tokens", tokens), ("tokens_k", tokens_k)):
        _expect_ranks(name, given, ranks)
    if out is None:
        # Models take the heads of a position side by side next: in this layout that is a view.
        out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)
    whole = _core.Ranks()
    whole.tokens_q, whole.tokens_k = _flat(tokens), _flat(tokens_k)
    whole.key_lengths = None if key_lengths is None else list(key_lengths)
    whole.key_starts = None if key_starts is None else list(key_starts)
    whole.strategy, whole.link, whole.timeout_s = strategy or "", link, timeout
    whole.rank, whole.ranks = rank, ranks
    callbacks = _Group(group, q.device)
    answer, log_sum_exp, text = _core.sharded_sdpa(
        q, k, v, scale, causal, window, softcap, mask, sinks, return_log_sum_exp, out, whole,
        limits_of(limits)._core, torch.get_num_threads(), callbacks, callbacks.workspace,
        None,
    )  # fmt: skip
    if explain is not None:
        explain.append(text)
    return (answer, log_sum_exp) if return_log_sum_exp else answer


def _expect_ranks(name: str, tokens: Tokens, ranks: int) -> None:
    if len(tokens) != ranks:
        raise ValueError(f"{name} is of {len(tokens)} ranks; the group has {ranks}")


def _flat(tokens: Tokens) -> list[tuple[int, int, int]]:
    return [(begin, end, rank) for rank, ranges in enumerate(tokens) for begin, end in ranges]
