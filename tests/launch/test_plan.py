import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.launch import plan
from mini_r1.launch.machine import Machine, this_machine
from mini_r1.launch.plan import check_processes, make_plan
from mini_r1.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
ORIGINAL = RECIPES / "grpo-qwen-2.5-3b-deepseek-r1-countdown.yaml"
TINY = RECIPES / "tiny-cpu.yaml"
ALL_GPUS = ["--num_gpus", "null"]


def planned(recipe, gpus, memory=80, *overrides):
    return make_plan(load_recipe(recipe, overrides), Machine(gpus, memory))


def test_the_original_run():
    found = planned(ORIGINAL, 4)
    assert (found.processes, found.server_gpu, found.launcher) == (3, 3, "deepspeed_zero2")
    assert found.command[:4] == ["accelerate", "launch", "--num_processes", "3"]
    text = str(found)
    assert "3 processes on GPUs 0-2" in text
    assert "a vLLM server on GPU 3" in text
    batch = "192 completions per optimizer step, 24 prompts x 8"
    assert f"{batch}: 3 processes x 8 per device x 8 accumulated" in text
    server = "CUDA_VISIBLE_DEVICES=3 python -m vllm.entrypoints.launchers.api_server.entry"
    assert f"{server} --model Qwen/Qwen2.5-3B-Instruct" in text
    same = "groups whose 8 completions all fail or all succeed teach nothing"
    assert f"{same}: 66% at 5%, 10% at 25%, 1% at 50%" in text


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ([], "bfloat16"),
        (["--dtype", "float32"], "bfloat16"),
        (["--dtype", "float32", "--bf16", "false", "--fp16", "true"], "float16"),
        (["--dtype", "float32", "--bf16", "false"], "float32"),
    ],
)
def test_the_server_generates_in_the_precision_that_the_training_computes_in(changes, dtype):
    command = plan.server_command(load_recipe(ORIGINAL, changes), 8000)
    assert command[command.index("--dtype") + 1] == dtype


def test_the_server_of_an_adapter_loads_its_base_and_not_the_revision_of_the_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    adapter = ["--model_name_or_path", str(tmp_path), "--model_revision", "v2"]
    recipe = load_recipe(ORIGINAL, adapter)
    assert plan.served_model(recipe) == ("owner/base", None)
    assert plan.to_download(recipe) == ["owner/base"]
    original = load_recipe(ORIGINAL, ["--model_revision", "v1"])
    assert plan.to_download(original) == ["Qwen/Qwen2.5-3B-Instruct", "v1"]
    assert plan.to_download(load_recipe(TINY)) == []


def test_the_batch_of_the_published_run_on_eight_gpus():
    # zzlzero/mini-R1: 7 training GPUs, 448 completions per optimizer step.
    found = planned(RECIPES / "grpo-qwen-2.5-3b-8gpu.yaml", 8)
    assert (found.processes, found.server_gpu) == (7, 7)
    assert "448 completions per optimizer step, 56 prompts x 8" in str(found)


@pytest.mark.parametrize("name", ["3b-1gpu", "1.5b-1gpu", "3b-base-1gpu"])
def test_one_gpu_recipes_share_it_with_vllm(name):
    found = planned(RECIPES / f"grpo-qwen-2.5-{name}.yaml", 1)
    assert (found.processes, found.launcher, found.server_gpu) == (1, None, None)
    assert "by vLLM on the training GPUs" in str(found)
    assert "asleep while training" in str(found)
    assert "192 completions" in str(found)


@pytest.mark.parametrize(("name", "memory"), [("3b-lora", 24), ("3b-qlora", 24), ("1.5b-t4", 15)])
def test_what_is_for_a_small_gpu_fits_one(name, memory):
    found = planned(RECIPES / f"grpo-qwen-2.5-{name}.yaml", 1, memory)
    assert (found.processes, found.launcher) == (1, None)
    assert "beware" not in str(found)


def test_qlora_fits_a_small_gpu_and_is_copied_to_several():
    assert planned(RECIPES / "grpo-qwen-2.5-3b-qlora.yaml", 1, 24).launcher is None
    assert planned(RECIPES / "grpo-qwen-2.5-3b-qlora.yaml", 4, 24, *ALL_GPUS).launcher == "ddp"


def test_the_default_recipe_needs_no_gpu():
    found = planned(TINY, 0, 0)
    assert (found.processes, found.launcher) == (1, None)
    assert "1 process on the CPU" in str(found)
    assert planned(TINY, 4).processes == 1  # it says use_cpu


