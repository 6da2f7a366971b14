"""What a training GPU must hold, and a checkpoint, by purpose: estimates, good to a few GiB.

Left out: whatever a model's config.json does not say. Imports no ML library.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mini_r1.model import model_path
from mini_r1.recipe import Recipe

GIB = 2**30
# Completions that an evaluation samples at once; on 2 cores 64 take nearly as long as 256.
EVALUATION_BATCH = 256
# CUDA context, NCCL buffers and fragmentation. An assumption: no GPU run of ours has measured it.
OVERHEAD_GIB = 3.0
NF4_BYTES = 0.55  # per 4-bit weight, its scales included (Dettmers et al., arXiv:2305.14314)


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer as its config.json describes it (Qwen2, Llama and alike)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    head_dim: int | None = None

    @property
    def q_width(self) -> int:
        return self.num_attention_heads * self._head_width

    @property
    def kv_width(self) -> int:
        return self.num_key_value_heads * self._head_width

    @property
    def _head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def matrices(self) -> int:
        """Parameters of the linear layers, which 4-bit quantization and LoRA apply to."""
        attention = self.hidden_size * (2 * self.q_width + 2 * self.kv_width)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp)

    @property
    def embeddings(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All of them; biases and norms are left out (less than 0.1 %)."""
        return self.matrices + self.embeddings


# As in the models' config.json on the hub, which is not needed to plan a run.
QWEN = {
    "0.5B": Shape(151_936, 896, 24, 14, 2, 4_864, True),
    "1.5B": Shape(151_936, 1_536, 28, 12, 2, 8_960, True),
    "3B": Shape(151_936, 2_048, 36, 16, 2, 11_008, True),
    "7B": Shape(152_064, 3_584, 28, 28, 4, 18_944, False),
}
KNOWN_SHAPES = {
    f"Qwen/Qwen2.5-{size}{kind}": shape
    for size, shape in QWEN.items()
    for kind in ("", "-Instruct")
}


def model_shape(name: str) -> Shape | None:
    """The shape of a model known by name or lying in a folder; None if only loading would tell."""
    if name in KNOWN_SHAPES:
        return KNOWN_SHAPES[name]
    try:
        file = Path(model_path(name)) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        return Shape(**{key: config.get(key) for key in Shape.__dataclass_fields__})
    except (OSError, ValueError, TypeError):
        return None


def state_bytes(parameters: float, width: int, sharded_over: int | None = None) -> dict[str, float]:
    """Bytes per GPU of weights, gradients and Adam's state for trained parameters.

    ZeRO-3 keeps a 32-bit copy and both moments of 16-bit weights: 2 + 2 + 12 bytes per parameter
    in all (Rajbhandari et al., arXiv:1910.02054, section 3.1). Plain AdamW's moments are as wide
    as the weights.

    Args:
        width: bytes per weight.
        sharded_over: GPUs under ZeRO-3.
    """
    optimizer = (12 if width == 2 else 8) if sharded_over else 2 * width
    per_gpu = parameters / (sharded_over or 1)
    return {
        "weights": width * per_gpu,
        "gradients": width * per_gpu,
        "optimizer": optimizer * per_gpu,
    }


