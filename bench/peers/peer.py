"""Times one problem in one library: a JSON object on stdin, one on stdout.

    echo '{"library": "torch f32", "seconds": 3, "problem": {...}}' | python peer.py

A problem has batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v, threads and a list of features: "causal" (bottom-right), "window",
"softcap", "mask", "sinks", "key-lengths", "kv-dtype", as the suites name them. What a library cannot do, or is not installed, comes back
as {"refused": reason}; nothing is left out without a word.
"""

import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np


def preemptions():
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure(run, seconds):
    """Of calls in which the process was not preempted, more than once in 20 ms; of all, if there are none."""
    run()
    run()
    kept, disturbed = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(kept) + len(disturbed) < 3:
        before, begin = preemptions(), time.perf_counter()
        run()
        us = (time.perf_counter() - begin) * 1e6
        (kept if preemptions() - before <= us // 20e3 else disturbed).append(us)
    us = sorted(kept or disturbed)
    return {"best_us": us[0], "median_us": us[len(us) // 2], "samples": len(us), "dropped": len(disturbed),
            "guarded": bool(kept)}


def blas_libraries():
    """The BLAS that is loaded into this process, and the CPU that OpenBLAS took its kernels for."""
    names = set()
    try:
        import threadpoolctl

        for pool in threadpoolctl.threadpool_info():
            if pool["user_api"] == "blas":
                names.add(f"{pool['internal_api']} {pool['version']}, {pool.get('architecture', 'core unknown')}, "
                          f"{Path(pool['filepath']).name}")
    except ImportError:
        names.add("threadpoolctl is not installed: OpenBLAS's core is unknown")
    # What threadpoolctl does not know: the reference BLAS, BLIS, Accelerate.
    known = " ".join(names)
    for line in Path("/proc/self/maps").read_text().splitlines():
        file = Path(line.split()[-1]).name
        is_blas = any(word in file.lower() for word in ("blas", "mkl", "blis", "lapack"))
        if is_blas and "cublas" not in file and file not in known:
            names.add(file)
    return names


def arrays(p):
    random = np.random.default_rng(1)

    def make(heads, length, dim):
        return random.standard_normal((p["batch"], heads, length, dim), dtype=np.float32)

    return (make(p["heads_q"], p["len_q"], p["dim_qk"]), make(p["heads_kv"], p["len_k"], p["dim_qk"]),
            make(p["heads_kv"], p["len_k"], p["dim_v"]))


def takes(p, *features):
    """Raises what the library cannot do of this problem."""
    lacks = [feature for feature in p["features"] if feature not in features]
    if lacks:
        raise ValueError(f"has no {', '.join(lacks)} here")


def is_causal(p):
    # One query at the end sees every key.
    return "causal" in p["features"] and p["len_q"] > 1


def torch_runner(p, dtype):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    takes(p, "causal", "window", "mask")

    torch.set_num_threads(p["threads"])
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays(p))
    diagonal = p["len_k"] - p["len_q"]
    needs_mask = "window" in p or "mask" in p or (is_causal(p) and diagonal != 0)
    mask = None
    if needs_mask:
        mask = torch.ones(p["len_q"], p["len_k"], dtype=torch.bool)
        if is_causal(p):
            mask = mask.tril(diagonal)
        if "window" in p:
            left, right = p["window"]
            mask = mask if left < 0 else mask.triu(diagonal - left)
            mask = mask if right < 0 else mask.tril(diagonal + right)
        if "mask" in p:
            mask &= torch.rand(p["len_q"], p["len_k"], generator=torch.Generator().manual_seed(1)) > 0.25
        if p.get("mask") == "additive":
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))

    def call():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal(p) and mask is None,
            enable_gqa=p["heads_q"] != p["heads_kv"])

    run = torch.inference_mode()(call)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            run()
        backend = "flash kernel"
    except RuntimeError:
        backend = "math kernel"
    blas_info = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return run, (f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
                 f"BLAS {blas_info.group(1) if blas_info else 'unknown'}"), backend


