"""Other attention libraries on a GPU, where they are installed: each as a call on PyTorch's tensors,
dense ones or pages."""

import functools
import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
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
    """With a causal mask that cuDNN aligns itself: by the first row where that is the same, which is
    what its fastest kernels are chosen by."""
    import cudnn
    q, _, v = inputs
    graph = CudnnGraph(q.dtype)
    out = torch.empty(*q.shape[:-1], v.shape[-1], device="cuda", dtype=q.dtype)
    options: dict[str, Any] = {}
    if row["causal"]:
        aligned = cudnn.diagonal_alignment
        options = dict(diagonal_alignment=(aligned.TOP_LEFT if row["len_q"] == row["len_k"] else
                                           aligned.BOTTOM_RIGHT), diagonal_band_right_bound=0)
    return graph.attention(dict(zip("qkv", inputs)), out, **options)


class CudnnGraph:
    """An attention of cuDNN's frontend, dense or paged."""

    def __init__(self, dtype: torch.dtype) -> None:
        import cudnn
        self.handle = cudnn.create_handle()
        types = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        self.graph = cudnn.pygraph(io_data_type=types[dtype],
                                   intermediate_data_type=cudnn.data_type.FLOAT,
                                   compute_data_type=cudnn.data_type.FLOAT, handle=self.handle)

    def attention(self, inputs: dict[str, torch.Tensor], out: torch.Tensor, **options: Any) -> Call:
        """`inputs` by the names that the frontend has for them."""
        tensors = {name: self.graph.tensor_like(tensor) for name, tensor in inputs.items()}
        answer, _ = self.graph.sdpa(name="sdpa", generate_stats=False,
                                    attn_scale=inputs["q"].shape[-1] ** -0.5, **tensors, **options)
        answer.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
        pack = {tensors[name]: tensor for name, tensor in inputs.items()}
        pack[answer] = out
        return self.fastest(pack, out)

    def fastest(self, pack: dict[Any, torch.Tensor], out: torch.Tensor) -> Call:
        """Of the first four plans that there are."""
        import cudnn
        graph, handle = self.graph, self.handle
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


@dataclass
class Paged:
    """The last queries of each sequence, causal, over its keys in pages, whose pool holds numbers
    everywhere: rivals read what no sequence lists."""

    q: torch.Tensor  # [total_q, heads_q, dim]
    k: torch.Tensor  # [pages, page_size, heads_kv, dim], of q's type or codes of e4m3; v too
    v: torch.Tensor
    table: torch.Tensor  # int32 [batch, most pages], on the host; 0 past a sequence's pages
    queries: list[int]
    lengths: list[int]
    scale_k: float = 1.0  # what codes are multiplied by
    scale_v: float = 1.0

    @property
    def is_decode(self) -> bool:
        return set(self.queries) == {1}

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def pages_of_each(self) -> list[int]:
        return [-(-length // self.page_size) for length in self.lengths]

    def lengths_on_gpu(self) -> torch.Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device="cuda")


def require_decode(paged: Paged) -> None:
    if not paged.is_decode:
        raise ValueError("asked for one query of each sequence alone")


def cudnn_paged(paged: Paged) -> Call:
    """Its tensors are [batch, heads, length, dim] and pools [pages, heads, page_size, dim], by any
    strides. It takes codes under queries of codes alone, which is another computation."""
    require_decode(paged)
    if paged.k.dtype != paged.q.dtype:
        raise ValueError(f"no {paged.k.dtype} keys under {paged.q.dtype} queries")
    batch = len(paged.lengths)
    q = paged.q.unsqueeze(1).transpose(1, 2)
    out = torch.empty_like(paged.q)
    table = paged.table.cuda()[:, None, :, None].contiguous()
    inputs = dict(q=q, k=paged.k.transpose(1, 2), v=paged.v.transpose(1, 2),
                  seq_len_q=torch.ones(batch, 1, 1, 1, dtype=torch.int32, device="cuda"),
                  seq_len_kv=paged.lengths_on_gpu().view(batch, 1, 1, 1),
                  paged_attention_k_table=table, paged_attention_v_table=table.clone())
    run = CudnnGraph(q.dtype).attention(
        inputs, out.unsqueeze(1).transpose(1, 2), use_padding_mask=True,
        paged_attention_max_seq_len_kv=paged.table.shape[1] * paged.page_size)

    def answer() -> torch.Tensor:
        run()
        return out
    return answer


@functools.cache
def flashinfer_workspace(kernel: str) -> torch.Tensor:
    """Of all calls of a kernel, which follow each other. XQA wants to find the zeros that it leaves."""
    return torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32,
                        device="cuda")


