"""Recipe + machine -> processes, devices, vLLM's place, the command, batch, steps, memory, disk.

    mini-r1 train RECIPE --dry-run                           # for this machine
    mini-r1 doctor RECIPE --gpus 4 --gpu-memory 80           # for another one

Who runs where follows from three rules: one training process per GPU; a vLLM server that the
recipe leaves to us takes the last GPU; full fine-tuning on several GPUs is sharded by DeepSpeed,
ZeRO-2 where that fits and ZeRO-3 elsewhere, LoRA and QLoRA are copied (DDP). Nothing starts here,
until `launch`. Imports no ML library: a mistake is told in well under a second.
"""

import logging
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from mini_r1 import BAD_INPUT, SIGNALLED, InputError, Interrupted, RunFailed
from mini_r1.launch.guard import MIDDLEWARE
from mini_r1.launch.machine import Machine, is_main_process, launched, visible_gpus
from mini_r1.launch.memory import (
    checkpoint_bytes,
    computes_in_16_bit,
    has_16_bit_weights,
    least_vllm_share,
    peak,
    phases,
    zero_stage,
)
from mini_r1.launch.network import LOOPBACK
from mini_r1.model import is_local, model_path, whole_model
from mini_r1.recipe import ROOT, Recipe
from mini_r1.run import weights_of

LAUNCH_CONFIGS = Path("configs/accelerate_configs")
TRAINING_SCRIPT = Path("scripts/run_r1_grpo.py")
SERVER_MEMORY_UTILIZATION = 0.9  # of a GPU that the server has for itself
ONE_GPU_RECIPE = "recipes/grpo-qwen-2.5-3b-1gpu.yaml"
LAUNCHER_OF_STAGE = {0: "ddp", 2: "deepspeed_zero2", 3: "deepspeed_zero3"}


