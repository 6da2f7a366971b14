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
    batch_that_fits,
    checkpoint_bytes,
    computes_in_16_bit,
    evaluation_batch,
    model_shape,
    peak,
    phases,
    shape_of,
    state_bytes,
    zero_stage,
)
from mini_r1.launch.plan import make_plan
from mini_r1.model import load_model
from mini_r1.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "tiny-cpu.yaml"


def of_gpus(name, *overrides):
    return load_recipe(RECIPES / f"grpo-qwen-2.5-{name}.yaml", overrides)


def estimated(name, *overrides, processes=1, gpu_memory=80):
    return phases(of_gpus(name, *overrides), processes, gpu_memory)


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
        assert peak(phases(recipe, processes, gpu_memory))[1] == pytest.approx(measured, rel=0.25)


def test_what_a_checkpoint_holds():
    # Of 3B: 3.09e9 parameters of 4 bytes, with Adam's moments 12; ZeRO-3 2 and 12. ZeRO-2 saves the
    # weights once more: seen in a checkpoint of tiny_base, 1.6 + 1.6 + 9.3 MB, ZeRO-3 1.5 + 9.3.
    def gigabytes(*changes, stage=0):
        recipe = load_recipe(RECIPES / "grpo-qwen-2.5-3b-1gpu.yaml", changes)
        return [round(part / 1e9) for part in checkpoint_bytes(recipe, stage).values()]

    assert gigabytes() == [12, 25]
    assert gigabytes(stage=3) == [6, 37]
    assert gigabytes(stage=2) == [6, 43]
    assert gigabytes("--save_only_model") == [12, 0]
    assert gigabytes("--use_peft", stage=3) == [0, 0]
    assert checkpoint_bytes(load_recipe(TINY, ["--model_name_or_path", "./nothing"]), 0) is None


@pytest.mark.parametrize(("gpus", "gigabytes"), [(None, 120), (64, 1.9)])
def test_optimizer_states_as_in_the_zero_paper(gpus, gigabytes):
    # Rajbhandari et al., arXiv:1910.02054, figure 1: 7.5B parameters, mixed-precision Adam, without
    # ZeRO and with all stages on 64.
    needed = sum(state_bytes(7.5e9, 2, gpus or 1).values()) / 1e9
    assert needed == pytest.approx(gigabytes, rel=0.02)


# ---- Phases ---------------------------------------------------------------------------------

WIDE, NARROW = ["--dtype", "float32"], ["--dtype", "bfloat16"]
WITHOUT = ["--gradient_checkpointing", "false"]


@pytest.mark.parametrize(
    ("size", "batch", "overrides", "simulated"),
    [
        # GiB that a micro-batch of 1280 tokens per completion adds; scripts/simulate_memory.py. The
        # audit that found the plan wrong (issue 17) had 8.7, 3.8, 6.4, 3.0, 4.7, 5.7, 50.4, 21.0.
        ("3B", 8, WIDE, 8.74),
        ("3B", 8, NARROW, 3.79),
        ("3B", 16, NARROW, 7.00),
        ("3B", 4, NARROW, 2.83),
        ("1.5B", 8, WIDE, 4.70),
        ("7B", 8, NARROW, 5.70),
        ("3B", 8, [*NARROW, *WITHOUT], 50.28),
        ("3B", 2, [*WIDE, *WITHOUT], 20.58),
    ],
)
def test_the_activations_of_gpus_are_those_simulated(size, batch, overrides, simulated):
    options = ["--model_name_or_path", f"Qwen/Qwen2.5-{size}", *overrides]
    options += ["--per_device_train_batch_size", str(batch)]
    activations = estimated("3b-1gpu", *options)["training"]["activations"]
    assert activations == pytest.approx(simulated, rel=0.03)


@pytest.mark.parametrize(
    ("size", "dtype", "simulated"),
    [
        # GiB beside the weights, of one decoding step of 256 completions with 1280 tokens each: the
        # audit of issue 17, and scripts/simulate_memory.py.
        ("3B", WIDE, 35.0),
        ("3B", NARROW, 13.8),
        ("1.5B", WIDE, 25.5),
    ],
)
def test_an_evaluation_by_transformers_takes_what_was_simulated(size, dtype, simulated):
    options = ["--model_name_or_path", f"Qwen/Qwen2.5-{size}", "--use_vllm", "false", *dtype]
    evaluation = estimated("3b-1gpu", *options, gpu_memory=141)["evaluation"]
    sampling = evaluation["KV cache"] + evaluation.get("cast weights", 0)
    assert sampling == pytest.approx(simulated, rel=0.01)