@pytest.mark.parametrize(
    ("recipe", "gpus", "memory", "overrides", "message"),
    [
        (
            ORIGINAL,
            1,
            80,
            [],
            "server needs a GPU of its own beside the training, and this machine has 1; "
            "write vllm_mode: colocate",
        ),
        (ORIGINAL, 0, 0, [], "use_vllm: vLLM needs a GPU and this machine has none"),
        (ORIGINAL, 4, 8, [], "about 27 GiB on each GPU for training and this machine has 8"),
        (
            RECIPES / "grpo-qwen-2.5-3b-1gpu.yaml",
            1,
            24,
            ["--beta", "0"],
            "needs about 58 GiB on each GPU for training and this machine has 24; "
            "write .*use_peft: true",
        ),
        (
            RECIPES / "grpo-qwen-2.5-1.5b-1gpu.yaml",
            1,
            48,
            ["--vllm_enable_sleep_mode", "false"],
            "write vllm_enable_sleep_mode: true",
        ),
        # 3.1 GB of weights, and little beside.
        (
            RECIPES / "grpo-qwen-2.5-1.5b-1gpu.yaml",
            1,
            80,
            ["--vllm_gpu_memory_utilization", "0.04"],
            "utilization: vLLM alone needs about 4 GiB of 80 here, .*; write 0.05",
        ),
        (
            ORIGINAL,
            4,
            80,
            ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"],
            "it counts completions, not prompts: write 8",
        ),
        (
            TINY,
            0,
            0,
            ["--num_generations", "5"],
            "256 completions are sampled at a time, "
            "which cannot be cut into groups of num_generations: 5",
        ),
        (TINY, 0, 0, ["--num_generations", "1"], "num_generations: 1; GRPO compares"),
        # A large prime: found without trying every number up to it.
        (TINY, 0, 0, ["--num_generations", "999999937"], "write 999999937"),
        (TINY, 0, 0, ["--num_iterations", "999999937"], "save_steps: .* write 1999999874"),
        (
            TINY,
            0,
            0,
            ["--generation_batch_size", "256"],
            "give either this or steps_per_generation",
        ),
        (
            TINY,
            0,
            0,
            ["--num_puzzles", "10"],
            "num_puzzles: about 9 prompts to train on, but 16 are sampled at a time; "
            "write at least 22",
        ),
        (
            TINY,
            0,
            0,
            ["--save_steps", "5"],
            "save_steps: 5 is no multiple of the 2 optimizer steps .*; write 6",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_change(recipe, gpus, memory, overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        planned(recipe, gpus, memory, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", ["0.4", "0.1"])  # of which one is too little for vLLM
def test_a_suggested_change_does_fit(share):
    recipe = RECIPES / "grpo-qwen-2.5-1.5b-1gpu.yaml"
    own = ["--vllm_gpu_memory_utilization", share]
    with pytest.raises(InputError, match="write ") as caught:
        planned(recipe, 1, 24, *own)
    changes = str(caught.value).rpartition("write ")[2].split(", ")
    options = [text for change in changes for text in f"--{change}".split(": ")]
    planned(recipe, 1, 24, *own, *options)


def test_mistakes_name_the_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model_name_or_path: tiny_base\ngradient_accumulation_steps: 2\n"
        "steps_per_generation: 8\nsave_steps: 6\n"
    )
    problem = r"mine\.yaml line 4: save_steps: 6 is no multiple of the 4 optimizer steps"
    with pytest.raises(InputError, match=problem):
        planned(path, 0, 0)


def test_the_plan_says_what_each_phase_holds():
    text = str(planned(RECIPES / "grpo-qwen-2.5-3b-qlora.yaml", 1, 24))
    first, *others = text[text.index("memory ") :].splitlines()[:3]
    assert first.startswith(
        "memory      training 7.6 of 24 GiB per training process, an estimate: "
    )
    assert [line[:27] for line in others] == [
        "            generation 7.1:",
        "            evaluation 19.1",
    ]
    assert "KV cache 13.8, overhead 3.0" in others[1]


def test_a_sixteen_bit_model_without_a_wide_copy_is_warned_about():
    recipe = RECIPES / "grpo-qwen-2.5-1.5b-1gpu.yaml"
    assert "rounded away" in str(planned(recipe, 1, 80, "--dtype", "bfloat16"))
    assert "rounded away" not in str(planned(recipe, 1, 80))
    assert "rounded away" not in str(planned(ORIGINAL, 4))


def test_somebody_elses_server_leaves_all_gpus_to_the_training():
    found = planned(ORIGINAL, 4, 80, "--vllm_server_host", "10.0.0.5")
    assert (found.processes, found.server_gpu) == (4, None)
    assert "the vLLM server at http://10.0.0.5:8000" in str(found)


# ---- num_gpus -------------------------------------------------------------------------------

COLOCATED = RECIPES / "grpo-qwen-2.5-1.5b-1gpu.yaml"


@pytest.mark.parametrize(
    ("recipe", "gpus", "overrides", "told"),
    [
        (COLOCATED, 8, [], "1 process on GPU 0 (of 8; num_gpus: 1)"),
        (COLOCATED, 8, ALL_GPUS, "8 processes on GPUs 0-7, launched with"),
        (COLOCATED, 1, [], "1 process on GPU 0"),
        (COLOCATED, 2, ["--num_gpus", "4"], "2 processes on GPUs 0-1 (of 2; num_gpus: 4), launche"),
        (ORIGINAL, 8, [], "3 processes on GPUs 0-2 (of 8; num_gpus: 4), launched"),
    ],
)
def test_a_recipe_takes_as_many_gpus_as_it_says(recipe, gpus, overrides, told):
    found = planned(recipe, gpus, 80, *overrides)
    assert line(str(found), "training").startswith(told)
    assert found.server_gpu in (None, 3)


def test_a_server_and_the_training_need_a_gpu_each():
    with pytest.raises(InputError, match="beside the training, and num_gpus leaves 1; write"):
        planned(ORIGINAL, 8, 80, "--num_gpus", "1")


@pytest.mark.parametrize(
    ("recipe", "processes", "overrides", "problem"),
    [
        (ORIGINAL, 3, [], None),
        (
            ORIGINAL,
            4,
            [],
            "4 training processes on 4 GPUs leave none for the vLLM server; write "
            "--num_processes 3, or give",
        ),
        (
            ORIGINAL,
            3,
            ["--num_gpus", "3"],
            r"on 3 GPUs \(num_gpus: 3\) leave none .*write --num_processes 2, or --num_gpus 4$",
        ),
        (COLOCATED, 1, [], None),
        (
            COLOCATED,
            4,
            [],
            r"4 training processes on 1 GPU \(num_gpus: 1\); write "
            "--num_processes 1, or --num_gpus 4",
        ),
        (COLOCATED, 8, ALL_GPUS, "8 training processes on 4 GPUs; write --num_processes 4$"),
        (TINY, 8, [], None),
    ],
)
def test_a_launch_of_more_processes_than_gpus_is_refused(
    recipe, processes, overrides, problem, monkeypatch
):
    monkeypatch.setattr(plan, "visible_gpus", lambda: ["0", "1", "2", "3"])
    recipe = load_recipe(recipe, overrides)
    if problem is None:
        check_processes(recipe, processes, processes)
    else:
        check_processes(recipe, processes, 1)  # the others are on other machines
        with pytest.raises(InputError, match=problem):
            check_processes(recipe, processes, processes)


@pytest.mark.parametrize(
    ("recipe", "overrides", "in_launch", "left", "served", "told"),
    [
        (ORIGINAL, [], True, "2,5", "7", ""),
        (ORIGINAL, ["--num_gpus", "2"], True, "2", "5", "GPU 2 of 3: num_gpus: 2"),
        (ORIGINAL, [], False, "2", "7", "GPU 2 of 3: this is one process; 'mini-r1 train' starts"),
        (COLOCATED, ALL_GPUS, True, None, None, ""),
        (COLOCATED, ["--num_gpus", "2"], True, "2,5", None, "GPUs 2, 5 of 3: num_gpus: 2"),
        (COLOCATED, [], False, "2", None, "GPU 2 of 3: num_gpus: 1"),
        (COLOCATED, ALL_GPUS, False, "2", None, "GPU 2 of 3: this is one process; 'mini-r1 train'"),
    ],
)
def test_a_process_sees_the_gpus_that_are_its_own(
    recipe, overrides, in_launch, left, served, told, monkeypatch, capsys
):
    monkeypatch.setattr(plan, "visible_gpus", lambda: ["2", "5", "7"])
    monkeypatch.setattr(plan, "launched", lambda: in_launch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan.take_gpus(load_recipe(recipe, overrides)) == served
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left
    said = capsys.readouterr().out
    assert said.startswith(f"training on {told}") if told else said == ""


# ---- Steps, evaluations, checkpoints --------------------------------------------------------


def line(text, name):
    (found,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return found.removeprefix(name).strip()


OF_A_FILE = ["--dataset_id_or_path", "x.jsonl"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        # 140 steps of 4 micro-batches each; 8 of them are sampled at a time, for 16 puzzles.
        ([], "140 (0.08 epochs): 1,120 of about 14,400 training puzzles are seen, once each"),
        (
            ["--max_steps", "3000"],
            "3,000 (1.7 epochs): each of about 14,400 training puzzles is seen 1.7 times",
        ),
        (["--max_steps", "-1", "--num_train_epochs", "0.5"], "about 900 (0.50 epochs): 7,200 of"),
        (["--max_steps", "-1", *OF_A_FILE], "not known before the data are read: 3 epochs"),
        (OF_A_FILE, "140, which see 1,120 puzzles; how often each one is not known before the"),
    ],
)
def test_the_plan_says_how_long_it_trains(overrides, told):
    assert line(str(planned(TINY, 0, 0, *overrides)), "steps").startswith(told)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "5 (before, every 35 steps, after), each of 1,000 held-out puzzles x 2"),
        (["--eval_steps", "70"], "3 (before, every 70 steps, after), "),
        (["--eval_strategy", "no"], "2 (before and after), "),
    ],
)
def test_the_plan_says_how_often_it_evaluates(overrides, told):
    assert line(str(planned(TINY, 0, 0, *overrides)), "evaluations").startswith(told)


@pytest.mark.parametrize(
    ("recipe", "gpus", "overrides", "told"),
    [
        (TINY, 0, [], "7, every 20 steps, the last 2 kept: about 9.2 MB each (weights 3.1 MB"),
        (TINY, 0, ["--save_steps", "0.5"], "2, every 70 steps, the last 2 kept: about 9.2 MB each"),
        (
            TINY,
            0,
            ["--save_only_model", "true"],
            "7, every 20 steps, the last 2 kept: about 3.1 MB",
        ),
        (TINY, 0, ["--save_strategy", "no"], "only at a pause, "),
        (TINY, 0, ["--save_strategy", "epoch"], "one per epoch, the last 2 kept: about 9.2 MB"),
        (
            ORIGINAL,
            4,
            [],
            "18, every 25 steps, the last 1 kept: about 49 GB each (weights 6.2 GB, optimizer 43 "
            "GB), at most 105 GB with the trained model",
        ),
        (
            RECIPES / "grpo-qwen-2.5-3b-qlora.yaml",
            1,
            [],
            "4, every 25 steps, the last 2 kept: about 359 MB each (weights 120 MB",
        ),
        (
            TINY,
            0,
            ["--model_name_or_path", "some/model"],
            "7, every 20 steps, the last 2 kept; their size is not known without loading the model",
        ),
    ],
)
def test_the_plan_says_how_large_the_checkpoints_get(recipe, gpus, overrides, told):
    found = line(str(planned(recipe, gpus, 80, *overrides)), "checkpoints")
    assert found.startswith(told)
    assert "free" not in found  # the disk of another machine is not known


@pytest.mark.parametrize(("free", "told"), [(32e6, "; 32 MB of disk"), (30e6, "; only 30 MB of")])
def test_this_machines_disk_must_hold_them(free, told, monkeypatch, tmp_path):
    usage, asked = shutil.disk_usage("/")._replace(free=free), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    recipe = load_recipe(TINY, ["--output_dir", str(tmp_path / "runs" / "new")])
    text = str(make_plan(recipe, replace(this_machine(), gpus=0)))
    assert told in line(text, "checkpoints")
    assert asked == [tmp_path]


def test_planning_imports_no_ml_library():
    code = (
        "import sys; from mini_r1.launch import doctor, plan, vllm_server;"
        "from mini_r1.recipe import load_recipe;"
        f"plan.make_plan(load_recipe({str(ORIGINAL)!r}), plan.Machine(4, 80.0));"
        "assert not {'torch', 'transformers', 'datasets', 'trl'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_how_many_checkpoints_lie_on_the_disk_at_once():
    def at_most(steps, *changes):
        recipe = load_recipe(TINY, changes)
        return plan.checkpoints_at_most(recipe, steps)

    assert at_most(140) == at_most(None) == 3  # the last two, and the one that is being written
    assert at_most(140, "--save_total_limit", "1") == 2
    assert at_most(10, "--save_steps", "10") == 1
    assert at_most(10, "--save_strategy", "no") == 0
    assert at_most(10, "--save_steps", "0.5") == at_most(None, "--save_steps", "0.5") == 2
    assert at_most(None, "--save_total_limit", "null") is None
    assert at_most(140, "--save_total_limit", "null") == 7