# ---- The plan -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a recipe runs on a machine.

    Attributes:
        processes: training processes, one per GPU or one on the CPU.
        launcher: the accelerate config that starts them; None for a single process.
        server_gpu: the GPU of a vLLM server of the run's own, counted among the visible ones.
        memory: what a training process holds in each phase, in GiB by purpose; None if that is not
            known here.
    """

    recipe: Recipe
    machine: Machine
    processes: int
    launcher: str | None
    server_gpu: int | None
    memory: Mapping[str, Mapping[str, float]] | None

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's, 0 without it."""
        stages = (stage for stage, name in LAUNCHER_OF_STAGE.items() if name == self.launcher)
        return next(stages, 0)

    @property
    def command(self) -> list[str]:
        """What `mini-r1 train` does, as a command for the current folder."""
        script = [os.path.relpath(ROOT / TRAINING_SCRIPT), "--config", str(self.recipe.path)]
        script += self.recipe.overrides
        if self.launcher is None:
            return ["python", *script]
        config = os.path.relpath(ROOT / LAUNCH_CONFIGS / f"{self.launcher}.yaml")
        launch = ["accelerate", "launch", "--num_processes", str(self.processes)]
        return [*launch, "--config_file", config, *script]

    def __str__(self) -> str:
        lines = {
            "recipe": f"{self.recipe.name}: {self.recipe.model['model_name_or_path']}",
            "machine": str(self.machine),
            "training": self._training(),
            "generation": self._generation(),
            "batch": describe_batch(self.recipe, self.processes),
            "steps": self._steps(),
            "no signal": self._no_signal(),
            "evaluations": self._evaluations(),
            "checkpoints": self._checkpoints(),
            "memory": self._memory(),
            "command": shlex.join(self.command),
        }
        if self.server_gpu is not None:
            server = shlex.join(["python", *server_command(self.recipe, "PORT")])
            lines["server"] = f"CUDA_VISIBLE_DEVICES={self.server_gpu} {server}"
        only_in_16_bit = has_16_bit_weights(self.recipe) and not self.zero_stage
        if only_in_16_bit and not self.recipe.get("use_peft"):
            lines["beware"] = (
                "16-bit weights without a 32-bit copy (only ZeRO keeps one) are spaced so widely "
                "that updates of a small learning_rate are rounded away; write dtype: float32, "
                "computing stays in bf16"
            )
        return "\n".join(f"{name:<11} {text}" for name, text in lines.items())

    def _training(self) -> str:
        if self.machine.gpus == 0 or self.recipe.get("use_cpu"):
            devices = "the CPU"
        else:
            devices = "GPU 0" if self.processes == 1 else f"GPUs 0-{self.processes - 1}"
            if self.recipe.get("num_gpus") not in (None, self.machine.gpus):
                devices += f" (of {self.machine.gpus}; num_gpus: {self.recipe.get('num_gpus')})"
        launched = f", launched with {self.launcher}.yaml" if self.launcher else ""
        return f"{_processes(self.processes)} on {devices}{launched}"

    def _generation(self) -> str:
        get = self.recipe.get
        if not get("use_vllm"):
            return "by transformers, in the training processes"
        if colocates(self.recipe):
            sleep = ", asleep while training" if get("vllm_enable_sleep_mode") else ""
            share = f"{get('vllm_gpu_memory_utilization'):.0%} of their memory"
            return f"by vLLM on the training GPUs, {share}{sleep}"
        if self.server_gpu is None:
            return f"by the vLLM server at {server_address(self.recipe)}"
        return f"by a vLLM server on GPU {self.server_gpu}, which the run starts, watches and ends"

    def _steps(self) -> str:
        """How long it trains, and how often it sees a puzzle."""
        steps, puzzles = optimizer_steps(self.recipe, self.processes), training_puzzles(self.recipe)
        unknown = "not known before the data are read"
        if steps is None:
            return f"{unknown}: {self.recipe.get('num_train_epochs'):g} epochs"
        sampled, window = generation_batch(self.recipe, self.processes)
        seen = math.ceil(steps / window) * sampled // self.recipe.get("num_generations")
        if puzzles is None:
            return f"{steps:,}, which see {seen:,} puzzles; how often each one is {unknown}"
        epochs = f"{seen / puzzles:.{1 if seen >= puzzles else 2}f}"
        once = f"{seen:,} of about {puzzles:,} training puzzles are seen, once each"
        often = f"each of about {puzzles:,} training puzzles is seen {epochs} times"
        about = "" if self.recipe.get("max_steps") > 0 else "about "
        return f"{about}{steps:,} ({epochs} epochs): {often if seen > puzzles else once}"

    def _no_signal(self) -> str:
        """The share of groups that teach nothing, if all puzzles were equally hard."""
        group = self.recipe.get("num_generations")
        lost = {p: p**group + (1 - p) ** group for p in (0.05, 0.25, 0.5, 0.75)}
        shares = ", ".join(f"{share:.0%} at {p:.0%}" for p, share in lost.items())
        same = f"groups whose {group} completions all fail or all succeed teach nothing"
        return f"{same}: {shares} success"

    def _evaluations(self) -> str:
        """How many there are, and on what."""
        get, task = self.recipe.get, self.recipe.task
        number, when, every = "2", "before and after", get("eval_steps")
        if get("eval_strategy") == "steps" and every:
            steps = optimizer_steps(self.recipe, self.processes)
            number = f"{2 + (steps - 1) // every:g}" if steps else "some"
            when = f"before, every {every:g} steps, after"
        puzzles = f"{task.num_eval_puzzles:,} held-out puzzles x {task.num_eval_samples}"
        return f"{number} ({when}), each of {puzzles}"

    def _checkpoints(self) -> str:
        """How many there are, and whether the disk holds them."""
        get, steps = self.recipe.get, optimizer_steps(self.recipe, self.processes)
        strategy, every, limit = get("save_strategy"), get("save_steps"), get("save_total_limit")
        written = checkpoints_written(self.recipe, steps)
        at_most = checkpoints_at_most(self.recipe, steps)
        if every < 1 and steps:  # a share of them
            every = math.ceil(every * steps)
        when = {
            "no": "only at a pause",
            "steps": f"every {every:g} steps" if every >= 1 else f"every {every:.0%} of the steps",
        }.get(strategy, f"one per {strategy}")
        number = f"{written:,}, {when}" if written else when
        kept = f", the last {limit:,} kept" if limit else ""

        # How large are they, and does the disk hold them?
        size = checkpoint_bytes(self.recipe, self.zero_stage)
        if size is None:
            return f"{number}{kept}; their size is not known without loading the model"
        parts = ", ".join(f"{name} {_size(part)}" for name, part in size.items() if part)
        each = f"{number}{kept}: about {_size(sum(size.values()))} each ({parts})"
        if at_most is None:
            return each
        needed = at_most * sum(size.values()) + size["weights"]
        each += f", at most {_size(needed)} with the trained model"
        if not self.machine.is_here:
            return each
        free = free_disk(self.recipe.run_dir)
        return f"{each}; {'only ' if needed > free else ''}{_size(free)} of disk are free here"

    def _memory(self) -> str:
        if self.memory is None:
            return "not estimated: the shape of this model is not known without loading it"
        of = f" of {self.machine.gpu_memory:.0f}" if self.machine.gpu_memory else ""
        of += " GiB per training process, an estimate"
        lines = []
        for phase, held in self.memory.items():
            parts = ", ".join(f"{name} {gib:.1f}" for name, gib in held.items() if gib >= 0.05)
            lines.append(f"{phase} {sum(held.values()):.1f}{'' if lines else of}: {parts}")
        return f"\n{'':<12}".join(lines)


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """Place a recipe on a machine.

    Raises:
        InputError: it cannot work there; the message says which change would make it work.
    """
    # Is there a place for vLLM?
    on_cpu = bool(recipe.get("use_cpu")) or machine.gpus == 0
    if recipe.get("use_vllm") and machine.gpus == 0 and not recipe.get("use_cpu"):
        raise recipe.error(
            "vLLM needs a GPU and this machine has none; write use_vllm: false, or take "
            "recipes/tiny-cpu.yaml",
            "use_vllm",
        )
    managed, gpus = owns_server(recipe), gpus_to_use(recipe, machine.gpus)
    if managed and not on_cpu and gpus < 2:
        has = "num_gpus leaves" if gpus < machine.gpus else "this machine has"
        raise recipe.error(
            f"server needs a GPU of its own beside the training, and {has} 1; write "
            "vllm_mode: colocate (and vllm_enable_sleep_mode: true), or take " + ONE_GPU_RECIPE,
            "vllm_mode",
        )
    # The rest of the GPUs trains. Can they share the batch, and hold what they must?
    processes = 1 if on_cpu else gpus - managed
    check_batch(recipe, processes)
    memory = phases(recipe, processes, machine.gpu_memory)
    if memory is not None and not on_cpu and machine.gpu_memory > 0:
        phase, needed = peak(memory)
        if needed > machine.gpu_memory:
            raise recipe.error(
                f"{recipe.model['model_name_or_path']} needs about {needed:.0f} GiB on each GPU "
                f"for {phase} and this machine has {machine.gpu_memory:.0f}; "
                + _what_would_fit(recipe, machine, processes),
                "model_name_or_path",
            )
        least = least_vllm_share(recipe, machine.gpu_memory) if colocates(recipe) else 0.0
        if recipe.get("vllm_gpu_memory_utilization") < least:
            raise recipe.error(
                f"vLLM alone needs about {least * machine.gpu_memory:.0f} GiB of "
                f"{machine.gpu_memory:.0f} here, more than this share; write {least}",
                "vllm_gpu_memory_utilization",
            )
    return Plan(
        recipe=recipe,
        machine=machine,
        processes=processes,
        launcher=launcher_for(recipe, processes, machine.gpu_memory),
        server_gpu=gpus - 1 if managed and not on_cpu else None,
        memory=memory,
    )


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"


