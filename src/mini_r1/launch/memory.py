"""What a training process and a checkpoint must hold, by purpose: estimates, good to a few GiB.

On GPUs nothing of this has been measured yet; on a CPU it has (tests/launch/test_memory.py). Left
out: whatever a model's config.json does not say. Imports no ML library.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mini_r1 import InputError
from mini_r1.model import model_folder, whole_model
from mini_r1.model_files import (
    HIDDEN_SIZE,
    LAYERS,
    VOCABULARY,
    number,
    read_json,
    tensors,
    text_config,
)
from mini_r1.recipe import Recipe
from mini_r1.run import weights_of

GIB = 2**30
# Completions that an evaluation samples at once; on 2 cores 64 take nearly as long as 256.
EVALUATION_BATCH = 256
# CUDA context, NCCL buffers and fragmentation. An assumption: no GPU run of ours has measured it.
OVERHEAD_GIB = 3.0
CPU_OVERHEAD_GIB = 0.5  # the libraries themselves, measured
NF4_BYTES = 0.55  # per 4-bit weight, its scales included (Dettmers et al., arXiv:2305.14314)
# On a CPU, of what is allocated: the heap that glibc does not give back, measured at 1.1 to 1.5.
HEAP = 1.15
# TRL 1.16 folds the logits of so many tokens and entries of the vocabulary at a time
# (trl/kernels/chunked_logprob.py); without Triton it scores prompts, too, and holds so many copies.
TILE, TILE_COPIES = (4096, 32768), 8
# Model types whose layers are counted right below; each has its real class beside it in the tests.
GATED = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "opt", "phi", "starcoder2")  # an MLP of two matrices
LEARNED_POSITIONS = ("gpt2", "gpt_neo", "opt")


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer as its config.json describes it.

    Attributes:
        gated: the MLP has three matrices, not two.
        moe_layers: how many layers have experts instead of an MLP of intermediate_size.
        num_experts: of such a layer, each `expert_size` wide; `num_experts_per_tok` work on a
            token, and beside them always an MLP of `shared_size`.
        positions: rows of a table of learned positions.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    head_dim: int | None = None
    gated: bool = True
    moe_layers: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    expert_size: int = 0
    shared_size: int = 0
    positions: int = 0

    @property
    def q_width(self) -> int:
        return self.num_attention_heads * self._head_width

    @property
    def kv_width(self) -> int:
        return self.num_key_value_heads * self._head_width

    @property
    def mlp_width(self) -> float:
        """How wide the MLPs are that work on a token, on average over the layers."""
        experts = self.num_experts_per_tok * self.expert_size + self.shared_size
        dense = (self.num_hidden_layers - self.moe_layers) * self.intermediate_size
        return (dense + self.moe_layers * experts) / self.num_hidden_layers

    @property
    def _head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def experts(self) -> int:
        """Parameters of the experts, all of them; 4-bit quantization leaves them as they are."""
        return self.moe_layers * self.num_experts * self._mlp(self.expert_size)

    @property
    def linear(self) -> int:
        """Parameters of the linear layers, which 4-bit quantization applies to."""
        attention = self.hidden_size * (2 * self.q_width + 2 * self.kv_width)
        dense = (self.num_hidden_layers - self.moe_layers) * self._mlp(self.intermediate_size)
        router_and_shared = self.hidden_size * self.num_experts + self._mlp(self.shared_size)
        return self.num_hidden_layers * attention + dense + self.moe_layers * router_and_shared

    @property
    def embeddings(self) -> int:
        tables = self.vocab_size * (1 if self.tie_word_embeddings else 2) + self.positions
        return tables * self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them; biases and norms are left out (less than 0.1 %)."""
        return self.linear + self.experts + self.embeddings

    def _mlp(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden_size * width


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
    """The shape of a model known by name, in a folder or in the cache.

    None if only loading would tell: it is not here, or of a kind that is not known here.
    """
    if name in KNOWN_SHAPES:
        return KNOWN_SHAPES[name]
    try:
        folder = model_folder(whole_model(weights_of(name)))
        if folder is None:
            return None
        config = text_config(read_json(folder / "config.json"))
        shape = shape_of(config)
        if shape is None or config.get("model_type") in (*GATED, *UNGATED):
            return shape
        counted = sum(math.prod(dimensions) for _, dimensions in tensors(folder).values())
        return shape if math.isclose(shape.parameters, counted, rel_tol=0.05) else None
    except InputError:
        return None


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json describes, flat (`model_files.text_config`); None if it lacks.

    Names are those of Llama, else of GPT-2 and its relatives, and of the mixtures of experts that
    follow Mixtral, Qwen and DeepSeek.
    """

    def size(*names: str) -> int | None:
        return number(config, names)

    gated = config.get("model_type") not in UNGATED
    vocabulary, hidden, layers = (size(*names) for names in (VOCABULARY, HIDDEN_SIZE, LAYERS))
    heads = size("num_attention_heads", "n_head", "n_heads", "num_heads")
    experts = size("num_local_experts", "num_experts", "n_routed_experts") or 0
    expert_size = size("moe_intermediate_size", "intermediate_size") or 0
    inner = size("intermediate_size", "n_inner", "ffn_dim")
    if inner is None and not gated and hidden is not None:
        inner = 4 * hidden  # what GPT-2 leaves to its class
    if vocabulary is None or hidden is None or layers is None or heads is None or inner is None:
        return None
    shared = size("shared_expert_intermediate_size", "shared_intermediate_size")
    if shared is None and (number_shared := size("n_shared_experts", "num_shared_experts")):
        shared = number_shared * expert_size
    return Shape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads") or heads,
        intermediate_size=inner,
        tie_word_embeddings=config.get("tie_word_embeddings") is not False,
        head_dim=size("head_dim"),
        gated=gated,
        moe_layers=_layers_with_experts(config, layers) if experts else 0,
        num_experts=experts,
        num_experts_per_tok=size("num_experts_per_tok") or 1 if experts else 0,
        expert_size=expert_size if experts else 0,
        shared_size=shared or 0 if experts else 0,
        positions=size("max_position_embeddings", "n_positions") or 0
        if config.get("model_type") in LEARNED_POSITIONS
        else 0,
    )


def _layers_with_experts(config: Mapping[str, Any], layers: int) -> int:
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list):
        return kinds.count("sparse")
    step = number(config, ("decoder_sparse_step",)) or 1
    dense = config.get("mlp_only_layers") or ()
    first = number(config, ("first_k_dense_replace",)) or 0
    return sum(
        layer >= first and layer not in dense and (layer + 1) % step == 0 for layer in range(layers)
    )


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
    """GiB that a training process must hold, by purpose; None if the model's shape is not known.

    Args:
        gpu_memory: GiB per GPU, of which colocated vLLM takes its share; 0 without a GPU.
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
        frozen = shape.linear * (NF4_BYTES if get("load_in_4bit") else width)
        held = state_bytes(_adapters(shape, get("lora_r")), 4)
        held["weights"] += frozen + (shape.experts + shape.embeddings) * width
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
    on_cpu = bool(get("use_cpu")) or not gpu_memory
    if on_cpu:
        held["activations"] = HEAP * _activations_on_cpu(shape, batch * length, recipe)
        tile = min(batch * length, TILE[0]) * min(shape.vocab_size, TILE[1])
        held["logits"] = HEAP * TILE_COPIES * 4 * tile
    else:
        held["activations"] = _activations(shape, batch * length, get("gradient_checkpointing"))
        # [batch, completion, vocabulary] in 16 bit, their scaled copy and their gradient.
        held["logits"] = 3 * 2 * batch * completion * shape.vocab_size
    if mixed and width == 4:
        held["activations"] += 2 * shape.parameters

    # What sampling adds: the keys and values of all that is sampled at once.
    accumulated = get("steps_per_generation") or get("gradient_accumulation_steps")
    sampled = max(EVALUATION_BATCH, 0 if get("use_vllm") else batch * accumulated)
    per_token = 2 * width * shape.num_hidden_layers * shape.kv_width
    held["KV cache"] = sampled * length * per_token

    in_gib = {name: size / GIB for name, size in held.items()}
    if get("use_vllm") and get("vllm_mode") == "colocate":
        in_gib["vLLM"] = get("vllm_gpu_memory_utilization") * gpu_memory
    return {**in_gib, "overhead": CPU_OVERHEAD_GIB if on_cpu else OVERHEAD_GIB}


def checkpoint_bytes(recipe: Recipe, sharded: bool) -> dict[str, float] | None:
    """Bytes of a checkpoint by content, `weights` as in the trained model; None if not known.

    Args:
        sharded: by ZeRO-3, whose optimizer keeps a 32-bit copy of 16-bit weights.
    """
    shape = model_shape(recipe.model["model_name_or_path"])
    if shape is None:
        return None
    narrow = has_16_bit_weights(recipe) or (sharded and computes_in_16_bit(recipe))
    trained, width = shape.parameters, 2 if narrow else 4
    if recipe.get("use_peft"):
        trained, width, sharded = _adapters(shape, recipe.get("lora_r")), 4, False
    held = state_bytes(trained, width, 1 if sharded else None)
    optimizer = 0.0 if recipe.get("save_only_model") else held["optimizer"]
    return {"weights": held["weights"], "optimizer": optimizer}


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
    dense = (shape.num_hidden_layers - shape.moe_layers) * (
        shape.hidden_size + shape.intermediate_size
    )
    experts = shape.moe_layers * shape.num_experts * (shape.hidden_size + shape.expert_size)
    return rank * (shape.num_hidden_layers * attention + 3 * (dense + experts))


def _activations(shape: Shape, tokens: int, checkpointing: bool) -> float:
    """Bytes of 16-bit activations that the backward pass of so many tokens needs."""
    # One layer's inputs, queries, keys, values, attention output and wide MLP tensors, twice.
    width = 8 * shape.hidden_size + 2 * shape.kv_width + 4 * shape.mlp_width
    layer = 2 * tokens * width
    if checkpointing:
        return 2 * tokens * shape.hidden_size * shape.num_hidden_layers + layer
    return layer * shape.num_hidden_layers


def _activations_on_cpu(shape: Shape, tokens: int, recipe: Recipe) -> float:
    """Bytes of activations that the backward pass of so many tokens needs on a CPU.

    Measured for the shape of SmolLM2-135M, in 32 bit: 12,250 numbers per token and layer, 18,500
    with LoRA on all linear layers.
    """
    # As on a GPU; norms, which are not fused, keep what they have scaled, too.
    width = 10 * shape.hidden_size + 2 * shape.kv_width + 4 * shape.mlp_width
    if recipe.get("use_peft") and recipe.get("lora_dropout"):
        # Each adapter's own input, and the mask that thinned it out.
        inputs = {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), shape.hidden_size),
            "o_proj": shape.q_width,
            **dict.fromkeys(("gate_proj", "up_proj"), shape.hidden_size),
            "down_proj": shape.mlp_width,
        }
        # PEFT's own choice for most models is the first.
        named = recipe.get("lora_target_modules") or ["q_proj", "v_proj"]
        width += 2 * sum(inputs.get(name, 0) for name in named) or 2 * sum(inputs.values())
    size = 2 if computes_in_16_bit(recipe) else 4
    layer = size * tokens * width
    if recipe.get("gradient_checkpointing"):
        return size * tokens * shape.hidden_size * shape.num_hidden_layers + layer
    return layer * shape.num_hidden_layers
