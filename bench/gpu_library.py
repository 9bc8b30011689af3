"""The C library through ctypes, on PyTorch's tensors and streams: for the scripts beside it."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

I64x4 = ctypes.c_int64 * 4
PROGRESS = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_double)
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPE_CODES = {"f32": 0, "f16": 1, "bf16": 2}
# Relative RMS error that the contract allows.
TOLERANCES = {"f32": 4e-6, "f16": 9e-4, "bf16": 7e-3}
KERNELS = ("sm90_prefill", "sm90_prefill_wide", "sm90_decode", "cuda_portable", "cuda_unfused")
CANCELLED = 5
USES_KEY_LENGTHS = 2
USES_VALUES_IN_KEYS = 16
QUERIES_PACKED = 1
KEYS_PACKED, KEYS_PAGED = 1, 2
E4M3 = 1
SCALES_TENSOR = 1
Row = dict[str, Any]


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
        *[("stride_" + name, I64x4) for name in ("d_out", "dq", "dk", "dv")],
        ("pass_", ctypes.c_int32),
        *[(name, ctypes.c_int64) for name in
          ("total_q", "total_k", "page_size", "pages", "page_entries", "stride_page_table")],
        *[(name, ctypes.c_int32) for name in
          ("query_layout", "key_layout", "quantised_k", "quantised_v", "scales_k", "scales_v")],
        ("stride_scales_k", I64x4), ("stride_scales_v", I64x4),
    ]


class Tensors(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t),
                *[(name, ctypes.c_void_p) for name in
                  ("q", "k", "v", "out", "mask", "sinks", "key_lengths", "key_starts",
                   "log_sum_exp", "workspace")],
                ("workspace_bytes", ctypes.c_size_t),
                *[(name, ctypes.c_void_p) for name in
                  ("d_out", "dq", "dk", "dv", "d_sinks", "query_offsets", "key_offsets",
                   "page_table", "page_offsets")],
                ("batch", ctypes.c_int64), ("total_q", ctypes.c_int64),
                ("scales_k", ctypes.c_void_p), ("scales_v", ctypes.c_void_p)]


class Limits(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("workspace_bytes", ctypes.c_uint64),
                ("policy", ctypes.c_int32), ("threads", ctypes.c_int32),
                ("fused_above", ctypes.c_int64), ("kernel", ctypes.c_char_p),
                ("precision", ctypes.c_int32), ("longest_step_us", ctypes.c_double),
                ("batch_invariant", ctypes.c_int32), ("fresh_keys", ctypes.c_int64)]


class RunOptions(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("stream", ctypes.c_void_p),
                ("executor", ctypes.c_void_p), ("progress", PROGRESS),
                ("progress_context", ctypes.c_void_p)]


def problem(name: str, heads: tuple[int, int], dim: int | tuple[int, int], len_q: int, len_k: int,
            causal: bool = False, batch: int = 1, dtype: str = "bf16",
            values_in_keys: bool = False) -> Row:
    heads_q, heads_kv = heads
    dim_qk, dim_v = dim if isinstance(dim, tuple) else (dim, dim)
    return dict(name=name, batch=batch, heads_q=heads_q, heads_kv=heads_kv, len_q=len_q,
                len_k=len_k, dim_qk=dim_qk, dim_v=dim_v, causal=causal, dtype=dtype,
                values_in_keys=values_in_keys)


def shapes(row: Row) -> tuple[tuple[int, ...], ...]:
    """Of q, k, v and out."""
    def shape(heads: int, length: int, dim: int) -> tuple[int, ...]:
        return (row["batch"], heads, length, dim)
    return (shape(row["heads_q"], row["len_q"], row["dim_qk"]),
            shape(row["heads_kv"], row["len_k"], row["dim_qk"]),
            shape(row["heads_kv"], row["len_k"], row["dim_v"]),
            shape(row["heads_q"], row["len_q"], row["dim_v"]))


def random_tensors(row: Row) -> list[torch.Tensor]:
    q, k, v = (torch.randn(*shape, dtype=DTYPES[row["dtype"]], device="cuda")
               for shape in shapes(row)[:3])
    return [q, k, k[..., :row["dim_v"]] if row["values_in_keys"] else v]


def relative_rms(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have.float() - want.float()).norm() / want.float().norm())


class WideheadError(RuntimeError):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Run:
    """A planned call with its tensors; it runs on PyTorch's current stream."""

    library: "Widehead"
    plan: ctypes.c_void_p
    tensors: Tensors
    out: torch.Tensor
    keep: Any  # what the pointers point to

    @classmethod
    def at(cls, library: "Widehead", plan: ctypes.c_void_p, pointers: list[int],
           workspace_bytes: int, memory: torch.Tensor) -> "Run":
        """Of a plan whose q, k, v, out and workspace lie in `memory`."""
        q, k, v, out, workspace = pointers
        tensors = Tensors(size=ctypes.sizeof(Tensors), q=q, k=k, v=v, out=out, workspace=workspace,
                          workspace_bytes=workspace_bytes)
        return cls(library, plan, tensors, memory, memory)

    @property
    def kernel(self) -> str:
        return self.library.c.wh_plan_kernel(self.plan).decode()

    @property
    def workspace_bytes(self) -> int:
        return self.library.c.wh_plan_workspace_bytes(self.plan)

    def __call__(self, progress: Callable[[float], bool] | None = None) -> torch.Tensor:
        """`progress` hears the fraction done and cancels by answering True."""
        options = RunOptions(size=ctypes.sizeof(RunOptions),
                             stream=torch.cuda.current_stream().cuda_stream)
        if progress is not None:
            options.progress = PROGRESS(lambda _, fraction: int(bool(progress(fraction))))
        self.library.check(self.library.c.wh_plan_run(
            self.plan, ctypes.byref(self.tensors), ctypes.byref(options)))
        return self.out


