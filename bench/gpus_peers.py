"""PyTorch's context_parallel on the problems of tools/gpus_check that it takes.

    torchrun --nproc-per-node 4 bench/gpus_peers.py OUT.json [SECONDS]

Each rank holds its part of q, k and v, as its load balancing cuts them. What it refuses is written
with its words; so is a wrong answer. A row is printed and written as soon as it is there; after SECONDS (60) nothing more
is begun, and every rank ends, also where it waits for another."""

import json
import signal
import sys
import time

BEGIN, SECONDS = time.monotonic(), int(sys.argv[2]) if len(sys.argv) > 2 else 60
signal.alarm(SECONDS)  # before PyTorch, which takes seconds to load

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn import functional

# Name, query heads, kv heads, dim, tokens: causal prefill alone, which is what it shards.
PROBLEMS = [("prefill-131072-d256", 64, 2, 256, 131072),
            ("prefill-131072-d128", 32, 8, 128, 131072)]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}

SECONDS_OF_A_ROW = 10  # with less left nothing is begun


def on_all(value):
    """The largest of all ranks'."""
    most = torch.tensor(float(value), device="cuda")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def best_ms(call, runs=4):
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(on_all(time.perf_counter() - begin) * 1e3)
    return min(times[1:])


def off(row, head, position, q, k, v):
    """How far an answer's row is from float64, beside the largest of that row."""
    keys, values = (one[0, head * one.shape[1] // q.shape[1], :position + 1].double() for one in (k, v))
    scores = keys @ q[0, head, position].double() / q.shape[-1] ** 0.5
    exact = torch.softmax(scores, 0) @ values
    return float((row.double() - exact).abs().max() / exact.abs().max())


def measure(mesh, heads_q, heads_kv, dim, tokens, backend, repeats_heads):
    """Best time in ms, and how far off the first and the last row of each rank are, at most. Keys
    and values of a group's heads are repeated where sharding refuses grouped queries."""
    torch.manual_seed(1)  # every rank has the whole, of which it keeps its part

    def tensor(heads):
        return torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)

    whole = tensor(heads_q), tensor(heads_kv), tensor(heads_kv)
    q, k, v = (one.clone() for one in whole)
    if repeats_heads:
        k, v = (one.repeat_interleave(heads_q // heads_kv, 1) for one in (k, v))
    with (torch.no_grad(), sdpa_kernel(backend),
          context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2],
                           no_restore_buffers={q, k, v})):
        # By its module: what context_parallel replaces there.
        def attend():
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                           enable_gqa=not repeats_heads)

        out, rank, ranks = attend(), mesh.get_rank(), mesh.size()
        part = tokens // (2 * ranks)  # one from the front and one from the end
        error = max(off(out[0, heads_q - 1, row], heads_q - 1, position, *whole)
                    for row, position in ((0, rank * part), (-1, (2 * ranks - rank) * part - 1)))
        del whole, out
        return best_ms(attend), on_all(error)


def main():
    dist.init_process_group("nccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (ranks,))
    rows = []
    for backend, value in BACKENDS.items():
        for name, *shape in PROBLEMS:
            row = {"name": name, "ranks": ranks, "library": f"torch {torch.__version__}",
                   "backend": backend}
            if on_all(time.monotonic() - BEGIN) > SECONDS - SECONDS_OF_A_ROW:
                row["left_out"] = "no time was left"
            else:
                for repeats_heads in (False, True):
                    try:
                        ms, off_by = measure(mesh, *shape, value, repeats_heads)
                        row = row | {"repeats_heads": repeats_heads, "off": off_by}
                        if off_by > 0.05:
                            row["wrong"] = "its rows are not those of the whole attention"
                        else:
                            row["ms"] = ms
                        row.pop("refused", None)
                        break
                    except Exception as error:  # one rank's refusal is every rank's
                        row["refused"] = str(error).splitlines()[0][:200]
                torch.cuda.empty_cache()
            rows.append(row)
            if rank == 0:
                print(json.dumps(row), flush=True)
                with open(sys.argv[1], "w", encoding="utf-8") as file:
                    json.dump(rows, file, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
