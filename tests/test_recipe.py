import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from mini_r1 import InputError, keys, recipe
from mini_r1.catalog import recipe_table
from mini_r1.recipe import TRAINING_DEFAULTS, TaskConfig, find_recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
MINIMAL = "model_name_or_path: tiny_base\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_accepted(path):
    assert load_recipe(path).run_dir == Path("runs") / path.stem


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        ([], ("a1", "b2")),
        (["--model_name_or_path", "tiny_base"], (None, "b2")),
        (["--dataset_id_or_path", "owner/other"], ("a1", None)),
        (["--dataset_id_or_path", "owner/other", "--dataset_revision", "c3"], ("a1", "c3")),
    ],
)
def test_a_revision_goes_with_the_name_beside_it(write, overrides, left):
    path = write(
        "model_name_or_path: owner/model\nmodel_revision: a1\n"
        "dataset_id_or_path: owner/data\ndataset_revision: b2\n"
    )
    recipe = load_recipe(path, overrides)
    assert (recipe.model.get("model_revision"), recipe.task.dataset_revision) == left


def test_the_resolved_recipe_is_read_back_as_itself(write, tmp_path):
    resolved = load_recipe(RECIPES[0])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(resolved.as_dict()))
    assert load_recipe(again).as_dict() == resolved.as_dict()


def test_overrides(write):
    path = write(MINIMAL + "seed: 1\n")
    rewards = ["--reward_funcs", "equation", "--reward_weights", "0.5"]
    resolved = load_recipe(path, ["--seed", "7", "--learning-rate=5e-7", *rewards, "--use_cpu"])
    assert resolved.training["seed"] == 7
    assert resolved.training["learning_rate"] == 5e-7
    assert resolved.training["use_cpu"] is True
    assert resolved.training["reward_weights"] == [0.5]
    assert resolved.task.reward_funcs == ("equation",)


def test_yaml_traps_are_mended(write):
    path = write(MINIMAL + "learning_rate: 5e-7\nsave_strategy: no\nreport_to: none\n")
    training = load_recipe(path).training
    assert training["learning_rate"] == 5e-7
    assert training["save_strategy"] == "no"
    assert training["report_to"] == "none"