class Widehead:
    def __init__(self, path: str) -> None:
        self.c = ctypes.CDLL(path)
        self.c.wh_last_error.restype = ctypes.c_char_p
        self.c.wh_plan_kernel.restype = ctypes.c_char_p
        self.c.wh_plan_workspace_bytes.restype = ctypes.c_uint64
        for name in ("wh_plan_kernel", "wh_plan_workspace_bytes"):
            getattr(self.c, name).argtypes = [ctypes.c_void_p]

    def check(self, status: int) -> None:
        if status != 0:
            raise WideheadError(status, self.c.wh_last_error().decode())

    def plan(self, row: Row, kernel: str | None = None, **limits: Any) -> ctypes.c_void_p:
        """`kernel` None: the planner's choice. `limits` are fields of wh_limits."""
        p, allowed = Problem(), Limits()
        self.check(self.c.wh_problem_init(ctypes.byref(p), ctypes.sizeof(p)))
        self.check(self.c.wh_limits_init(ctypes.byref(allowed), ctypes.sizeof(allowed)))
        allowed.kernel = kernel.encode() if kernel else None
        for name, value in limits.items():
            setattr(allowed, name, value)
        p.device = 1  # CUDA
        p.dtype_q = p.dtype_kv = DTYPE_CODES[row["dtype"]]
        for name in ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim_qk", "dim_v"):
            setattr(p, name, row[name])
        p.causal = 1 if row["causal"] else 0
        p.uses = USES_VALUES_IN_KEYS if row["values_in_keys"] else 0
        self.check(self.c.wh_problem_set_dense(ctypes.byref(p)))
        return self.create(p, allowed)

    def create(self, p: Problem, allowed: Limits) -> ctypes.c_void_p:
        plan = ctypes.c_void_p()
        self.check(self.c.wh_plan_create(ctypes.byref(p), ctypes.byref(allowed),
                                         ctypes.byref(plan)))
        return plan

    def run(self, row: Row, inputs: list[torch.Tensor], kernel: str | None = None,
            **limits: Any) -> Run:
        plan = self.plan(row, kernel, **limits)
        out = torch.empty(*shapes(row)[3], dtype=DTYPES[row["dtype"]], device="cuda")
        size = self.c.wh_plan_workspace_bytes(plan)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
        pointers = [tensor.data_ptr() for tensor in (*inputs, out, workspace)]
        run = Run.at(self, plan, pointers, size, out)
        run.keep = (inputs, out, workspace)
        return run
