"""The check for machines with GPUs, on one without: all that can runs, on tiny shapes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mini_r1.launch.machine import Machine
from mini_r1.scripts.gpu_check import SHORT_ON_CPU, Step, check
from tests.integration import test_vllm

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

ROOT = Path(__file__).parents[2]
TINY_CPU = ROOT / "recipes" / "tiny-cpu.yaml"
WITH_VLLM = ROOT / ".venv-vllm"
PARTS = {"generate", "rewards", "forward and backward", "optimizer", "rest"}

NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(output):
    script = str(ROOT / "scripts" / "gpu_check.py")
    return [sys.executable, script, "--output", str(output)]


def cpu_seconds():
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_gpu_check_runs_through(tmp_path):
    output = tmp_path / "gpu-check.json"
    before = cpu_seconds()
    options = {"capture_output": True, "text": True, "timeout": 400, "env": NO_GPU}
    done = subprocess.run(command(output), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cpu_seconds() - before < 120
    result = json.loads(output.read_text())
    assert result["versions"]["trl"] == "1.16.0"
    steps = {step["name"]: step for step in result["steps"]}
    skipped = {step["name"]: step["why"] for step in result["steps"] if step["outcome"] != "ok"}
    assert skipped == {"tiny, colocated": "needs 1 GPU", "tiny, server": "needs 2 GPUs"}
    for step in (step for name, step in steps.items() if name not in skipped):
        assert step["seconds"].keys() >= PARTS
        assert min(step["seconds"].values()) > 0
        assert len(step["evaluation_seconds"]) == 2
        assert step["tokens"] == 16
        assert (tmp_path / step["log"]).stat().st_size
    of_a_reference = ["log-probs" in step["seconds"] for step in result["steps"][:2]]
    assert sorted(of_a_reference) == [False, True]  # one has a beta, the other none
    assert re.search(r"^\| seconds per step +\| [\d.]+", done.stdout, re.MULTILINE)
    assert not any(path.is_dir() for path in (tmp_path / "gpu-check-logs").iterdir())  # no weights


def test_ctrl_c_ends_the_training_and_keeps_what_is_known(tmp_path):
    output = tmp_path / "gpu-check.json"
    running = subprocess.Popen(command(output), stdout=subprocess.PIPE, text=True, env=NO_GPU)
    said = []
    while not said or not said[-1].startswith("3B, beta"):  # the first step is over
        said.append(running.stdout.readline())
        assert said[-1]
    time.sleep(2)
    running.send_signal(signal.SIGINT)
    said.append(running.communicate(timeout=30)[0])
    assert running.returncode == 128 + signal.SIGINT
    found = [step["outcome"] for step in json.loads(output.read_text())["steps"]]
    assert found == ["ok", "interrupted"]
    assert "| outcome" in said[-1]
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in done.stdout


def test_a_curve_counts_as_far_as_it_came_and_a_shape_is_laid_beside_its_plan(tmp_path):
    """On a machine that is said to have a GPU; both train on the CPU."""
    endless = {"max_steps": 5000, "eval_strategy": "steps", "eval_steps": 2}
    steps = [
        Step("shape", "grpo-qwen-2.5-3b-1gpu.yaml", 2, SHORT_ON_CPU, "tiny", memory=24.0),
        Step("curve", "tiny-cpu.yaml", 0.7, SHORT_ON_CPU | endless, open_ended=True),
    ]
    shape, curve = check(tmp_path / "figures.json", steps, Machine(1, 80.0))["steps"]
    assert (shape["outcome"], curve["outcome"]) == ("ok", "ok")
    assert shape["planned"].keys() == {"training", "generation", "evaluation"}
    assert min(shape["planned"].values()) > 0
    assert [step for step, _ in curve["success"]][:3] == [0, 2, 4]
    assert curve["seconds"]


@pytest.mark.skipif(not (WITH_VLLM / "installed").exists(), reason="needs vLLM: run make test-all")
def test_the_parts_of_a_step_with_colocated_vllm(tmp_path):
    figures = tmp_path / "figures.json"
    measured = ("--figures", str(figures), "--random-weights", "tiny")
    changes = {"max_steps": 3, "save_strategy": "no", "model_name_or_path": tmp_path / "tiny"}
    test_vllm.train(tmp_path / "run", *measured, **changes)
    found = json.loads(figures.read_text())
    assert len(found["steps"]) == 3
    for step in found["steps"][1:]:  # the evaluation before has sent the first one's weights
        assert step.keys() == PARTS | {"wake and sync", "log-probs"}
    assert len(found["evaluations"]) == 2