# A line of a recipe, and what must be said about it; more lines are put apart by |.
MISTAKES = {
    # keys
    "learning_rat: 1": "line 2: unknown key 'learning_rat'; did you mean 'learning_rate'?",
    "num_generation: 8": "did you mean 'num_generations'?",
    "xyz: 8": "line 2: unknown key 'xyz'; see 'mini-r1 recipes --keys'",
    "no: 8": "line 2: unknown key 'no'",
    "max_steps: 1|max_steps: 2": "line 3: max_steps is set twice; first in 2",
    "resume_from_checkpoint: x": "line 2: resume_from_checkpoint: a run resumes by itself",
    "parallelism_config: {a: 1}": "parallelism_config: cannot be written in a recipe",
    # types
    "seed: one": "line 2: seed: want an integer, got 'one'",
    "seed: '1'": "seed: want an integer, got '1'",
    "seed: 1.0": "seed: want an integer, got 1.0",
    "seed: 0x10": "seed: want an integer, got 0x10",
    "seed:": "seed: want an integer, got nothing",
    "seed: ~": "seed: want an integer, got ~",
    "seed: [1]": "seed: want an integer, got a list",
    "seed: {a: 1}": "seed: want an integer, got a mapping",
    "num_puzzles: true": "num_puzzles: want an integer, got true",
    "num_eval_samples: yes": "num_eval_samples: want an integer, got yes",
    "num_numbers: [3, x]": "num_numbers: want an integer, got 'x'",
    "num_numbers: [true]": "num_numbers: want an integer, got true",
    "number_range: [1, 2, 3]": "number_range: want 2 values, got 3",
    "number_range: 5": "number_range: want 2 values, got 1",
    "bf16: 1": "bf16: want true or false, got 1",
    "bf16: ja": "bf16: want true or false, got 'ja'",
    "run_name: [a]": "run_name: want text, got a list",
    "dataset_split: null": "dataset_split: want text, got null",
    "reward_funcs: {format: 1}": "reward_funcs: want a list, got a mapping",
    "generation_kwargs: 5": "generation_kwargs: want a mapping, got '5'",
    "model_init_kwargs: '{\"a\": 1'": "model_init_kwargs: want a mapping",
    "num_generations: null": "num_generations: want an integer, got null",
    "max_completion_length:": "max_completion_length: want an integer, got nothing",
    "report_to: null": "report_to: want",
    "output_dir: ~": "output_dir: want text, got ~",
    # numbers: none of these means what a run could do
    "max_steps: -3": "line 2: max_steps: want -1 or at least 1, got -3",
    "max_steps: 0": "max_steps: want -1 or at least 1, got 0",
    "num_train_epochs: 0": "num_train_epochs: want more than 0, got 0",
    "per_device_train_batch_size: 0": "per_device_train_batch_size: want at least 1, got 0",
    "gradient_accumulation_steps: -1": "gradient_accumulation_steps: want at least 1, got -1",
    "steps_per_generation: 0": "steps_per_generation: want at least 1, got 0",
    "generation_batch_size: 0": "generation_batch_size: want at least 1, got 0",
    "learning_rate: 0": "learning_rate: want more than 0, got 0",
    "learning_rate: -1e-6": "learning_rate: want more than 0, got -1e-06",
    "temperature: -1": "temperature: want more than 0, got -1",
    "temperature: .nan": "temperature: want a finite number, got .nan",
    "temperature: nan": "temperature: want a finite number, got nan",
    "temperature: -.inf": "temperature: want a finite number, got -.inf",
    "temperature: 1e400": "temperature: want a finite number, got 1e400",
    "top_p: 0": "top_p: want more than 0 and at most 1, got 0",
    "top_p: 1.1": "top_p: want more than 0 and at most 1, got 1.1",
    "top_k: -1": "top_k: want at least 0, got -1",
    "min_p: 2": "min_p: want 0 to 1, got 2",
    "repetition_penalty: 0": "repetition_penalty: want more than 0, got 0",
    "beta: -1": "beta: want at least 0, got -1",
    "epsilon: 0": "epsilon: want more than 0, got 0",
    "epsilon_high: -0.1": "epsilon_high: want more than 0, got -0.1",
    "delta: 0": "delta: want more than 0, got 0",
    "num_iterations: 0": "num_iterations: want at least 1, got 0",
    "max_completion_length: 0": "max_completion_length: want at least 1, got 0",
    "max_grad_norm: -1": "max_grad_norm: want at least 0, got -1",
    "weight_decay: -1": "weight_decay: want at least 0, got -1",
    "adam_beta1: 1": "adam_beta1: want at least 0 and less than 1, got 1",
    "adam_epsilon: 0": "adam_epsilon: want more than 0, got 0",
    "warmup_steps: -0.1": "warmup_steps: want a whole number or a share below 1, at least 0",
    "warmup_steps: 2.5": "warmup_steps: want a whole number or a share below 1",
    "save_steps: 0": "save_steps: want a whole number or a share below 1, more than 0, got 0",
    "save_steps: 2.5": "save_steps: want a whole number or a share below 1",
    "logging_steps: -1": "logging_steps: want a whole number or a share below 1, more than 0",
    "eval_steps: 0.1": "eval_steps: want a whole number, at least 1, got 0.1",
    "save_total_limit: 0": "save_total_limit: want at least 1, got 0",
    "seed: -1": "seed: want 0 to 4294967295, got -1",
    "seed: 4294967296": "seed: want 0 to 4294967295, got 4294967296",
    "split_seed: 9223372036854775808": "split_seed: want less than 2^63",
    "lora_r: 0": "lora_r: want at least 1, got 0",
    "lora_dropout: 1": "lora_dropout: want at least 0 and less than 1, got 1",
    "vllm_gpu_memory_utilization: 1.5": "want more than 0 and less than 1, got 1.5",
    "vllm_server_port: 70000": "vllm_server_port: want 1 to 65535, got 70000",
    "dataloader_num_workers: -1": "dataloader_num_workers: want 0 to 1024, got -1",
    "ddp_timeout: 99999999999": "ddp_timeout: want 1 to 1000000000",
    "reward_weights: [1, .nan]": "reward_weights: want a finite number, got .nan",
    "reward_weights: [1.0]": "reward_weights: 1 weights for 2 reward_funcs",
    "reward_weights: [0, 0]": "reward_weights: all are 0, so nothing would be learned",
    # choices
    "loss_type: gppo": "line 2: loss_type: no 'gppo'; did you mean 'grpo'?",
    "loss_type: GRPO": "loss_type: no 'GRPO'; did you mean 'grpo'?",
    "loss_type: reinforce": "choose from bnpo, cispo, dapo, dr_grpo, grpo, luspo, sapo, vespo",
    "scale_rewards: maybe": "scale_rewards: no 'maybe'; choose from batch, group, none",
    "importance_sampling_level: tokn": "did you mean 'token'?",
    "multi_objective_aggregation: sum": "did you mean 'sum_then_normalize'?",
    "lr_scheduler_type: cosin": "lr_scheduler_type: no 'cosin'; did you mean 'cosine'?",
    "lr_scheduler_type: greedy": "lr_scheduler_type: no 'greedy'; choose from linear",
    "optim: adam": "optim: no 'adam'; did you mean 'adamw_torch'?",
    "save_strategy: best": "save_strategy: no 'best'; choose from no, steps, epoch",
    "eval_strategy: epoch": "eval_strategy: no 'epoch'; choose from no, steps",
    "logging_strategy: step": "logging_strategy: no 'step'; did you mean 'steps'?",
    "hub_strategy: never": "hub_strategy: no 'never'; choose from end, every_save",
    "vllm_mode: servr": "vllm_mode: no 'servr'; did you mean 'server'?",
    "vllm_model_impl: auto": "vllm_model_impl: no 'auto'; choose from vllm, transformers",
    "vllm_importance_sampling_mode: mask": "choose from sequence_mask",
    "dtype: bf16": "dtype: no 'bf16'; did you mean 'bfloat16'?",
    "attn_implementation: flash_attn_2": "did you mean 'flash_attention_2'?",
    "bnb_4bit_quant_type: nf5": "bnb_4bit_quant_type: no 'nf5'; did you mean 'nf4'?",
    "bnb_4bit_quant_storage: int4": "did you mean 'int8'?",
    "report_to: [tensorboard, wandbb]": "report_to: no 'wandbb'; did you mean 'wandb'?",
    "report_to: [none, wandb]": "report_to: all and none stand alone",
    "lora_task_type: SEQ_CLS": "lora_task_type: no 'SEQ_CLS'; choose from CAUSAL_LM",
    "cache_implementation: dynamc": "did you mean 'dynamic'?",
    "log_level: loud": "log_level: no 'loud'; choose from critical",
    "prompt_template: r2": "line 2: prompt_template: no 'r2'; choose from mini-r1",
    # the task
    "reward_funcs: [fromat]": "line 2: reward_funcs: no reward 'fromat'; did you mean 'format'?",
    "reward_funcs: []": "reward_funcs: name at least one reward",
    "number_range: [9, 1]": "number_range: want [low, high]",
    "num_numbers: [9]": "num_numbers: each count is 2 to 6",
    "num_numbers: [3, 3]": "num_numbers: each count once, got [3, 3]",
    "number_range: [1, 2]|target_range: [5000, 6000]": "line 3: target_range: no puzzle: 4 numbers",
    "number_range: [0, 0]": "target_range: no puzzle: 4 numbers up to 0 cannot make 10 or more",
    "num_numbers: 3|number_range: [7, 7]": "num_puzzles: at most 90 different puzzles",
    "test_share: 1.5": "test_share: want more than 0 and less than 1, got 1.5",
    "test_share: .nan": "test_share: want a finite number, got .nan",
    "num_eval_puzzles: 0": "num_eval_puzzles: want at least 1",
    "eval_temperature: 0": "eval_temperature: want more than 0",
    # paths
    "output_dir: ~nobody-at-all/x": "output_dir: no home folder '~nobody-at-all'",
    # keys that are gone
    "torch_dtype: bfloat16": "line 2: torch_dtype: this key is gone; write dtype",
    "warmup_ratio: 0.03": "this key is gone; write warmup_steps: a number below 1 is a share",
    "logging_dir: x": "this key is gone; leave it out: TensorBoard files are in the run folder",
    "dataset_name: x": "this key is gone; write dataset_id_or_path",
}


