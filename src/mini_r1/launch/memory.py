"""What a training process holds in each of its phases, and a checkpoint, by purpose: estimates.

Training, generation and evaluation take turns, and the largest of them must fit. For GPUs nothing
of this has been measured yet, but simulated (scripts/simulate_memory.py); on a CPU it has been
measured (tests/launch/test_memory.py). Left out: whatever a model's config.json does not say.
Imports no ML library.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
# Completions that an evaluation by transformers samples at once, if that much memory is left; on 2
# cores 64 take nearly as long as 256.
EVALUATION_BATCH, SMALLEST_BATCH = 256, 8
# CUDA context, NCCL buffers and fragmentation. An assumption: no GPU run of ours has measured it.
OVERHEAD_GIB = 3.0
CPU_OVERHEAD_GIB = 0.5  # the libraries themselves, measured
VLLM_OVERHEAD_GIB = 1.0  # within its share: what a pass takes, CUDA graphs; an assumption, too
NF4_BYTES = 0.55  # per 4-bit weight, its scales included (Dettmers et al., arXiv:2305.14314)
# On a CPU, of what is allocated: the heap that glibc does not give back, measured at 1.1 to 1.5.
HEAP = 1.15
# TRL 1.16 folds the logits of so many tokens and entries of the vocabulary at a time
# (trl/kernels/chunked_logprob.py); without Triton it scores prompts, too, and holds so many copies.
TILE, TILE_COPIES = (4096, 32768), 8
# DeepSpeed 0.19's defaults, in numbers: what it reduces at once, and what ZeRO-3 keeps gathered.
REDUCE_BUCKET, LIVE_PARAMETERS = 5e8, 1e9
# vLLM 0.31 sends weights in two buffers, each filled until it holds more than this; in bytes.
BROADCAST_BUFFER = 2**30
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
    **{
        f"Qwen/Qwen2.5-{size}{kind}": shape
        for size, shape in QWEN.items()
        for kind in ("", "-Instruct")
    },
    # A folder that recipes/smollm2-135m.yaml says how to make.
    "./models/smollm2-135m-sft": Shape(49_152, 576, 30, 9, 3, 1_536, True),
}


def model_shape(name: str) -> Shape | None:
    """The shape of a model known by name, in a folder or in the cache.

    None if only loading would tell: it is not here, or of a kind that is not known here.
    """
    if name in KNOWN_SHAPES and not Path(name).exists():
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


def state_bytes(
    parameters: float, width: int, sharded_over: int | None = None, stage: int = 3
) -> dict[str, float]:
    """Bytes per GPU of weights, gradients and Adam's state for trained parameters.

    ZeRO keeps a 32-bit copy and both moments of 16-bit weights: 2 + 2 + 12 bytes per parameter in
    all (Rajbhandari et al., arXiv:1910.02054, section 3.1). Plain AdamW's moments are as wide as
    the weights.

    Args:
        width: bytes per weight.
        sharded_over: GPUs under ZeRO.
        stage: of ZeRO: 2 leaves the weights whole, 3 shards them, too.
    """
    optimizer = (12 if width == 2 else 8) if sharded_over else 2 * width
    per_gpu = parameters / (sharded_over or 1)
    return {
        "weights": width * (per_gpu if stage == 3 else parameters),
        "gradients": width * per_gpu,
        "optimizer": optimizer * per_gpu,
    }


def zero_stage(recipe: Recipe, processes: int, gpu_memory: float) -> int:
    """How a launch of so many processes shards a model: ZeRO's stage, 0 if it does not.

    Stage 2 shards gradients and optimizer, and gathers weights once per step. It is chosen if all
    phases fit with it; else stage 3, which gathers every layer in every pass. An adapter is copied.

    Args:
        gpu_memory: GiB per GPU; where it or the model's shape is not known, stage 3 is safe.
    """
    if processes == 1 or recipe.get("use_peft") or recipe.get("use_cpu"):
        return 0
    if not 0 < gpu_memory < math.inf:
        return 3
    memory = phases(recipe, processes, gpu_memory, stage=2)
    return 2 if memory is not None and peak(memory)[1] <= gpu_memory else 3


def phases(
    recipe: Recipe, processes: int, gpu_memory: float, stage: int | None = None
) -> dict[str, dict[str, float]] | None:
    """GiB that a training process holds in each phase, by purpose; None if the shape is not known.

    Args:
        gpu_memory: GiB per GPU, of which colocated vLLM takes its share; 0 without a GPU.
        stage: of ZeRO; by default that of `zero_stage`.

    Returns:
        the sums "training", "generation" and "evaluation", in this order.
    """
    shape = model_shape(recipe.model["model_name_or_path"])
    if shape is None:
        return None
    get, stage = recipe.get, zero_stage(recipe, processes, gpu_memory) if stage is None else stage
    on_cpu = _on_cpu(recipe, gpu_memory)
    width, heap = _width(recipe, stage), HEAP if on_cpu else 1.0
    vllm = get("vllm_mode") if get("use_vllm") else None

    always, training = _state(shape, recipe, processes, stage)
    generation: dict[str, float] = {}
    length = recipe.task.max_prompt_length + get("max_completion_length")
    micro_batch = get("per_device_train_batch_size")
    training["activations"] = heap * _activations(shape, recipe, micro_batch, width, on_cpu)

    # vLLM generates and evaluates; asleep it holds nothing, elsewhere rank 0 sends it the weights.
    if vllm == "colocate":
        share = {"vLLM": 0.0 if on_cpu else get("vllm_gpu_memory_utilization") * gpu_memory * GIB}
        generation |= share
        training |= {} if get("vllm_enable_sleep_mode") else share
    elif vllm == "server":
        generation["broadcast"] = _broadcast(shape, width, stage)
    evaluation = dict(generation)
    if vllm is None:
        steps = get("steps_per_generation") or get("gradient_accumulation_steps")
        sampled = (get("generation_batch_size") or 0) // processes or micro_batch * steps
        batches = (sampled, evaluation_batch(recipe, processes, gpu_memory))
        for phase, batch in zip((generation, evaluation), batches, strict=True):
            phase |= _gathered_and_cast(shape, recipe, stage)
            phase["KV cache"] = heap * batch * length * _cached(shape, width, _computing(recipe))
    overhead = {"overhead": GIB * (CPU_OVERHEAD_GIB if on_cpu else OVERHEAD_GIB)}
    sums = {"training": training, "generation": generation, "evaluation": evaluation}
    return {
        name: {purpose: size / GIB for purpose, size in {**always, **phase, **overhead}.items()}
        for name, phase in sums.items()
    }


def peak(memory: Mapping[str, Mapping[str, float]]) -> tuple[str, float]:
    """The phase that holds the most, and how many GiB."""
    sums = {name: sum(parts.values()) for name, parts in memory.items()}
    return max(sums.items(), key=lambda each: each[1])


def evaluation_batch(recipe: Recipe, processes: int, gpu_memory: float) -> int:
    """Completions that an evaluation by transformers samples at once.

    It follows from the recipe and the size of a GPU, so a run that goes on samples as it began;
    the stage of ZeRO is taken for the one that holds more meanwhile.
    """
    shape = model_shape(recipe.model["model_name_or_path"])
    if shape is None or _on_cpu(recipe, gpu_memory):
        return EVALUATION_BATCH
    stage = 3 if zero_stage(recipe, processes, 0.0) else 0
    always, _ = _state(shape, recipe, processes, stage)
    held = always | _gathered_and_cast(shape, recipe, stage)
    length = recipe.task.max_prompt_length + recipe.get("max_completion_length")
    per_token = _cached(shape, _width(recipe, stage), _computing(recipe))
    return _largest_batch(length * per_token, gpu_memory, sum(held.values()))


def batch_that_fits(
    shape: Shape | None, tokens_per_completion: int, gpu_memory: float, width: int = 2
) -> int:
    """Completions that are sampled at once by a model that has a GPU for itself.

    Args:
        shape: None if it is not known.
        gpu_memory: in GiB; 0 without a GPU.
        width: bytes per weight.
    """
    if shape is None or not gpu_memory:
        return EVALUATION_BATCH
    per_completion = tokens_per_completion * _cached(shape, width, width)
    return _largest_batch(per_completion, gpu_memory, width * shape.parameters)


def least_vllm_share(recipe: Recipe, gpu_memory: float) -> float:
    """The smallest share of a GPU in which vLLM starts: weights in 16 bit and one completion.

    0 if the model's shape is not known.
    """
    shape = model_shape(recipe.model["model_name_or_path"])
    if shape is None:
        return 0.0
    width = NF4_BYTES if recipe.get("load_in_4bit") else 2
    weights = width * shape.linear + 2 * (shape.experts + shape.embeddings)
    length = recipe.task.max_prompt_length + recipe.get("max_completion_length")
    cache = length * 2 * 2 * shape.num_hidden_layers * shape.kv_width
    needed = (weights + cache) / GIB + VLLM_OVERHEAD_GIB
    return math.ceil(20 * needed / gpu_memory) / 20


def checkpoint_bytes(recipe: Recipe, stage: int) -> dict[str, float] | None:
    """Bytes of a checkpoint by content, `weights` as in the trained model; None if not known.

    Args:
        stage: of ZeRO, whose optimizer keeps a 32-bit copy of 16-bit weights; 0 without it.
    """
    shape = model_shape(recipe.model["model_name_or_path"])
    if shape is None:
        return None
    trained, width, sharded = shape.parameters, _width(recipe, stage), bool(stage)
    if recipe.get("use_peft"):
        trained, width, sharded = _adapters(shape, recipe.get("lora_r")), 4, False
    held = state_bytes(trained, width, 1 if sharded else None)
    optimizer = 0.0 if recipe.get("save_only_model") else held["optimizer"]
    if stage == 2 and optimizer:
        optimizer += held["weights"]  # which DeepSpeed saves once more beside it
    return {"weights": held["weights"], "optimizer": optimizer}


def has_16_bit_weights(recipe: Recipe) -> bool:
    """Whether the weights are loaded in 16 bit."""
    return recipe.get("dtype") in ("bfloat16", "float16")


def computes_in_16_bit(recipe: Recipe) -> bool:
    """Whether matrices are multiplied in 16 bit.

    TRL computes in bf16 unless told otherwise or asked for fp16 (`_BaseConfig.__post_init__`).
    """
    return bool(recipe.get("fp16")) or recipe.get("bf16") is not False


def _on_cpu(recipe: Recipe, gpu_memory: float) -> bool:
    return bool(recipe.get("use_cpu")) or not gpu_memory


def _width(recipe: Recipe, stage: int) -> int:
    """Bytes per weight. ZeRO casts them itself; autocast only copies them, and keeps them wide."""
    narrow = has_16_bit_weights(recipe) or (stage and computes_in_16_bit(recipe))
    return 2 if narrow else 4


def _computing(recipe: Recipe) -> int:
    """Bytes per number that matrices are multiplied in."""
    return 2 if has_16_bit_weights(recipe) or computes_in_16_bit(recipe) else 4


def _state(
    shape: Shape, recipe: Recipe, processes: int, stage: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of weights, gradients, optimizer and reference model: always, and while training."""
    width = _width(recipe, stage)
    if recipe.get("use_peft"):  # the reference is the model without its adapter
        frozen = shape.linear * (NF4_BYTES if recipe.get("load_in_4bit") else width)
        always = state_bytes(_adapters(shape, recipe.get("lora_r")), 4)
        always["weights"] += frozen + (shape.experts + shape.embeddings) * width
    else:
        always = state_bytes(shape.parameters, width, processes if stage else None, stage)
        if recipe.get("beta"):
            always["reference"] = always["weights"]
    # Given back after each step, but by ZeRO-3.
    training = {"gradients": always.pop("gradients")}
    if stage:
        training["buckets"] = width * REDUCE_BUCKET
    if stage == 3:
        gathered = {"gathered": width * min(shape.parameters, LIVE_PARAMETERS)}
        return always | training, gathered
    return always, training


