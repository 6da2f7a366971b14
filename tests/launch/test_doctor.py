import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.launch import doctor
from mini_r1.launch.plan import Machine
from mini_r1.recipe import load_recipe
from mini_r1.run import LOGS_FOLDER, RECIPE_FILE
from tests.tiny_models import build_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "tiny-cpu.yaml"
ORIGINAL = RECIPES / "grpo-qwen-2.5-3b-deepseek-r1-countdown.yaml"

# Lines added to a recipe that trains the embedded base, and what the message must say.
BROKEN = {
    "wrong key": (
        "learning_rat: 1.0e-4",
        "unknown key 'learning_rat'; did you mean 'learning_rate'?",
    ),
    "wrong type": ("max_steps: many", "max_steps: want an integer, got 'many'"),
    "old key": ("torch_dtype: bfloat16", "torch_dtype"),
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
        "no folder './no/such/folder'",
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
    base = "" if lines.startswith("model_name_or_path") else "model_name_or_path: tiny_base\n"
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
    if mistake != "old key":  # which gets a table
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


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


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    recipe = load_recipe(TINY, ["--output_dir", str(tmp_path)])
    assert not list(doctor.problems(recipe))
    (tmp_path / LOGS_FOLDER).mkdir()
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


# ---- The prompt -----------------------------------------------------------------------------


def of_model(folder, **changes):
    """A recipe for a model of which only the tokenizer is there."""
    build_tokenizer("qwen3", **changes).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
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