@pytest.mark.parametrize("lines", MISTAKES)
def test_mistakes_are_explained_in_one_line(write, lines):
    path = write(MINIMAL + lines.replace("|", "\n") + "\n")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert MISTAKES[lines] in str(caught.value)
    assert "\n" not in str(caught.value)
    if "|" not in lines:
        assert str(caught.value).startswith(
            (f"{path} line 2: ", f"{path}: target_range", f"{path}: num_puzzles")
        )


# What is no mistake: a line, and the value it gives.
FINE = {
    "max_steps: -1": -1,
    "warmup_steps: 0.03": 0.03,
    "save_steps: 0.5": 0.5,
    "save_steps: 25.0": 25,
    "learning_rate: 5e-7": 5e-7,
    "seed: 010": 10,
    "seed: 1_000": 1000,
    "top_p: 1": 1,
    "vllm_importance_sampling_clip_max: null": None,
    "reward_weights: [-1, 0]": [-1, 0],
    "save_strategy: no": "no",
    "report_to: none": "none",
    "report_to: wandb": "wandb",
    "scale_rewards: true": "group",
    "scale_rewards: false": "none",
    "use_cpu: yes": True,
    "bf16: Off": False,
    "run_name: 2024-01-01": "2024-01-01",
    "run_name: yes": "yes",
    "model_revision: 0123456": "0123456",
    "run_name: null": None,
    "attn_implementation: kernels-community/flash-attn2": "kernels-community/flash-attn2",
    "lora_target_modules: all-linear": ["all-linear"],
    "debug: [underflow_overflow]": ["underflow_overflow"],
    "model_init_kwargs: {use_kernels: no, x: [1, 2.5, a, null]}": {
        "use_kernels": False,
        "x": [1, 2.5, "a", None],
    },
    "model_init_kwargs: '{\"use_kernels\": true}'": {"use_kernels": True},
    "deepspeed: zero3.json": "zero3.json",
    "use_liger_kernel: false": False,
    "pad_to_multiple_of: 8": 8,
    "pad_to_multiple_of: auto": "auto",
    "trackio_static_space_id: false": False,
    "include_num_input_tokens_seen: non_padding": "non_padding",
}