def flashinfer_paged(paged: Paged) -> Call:
    """Its wrapper of decode, on tensor cores, which its documentation advises for grouped queries,
    or that of prefill, with the kernel that it chooses itself. Over codes a kernel of PyTorch's
    multiplies the answer by their scale, which is part of the call."""
    counts = paged.pages_of_each
    listed = torch.cat([row[:count] for row, count in zip(paged.table, counts, strict=True)])
    last = [length - (count - 1) * paged.page_size
            for length, count in zip(paged.lengths, counts, strict=True)]
    keys = (starts(counts), listed.cuda(), torch.tensor(last, dtype=torch.int32, device="cuda"))
    heads_q, dim = paged.q.shape[1:]
    sizes = (heads_q, paged.k.shape[2], dim, paged.page_size)
    types = dict(q_data_type=paged.q.dtype, kv_data_type=paged.k.dtype)
    wrapper: Any
    if paged.is_decode:
        from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
        wrapper = BatchDecodeWithPagedKVCacheWrapper(flashinfer_workspace("paged"), "NHD",
                                                     use_tensor_cores=True)
        wrapper.plan(*keys, *sizes, **types)
    else:
        from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
        wrapper = BatchPrefillWithPagedKVCacheWrapper(flashinfer_workspace("paged"), "NHD")
        wrapper.plan(starts(paged.queries), *keys, *sizes, causal=True, **types)
    out = torch.empty_like(paged.q)
    return lambda: wrapper.run(paged.q, (paged.k, paged.v), k_scale=paged.scale_k,
                               v_scale=paged.scale_v, out=out)


def flashinfer_xqa(paged: Paged) -> Call:
    """TensorRT-LLM's kernel of generation, which FlashInfer has for Hopper too. Over codes it
    rounds queries and weights to e4m3 up to 256, which is another computation."""
    require_decode(paged)
    from flashinfer.decode import xqa_batch_decode_with_kv_cache
    table, lengths = paged.table.cuda(), paged.lengths_on_gpu().view(torch.uint32)
    out = torch.empty_like(paged.q)
    return lambda: xqa_batch_decode_with_kv_cache(
        paged.q, (paged.k, paged.v), flashinfer_workspace("xqa"), table, lengths,
        paged.table.shape[1] * paged.page_size,
        bmm1_scale=paged.q.shape[-1] ** -0.5 * paged.scale_k, bmm2_scale=paged.scale_v, out=out)


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


# By name: the module that it is of, and what makes a call.
MODULES = {"flash-attention-3": ("flash_attn_interface", flash_attention_3),
           "flash-attention-4": ("flash_attn.cute", flash_attention_4),
           "cudnn-frontend": ("cudnn", cudnn_frontend), "ffpa": ("ffpa_attn", ffpa)}
PAGED_MODULES = {"cudnn-frontend": ("cudnn", cudnn_paged),
                 "flashinfer": ("flashinfer", flashinfer_paged),
                 "flashinfer xqa": ("flashinfer", flashinfer_xqa)}


def installed(modules: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    return {name: make for name, (module, make) in modules.items() if is_installed(module)}


RIVALS: dict[str, Callable[[Row, list[torch.Tensor]], Call]] = installed(MODULES)
PAGED_RIVALS: dict[str, Callable[[Paged], Call]] = installed(PAGED_MODULES)


def versions(modules: dict[str, tuple[str, Any]]) -> dict[str, str | None]:
    """Of every rival; None where it is not installed."""
    packages = importlib.metadata.packages_distributions()

    def version(module: str) -> str:
        # Several packages may share a folder: its first part is then the name of one of them.
        owners = packages.get(module.split(".")[0], [])
        return ", ".join(f"{importlib.metadata.version(owner)}" for owner in sorted(set(owners)))
    return {name: (version(module) or "of unknown version") if is_installed(module) else None
            for name, (module, _) in modules.items()}


def rivals_text(rivals: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" if version else f"{name} not installed"
                     for name, version in rivals.items())
