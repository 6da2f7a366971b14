"""Recipe + machine -> processes, devices, vLLM's place, the command, the effective batch, memory per GPU. Nothing starts here.

    mini-r1 train RECIPE --dry-run                           # for this machine
    mini-r1 doctor RECIPE --gpus 4 --gpu-memory 80           # for another one

Who runs where follows from three rules: one training process per GPU; a vLLM server that the recipe leaves to us takes the last
GPU; full fine-tuning on several GPUs is sharded by DeepSpeed ZeRO-3, LoRA and QLoRA are copied (DDP). Imports no ML library: a
mistake is told in well under a second.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mini_r1 import InputError
from mini_r1.model import model_path
from mini_r1.recipe import Recipe

ROOT = Path(__file__).parents[2]  # of the checkout, which holds configs/ and scripts/
LAUNCH_CONFIGS = Path("configs/accelerate_configs")
TRAINING_SCRIPT = Path("scripts/run_r1_grpo.py")
GIB = 2**30
# What the libraries use where a recipe says nothing.
DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "num_iterations": 1,
    "save_steps": 500,
    "beta": 0.0,
    "gradient_checkpointing": True,
    "bf16": True,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.3,
    "lora_r": 16,
    "seed": 42,
}
EVALUATION_BATCH = 256  # completions sampled at once; on 2 cores the tiny base takes nearly the same time for 64 as for 256
SERVER_HOST = "127.0.0.1"  # its development endpoints can replace the weights
SERVER_MEMORY_UTILIZATION = 0.9  # of a GPU that the server has for itself
# CUDA context, NCCL buffers and fragmentation. An assumption: no GPU run of ours has measured it yet.
OVERHEAD_GIB = 3.0
ONE_GPU_RECIPE = "recipes/grpo-qwen-2.5-3b-1gpu.yaml"


# ---- The machine ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The GPUs a run may use: their number, and the memory of the smallest one in GiB, which is what cards call GB."""

    gpus: int
    gpu_memory: float = 0.0

    def __str__(self) -> str:
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {self.gpu_memory:.0f} GiB" if self.gpus else "no GPU"