def test_phases_of_one_gpu_that_vllm_shares():
    # By hand, for 3.09e9 parameters in 32 bit: 11.5 GiB of weights and of gradients, 23.0 of
    # moments, activations as simulated; vLLM has 30 % of 80 and sleeps while the model is trained.
    share = ("--vllm_gpu_memory_utilization", "0.3")
    memory = estimated("3b-1gpu", *share, "--beta", "0")
    assert list(memory) == ["training", "generation", "evaluation"]
    assert {name: sum(parts.values()) for name, parts in memory.items()} == {
        "training": pytest.approx(11.5 + 11.5 + 23.0 + 8.7 + 3.0, rel=0.01),
        "generation": pytest.approx(11.5 + 23.0 + 24.0 + 3.0, rel=0.01),
        "evaluation": pytest.approx(11.5 + 23.0 + 24.0 + 3.0, rel=0.01),
    }
    assert peak(memory)[0] in ("generation", "evaluation")
    # A reference model as wide as the policy's fits, too.
    reference = estimated("3b-1gpu", *share, "--beta", "0.001")
    assert peak(reference)[1] == pytest.approx(peak(memory)[1] + 11.5, rel=0.01)
    assert peak(reference)[1] < 79


def test_published_runs_fit_their_gpus():
    # The tutorial: 3B on 4x H100 80 GB. nano-aha-moment: 3B in full on one 80 GB card beside vLLM
    # that has 0.3 of it and sleeps. GRPO-Zero: 3B in full on 48 GB, without a 32-bit copy.
    make_plan(of_gpus("3b-deepseek-r1-countdown"), Machine(4, 80.0))
    make_plan(of_gpus("3b-base-1gpu"), Machine(1, 80.0))
    small = [*NARROW, "--use_vllm", "false", "--per_device_train_batch_size", "2"]
    make_plan(of_gpus("3b-1gpu", *small, "--gradient_accumulation_steps", "96"), Machine(1, 48.0))


def test_who_sleeps_takes_turns():
    asleep, awake = (
        estimated("3b-1gpu", "--vllm_enable_sleep_mode", sleep) for sleep in ("true", "false")
    )
    assert "vLLM" not in asleep["training"]
    assert awake["training"] == {**asleep["training"], "vLLM": pytest.approx(16)}
    for phase in ("generation", "evaluation"):
        assert asleep[phase] == awake[phase]
        assert "gradients" not in asleep[phase]  # given back after each step
        assert "KV cache" not in asleep[phase]  # vLLM's own


def test_colocated_vllm_takes_its_share_of_the_gpu():
    recipe = of_gpus("1.5b-1gpu", "--vllm_gpu_memory_utilization", "0.4")
    assert phases(recipe, 1, 80)["generation"]["vLLM"] == pytest.approx(0.4 * 80)
    del recipe.training["vllm_gpu_memory_utilization"]
    assert phases(recipe, 1, 80)["generation"]["vLLM"] == pytest.approx(0.3 * 80)  # as TRL says


def test_a_server_is_sent_the_weights_from_buffers():
    # vLLM's packed_tensor.py: two of them, each filled with whole tensors until it holds more than
    # 1 GiB; the largest, 151,936 x 2,048 in 16 bit, has 0.58. ZeRO-3 gathers them beside.
    recipe = of_gpus("3b-deepseek-r1-countdown")
    for stage, expected in ((2, 2 * 1.58), (3, 3 * 1.58)):
        memory = phases(recipe, 3, 80, stage=stage)
        assert memory["generation"]["broadcast"] == pytest.approx(expected, rel=0.01)
        assert memory["evaluation"] == memory["generation"]
    small = of_gpus("3b-deepseek-r1-countdown", "--model_name_or_path", "tiny_base")
    memory = phases(small, 3, 80)  # in one buffer, all of it
    assert memory["generation"]["broadcast"] == memory["generation"]["weights"]


def test_keys_and_values_are_copied_for_every_head():
    # Qwen2.5-3B: 36 layers, 2 heads of 128 for keys and values, 16 bit: 36,864 bytes per token;
    # those of one layer for all 16 heads: 8,192.
    memory = estimated("3b-qlora", "--attn_implementation", "sdpa")
    assert memory["evaluation"]["KV cache"] * GIB == 256 * 1280 * (36_864 + 8_192)
    assert memory["generation"]["KV cache"] * GIB == 32 * 1280 * (36_864 + 8_192)
    fewer = estimated("3b-qlora", "--generation_batch_size", "16")
    assert fewer["generation"]["KV cache"] * GIB == 16 * 1280 * (36_864 + 8_192)


