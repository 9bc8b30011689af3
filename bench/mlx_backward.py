"""Times gradients by widehead.mlx beside those of MLX's own attention, in one run and in turns.

    python3 bench/mlx_backward.py [--heads 4/1] [--dim 256] [--length 2048] [--seconds 60]
    python3 bench/mlx_backward.py --model FOLDER [--length 2048]

mx.value_and_grad of a weighted sum of causal attention by q, k and v, in float32 and bfloat16; the
gradients of the two must agree. Or the same of the mean cross-entropy of a model of mlx-lm by its
layers, on random tokens: a step of fine-tuning, in float32. Memory is MLX's peak beyond what was there before, and what
the backward pass takes besides, which MLX does not count on the CPU. In float32 on a CPU, preload
OpenBLAS (docs/mlx.md), or MLX's side says nothing.
"""

import argparse
import time

import mlx.core as mx

import widehead
import widehead.mlx

# What the gradients of the two may differ by, relative RMS: MLX rounds scores and weights to bf16, and
# multiplies by TF32 on a GPU.
BOUNDS = {mx.float32: 1e-5 if mx.default_device() == mx.cpu else 1e-2, mx.bfloat16: 3e-2}


def measure(calls, seconds):
    """Of each call: the fastest time and the peak beyond what was there before. They take turns."""
    found = {name: [float("inf"), 0] for name in calls}
    end = time.monotonic() + seconds
    while True:
        for name, call in calls.items():
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            begin = time.perf_counter()
            mx.eval(call())
            found[name][0] = min(found[name][0], time.perf_counter() - begin)
            found[name][1] = mx.get_peak_memory() - before
        if time.monotonic() > end:
            return found


def expect_agreement(one, other, bound):
    for have, want in zip(one, other, strict=True):
        have, want = (each.astype(mx.float32).flatten() for each in (have, want))
        error = (mx.linalg.norm(have - want) / mx.linalg.norm(want)).item()
        assert error <= bound, f"gradients differ by {error}"


def report(what, found, workspace_bytes):
    (own_s, own_bytes), (ours_s, ours_bytes) = found["mlx"], found["widehead"]
    print(f"{what} | {own_s * 1e3:.1f} ms, {own_bytes / 1e6:.1f} MB | {ours_s * 1e3:.1f} ms, "
          f"{ours_bytes / 1e6:.1f} MB and {workspace_bytes / 1e6:.1f} MB of workspace | "
          f"{own_s / ours_s:.2f} x", flush=True)  # fmt: skip


def attention(options):
    heads_q, heads_kv = map(int, options.heads.split("/"))
    for dtype, bound in BOUNDS.items():
        shapes = ((1, heads, options.length, options.dim) for heads in (heads_q, heads_kv, heads_kv))
        tensors = [mx.random.normal(shape).astype(dtype) for shape in shapes]
        weights = mx.random.normal(tensors[0].shape).astype(dtype)
        mx.eval(tensors, weights)
        given = {"scale": options.dim**-0.5, "mask": "causal"}

        def gradients(function, tensors=tensors, weights=weights, given=given):
            def loss(*tensors):
                return (function(*tensors, **given) * weights).sum()

            return lambda: mx.value_and_grad(loss, argnums=(0, 1, 2))(*tensors)

        calls = {"mlx": gradients(mx.fast.scaled_dot_product_attention), "widehead": gradients(widehead.mlx.sdpa)}
        expect_agreement(calls["widehead"]()[1], calls["mlx"]()[1], bound)
        plan = widehead.mlx.plan(*tensors, **given, gradients=True)
        what = f"{options.heads} heads of {options.dim}, {options.length} x {options.length}, {dtype}"
        report(what, measure(calls, options.seconds / len(BOUNDS)), plan.workspace_bytes)


def model(options):
    import mlx.nn as nn
    import mlx_lm
    from mlx.utils import tree_flatten

    network, _ = mlx_lm.load(options.model)
    network.set_dtype(mx.float32)
    network.freeze()
    for layer in network.layers:
        layer.unfreeze()
    tokens = mx.random.randint(3, network.args.vocab_size, (1, options.length + 1))
    mx.eval(network.parameters(), tokens)

    def loss(network, tokens):
        scores = network(tokens[:, :-1])
        return nn.losses.cross_entropy(scores, tokens[:, 1:], reduction="mean")

    def own():
        return nn.value_and_grad(network, loss)(network, tokens)

    def ours():
        with widehead.mlx.override_sdpa():
            return own()

    (own_loss, own_gradients), (our_loss, our_gradients) = own(), ours()
    pairs = zip(tree_flatten(our_gradients), tree_flatten(own_gradients), strict=True)
    flat = [(one, other) for (_, one), (_, other) in pairs]
    expect_agreement(*zip(*flat, strict=True), 1e-3)
    print(f"loss {own_loss.item():.5f} and {our_loss.item():.5f}")
    del own_gradients, our_gradients, flat, pairs
    of = network.args
    shapes = ((1, heads, options.length, of.head_dim) for heads in (of.num_attention_heads, *2 * (of.num_key_value_heads,)))
    plan = widehead.mlx.plan(*map(widehead.Spec, shapes), mask="causal", gradients=True)
    found = measure({"mlx": own, "widehead": ours}, options.seconds)
    report(f"{options.model}, {options.length} tokens", found, plan.workspace_bytes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="4/1")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", help="a folder that mlx_lm.load reads")
    options = parser.parse_args()
    mx.random.seed(0)
    (model if options.model else attention)(options)


if __name__ == "__main__":
    main()
