import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from huggingface_hub import constants

from mini_r1 import InputError, hub
from mini_r1.cli import main
from mini_r1.launch import doctor
from mini_r1.launch.machine import Machine
from mini_r1.model import model_path
from mini_r1.recipe import load_recipe
from mini_r1.run import LOGS_FOLDER, MERGED_FOLDER, RECIPE_FILE, mark_complete
from tests.tiny_models import build

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "tiny-cpu.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """A current folder without runs/tiny-cpu, which a reader may have by now."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


ORIGINAL = RECIPES / "grpo-qwen-2.5-3b-deepseek-r1-countdown.yaml"

# Lines added to a recipe that trains the embedded base, and what the message must say.
BROKEN = {
    "wrong key": (
        "learning_rat: 1.0e-4",
        "unknown key 'learning_rat'; did you mean 'learning_rate'?",
    ),
    "wrong type": ("max_steps: many", "max_steps: want an integer, got 'many'"),
    "old key": ("torch_dtype: bfloat16", "line 3: torch_dtype: this key is gone; write dtype"),
    "no step": ("max_steps: -3", "line 3: max_steps: want -1 or at least 1, got -3"),
    "no such loss": ("loss_type: gppo", "line 3: loss_type: no 'gppo'; did you mean 'grpo'?"),
    "unknown tracker": ("report_to: wandbb", "no 'wandbb'; did you mean 'wandb'?"),
    "missing tracker": (
        "report_to: [swanlab]",
        "report_to: swanlab is not installed; run pip install -c constraints.txt swanlab",
    ),
    "missing kernels": (
        "use_liger_kernel: true",
        "use_liger_kernel: liger_kernel is not installed",
    ),
    "missing optimizer": ("optim: schedule_free_adamw", "optim: schedulefree is not installed"),
    "set twice": ("num_generations: 4\nnum_generations: 8", "num_generations is set twice"),
    "not YAML": ("seed: [1", "not valid YAML"),
    "impossible batch": ("num_generations: 7", "cannot be cut into groups of num_generations: 7"),
    "one completion": ("num_generations: 1", "write at least 2"),
    "two batch sizes": ("generation_batch_size: 64\nsteps_per_generation: 2", "not both"),
    "too few puzzles": (
        "num_puzzles: 3\ngradient_accumulation_steps: 8",
        "num_puzzles: about 2 prompts",
    ),
    "save_steps in a window": ("steps_per_generation: 4\nsave_steps: 5", "write 8"),
    "no GPU for vLLM": ("use_vllm: true", "vLLM needs a GPU"),
    "missing model folder": (
        "model_name_or_path: ./no/such/folder",
        "no run or model './no/such/folder' here; write a folder with a model",
    ),
    "model out of reach": (
        "model_name_or_path: nobody/nothing",
        "model_name_or_path: 'nobody/nothing'",
    ),
    "missing data": ("dataset_id_or_path: puzzles.parquet", "no file or folder 'puzzles.parquet'"),
    "unknown reward": ("reward_funcs: [fromat]", "no reward 'fromat'; did you mean 'format'?"),
    "reward module": ("reward_funcs: [no_such_module.reward]", "no_such_module"),
    "reward weights": ("reward_weights: [1.0]", "1 weights for 2 reward_funcs"),
    "unknown prompt": ("prompt_template: r2", "no 'r2'; choose from"),
    "numbers upside down": ("number_range: [9, 1]", "number_range: want [low, high]"),
    "unwritable run folder": (
        "output_dir: /proc/mini-r1",
        "output_dir: /proc/mini-r1 cannot be written",
    ),
    "foreign run folder": ("output_dir: .", "is no run of ours"),
    "resume": ("resume_from_checkpoint: x", "a run resumes by itself"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_broken_recipes_are_explained_in_one_line_at_once(tmp_path, mistake):
    lines, message = BROKEN[mistake]
    base = "model_name_or_path: tiny_base\nmax_completion_length: 120\n"
    base = "" if lines.startswith("model_name_or_path") else base
    (tmp_path / "broken.yaml").write_text(f"{base}{lines}\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "mini_r1", "train", "broken.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The time it computed, not the clock: the machine may be busy with something else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


GOOD = json.dumps({"nums": [1, 2], "target": 3})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.jsonl", GOOD, None),
        ("x.jsonl", "", "x.jsonl holds no rows"),
        ("x.jsonl", "<html>", "x.jsonl cannot be read: line 1: Expecting value"),
        ("x.jsonl", '{"numbers": [1, 2], "target": 3}', "write columns: {nums: numbers}"),
        ("x.jsonl", GOOD + '\n{"nums": [1], "target": 3}', "x.jsonl line 2: nums: want 2 to 6"),
        ("x/train.jsonl", GOOD, None),
        ("x/test.jsonl", GOOD, "has no part 'train'; it has test"),
        ("x/readme.txt", GOOD, "no .parquet, .jsonl, .json, .csv file in the folder"),
        ("hub/datasets--owner--name/snapshots/0/data/train-00000-of-00001.jsonl", GOOD, None),
        (
            "hub/datasets--owner--name/snapshots/0/data/train-00000-of-00001.jsonl",
            '{"nums": [1], "target": 3}',
            "train-00000-of-00001.jsonl line 1: nums: want 2 to 6 numbers, got 1",
        ),
    ],
)
def test_the_data_are_opened(tmp_path, monkeypatch, file, content, message):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for path, text in ((file, content), ("hub/datasets--owner--name/refs/main", "0")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    source = "owner/name" if file.startswith("hub") else tmp_path / file.partition("/")[0]
    (tmp_path / "r.yaml").write_text(
        f"model_name_or_path: tiny_base\noutput_dir: {tmp_path / 'run'}\n"
        f"dataset_id_or_path: {source}\nmax_completion_length: 120\n"
    )
    found = [problem.problem for problem in doctor.problems(load_recipe(tmp_path / "r.yaml"))]
    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert message in found[0]


def test_large_data_are_opened_in_no_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "large.jsonl"
    path.write_text(f"{GOOD}\n" * 1_000_000)
    started = time.process_time()
    doctor.first_problem(load_recipe(TINY, ["--dataset_id_or_path", str(path)]))
    assert time.process_time() - started < 1


def test_a_recipe_that_runs_here(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    doctor.examine(str(TINY), Machine(0), planned=False)
    printed = capsys.readouterr().out
    assert "package     trl 1.16.0\n" in printed
    assert "verdict     it will run" in printed


def test_a_recipe_that_does_not_run_here(capsys):
    with pytest.raises(InputError, match="will not run here"):
        doctor.examine(str(ORIGINAL), Machine(4, 80.0), planned=False)
    assert "problem     use_vllm: vllm is not installed; run pip install" in capsys.readouterr().out


def test_another_machine_is_judged_by_its_gpus_alone(capsys):
    doctor.examine(str(ORIGINAL), Machine(4, 80.0), planned=True)
    printed = capsys.readouterr().out
    assert "package" not in printed
    assert "verdict     it fits" in printed


# ---- Trackers and the hub -------------------------------------------------------------------


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A home without any login; returns a function that examines a recipe there."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "HF_")) or name.lower().endswith(("netrc", "_proxy")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))

    def problems(*overrides):
        recipe = load_recipe(TINY, ["--output_dir", str(tmp_path / "run"), *overrides])
        return [str(problem) for problem in doctor.problems(recipe)]

    return problems


def test_wandb_needs_a_login(at_home, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    (problem,) = at_home("--report_to", "wandb")
    assert problem.startswith("report_to: wandb has no login here; run 'wandb login', or set WANDB")
    for lines in ("machine api.wandb.ai login user password x", "machine elsewhere password x"):
        (tmp_path / ".netrc").write_text(f"{lines}\n")
        assert at_home("--report_to", "wandb") == ([] if "wandb" in lines else [problem])
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": "x",
        "WANDB_IDENTITY_TOKEN_FILE": "x",
        "WANDB_CONFIG_DIR": str(tmp_path),
    }.items():
        (tmp_path / "settings").write_text("[default]\nmode = disabled\n")
        with monkeypatch.context() as with_it:
            with_it.setenv(name, value)
            assert at_home("--report_to", "wandb", "tensorboard") == []


def test_a_login_is_looked_for_where_wandb_looks(at_home, tmp_path):
    """In a process of its own: wandb remembers."""
    pytest.importorskip("wandb")
    look = "from wandb.sdk.lib.wbauth import wbnetrc; print(wbnetrc._get_netrc_file_path())"
    done = subprocess.run([sys.executable, "-c", look], check=True, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/.netrc\n"
    init = "import wandb; wandb.init(project='x')"
    done = subprocess.run([sys.executable, "-c", init], capture_output=True, text=True)
    assert "No API key configured" in done.stderr


@pytest.mark.parametrize(
    ("tracker", "package"), [("mlflow", "mlflow"), ("flyte", "flytekit"), ("dagshub", "dagshub")]
)
def test_trackers_that_are_not_installed(at_home, tracker, package):
    assert find_spec(package) is None
    first = at_home("--report_to", tracker)[0]
    assert first.startswith(f"report_to: {package} is not installed; run pip install")


@pytest.mark.parametrize("chosen", ["none", "all", "tensorboard", "kubeflow"])
def test_trackers_that_need_nothing(at_home, monkeypatch, chosen):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert at_home("--report_to", chosen) == []


def test_writing_to_the_hub_needs_a_token(at_home, monkeypatch):
    assert at_home("--push_to_hub") == [
        "push_to_hub: no hub token here; run 'hf auth login', give --hub_token, or write "
        "push_to_hub: false"
    ]
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    (problem,) = at_home("--push_to_hub")
    assert "the hub cannot be reached (OfflineModeIsEnabled)" in problem  # as all tests are
    monkeypatch.delenv("HF_TOKEN")
    (problem,) = at_home("--log_completions", "--log_completions_hub_repo", "a/b")
    assert problem.startswith("log_completions_hub_repo: no hub token here")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "the hub refuses the token ("),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", None),
        ("", "the hub cannot be reached (ReadTimeout)"),
        (None, "the hub cannot be reached (ConnectError)"),
    ],
)
def test_writing_to_the_hub_needs_the_hub(at_home, monkeypatch, answer, message):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)

        def serve():
            connection, _ = server.accept()
            connection.recv(10_000)
            connection.sendall(answer.encode())
            time.sleep(0 if answer else 1)
            connection.close()

        if answer is None:
            server.close()
        else:
            threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        found = at_home("--push_to_hub")
    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(f"push_to_hub: {message}")
        assert found[0].endswith("; write push_to_hub: false")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    recipe = load_recipe(TINY, ["--output_dir", str(tmp_path)])
    assert not list(doctor.problems(recipe))
    (tmp_path / LOGS_FOLDER).mkdir()
    (tmp_path / MERGED_FOLDER).mkdir()
    assert not list(doctor.problems(recipe))
    (tmp_path / "thesis.tex").touch()
    (problem,) = doctor.problems(recipe)
    assert "is no run of ours" in str(problem)


