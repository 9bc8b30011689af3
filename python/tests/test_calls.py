"""What a call does to the process around it: threads, references, memory, interrupts."""

import gc
import os
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import widehead
from oracle import oracle, qkv, relative_rms


def test_eight_threads_at_once():
    cases = [qkv(seed, length=(5 + 7 * seed, 60 + seed)) for seed in range(8)]
    expected = [oracle(*case, causal=True)[0] for case in cases]
    errors = [[] for _ in cases]
    start = threading.Barrier(len(cases))

    def work(index):
        start.wait()
        for _ in range(60):
            out = widehead.sdpa(*cases[index], causal=True)
            errors[index].append(relative_rms(out, expected[index]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert all(len(each) == 60 and max(each) <= 4e-6 for each in errors)


def test_the_gil_is_free_during_a_call():
    q, k, v = qkv(batch=1, heads=(8, 8), length=(3000, 3000), dim=(256, 256))
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    widehead.sdpa(q, k, v)
    end = time.perf_counter()
    done.set()
    thread.join()
    inside = [t for t in ticks if begin < t < end]
    # With the GIL held there would be none between the ends; a busy machine still lets some by.
    assert len(inside) >= 5


INTERRUPTED = """
import signal, threading, time, os, numpy as np, widehead
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell put us aside
q = np.ones((1, 16, 8192, 256), np.float32)
k = np.ones((1, 16, 32768, 256), np.float32)
threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.perf_counter()
try:
    widehead.sdpa(q, k, k, limits=widehead.Limits(threads=THREADS))
    print("finished")
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - begin)
print(widehead.sdpa(q[:, :, :1], k[:, :, :8], k[:, :, :8])[0, 0, 0, 0])
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_long_call(threads):
    script = INTERRUPTED.replace("THREADS", str(threads))
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True
    )
    words, after = result.stdout.splitlines()
    assert words.startswith("interrupted"), words
    # The whole would take the better part of a minute.
    assert float(words.split()[1]) < 15
    assert after == "1.0"


def test_references_are_returned():
    q, k, v = qkv(length=(3, 9))
    mask = np.ones((3, 9), bool)
    integers = np.ones(4, np.int32)
    limits = widehead.Limits(threads=1)
    out = np.empty((2, 4, 3, 48), np.float32)
    things = (q, k, v, mask, integers, limits, limits._core, out)
    widehead.sdpa(q, k, v, mask=mask, limits=limits, out=out)
    before = [sys.getrefcount(thing) for thing in things]
    for _ in range(100):
        widehead.sdpa(q, k, v, mask=mask, limits=limits, out=out)
        with pytest.raises(ValueError):
            widehead.sdpa(q, k, v[:1], mask=mask, limits=limits, out=out)
        with pytest.raises(TypeError):
            widehead.sdpa(q, k, v, sinks=integers, limits=limits, out=out)
    gc.collect()
    assert [sys.getrefcount(thing) for thing in things] == before


def _resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "mlx"])
def test_ten_thousand_calls_leak_nothing(library):
    arrays = qkv(batch=1, length=(16, 64), dim=(64, 64))
    if library != "numpy":
        from test_arrays import LIBRARIES

        arrays = tuple(LIBRARIES[library](array) for array in arrays)
    for _ in range(1000):
        widehead.sdpa(*arrays, return_log_sum_exp=True)
    gc.collect()
    before = _resident_bytes()
    for _ in range(10_000):
        widehead.sdpa(*arrays, return_log_sum_exp=True)
    gc.collect()
    # An output of 16 KiB leaked in each call would be 160 MB.
    assert _resident_bytes() - before < 16 << 20


def test_new_shapes_do_not_pile_up_plans():
    q, k, v = qkv(batch=1, length=(1, 3000), dim=(8, 8))
    for length in range(1, 200):
        widehead.sdpa(q, k[:, :, :length], v[:, :, :length])
    gc.collect()
    before = _resident_bytes()
    for length in range(200, 3000):
        widehead.sdpa(q, k[:, :, :length], v[:, :, :length])
    assert _resident_bytes() - before < 16 << 20


def test_the_environment_reaches_the_planner():
    script = (
        "import numpy as np, widehead; q = np.ones((1, 1, 64, 8), 'f4'); "
        "print(widehead.plan(q, q, q).kernel)"
    )
    environment = os.environ | {"WIDEHEAD_KERNEL": "cpu_unfused"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == "cpu_unfused"


def test_the_command_line_is_in_the_package():
    command = [sys.executable, "-m", "widehead", "plan", "--heads", "8/2", "--dim", "256"]
    command += ["--queries", "1", "--keys", "4096", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert '"kernel"' in result.stdout
    refused = subprocess.run([*command, "--workspace", "0", "--kernel", "cpu_unfused"],
                             capture_output=True, text=True)  # fmt: skip
    assert refused.returncode == 3


def test_importing_needs_numpy_alone():
    script = (
        "import sys, widehead; "
        "print([m for m in ('torch', 'transformers', 'jax', 'mlx', 'cupy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