def this_machine() -> Machine:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves to us, as nvidia-smi lists them."""
    gpus = visible_gpus()
    memory = _installed_gpus()
    return Machine(len(gpus), min((memory.get(gpu, max(memory.values())) for gpu in gpus), default=0.0) if memory else 0.0)


def visible_gpus() -> list[str]:
    """The names, as CUDA_VISIBLE_DEVICES takes them, of the GPUs this process may use."""
    installed = list(_installed_gpus())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return installed if chosen is None or not installed else [name for name in chosen.split(",") if name not in ("", "-1")]


def _installed_gpus() -> dict[str, float]:
    """Index -> memory in GiB."""
    query = ["nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [line.split(",") for line in listed.splitlines() if line.strip()]
    return {index.strip(): float(mib) / 1024 for index, mib in rows}


# ---- The plan ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a recipe runs on a machine.

    Attributes:
        processes: training processes, one per GPU or one on the CPU.
        launcher: the accelerate config that starts them; None for a single process, which needs no launcher.
        server_gpu: the GPU of a vLLM server that the run owns, counted among the visible ones.
        memory: what a training GPU must hold, in GiB by purpose; None if the model's shape is not known here.
    """

    recipe: Recipe
    machine: Machine
    processes: int
    launcher: str | None
    server_gpu: int | None
    memory: Mapping[str, float] | None

    @property
    def command(self) -> list[str]:
        """What `mini-r1 train` does, as a command for the current folder."""
        script = [os.path.relpath(ROOT / TRAINING_SCRIPT), "--config", str(self.recipe.path), *self.recipe.overrides]
        if self.launcher is None:
            return ["python", *script]
        config = os.path.relpath(ROOT / LAUNCH_CONFIGS / f"{self.launcher}.yaml")
        return ["accelerate", "launch", "--num_processes", str(self.processes), "--config_file", config, *script]

    def __str__(self) -> str:
        get = _getter(self.recipe)
        completions, group = completions_per_step(self.recipe, self.processes), get("num_generations")
        lost = ", ".join(f"{_no_signal(p, group):.0%} at {p:.0%}" for p in (0.05, 0.25, 0.5, 0.75))
        lines = {
            "recipe": f"{self.recipe.name}: {self.recipe.model['model_name_or_path']}",
            "machine": str(self.machine),
            "training": f"{self.processes} process{'es' if self.processes > 1 else ''} on {self._training_devices()}"
            + (f", launched with {self.launcher}.yaml" if self.launcher else ""),
            "generation": self._generation(),
            "batch": f"{completions} completions per optimizer step, {completions / group:g} prompts x {group}: {self.processes} "
            f"process{'es' if self.processes > 1 else ''} x {get('per_device_train_batch_size')} per device x "
            f"{get('gradient_accumulation_steps')} accumulated",
            "no signal": f"groups whose {group} completions all fail or all succeed: {lost} success",
            "memory": self._memory(),
            "command": shlex.join(self.command),
        }
        if self.server_gpu is not None:
            lines["server"] = (
                f"CUDA_VISIBLE_DEVICES={self.server_gpu} {shlex.join(['python', *server_command(self.recipe, 'PORT')])}"
            )
        if _is_16_bit(self.recipe) and self.launcher != "deepspeed_zero3" and not get("use_peft"):
            lines["beware"] = (
                "16-bit weights without a 32-bit copy (only ZeRO keeps one) are spaced so widely that updates of a small "
                "learning_rate are rounded away; write dtype: float32, computing stays in bf16"
            )
        return "\n".join(f"{name:<11} {text}" for name, text in lines.items())

    def _training_devices(self) -> str:
        if self.machine.gpus == 0 or self.recipe.training.get("use_cpu"):
            return "the CPU"
        return "GPU 0" if self.processes == 1 else f"GPUs 0-{self.processes - 1}"

    def _generation(self) -> str:
        get = _getter(self.recipe)
        if not get("use_vllm"):
            return "by transformers, in the training processes"
        if get("vllm_mode") == "colocate":
            sleep = ", asleep while training" if get("vllm_enable_sleep_mode") else ""
            return f"by vLLM on the training GPUs, {get('vllm_gpu_memory_utilization'):.0%} of their memory{sleep}"
        if self.server_gpu is None:
            return f"by the vLLM server at {server_address(self.recipe)}"
        return f"by a vLLM server on GPU {self.server_gpu}, which the run starts, watches and ends"

    def _memory(self) -> str:
        if self.memory is None:
            return "not estimated: the shape of this model is not known without loading it"
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in self.memory.items() if gib >= 0.05)
        of = f" of {self.machine.gpu_memory:.0f}" if self.machine.gpus else ""
        return f"about {_peak(self.memory, self.recipe):.1f}{of} GiB per training process, an estimate: {parts}"


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """Place a recipe on a machine.

    Raises:
        InputError: it cannot work there; the message says which change would make it work.
    """
    get = _getter(recipe)
    on_cpu = bool(get("use_cpu")) or machine.gpus == 0
    if get("use_vllm") and machine.gpus == 0 and not get("use_cpu"):
        raise recipe.error(
            "use_vllm: vLLM needs a GPU and this machine has none; write use_vllm: false, or take recipes/tiny-cpu.yaml"
        )
    managed = owns_server(recipe)
    if managed and not on_cpu and machine.gpus < 2:
        raise recipe.error(
            "vllm_mode: server needs a GPU of its own beside the training, and this machine has 1; write vllm_mode: colocate "
            f"(and vllm_enable_sleep_mode: true), or take {ONE_GPU_RECIPE}"
        )
    processes = 1 if on_cpu else machine.gpus - managed
    check_batch(recipe, processes)
    memory = estimate_memory(recipe, processes, machine.gpu_memory)
    plan = Plan(
        recipe=recipe,
        machine=machine,
        processes=processes,
        launcher=launcher_for(recipe, processes),
        server_gpu=machine.gpus - 1 if managed and not on_cpu else None,
        memory=memory,
    )
    if memory is not None and not on_cpu and _peak(memory, recipe) > machine.gpu_memory:
        raise recipe.error(
            f"model_name_or_path: {recipe.model['model_name_or_path']} needs about {_peak(memory, recipe):.0f} GiB on each GPU and "
            f"this machine has {machine.gpu_memory:.0f}; {_what_would_fit(recipe, machine, processes)}"
        )
    return plan


def launcher_for(recipe: Recipe, processes: int) -> str | None:
    """The accelerate config that starts so many training processes; None for a single one, which needs no launcher."""
    if processes == 1:
        return None
    if recipe.training.get("use_cpu"):
        return "cpu"
    return "ddp" if recipe.model.get("use_peft") else "deepspeed_zero3"


