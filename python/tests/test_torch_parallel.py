"""widehead.torch.parallel on processes that gloo connects."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_agree_with_float64(ranks):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(ranks), str(Path(__file__).parent / "ranks_program.py")],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(ranks):
        words = f"rank {rank} of {ranks}: 40 cases, 15 with a mask, 40 as of a device"
        assert words in done.stdout, done.stdout


def test_shares_are_even_and_whole():
    from widehead.torch import parallel

    for cut in (parallel.contiguous, parallel.zigzag):
        tokens = cut(103, 4)
        owned = sorted(token for ranges in tokens for one in ranges for token in range(*one))
        assert owned == list(range(103))
        x = torch.arange(103).reshape(1, 1, 103, 1)
        taken = torch.cat([parallel.take(x, tokens, rank) for rank in range(4)], 2)
        assert sorted(taken.flatten().tolist()) == owned