@pytest.mark.parametrize("line", FINE)
def test_the_type_of_a_key_says_what_its_value_is(write, line):
    recipe = load_recipe(write(f"{MINIMAL}{line}\n"))
    value = recipe.get(line.partition(":")[0])
    assert (value, type(value)) == (FINE[line], type(FINE[line]))


def test_all_mistakes_are_told_at_once(write):
    started = time.process_time()
    for lines in list(MISTAKES)[::5]:
        with pytest.raises(InputError):
            load_recipe(write(MINIMAL + lines.replace("|", "\n") + "\n"))
    assert time.process_time() - started < 0.05 * len(MISTAKES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--max_steps", "-3"], "--max_steps: want -1 or at least 1, got -3"),
        (["--max_steps=-3"], "--max_steps: want -1 or at least 1, got -3"),
        (["--loss-type", "gppo"], "--loss_type: no 'gppo'; did you mean 'grpo'?"),
        (["--learning_rate", "much"], "--learning_rate: want a number, got 'much'"),
        (["--output_dir"], "--output_dir: no value"),
        (["--seed", "--use_cpu"], "--seed: no value"),
        (["--seed", "1", "2"], "--seed: want an integer, got a list"),
        (["--seed", "[1"], "--seed: not valid YAML: while parsing a flow sequence"),
        (["--output_dir=~"], "--output_dir: want text, got ~"),
        (["--torch_dtype", "x"], "--torch_dtype: this key is gone; write dtype"),
        (["--learning_rat", "1"], "--learning_rat: unknown key 'learning_rat'; did you mean"),
        (["seed", "1"], "'seed': want --key value"),
        (["--num_train_epochs", "1", "--max_steps", "2"], "leave one of them out"),
    ],
)
def test_mistakes_on_the_command_line(write, overrides, message):
    with pytest.raises(InputError) as caught:
        load_recipe(write(MINIMAL), overrides)
    assert str(caught.value).startswith(message) or message in str(caught.value)
    assert str(caught.value).count(overrides[0].partition("=")[0]) <= 1
    assert "\n" not in str(caught.value)