def _gathered_and_cast(shape: Shape, recipe: Recipe, stage: int) -> dict[str, float]:
    """Bytes of weights that are held once more while transformers generates."""
    held: dict[str, float] = {}
    if stage == 3:
        held["gathered"] = _width(recipe, stage) * shape.parameters
    # Autocast keeps its copies of trainable weights until a forward pass has ended.
    if _width(recipe, stage) > _computing(recipe) and not recipe.get("use_peft"):
        held["cast weights"] = _computing(recipe) * (shape.linear + shape.experts)
    return held


def _cached(shape: Shape, width: int, computing: int) -> float:
    """Bytes per token of transformers' cache of keys and values, as wide as the weights.

    Left padding wants a mask, with which sdpa takes no grouped queries (transformers 5.17,
    integrations/sdpa_attention.py): those of one layer at a time are copied for every head, and by
    autocast once more.
    """
    cache = 2 * width * shape.num_hidden_layers * shape.kv_width
    copied = 2 * width * shape.q_width if shape.q_width > shape.kv_width else 0
    cast = 2 * computing * shape.q_width if width > computing else 0
    return cache + copied + cast


def _largest_batch(per_completion: float, gpu_memory: float, held: float) -> int:
    batch, left = EVALUATION_BATCH, (gpu_memory - OVERHEAD_GIB) * GIB - held
    while batch > SMALLEST_BATCH and batch * per_completion > left:
        batch //= 2
    return batch


