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


class Limits(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("workspace_bytes", ctypes.c_uint64),
                ("policy", ctypes.c_int32), ("threads", ctypes.c_int32),
                ("fused_above", ctypes.c_int64), ("kernel", ctypes.c_char_p),
                ("precision", ctypes.c_int32), ("longest_step_us", ctypes.c_double),
                ("batch_invariant", ctypes.c_int32), ("fresh_keys", ctypes.c_int64)]


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

    def plan(self, row, kernel=None):
        problem, limits = Problem(), Limits()
        self.check(self.library.wh_problem_init(ctypes.byref(problem), ctypes.sizeof(problem)))
        self.check(self.library.wh_limits_init(ctypes.byref(limits), ctypes.sizeof(limits)))
        limits.kernel = kernel.encode() if kernel else None
        problem.device = 1  # CUDA
        problem.dtype_q = problem.dtype_kv = {"f32": 0, "bf16": 2}[row["dtype"]]
        for name in ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim_qk", "dim_v"):
            setattr(problem, name, row[name])
        problem.causal = 1 if row["causal"] else 0
        problem.uses = USES_VALUES_IN_KEYS if row["values_in_keys"] else 0
        self.check(self.library.wh_problem_set_dense(ctypes.byref(problem)))
        plan = ctypes.c_void_p()
        self.check(self.library.wh_plan_create(ctypes.byref(problem), ctypes.byref(limits),
                                               ctypes.byref(plan)))
        return plan

    def runner(self, row, q, k, v, kernel=None):
        """A function that runs on PyTorch's current stream; `kernel` None: the planner's choice."""
        plan = self.plan(row, kernel)
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


USES_VALUES_IN_KEYS = 16


def problem(name, heads, dim, len_q, len_k, causal=False, batch=1, dtype="bf16",
            values_in_keys=False):
    heads_q, heads_kv = heads
    dim_qk, dim_v = dim if isinstance(dim, tuple) else (dim, dim)
    return dict(name=name, batch=batch, heads_q=heads_q, heads_kv=heads_kv, len_q=len_q,
                len_k=len_k, dim_qk=dim_qk, dim_v=dim_v, causal=causal, dtype=dtype,
                values_in_keys=values_in_keys)


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
    problem("576/512 128/1, 65536 keys, V in K", (128, 1), (576, 512), 1, 65536,
            values_in_keys=True),
]
# What cards without wgmma run, and float32.
PORTABLE = [
    problem(f"{dtype} d{d} {b} x {h} heads, {n} {'causal' if c else 'full'}", (h, h), d, n, n, c, b, dtype)
    for dtype, d, b, h, n in (("bf16", 64, 2, 32, 4096), ("bf16", 128, 2, 16, 4096),
                              ("bf16", 256, 2, 16, 4096), ("bf16", 512, 1, 16, 4096),
                              ("f32", 64, 1, 16, 4096), ("f32", 128, 1, 16, 4096),
                              ("f32", 256, 1, 16, 4096))
    for c in (False, True)
] + [problem("bf16 d128 32/8, 1 x 32768", (32, 8), 128, 1, 32768),
     problem("f32 d128 32/8, 1 x 32768", (32, 8), 128, 1, 32768, dtype="f32")]
KERNELS = ("sm90_prefill", "sm90_prefill_wide", "sm90_decode", "cuda_portable", "cuda_unfused")
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def tensors(row):
    def make(heads, length, dim):
        return torch.randn(row["batch"], heads, length, dim, dtype=DTYPES[row["dtype"]], device="cuda")
    q = make(row["heads_q"], row["len_q"], row["dim_qk"])
    k = make(row["heads_kv"], row["len_k"], row["dim_qk"])
    if row["values_in_keys"]:
        return q, k, k[..., :row["dim_v"]]
    return q, k, make(row["heads_kv"], row["len_k"], row["dim_v"])


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


def time_alternating(candidates, calls, seconds=0.8):
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


def bench_row(widehead, row):
    is_decode = row["len_q"] == 1
    width = row["dim_qk"] + (0 if row["values_in_keys"] else row["dim_v"])
    kv_bytes = DTYPES[row["dtype"]].itemsize * row["batch"] * row["heads_kv"] * row["len_k"] * width
    sets = max(2, min(16, -(-200_000_000 // kv_bytes))) if is_decode else 1
    data = [tensors(row) for _ in range(sets)]
    refusals, candidates, kernel, workspace = {}, {}, "", 0
    makers = {"widehead": lambda d: widehead.runner(row, *d)}
    for name, backend in BACKENDS.items():
        makers["torch " + name] = lambda d, backend=backend: torch_runner(row, backend, *d)
    for forced in KERNELS:  # beside the planner's choice: what it should have chosen
        makers[forced] = lambda d, forced=forced: widehead.runner(row, *d, kernel=forced)
    for name, make in makers.items():
        if name == kernel:
            continue
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
    ours = {name: ms for name, ms in times.items() if not name.startswith("torch")}
    fastest = min(ours, key=ours.get)
    return dict(row, kernel=kernel, workspace_bytes=workspace, refused=refusals,
                fastest_kernel=kernel if fastest == "widehead" else fastest,
                regret=times["widehead"] / ours[fastest],
                results={name: dict(median_us=ms * 1e3, tflops=flops / ms * 1e-9,
                                    kv_gbytes_per_s=kv_bytes / ms * 1e-6)
                         for name, ms in times.items()})


def table(rows, unit, field, ours="widehead"):
    names = [ours, *("torch " + name for name in BACKENDS)]
    lines = [f"| {unit} | kernel | us | " + " | ".join(names) + " | regret |",
             "|---" * (4 + len(names)) + "|"]
    for row in rows:
        cells = []
        for name in names:
            result = row["results"].get(name)
            cells.append(f"{result[field]:.0f}" if result else "refused")
        us = row["results"]["widehead"]["median_us"]
        lines.append(f"| {row['name']} | {row['kernel']} | {us:.1f} | " + " | ".join(cells) +
                     f" | {row['regret']:.2f} |")
    return "\n".join(lines)


def main():
    library, json_path, markdown_path = sys.argv[1:]
    widehead = Widehead(library)
    torch.manual_seed(0)
    groups = {}
    for group, rows in (("prefill", PREFILL), ("decode", DECODE), ("portable", PORTABLE)):
        groups[group] = []
        for row in rows:
            print(row["name"], file=sys.stderr, flush=True)
            groups[group].append(bench_row(widehead, row))
            torch.cuda.empty_cache()
    name, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    with open(json_path, "w") as file:
        json.dump(dict(device=name, date=date, torch=torch.__version__, **groups), file, indent=1)
    with open(markdown_path, "w") as file:
        file.write(f"# {name}, {date}\n\nbf16, medians, one run, alternating; PyTorch "
                   f"{torch.__version__}. TFLOP/s on visible pairs, GB/s of K and V from memory.\n\n"
                   + table(groups["prefill"], "prefill, TFLOP/s", "tflops") + "\n\n"
                   + table(groups["decode"], "decode, GB/s", "kv_gbytes_per_s") + "\n\n"
                   + table(groups["portable"], "cuda_portable, TFLOP/s", "tflops", "cuda_portable")
                   + "\n\nRegret: time of the planner's choice over that of the fastest kernel "
                     "here. In float32 PyTorch may use TF32 only where told to; it is not.\n")


if __name__ == "__main__":
    main()
