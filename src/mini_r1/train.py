"""Builds TRL's GRPOTrainer from a recipe and runs it: evaluate, train (or resume), save, evaluate again, sum up.

    python scripts/run_r1_grpo.py --config recipes/tiny-cpu.yaml [--key value ...]
    accelerate launch --config_file configs/accelerate_configs/ddp.yaml scripts/run_r1_grpo.py --config RECIPE

A run is a folder and continues by itself: the same command again resumes from the last complete checkpoint, and says so when
there is nothing left to do. `mini-r1 pause RUN`, SIGTERM and SIGUSR1 make it save and stop. Left out on purpose: any trainer, loss
or sampler of our own.
"""

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import yaml
from accelerate.utils import gather_object
from transformers import Trainer, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config
from trl.models.utils import unwrap_model_for_generation

from mini_r1 import InputError
from mini_r1.callbacks import (
    CheckpointMarker,
    HeldOutEvaluation,
    PauseOnRequest,
    RolloutRecorder,
    TensorBoard,
    TrainClock,
)
from mini_r1.countdown.puzzles import Puzzle
from mini_r1.data import load_split, prompt_dataset
from mini_r1.evaluate import heldout_puzzles, progress_bar, sample_batches, summarize
from mini_r1.live import LiveView
from mini_r1.manifest import build_manifest, write_json, write_text
from mini_r1.model import (
    PAUSED_MARKER,
    STOP_FILE,
    checkpoint_step,
    checkpoints,
    keep_4bit_trainable,
    last_complete_checkpoint,
    load_tokenizer,
    model_error,
    model_path,
)
from mini_r1.plan import SERVER_HOST, owns_server
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import Recipe
from mini_r1.report import write_report
from mini_r1.rewards import get_reward_functions
from mini_r1.samples import rewind_samples
from mini_r1.vllm_server import VLLMServer


def run(recipe: Recipe, server_gpu: str | None = None) -> dict[str, Any]:
    """Train as the recipe says and return the summary (also in `summary.json`). Every process of a launch calls this.

    Args:
        server_gpu: the GPU for the vLLM server that this run starts, if it starts one; hidden from this process already.

    Raises:
        InputError: the recipe, its model or its data cannot be used. `doctor.problems` tells most of it sooner.
        ServerDied: the vLLM server did not start.
    """
    run_dir = recipe.run_dir
    finished = _finished_summary(recipe)
    if finished is not None:
        print(f"{run_dir} is already finished; choose another --output_dir, or raise --max_steps to continue it.")
        print(describe(finished))
        return finished

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    disable_progress_bar()
    template = PROMPT_TEMPLATES[recipe.task.prompt_template]
    split = load_split(recipe.task)
    heldout = heldout_puzzles(split, recipe.task)
    model_args, args, eval_every = _arguments(recipe)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    dataset, too_long = prompt_dataset(split.train, template, tokenizer, recipe.task.max_prompt_length)

    server = _start_server(recipe, args, server_gpu) if owns_server(recipe) and args.process_index == 0 else None
    recorder = RolloutRecorder(run_dir / "samples")
    trainer = _build_trainer(recipe, model_args, args, dataset, tokenizer, recorder)
    is_main = trainer.accelerator.is_main_process
    checkpoint = _checkpoint_to_resume(run_dir, is_main)
    trainer.accelerator.wait_for_everyone()
    if is_main:
        data = {"sha256": split.hash, "train": len(dataset), "heldout": len(split.heldout)}
        _open_run(recipe, trainer, data | {"duplicates": split.duplicates, "too_long": too_long}, resumed=checkpoint)
        rewind_samples(recorder.folder, checkpoint_step(checkpoint) if checkpoint else 0)

    def evaluate(name: str) -> dict[str, Any]:
        return _evaluate(trainer, recipe, tokenizer, heldout, run_dir / "eval" / f"{name}.json")

    clock, pause = TrainClock(), PauseOnRequest(run_dir)
    if trainer.pop_callback(TensorBoardCallback):
        trainer.add_callback(TensorBoard(recipe.as_dict(), recorder))
    trainer.add_callback(clock)
    trainer.add_callback(pause)
    trainer.add_callback(LiveView(run_dir.name, clock, recorder))
    # Not TRL's log, which would send along what the training has noted since its last line.
    held_out = HeldOutEvaluation(eval_every, evaluate, partial(Trainer.log, trainer))
    trainer.add_callback(CheckpointMarker())
    trainer.add_callback(held_out)

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if server:
        server.stop()
    summary = {}
    if pause.paused:
        if is_main:
            (run_dir / STOP_FILE).unlink(missing_ok=True)
            write_text(run_dir / PAUSED_MARKER, f"{trainer.state.global_step}\n")
            print(
                f"paused after step {trainer.state.global_step} of {trainer.state.max_steps}; the same command goes on from there"
            )
    else:
        summary = _finish(trainer, recipe, tokenizer, held_out, clock)
    # Without this, two of five ZeRO-3 runs abort at exit after their success.
    trainer.accelerator.wait_for_everyone()
    if args.use_vllm and args.vllm_mode == "colocate":
        # At exit, when it would end by itself, the process group it uses is gone.
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
    trainer.accelerator.end_training()
    return summary