def check_processes(recipe: Recipe, processes: int) -> None:
    """What `accelerate launch --num_processes` was told, against this machine and the recipe. Called by every process.

    Raises:
        InputError: no GPU is left for the vLLM server, or the batch cannot be shared out.
    """
    gpus = len(visible_gpus())
    if owns_server(recipe) and not _getter(recipe)("use_cpu") and processes >= gpus:
        raise recipe.error(
            f"--num_processes: {processes} training processes on {gpus} GPUs leave none for the vLLM server; "
            f"write --num_processes {max(gpus - 1, 1)}, or give the address of a server as vllm_server_base_url"
        )
    check_batch(recipe, processes)


def owns_server(recipe: Recipe) -> bool:
    """Whether the run starts a vLLM server of its own: server mode, and no address given."""
    get = _getter(recipe)
    return bool(get("use_vllm")) and get("vllm_mode") == "server" and server_address(recipe) is None


def server_address(recipe: Recipe) -> str | None:
    """The address of somebody else's vLLM server, if the recipe names one."""
    get = _getter(recipe)
    if get("vllm_server_base_url"):
        return get("vllm_server_base_url")
    if get("vllm_server_host"):
        return f"http://{get('vllm_server_host')}:{get('vllm_server_port') or 8000}"
    return None


def server_command(recipe: Recipe, port: int | str, host: str = SERVER_HOST, replicas: int = 1) -> list[str]:
    """The vLLM server that a recipe needs, as arguments of a Python interpreter.

    It is the module that `vllm serve` runs; the command itself is missing from the CPU builds.

    Args:
        replicas: GPUs, each with the whole model.
    """
    get = _getter(recipe)
    length = get("vllm_max_model_length") or recipe.task.max_prompt_length + recipe.training["max_completion_length"]
    utilization = recipe.training.get("vllm_gpu_memory_utilization", SERVER_MEMORY_UTILIZATION)
    revision = get("model_revision")
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", model_path(recipe.model["model_name_or_path"])),
        *(("--revision", revision) if revision else ()),
        *("--host", host, "--port", str(port), "--max-model-len", str(length), "--dtype", get("dtype")),
        *("--gpu-memory-utilization", str(utilization), "--seed", str(get("seed")), "--disable-uvicorn-access-log"),
        *(("--data-parallel-size", str(replicas)) if replicas > 1 else ()),
        # What TRL needs: weights over NCCL, log-probabilities of the sampled distribution.
        *("--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
    ]


# ---- The batch --------------------------------------------------------------------------------------------------------------


def completions_per_step(recipe: Recipe, processes: int) -> int:
    """Completions that one optimizer step learns from. `per_device_train_batch_size` counts completions, not prompts."""
    get = _getter(recipe)
    return processes * get("per_device_train_batch_size") * get("gradient_accumulation_steps")


def check_batch(recipe: Recipe, processes: int) -> None:
    """Whether the batch can be cut into groups and micro-batches, and whether a checkpoint can be continued exactly.

    Raises:
        InputError: with the value to write instead.
    """
    get = _getter(recipe)
    group, micro = get("num_generations"), processes * get("per_device_train_batch_size")
    if group < 2:
        raise recipe.error(f"num_generations: {group}; GRPO compares completions of one prompt, so write at least 2")
    if get("generation_batch_size") and get("steps_per_generation"):
        raise recipe.error("generation_batch_size: give either this or steps_per_generation, not both")
    sampled = get("generation_batch_size") or micro * (get("steps_per_generation") or get("gradient_accumulation_steps"))
    if sampled % micro:
        raise recipe.error(
            f"generation_batch_size: {sampled} is no multiple of the {micro} completions of a micro-batch "
            f"(per_device_train_batch_size x {processes} processes); write {math.ceil(sampled / micro) * micro}"
        )
    if sampled % group:
        fitting = next(
            size for size in range(get("per_device_train_batch_size"), 10**9) if sampled // micro * processes * size % group == 0
        )
        raise recipe.error(
            f"per_device_train_batch_size: {sampled} completions are sampled at a time, which cannot be cut into groups of "
            f"num_generations: {group}; it counts completions, not prompts: write {fitting}"
        )
    prompts = int(recipe.task.num_puzzles * (1 - recipe.task.test_share))
    if recipe.task.dataset_id_or_path == "generated" and prompts < sampled // group:
        raise recipe.error(
            f"num_puzzles: about {prompts} prompts to train on, but {sampled // group} are sampled at a time; write at least "
            f"{math.ceil(sampled / group / (1 - recipe.task.test_share) * 1.2)}"
        )
    window = sampled // micro * get("num_iterations") / get("gradient_accumulation_steps")
    save_steps = get("save_steps")
    if window > 1 and isinstance(save_steps, int) and get("save_strategy") != "no" and save_steps % window:
        # A checkpoint holds no completions: one amid the steps that share a batch of them could not be continued exactly.
        fitting = next(steps for steps in range(save_steps, 10**9) if steps % window == 0)
        raise recipe.error(
            f"save_steps: {save_steps} is no multiple of the {window:g} optimizer steps that share one generation "
            f"(steps_per_generation x num_iterations / gradient_accumulation_steps); write {fitting}"
        )


