"""Real runs of the one training entry point on the embedded base.

They take a few steps; then everything that a run promises is checked.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mini_r1.evaluate import evaluate_model
from mini_r1.model import load_model, load_tokenizer, model_path
from mini_r1.rollouts import ALL_FILE, SOLVED_FILE, read_samples
from mini_r1.run import (
    COMPLETE_MARKER,
    FAILED_BATCH_FILE,
    MANIFEST_FILE,
    PAUSED_MARKER,
    RECIPE_FILE,
    STATE_FILE,
    STOP_FILE,
    SUMMARY_FILE,
    mark_begun,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHORT = {
    "max_steps": 6,
    "save_steps": 2,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,  # two optimizer steps
    "num_generations": 4,
    "max_completion_length": 40,
    "num_puzzles": 500,
    "num_eval_puzzles": 20,
    "num_eval_samples": 2,
}


def command(output_dir, **changes):
    options = {**SHORT, "output_dir": output_dir, **changes}
    recipe = ROOT / "recipes" / "tiny-cpu.yaml"
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    script = str(ROOT / "scripts" / "run_r1_grpo.py")
    return [sys.executable, script, "--config", str(recipe), *arguments]


def train(output_dir, **changes):
    return subprocess.run(
        command(output_dir, **changes), capture_output=True, text=True, timeout=300
    )


def wait_for(condition, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run: (its folder, what it printed)."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    done = train(run_dir)
    assert done.returncode == 0, done.stderr
    # What bitsandbytes and DeepSpeed say at import on a CPU.
    for complaint in ("Failed to load", "Setting accelerator"):
        assert complaint not in done.stderr + done.stdout
    return run_dir, done.stdout


def test_a_run_is_a_complete_folder(straight):
    run_dir, printed = straight
    recipe = yaml.safe_load((run_dir / RECIPE_FILE).read_text())
    assert recipe["max_steps"] == 6
    manifest = json.loads((run_dir / MANIFEST_FILE).read_text())
    assert manifest["versions"]["trl"] == "1.16.0"
    hashes = manifest["recipe_sha256"], *(manifest[of]["sha256"] for of in ("model", "data"))
    assert [len(one) for one in hashes] == [64, 64, 64]
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    for name in ("before", "after"):
        result = json.loads((run_dir / "eval" / f"{name}.json").read_text())
        assert (result["num_puzzles"], result["num_samples"], result["temperature"]) == (20, 2, 1.0)
        assert summary[f"success_{name}"] == result["success"]
        assert 0 < result["behaviors"]["true_arithmetic"] <= 1
        assert len(result["examples"]) == 3
    assert summary["steps"] == 6
    assert summary["train_seconds"] > 0
    scalars = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    behaviors = ("train/behaviors/tries", "train/behaviors/gave_up")
    for name in ("train/reward", *behaviors, "eval/success"):
        assert scalars.Scalars(name), name
    card = (run_dir / "README.md").read_text()
    assert "countdown" in card.lower() or "GRPO" in card
    assert "==== step " in (run_dir / "samples" / ALL_FILE).read_text()
    assert "held-out success" in printed
    assert "step 5/6  reward" in printed


def test_the_trained_model_loads_and_differs_from_the_base(straight):
    run_dir, _ = straight
    weights, base = load_model(str(run_dir)).state_dict(), load_model("tiny_base").state_dict()
    assert any((weights[name] != base[name]).any() for name in base)
    ids, base_ids = (
        load_tokenizer(name)("21-3=18")["input_ids"] for name in (str(run_dir), "tiny_base")
    )
    assert ids == base_ids


def test_eval_of_the_run_repeats_its_after_json(straight):
    run_dir, _ = straight
    after = json.loads((run_dir / "eval" / "after.json").read_text())
    again = evaluate_model(str(run_dir))
    for key in ("success", "pass_at", "mean_completion_tokens"):
        assert again[key] == after[key], key


def assert_same_outcome(run_dir, straight):
    for name in ("model.safetensors", f"samples/{ALL_FILE}", f"samples/{SOLVED_FILE}"):
        assert (run_dir / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.parametrize(
    ("bf16", "narrow"),
    [(True, torch.bfloat16), pytest.param(False, torch.float16, marks=pytest.mark.minutes)],
)
def test_a_model_is_saved_as_it_computes_and_a_checkpoint_as_it_is_trained(
    straight, tmp_path, bf16, narrow
):
    run_dir = tmp_path / "run"
    done = train(run_dir, bf16=bf16, fp16=not bf16, max_steps=2)
    assert done.returncode == 0, done.stderr
    for folder, dtype in (
        (run_dir, narrow),
        (run_dir / "checkpoint-2", torch.float32),
        (straight[0], torch.float32),
    ):
        weights = load_file(folder / "model.safetensors").values()
        assert {weight.dtype for weight in weights} == {dtype}
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert evaluate_model(str(run_dir))["num_puzzles"] == 20


@pytest.mark.minutes
def test_kill_9_loses_nothing(straight, tmp_path):
    run_dir = tmp_path / "killed"
    process = subprocess.Popen(
        command(run_dir),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: (run_dir / "checkpoint-2" / COMPLETE_MARKER).exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run_dir / SUMMARY_FILE).exists()
    newest = max(int(path.name.partition("-")[2]) for path in run_dir.glob("checkpoint-*"))
    # As a kill in the middle of the next save leaves it.
    torn = run_dir / f"checkpoint-{newest + 2}"
    mark_begun(run_dir, newest + 2)
    (torn / "model.safetensors").write_bytes(b"half")

    done = train(run_dir)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert f"removing {torn}" in done.stdout
    assert_same_outcome(run_dir, straight[0])
    results = [
        json.loads((folder / "eval" / "after.json").read_text())
        for folder in (run_dir, straight[0])
    ]
    assert results[0]["success"] == results[1]["success"]


@pytest.mark.minutes
@pytest.mark.parametrize(
    "lost",
    [
        ["eval/after.json", "model.safetensors", "report.html", SUMMARY_FILE, STATE_FILE],
        ["report.html", SUMMARY_FILE],
        [SUMMARY_FILE],
    ],
    ids=["before the last evaluation", "before the report", "before the summary"],
)
def test_what_follows_the_last_step_is_done_again_and_no_step_is(straight, tmp_path, lost):
    run_dir = shutil.copytree(straight[0], tmp_path / "run")
    for name in lost:
        (run_dir / name).unlink()
    recipe = yaml.safe_load((run_dir / RECIPE_FILE).read_text())
    (run_dir / RECIPE_FILE).write_text(yaml.safe_dump(recipe | {"output_dir": str(run_dir)}))
    done = train(run_dir)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert "step 7" not in done.stdout
    assert_same_outcome(run_dir, straight[0])
    assert {path.name for path in run_dir.iterdir()} - {"manifest-from-checkpoint-6.json"} == {
        path.name for path in straight[0].iterdir()
    }
    again, before = (
        json.loads((each / SUMMARY_FILE).read_text()) for each in (run_dir, straight[0])
    )
    for key in ("steps", "success_before", "success_after"):
        assert again[key] == before[key], key


@pytest.mark.minutes
@pytest.mark.parametrize(
    ("request_by", "code"),
    [("mini-r1 pause", 0), (signal.SIGUSR1, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_run_pauses_on_request_and_goes_on_as_if_it_had_not(straight, tmp_path, request_by, code):
    run_dir = tmp_path / "paused"
    process = subprocess.Popen(
        command(run_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    samples = run_dir / "samples" / ALL_FILE
    wait_for(samples.exists, process)  # in the first step
    if isinstance(request_by, str):
        pause = [sys.executable, "-m", "mini_r1", "pause", str(run_dir)]
        subprocess.run(pause, check=True, capture_output=True)
    else:
        process.send_signal(request_by)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    # The first that ends a generation.
    step = int(re.search(r"paused after step (\d) of 6; ", printed + errors)[1])
    if code == 0:
        assert "; the same command goes on from there" in printed
    else:
        said = f"paused after step {step} of 6; to go on: {shlex.join(command(run_dir))}\n"
        assert errors.endswith(said)
    assert step % 2 == 0
    assert (run_dir / PAUSED_MARKER).read_text() == f"{step}\n"
    assert not (run_dir / STOP_FILE).exists()
    assert not (run_dir / SUMMARY_FILE).exists()

    done = train(run_dir)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {run_dir / f'checkpoint-{step}'}" in done.stdout
    assert not (run_dir / PAUSED_MARKER).exists()
    assert_same_outcome(run_dir, straight[0])


def test_a_run_started_twice_is_refused_and_after_kill_9_it_starts(tmp_path):
    run_dir, long = tmp_path / "run", {"max_steps": 1000}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command(run_dir, **long), **quiet)
    lock = run_dir / "lock"
    wait_for(lambda: lock.exists() and lock.read_text(), first, seconds=20)
    began = time.monotonic()
    second = train(run_dir, **long)
    seconds = time.monotonic() - began
    assert second.returncode == 2
    said = rf"error: .*{run_dir} is in use by process {first.pid} on .*, since 20\d\d-.*\n"
    assert re.fullmatch(said, second.stderr)
    assert seconds < 2
    first.kill()
    first.wait()
    third = subprocess.Popen(command(run_dir, **long), **quiet)
    wait_for(lambda: f'"pid": {third.pid},' in lock.read_text(), third, seconds=20)
    third.kill()
    third.wait()


def test_a_finished_run_is_not_run_again(straight):
    before = (straight[0] / SUMMARY_FILE).read_bytes()
    done = train(straight[0])
    assert done.returncode == 0
    assert "already finished" in done.stdout
    assert (straight[0] / SUMMARY_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "holds a run with seed: 1, this recipe says 5"),
        ({"output_dir": ROOT / "README.md"}, "cannot be written (Not a directory"),
        ({"output_dir": "/dev/null/x"}, "cannot be written"),
        (
            {"output_dir": "FRESH", "num_generations": 5},
            "cannot be cut into groups of num_generations: 5; it counts completions",
        ),
        ({"output_dir": "FRESH", "num_eval_puzzles": 400}, "num_eval_puzzles: 400 asked for"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(straight, tmp_path, changes, message):
    options = {"output_dir": straight[0], **changes}
    if options["output_dir"] == "FRESH":
        options["output_dir"] = tmp_path / "fresh"
    done = train(**options)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "fresh").exists()


MY_TASK = """
import functools
import numpy

