"""Ctrl-C, SIGTERM and SIGHUP: the run saves, says how to go on, and goes on as if never stopped."""

import signal

import pytest

from mini_r1.run import PAUSED_MARKER
from tests.faults.harness import clear, differences, log_of, outcome, traces

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
EVERY = 4  # of the file operations


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_at_any_file_operation_leaves_no_trace(straight, saw, number):
    launcher, run_dir, left, operations = straight
    if launcher.processes == 2 and number != signal.SIGTERM:
        pytest.skip("SIGTERM stands for all where two processes must agree")
    # Before the training listens, and after its last evaluation, it ends as it would.
    steps = range(operations.index("os.mkdir eval"), len(operations), EVERY)
    paused, differing = 0, {}
    for at in steps:
        clear(run_dir)
        codes = launcher.train(run_dir, kill_at=at, kill_by=number)
        assert set(codes) <= {0, CODES[number]}, (operations[at], codes, log_of(run_dir))
        if any(codes):
            assert log_of(run_dir).count("; to go on: ") == 1, log_of(run_dir)
            assert "Traceback" not in log_of(run_dir)
            paused += (run_dir / PAUSED_MARKER).exists()
            codes = launcher.train(run_dir)
        if found := traces(codes, run_dir, left):
            differing[f"{at} {operations[at]}"] = found
    what = f"{number.name} before a file operation, {launcher.said}"
    saw(what, len(steps), f"{paused} saved and stopped; {len(differing)} runs differ in the end")
    assert differing == {}
    # Ctrl-C ends at once what can be done again.
    assert paused > (0 if number == signal.SIGINT else len(steps) / 3)


JUDGE = """
import os, signal
from pathlib import Path

def judge(completions, **columns):
    calls = Path(__file__).with_name("calls")
    with calls.open("a") as file:
        file.write("x")
    if AT and calls.stat().st_size >= AT and os.environ.get("RANK", "0") == ON:
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text) % 2) for text in completions]
"""


@pytest.mark.parametrize("step", [0, 2, 4], ids=["before", "amid the steps", "after"])
def test_an_evaluation_ends_after_its_batch(straight, tmp_path, saw, step):
    launcher, run_dir, *_ = straight
    batches, ranks = 4, launcher.processes
    at = {0: 2, 2: batches + 2, 4: 2 * batches + 2}[step]
    judge = tmp_path / "judge.py"
    changes = {"eval_reward": f"{judge}:judge"}
    changes |= {"num_eval_puzzles": batches, "num_eval_samples": 256}  # a batch for each puzzle
    text = JUDGE.replace("ON", f'"{ranks - 1}"')
    judge.write_text(text.replace("AT", "0"))
    clear(run_dir)
    assert launcher.train(run_dir, **changes) == [0] * ranks
    left, calls = outcome(run_dir), tmp_path / "calls"
    assert calls.stat().st_size == 3 * batches

    calls.unlink()
    judge.write_text(text.replace("AT", str(at)))
    clear(run_dir)
    assert launcher.train(run_dir, **changes) == [CODES[signal.SIGTERM]] * ranks
    assert calls.stat().st_size <= at + 2 * ranks - 1
    assert f"paused after step {step} of 4; to go on: " in log_of(run_dir)
    judge.write_text(text.replace("AT", "0"))
    assert launcher.train(run_dir, **changes) == [0] * ranks
    assert differences(outcome(run_dir), left) == []
    saw(f"SIGTERM in an evaluation, {launcher.said}, step {step}", 1, "ends after its batch")