def onnx_session(p, nodes, inputs, outputs, opsets):
    import onnxruntime
    from onnx import TensorProto, helper

    def info(name, array):
        kind = TensorProto.INT32 if array.dtype == np.int32 else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, array.shape)

    graph = helper.make_graph(nodes, "attention", [info(n, a) for n, a in inputs.items()],
                              [helper.make_tensor_value_info(o, TensorProto.FLOAT, None)
                               for o in outputs])
    model = helper.make_model(graph, ir_version=10,
                              opset_imports=[helper.make_opsetid(*opset) for opset in opsets])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = p["threads"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    for name in outputs:
        binding.bind_output(name, "cpu")
    return (lambda: session.run_with_iobinding(binding), f"onnxruntime {onnxruntime.__version__}",
            f"{nodes[0].op_type} of the CPU provider, its own MLAS")


def onnx_attention_runner(p):
    from onnx import helper

    takes(p, "causal", "softcap")
    if is_causal(p) and p["len_q"] != p["len_k"]:
        raise ValueError("Attention aligns causal masks top-left")
    q, k, v = arrays(p)
    node = helper.make_node("Attention", ["q", "k", "v"], ["out"], is_causal=int(is_causal(p)),
                            softcap=float(p.get("softcap", 0)))
    return onnx_session(p, [node], {"q": q, "k": k, "v": v}, ["out"], [("", 23)])


def onnx_grouped_runner(p):
    from onnx import helper

    takes(p, "causal", "softcap", "window")
    if p["dim_qk"] != p["dim_v"]:
        raise ValueError("GroupQueryAttention takes one head dimension")
    if p["len_q"] > 1 and not is_causal(p):
        raise ValueError("GroupQueryAttention is causal")
    if is_causal(p) and p["len_q"] != p["len_k"]:
        raise ValueError("compared on squares and decode")
    left, right = p.get("window", (-1, 0))
    if right > 0:
        raise ValueError("GroupQueryAttention has windows to the left only")
    q, k, v = arrays(p)
    # It appends the new tokens' K and V to those of the past.
    past = p["len_k"] - p["len_q"]
    flat = {name: np.ascontiguousarray(x.swapaxes(1, 2).reshape(p["batch"], -1, x.shape[1] * x.shape[3]))
            for name, x in (("q", q), ("k", k[:, :, past:]), ("v", v[:, :, past:]))}
    inputs = flat | {"past_k": np.ascontiguousarray(k[:, :, :past]),
                     "past_v": np.ascontiguousarray(v[:, :, :past]),
                     "last": np.full(p["batch"], p["len_k"] - 1, np.int32),
                     "total": np.array(p["len_k"], np.int32).reshape(())}
    node = helper.make_node("GroupQueryAttention", list(inputs), ["out", "present_k", "present_v"],
                            domain="com.microsoft", num_heads=p["heads_q"],
                            kv_num_heads=p["heads_kv"], softcap=float(p.get("softcap", 0)),
                            local_window_size=left + 1 if left >= 0 else -1)
    return onnx_session(p, [node], inputs, ["out", "present_k", "present_v"],
                        [("", 21), ("com.microsoft", 1)])


def mlx_runner(p):
    import mlx.core as mx

    takes(p, "causal")
    mx.set_default_device(mx.cpu)
    q, k, v = (mx.array(x) for x in arrays(p))
    mask = "causal" if is_causal(p) else None

    def run():
        mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=p["dim_qk"] ** -0.5, mask=mask))

    return run, f"mlx {mx.__version__}", "fast.scaled_dot_product_attention on the CPU"


def onednn_runner(p, dtype):
    import onednn_graph

    takes(p, "causal")
    kind = {"f32": onednn_graph.F32, "bf16": onednn_graph.BF16}[dtype]
    q, k, v = (onednn_graph.stored(x, kind).reshape(p["batch"], p["heads_kv"], -1, *x.shape[2:]) for x in arrays(p))
    attention = onednn_graph.Attention(q, k, v, kind, is_causal(p))
    return attention.run, attention.version, "one partition of its graph, the causal mask an array"