def test_a_text_on_the_command_line_is_taken_as_it_stands(write):
    words = {
        "run_name": "a: b # c",
        "vllm_structured_outputs_regex": "[a-z]+",
        "hub_model_id": "*x",
        "project": "5",
    }
    overrides = [word for key, text in words.items() for word in (f"--{key}", text)]
    recipe = load_recipe(write(MINIMAL), overrides)
    assert {key: recipe.get(key) for key in words} == words
    recipe = load_recipe(write(MINIMAL), ["--run_name", "'quoted'", "--hub_model_id", "null"])
    assert (recipe.get("run_name"), recipe.get("hub_model_id")) == ("quoted", None)


def test_one_way_to_say_how_long(write):
    by_epochs = write(f"{MINIMAL}num_train_epochs: 2\n")
    training = load_recipe(by_epochs, ["--max_steps", "5"]).training
    assert training["max_steps"] == 5
    assert "num_train_epochs" not in training
    assert load_recipe(by_epochs, ["--max_steps", "-1"]).training["num_train_epochs"] == 2
    by_steps = write(f"{MINIMAL}max_steps: 5\n")
    training = load_recipe(by_steps, ["--num_train_epochs", "2"]).training
    assert training["num_train_epochs"] == 2
    assert "max_steps" not in training
    both = write(f"{MINIMAL}max_steps: 5\nnum_train_epochs: 2\n")
    with pytest.raises(InputError, match="line 3: num_train_epochs: max_steps: 5 says how long"):
        load_recipe(both)


def test_the_home_folder_is_written_out(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write(
        "model_name_or_path: ~/models/x\ndataset_id_or_path: ~/data.jsonl\noutput_dir: ~/runs/x\n"
    )
    recipe = load_recipe(path)
    assert recipe.model["model_name_or_path"] == "/home/me/models/x"
    assert recipe.task.dataset_id_or_path == "/home/me/data.jsonl"
    assert recipe.run_dir == Path("/home/me/runs/x")
    assert "~" not in yaml.safe_dump(recipe.as_dict())
    assert load_recipe(path, ["--output_dir=~/y"]).run_dir == Path("/home/me/y")
    assert load_recipe(path, ["--deepspeed", "~/z.json"]).get("deepspeed") == "/home/me/z.json"
    assert load_recipe(path, ["--run_name", "a~/b"]).get("run_name") == "a~/b"


# ---- Names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "hub_token: abc",
        f"hub_token: hf_{'x' * 34}",
        f"model_init_kwargs: {{token: hf_{'x' * 34}}}",
        f"hub_model_id: me/hf_{'x' * 34}",
        "vllm_server_base_url: http://me:abc@node:8000",
    ],
)
def test_a_secret_is_refused_and_not_repeated(write, line):
    for arguments in ((f"{MINIMAL}{line}\n", []), (MINIMAL, [f"--{line.replace(': ', '=', 1)}"])):
        with pytest.raises(InputError, match="no place for a secret") as caught:
            load_recipe(write(arguments[0]), arguments[1])
        assert "xxx" not in str(caught.value)
        assert "abc" not in str(caught.value)