def test_an_evaluation_samples_as_much_at_once_as_fits():
    recipe = of_gpus("3b-qlora")
    for gpu_memory, batch in ((141, 256), (24, 256), (16, 128), (8, 32)):
        assert evaluation_batch(recipe, 1, gpu_memory) == batch
        assert peak(phases(recipe, 1, gpu_memory))[1] <= gpu_memory
        if batch < 256:
            assert gpu_memory - sum(phases(recipe, 1, gpu_memory)["evaluation"].values()) < (
                batch * 1280 * (36_864 + 8_192) / GIB
            )
    assert evaluation_batch(recipe, 1, 1) == 8  # refused, whatever the batch
    assert evaluation_batch(recipe, 1, 0) == evaluation_batch(load_recipe(TINY), 1, 1) == 256
    # A finished model of 3B, 5.7 GiB in 16 bit, has a GPU for itself; one that is not known, too.
    for gpu_memory, batch in ((0, 256), (80, 256), (24, 256), (16, 128), (10, 16), (6, 8)):
        assert batch_that_fits(QWEN["3B"], 1280, gpu_memory) == batch
        assert batch_that_fits(None, 1280, gpu_memory) == 256


def test_zero_2_is_chosen_where_all_phases_fit():
    recipe = of_gpus("3b-deepseek-r1-countdown")
    assert zero_stage(recipe, 3, 80) == 2
    # 24 GiB hold a third of everything, but not whole weights, reference and a third of the rest.
    assert peak(phases(recipe, 7, 24, stage=2))[1] > 24 > peak(phases(recipe, 7, 24, stage=3))[1]
    assert zero_stage(recipe, 7, 24) == 3
    # What is not known is safe with ZeRO-3; adapters and a CPU's models are copied.
    assert zero_stage(recipe, 3, 0) == zero_stage(recipe, 3, float("inf")) == 3
    assert zero_stage(of_gpus("3b-1gpu", "--model_name_or_path", "some/model"), 3, 80) == 3
    assert zero_stage(of_gpus("3b-qlora"), 4, 24) == zero_stage(load_recipe(TINY), 2, 80) == 0
    assert zero_stage(recipe, 1, 80) == 0


def test_what_zero_shards():
    # Bytes per parameter: 16-bit weights and gradients, 12 of the optimizer; over 3 GPUs.
    recipe, parameters = of_gpus("3b-deepseek-r1-countdown"), QWEN["3B"].parameters / GIB
    for stage, weights in ((2, 2), (3, 2 / 3)):
        training = phases(recipe, 3, 80, stage=stage)["training"]
        assert training["weights"] == training["reference"] == pytest.approx(weights * parameters)
        assert training["gradients"] == pytest.approx(2 / 3 * parameters)
        assert training["optimizer"] == pytest.approx(4 * parameters)
    # Without vLLM ZeRO-3 gathers the whole model to generate.
    memory = phases(of_gpus("3b-1gpu", "--use_vllm", "false"), 3, 80, stage=3)
    for phase in ("generation", "evaluation"):
        assert memory[phase]["gathered"] == pytest.approx(2 * parameters)


def test_frozen_weights_take_half_a_byte_in_4_bit():
    # Of Qwen2.5-3B: 2.774e9 weights in linear layers, 0.311e9 embeddings, which stay in 16 bit;
    # LoRA of rank 1 on all linear layers: 1.871e6 weights, in 32 bit.
    adapters = 1.871e6 * 4 * load_recipe(RECIPES / "grpo-qwen-2.5-3b-qlora.yaml").get("lora_r")
    for overrides, per_weight in (([], 4.4 / 8), (["--load_in_4bit", "false"], 2)):
        weights = estimated("3b-qlora", *overrides)["training"]["weights"] * GIB
        expected = 2.774e9 * per_weight + 0.311e9 * 2 + adapters
        assert weights == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [([], True), (["--bf16", "false"], False), (["--bf16", "false", "--fp16"], True)],
)
def test_trl_computes_in_16_bit_unless_told_otherwise(tmp_path, overrides, expected):
    path = tmp_path / "r.yaml"
    path.write_text("model_name_or_path: tiny_base\n")
    assert computes_in_16_bit(load_recipe(path, overrides)) is expected
