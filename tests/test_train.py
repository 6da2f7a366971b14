from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from mini_r1 import InputError
from mini_r1.model import load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import load_recipe
from mini_r1.rollouts import RolloutRecorder
from mini_r1.start import Start
from mini_r1.train import _arguments, _build_trainer
from tests.tiny_models import build as build_model

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny-cpu.yaml"


def build(tmp_path, *overrides):
    recipe = load_recipe(RECIPE, ["--output_dir", str(tmp_path / "run"), *overrides])
    model_args, args, _ = _arguments(recipe)
    dataset = Dataset.from_list([{"prompt": "x", "nums": [1, 2, 3], "target": 6}] * 64)
    weights, recorder = Start(recipe).folder, RolloutRecorder(tmp_path)
    tokenizer = load_tokenizer(recipe.get("model_name_or_path"))
    return _build_trainer(recipe, model_args, args, dataset, tokenizer, recorder, weights)


def test_dtype_and_attention_reach_the_model(tmp_path):
    model = build(tmp_path, "--dtype", "bfloat16", "--attn_implementation", "eager").model
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_attention_falls_back_to_sdpa_where_flash_attn_is_missing(tmp_path, capsys):
    flash = ["--dtype", "bfloat16", "--attn_implementation", "flash_attention_2"]
    model = build(tmp_path, *flash).model
    assert model.config._attn_implementation == "sdpa"
    assert "flash-attn is not installed, using sdpa" in capsys.readouterr().out


def test_lora_reaches_the_model(tmp_path):
    lora = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    model = build(tmp_path, *lora).model
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].r == 4
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quantized", [[], ["--load_in_4bit"]], ids=["lora", "qlora"])
def test_adapters_are_trained_in_32_bit(tmp_path, dtype, quantized):
    model = build(tmp_path, "--use_peft", "--dtype", dtype, *quantized).model
    trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    assert trained == {torch.float32}
    assert model.get_base_model().lm_head.weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("dtype", "is_refused"), [(torch.float16, True), (torch.float32, False)])
def test_the_loss_scale_of_fp16_wants_wide_weights(dtype, is_refused):
    """If not, conflicts.py need not ask for dtype: float32. On a CPU accelerate scales nothing."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW([weight])
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16") if is_refused else nullcontext():
        scaler.unscale_(optimizer)


def test_rewards_and_their_weights_reach_the_trainer(tmp_path):
    rewards = ["--reward_funcs", "equation", "format", "--reward_weights", "1.0", "0.1"]
    trainer = build(tmp_path, *rewards)
    assert trainer.reward_func_names == ["equation_reward", "format_reward"]
    assert trainer.reward_weights.tolist() == pytest.approx([1.0, 0.1])


OWN_REWARDS = """
import functools
import numpy
import torch
from mini_r1.rewards import TRL_COLUMNS

class Bonus:
    async def __call__(self, completions, **columns):
        return torch.full((len(completions),), 0.5)

def noted(first, **columns):
    assert set(columns) == {*TRL_COLUMNS, "nums", "target"}  # what its signature is checked against
    return numpy.array([first, 0.0, 0.0])

bonus, partial = Bonus(), functools.partial(noted, 1.0)
some = lambda completions, **columns: [None, 0.25, None]
"""


def test_rewards_of_all_kinds_reach_trl_under_their_names(own_folder):
    (own_folder / "my_task.py").write_text(OWN_REWARDS)
    names = ["bonus", "partial", "some"]
    trainer = build(own_folder, "--reward_funcs", *(f"my_task.{name}" for name in names))
    assert trainer.reward_func_names == names
    rows = [{"prompt": "x", "nums": [1, 2, 3], "target": 6}] * 3
    scores = trainer._calculate_rewards(rows, ["x"] * 3, ["y"] * 3, [[1]] * 3)  # [3, 3]
    assert scores.nan_to_num(9).tolist() == [[0.5, 1.0, 9.0], [0.5, 0.0, 0.25], [0.5, 0.0, 9.0]]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_trl_samples_from_prompts_with_one_bos(tmp_path, kind):
    """These families' templates print it, and their tokenizers add it to every text."""
    trainer = build(tmp_path, "--model_name_or_path", build_model(tmp_path / "model", kind))
    tokenizer = trainer.processing_class
    prompt = PROMPT_TEMPLATES["mini-r1"].render([1, 2, 3], 6, tokenizer)
    (ids,), *_ = trainer._tokenize_prompts([prompt])
    assert ids.index(tokenizer.bos_token_id) == 0
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--load_in_8bit", "--load_in_4bit"], "8"),
        (["--num_generations", "5"], "divisible"),
        (["--model_name_or_path", "no/such-model"], "is not in the cache"),
        (
            ["--num_generations", "2", "--per_device_train_batch_size", "64"],
            "one generation batch takes 256",
        ),
    ],
)
def test_what_cannot_work_is_explained(tmp_path, overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        build(tmp_path, *overrides)
    assert "\n" not in str(caught.value)