def test_a_recipe_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(RECIPES[0].parents[1])
    assert find_recipe("tiny-cpu") == find_recipe("tiny-cpu.yaml") == Path("recipes/tiny-cpu.yaml")
    assert load_recipe("grpo-qwen-2.5-3b-1gpu").name == "grpo-qwen-2.5-3b-1gpu"
    # Elsewhere, too; but what is here comes first, if it is a file.
    monkeypatch.chdir(tmp_path)
    assert find_recipe("tiny-cpu") == RECIPES[0].parent / "tiny-cpu.yaml"
    (tmp_path / "tiny-cpu").mkdir()
    assert find_recipe("tiny-cpu") == RECIPES[0].parent / "tiny-cpu.yaml"
    (tmp_path / "tiny-cpu.yaml").write_text(MINIMAL)
    assert find_recipe("tiny-cpu") == Path("tiny-cpu.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_recipe("~/tiny-cpu.yaml") == Path("tiny-cpu.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-cp", "tiny-cp: no such recipe; did you mean 'tiny-cpu'?"),
        ("tiny-cpu.yml", "did you mean 'tiny-cpu'?"),
        ("recipes/tiny-cpu-hrd.yaml", "did you mean 'tiny-cpu-hard'?"),
        ("no-such.yaml", "no-such.yaml: no such recipe; 'mini-r1 recipes' lists"),
        ("mien.yaml", "mien.yaml: no such recipe; did you mean 'mine.yaml'?"),
        (".", ".: a folder; want a recipe, a YAML file"),
        ("", ".: a folder"),
        ("/dev/zero", "/dev/zero: no ordinary file"),
        ("fifo", "fifo: no ordinary file"),
        ("x" * 5000, "(5000 characters): cannot be read: File name too long"),
        ("a\0b", "no such recipe"),
    ],
)
def test_a_recipe_that_is_not_there(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError) as caught:
        load_recipe(name)
    assert message in str(caught.value)


def test_recipes_and_launch_configs_come_with_an_installed_package(tmp_path):
    """From a wheel, away from any checkout."""
    root = RECIPES[0].parents[1]
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__", "*.safetensors")
    for name in ("src", "recipes", "configs", "scripts"):
        shutil.copytree(root / name, checkout / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, checkout)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(checkout)], check=True)
    shutil.rmtree(checkout)

    def mini_r1(*arguments):
        command = [sys.executable, "-m", "mini_r1", *arguments]
        env = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    assert mini_r1("recipes").stdout == f"{recipe_table(root / 'recipes')}\n"
    two = ("--gpus", "2", "--gpu-memory", "80", "--dry-run")
    for arguments in (("tiny-cpu", "--dry-run"), ("tiny-cpu", *two, "--use_cpu", "false")):
        plan = mini_r1("train", *arguments).stdout
        words = plan.partition("command ")[2].split()
        files = [word for word in words if word.endswith((".py", ".yaml"))]
        assert len(files) >= 2, plan
        assert [file for file in files if not (tmp_path / file).is_file()] == []
    done = mini_r1("slurm", "tiny-cpu", "--dry-run")
    assert done.returncode == 2
    assert "run from a clone of the repository" in done.stderr


# ---- Keys of older libraries ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{stop_strings: [</answer>]}", "stop_strings: it wants the tokenizer"),
        ("{num_return_sequences: 2}", "num_return_sequences: write num_generations"),
        ("{return_dict_in_generate: true}", "return_dict_in_generate: TRL wants the tokens alone"),
        ("{temperature: 0}", "temperature: write it as a key of the recipe"),
        ("{min_new_token: 2}", "min_new_token: unknown; did you mean 'min_new_tokens'?"),
        ("{stop: [x]}", "stop: unknown"),
        ("hello", "want a mapping, got 'hello'"),
    ],
)
def test_generation_kwargs_that_cannot_be_met_are_refused(write, given, message):
    path = write(f"{MINIMAL}generation_kwargs: {given}\n")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path} line 2: generation_kwargs: {message}")
    assert "\n" not in str(caught.value)