def _size(size: float) -> str:
    """Bytes as disks are labelled: `37 MB`, `4.2 GB`."""
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)
    return f"{size / scale:.{int(size < 10 * scale)}f} {unit}"


def launcher_for(recipe: Recipe, processes: int, gpu_memory: float = 0.0) -> str | None:
    """The accelerate config that starts so many processes; None for one, which needs none.

    Args:
        gpu_memory: GiB per GPU; 0 if it is not known, which is safe: `zero_stage` says why.
    """
    if processes == 1:
        return None
    if recipe.get("use_cpu"):
        return "cpu"
    return LAUNCHER_OF_STAGE[zero_stage(recipe, processes, gpu_memory)]


def gpus_to_use(recipe: Recipe, gpus: int) -> int:
    """How many of a machine's GPUs a recipe takes: the first so many."""
    return min(recipe.get("num_gpus") or gpus, gpus)


def check_processes(recipe: Recipe, processes: int, here: int) -> None:
    """What `accelerate launch --num_processes` was told, against this machine and the recipe.

    Called by every process.

    Args:
        here: those of the processes that run on this machine.

    Raises:
        InputError: there are fewer GPUs, none is left for the vLLM server, or the batch cannot be
            shared out.
    """
    visible = 0 if recipe.get("use_cpu") else len(visible_gpus())
    gpus, served = gpus_to_use(recipe, visible), owns_server(recipe) and not recipe.get("use_cpu")
    if here + served > gpus and (gpus or served):
        problem = f"{here} training processes on {gpus} GPU{'s' if gpus != 1 else ''}"
        problem += f" (num_gpus: {gpus})" if gpus < visible else ""
        problem += " leave none for the vLLM server" if served else ""
        problem += f"; write --num_processes {max(gpus - served, 1)}"
        if here + served <= visible:
            problem += f", or --num_gpus {here + served}"
        elif served:
            problem += ", or give the address of a server as vllm_server_base_url"
        raise InputError(problem, where="--num_processes")
    check_batch(recipe, processes)


