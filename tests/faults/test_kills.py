"""SIGKILL at any moment: the same command goes on, and nothing tells the run from another."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mini_r1.run import SUMMARY_FILE
from tests.faults.harness import ROOT, arguments, clear, differences, outcome, traces

RANDOM_KILLS = {1: 20, 2: 8}


def test_two_uninterrupted_runs_are_the_same(alone, saw):
    launcher, run_dir, left = alone
    clear(run_dir)
    assert launcher.train(run_dir) == [0]
    assert differences(outcome(run_dir), left) == []


def test_a_kill_at_any_file_operation_leaves_no_trace(straight, saw):
    launcher, run_dir, left, operations = straight
    assert len(operations) > 60
    differing = {}
    for number in range(len(operations)):
        clear(run_dir)
        assert -signal.SIGKILL in launcher.train(run_dir, kill_at=number), operations[number]
        if found := traces(launcher.train(run_dir), run_dir, left):
            differing[f"{number} {operations[number]}"] = found
    what = f"SIGKILL before a file operation, {launcher.said}"
    saw(what, len(operations), f"{len(differing)} runs differ in the end")
    assert differing == {}


def test_kills_at_random_moments_leave_no_trace(straight, saw):
    launcher, run_dir, left, _ = straight
    moments = random.Random(launcher.processes)
    began = time.monotonic()
    clear(run_dir)
    assert launcher.train(run_dir) == [0] * launcher.processes
    whole = time.monotonic() - began
    kills, runs, differing = 0, 0, []
    while kills < RANDOM_KILLS[launcher.processes]:
        clear(run_dir)
        runs += 1
        codes = [1]
        while any(codes):
            last = kills >= RANDOM_KILLS[launcher.processes]
            moment = None if last else moments.uniform(0.1, 0.9) * whole
            codes = launcher.train(run_dir, kill_after=moment)
            kills += any(codes)
            assert set(codes) <= {0, -signal.SIGKILL}
        differing += differences(outcome(run_dir), left)
    what = f"SIGKILL at random moments, {launcher.said}"
    saw(what, f"{kills} in {runs} runs", f"{len(differing)} records differ in the end")
    assert differing == []


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_a_launch_that_loses_a_process_ends_by_itself_and_goes_on(tmp_path, saw, victim):
    run_dir = tmp_path / "run"
    config = ROOT / "configs" / "accelerate_configs" / "cpu.yaml"
    script = [str(ROOT / "scripts" / "run_r1_grpo.py"), "--config", *arguments(run_dir)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([*launch, *script], env=environment, **quiet)
    deadline = time.monotonic() + 100
    while not (run_dir / "checkpoint-2" / "complete").exists():
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.01)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    (launcher if victim == "launcher" else ranks[1]).kill()
    began = time.monotonic()
    launcher.wait(timeout=60)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert alive == []
    seconds = time.monotonic() - began
    again = subprocess.run([*launch, *script], env=environment, timeout=200, check=False, **quiet)
    assert again.returncode == 0
    assert (run_dir / SUMMARY_FILE).exists()
    saw(f"SIGKILL of the {victim} of two ranks", 1, "all end, and the same command goes on")
    assert seconds < (5 if victim == "launcher" else 60)