def test_generation_kwargs_are_those_of_who_generates(write):
    path = write(f"{MINIMAL}generation_kwargs: {{min_new_tokens: 2}}\n")
    assert load_recipe(path).get("generation_kwargs") == {"min_new_tokens": 2}
    path = write(f"{MINIMAL}use_vllm: true\ngeneration_kwargs: {{stop: [x], seed: 1}}\n")
    assert load_recipe(path).get("generation_kwargs") == {"stop": ["x"], "seed": 1}
    path = write(f"{MINIMAL}use_vllm: true\ngeneration_kwargs: {{n: 2}}\n")
    with pytest.raises(InputError, match="n: write num_generations"):
        load_recipe(path)


def test_a_mapping_may_be_json_as_trl_takes_it(write):
    path = write(f"""{MINIMAL}chat_template_kwargs: '{{"enable_thinking": false}}'\n""")
    assert load_recipe(path).get("chat_template_kwargs") == {"enable_thinking": False}


def test_a_recipe_for_the_tutorials_trl_gets_a_table(write):
    with pytest.raises(InputError) as caught:
        load_recipe(
            write(
                MINIMAL
                + "torch_dtype: bfloat16\nwarmup_ratio: 0.03\nvllm_device: auto\n"
                + "per_device_train_batch_size: 1\n"
            )
        )
    headline, *rows = str(caught.value).splitlines()
    assert "written for TRL 0.14, this is 1.16; instead of" in headline
    assert [row.split()[0] for row in rows] == [
        "torch_dtype",
        "warmup_ratio",
        "vllm_device",
        "per_device_train_batch_size",
    ]
    assert "counts completions, not prompts" in rows[-1]


def test_no_old_key_is_a_key_of_today():
    known = {field.name for field in fields(TaskConfig)}.union(
        *map(keys.keys_of, (keys.MODEL_CLASSES, keys.TRAINING_CLASSES))
    )
    assert known.isdisjoint(recipe.OLD_KEYS)


def test_what_old_keys_name_instead_are_keys_of_today():
    known = {name for keys in recipe.all_keys().values() for name in keys}
    for advice in recipe.OLD_KEYS.values():
        assert advice.startswith(("leave it out: ", "write "))
        if advice.startswith("write "):
            assert re.match(r"write (\w+)", advice)[1] in known


def test_a_recipe_names_its_model(write):
    with pytest.raises(InputError, match="model_name_or_path: missing; write tiny_base"):
        load_recipe(write("seed: 1\n"))


def test_the_keys_read_from_source_are_those_of_the_classes():
    from trl import GRPOConfig, ModelConfig

    assert set(keys.keys_of(keys.TRAINING_CLASSES)) == {
        field.name for field in fields(GRPOConfig) if field.init
    }
    assert set(keys.keys_of(keys.MODEL_CLASSES)) == {
        field.name for field in fields(ModelConfig) if field.init
    }


def test_the_defaults_read_from_source_are_those_of_the_classes():
    from trl import GRPOConfig, ModelConfig

    worked_out = set()
    for field in (*fields(ModelConfig), *fields(GRPOConfig)):
        if field.init and field.name not in TRAINING_DEFAULTS:
            theirs = None if field.default is MISSING else field.default
            if recipe.default_of(field.name) != theirs:
                worked_out.add(field.name)
    # Those whose default is an expression; None stands for it.
    assert worked_out == {"optim"}
    assert recipe.default_of("optim") is None


def test_our_own_defaults_are_few():
    assert TRAINING_DEFAULTS == {
        "report_to": ["tensorboard"],
        "logging_steps": 1,
        "max_completion_length": 1024,
        "save_total_limit": 2,
    }


def test_get_asks_the_recipe_first_then_us_then_the_library(write):
    loaded = load_recipe(write(MINIMAL + "num_generations: 4\n"))
    assert loaded.get("num_generations") == 4
    assert loaded.get("max_completion_length") == 1024
    assert loaded.get("gradient_checkpointing") is True  # TRL's; transformers' is False
    assert loaded.get("dtype") == "float32"
    with pytest.raises(KeyError):
        loaded.get("num_generation")


