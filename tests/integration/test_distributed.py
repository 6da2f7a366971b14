"""Two processes on this CPU: gradient averaging (DDP over gloo) and DeepSpeed ZeRO.

With the launch configs that users get.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mini_r1.model import load_model, model_path
from mini_r1.rollouts import ALL_FILE
from mini_r1.run import (
    COMPLETE_MARKER,
    MANIFEST_FILE,
    PAUSED_MARKER,
    RECIPE_FILE,
    STATE_FILE,
    SUMMARY_FILE,
)

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate_configs"
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TWO = [*LAUNCH, "--num_processes", "2"]
SHARDED = [*TWO, "--mixed_precision", "no"]
LAUNCHERS = {
    "single": [sys.executable],
    "ddp": [*TWO, "--config_file", str(CONFIGS / "cpu.yaml")],
    "zero2": [*SHARDED, "--config_file", str(CONFIGS / "deepspeed_zero2.yaml")],
    "zero3": [*SHARDED, "--config_file", str(CONFIGS / "deepspeed_zero3.yaml")],
}
SAMPLES = f"samples/{ALL_FILE}"
RECIPE = ROOT / "recipes" / "tiny-cpu.yaml"
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 1e-2}
AS_ON_A_GPU = {
    "bf16": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
}
SHORT = {
    "max_steps": 4,
    "save_steps": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_generations": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "max_completion_length": 40,
    "num_puzzles": 500,
    "num_eval_puzzles": 20,  # one batch: one process has none of its own
    "num_eval_samples": 1,
}


def train(launcher, run_dir, script=ROOT / "scripts" / "run_r1_grpo.py", **changes):
    batch = 32 if launcher == "single" else 16
    options = {"per_device_train_batch_size": batch, **SHORT, "output_dir": run_dir, **changes}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [*LAUNCHERS[launcher], str(script), "--config", str(RECIPE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_adapters_were_trained(run_dir):
    adapter = load_file(run_dir / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {4}
    # These start at zero.
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_one_process_two_and_two_sharded_learn_the_same(tmp_path):
    trained = {}
    script = ROOT / "tests" / "integration" / "scripted_rollouts.py"
    for launcher in LAUNCHERS:
        train(launcher, tmp_path / launcher, script, max_steps=10)
        trained[launcher] = load_file(tmp_path / launcher / "model.safetensors")
    base = load_file(Path(model_path("tiny_base")) / "model.safetensors")
    assert largest_difference(trained["single"], base) > 5e-4
    for launcher in ("ddp", "zero2", "zero3"):
        assert largest_difference(trained["single"], trained[launcher]) < 1e-5, launcher


@pytest.mark.parametrize("launcher", ["ddp", "zero3"])
def test_a_run_is_one_complete_folder_and_resumes_bit_for_bit(tmp_path, launcher):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    printed = train(launcher, straight)
    assert printed.count("held-out success  ") == 1  # the summary, by one process only
    for file in (SUMMARY_FILE, STATE_FILE, "eval/before.json", "eval/after.json", SAMPLES):
        assert (straight / file).exists(), file
    manifest = json.loads((straight / MANIFEST_FILE).read_text())
    assert manifest["hardware"]["world_size"] == 2
    assert json.loads((straight / "eval" / "before.json").read_text())["num_puzzles"] == 20
    assert load_model(str(straight)).num_parameters() == load_model("tiny_base").num_parameters()

    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    for file in (SUMMARY_FILE, "model.safetensors", "eval/after.json"):
        (resumed / file).unlink()
    recipe = (resumed / RECIPE_FILE).read_text().replace(str(straight), str(resumed))
    (resumed / RECIPE_FILE).write_text(recipe)
    assert "resuming from" in train(launcher, resumed)
    for file in ("model.safetensors", SAMPLES):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes(), file


DENSE = """
def length(completions, **columns):
    return [float(len(text)) for text in completions]
