"""Other attention libraries on a GPU, where they are installed: each as a call on PyTorch's tensors."""

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_library import Row

Call = Callable[[], Any]


def flash_attention_3(row: Row, inputs: list[torch.Tensor]) -> Call:
    from flash_attn_interface import flash_attn_func
    return flash_call(flash_attn_func, row, inputs)


def flash_attention_4(row: Row, inputs: list[torch.Tensor]) -> Call:
    from flash_attn.cute import flash_attn_func
    return flash_call(flash_attn_func, row, inputs)


def flash_call(function: Callable[..., Any], row: Row, inputs: list[torch.Tensor]) -> Call:
    """Their layout is [batch, length, heads, dim]."""
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in inputs)

    def run() -> torch.Tensor:
        out = function(q, k, v, causal=row["causal"])
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
    return run


def cudnn_frontend(row: Row, inputs: list[torch.Tensor]) -> Call:
    """The fastest of the first four plans, with a causal mask that cuDNN aligns itself: by the first
    row where that is the same, which is what its fastest kernels are chosen by."""
    import cudnn
    q, k, v = inputs
    out = torch.empty(*q.shape[:-1], v.shape[-1], device="cuda", dtype=q.dtype)
    handle = cudnn.create_handle()
    types = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
    graph = cudnn.pygraph(io_data_type=types[q.dtype],
                          intermediate_data_type=cudnn.data_type.FLOAT,
                          compute_data_type=cudnn.data_type.FLOAT, handle=handle)
    pack = {graph.tensor_like(tensor): tensor for tensor in inputs}
    options: dict[str, Any] = {}
    if row["causal"]:
        aligned = cudnn.diagonal_alignment
        options = dict(diagonal_alignment=(aligned.TOP_LEFT if row["len_q"] == row["len_k"] else
                                           aligned.BOTTOM_RIGHT), diagonal_band_right_bound=0)
    answer, _ = graph.sdpa(name="sdpa", **dict(zip("qkv", pack)), generate_stats=False,
                           attn_scale=row["dim_qk"] ** -0.5, **options)
    answer.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    pack[answer] = out
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()

    def plan(index: int) -> Call:
        graph.build_plan_at_index(index)
        size = max(1, graph.get_workspace_size_plan_at_index(index))
        workspace = torch.empty(size, device="cuda", dtype=torch.uint8)

        def run() -> torch.Tensor:
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            graph.execute_plan_at_index(pack, workspace, index, handle=handle)
            return out
        return run

    best: tuple[float, Call] | None = None
    last = RuntimeError("cuDNN has no plan for this")
    for index in range(min(graph.get_execution_plan_count(), 4)):
        try:
            run = plan(index)
            run()
            ms = statistics.median(event_ms(run) for _ in range(3))
        except Exception as error:  # the next plan may run
            last = RuntimeError(str(error))
            continue
        if best is None or ms < best[0]:
            best = (ms, run)
    if best is None:
        raise last
    return best[1]


def ffpa(row: Row, inputs: list[torch.Tensor]) -> Call:
    from ffpa_attn import ffpa_attn_func
    return lambda: ffpa_attn_func(*inputs, is_causal=row["causal"],
                                  enable_gqa=row["heads_q"] != row["heads_kv"])


def event_ms(run: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent is missing
        return False


MODULES = {"flash-attention-3": ("flash_attn_interface", flash_attention_3),
           "flash-attention-4": ("flash_attn.cute", flash_attention_4),
           "cudnn-frontend": ("cudnn", cudnn_frontend), "ffpa": ("ffpa_attn", ffpa)}
RIVALS: dict[str, Callable[[Row, list[torch.Tensor]], Call]] = {
    name: make for name, (module, make) in MODULES.items() if is_installed(module)}


def installed_rivals() -> dict[str, str | None]:
    """Every rival with its version; None where it is not installed."""
    packages = importlib.metadata.packages_distributions()

    def version(module: str) -> str:
        # Several packages may share a folder: its first part is then the name of one of them.
        owners = packages.get(module.split(".")[0], [])
        return ", ".join(f"{importlib.metadata.version(owner)}" for owner in sorted(set(owners)))
    return {name: (version(module) or "of unknown version") if name in RIVALS else None
            for name, (module, _) in MODULES.items()}
