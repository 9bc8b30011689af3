"""PyTorch's context_parallel on the problems of tools/gpus_check that it takes.

    torchrun --nproc-per-node 4 bench/gpus_peers.py OUT.json

Each rank holds its part of q, k and v, as its load balancing cuts them. What it refuses is written
with its words."""

import json
import sys
import time

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


def best_ms(call, runs=4):
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        slowest = torch.tensor(time.perf_counter() - begin, device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(float(slowest) * 1e3)
    return min(times[1:])


def measure(mesh, heads_q, heads_kv, dim, tokens, backend):
    def tensor(heads):
        return torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = tensor(heads_q), tensor(heads_kv), tensor(heads_kv)
    with (torch.inference_mode(), sdpa_kernel(backend),
          context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2])):
        return best_ms(lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True))


def main():
    dist.init_process_group("nccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (ranks,))
    rows = []
    for name, *shape in PROBLEMS:
        for backend, value in BACKENDS.items():
            row = {"name": name, "ranks": ranks, "library": f"torch {torch.__version__}",
                   "backend": backend}
            try:
                row["ms"] = measure(mesh, *shape, value)
            except Exception as error:  # one rank's refusal is every rank's
                row["refused"] = str(error).splitlines()[0][:200]
            rows.append(row)
            torch.cuda.empty_cache()
    if rank == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