# ---- The vLLM server ------------------------------------------------------------------------


def colocates(recipe: Recipe) -> bool:
    """Whether vLLM shares the GPUs of the training."""
    return bool(recipe.get("use_vllm")) and recipe.get("vllm_mode") == "colocate"


def owns_server(recipe: Recipe) -> bool:
    """Whether the run starts a vLLM server of its own: server mode, and no address given."""
    by_server = bool(recipe.get("use_vllm")) and recipe.get("vllm_mode") == "server"
    return by_server and server_address(recipe) is None


def server_address(recipe: Recipe) -> str | None:
    """The address of somebody else's vLLM server, if the recipe names one."""
    if recipe.get("vllm_server_base_url"):
        return recipe.get("vllm_server_base_url")
    host = recipe.training.get("vllm_server_host")  # the library's default is no choice
    return f"http://{host}:{recipe.get('vllm_server_port')}" if host else None


def served_model(recipe: Recipe) -> tuple[str, str | None]:
    """The model that a recipe's vLLM server loads, a folder or an id of the hub, and its revision.

    Of an adapter its base: TRL sends the merged weights before the first completion.
    """
    name = weights_of(recipe.model["model_name_or_path"])
    whole, revision = whole_model(name), recipe.model.get("model_revision")
    return model_path(whole), revision if whole == name else None


def to_download(recipe: Recipe) -> list[str]:
    """The arguments of `hub.fetch` for the model of the server; none if it lies in a folder."""
    name, revision = served_model(recipe)
    if is_local(name) or Path(name).is_dir():
        return []
    return [name, revision] if revision else [name]


