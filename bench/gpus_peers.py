"""PyTorch's context_parallel on the problems of tools/gpus_check that it takes.

    torchrun --nproc-per-node 4 bench/gpus_peers.py OUT.json [SECONDS]

Each rank holds its part of q, k and v, as its load balancing cuts them. What it refuses is written
with its words. A row is printed and written as soon as it is there; after SECONDS (60) nothing more
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
from torch.nn.functional import scaled_dot_product_attention as sdpa

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


def measure(mesh, heads_q, heads_kv, dim, tokens, backend):
    def tensor(heads):
        return torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = tensor(heads_q), tensor(heads_kv), tensor(heads_kv)
    with (torch.inference_mode(), sdpa_kernel(backend),
          context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2],
                           no_restore_buffers={q, k, v})):
        return best_ms(lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True))


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
                try:
                    row["ms"] = measure(mesh, *shape, value)
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