def _no_signal(success: float, group: int) -> float:
    """The share of groups without any difference to learn from, if all puzzles were equally hard."""
    return success**group + (1 - success) ** group


# ---- Memory -----------------------------------------------------------------------------------------------------------------


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
    def kv_width(self) -> int:
        return self.num_key_value_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)

    @property
    def matrices(self) -> int:
        """Parameters of the linear layers, which 4-bit quantization and LoRA apply to."""
        width = self.num_attention_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)
        attention = self.hidden_size * (2 * width + 2 * self.kv_width)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

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
KNOWN_SHAPES = {f"Qwen/Qwen2.5-{size}{kind}": shape for size, shape in QWEN.items() for kind in ("", "-Instruct")}


def model_shape(name: str) -> Shape | None:
    """The shape of a model that is known by name or lies in a local folder; None if only loading it would tell."""
    if name in KNOWN_SHAPES:
        return KNOWN_SHAPES[name]
    try:
        config = json.loads((Path(model_path(name)) / "config.json").read_text(encoding="utf-8"))
        return Shape(**{key: config.get(key) for key in Shape.__dataclass_fields__})
    except (OSError, ValueError, TypeError):
        return None


def state_bytes(parameters: float, width: int, sharded_over: int | None = None) -> dict[str, float]:
    """Bytes per GPU of weights, gradients and Adam's state for trained parameters.

    Args:
        width: bytes per weight.
        sharded_over: GPUs under ZeRO-3, which keeps a 32-bit copy and both moments of 16-bit weights: 2 + 2 + 12 bytes per
            parameter in all (Rajbhandari et al., arXiv:1910.02054, section 3.1). Plain AdamW's moments are as wide as the weights.
    """
    optimizer = (12 if width == 2 else 8) if sharded_over else 2 * width
    per_gpu = parameters / (sharded_over or 1)
    return {"weights": width * per_gpu, "gradients": width * per_gpu, "optimizer": optimizer * per_gpu}