def test_no_key_has_two_owners():
    task = {field.name for field in fields(TaskConfig)}
    model, training = (
        set(keys.keys_of(classes)) for classes in (keys.MODEL_CLASSES, keys.TRAINING_CLASSES)
    )
    assert not task & model
    assert not task & training
    assert model & training <= {"trust_remote_code"}


@pytest.mark.parametrize(
    "command",
    [
        [Path(sys.executable).parent / "mini-r1", "train"],
        [sys.executable, "scripts/run_r1_grpo.py", "--config"],
    ],
)
def test_a_misspelt_key_ends_in_seconds_with_exit_code_2(write, command):
    path = write(MINIMAL + "learning_rat: 1\n")
    started = time.perf_counter()
    done = subprocess.run(
        [*command, path], capture_output=True, text=True, cwd=RECIPES[0].parents[1]
    )
    assert time.perf_counter() - started < 2
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean 'learning_rate'?" in done.stderr


# ---- Another task ---------------------------------------------------------------------------


def own(write, folder, lines="", prompt="<think>"):
    (folder / "my_task.py").write_text("def f(completions, **columns): return [0.0]\n")
    (folder / "p.jinja").write_text(f"{{{{ words }}}}{prompt}")
    return write(f"{MINIMAL}dataset_id_or_path: x.jsonl\nprompt_template: p.jinja\n{lines}")


@pytest.mark.parametrize(
    ("lines", "countdown", "success"),
    [
        ("reward_funcs: [my_task.f]", False, "my_task.f"),
        ("reward_funcs: [format, my_task.f]", False, "format"),
        ("reward_funcs: [format, my_task.f]\neval_reward: my_task.f", False, "my_task.f"),
        ("reward_funcs: [my_task.f, equation]", True, "equation"),
        ("reward_funcs: [my_task.f]\nprompt_template: compact", True, "equation"),
        ("reward_funcs: [my_task.f]\ndataset_id_or_path: generated", True, "equation"),
        ("eval_reward: format", True, "format"),
    ],
)
def test_what_is_a_number_puzzle_and_what_is_success(write, own_folder, lines, countdown, success):
    text = own(write, own_folder).read_text()
    for line in lines.splitlines():
        key = line.partition(":")[0]
        text = "".join(each for each in text.splitlines(True) if not each.startswith(f"{key}:"))
        text += f"{line}\n"
    task = load_recipe(write(text)).task
    assert (task.is_countdown, task.success_reward) == (countdown, success)


@pytest.mark.parametrize(
    ("lines", "prompt", "message"),
    [
        ("eval_reward: my_task.g", "<think>", "line 5: eval_reward: my_task.py has no 'g'"),
        (
            "reward_funcs: [format, my_task.f]",
            "A:",
            "line 3: prompt_template: the reward format wants a prompt that ends in <think>",
        ),
        ("", "{{", "line 3: prompt_template: p.jinja: "),
    ],
)
def test_prompt_and_rewards_must_fit(write, own_folder, lines, prompt, message):
    lines = lines if "reward_funcs" in lines else f"reward_funcs: [my_task.f]\n{lines}"
    with pytest.raises(InputError) as caught:
        load_recipe(own(write, own_folder, lines, prompt))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_template_is_no_file(write):
    with pytest.raises(InputError, match="prompt_template: no 'tinyzer'; did you mean 'tinyzero'"):
        load_recipe(write(f"{MINIMAL}prompt_template: tinyzer\n"))


def test_generated_puzzles_have_no_further_columns(write, own_folder):
    (own_folder / "my_task.py").write_text("def f(completions, level, **columns): return [0.0]\n")
    with pytest.raises(InputError, match=r"line 2: reward_funcs: 'my_task.f' wants 'level'"):
        load_recipe(write(f"{MINIMAL}reward_funcs: [my_task.f]\n"))