class Brackets:
    def __call__(self, completions, **columns):
        return numpy.array(["(" in text for text in completions], dtype=numpy.float32)

def shorter_than(limit, completions, **columns):
    return [numpy.float64(len(text) < limit) for text in completions]

def for_some(completions, **columns):
    return [None if "1" in text else 0.5 for text in completions]

def broken(completions, trainer_state, **columns):
    return [float("nan" if trainer_state.global_step else 0)] * len(completions)

def nothing(completions, **columns):
    return [0.0] * len(completions)

brackets, short = Brackets(), functools.partial(shorter_than, 50)
"""


@pytest.fixture
def own_task(tmp_path):
    """A folder with rewards, data, and two files that have the names of libraries."""
    (tmp_path / "my_task.py").write_text(MY_TASK)
    for name in ("datasets", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken for the library')\n")
    puzzles = (f'{{"nums": [{n}, 2, 3], "target": {n + 5}}}\n' for n in range(4, 204))
    (tmp_path / "24.jsonl").write_text("".join(puzzles))
    return tmp_path


def train_own(folder, *rewards):
    changes = {"max_steps": 4, "num_eval_puzzles": 5, "dataset_id_or_path": "24.jsonl"}
    arguments = [*command("runs/24", **changes), "--reward_funcs", *rewards]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=folder)


def test_own_rewards_and_data_train_and_the_run_is_evaluated_elsewhere(own_task):
    rewards = ["format", "my_task.brackets", "my_task.py:short", "my_task.for_some"]
    done = train_own(own_task, *rewards)
    assert done.returncode == 0, done.stderr
    run_dir = own_task / "runs" / "24"
    history = json.loads((run_dir / STATE_FILE).read_text())["log_history"]
    names = {"format_reward", "brackets", "short", "for_some"}
    assert {f"rewards/{name}/mean" for name in names} <= history[1].keys()
    samples = read_samples(run_dir / "samples" / ALL_FILE)
    assert {frozenset(sample.rewards) for sample in samples} == {frozenset(names)}
    assert {sample.rewards["for_some"] for sample in samples} == {None, 0.5}
    elsewhere = own_task / "elsewhere"
    elsewhere.mkdir()
    mini_r1 = [sys.executable, "-m", "mini_r1", "eval", str(run_dir), "--json"]
    done = subprocess.run(mini_r1, capture_output=True, text=True, timeout=300, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    after = json.loads((run_dir / "eval" / "after.json").read_text())
    assert json.loads(done.stdout)["success"] == after["success"]


@pytest.mark.minutes
def test_a_reward_that_is_no_number_ends_the_run_with_one_line(own_task):
    done = train_own(own_task, "format", "my_task.broken")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the reward my_task.broken returned, in step 3, nan for completion 1 of 64, '" in line
    run_dir = own_task / "runs" / "24"
    assert line.endswith(
        "; checkpoint-2 is the newest checkpoint, the batch is kept in runs/24/failed-batch.json"
    )
    assert newest(run_dir) == 2
    batch = json.loads((run_dir / FAILED_BATCH_FILE).read_text())
    assert (batch["step"], len(batch["micro_batches"])) == (3, 2)
    written = [each for batch in batch["micro_batches"] for each in batch["completions"]]
    assert {frozenset(each["rewards"]) for each in written} == {
        frozenset({"format_reward", "broken"})
    }
    assert {each["rewards"]["broken"] for each in written} == {None}

    # The reward mended: the same command goes on from the last good checkpoint.
    own = own_task / "my_task.py"
    own.write_text(own.read_text().replace('"nan" if', '"1" if'))
    done = train_own(own_task, "format", "my_task.broken")
    assert done.returncode == 0, done.stderr
    assert "resuming from runs/24/checkpoint-2" in done.stdout
    assert not (run_dir / FAILED_BATCH_FILE).exists()
    assert newest(run_dir) == 4


def newest(run_dir):
    """The step of the newest checkpoint; all of them are complete, and hold numbers only."""
    steps = []
    for folder in run_dir.glob("checkpoint-*"):
        assert (folder / COMPLETE_MARKER).exists()
        weights = load_file(folder / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
        steps.append(int(folder.name.rpartition("-")[2]))
    return max(steps, default=None)


@pytest.mark.minutes
def test_a_learning_rate_far_too_high_ends_the_run_before_nan_is_saved(tmp_path):
    changes = {"save_steps": 1, "steps_per_generation": 2, "num_eval_puzzles": 2}
    again = ""
    for _ in range(2):
        done = train(tmp_path / "run", learning_rate=1e3, **changes)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        step = int(re.search(r" became nan in step (\d+), with learning_rate 1000 and ", line)[1])
        kept = f"checkpoint-{step - 1} is the newest checkpoint{again}, the batch is kept in "
        assert kept in line
        assert newest(tmp_path / "run") == step - 1
        again = " (if this comes again, remove it: it leads here)"


def test_weights_that_are_nan_from_the_start_are_refused(tmp_path):
    base = shutil.copytree(model_path("tiny_base"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    done = train(tmp_path / "run", model_name_or_path=base)
    assert done.returncode == 2
    said = f"error: --model_name_or_path: '{base}' cannot be used: its weight model.norm.weight "
    assert done.stderr.splitlines()[-1].startswith(f"{said}holds NaN or infinity; ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / RECIPE_FILE).exists()


@pytest.mark.minutes
def test_why_nothing_is_learned_is_said_once_also_after_a_resume(own_task):
    changes = {
        "max_steps": 24,
        "save_steps": 11,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "max_completion_length": 4,
        "num_eval_puzzles": 2,
        "dataset_id_or_path": "24.jsonl",
    }
    arguments = [*command("runs/24", **changes), "--reward_funcs", "format", "my_task.nothing"]

    def outcome():
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=own_task)
        assert done.returncode == 0, done.stderr
        run_dir = own_task / "runs" / "24"
        history = json.loads((run_dir / STATE_FILE).read_text())["log_history"]
        ((step, line),) = [(e["step"], e["diagnosis"]) for e in history if "diagnosis" in e]
        assert step == 20
        assert (run_dir / "report.html").read_text().count(line) == 1
        return line, done.stdout.count(line)

    line, times = outcome()
    assert times == 1
    assert line == (
        "step 20: nothing was learned from rewards for 20 steps: 100% of the completions were cut "
        "at max_completion_length; raise it (4)"
    )
    run_dir = own_task / "runs" / "24"
    # Killed after it was said, and before.
    for lost, times in ((["checkpoint-24"], 0), (["checkpoint-24", "checkpoint-22"], 1)):
        for name in lost:
            shutil.rmtree(run_dir / name)
        for file in (SUMMARY_FILE, "model.safetensors", "report.html", "eval/after.json"):
            (run_dir / file).unlink()
        assert outcome() == (line, times)


@pytest.mark.minutes
def test_lora_dtype_and_scheduled_evaluation(tmp_path):
    run_dir = tmp_path / "lora"
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
    changes = {"dtype": "bfloat16", "eval_strategy": "steps", "eval_steps": 2}
    done = train(run_dir, max_steps=4, **lora, **changes)
    assert done.returncode == 0, done.stderr
    adapter = load_file(run_dir / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {4}
    assert json.loads((run_dir / "eval" / "step-000002.json").read_text())["step"] == 2
    after = json.loads((run_dir / "eval" / "after.json").read_text())
    assert after["num_puzzles"] == 20
    assert evaluate_model(str(run_dir), num_puzzles=20)["num_puzzles"] == 20


def on_a_terminal(arguments, ctrl_c_when=(), columns=1000):
    """Run a command on a real terminal: a pty, read by a terminal emulator.

    Args:
        ctrl_c_when: what the screen must show for Ctrl-C to be pressed, once for each.
        columns: of the screen; the command that goes on fits a line.

    Returns:
        the exit code, the screen, and the seconds from the last Ctrl-C to the end.
    """
    screen = pyte.Screen(columns, 50)
    stream = pyte.ByteStream(screen)
    pid, parent_end = pty.fork()
    if pid == 0:
        os.execve(arguments[0], arguments, {**os.environ, "TERM": "xterm"})
    fcntl.ioctl(parent_end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    waiting, pressed = list(ctrl_c_when), 0.0
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while content := os.read(parent_end, 65536):
            stream.feed(content)
            if waiting and re.search(waiting[0], "\n".join(screen.display)):
                os.write(parent_end, b"\x03")
                waiting, pressed = waiting[1:], time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert waiting == []
    return code, screen, time.monotonic() - pressed


def test_on_a_terminal_a_panel_lives(tmp_path):
    """One panel, redrawn in place, and the closing lines below it."""
    code, screen, _ = on_a_terminal(command(tmp_path / "run"), columns=100)
    assert code == 0
    shown = "\n".join(line.rstrip() for line in screen.display)
    assert shown.count("╭─ Mini-R1: run ") == 1
    for pattern in (
        r"│ step 6/6 ━+ 0\.0 minutes left",
        r"│ ended, 0:0\d:\d\d elapsed",
        r"success \d+%",
        r"training success [▁▂▃▄▅▆▇█]+ ",
        r"held-out success [\d.]+% at step 6",
        r"make \d+ from .*(solved|failed)",
        "no signal: groups of equal rewards",
    ):
        assert re.search(pattern, shown), pattern
    assert shown.index("╰─") < shown.index("held-out success  ")
    assert not screen.cursor.hidden


def test_ctrl_c_saves_and_the_command_it_names_goes_on(straight, tmp_path):
    run_dir = tmp_path / "run"
    arguments = command(run_dir)
    code, screen, _ = on_a_terminal(arguments, ["│ (sampling|learning), "])
    assert code == 130
    shown = "\n".join(line.rstrip() for line in screen.display)
    assert shown.count("╭─ Mini-R1: run ") == 1
    assert "saving after this step; Ctrl-C again to stop now" in shown[: shown.index("╭─")]
    assert not screen.cursor.hidden
    assert "Traceback" not in shown
    assert "^C" not in shown
    (step, typed) = re.search(r"paused after step (\d) of 6; to go on: (.+)", shown).groups()
    assert shlex.split(typed) == arguments
    assert (run_dir / PAUSED_MARKER).read_text() == f"{step}\n"

    done = subprocess.run(shlex.split(typed), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {run_dir / f'checkpoint-{step}'}" in done.stdout
    assert_same_outcome(run_dir, straight[0])


@pytest.mark.minutes
def test_the_second_ctrl_c_and_one_before_the_first_step_end_it_at_once(tmp_path):
    long = {"gradient_accumulation_steps": 64, "steps_per_generation": 64}
    arguments = command(tmp_path / "run", **long, max_completion_length=100, num_eval_puzzles=4)
    when = {
        ("│ (sampling|learning), ", "saving after this step"): "stopped; nothing was saved yet; ",
        ("│ evaluating, ",): "interrupted; ",
    }
    for ctrl_c_when, said in when.items():
        code, screen, seconds = on_a_terminal(arguments, ctrl_c_when)
        assert code == 130
        assert seconds < 10
        shown = "\n".join(line.rstrip() for line in screen.display)
        assert f"\n{said}to go on: {shlex.join(arguments)}" in shown
        assert "Traceback" not in shown
        assert not screen.cursor.hidden
        assert not (tmp_path / "run" / PAUSED_MARKER).exists()


@pytest.mark.parametrize("seconds", [0.5, 2])
def test_ctrl_c_in_the_slow_imports_is_one_line(tmp_path, seconds):
    process = subprocess.Popen(
        command(tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("interrupted; to go on: ")
    assert len(errors.splitlines()) == 1


def test_wandb_and_trackio_get_the_scalars_and_stay_in_the_run_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"
    arguments = command(run_dir, max_steps=2)
    done = subprocess.run(
        [*arguments, "--report_to", "wandb", "trackio"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    (database,) = (path for path in run_dir.glob("trackio/*.db"))
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("select metrics from metrics").fetchall()
    logged = b" ".join(metrics for (metrics,) in rows).decode()
    for name in ("train/reward", "train/behaviors/tries", "eval/success"):
        assert name in logged
    assert not (run_dir / "tensorboard").exists()
    elsewhere = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()]
    # wandb's program logs, which say nothing of the run.
    assert all("debug" in name for name in elsewhere)