def _finish(trainer: GRPOTrainer, recipe: Recipe, tokenizer: Any, held_out: HeldOutEvaluation, clock: TrainClock) -> dict[str, Any]:
    """Save the trained model, evaluate it and sum up; the summary is the main process's."""
    run_dir = recipe.run_dir
    trainer.save_model(str(run_dir))
    after = held_out.result_after()
    trainer.save_state()  # trainer_state.json: every logged scalar
    summary = {}
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(run_dir)
        summary = _sum_up(run_dir, after, trainer.state.global_step, clock.train_seconds)
        trainer.create_model_card(dataset_name=recipe.task.dataset_id_or_path)
        write_report([run_dir], run_dir / "report.html")
        print(describe(summary))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return summary


def describe(summary: dict[str, Any]) -> str:
    """The summary for people, a few lines."""
    low, high = summary["ci95_after"]
    return (
        f"held-out success  {summary['success_before']:.1%} -> {summary['success_after']:.1%} (95 % interval {low:.1%} to "
        f"{high:.1%}; {summary['num_puzzles']} puzzles x {summary['num_samples']}, temperature {summary['temperature']})\n"
        f"completion tokens {summary['mean_completion_tokens_before']:.0f} -> {summary['mean_completion_tokens_after']:.0f}\n"
        f"training          {summary['steps']} steps in {summary['train_seconds'] / 60:.1f} minutes\n"
        f"everything is in  {summary['run_dir']}: the model, report.html, eval/, samples/, tensorboard/, summary.json"
    )


# ---- Building ---------------------------------------------------------------------------------------------------------------


def _arguments(recipe: Recipe) -> tuple[ModelConfig, GRPOConfig, int | None]:
    """TRL's arguments, and every how many steps to evaluate on held-out puzzles (our own evaluation, not the Trainer's)."""
    given = dict(recipe.training)
    strategy, eval_steps = given.pop("eval_strategy", "no"), given.pop("eval_steps", None)
    if strategy not in ("no", "steps") or (strategy == "steps" and not eval_steps):
        raise InputError("eval_strategy: write 'no', or 'steps' together with eval_steps")
    if given.get("push_to_hub") and not (given.get("hub_token") or huggingface_hub.get_token()):
        raise InputError("push_to_hub: no hub token here; run 'hf auth login', or write push_to_hub: false")
    try:
        model_args = ModelConfig(**recipe.model)
        if model_args.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            if os.environ.get("RANK", "0") == "0":
                print("attn_implementation: flash-attn is not installed, using sdpa")
            model_args.attn_implementation = "sdpa"
        # The original recipe's dtype, attention and revision never reached its model.
        given["model_init_kwargs"] = {
            "revision": model_args.model_revision,
            "dtype": model_args.dtype,
            "attn_implementation": model_args.attn_implementation,
            **(given.get("model_init_kwargs") or {}),
        }
        args = GRPOConfig(**given)
    except (ValueError, ImportError) as error:
        raise InputError(f"{recipe.name}: {' '.join(str(error).split())}") from error
    if args.device.type == "cpu":
        # accelerate numbers the CPUs of several processes, and torch.load, on resuming, knows no "cpu:1".
        args._setup_devices = torch.device("cpu")
    return model_args, args, eval_steps if strategy == "steps" else None


def _start_server(recipe: Recipe, args: GRPOConfig, gpu: str | None) -> VLLMServer:
    """Start vLLM on its GPU and tell TRL where it is."""
    server = VLLMServer(recipe, gpu)
    print(f"starting vLLM on {f'GPU {gpu}' if gpu else 'the CPU'}; its log is {server.log}", flush=True)
    server.start()
    server.watch()
    args.vllm_server_base_url, args.vllm_group_port = server.url, server.group_port
    os.environ["VLLM_HOST_IP"] = SERVER_HOST  # where TRL waits for the server to join the transfer of weights
    return server


