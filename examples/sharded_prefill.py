"""Prefills a prompt that is longer than one rank may hold: K and V of each layer stay with the ranks
that hold their tokens, and every rank attends with its own queries.

    torchrun --nproc-per-node 4 examples/sharded_prefill.py --tokens 65536 --rank-memory 64MiB

On the CPU over gloo; with --device cuda over NCCL, a GPU a rank. The layers' values are random: what
is shown is where memory goes, and that rows agree with float64.
"""

import argparse
import time

import torch
import torch.distributed as dist

from widehead.torch import parallel

HEADS_Q, HEADS_KV, DIM = 8, 2, 128


def bytes_of(text: str) -> int:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * size)
    return int(text)


def layer(tokens: list[tuple[int, int]], number: int, device: str) -> list[torch.Tensor]:
    """q, k and v of a rank's tokens, the same whoever asks for them: a model's projections."""
    parts = []
    for begin, end in tokens:
        # A generator for each block of 256 tokens, so that no rank makes those of another.
        blocks = []
        for block in range(begin // 256, -(-end // 256)):
            generator = torch.Generator().manual_seed(number * 2**20 + block)
            values = torch.randn(256, HEADS_Q + 2 * HEADS_KV, DIM, generator=generator)
            at = block * 256
            blocks.append(values[max(0, begin - at) : min(256, end - at)])
        parts.append(torch.cat(blocks) if blocks else torch.empty(0, HEADS_Q + 2 * HEADS_KV, DIM))
    x = torch.cat(parts).to(device, torch.bfloat16).unsqueeze(0).transpose(1, 2)
    return list(x.split((HEADS_Q, HEADS_KV, HEADS_KV), 1))


def float64_row(token: int, number: int) -> torch.Tensor:
    """Of one query, over all keys before it."""
    q, _, _ = layer([(token, token + 1)], number, "cpu")
    _, k, v = layer([(0, token + 1)], number, "cpu")
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS_Q // HEADS_KV, 1) for x in (k, v))
    return torch.softmax(q @ k.transpose(2, 3) / DIM**0.5, 3) @ v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank-memory", default="16MiB", help="for K and V of all layers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if options.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    limit = bytes_of(options.rank_memory)
    whole = options.layers * options.tokens * 2 * HEADS_KV * DIM * 2
    if rank == 0:
        print(f"K and V of {options.tokens} tokens in {options.layers} layers: "
              f"{whole / 2**20:.0f} MiB, of which a rank may hold {limit / 2**20:.0f}")
    if whole / ranks > limit:
        raise SystemExit(f"{ranks} ranks hold {whole / ranks / 2**20:.0f} MiB each; start more")
    tokens = parallel.zigzag(options.tokens, ranks)
    cache, begin = [], time.perf_counter()
    explain: list[str] = []
    for number in range(options.layers):
        q, k, v = layer(tokens[rank], number, options.device)
        cache.append((k, v))
        # Keys come round one rank's at a time, two of them at most.
        out = parallel.sdpa(q, k, v, tokens=tokens, causal=True, strategy="ring", explain=explain)
    seconds = time.perf_counter() - begin
    held = sum(x.numel() * x.element_size() for pair in cache for x in pair)
    last = tokens[rank][-1][1] - 1
    want = float64_row(last, options.layers - 1)[0, :, 0]
    have = out[0, :, -1].double().cpu()
    error = float((have - want).norm() / want.norm())
    print(f"rank {rank}: {held / 2**20:.1f} MiB of K and V, {seconds:.1f} s, the row of token {last} "
          f"is off by {error:.1e}", flush=True)
    if error > 7e-3:
        raise SystemExit("that is too much")
    if rank == 0:
        print(explain[-1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