def _broadcast(shape: Shape, width: int, stage: int) -> float:
    """Bytes of the buffers from which the first process sends weights to a vLLM server.

    Each holds whole tensors, and under ZeRO-3 those that go into the second are gathered beside it.
    """
    gathered = 1 if stage == 3 else 0
    largest = width * shape.vocab_size * shape.hidden_size
    buffers = (2 + gathered) * (BROADCAST_BUFFER + largest)
    return min(buffers, (1 + gathered) * width * shape.parameters)


def _adapters(shape: Shape, rank: int) -> int:
    """Parameters of LoRA on all linear layers: `rank` per input and per output of each."""
    attention = 2 * shape.hidden_size + 2 * shape.q_width + 2 * (shape.hidden_size + shape.kv_width)
    dense = (shape.num_hidden_layers - shape.moe_layers) * (
        shape.hidden_size + shape.intermediate_size
    )
    experts = shape.moe_layers * shape.num_experts * (shape.hidden_size + shape.expert_size)
    return rank * (shape.num_hidden_layers * attention + 3 * (dense + experts))


def _activations(shape: Shape, recipe: Recipe, completions: int, width: int, on_cpu: bool) -> float:
    """Bytes that a micro-batch adds while it is trained on, at most.

    What transformers' layers and TRL's head keep, read in their code for Llama and Qwen and found
    in simulations; on a CPU measured for SmolLM2-135M, in 32 bit: 12,250 numbers per token and
    layer, 18,500 with LoRA on all linear layers.
    """
    get, computing = recipe.get, _computing(recipe)
    hidden, queries, inner = shape.hidden_size, shape.q_width, shape.mlp_width
    length = recipe.task.max_prompt_length + get("max_completion_length")
    tokens, full = completions * length, not get("use_peft")
    cast = computing if width > computing else 0

    # Of a layer, per token. Each of two norms keeps its input in 32 bit, and what it has scaled.
    # Attention keeps queries, the keys and values of every head, its output, and a mask.
    layer = 2 * 4 * hidden + computing * (4 * queries + length)
    inside = 1.4 * computing * inner  # gradients within the MLP
    if full:
        # Linear layers keep their inputs, each its own if autocast has to cast them.
        layer += 2 * width * hidden + computing * ((5 if cast else 2) * hidden + 4 * inner)
    else:
        dropout = get("lora_dropout")
        inputs = _adapted_inputs(shape, recipe)
        if not dropout and computing == 4:
            inputs = 2 * hidden + inner  # shared
        mask = (4 if on_cpu else 1) if dropout else 0
        layer += 3 * computing * inner + (computing + mask) * inputs
        inside += (8 if dropout else 4) * inner  # and of what adapters read, in 32 bit
    weights = cast * (shape.linear + shape.experts)  # copies that autocast keeps for a pass
    ends = tokens * hidden * (4 + width + computing)  # the last norm

    # TRL's head: a tile of logits; in the backward pass the gradient of its weights, in 32 bit and
    # as wide as they are. Tied to the embeddings, it stays until theirs is known.
    # A CPU commits no more of a tile than it touches.
    of_vocabulary = min(shape.vocab_size, TILE[1]) * TILE_COPIES * 4 if on_cpu else TILE[1]
    tile = min(tokens, TILE[0]) * of_vocabulary * (1 if on_cpu else computing)
    vocabulary = shape.vocab_size * hidden if full else 0
    head = tile + 4 * tokens * hidden + (4 + (width if width < 4 else 0)) * vocabulary
    waiting = width * vocabulary if shape.tie_word_embeddings else 0
    if get("gradient_checkpointing"):
        kept = width * hidden * shape.num_hidden_layers * tokens + ends
        one = weights / shape.num_hidden_layers + tokens * (layer + inside)
        forward = weights + max(tile, tokens * 3 * computing * inner)
        return kept + max(forward, head, waiting + one)
    kept = layer * shape.num_hidden_layers * tokens + ends + weights
    return kept + max(head, waiting + tokens * inside)


def _adapted_inputs(shape: Shape, recipe: Recipe) -> float:
    """Numbers per token that the adapters of a layer read, each its own."""
    inputs = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), shape.hidden_size),
        "o_proj": shape.q_width,
        **dict.fromkeys(("gate_proj", "up_proj"), shape.hidden_size),
        "down_proj": shape.mlp_width,
    }
    # PEFT's own choice for most models is the first.
    named = recipe.get("lora_target_modules") or ["q_proj", "v_proj"]
    return sum(inputs.get(name, 0) for name in named) or sum(inputs.values())
