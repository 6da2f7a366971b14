"""The simulation of what a recipe holds, beside what is planned: any shape, on any machine."""

import json
import runpy
from pathlib import Path

import pytest

from mini_r1.launch.memory import model_shape
from mini_r1.recipe import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "grpo-qwen-2.5-3b-1gpu.yaml"
SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 50_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LORA = ["--use_peft", "--lora_target_modules", "all-linear"]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "simulate_memory.py"))


@pytest.mark.parametrize(
    ("tied", "overrides"),
    [
        (True, ["--dtype", "float32"]),
        (False, ["--dtype", "bfloat16", "--gradient_checkpointing", "false"]),
        (True, ["--dtype", "float32", "--gradient_checkpointing", "false", *LORA]),
        (False, ["--dtype", "bfloat16", *LORA, "--lora_dropout", "0"]),
        (True, ["--dtype", "float32", "--bf16", "false"]),
    ],
    ids=str,
)
def test_what_is_planned_is_what_is_simulated(script, tied, overrides, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "tie_word_embeddings": tied}))
    model = ["--model_name_or_path", str(tmp_path), "--use_vllm", "false"]
    recipe = load_recipe(RECIPE, [*model, *overrides])
    planned = script["phases"](recipe, 1, 80.0)
    seen = script["simulate"](recipe, model_shape(str(tmp_path)), sampled=256)
    assert {purpose: script["as_planned"](planned, purpose) for purpose in seen} == {
        purpose: pytest.approx(size, rel=0.1) for purpose, size in seen.items()
    }


def test_a_recipe_is_simulated_without_its_model(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["simulate_memory.py", str(ROOT / "recipes" / "tiny-cpu.yaml")])
    script["main"]()
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["GiB", "simulated", "planned"]
    assert [row.split()[0] for row in rows] == [
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "evaluation",
    ]
