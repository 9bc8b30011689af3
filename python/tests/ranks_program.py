"""A rank of test_torch_parallel.py: compares with float64, and prints what went wrong."""

import itertools
import sys

import torch
import torch.distributed as dist

from widehead.torch import parallel


def oracle(q, k, v, *, causal, window, softcap, sinks, length, mask=None):
    """float64, over all tokens."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(q.shape[2])[:, None] + length - q.shape[2]
    j = torch.arange(k.shape[2])[None, :]
    hidden = j >= length
    if causal:
        hidden = hidden | (j > i)
    if window:
        hidden = hidden | (j < i - window[0])
    scores = scores.masked_fill(hidden, float("-inf"))
    if mask is not None:
        additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) \
            if mask.dtype == torch.bool else mask
        scores = scores + additive.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(
            *scores.shape[:3], 1)], 3)
        return torch.softmax(scores, 3)[..., :-1] @ v
    return torch.softmax(scores, 3).nan_to_num(0) @ v  # a row that sees no key is 0


def check_cases(rank, ranks):
    torch.manual_seed(1)
    count = 0
    strategies = (None, "ring", "gather", "queries", "one_rank")
    for dtype, causal, cut, strategy in itertools.product(
            (torch.float32, torch.bfloat16), (False, True),
            (parallel.contiguous, parallel.zigzag), strategies):
        len_k = 96 + 7 * count % 50
        len_q = len_k if count % 3 else 5
        q = torch.randn(1, 4, len_q, 32)
        k, v = torch.randn(1, 2, len_k, 32), torch.randn(1, 2, len_k, 24)
        options = {"causal": causal, "window": (40, None) if causal and count % 4 == 0 else None,
                   "softcap": 5.0 if count % 5 == 0 else None,
                   "sinks": torch.randn(4) if count % 2 else None}
        length = len_k - 3 if count % 7 == 0 else len_k
        q, k, v = (x.to(dtype) for x in (q, k, v))
        want = oracle(q, k, v, length=length, **options)
        tokens, tokens_k = cut(len_q, ranks), cut(len_k, ranks)
        local = [parallel.take(x, t, rank) for x, t in ((q, tokens), (k, tokens_k), (v, tokens_k))]
        if count % 2:
            local = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in local]
        explain = []
        out = parallel.sdpa(*local, tokens=tokens, tokens_k=tokens_k, strategy=strategy,
                            key_lengths=[length] if length < len_k else None, explain=explain,
                            link=(10.0, 5.0) if count % 10 else (0.0, 0.0), timeout=200, **options)
        mine = parallel.take(want, tokens, rank)
        error = float((out.double() - mine).norm() / max(1e-30, mine.norm())) if mine.numel() else 0
        limit = 4e-6 if dtype == torch.float32 else 7e-3
        assert error <= limit, f"{error} on rank {rank}: {dtype} {options} {strategy}"
        assert f"over {ranks} ranks" in explain[0]
        count += 1
    return count


def check_masks(rank, ranks):
    """Each rank makes the rows of its own queries; or all have what broadcasts to all rows."""
    torch.manual_seed(2)
    count = 0
    for kind, strategy in itertools.product(
            ("boolean", "additive", "of keys"), (None, "ring", "gather", "queries", "one_rank")):
        tokens, tokens_k = parallel.zigzag(61, ranks), parallel.contiguous(83, ranks)
        q, k, v = torch.randn(2, 4, 61, 32), torch.randn(2, 2, 83, 32), torch.randn(2, 2, 83, 24)
        shape = {"boolean": (2, 1, 61, 83), "additive": (2, 4, 61, 83), "of keys": (83,)}[kind]
        mask = torch.randn(shape) if kind == "additive" else torch.rand(shape) > 0.3
        want = oracle(q, k, v, causal=False, window=None, softcap=None, sinks=None, length=83,
                      mask=mask)
        given = mask
        if mask.ndim == 4:
            rows = parallel.take(mask, tokens, rank)
            given = parallel.gather(rows, tokens)
            assert torch.equal(given, mask)
        local = [parallel.take(x, t, rank) for x, t in ((q, tokens), (k, tokens_k), (v, tokens_k))]
        out = parallel.sdpa(*local, tokens=tokens, tokens_k=tokens_k, mask=given,
                            strategy=strategy, link=(10.0, 5.0), timeout=200)
        mine = parallel.take(want, tokens, rank)
        error = float((out.double() - mine).norm() / max(1e-30, mine.norm())) if mine.numel() else 0
        assert error <= 4e-6, f"{error} on rank {rank}: {kind} mask, {strategy}"
        count += 1
    if ranks > 1:
        try:
            parallel.sdpa(*local, tokens=tokens, tokens_k=tokens_k, mask=mask.new_ones(61, 7))
        except ValueError as error:
            assert "mask is [61, 7]; it must broadcast to" in str(error), error
        else:
            raise AssertionError("a mask of too few keys was taken")
        dist.barrier()
        rows = torch.ones(1, 1, 3, 83)
        others = [()] * (ranks - 2)
        for wrong, message in (
                (parallel.contiguous(61, ranks), "part has 3 tokens in dimension 2"),
                (parallel.contiguous(3, ranks + 1), f"tokens is of {ranks + 1} ranks"),
                ([[(0, 3)], [(2, 5)], *others], "token 2 belongs to two ranks"),
                ([[(0, 3)], [(4, 7)], *others], "token 3 belongs to no rank")):
            try:
                parallel.gather(rows, wrong)
            except ValueError as error:
                assert message in str(error), error
            else:
                raise AssertionError(f"{wrong} was taken")
    return count


class OfADevice(parallel._Group):
    """The way of tensors that a device has, with host memory for the device's and gloo for NCCL:
    words of the host are staged, and a batch of messages has one handle, for which host code waits
    by asking."""

    def __init__(self, group, device):
        super().__init__(group, device)
        self.is_host = False

    def _at(self, address, size):
        return parallel._host_bytes(address, size)


class OneHandle:
    def __init__(self, works):
        self.works = works

    def wait(self):
        for work in self.works:
            work.wait()

    def is_completed(self):
        return all(work.is_completed() for work in self.works)


def check_the_way_of_devices(rank, ranks):
    send = dist.batch_isend_irecv
    parallel.dist.batch_isend_irecv = lambda operations: [OneHandle(send(operations))]
    hosts, parallel._Group = parallel._Group, OfADevice
    try:
        return check_cases(rank, ranks)
    finally:
        parallel._Group, parallel.dist.batch_isend_irecv = hosts, send


def check_errors(rank, ranks):
    tokens = parallel.contiguous(64, ranks)
    q = torch.randn(1, 2, 64 // ranks + (64 % ranks > rank), 16)
    for options, words in (
            ({"softcap": 3.0 if rank == 1 else None}, "softcap of rank 1 is not that of rank 0"),
            ({"window": (7, None) if rank == 1 else None}, "window_left is 7 on rank 1")):
        try:
            parallel.sdpa(q, q, q, tokens=tokens, **options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"rank {rank} heard nothing of {words}")
    try:
        parallel.sdpa(q[:, :, 1:], q, q, tokens=tokens)
    except ValueError as error:
        assert f"rank {rank} holds" in str(error), error
    dist.barrier()
    # The last one never comes: the others stop waiting. The group is of no more use.
    if rank + 1 < ranks:
        try:
            parallel.sdpa(q, q, q, tokens=tokens, timeout=1)
        except RuntimeError as error:
            assert f"rank {ranks - 1} did not" in str(error), error
        else:
            raise AssertionError("nobody missed the last rank")


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = check_cases(rank, ranks)
    masked = check_masks(rank, ranks)
    staged = check_the_way_of_devices(rank, ranks)
    if ranks > 1:
        check_errors(rank, ranks)
    print(f"rank {rank} of {ranks}: {count} cases, {masked} with a mask, {staged} as of a device",
          flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
