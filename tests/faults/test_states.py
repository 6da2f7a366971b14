"""States in which a run may be found: each is healed, or told in one line with exit code 2."""

import os
import subprocess
import sys

import pytest

from mini_r1.run import SAMPLES_FOLDER, last_complete_checkpoint
from tests.faults.harness import arguments, clear, differences, log_of, outcome

PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture
def stopped(alone):
    """A run that was killed after its second checkpoint; both are there."""
    launcher, run_dir, _ = alone
    clear(run_dir)
    options = {"save_total_limit": 3, "max_steps": 6}
    assert launcher.train(run_dir, **options) == [0]
    left = outcome(run_dir)
    for name in ("summary.json", "checkpoint-6/complete"):
        (run_dir / name).unlink()
    (run_dir / "checkpoint-6" / "begun").touch()
    return launcher, run_dir, left, options


def lose(path):
    """removed"""
    path.unlink()


def empty(path):
    """emptied"""
    path.write_bytes(b"")


def cut(path):
    """cut off"""
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """with a bit flipped"""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [lose, empty, cut, flip])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stopped, saw, harm):
    launcher, run_dir, left, options = stopped
    for name in PARTS:
        newest = last_complete_checkpoint(run_dir)
        harm(newest / name)
        assert launcher.train(run_dir, **options) == [0]
        assert f"{newest} is damaged ({name} " in log_of(run_dir)
        aside = run_dir / f"set-aside-{newest.name}"
        assert aside.is_dir()
        subprocess.run(["rm", "-r", str(aside)], check=True)
        assert differences(outcome(run_dir), left) == []
        (run_dir / "summary.json").unlink()
    saw(f"a file of a checkpoint {harm.__doc__}", len(PARTS), "named; the one before is used")


RECORDS = ("recipe.yaml", "manifest.json", "summary.json", "eval/before.json")


@pytest.mark.parametrize("harm", [empty, cut])
def test_a_damaged_record_is_told_in_one_line(alone, saw, harm):
    launcher, run_dir, _ = alone
    clear(run_dir)
    assert launcher.train(run_dir) == [0]
    for name in RECORDS:
        content = (run_dir / name).read_bytes()
        if name == "eval/before.json":  # which a finished run does not read
            (run_dir / "summary.json").rename(run_dir / "summary")
        harm(run_dir / name)
        log_of(run_dir, forget=True)
        # Half a recipe is another recipe.
        assert launcher.train(run_dir) == [2]
        (line,) = log_of(run_dir).splitlines()
        assert line.startswith("error: "), line
        assert name in line or "holds a run with" in line
        (run_dir / name).write_bytes(content)
    (run_dir / "summary").rename(run_dir / "summary.json")
    assert launcher.train(run_dir) == [0]
    saw(f"a record {harm.__doc__}", len(RECORDS), "told in one line, exit code 2")


def test_what_is_no_checkpoint_is_left_alone(stopped):
    launcher, run_dir, left, options = stopped
    (run_dir / "checkpoint-abc").mkdir()
    (run_dir / "checkpoint-99999").write_text("a file")
    (run_dir / "checkpoint-8").mkdir()
    (run_dir / "checkpoint-8" / "notes.txt").write_text("mine")
    assert launcher.train(run_dir, **options) == [0]
    assert (run_dir / "set-aside-checkpoint-8" / "notes.txt").read_text() == "mine"
    found = outcome(run_dir)
    strange = {"checkpoint-abc", "checkpoint-99999", "set-aside-checkpoint-8"}
    assert set(found["files"]) - set(left["files"]) == strange
    found["files"] = left["files"]
    assert differences(found, left) == []


def test_samples_that_are_no_text_do_not_end_a_run(stopped):
    launcher, run_dir, left, options = stopped
    for path in (run_dir / SAMPLES_FOLDER).iterdir():
        with path.open("ab") as file:
            file.write(b"\xff\xfe")
    assert launcher.train(run_dir, **options) == [0]
    assert differences(outcome(run_dir), left) == []


def test_a_lower_max_steps_takes_no_further_step(stopped):
    launcher, run_dir, _, options = stopped
    before = (run_dir / "checkpoint-4" / "model.safetensors").read_bytes()
    log_of(run_dir, forget=True)
    assert launcher.train(run_dir, **{**options, "max_steps": 3}) == [0]
    assert (run_dir / "model.safetensors").read_bytes() == before
    assert "step 5" not in log_of(run_dir)


FILLER = """
import os, shutil
from pathlib import Path

def judge(completions, **columns):
    disk, filler = Path("RUN_DIR"), Path("RUN_DIR", "filler")
    if LEFT and not filler.exists():
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - LEFT)
    return [1.0] * len(completions)
"""


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(alone, tmp_path, saw):
    launcher, run_dir, _ = alone
    judge = tmp_path / "judge.py"
    text, changes = FILLER.replace("RUN_DIR", str(run_dir)), {"eval_reward": f"{judge}:judge"}
    judge.write_text(text.replace("LEFT", "0"))
    clear(run_dir)
    assert launcher.train(run_dir, **changes) == [0]
    left = outcome(run_dir)

    # Room for a record, half the weights, half the optimizer's state, a checkpoint and a half.
    sizes = (5_000, 1_500_000, 6_000_000, 14_000_000)
    for size in sizes:
        clear(run_dir)
        run_dir.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(run_dir)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a small disk")
        try:
            judge.write_text(text.replace("LEFT", str(size)))
            assert launcher.train(run_dir, **changes) == [1], size
            errors = [line for line in log_of(run_dir).splitlines() if line.startswith("error: ")]
            room = "is full; make room, and the same command goes on"
            assert errors == [f"error: the disk under {run_dir} {room}"], log_of(run_dir)
            assert "Traceback" not in log_of(run_dir)
            judge.write_text(text.replace("LEFT", "0"))
            (run_dir / "filler").unlink()
            assert launcher.train(run_dir, **changes) == [0]
            assert differences(outcome(run_dir), left) == []
        finally:
            subprocess.run(["umount", str(run_dir)], check=True)
    saw("a disk that fills up", len(sizes), "told in one line; goes on when there is room")


def test_nobody_reads_what_it_prints(alone, saw):
    _, run_dir, left = alone
    clear(run_dir)
    train = [sys.executable, "-m", "mini_r1", "train", *arguments(run_dir)]
    process = subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=100) == 0
    assert differences(outcome(run_dir), left) == []
    saw("stdout closed by its reader", 1, "trains on")
