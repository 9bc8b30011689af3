"""Widehead from Python in six steps: a call, a plan, a cache, a window, a budget, a merge.

    pip install . && python examples/tutorial.py
"""

import numpy as np
import widehead

random = np.random.default_rng(0)


def normal(*shape):
    return random.standard_normal(shape, dtype=np.float32)


# One call. Two kv heads serve eight query heads; nothing is repeated in memory.
q, k, v = normal(1, 8, 512, 256), normal(1, 2, 512, 256), normal(1, 2, 512, 256)
out = widehead.sdpa(q, k, v, causal=True)
print(f"one call: {out.shape}, the first row is v's: {np.allclose(out[0, 0, 0], v[0, 0, 0])}")

# What ran, why nothing else did, how many bytes it took.
plan = widehead.plan(q, k, v, causal=True)
print(f"\n{plan.explain()}")

# A cache with room for 4096 keys that holds 512: nothing past the length is read.
cache_k = np.full((1, 2, 4096, 256), np.nan, np.float32)
cache_v = cache_k.copy()
cache_k[:, :, :512], cache_v[:, :, :512] = k, v
cached = widehead.sdpa(q, cache_k, cache_v, causal=True, key_lengths=np.array([512], np.int32))
print(f"from a cache: largest difference {np.abs(cached - out).max():.1e}")

# A window of 128 keys, the query's own included.
near = widehead.sdpa(q, k, v, causal=True, window=(127, 0))
print(f"a window: rows within it are the same: {np.allclose(near[:, :, :128], out[:, :, :128])}")

# A budget that rules the score matrix out, and one that rules everything out.
fused = widehead.plan(q, k, v, causal=True, limits=widehead.Limits(policy="fused"))
print(f"fused: {fused.kernel}, {fused.workspace_bytes} bytes")
try:
    widehead.sdpa(q, k, v, limits=widehead.Limits(workspace=16))
except widehead.Refused as refusal:
    print(f"16 bytes: {str(refusal).splitlines()[0]}")

# Keys in two places: each part's answer and log-sum-exp, merged.
parts = [
    widehead.sdpa(q, k[:, :, keys], v[:, :, keys], return_log_sum_exp=True)
    for keys in (slice(0, 200), slice(200, 512))
]
merged, _ = widehead.merge(parts)
whole = widehead.sdpa(q, k, v)
print(f"merged: largest difference {np.abs(merged - whole).max():.1e}")
