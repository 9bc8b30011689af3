"""Times Widehead beside PyTorch's scaled_dot_product_attention on a GPU, alternating, in one run.

    python3 bench/gpu.py LIBRARY RESULT.json RESULT.md

Prefill: CUDA events, the median of several calls. Decode: replays of a CUDA graph over several sets of
K and V, so that they come from memory and not from L2. TFLOP/s count visible pairs only. A rival
that refuses is written down with its reason.
"""

import ctypes
import datetime
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

I64x4 = ctypes.c_int64 * 4


class Problem(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        *[(name, ctypes.c_int32) for name in ("device", "device_index", "dtype_q", "dtype_kv")],
        *[(name, ctypes.c_int64) for name in
          ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim_qk", "dim_v")],
        *[("stride_" + name, I64x4) for name in ("q", "k", "v", "out", "mask")],
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
        ("causal", ctypes.c_int32), ("mask", ctypes.c_int32),
        ("window_left", ctypes.c_int64), ("window_right", ctypes.c_int64),
        ("uses", ctypes.c_uint32),
    ]


class Tensors(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t),
                *[(name, ctypes.c_void_p) for name in
                  ("q", "k", "v", "out", "mask", "sinks", "key_lengths", "key_starts",
                   "log_sum_exp", "workspace")],
                ("workspace_bytes", ctypes.c_size_t)]


class RunOptions(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t),
                *[(name, ctypes.c_void_p) for name in
                  ("stream", "executor", "progress", "progress_context")]]


class Widehead:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.wh_last_error.restype = ctypes.c_char_p
        self.library.wh_plan_kernel.restype = ctypes.c_char_p
        self.library.wh_plan_workspace_bytes.restype = ctypes.c_uint64
        for name in ("wh_plan_kernel", "wh_plan_workspace_bytes"):
            getattr(self.library, name).argtypes = [ctypes.c_void_p]

    def check(self, status):
        if status != 0:
            raise RuntimeError(self.library.wh_last_error().decode())

    def plan(self, row):
        problem = Problem()
        self.check(self.library.wh_problem_init(ctypes.byref(problem), ctypes.sizeof(problem)))
        problem.device, problem.dtype_q, problem.dtype_kv = 1, 2, 2  # CUDA, bf16
        for name in ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim_qk", "dim_v"):
            setattr(problem, name, row[name])
        problem.causal = 1 if row["causal"] else 0
        self.check(self.library.wh_problem_set_dense(ctypes.byref(problem)))
        plan = ctypes.c_void_p()
        self.check(self.library.wh_plan_create(ctypes.byref(problem), None, ctypes.byref(plan)))
        return plan

    def runner(self, row, q, k, v):
        """A function that runs on PyTorch's current stream, and its output."""
        plan = self.plan(row)
        out = torch.empty(*q.shape[:3], row["dim_v"], dtype=q.dtype, device="cuda")
        size = self.library.wh_plan_workspace_bytes(plan)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
        tensors = Tensors(size=ctypes.sizeof(Tensors), q=q.data_ptr(), k=k.data_ptr(),
                          v=v.data_ptr(), out=out.data_ptr(), workspace=workspace.data_ptr(),
                          workspace_bytes=size)

        def run():
            options = RunOptions(size=ctypes.sizeof(RunOptions),
                                 stream=torch.cuda.current_stream().cuda_stream)
            self.check(self.library.wh_plan_run(plan, ctypes.byref(tensors),
                                                ctypes.byref(options)))
            return out

        run.keep = (plan, workspace)
        run.kernel = self.library.wh_plan_kernel(plan).decode()
        run.workspace_bytes = size
        return run


def problem(name, heads, dim, len_q, len_k, causal=False, batch=1):
    heads_q, heads_kv = heads
    dim_qk, dim_v = dim if isinstance(dim, tuple) else (dim, dim)
    return dict(name=name, batch=batch, heads_q=heads_q, heads_kv=heads_kv, len_q=len_q,
                len_k=len_k, dim_qk=dim_qk, dim_v=dim_v, causal=causal)


PREFILL = [
    problem("chunk d256 64/2, 2048 x 32768", (64, 2), 256, 2048, 32768, True),
    *[problem(f"d{d[0] if isinstance(d, tuple) else d}{'/%d' % d[1] if isinstance(d, tuple) else ''} "
              f"{b} x {h} heads, 8192 {'causal' if c else 'full'}", (h, h), d, 8192, 8192, c, b)
      for d, b, h in ((256, 2, 16), (192, 2, 16), ((192, 128), 2, 16), (128, 2, 16), (64, 2, 32))
      for c in (False, True)],
    problem("d512 32/4, 4096 causal", (32, 4), 512, 4096, 4096, True),
    problem("d512 32/32, 8192 full", (32, 32), 512, 8192, 8192),
    problem("576/512 128/1, 2048 x 4096 causal", (128, 1), (576, 512), 2048, 4096, True),
    problem("d256 8/2, 512 causal", (8, 2), 256, 512, 512, True),
]
DECODE = [
    *[problem(f"d256 64/2, {n} keys", (64, 2), 256, 1, n) for n in (1024, 4096, 16384, 65536, 262144)],
    problem("d128 32/8, 65536 keys", (32, 8), 128, 1, 65536),
    problem("d128 32/8, 16 x 8192 keys", (32, 8), 128, 1, 8192, batch=16),
    problem("d512 32/4, 65536 keys", (32, 4), 512, 1, 65536),
    problem("576/512 128/1, 65536 keys", (128, 1), (576, 512), 1, 65536),
]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


