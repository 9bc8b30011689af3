"""examples/long_training_step.py at tiny sizes: what it measures is one model, whoever computes attention."""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import long_training_step as example  # noqa: E402


def options(**others):
    defaults = {"device": "cpu", "layers": 4, "kind": None, "tokens": 96, "steps": 2, "vocabulary": 64, "shrink": 32,
                "checkpoint": False, "timeout": 600.0, "model": "gemma-4-31b"}
    return argparse.Namespace(**defaults | others)


@pytest.mark.parametrize(
    ("model", "others"),
    [("gemma-4-31b", {}), ("gemma-4-31b", {"checkpoint": True}), ("qwen3.5-27b", {}),
     ("qwen3.5-27b", {"kind": "full_attention"})],
)
def test_losses_and_gradients_of_both_attentions_agree(model, others):
    rows = {name: example.measure(options(one=name, model=model, **others)) for name in ("sdpa", "widehead")}
    assert example.disagreements(rows) == []
    first, last = rows["widehead"]["steps"]
    assert last["loss"] < first["loss"]  # the same tokens once more
    kinds = set(rows["widehead"]["layer_types"])
    assert ("full_attention" in kinds) and len(kinds) == (1 if "kind" in others else 2)
    assert f"{first['loss']:.4f}" in example.table({"tokens": 96, "rows": rows})


def test_a_chart_has_what_ran(tmp_path):
    pytest.importorskip("matplotlib")
    step = {f"{phase}_s": 1.0 for phase in example.PHASES} | {"step_s": 3.0, "peak_bytes": 10**9}
    rows = {"sdpa": {"failure": "out of memory"}, "widehead": {"steps": [step]}}
    example.draw({"tokens": 96, "rows": rows}, tmp_path / "step.svg")
    text = (tmp_path / "step.svg").read_text()
    assert "widehead" in text and "sdpa" not in text


def test_another_loss_and_another_gradient_are_seen():
    step = {"loss": 2.0, "gradient_norm": 1.0}
    rows = {"sdpa": {"steps": [step]}, "widehead": {"steps": [step | {"loss": 2.1, "gradient_norm": float("nan")}]}}
    assert [one.split(":")[0] for one in example.disagreements(rows)] == ["loss of step 1", "gradient_norm of step 1"]


def test_what_does_not_end_in_time_is_said(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["long_training_step.py", "--device", "cpu", "--shrink", "32"])
    row = example.run_in_child("widehead", options(timeout=0.05))
    assert row == {"failure": "0 of 2 steps in 0 s", "ran_out_of": "time"}
    assert example.broken({"widehead": row}) == []
    assert "0 of 2 steps" in example.table({"tokens": 96, "rows": {"widehead": row}})


@pytest.mark.parametrize(
    ("said", "code", "is_broken"),
    [("torch.OutOfMemoryError: CUDA out of memory.", 1, False), ("ImportError: no such kernel", 1, True),
     ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", 1, False),
     ("a warning", -signal.SIGKILL, False), ("", -signal.SIGSEGV, True)],
)
def test_only_memory_and_time_may_run_out(monkeypatch, tmp_path, said, code, is_broken):
    step = {f"{phase}_s": 1.0 for phase in example.PHASES} | {"step_s": 3.0, "loss": 4.0, "gradient_norm": 1.0, "peak_bytes": 1}

    def ends(command, **_):
        if command[-1] == "widehead":
            return subprocess.CompletedProcess(command, code, "", said)
        return subprocess.CompletedProcess(command, 0, json.dumps({"steps": [step]}), "")

    monkeypatch.setattr(subprocess, "run", ends)
    monkeypatch.setattr(sys, "argv", ["long_training_step.py", "--device", "cpu", "--out", str(tmp_path / "step.json")])
    assert example.main() == (1 if is_broken else 0)


def test_steps_that_ended_in_time_are_kept(monkeypatch):
    step = {f"{phase}_s": 1.0 for phase in example.PHASES} | {"step_s": 3.0, "loss": 4.0, "gradient_norm": 1.0, "peak_bytes": 1}

    def ends_late(command, **others):
        said = f"a warning\n{example.STEP}{json.dumps(step)}\n"
        raise subprocess.TimeoutExpired(command, others["timeout"], stderr=said.encode())

    monkeypatch.setattr(subprocess, "run", ends_late)
    row = example.run_in_child("sdpa", options(timeout=50.0))
    assert row == {"steps": [step], "cut_short": "1 of 2 steps in 50 s"}
    assert "| sdpa (1 of 2 steps in 50 s) | 4.0000 |" in example.table({"tokens": 96, "rows": {"sdpa": row}})
    assert example.disagreements({"sdpa": row, "widehead": {"steps": [step, step]}}) == []
