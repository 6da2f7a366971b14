from pathlib import Path

import pytest

from mini_r1.launch.memory import (
    GIB,
    QWEN,
    computes_in_16_bit,
    estimate_memory,
    model_shape,
    peak,
    state_bytes,
)
from mini_r1.launch.plan import Machine, make_plan
from mini_r1.model import load_model
from mini_r1.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "tiny-cpu.yaml"


def estimated(name, *overrides, processes=1, gpu_memory=80):
    recipe = load_recipe(RECIPES / f"grpo-qwen-2.5-{name}.yaml", overrides)
    return estimate_memory(recipe, processes, gpu_memory)


@pytest.mark.parametrize(
    ("size", "billions"), [("0.5B", 0.49), ("1.5B", 1.54), ("3B", 3.09), ("7B", 7.61)]
)
def test_parameter_counts_are_the_published_ones(size, billions):
    # The model cards of Qwen2.5.
    assert QWEN[size].parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_shape_of_a_local_model():
    parameters = load_model("tiny_base").num_parameters()
    assert model_shape("tiny_base").parameters == pytest.approx(parameters, rel=0.01)
    assert model_shape("somebody/else") is None
    elsewhere = load_recipe(TINY, ["--model_name_or_path", "somebody/else"])
    assert "not estimated" in str(make_plan(elsewhere, Machine(0)))


@pytest.mark.parametrize(("gpus", "gigabytes"), [(None, 120), (64, 1.9)])
def test_optimizer_states_as_in_the_zero_paper(gpus, gigabytes):
    # Rajbhandari et al., arXiv:1910.02054, figure 1: 7.5B parameters, mixed-precision Adam, without
    # ZeRO and with all stages on 64.
    needed = sum(state_bytes(7.5e9, 2, gpus or 1).values()) / 1e9
    assert needed == pytest.approx(gigabytes, rel=0.02)


def test_published_runs_fit_their_gpus():
    # The tutorial: 3B on 4x H100 80 GB. nano-aha-moment: 3B in full on one 80 GB card beside vLLM.
    assert sum(estimated("3b-deepseek-r1-countdown", processes=3).values()) < 80
    make_plan(load_recipe(RECIPES / "grpo-qwen-2.5-3b-base-1gpu.yaml"), Machine(1, 80.0))


def test_keys_and_values_of_a_token():
    # Qwen2.5-3B: 36 layers, 2 heads of 128 for keys and values, 16 bit: 36,864 bytes. The
    # evaluation samples the most at once.
    assert estimated("3b-qlora")["KV cache"] * GIB == 256 * 1280 * 36_864


def test_logits_are_held_three_times_in_16_bit():
    # Of each micro-batch: themselves, the scaled copy, the gradient.
    assert estimated("3b-1gpu")["logits"] * GIB == 3 * 2 * 8 * 1024 * 151_936
    halved = estimated("3b-1gpu", "--per_device_train_batch_size", "4")
    assert halved["logits"] * GIB == 3 * 2 * 4 * 1024 * 151_936


def test_frozen_weights_take_half_a_byte_in_4_bit():
    # Of Qwen2.5-3B: 2.774e9 weights in linear layers, 0.311e9 embeddings, which stay in 16 bit;
    # LoRA of rank 1 on all linear layers: 1.871e6 weights, in 32 bit.
    adapters = 1.871e6 * 4 * load_recipe(RECIPES / "grpo-qwen-2.5-3b-qlora.yaml").get("lora_r")
    for overrides, per_weight in (([], 4.4 / 8), (["--load_in_4bit", "false"], 2)):
        weights = estimated("3b-qlora", *overrides)["weights"] * GIB
        expected = 2.774e9 * per_weight + 0.311e9 * 2 + adapters
        assert weights == pytest.approx(expected, rel=0.005)


def test_colocated_vllm_takes_its_share_of_the_gpu():
    recipe = load_recipe(RECIPES / "grpo-qwen-2.5-1.5b-1gpu.yaml")
    assert estimate_memory(recipe, 1, 80)["vLLM"] == pytest.approx(0.4 * 80)  # as the recipe says
    del recipe.training["vllm_gpu_memory_utilization"]
    assert estimate_memory(recipe, 1, 80)["vLLM"] == pytest.approx(0.3 * 80)  # as TRL says


def test_who_sleeps_takes_turns():
    recipe = load_recipe(RECIPES / "grpo-qwen-2.5-3b-1gpu.yaml")
    memory = estimate_memory(recipe, 1, 80)
    awake = load_recipe(recipe.path, ["--vllm_enable_sleep_mode", "false"])
    turns = [memory["activations"] + memory["logits"], memory["KV cache"], memory["vLLM"]]
    always = sum(memory.values()) - sum(turns)
    assert peak(memory, recipe) == pytest.approx(always + max(turns))
    assert peak(memory, awake) == pytest.approx(always + max(turns[:2]) + turns[2])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [([], True), (["--bf16", "false"], False), (["--bf16", "false", "--fp16"], True)],
)
def test_trl_computes_in_16_bit_unless_told_otherwise(tmp_path, overrides, expected):
    path = tmp_path / "r.yaml"
    path.write_text("model_name_or_path: tiny_base\n")
    assert computes_in_16_bit(load_recipe(path, overrides)) is expected