def estimate_memory(recipe: Recipe, processes: int, gpu_memory: float) -> dict[str, float] | None:
    """GiB that a training GPU must hold, by purpose. An estimate from the formulas below, good to a few GiB.

    Args:
        gpu_memory: GiB per GPU, of which colocated vLLM takes its share.
    """
    shape = model_shape(recipe.model["model_name_or_path"])
    if shape is None:
        return None
    get = _getter(recipe)
    sharded_over = processes if processes > 1 and not get("use_peft") else None
    mixed = bool(get("bf16") or get("fp16"))
    # ZeRO casts the weights itself; autocast copies them, layer by layer, while they stay as wide as they are.
    width = 2 if _is_16_bit(recipe) or (mixed and sharded_over) else 4
    if get("use_peft"):
        frozen = shape.matrices * (0.55 if get("load_in_4bit") else width) + shape.embeddings * width  # nf4 with its scales
        # On all linear layers: each gets r parameters per input and per output.
        adapters = (
            get("lora_r") * shape.num_hidden_layers * (9 * shape.hidden_size + 2 * shape.kv_width + 3 * shape.intermediate_size)
        )
        held = state_bytes(adapters, 4)
        held["weights"] += frozen
    else:
        held = state_bytes(shape.parameters, width, sharded_over)
        if sharded_over:
            held["gathered"] = width * shape.parameters  # the whole model, to evaluate it, and to generate without vLLM
        if get("beta"):
            held["reference"] = held["weights"]
    batch, task = get("per_device_train_batch_size"), recipe.task
    length = task.max_prompt_length + recipe.training["max_completion_length"]
    tokens = batch * length
    # 16-bit activations of one layer: its inputs, queries, keys, values, attention output and the three wide MLP tensors, twice.
    layer = 2 * tokens * (8 * shape.hidden_size + 2 * shape.kv_width + 4 * shape.intermediate_size)
    if get("gradient_checkpointing"):
        held["activations"] = 2 * tokens * shape.hidden_size * shape.num_hidden_layers + layer
    else:
        held["activations"] = layer * shape.num_hidden_layers
    if mixed and width == 4:
        held["activations"] += 2 * shape.parameters
    # Logits in 16 bit, their scaled copy and their gradient.
    held["logits"] = 3 * 2 * batch * recipe.training["max_completion_length"] * shape.vocab_size
    # Keys and values of all completions that are sampled at once, in the evaluation or, without vLLM, in training.
    sampled = 0 if get("use_vllm") else batch * (get("steps_per_generation") or get("gradient_accumulation_steps"))
    held["KV cache"] = 2 * width * max(sampled, EVALUATION_BATCH) * length * shape.num_hidden_layers * shape.kv_width
    in_gib = {name: size / GIB for name, size in held.items()}
    if get("use_vllm") and get("vllm_mode") == "colocate":
        in_gib["vLLM"] = get("vllm_gpu_memory_utilization") * gpu_memory
    return {**in_gib, "overhead": OVERHEAD_GIB if gpu_memory else 0.0}


def _peak(memory: Mapping[str, float], recipe: Recipe) -> float:
    """The most that is held at once: the training pass, evaluation and vLLM take turns, unless vLLM stays awake."""
    training, evaluating, vllm = memory["activations"] + memory["logits"], memory["KV cache"], memory.get("vLLM", 0.0)
    always = sum(memory.values()) - training - evaluating - vllm
    if _getter(recipe)("vllm_enable_sleep_mode"):
        return always + max(training, evaluating, vllm)
    return always + vllm + max(training, evaluating)


def _what_would_fit(recipe: Recipe, machine: Machine, processes: int) -> str:
    """The first changes, each added to the ones before, that make a recipe fit."""
    get = _getter(recipe)
    changes: dict[str, Any] = {}
    batch, accumulated = get("per_device_train_batch_size"), get("gradient_accumulation_steps")
    steps = [{"gradient_checkpointing": True}]
    steps += [{"vllm_enable_sleep_mode": True}] if get("use_vllm") and get("vllm_mode") == "colocate" else []
    while batch % 2 == 0:
        batch, accumulated = batch // 2, accumulated * 2
        steps.append({"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated})
    for step in [*steps, {"use_peft": True, "dtype": "bfloat16"}, {"load_in_4bit": True}]:
        changes |= {key: value for key, value in step.items() if get(key) != value}
        model = {key: value for key, value in changes.items() if key in ("dtype", "use_peft", "load_in_4bit")}
        training = {key: value for key, value in changes.items() if key not in model}
        changed = replace(recipe, model=recipe.model | model, training=recipe.training | training)
        if _peak(estimate_memory(changed, processes, machine.gpu_memory), changed) <= machine.gpu_memory:
            return "write " + ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
    return "take larger GPUs or a smaller model"


def _is_16_bit(recipe: Recipe) -> bool:
    return _getter(recipe)("dtype") in ("bfloat16", "float16")


def _getter(recipe: Recipe):
    """A function key -> value: the recipe's, else the library's default, else None."""
    given = DEFAULTS | {"dtype": "float32"} | recipe.model | recipe.training
    return given.get


# ---- The launch -------------------------------------------------------------------------------------------------------------


def launch(plan: Plan) -> None:
    """Replace this process by `accelerate launch`, so that signals and the exit code are the launcher's.

    Raises:
        InputError: this is no checkout, so there are no launch configs.
    """
    if not (ROOT / LAUNCH_CONFIGS).is_dir():
        raise InputError(f"several GPUs need {LAUNCH_CONFIGS}: run from a clone of the repository, installed with 'make setup'")
    print(shlex.join(plan.command), flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.accelerate_cli", *plan.command[1:]])
