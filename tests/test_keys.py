"""What keys.py reads from the libraries' source, against the libraries."""

import re
from dataclasses import fields

import pytest
import yaml

from mini_r1.keys import (
    MODEL_CLASSES,
    RANGES,
    TRAINING_CLASSES,
    Key,
    Range,
    check_number,
    generation_keys,
    keys_of,
)
from mini_r1.recipe import all_keys

THEIRS = {**keys_of(MODEL_CLASSES), **keys_of(TRAINING_CLASSES)}
# Numbers for which every finite one will do, or that launch.plan.check_batch looks after.
ANY_NUMBER = {
    *("local_rank", "num_generations", "reward_weights"),
    *("entropy_coef", "entropy_coef_min", "entropy_coef_max"),
    *("num_numbers", "number_range", "target_range", "split_seed"),  # PuzzleSpace looks after them
}


def test_every_key_that_is_a_number_has_its_range():
    keys = {name: key for part in all_keys().values() for name, key in part.items()}
    numbers = {name for name, key in keys.items() if "int" in key.kind or "float" in key.kind}
    assert numbers - ANY_NUMBER == set(RANGES)


def test_every_default_is_in_its_range_and_among_its_choices():
    for part in all_keys().values():
        for name, key in part.items():
            values = key.default if isinstance(key.default, list | tuple) else [key.default]
            for value in values:
                if isinstance(value, int | float) and not isinstance(value, bool):
                    check_number(name, value)
                elif isinstance(value, str) and key.choices and value:
                    assert value in key.choices, name


def test_choices_that_a_definition_lists():
    from trl import GRPOConfig, ModelConfig

    for field in (*fields(ModelConfig), *fields(GRPOConfig)):
        if field.init and (listed := field.metadata.get("choices")):
            assert sorted(THEIRS[field.name].choices) == sorted(listed), field.name


def test_choices_that_are_an_enumeration():
    from transformers import trainer_utils, training_args
    from transformers.debug_utils import DebugOption

    for name, enumeration, not_here in (
        ("optim", training_args.OptimizerNames, set()),
        ("lr_scheduler_type", trainer_utils.SchedulerType, {"reduce_lr_on_plateau", "greedy"}),
        ("logging_strategy", trainer_utils.IntervalStrategy, set()),
        ("eval_strategy", trainer_utils.IntervalStrategy, {"epoch"}),
        ("save_strategy", trainer_utils.SaveStrategy, {"best"}),
        ("hub_strategy", trainer_utils.HubStrategy, set()),
        ("debug", DebugOption, set()),
    ):
        assert set(THEIRS[name].choices) | not_here == {each.value for each in enumeration}


def test_choices_that_stand_in_code():
    from torch._inductor import list_mode_options
    from transformers import AttentionInterface
    from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.training_args import trainer_log_levels

    for name, theirs in {
        "report_to": {*INTEGRATION_TO_CALLBACK, "all", "none"},
        "attn_implementation": {*AttentionInterface().valid_keys(), "eager"},
        "cache_implementation": {*ALL_CACHE_IMPLEMENTATIONS, "paged"},
        "log_level": set(trainer_log_levels),
        "torch_compile_mode": set(list_mode_options()),
    }.items():
        assert set(THEIRS[name].choices) == theirs, name


@pytest.mark.parametrize(
    "key",
    [
        *("loss_type", "scale_rewards", "importance_sampling_level", "vllm_mode"),
        *("multi_objective_aggregation", "vllm_importance_sampling_mode", "vllm_model_impl"),
    ],
)
def test_choices_that_the_trainer_compares_with_are_those_its_help_names(key):
    assert len(THEIRS[key].choices) >= 2
    for choice in THEIRS[key].choices:
        assert f"{choice}'" in THEIRS[key].help or f"`{choice}`" in THEIRS[key].help


def test_the_trainer_takes_every_loss_type_and_no_other():
    import inspect

    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert [name for name in THEIRS["loss_type"].choices if f'"{name}"' not in source] == []
    assert len(THEIRS["loss_type"].choices) == 8


@pytest.mark.parametrize(
    ("annotation", "text", "wanted"),
    [
        ("Literal['a', 'b'] | None", "b", "b"),
        ("typing.Literal['a', 'b']", "a", "a"),
        ("str | Literal[False]", "false", False),
        ("Optional[int]", "null", None),
        ("dict[str, Any] | None", "{a: {b: [1, x]}}", {"a": {"b": [1, "x"]}}),
        ("tuple[int, ...]", "7", (7,)),
        ("list[list[int]]", "[[1], [2]]", [[1], [2]]),
        ("list", "[1, a]", [1, "a"]),
        ("Any", "5e-7", 5e-7),
    ],
)
def test_types(annotation, text, wanted):
    node = yaml.compose(text, yaml.SafeLoader)
    assert Key("key", annotation, None).read(node) == wanted


@pytest.mark.parametrize(
    ("annotation", "text", "message"),
    [
        ("Literal['a', 'b']", "c", "no 'c'; choose from a, b"),
        ("Literal['a', 'b']", "null", "want text, got null"),
        ("list[list[int]]", "[[1], [x]]", "want an integer, got 'x'"),
        ("int | float", "x", "want a number or an integer, got 'x'"),
    ],
)
def test_wrong_types(annotation, text, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Key("key", annotation, None).read(yaml.compose(text, yaml.SafeLoader))


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1]", (0.1, 1), (0, 1.1, -1)),
        ("[0, 1)", (0, 0.9), (1, -0.1)),
        ("[1, inf)", (1, 10**9), (0, 0.5)),
    ],
)
def test_ranges(interval, inside, outside):
    assert all(Range(interval).holds(number) for number in inside)
    assert not any(Range(interval).holds(number) for number in outside)


def test_the_keys_of_generation_read_from_source_are_those_of_the_class():
    from transformers import GenerationConfig

    config = GenerationConfig()
    keys = generation_keys()
    assert {"min_new_tokens", "temperature"} < keys
    assert [key for key in keys if not hasattr(config, key)] == []
    assert [key for key in vars(config) if not key.startswith("_") and key not in keys] == []
