"""What a call from Python costs beyond the call in C, on a problem of next to no work.

    python bench/python_overhead.py [--library build]

One query on one key of 8 numbers, with a plan in the cache, by the arrays of every library that is
installed. The C call is the same wh_attention in a program of its own, compiled on the spot against
the library of a build folder. The best of many blocks of calls, taken in turns: what other work on
the machine adds is not the call's. The goal is less than 5 microseconds.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import widehead

ROOT = Path(__file__).parent.parent
BLOCKS, CALLS = 600, 100
GOAL_US = 5.0

C_PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <widehead/widehead.h>

int main(int count, char** arguments) {
  float q[8] = {0}, k[8] = {0}, v[8] = {0}, out[8];
  wh_problem problem;
  wh_tensors tensors;
  double best_us = 1e9;
  wh_problem_init(&problem, sizeof(problem));
  problem.dtype_q = problem.dtype_kv = atoi(arguments[1]);
  problem.heads_q = problem.heads_kv = problem.len_q = problem.len_k = 1;
  problem.dim_qk = problem.dim_v = 8;
  wh_problem_set_dense(&problem);
  wh_tensors_init(&tensors, sizeof(tensors));
  tensors.q = q, tensors.k = k, tensors.v = v, tensors.out = out;
  for (int block = 0; block < BLOCKS; ++block) {
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int call = 0; call < CALLS; ++call) {
      if (wh_attention(&problem, NULL, &tensors, NULL) != WH_OK) return count;
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double ns = (end.tv_sec - begin.tv_sec) * 1e9 + end.tv_nsec - begin.tv_nsec;
    const double us = ns / 1e3 / CALLS;
    if (us < best_us) best_us = us;
  }
  printf("%f\n", best_us);
  return 0;
}
"""


def c_call_us(library: Path) -> dict[str, float]:
    """By type; empty without a build."""
    if not (library / "libwidehead.so").exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "call.c", Path(folder) / "call"
        source.write_text(C_PROGRAM)
        subprocess.run(
            ["cc", "-O2", f"-DBLOCKS={BLOCKS}", f"-DCALLS={CALLS}", f"-I{ROOT / 'include'}", source,
             f"-L{library}", f"-Wl,-rpath,{library.resolve()}", "-lwidehead", "-o", program],
            check=True,
        )  # fmt: skip
        return {
            dtype: float(subprocess.check_output([program, str(number)]))
            for dtype, number in (("float32", 0), ("bfloat16", 2))
        }


def numpy_arrays(dtype: str):
    if dtype == "bfloat16":
        dtype = importlib.import_module("ml_dtypes").bfloat16
    return [np.zeros((1, 1, 1, 8), dtype) for _ in range(3)]


def torch_arrays(dtype: str):
    torch = importlib.import_module("torch")
    return [torch.zeros((1, 1, 1, 8), dtype=getattr(torch, dtype)) for _ in range(3)]


def jax_arrays(dtype: str):
    jnp = importlib.import_module("jax.numpy")
    return [jnp.zeros((1, 1, 1, 8), dtype) for _ in range(3)]


def mlx_arrays(dtype: str):
    mx = importlib.import_module("mlx.core")
    arrays = [mx.zeros((1, 1, 1, 8), getattr(mx, dtype)) for _ in range(3)]
    mx.eval(*arrays)
    return arrays


LIBRARIES = {"NumPy": numpy_arrays, "PyTorch": torch_arrays, "JAX": jax_arrays, "MLX": mlx_arrays}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=ROOT / "build", help="holds libwidehead.so")
    in_c = c_call_us(parser.parse_args().library)
    calls = {}
    for name, make in LIBRARIES.items():
        for dtype in ("float32", "bfloat16"):
            try:
                calls[name, dtype] = make(dtype)
            except ImportError as error:
                print(f"{name} {dtype} is left out: {error}")
    best = dict.fromkeys(calls, float("inf"))
    sdpa = widehead.sdpa
    for _ in range(BLOCKS):
        for key, (q, k, v) in calls.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                sdpa(q, k, v)
            best[key] = min(best[key], (time.perf_counter() - begin) / CALLS * 1e6)
    if not in_c:
        print("no libwidehead.so in --library: the C call is not known, nor what is beyond it")
    print("| arrays | type | call, us | C call, us | beyond, us |\n|---|---|---|---|---|")
    for (name, dtype), us in best.items():
        if dtype in in_c:
            beyond = us - in_c[dtype]
            mark = "" if beyond < GOAL_US else f" (goal: {GOAL_US:.0f})"
            print(f"| {name} | {dtype} | {us:.2f} | {in_c[dtype]:.2f} | {beyond:.2f}{mark} |")
        else:
            print(f"| {name} | {dtype} | {us:.2f} | - | - |")


if __name__ == "__main__":
    main()