"""


def losses(run_dir):
    history = json.loads((run_dir / STATE_FILE).read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_recomputed_activations_and_16_bit_as_recipes_for_gpus_have_them(tmp_path, launcher):
    (tmp_path / "dense.py").write_text(DENSE)
    how = {"reward_funcs": f"{tmp_path / 'dense.py'}:length", "dtype": "bfloat16", **AS_ON_A_GPU}
    straight, resumed, plain = (tmp_path / name for name in ("straight", "resumed", "plain"))
    train(launcher, straight, **how)
    for folder in (straight, straight / "checkpoint-4"):
        saved = load_file(folder / "model.safetensors")
        assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert load_model(str(straight)).num_parameters() == load_model("tiny_base").num_parameters()
    before, after = (
        json.loads((straight / "eval" / f"{name}.json").read_text()) for name in ("before", "after")
    )
    assert before["num_puzzles"] == after["num_puzzles"] == 20

    for steps in (2, 4):
        printed = train(launcher, resumed, **how, max_steps=steps)
    assert "resuming from" in printed
    for file in ("model.safetensors", SAMPLES):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes(), file

    # DeepSpeed keeps the weights that are trained in 32 bit, whatever the recipe's dtype.
    train(launcher, plain, **{**how, "dtype": "float32", "gradient_checkpointing": False})
    assert losses(plain) == [pytest.approx(each, rel=1e-3, abs=1e-5) for each in losses(straight)]
    assert all(norm > 0.01 for _, norm in losses(straight))


@pytest.mark.parametrize(
    ("launcher", "dtype"), [("single", "float32"), ("single", "bfloat16"), ("ddp", "bfloat16")]
)
def test_qlora_in_real_four_bit_moves_every_adapter_at_a_low_learning_rate(
    tmp_path, launcher, dtype
):
    (tmp_path / "dense.py").write_text(DENSE)  # in each step there is something to learn
    low = {**LORA, **AS_ON_A_GPU, "learning_rate": 1e-5, "dtype": dtype, "load_in_4bit": True}
    train(launcher, tmp_path / "run", **low, reward_funcs=f"{tmp_path / 'dense.py'}:length")
    assert_adapters_were_trained(tmp_path / "run")
    earlier, later = (
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (2, 4)
    )
    moved = [(later[name] != earlier[name]).flatten() for name in later if "lora_A" in name]
    assert torch.cat(moved).float().mean() > 0.99


def test_lora_under_zero3(tmp_path):
    train("zero3", tmp_path / "run", **LORA)
    assert_adapters_were_trained(tmp_path / "run")


ONE_RANK = """
import os
def on_rank_1(completions, trainer_state, **columns):
    wrong = os.environ["RANK"] == "1" and trainer_state.global_step == 1
    return [1.0, float("nan" if wrong else 0.5), *[0.0] * (len(completions) - 2)]
"""


@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_a_nan_on_one_rank_ends_all_at_the_same_step(tmp_path, launcher):
    (tmp_path / "one_rank.py").write_text(ONE_RANK)
    reward = f"{tmp_path / 'one_rank.py'}:on_rank_1"
    options = {**SHORT, "per_device_train_batch_size": 16, "save_steps": 1}
    options |= {"output_dir": tmp_path / "run", "reward_funcs": reward}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    script = str(ROOT / "scripts" / "run_r1_grpo.py")
    done = subprocess.run(
        [*LAUNCHERS[launcher], script, "--config", str(RECIPE), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    (line,) = errors  # by the main process, of the other one's fault
    assert "on_rank_1 returned, in step 2, nan for completion 2 of 16" in line
    assert "checkpoint-1 is the newest checkpoint" in line
    # Both end by themselves; the launcher may hurry the one that is about to.
    assert len(re.findall(r"exitcode  : (?:1|-15) ", done.stderr)) == 2, done.stderr[-3000:]
    batch = json.loads((tmp_path / "run" / "failed-batch.json").read_text())
    assert (batch["step"], batch["process"]) == (2, 1)
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_ctrl_c_reaches_all_processes_and_nothing_else_is_said(tmp_path):
    """As `mini-r1 train` launches them on several GPUs."""
    code = (
        "import sys; from dataclasses import replace\n"
        "from mini_r1.cli import exit_code; from mini_r1.recipe import load_recipe\n"
        "from mini_r1.launch.machine import Machine\n"
        "from mini_r1.launch.plan import launch, make_plan\n"
        "plan = make_plan(load_recipe(sys.argv[1], sys.argv[2:]), Machine(0))\n"
        "two = replace(plan, processes=2, launcher='cpu')\n"
        "sys.exit(exit_code(lambda: launch(two)))"
    )
    run_dir = tmp_path / "run"
    options = {**SHORT, "per_device_train_batch_size": 16, "max_steps": 40, "output_dir": run_dir}
    overrides = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(RECIPE), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run_dir / SAMPLES).exists():  # the first step has begun
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    paused = (run_dir / PAUSED_MARKER).read_text().strip()
    assert (run_dir / f"checkpoint-{paused}" / COMPLETE_MARKER).exists()
    assert errors.count("saving after this step") == 1
    assert errors.count(f"paused after step {paused} of 40; to go on: {sys.executable} -c ") == 1
    assert "Traceback" not in errors + printed