def tensors(row):
    def make(heads, length, dim):
        return torch.randn(row["batch"], heads, length, dim, dtype=torch.bfloat16, device="cuda")
    return (make(row["heads_q"], row["len_q"], row["dim_qk"]),
            make(row["heads_kv"], row["len_k"], row["dim_qk"]),
            make(row["heads_kv"], row["len_k"], row["dim_v"]))


def torch_runner(row, backend, q, k, v):
    is_square = row["len_q"] == row["len_k"]
    bias = causal_lower_right(row["len_q"], row["len_k"]) if row["causal"] and not is_square else None

    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=row["causal"] and is_square,
                enable_gqa=row["heads_q"] != row["heads_kv"])
    return run


def event_ms(run):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def graph_of(runs):
    """Each of `runs` once, captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        runs[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for run in runs:
                run()
    return graph


def time_alternating(candidates, calls, seconds=1.0):
    """Median milliseconds of each of `candidates`, which run `calls` calls at once."""
    times = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    torch.cuda.synchronize()
    first = sum(event_ms(run) for run in candidates.values())
    for _ in range(max(5, min(30, int(seconds * 1e3 / max(first, 1e-3))))):
        for name, run in candidates.items():
            times[name].append(event_ms(run) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def first_line(error):
    return str(error).strip().split("\n")[0][:120]


def bench_row(widehead, row, is_decode):
    kv_bytes = 2 * row["batch"] * row["heads_kv"] * row["len_k"] * (row["dim_qk"] + row["dim_v"])
    sets = max(2, min(16, -(-200_000_000 // kv_bytes))) if is_decode else 1
    data = [tensors(row) for _ in range(sets)]
    refusals, candidates, kernel, workspace = {}, {}, "", 0
    makers = {"widehead": lambda d: widehead.runner(row, *d)}
    for name, backend in BACKENDS.items():
        makers["torch " + name] = lambda d, backend=backend: torch_runner(row, backend, *d)
    for name, make in makers.items():
        try:
            runs = [make(d) for d in data]
            runs[0]()
            torch.cuda.synchronize()
            if name == "widehead":
                kernel, workspace = runs[0].kernel, runs[0].workspace_bytes
            candidates[name] = graph_of(runs).replay if is_decode else runs[0]
            if is_decode:
                candidates[name].__self__.keep = runs
        except Exception as error:  # a rival's refusal is a result
            refusals[name] = first_line(error)
    times = time_alternating(candidates, sets)
    pairs = row["len_q"] * row["len_k"]
    if row["causal"]:
        pairs = row["len_q"] * (row["len_q"] + 1) // 2 + row["len_q"] * (row["len_k"] - row["len_q"])
    flops = 2 * row["batch"] * row["heads_q"] * pairs * (row["dim_qk"] + row["dim_v"])
    return dict(row, kernel=kernel, workspace_bytes=workspace, refused=refusals,
                results={name: dict(median_us=ms * 1e3, tflops=flops / ms * 1e-9,
                                    kv_gbytes_per_s=kv_bytes / ms * 1e-6)
                         for name, ms in times.items()})


def table(rows, unit, field):
    names = ["widehead", *("torch " + name for name in BACKENDS)]
    lines = [f"| {unit} | kernel | us | " + " | ".join(names) + " |",
             "|---" * (3 + len(names)) + "|"]
    for row in rows:
        cells = []
        for name in names:
            result = row["results"].get(name)
            cells.append(f"{result[field]:.0f}" if result else "refused")
        us = row["results"].get("widehead", {}).get("median_us", float("nan"))
        lines.append(f"| {row['name']} | {row['kernel']} | {us:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    library, json_path, markdown_path = sys.argv[1:]
    widehead = Widehead(library)
    torch.manual_seed(0)
    groups = {}
    for group, rows in (("prefill", PREFILL), ("decode", DECODE)):
        groups[group] = []
        for row in rows:
            print(row["name"], file=sys.stderr, flush=True)
            groups[group].append(bench_row(widehead, row, group == "decode"))
            torch.cuda.empty_cache()
    name, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    with open(json_path, "w") as file:
        json.dump(dict(device=name, date=date, torch=torch.__version__, **groups), file, indent=1)
    with open(markdown_path, "w") as file:
        file.write(f"# {name}, {date}\n\nbf16, medians, one run, alternating; PyTorch "
                   f"{torch.__version__}. TFLOP/s on visible pairs, GB/s of K and V from memory.\n\n"
                   + table(groups["prefill"], "prefill, TFLOP/s", "tflops") + "\n\n"
                   + table(groups["decode"], "decode, GB/s", "kv_gbytes_per_s") + "\n")


if __name__ == "__main__":
    main()