def ggml_runner(p, kv_dtype):
    """Queries and the answer are f32 in ggml, the mask f16; a row's own type of K and V goes before the library's."""
    import ctypes

    import ggml

    takes(p, "causal", "softcap", "kv-dtype")
    kinds = {"f32": (ggml.GGML_TYPE_F32, np.float32), "f16": (ggml.GGML_TYPE_F16, np.float16),
             "q8_0": (ggml.GGML_TYPE_Q8_0, None), "q4_0": (ggml.GGML_TYPE_Q4_0, None)}
    kv_dtype = p.get("kv_dtype", kv_dtype)
    if kv_dtype not in kinds:
        raise ValueError(f"has no {kv_dtype}")
    of_kv, mask = kinds[kv_dtype], None
    q, k, v = arrays(p)
    if is_causal(p):
        visible = np.tri(p["len_q"], p["len_k"], p["len_k"] - p["len_q"], dtype=bool)
        mask = np.where(visible, 0, -np.inf)[None, None]
    context = ggml.ggml_init(ggml.ggml_init_params(
        mem_size=(1 << 24) + 8 * (q.size + k.size + v.size) + (0 if mask is None else 4 * mask.size), mem_buffer=None))

    def tensor(array, kind):
        made = ggml.ggml_new_tensor_4d(context, kind[0], *array.shape[::-1])
        if kind[1] is None:
            values = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            rows, columns = array.size // array.shape[-1], array.shape[-1]
            ggml.ggml_quantize_chunk(kind[0], values, ggml.ggml_get_data(made), 0, rows, columns, None)
            return made
        stored = array.astype(kind[1])
        ctypes.memmove(ggml.ggml_get_data(made), stored.ctypes.data, stored.nbytes)
        return made

    out = ggml.ggml_flash_attn_ext(context, tensor(q, kinds["f32"]), tensor(k, of_kv), tensor(v, of_kv),
                                   None if mask is None else tensor(mask, kinds["f16"]), p["dim_qk"] ** -0.5, 0.0,
                                   float(p.get("softcap", 0)))
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, out)
    options = ggml.ggml_threadpool_params_default(p["threads"])
    plan = ggml.ggml_graph_plan(graph, p["threads"], ggml.ggml_threadpool_new(ctypes.byref(options)))
    work = (ctypes.c_uint8 * max(1, plan.work_size))()
    plan.work_data = ctypes.cast(work, ctypes.POINTER(ctypes.c_uint8))

    def run():
        status = ggml.ggml_graph_compute(graph, ctypes.byref(plan))
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute answered {status}")

    return run, f"ggml {ggml.ggml_version().decode()}", "flash_attn_ext, compiled for this CPU"


RUNNERS = {
    "torch f32": lambda p: torch_runner(p, "float32"),
    "torch bf16": lambda p: torch_runner(p, "bfloat16"),
    "onnxruntime Attention f32": onnx_attention_runner,
    "onnxruntime GroupQueryAttention f32": onnx_grouped_runner,
    "mlx f32": mlx_runner,
    "onednn f32": lambda p: onednn_runner(p, "f32"),
    "onednn bf16": lambda p: onednn_runner(p, "bf16"),
    "ggml f32": lambda p: ggml_runner(p, "f32"),
    "ggml f16": lambda p: ggml_runner(p, "f16"),
}


def main():
    request = json.load(sys.stdin)
    of_numpy = blas_libraries()  # which only makes the arrays
    try:
        run, version, backend = RUNNERS[request["library"]](request["problem"])
        result = measure(run, request["seconds"])
    except Exception as error:  # what a rival refuses is a result
        print(json.dumps({"refused": f"{type(error).__name__}: {error}".split("\n")[0][:160]}))
        return
    print(json.dumps({"version": version, "backend": backend, "blas": sorted(blas_libraries() - of_numpy),
                      "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"), **result}))


if __name__ == "__main__":
    main()