def server_command(
    recipe: Recipe, port: int | str, host: str = LOOPBACK, replicas: int = 1
) -> list[str]:
    """The vLLM server that a recipe needs, as arguments of a Python interpreter.

    It is the module that vllm.entrypoints.openai.api_server, deprecated in 0.31, hands over to.
    `vllm serve` takes the same options, but it does not run in the CPU builds, and starts a front
    end for each replica. The server answers only to who brings the key of its environment:
    guard.py.

    Args:
        replicas: GPUs, each with the whole model.
    """
    model, revision = served_model(recipe)
    completion = recipe.get("max_completion_length")
    utilization = recipe.training.get("vllm_gpu_memory_utilization", SERVER_MEMORY_UTILIZATION)
    # The training's precision, which may be below that of its weights.
    narrow = "float16" if recipe.get("fp16") else "bfloat16"
    options = {
        "model": model,
        "revision": revision,
        "host": host,
        "port": port,
        "max-model-len": recipe.get("vllm_max_model_length")
        or recipe.task.max_prompt_length + completion,
        "dtype": narrow if computes_in_16_bit(recipe) else recipe.get("dtype"),
        "gpu-memory-utilization": utilization,
        "seed": recipe.get("seed"),
        "data-parallel-size": replicas if replicas > 1 else None,
        # What TRL needs: weights over NCCL, log-probabilities of the sampled distribution.
        "weight-transfer-config": '{"backend": "nccl"}',
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": -1,
        "middleware": MIDDLEWARE,
    }
    command = ["-m", "vllm.entrypoints.launchers.api_server.entry"]
    for name, value in options.items():
        command += [f"--{name}", str(value)] if value is not None else []
    return [*command, "--disable-uvicorn-access-log"]


# ---- The batch ------------------------------------------------------------------------------


def completions_per_step(recipe: Recipe, processes: int) -> int:
    """Completions that one optimizer step learns from.

    `per_device_train_batch_size` counts completions, not prompts.
    """
    micro = processes * recipe.get("per_device_train_batch_size")
    return micro * recipe.get("gradient_accumulation_steps")


def generation_batch(recipe: Recipe, processes: int) -> tuple[int, Fraction]:
    """How many completions are sampled at a time, and how many optimizer steps learn from them."""
    get = recipe.get
    micro = processes * get("per_device_train_batch_size")
    micro_batches = get("steps_per_generation") or get("gradient_accumulation_steps")
    sampled = get("generation_batch_size") or micro * micro_batches
    micro_steps = sampled // micro * get("num_iterations")
    return sampled, Fraction(micro_steps, get("gradient_accumulation_steps"))


def training_puzzles(recipe: Recipe) -> int | None:
    """About how many puzzles there are to train on; None before data that are not ours are read."""
    task = recipe.task
    if task.dataset_id_or_path != "generated":
        return None
    return int(task.num_puzzles * (1 - task.test_share))


