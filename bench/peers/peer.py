"""Times one problem in one library: a JSON object on stdin, one on stdout.

    echo '{"library": "torch", "seconds": 3, "problem": {...}}' | python peer.py

A problem has batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v, causal (bottom-right) and dtype. What a library cannot do, or
is not installed, comes back as {"refused": reason}.
"""

import json
import resource
import sys
import time

import numpy as np


def preemptions():
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure(run, seconds):
    """Sorted microseconds of calls in which the process was not preempted; all, if there are none."""
    run()
    run()
    kept, disturbed = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(kept) + len(disturbed) < 3:
        before, begin = preemptions(), time.perf_counter()
        run()
        (kept if preemptions() == before else disturbed).append((time.perf_counter() - begin) * 1e6)
    return sorted(kept or disturbed)


def arrays(p):
    random = np.random.default_rng(1)

    def make(heads, length, dim):
        return random.standard_normal((p["batch"], heads, length, dim), dtype=np.float32)

    return (make(p["heads_q"], p["len_q"], p["dim_qk"]), make(p["heads_kv"], p["len_k"], p["dim_qk"]),
            make(p["heads_kv"], p["len_k"], p["dim_v"]))


def torch_runner(p, dtype):
    import torch

    torch.set_num_threads(p["threads"])
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays(p))
    is_square = p["len_q"] == p["len_k"]
    mask = None
    if p["causal"] and not is_square and p["len_q"] > 1:
        mask = torch.ones(p["len_q"], p["len_k"], dtype=torch.bool).tril(p["len_k"] - p["len_q"])

    @torch.inference_mode()
    def run():
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=p["causal"] and is_square and p["len_q"] > 1,
            enable_gqa=p["heads_q"] != p["heads_kv"])

    return run, f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


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
    return lambda: session.run_with_iobinding(binding), f"onnxruntime {onnxruntime.__version__}"


def onnx_attention_runner(p):
    from onnx import helper

    if p["causal"] and p["len_q"] not in (1, p["len_k"]):
        raise ValueError("Attention aligns causal masks top-left")
    q, k, v = arrays(p)
    node = helper.make_node("Attention", ["q", "k", "v"], ["out"],
                            is_causal=int(p["causal"] and p["len_q"] > 1))
    return onnx_session(p, [node], {"q": q, "k": k, "v": v}, ["out"], [("", 23)])


def onnx_grouped_runner(p):
    from onnx import helper

    if p["dim_qk"] != p["dim_v"]:
        raise ValueError("GroupQueryAttention takes one head dimension")
    if not p["causal"] and p["len_q"] > 1:
        raise ValueError("GroupQueryAttention is causal")
    if p["causal"] and p["len_q"] != p["len_k"]:
        raise ValueError("compared on squares and decode")
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
                            kv_num_heads=p["heads_kv"])
    return onnx_session(p, [node], inputs, ["out", "present_k", "present_v"],
                        [("", 21), ("com.microsoft", 1)])


def mlx_runner(p):
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    q, k, v = (mx.array(x) for x in arrays(p))
    mask = "causal" if p["causal"] and p["len_q"] > 1 else None

    def run():
        mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=p["dim_qk"] ** -0.5, mask=mask))

    return run, f"mlx {mx.__version__}"


RUNNERS = {
    "torch f32": lambda p: torch_runner(p, "float32"),
    "torch bf16": lambda p: torch_runner(p, "bfloat16"),
    "onnxruntime Attention f32": onnx_attention_runner,
    "onnxruntime GroupQueryAttention f32": onnx_grouped_runner,
    "mlx f32": mlx_runner,
}


def main():
    request = json.load(sys.stdin)
    try:
        run, version = RUNNERS[request["library"]](request["problem"])
        samples = measure(run, request["seconds"])
    except Exception as error:  # what a rival refuses is a result
        print(json.dumps({"refused": f"{type(error).__name__}: {error}".split("\n")[0][:160]}))
        return
    print(json.dumps({"version": version, "best_us": samples[0],
                      "median_us": samples[len(samples) // 2], "samples": len(samples)}))


if __name__ == "__main__":
    main()