def test_a_run_is_continued_but_not_as_another_one(tmp_path):
    recipe = load_recipe(TINY, ["--output_dir", str(tmp_path)])
    assert not list(doctor.problems(recipe))
    (tmp_path / RECIPE_FILE).write_text("seed: 7\n")
    problems = map(str, doctor.problems(recipe))
    assert any("holds a run with seed: 7, this recipe says 1" in text for text in problems)


# ---- The model ------------------------------------------------------------------------------


def copy_of_the_base(folder, **config):
    shutil.copytree(model_path("tiny_base"), folder)
    (folder / RECIPE_FILE).unlink()
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def adapter_on(base, folder):
    folder.mkdir(parents=True)
    config = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(
        Path(model_path("tiny_base")) / "model.safetensors", folder / "adapter_model.safetensors"
    )
    return folder


def told(name, *overrides):
    recipe = load_recipe(TINY, ["--model_name_or_path", str(name), *overrides])
    return [problem.problem for problem in doctor.problems(recipe)]


def test_a_recipe_is_told_what_is_wrong_with_its_model(tmp_path, capsys):
    assert told(copy_of_the_base(tmp_path / "sound")) == []
    bert = copy_of_the_base(tmp_path / "bert", model_type="bert", architectures=["BertModel"])
    assert "is a BertModel, no causal language model" in told(bert)[0]
    short = copy_of_the_base(tmp_path / "short", max_position_embeddings=100)
    assert "fewer than max_prompt_length 32 + max_completion_length 120" in told(short)[0]
    (tmp_path / "empty").mkdir()
    assert "empty holds no model: no config.json in it" in told(tmp_path / "empty")[0]
    assert "it is a file; write the folder that holds it" in told(bert / "model.safetensors")[0]
    path = tmp_path / "r.yaml"
    path.write_text(f"output_dir: {tmp_path}/run\nmodel_name_or_path: {bert}\n")
    with pytest.raises(InputError, match="will not run here: 1 problem"):
        doctor.examine(str(path), Machine(0), planned=False)
    with pytest.raises(InputError, match=r"r\.yaml line 2: model_name_or_path: .* is a BertModel"):
        doctor.first_problem(load_recipe(path))