def optimizer_steps(recipe: Recipe, processes: int) -> int | None:
    """How many steps a run takes; None if that depends on data that are not read yet."""
    if recipe.get("max_steps") > 0:
        return recipe.get("max_steps")
    puzzles = training_puzzles(recipe)
    if puzzles is None:
        return None
    # TRL drops an incomplete generation batch, transformers fills up an incomplete step.
    sampled, window = generation_batch(recipe, processes)
    per_epoch = math.ceil(puzzles // (sampled // recipe.get("num_generations")) * window)
    return math.ceil(recipe.get("num_train_epochs") * per_epoch)


def checkpoints_written(recipe: Recipe, steps: int | None) -> int | None:
    """How many checkpoints a run of so many steps writes, pauses aside; None if not known."""
    strategy, every = recipe.get("save_strategy"), recipe.get("save_steps")
    if strategy == "no":
        return 0
    if strategy != "steps":
        return None
    if steps is None:
        return math.ceil(1 / every) if every < 1 else None
    return math.ceil(steps / (every if every >= 1 else math.ceil(every * steps)))


def checkpoints_at_most(recipe: Recipe, steps: int | None) -> int | None:
    """How many lie on the disk at once; None if not known. The oldest goes after the newest."""
    written, limit = checkpoints_written(recipe, steps), recipe.get("save_total_limit")
    kept = None if limit is None else limit + 1
    return min((number for number in (written, kept) if number is not None), default=None)


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or is to be."""
    above = (folder, *folder.absolute().parents)
    return shutil.disk_usage(next(path for path in above if path.exists())).free


def describe_batch(recipe: Recipe, processes: int) -> str:
    """The batch of an optimizer step in words."""
    completions = completions_per_step(recipe, processes)
    group = recipe.get("num_generations")
    prompts = f"{completions / group:g} prompts x {group}"
    per_device = f"{recipe.get('per_device_train_batch_size')} per device"
    accumulated = f"{recipe.get('gradient_accumulation_steps')} accumulated"
    return (
        f"{completions} completions per optimizer step, {prompts}: "
        f"{_processes(processes)} x {per_device} x {accumulated}"
    )


def check_batch(recipe: Recipe, processes: int) -> None:
    """Whether the batch can be cut as GRPO wants it, and a checkpoint be continued exactly.

    Raises:
        InputError: with the value to write instead.
    """
    get = recipe.get
    group, per_device = get("num_generations"), get("per_device_train_batch_size")
    micro = processes * per_device
    if group < 2:
        raise recipe.error(
            f"{group}; GRPO compares completions of one prompt, so write at least 2",
            "num_generations",
        )

    # What is sampled at a time must make whole micro-batches and whole groups.
    if get("generation_batch_size") and get("steps_per_generation"):
        raise recipe.error(
            "give either this or steps_per_generation, not both", "generation_batch_size"
        )
    sampled, window = generation_batch(recipe, processes)
    if sampled % micro:
        raise recipe.error(
            f"{sampled} is no multiple of the {micro} completions of a micro-batch "
            f"(per_device_train_batch_size x {processes} processes); "
            f"write {_next_multiple(micro, sampled)}",
            "generation_batch_size",
        )
    if sampled % group:
        in_all = sampled // per_device  # micro-batches, of all processes
        fitting = _next_multiple(group // math.gcd(in_all, group), per_device)
        raise recipe.error(
            f"{sampled} completions are sampled at a time, which cannot be cut into groups of "
            f"num_generations: {group}; it counts completions, not prompts: write {fitting}",
            "per_device_train_batch_size",
        )

    # There must be enough puzzles for it.
    share, wanted = 1 - recipe.task.test_share, sampled // group
    prompts = training_puzzles(recipe)
    if prompts is not None and prompts < wanted:
        raise recipe.error(
            f"about {prompts} prompts to train on, but {wanted} are sampled at a time; "
            f"write at least {math.ceil(wanted / share * 1.2)}",
            "num_puzzles",
        )

    # A checkpoint holds no completions: one amid the steps that share a batch of them could not
    # be continued exactly.
    save_steps, saves = get("save_steps"), get("save_strategy") != "no"
    if saves and window > 1 and isinstance(save_steps, int) and save_steps % window:
        whole = window.numerator  # the fewest steps that end together with a batch
        raise recipe.error(
            f"{save_steps} is no multiple of the {float(window):g} optimizer steps that share one "
            "generation (steps_per_generation x num_iterations / gradient_accumulation_steps); "
            f"write {_next_multiple(whole, save_steps)}",
            "save_steps",
        )


def _next_multiple(step: int, at_least: int) -> int:
    return -(-at_least // step) * step


def _what_would_fit(recipe: Recipe, machine: Machine, processes: int) -> str:
    """The first changes, each added to the ones before, that make a recipe fit."""
    get = recipe.get
    batch, accumulated = get("per_device_train_batch_size"), get("gradient_accumulation_steps")
    steps: list[dict[str, Any]] = [{"gradient_checkpointing": True}]
    if colocates(recipe):
        steps.append({"vllm_enable_sleep_mode": True})
        least = least_vllm_share(recipe, machine.gpu_memory)
        if get("vllm_gpu_memory_utilization") < least:
            steps.append({"vllm_gpu_memory_utilization": least})
    while batch % 2 == 0:
        batch, accumulated = batch // 2, accumulated * 2
        batches = ("per_device_train_batch_size", "gradient_accumulation_steps")
        steps.append(dict(zip(batches, (batch, accumulated), strict=True)))
    steps += [{"use_peft": True, "dtype": "bfloat16"}, {"load_in_4bit": True}]

    changes: dict[str, Any] = {}
    for step in steps:
        changes |= {key: value for key, value in step.items() if get(key) != value}
        of_model = ("dtype", "use_peft", "load_in_4bit")
        model = {key: value for key, value in changes.items() if key in of_model}
        training = {key: value for key, value in changes.items() if key not in of_model}
        changed = replace(recipe, model=recipe.model | model, training=recipe.training | training)
        memory = phases(changed, processes, machine.gpu_memory)
        if memory is not None and peak(memory)[1] <= machine.gpu_memory:
            return "write " + ", ".join(f"{key}: {str(v).lower()}" for key, v in changes.items())
    return "take larger GPUs or a smaller model"


# ---- The launch -----------------------------------------------------------------------------


def take_gpus(recipe: Recipe) -> str | None:
    """Leave this process its GPUs, and return that of the vLLM server which it is to start, if any.

    A process of a launch sees all that train; one by itself sees the first, since libraries spread
    it over all that it sees.

    To be called before anything asks CUDA what there is, which is when CUDA reads the variable.
    """
    visible = visible_gpus()
    taken = visible[: gpus_to_use(recipe, len(visible))]
    server_gpu = taken.pop() if taken and owns_server(recipe) else None
    training = taken if launched() else taken[:1]
    if training != visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(training)
    if training != visible[: len(visible) - (server_gpu is not None)] and is_main_process():
        why = "this is one process; 'mini-r1 train' starts one for each"
        if training == taken:
            why = f"num_gpus: {recipe.get('num_gpus')}"
        of = f"GPU{'s' if len(training) > 1 else ''} {', '.join(training)} of {len(visible)}"
        print(f"training on {of}: {why}", flush=True)
    return server_gpu


def launch(plan: Plan) -> None:
    """Start the training processes as `accelerate launch` does, and return when they have ended.

    In this process, so that signals are passed on to them and nothing else: torch's launcher would
    give them 30 seconds to save, and end with a traceback.

    Raises:
        InputError: this is no checkout, so there are no launch configs.
        RunFailed: one of the processes did, or was killed.
        SystemExit: bad input or a signal; the processes have said it themselves.
        Interrupted: a signal came before there were any.
    """
    if not (ROOT / LAUNCH_CONFIGS).is_dir():
        raise InputError(
            f"several GPUs need {LAUNCH_CONFIGS}: run from a clone of the repository, "
            "installed with 'make setup'"
        )
    print(shlex.join(plan.command), flush=True)
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def pass_on(number: int, _frame: object) -> None:
        processes = psutil.Process().children()
        for process in processes:
            process.send_signal(number)
        if not processes:
            raise Interrupted("interrupted", number)

    # How torchrun is told to leave them to us; its log would only repeat what is said below.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        launch_command(launch_command_parser().parse_args(plan.command[2:]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == BAD_INPUT or failure.exitcode > SIGNALLED:  # it has said so itself
            sys.exit(failure.exitcode)
        ended = f"training process {rank} of {plan.processes} ended with {failure.exitcode}"
        raise RunFailed(ended) from None