def estimate_memory(recipe: Recipe, processes: int, gpu_memory: float) -> dict[str, float] | None:
    """GiB that a training GPU must hold, by purpose; None if the model's shape is not known.

    Args:
        gpu_memory: GiB per GPU, of which colocated vLLM takes its share.
    """
    shape = model_shape(recipe.model["model_name_or_path"])
    if shape is None:
        return None
    get = recipe.get
    sharded_over = processes if processes > 1 and not get("use_peft") else None
    mixed = computes_in_16_bit(recipe)
    # ZeRO casts the weights itself; autocast copies them, layer by layer, and keeps them wide.
    width = 2 if has_16_bit_weights(recipe) or (mixed and sharded_over) else 4

    # What is there all the time: weights, gradients, the optimizer's state, the reference model.
    if get("use_peft"):
        frozen = shape.matrices * (NF4_BYTES if get("load_in_4bit") else width)
        held = state_bytes(_adapters(shape, get("lora_r")), 4)
        held["weights"] += frozen + shape.embeddings * width
    else:
        held = state_bytes(shape.parameters, width, sharded_over)
        if sharded_over:
            # The whole model, to evaluate it, and to generate without vLLM.
            held["gathered"] = width * shape.parameters
        if get("beta"):
            held["reference"] = held["weights"]

    # What a micro-batch adds while it is trained on.
    batch, completion = get("per_device_train_batch_size"), get("max_completion_length")
    length = recipe.task.max_prompt_length + completion
    held["activations"] = _activations(shape, batch * length, get("gradient_checkpointing"))
    if mixed and width == 4:
        held["activations"] += 2 * shape.parameters
    # [batch, completion, vocabulary] in 16 bit, their scaled copy and their gradient.
    held["logits"] = 3 * 2 * batch * completion * shape.vocab_size

    # What sampling adds: the keys and values of all that is sampled at once.
    accumulated = get("steps_per_generation") or get("gradient_accumulation_steps")
    sampled = max(EVALUATION_BATCH, 0 if get("use_vllm") else batch * accumulated)
    per_token = 2 * width * shape.num_hidden_layers * shape.kv_width
    held["KV cache"] = sampled * length * per_token

    in_gib = {name: size / GIB for name, size in held.items()}
    if get("use_vllm") and get("vllm_mode") == "colocate":
        in_gib["vLLM"] = get("vllm_gpu_memory_utilization") * gpu_memory
    return {**in_gib, "overhead": OVERHEAD_GIB if gpu_memory else 0.0}


def checkpoint_bytes(recipe: Recipe, processes: int) -> dict[str, float] | None:
    """Bytes of a checkpoint by content; None if the model's shape is not known."""
    shape = model_shape(recipe.model["model_name_or_path"])
    if shape is None:
        return None
    if recipe.get("use_peft"):
        saved, parts = state_bytes(_adapters(shape, recipe.get("lora_r")), 4), 1
    else:
        sharded_over = processes if processes > 1 else None
        in_16_bit = has_16_bit_weights(recipe) or (computes_in_16_bit(recipe) and sharded_over)
        saved, parts = state_bytes(shape.parameters, 2 if in_16_bit else 4, sharded_over), processes
    optimizer = 0.0 if recipe.get("save_only_model") else saved["optimizer"] * parts
    return {"weights": saved["weights"] * parts, "optimizer": optimizer}


def peak(memory: Mapping[str, float], recipe: Recipe) -> float:
    """The most GiB that are held at once.

    The training pass, evaluation and vLLM take turns, unless vLLM stays awake.
    """
    training = memory["activations"] + memory["logits"]
    evaluating, vllm = memory["KV cache"], memory.get("vLLM", 0.0)
    always = sum(memory.values()) - training - evaluating - vllm
    if recipe.get("vllm_enable_sleep_mode"):
        return always + max(training, evaluating, vllm)
    return always + vllm + max(training, evaluating)


def has_16_bit_weights(recipe: Recipe) -> bool:
    """Whether the weights are loaded in 16 bit."""
    return recipe.get("dtype") in ("bfloat16", "float16")


def computes_in_16_bit(recipe: Recipe) -> bool:
    """Whether matrices are multiplied in 16 bit.

    TRL computes in bf16 unless told otherwise or asked for fp16 (`_BaseConfig.__post_init__`).
    """
    return bool(recipe.get("fp16")) or recipe.get("bf16") is not False


def _adapters(shape: Shape, rank: int) -> int:
    """Parameters of LoRA on all linear layers: `rank` per input and per output of each."""
    attention = 2 * shape.hidden_size + 2 * shape.q_width + 2 * (shape.hidden_size + shape.kv_width)
    mlp = 3 * (shape.hidden_size + shape.intermediate_size)
    return rank * shape.num_hidden_layers * (attention + mlp)


def _activations(shape: Shape, tokens: int, checkpointing: bool) -> int:
    """Bytes of 16-bit activations that the backward pass of so many tokens needs."""
    # One layer's inputs, queries, keys, values, attention output and wide MLP tensors, twice.
    width = 8 * shape.hidden_size + 2 * shape.kv_width + 4 * shape.intermediate_size
    layer = 2 * tokens * width
    if checkpointing:
        return 2 * tokens * shape.hidden_size * shape.num_hidden_layers + layer
    return layer * shape.num_hidden_layers
