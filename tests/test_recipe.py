import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from mini_r1 import InputError, recipe
from mini_r1.recipe import TRAINING_DEFAULTS, TaskConfig, load_recipe, recipe_table

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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "line 2: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("num_generation: 8", "did you mean 'num_generations'?"),
        ("seed: one", "line 2: seed: want an integer, got 'one'"),
        ("bf16: 1", "bf16: want true or false, got 1"),
        ("num_numbers: [3, x]", "num_numbers: want an integer, got 'x'"),
        ("max_steps: 1\nmax_steps: 2", "line 3: max_steps is set twice; first in 2"),
        ("prompt_template: r2", "line 2: prompt_template: no 'r2'; choose from mini-r1"),
        (
            "reward_funcs: [fromat]",
            "line 2: reward_funcs: no reward 'fromat'; did you mean 'format'?",
        ),
        ("reward_funcs: []", "reward_funcs: name at least one reward"),
        ("reward_weights: [1.0]", "reward_weights: 1 weights for 2 reward_funcs"),
        ("number_range: [9, 1]", "number_range: want [low, high]"),
        ("num_numbers: [9]", "num_numbers: each count is 2 to 6"),
        ("test_share: 1.5", "test_share: want a share between 0 and 1"),
        ("num_eval_puzzles: 0", "num_eval_puzzles: want at least 1"),
        ("eval_temperature: 0", "eval_temperature: want more than 0"),
        ("resume_from_checkpoint: x", "line 2: resume_from_checkpoint: a run resumes by itself"),
        ("seed: [", "not valid YAML"),
    ],
)
def test_mistakes_are_explained_in_one_line(write, line, message):
    with pytest.raises(InputError) as caught:
        load_recipe(write(MINIMAL + line + "\n"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_the_keys_of_generation_read_from_source_are_those_of_the_class():
    from transformers import GenerationConfig

    config = GenerationConfig()
    keys = recipe._generation_keys()
    assert {"min_new_tokens", "temperature"} < keys
    assert [key for key in keys if not hasattr(config, key)] == []
    assert [key for key in vars(config) if not key.startswith("_") and key not in keys] == []


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
    assert "written for TRL 0.14, this is 1.16; write instead" in headline
    assert [row.split()[0] for row in rows] == [
        "torch_dtype",
        "warmup_ratio",
        "vllm_device",
        "per_device_train_batch_size",
    ]
    assert "counts completions, not prompts" in rows[-1]


def test_no_old_key_is_a_key_of_today():
    known = {field.name for field in fields(TaskConfig)}.union(
        *map(recipe._fields_of, (recipe._MODEL_CLASSES, recipe._TRAINING_CLASSES))
    )
    assert known & recipe.OLD_KEYS.keys() <= {"use_liger_kernel", "logging_dir"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a list\n", "not a recipe"), ("seed: 1\n", "model_name_or_path: missing")],
)
def test_files_that_are_no_recipe(write, text, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(text))


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"no-such\.yaml: no such recipe"):
        load_recipe("no-such.yaml")


def test_the_keys_read_from_source_are_those_of_the_classes():
    from trl import GRPOConfig, ModelConfig

    assert set(recipe._fields_of(recipe._TRAINING_CLASSES)) == {
        field.name for field in fields(GRPOConfig) if field.init
    }
    assert set(recipe._fields_of(recipe._MODEL_CLASSES)) == {
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


def test_an_override_is_not_named_twice(write):
    with pytest.raises(InputError) as caught:
        load_recipe(write(MINIMAL), ["--learning_rate", "much"])
    assert str(caught.value) == "--learning_rate: want a number, got 'much'"


def test_no_key_has_two_owners():
    task = {field.name for field in fields(TaskConfig)}
    model, training = (
        set(recipe._fields_of(classes))
        for classes in (recipe._MODEL_CLASSES, recipe._TRAINING_CLASSES)
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


def test_the_table_of_recipes_is_the_readmes():
    root = Path(__file__).parents[1]
    table = recipe_table(root / "recipes")
    assert table in (root / "README.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + len(list((root / "recipes").glob("*.yaml")))
    assert "| not known |" not in table.splitlines()[2]


def test_a_folder_without_recipes(tmp_path):
    with pytest.raises(InputError, match="no recipes here"):
        recipe_table(tmp_path)
