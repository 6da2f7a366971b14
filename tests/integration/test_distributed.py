"""Two processes on this CPU: gradient averaging (DDP over gloo) and DeepSpeed ZeRO-3, with the launch configs users get."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mini_r1.model import load_model, model_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate_configs"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
LAUNCHERS = {
    "single": [sys.executable],
    "ddp": [*ACCELERATE, "--config_file", str(CONFIGS / "cpu.yaml")],
    "zero2": [*ACCELERATE, "--mixed_precision", "no", "--config_file", str(CONFIGS / "deepspeed_zero2.yaml")],
    "zero3": [*ACCELERATE, "--mixed_precision", "no", "--config_file", str(CONFIGS / "deepspeed_zero3.yaml")],
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
    processes = 1 if launcher == "single" else 2
    options = {"per_device_train_batch_size": 32 // processes, **SHORT, "output_dir": run_dir, **changes}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [*LAUNCHERS[launcher], str(script), "--config", str(ROOT / "recipes" / "tiny-cpu.yaml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_one_process_two_and_two_sharded_learn_the_same(tmp_path):
    trained = {}
    for launcher in LAUNCHERS:
        train(launcher, tmp_path / launcher, ROOT / "tests" / "integration" / "scripted_rollouts.py", max_steps=10)
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
    for file in ("summary.json", "eval/before.json", "eval/after.json", "samples/completion_samples.txt", "trainer_state.json"):
        assert (straight / file).exists(), file
    assert json.loads((straight / "manifest.json").read_text())["hardware"]["world_size"] == 2
    assert json.loads((straight / "eval" / "before.json").read_text())["num_puzzles"] == 20
    assert load_model(str(straight)).num_parameters() == load_model("tiny_base").num_parameters()

    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    for file in ("summary.json", "model.safetensors", "eval/after.json"):
        (resumed / file).unlink()
    recipe = (resumed / "recipe.yaml").read_text().replace(str(straight), str(resumed))
    (resumed / "recipe.yaml").write_text(recipe)
    assert "resuming from" in train(launcher, resumed)
    for file in ("model.safetensors", "samples/completion_samples.txt"):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes(), file


@pytest.mark.parametrize("launcher", ["single", "ddp"])
def test_qlora_in_real_four_bit(tmp_path, launcher):
    train(
        launcher, tmp_path / "run", use_peft=True, load_in_4bit=True, lora_r=4, lora_target_modules="all-linear", learning_rate=1e-2
    )
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {4}
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)  # they start at zero


def test_lora_under_zero3(tmp_path):
    train("zero3", tmp_path / "run", use_peft=True, lora_r=4, lora_target_modules="all-linear", learning_rate=1e-2)
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {4}
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