def test_quantized_weights_are_not_trained_in_full(tmp_path):
    method = {"quantization_config": {"quant_method": "bitsandbytes"}}
    model = copy_of_the_base(tmp_path / "model", **method)
    assert "cannot be trained in full; write use_peft: true" in told(model)[0]
    assert told(model, "--use_peft") == []


def test_experts_are_adapted_without_dropout(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    kind = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 32}
    model = copy_of_the_base(tmp_path / "model", **experts, **kind)
    lora = ["--use_peft", "--lora_target_modules"]
    assert "write lora_dropout: 0, or only projections" in told(model, *lora, "all-linear")[0]
    assert told(model, *lora, "all-linear", "--lora_dropout", "0") == []
    assert told(model, *lora, "q_proj", "v_proj") == []
    assert told(model) == []


def test_a_run_stands_for_its_newest_weights(tmp_path):
    run = copy_of_the_base(tmp_path / "run")
    shutil.copy(Path(model_path("tiny_base")) / RECIPE_FILE, run)
    assert told(run) == []
    checkpoint = run / "checkpoint-5"
    checkpoint.mkdir()
    for file in [file for file in run.iterdir() if file.is_file() and file.name != RECIPE_FILE]:
        file.rename(checkpoint / file.name)
    assert "this run has no model and no complete checkpoint yet" in told(run)[0]
    mark_complete(run, 5)
    assert told(run) == []