def _build_trainer(
    recipe: Recipe, model_args: ModelConfig, args: GRPOConfig, dataset: Any, tokenizer: Any, recorder: RolloutRecorder
) -> GRPOTrainer:
    per_step = args.generation_batch_size // args.num_generations
    if len(dataset) < per_step:
        raise InputError(f"num_puzzles: {len(dataset)} prompts to train on, but one generation batch takes {per_step}")
    set_seed(args.seed)  # the weights of a fresh LoRA adapter
    try:
        trainer = GRPOTrainer(
            model=model_path(model_args.model_name_or_path),
            reward_funcs=recorder.watch(get_reward_functions(recipe.task.reward_funcs)),
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except OSError as error:
        raise model_error(model_args.model_name_or_path, error) from error
    keep_4bit_trainable(trainer.model)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- The run folder ---------------------------------------------------------------------------------------------------------


def _finished_summary(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, None for a new, unfinished or extended one."""
    try:
        earlier = yaml.safe_load((recipe.run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        summary = json.loads((recipe.run_dir / "summary.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    now = recipe.as_dict()
    return None if any(earlier.get(key) != now.get(key) for key in ("max_steps", "num_train_epochs")) else summary


def _checkpoint_to_resume(run_dir: Path, is_main: bool) -> Path | None:
    """The newest complete checkpoint. Torn ones after it are removed, since training writes them again."""
    complete = last_complete_checkpoint(run_dir)
    for torn in checkpoints(run_dir):
        if torn == complete:
            break
        if is_main:
            print(f"removing {torn}: it was not written to its end")
            shutil.rmtree(torn)
    return complete


def _open_run(recipe: Recipe, trainer: GRPOTrainer, data: dict[str, Any], resumed: Path | None) -> None:
    run_dir = recipe.run_dir
    (run_dir / PAUSED_MARKER).unlink(missing_ok=True)
    write_text(run_dir / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    name = recipe.model["model_name_or_path"]
    revision = getattr(trainer.model.config, "_commit_hash", None)
    manifest = build_manifest(recipe.as_dict(), model_path(name), revision, data=data)
    if resumed is None:
        write_json(run_dir / "manifest.json", manifest)
        print(f"{data['train']} puzzles to train on, {data['heldout']} held out, {data['too_long']} too long for max_prompt_length")
    else:
        write_json(run_dir / f"manifest-from-{resumed.name}.json", manifest)
        print(f"resuming from {resumed}")


def _evaluate(trainer: GRPOTrainer, recipe: Recipe, tokenizer: Any, puzzles: Sequence[Puzzle], file: Path) -> dict[str, Any]:
    """Evaluate the model as it is now, batches shared among all processes; every process returns the whole result."""
    accelerator, task = trainer.accelerator, recipe.task
    started = time.monotonic()
    bar = progress_bar(len(puzzles) * task.num_eval_samples, file.stem, shown=accelerator.is_main_process)
    unwrapped = unwrap_model_for_generation(
        trainer.model_wrapped, accelerator, gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs
    )
    with bar as on_batch, unwrapped as model:
        batches = sample_batches(
            model,
            tokenizer,
            puzzles,
            task,
            max_completion_length=trainer.args.max_completion_length,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            on_batch=on_batch,
        )
    result = summarize(
        [sample for _, batch in sorted(gather_object(batches), key=itemgetter(0)) for sample in batch],
        task,
        max_completion_length=trainer.args.max_completion_length,
        step=trainer.state.global_step,
        seconds=round(time.monotonic() - started, 1),
    )
    if accelerator.is_main_process:
        write_json(file, result)
        low, high = result["ci95"]
        print(f"{file.stem}: held-out success {result['success']:.1%} (95 % interval {low:.1%} to {high:.1%})", flush=True)
    return result


def _sum_up(run_dir: Path, after: dict[str, Any], steps: int, train_seconds: float) -> dict[str, Any]:
    before = json.loads((run_dir / "eval" / "before.json").read_text(encoding="utf-8"))
    summary = {"run_dir": str(run_dir), "steps": steps, "train_seconds": train_seconds}
    for name, result in (("before", before), ("after", after)):
        for key in ("success", "ci95", "mean_completion_tokens"):
            summary[f"{key}_{name}"] = result[key]
    for key in ("num_puzzles", "num_samples", "temperature", "split", "rule", "plus_minus_only_share"):
        summary[key] = after[key]
    if torch.cuda.is_available():
        summary["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    write_json(run_dir / "summary.json", summary)
    return summary
