import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mini_r1.launch.machine import Machine
from mini_r1.launch.memory import (
    GATED,
    GIB,
    QWEN,
    UNGATED,
    checkpoint_bytes,
    computes_in_16_bit,
    estimate_memory,
    model_shape,
    peak,
    shape_of,
    state_bytes,
)
from mini_r1.launch.plan import make_plan
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


# Sizes at which biases and norms are less than a percent.
SIZES = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OLD = {"num_key_value_heads": None, "intermediate_size": None}  # which they do not know
OF_THEIR_OWN = {
    "gpt2": {**OLD, "n_embd": 256, "n_layer": 3, "n_head": 4},
    "gpt_neo": {**OLD, "num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
    "gpt_neox": {"num_key_value_heads": None},
    "ministral": {"head_dim": 64},
    "opt": {**OLD, "ffn_dim": 640, "word_embed_proj_dim": 256},
    "phi": {"num_key_value_heads": None},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "gemma3_text": {"head_dim": 64},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 32},
    "mixtral": {"num_local_experts": 5},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 320,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 96, "decoder_sparse_step": 2},
}


def saved(kind, **changes):
    """A model's configuration, and what its config.json says."""
    sizes = {**SIZES, **OF_THEIR_OWN.get(kind, {}), **changes}
    config = AutoConfig.for_model(kind, **sizes)
    return config, json.loads(config.to_json_string())


@pytest.mark.parametrize("kind", [*GATED, *UNGATED])
def test_parameter_counts_are_those_of_the_real_classes(kind):
    config, written = saved(kind)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    assert shape_of(written).parameters == pytest.approx(parameters, rel=0.01)


def test_of_many_experts_only_some_work_on_a_token():
    _, written = saved("qwen2_moe", num_experts_per_tok=2)
    shape = shape_of(written)
    assert shape.experts == 2 * 6 * 3 * 256 * 96  # two of three layers have six of them
    assert shape.mlp_width == (640 + 2 * (2 * 96 + 320)) / 3
    # Half as many, each twice as wide: as many weights, and as much of a token's work for one.
    wider = {**written, "num_experts": 3, "moe_intermediate_size": 192, "num_experts_per_tok": 1}
    assert shape_of(wider).experts == shape.experts
    assert shape_of(wider).mlp_width == shape.mlp_width


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": "256"},
        {"num_hidden_layers": 0},
        {"num_attention_heads": None},
        {"intermediate_size": None},
        {"vocab_size": None},
    ],
)
def test_a_config_that_lacks_a_size_is_not_estimated(changes, tmp_path):
    _, written = saved("llama")
    (tmp_path / "config.json").write_text(json.dumps(written | changes))
    recipe = load_recipe(TINY, ["--model_name_or_path", str(tmp_path)])
    assert "not estimated" in str(make_plan(recipe, Machine(0)))
    assert "not estimated" in str(make_plan(recipe, Machine(1, 80.0)))


def test_what_a_config_may_leave_out():
    _, written = saved("llama")
    heads = written | {"num_key_value_heads": None, "head_dim": None}
    assert shape_of(heads).kv_width == 256
    assert shape_of({k: v for k, v in heads.items() if k != "num_key_value_heads"}).kv_width == 256


def test_a_text_model_within_another_is_estimated(tmp_path):
    _, written = saved("llama")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "text_config": written})
    )
    assert model_shape(str(tmp_path)) == shape_of(written)


def test_a_kind_that_is_not_known_here_is_estimated_if_its_weights_agree(tmp_path):
    config, written = saved("ministral")
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)) == shape_of(written)
    (tmp_path / "config.json").write_text(json.dumps(written | {"intermediate_size": 900}))
    assert model_shape(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("batch", "tokens", "overrides", "measured"),
    [
        # GiB: the largest resident set of `mini-r1 train`, for the first SmolLM2-135M itself, else
        # a random model of its shape.
        (16, 157 + 48, ["--use_peft"], 14.4),
        (8, 119 + 48, ["--use_peft"], 6.4),
        (4, 119 + 48, ["--use_peft"], 3.7),
        (8, 119 + 48, ["--use_peft", "--gradient_checkpointing"], 3.6),
        (8, 119 + 48, [], 5.7),
        (8, 119 + 48, ["--gradient_checkpointing"], 4.0),
    ],
)
def test_what_training_takes_on_a_cpu_was_measured(batch, tokens, overrides, measured, tmp_path):
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536}
    _, written = saved(
        "llama",
        vocab_size=49_152,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        **sizes,
    )
    (tmp_path / "config.json").write_text(json.dumps(written))
    at_a_time = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_generations": 4,
        "max_prompt_length": tokens - 48,
        "max_completion_length": 48,
        "lora_target_modules": "all-linear",
        "beta": 0,
        "model_name_or_path": tmp_path,
    }
    options = [text for key, value in at_a_time.items() for text in (f"--{key}", str(value))]
    recipe = load_recipe(TINY, [*options, *overrides])
    for processes, gpu_memory in ((1, 0.0), (1, 80.0)):  # a GPU beside it changes nothing
        memory = estimate_memory(recipe, processes, gpu_memory)
        assert peak(memory, recipe) == pytest.approx(measured, rel=0.25)


def test_what_a_checkpoint_holds():
    # Of 3B: 3.09e9 parameters of 4 bytes, with Adam's moments 12; ZeRO-3 2 and 14.
    def gigabytes(*changes, sharded=False):
        recipe = load_recipe(RECIPES / "grpo-qwen-2.5-3b-1gpu.yaml", changes)
        return [round(part / 1e9) for part in checkpoint_bytes(recipe, sharded).values()]

    assert gigabytes() == [12, 25]
    assert gigabytes(sharded=True) == [6, 37]
    assert gigabytes("--save_only_model") == [12, 0]
    assert gigabytes("--use_peft", sharded=True) == [0, 0]
    assert checkpoint_bytes(load_recipe(TINY, ["--model_name_or_path", "./nothing"]), False) is None


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
