"""What an installed wheel must do in a bare environment: tools/make_wheels runs it there.

    python check_wheel.py MODULE...    imports them in this order, widehead among them

It computes, compares with float64, and looks at what was loaded: of the system glibc and the compiler's runtime alone,
unless another module of the list brought it.
"""

import importlib
import platform
import sys
from pathlib import Path

import numpy as np

SYSTEM = ("libc.", "libm.", "libdl.", "libpthread.", "librt.", "ld-linux", "libstdc++.", "libgcc_s.", "libutil.")


def loaded_libraries():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if ".so" in line})


def foreign_libraries(before):
    """Those that lie in no folder of this Python's and belong to no bare system."""
    own = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
    return [path for path in loaded_libraries()
            if path not in before and not any(root in Path(path).resolve().parents for root in own)
            and not Path(path).name.startswith(SYSTEM)]


def exact(q, k, v):
    """Causal attention of float64, bottom-right, for one kv head to every query head."""
    scores = (q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2)) / np.sqrt(q.shape[-1])
    visible = np.tri(q.shape[-2], k.shape[-2], k.shape[-2] - q.shape[-2], dtype=bool)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v.astype(np.float64)


def main():
    random = np.random.default_rng(0)
    before = set(loaded_libraries())  # Python's own modules load the system's libcrypto
    others = [name for name in sys.argv[1:] if name != "widehead"]
    for name in sys.argv[1:]:
        importlib.import_module(name)
    widehead = sys.modules["widehead"]
    # Both kinds of kernels: a product of the bundled BLAS's, and a fused one.
    for kernel in ("cpu_unfused", "cpu_prefill", ""):
        q, k, v = (random.standard_normal((1, 4, n, 128), dtype=np.float32) for n in (64, 256, 256))
        limits = widehead.Limits(kernel=kernel) if kernel else widehead.Limits()
        out = widehead.sdpa(q, k, v, causal=True, limits=limits)
        error = np.abs(out - exact(q, k, v)).max()
        if not error < 1e-5:
            sys.exit(f"{kernel or 'the chosen kernel'} is off by {error}")
    for name in others:
        array = sys.modules[name]
        make = array.from_numpy if name == "torch" else importlib.import_module(f"{name}.numpy").asarray
        out = np.from_dlpack(widehead.sdpa(make(q), make(k), make(v), causal=True))
        if not np.abs(out - exact(q, k, v)).max() < 1e-5:
            sys.exit(f"{name}'s arrays give other numbers")
    foreign = [] if others else foreign_libraries(before)
    if foreign:
        sys.exit(f"loaded from the system, which may lack it: {', '.join(foreign)}")
    own = sorted(Path(path).name for path in loaded_libraries() if "widehead" in path)
    print(f"Python {platform.python_version()}, {' then '.join(sys.argv[1:])}: right, with {', '.join(own)}")


if __name__ == "__main__":
    main()