def test_an_adapter_is_judged_with_its_base(tmp_path):
    base = copy_of_the_base(tmp_path / "base")
    first = adapter_on(base, tmp_path / "runs" / "first")
    second = adapter_on(first, tmp_path / "runs" / "second")
    assert told(second) == []
    (base / "model.safetensors").write_bytes(b"")
    (problem,) = told(second)
    assert f"the base of the adapter {first}: " in problem
    assert "is no safetensors file" in problem
    shutil.rmtree(base)
    assert "no run or model" in told(second)[0]
    assert "is an adapter of itself" in told(adapter_on(tmp_path / "loop", tmp_path / "loop"))[0]


def test_a_run_or_model_that_was_misspelt_is_suggested_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_of_the_base(tmp_path / "runs" / "tiny-cpu")
    copy_of_the_base(tmp_path / "models" / "llama")
    for command, name, near in (
        ("eval", "runs/tiny-cpuu", "runs/tiny-cpu"),
        ("eval", "tiny-cpu", "runs/tiny-cpu"),
        ("play", "tiny_bas", "tiny_base"),
        ("play", "models/lama", "models/llama"),
        ("eval", "./models/lama", "models/llama"),
    ):
        started = time.monotonic()
        assert main([command, name]) == 2
        assert time.monotonic() - started < 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: RUN_OR_MODEL: ")
        assert line.endswith(f"did you mean '{near}'?"), line
    assert main(["eval", "./nothing-like-it"]) == 2
    assert "write a folder with a model, an id of the hub" in capsys.readouterr().err


def test_eval_by_vllm_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert main(["eval", "tiny_base", "--vllm"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --vllm: vllm is not installed; run pip install")


def test_eval_refuses_more_tokens_than_a_model_has_positions(tmp_path, capsys):
    assert main(["eval", str(copy_of_the_base(tmp_path / "m"))]) == 2
    assert "has 512 positions, fewer than" in capsys.readouterr().err


# ---- The disk -------------------------------------------------------------------------------


def test_checkpoints_must_fit_on_the_disk(tmp_path, monkeypatch):
    config = json.loads((Path(model_path("tiny_base")) / "config.json").read_text())
    config |= {"hidden_size": 10**8, "intermediate_size": 10**8, "max_position_embeddings": 2000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = ["--output_dir", str(tmp_path / "run")]
    *_, problem = told(tmp_path, *output)
    assert "3 checkpoints of " in problem
    assert "GB are free there; write a lower save_total_limit, or choose" in problem
    *_, problem = told(tmp_path, *output, "--save_total_limit", "1")
    assert "2 checkpoints of " in problem
    # What accelerate tells its processes: in 32 bit ZeRO-3 adds two moments, ZeRO-2 one copy more.
    for variable, times in (("USE_DEEPSPEED", 3), ("DEEPSPEED_ZERO_STAGE", 4)):
        monkeypatch.setenv(f"ACCELERATE_{variable}", "2")
        *_, problem = told(tmp_path, *output)
        checkpoint, model = map(float, re.findall(r"of ([\d.]+) GB", problem))
        assert checkpoint == pytest.approx(times * model, rel=0.01)
    assert "free there" not in " ".join(told("tiny_base", *output))


# ---- The prompt -----------------------------------------------------------------------------


def of_model(folder, **changes):
    build(folder, "qwen3", **changes)
    return load_recipe(
        TINY, ["--model_name_or_path", str(folder), "--output_dir", str(folder / "run")]
    )


def test_a_prompt_is_tried_without_the_weights(tmp_path):
    assert not list(doctor.problems(of_model(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"chat_template": None}, "prompt_template: this model has no chat template"),
        ({"chat_template": "{{ nothing.at_all }}"}, "prompt_template: the model's chat template"),
        ({"adds": "$A <|im_end|>"}, "model_name_or_path: its tokenizer ends every text with"),
        ({"eos": None}, "model_name_or_path: the tokenizer of"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused(tmp_path, changes, problem):
    (found,) = doctor.problems(of_model(tmp_path, **changes))
    assert str(found).startswith(problem)
    assert "\n" not in str(found)


def test_a_model_that_is_not_here_yet_is_asked_when_it_is(monkeypatch):
    monkeypatch.setattr(doctor, "_model", lambda recipe: iter(()))  # the hub has it
    recipe = load_recipe(TINY, ["--model_name_or_path", "nobody/nothing"])
    assert not list(doctor.problems(recipe))
