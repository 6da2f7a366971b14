"""Builds TRL's GRPOTrainer from a recipe and runs it: evaluate, train or resume, evaluate, sum up.

    python scripts/run_r1_grpo.py --config recipes/tiny-cpu.yaml [--key value ...]
    accelerate launch --config_file configs/accelerate_configs/ddp.yaml \
      scripts/run_r1_grpo.py --config RECIPE

GRPO in seven lines (Shao et al., arXiv:2402.03300), and the method of GRPOTrainer that does each:

1. Draw some puzzles, each `num_generations` times.             _get_train_sampler
2. Let the policy write a completion for each.                  _generate_single_turn
3. Score the completions with the reward functions.             _calculate_rewards
4. Advantage: a reward less its group's mean, over its spread.  _generate_and_score_completions
5. Log-probability of every token, now and when sampled.        _get_per_token_logps_and_entropies
6. Loss: minus the clipped ratio times the advantage, plus KL.  _compute_loss
7. One optimizer step; after a few of them, again from 1.       training_step

A run is a folder and continues by itself: the same command again resumes from the last complete
checkpoint, and says so when there is nothing left to do. `mini-r1 pause RUN`, SIGTERM, SIGUSR1
and Ctrl-C make it save and stop. Left out on purpose: any trainer, loss or sampler of our own.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config
from trl.models.utils import unwrap_model_for_generation

from mini_r1 import InputError, Interrupted, one_line, quirks
from mini_r1.callbacks import (
    CheckpointMarker,
    CheckpointSigner,
    HeldOutEvaluation,
    LastEvaluation,
    NoStepTooMany,
    NothingLeft,
    PauseOnRequest,
    StopRequested,
    TensorBoard,
    TrainClock,
)
from mini_r1.data import Split, load_split, prompt_dataset
from mini_r1.evaluate import heldout_puzzles, progress_bar, sample_batches, summarize
from mini_r1.generators import (
    CompletionGenerator,
    NoProbabilities,
    Questions,
    by_training_vllm,
    by_transformers,
)
from mini_r1.health import FiniteNumbers, LearningSignal, StaleWeights, end_all
from mini_r1.launch.guard import key_header
from mini_r1.launch.machine import is_main_process
from mini_r1.launch.memory import computes_in_16_bit, evaluation_batch
from mini_r1.launch.network import LOOPBACK
from mini_r1.launch.plan import describe_batch, owns_server, server_address
from mini_r1.launch.vllm_server import FAILED_TO_TAKE, VLLMServer, check_key, end_now
from mini_r1.live import LiveView
from mini_r1.manifest import DataRecord, build_manifest
from mini_r1.model import (
    check_finite,
    gpu_memory,
    load_tokenizer,
    model_error,
    model_path,
    not_finite,
    settle_generation,
)
from mini_r1.recipe import Recipe
from mini_r1.report.page import write_report
from mini_r1.rewards import get_reward_functions
from mini_r1.rollouts import RolloutRecorder
from mini_r1.run import (
    BEFORE,
    MANIFEST_FILE,
    PUBLISHED,
    REPORT_FILE,
    SAMPLES_FOLDER,
    SUMMARY_FILE,
    Evaluation,
    Summary,
    check_same_start,
    checkpoint_to_resume,
    discard_old_checkpoints,
    evaluation_file,
    finished_summary,
    load_evaluation,
    mark_paused,
    rewind,
    unmark_paused,
    write_json,
    write_recipe,
)
from mini_r1.start import Start
from mini_r1.tables import commit


def run(recipe: Recipe, server_gpu: str | None = None) -> Summary | None:
    """Train as the recipe says. Every process of a launch calls this.

    Args:
        server_gpu: the GPU for the vLLM server that this run starts, if it starts one; hidden from
            this process already.

    Returns:
        the summary, also in the run folder; None after a pause, and on other processes than the
        main one.

    Raises:
        InputError: the recipe, its model or its data cannot be used. `doctor.problems` tells most
            of it sooner.
        ServerDied: the vLLM server did not start.
        KeyboardInterrupt: a signal ended the run, paused or not; the message says how far it is.
    """
    run_dir = recipe.run_dir
    finished = finished_summary(recipe)
    if finished is not None:
        advice = "choose another --output_dir, or raise --max_steps to continue it"
        print(f"{run_dir} is already finished; {advice}.\n{describe(finished)}")
        return finished

    # Puzzles and prompts. Everything that can be refused is refused before anything is written.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    disable_progress_bar()
    split = load_split(recipe.task)
    heldout_puzzles(split, recipe.task)
    start = Start(recipe)
    model_args, args, eval_every = _arguments(recipe)
    keep, is_main = recipe.get("save_total_limit"), args.process_index == 0
    (checkpoint,) = broadcast_object_list([checkpoint_to_resume(run_dir) if is_main else None])
    tokenizer = load_tokenizer(start.weights, recipe.get("model_revision"))
    dataset, too_long = prompt_dataset(
        split.train,
        recipe.task.template,
        tokenizer,
        recipe.task.max_prompt_length,
        recipe.get("chat_template_kwargs"),
        columns=split.columns,
    )

    # The trainer, and the vLLM server it may want.
    server = None
    if owns_server(recipe) and is_main:
        server = _start_server(recipe, args, server_gpu)
    recorder = RolloutRecorder(run_dir / SAMPLES_FOLDER, recipe.task)
    start.write(args)
    trainer = _build_trainer(recipe, model_args, args, dataset, tokenizer, recorder, start.folder)
    start.loaded(trainer)
    wrong = not_finite(cast(PreTrainedModel, trainer.model))  # in this rank's part
    check_finite(start.weights, next(filter(None, gather_object([wrong])), None))

    # The run folder: new, or as the last intact checkpoint left it.
    if is_main:
        data: DataRecord = {
            "sha256": split.hash,
            "revision": commit(recipe.task.dataset_id_or_path, recipe.task.dataset_revision),
            "train": len(dataset),
            "heldout": len(split.heldout),
            "duplicates": split.duplicates,
            "too_long": too_long,
        }
        _open_run(recipe, start.weights, trainer, data, resumed=checkpoint)
        rewind(run_dir, checkpoint)
        discard_old_checkpoints(run_dir, keep)
        print(describe_batch(recipe, args.world_size), flush=True)

    # What happens beside the loop, in the order in which it must be called.
    clock, pause = TrainClock(), PauseOnRequest(run_dir)
    live = LiveView(run_dir.name, clock, recorder)

    def evaluate(name: str) -> Evaluation:
        def on_batch() -> None:
            if pause.stops(args, trainer.state):
                raise StopRequested

        with live.phase("evaluating"):
            return _evaluate(trainer, recipe, tokenizer, split, name, on_batch)

    log = partial(quirks.log_plainly, trainer)
    last = LastEvaluation(evaluate, log)
    numbers = FiniteNumbers(trainer, tokenizer, recorder, run_dir)
    for callback in (numbers, LearningSignal(), clock):
        trainer.add_callback(callback)
    if trainer.use_vllm:
        trainer.add_callback(StaleWeights(trainer, args.vllm_importance_sampling_correction))
    if trainer.pop_callback(TensorBoardCallback):
        trainer.add_callback(TensorBoard(recipe.as_dict(), recorder))
    held_out, signer = HeldOutEvaluation(eval_every, evaluate, log), CheckpointSigner(start.sign)
    for callback in (live, held_out, pause, signer, CheckpointMarker(keep), last, NoStepTooMany()):
        trainer.add_callback(callback)

    # The loop, which is TRL's, and the end.
    summary = None
    with live, pause, suppress(NothingLeft, StopRequested):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if server:
        server.stop()
    if not pause.paused:
        with suppress(StopRequested):
            summary = _finish(trainer, recipe, tokenizer, last, clock, start)
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if pause.paused and is_main:
        mark_paused(run_dir, step)
        if not pause.signal:
            print(f"paused after step {step} of {steps}; the same command goes on from there")
    # Without this, two of five ZeRO-3 runs abort at exit after their success.
    trainer.accelerator.wait_for_everyone()
    quirks.end_colocated_vllm(trainer)
    trainer.accelerator.end_training()
    if pause.paused and pause.signal:
        raise Interrupted(f"paused after step {step} of {steps}", pause.signal)
    return summary


def _finish(
    trainer: GRPOTrainer,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    last: LastEvaluation,
    clock: TrainClock,
    start: Start,
) -> Summary | None:
    """Evaluate the trained model, save it and sum up; the summary is the main process's.

    The summary is written last: a run that was killed before it does all of this again.

    Raises:
        StopRequested: the run was asked to stop, and is to do all of this again.
    """
    run_dir = recipe.run_dir
    after = last.result()
    if computes_in_16_bit(recipe) and not recipe.get("use_peft"):
        # As it is used from now on; what was trained in 32 bit stays so in the checkpoints.
        narrow = torch.float16 if recipe.get("fp16") else torch.bfloat16
        cast(PreTrainedModel, trainer.model).to(narrow)
    trainer.save_model(str(run_dir))
    trainer.save_state()  # every logged scalar
    summary = None
    if trainer.accelerator.is_main_process:
        start.sign(run_dir)
        tokenizer.save_pretrained(run_dir)
        trainer.create_model_card(dataset_name=one_line(recipe.task.dataset_id_or_path))
        write_report([run_dir], run_dir / REPORT_FILE)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if trainer.accelerator.is_main_process:
        start.sign(run_dir)  # the push has saved it once more
        start.ended()
        summary = _sum_up(run_dir, after, trainer.state.global_step, clock.train_seconds)
        print(describe(summary))
    return summary


def describe(summary: Summary) -> str:
    """The summary for people, a few lines."""
    before, after = summary["success_before"], summary["success_after"]
    tokens = summary["mean_completion_tokens_before"], summary["mean_completion_tokens_after"]
    low, high = summary["ci95_after"]
    puzzles = f"{summary['num_puzzles']} puzzles x {summary['num_samples']}"
    minutes = summary["train_seconds"] / 60
    return (
        f"held-out success  {before:.1%} -> {after:.1%} (95 % interval {low:.1%} to {high:.1%}; "
        f"{puzzles}, temperature {summary['temperature']})\n"
        f"completion tokens {tokens[0]:.0f} -> {tokens[1]:.0f}\n"
        f"training          {summary['steps']} steps in {minutes:.1f} minutes\n"
        f"everything is in  {summary['run_dir']}: the model, report.html, eval/, samples/, "
        "tensorboard/, summary.json"
    )


# ---- Building -------------------------------------------------------------------------------


def _arguments(recipe: Recipe) -> tuple[ModelConfig, GRPOConfig, int | None]:
    """TRL's arguments, and every how many steps to evaluate on held-out puzzles.

    The evaluation is our own, not the Trainer's, and so is the end of old checkpoints.
    """
    given = dict(recipe.training)
    given.pop("save_total_limit", None)
    strategy, eval_steps = given.pop("eval_strategy", "no"), given.pop("eval_steps", None)
    try:
        model_args = ModelConfig(**recipe.model)
        wanted = model_args.attn_implementation
        if wanted == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            if is_main_process():
                print("attn_implementation: flash-attn is not installed, using sdpa")
            model_args.attn_implementation = "sdpa"
        # The original recipe's dtype, attention and revision never reached its model.
        given["model_init_kwargs"] = {
            "revision": model_args.model_revision,
            "dtype": model_args.dtype,
            "attn_implementation": model_args.attn_implementation,
            "use_safetensors": True,
            **(given.get("model_init_kwargs") or {}),
        }
        args = GRPOConfig(**given)
    except (ValueError, ImportError) as error:
        raise InputError(one_line(error), where=recipe.path) from error
    quirks.unnumber_cpu(args)
    return model_args, args, eval_steps if strategy == "steps" else None


def _start_server(recipe: Recipe, args: GRPOConfig, gpu: str | None) -> VLLMServer:
    """Start vLLM on its GPU and tell TRL where it is."""
    server = VLLMServer(recipe, gpu)
    place = f"GPU {gpu}" if gpu else "the CPU"
    print(f"starting vLLM on {place}; its log is {server.log}", flush=True)
    server.start()
    server.watch()
    quirks.watch_transfer(server.refused)
    args.vllm_server_base_url, args.vllm_group_port = server.url, server.group_port
    # Where TRL waits for the server to join the transfer of weights.
    os.environ["VLLM_HOST_IP"] = LOOPBACK
    return server


def _build_trainer(
    recipe: Recipe,
    model_args: ModelConfig,
    args: GRPOConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    recorder: RolloutRecorder,
    weights: str,
) -> GRPOTrainer:
    assert args.generation_batch_size is not None  # GRPOConfig works them out
    assert args.num_generations is not None
    per_step = args.generation_batch_size // args.num_generations
    if len(dataset) < per_step:
        raise recipe.error(
            f"{len(dataset)} prompts to train on, but one generation batch takes {per_step}",
            "num_puzzles",
        )
    rewards = get_reward_functions(recipe.task.reward_funcs)
    for reward in rewards:
        reward.check_columns(name for name in dataset.column_names if name != "prompt")
    set_seed(args.seed)  # the weights of a fresh LoRA adapter
    quirks.quiet_unscored_completions()
    quirks.upload_only(PUBLISHED)
    if address := args.vllm_server_base_url or server_address(recipe):
        check_key(address)
        quirks.show_key(address, key_header())
    if given := server_address(recipe):
        why = f"the vLLM server at {given} {FAILED_TO_TAKE}; its log says more"
        quirks.watch_transfer(lambda error: end_now(f"{why} ({one_line(error, 300)})"))
    quirks.make_logged_completions_visible()
    name = recipe.model["model_name_or_path"]
    try:
        trainer = GRPOTrainer(
            model=weights,
            reward_funcs=[*recorder.watch(rewards)],
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except OSError as error:
        raise model_error(name, error) from error
    quirks.seed_colocated_vllm(args)
    quirks.keep_4bit_trainable(trainer.model)
    quirks.unmerge_exactly(trainer.model)
    if recipe.get("use_peft") and not trainer.is_deepspeed_enabled:  # that keeps a copy in 32 bit
        quirks.keep_adapters_wide(trainer.model)
    settle_generation(cast(PreTrainedModel, trainer.model))
    # The live view shows both.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- The run folder -------------------------------------------------------------------------


def _open_run(
    recipe: Recipe, weights: str, trainer: GRPOTrainer, data: DataRecord, resumed: Path | None
) -> None:
    """Record what runs, and say how it starts."""
    run_dir, resolved = recipe.run_dir, recipe.as_dict()
    commit = quirks.hub_commit(trainer.model)
    manifest = build_manifest(resolved, model_path(weights), commit, data)
    if resumed is not None:
        check_same_start(run_dir, manifest)
    unmark_paused(run_dir)
    write_recipe(run_dir, resolved)
    if resumed is None:
        write_json(run_dir / MANIFEST_FILE, manifest)
        parts = f"{data['train']} puzzles to train on, {data['heldout']} held out"
        print(f"{parts}, {data['too_long']} too long for max_prompt_length")
    else:
        write_json(run_dir / f"manifest-from-{resumed.name}.json", manifest)
        print(f"resuming from {resumed}")


def _evaluate(
    trainer: GRPOTrainer,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    name: str,
    after_batch: Callable[[], None],
) -> Evaluation:
    """Evaluate the model as it is now, batches shared among all processes.

    Args:
        name: of the evaluation.
        after_batch: called by all processes together.

    Returns:
        the whole result, on every process.
    """
    accelerator, task = trainer.accelerator, recipe.task
    puzzles = heldout_puzzles(split, task)
    questions = Questions(
        puzzles,
        task,
        tokenizer,
        recipe.get("max_completion_length"),
        split.columns,
        recipe.get("chat_template_kwargs"),
    )
    started = time.monotonic()

    # Each process samples its share.
    completions = len(puzzles) * task.num_eval_samples
    bar = progress_bar(completions, name, shown=accelerator.is_main_process)
    batches, failure, by = [], None, ""
    with bar as advance:

        def on_batch(new: int) -> None:
            advance(new)
            after_batch()

        try:
            with _generator(trainer, recipe, questions) as generator:
                by = generator.name
                batches = sample_batches(generator, questions, on_batch)
        except NoProbabilities as error:
            failure = str(error)
    failures = list(filter(None, gather_object([failure])))
    if failures:
        end_all(accelerator, f"evaluation {name}: {failures[0]}")

    # All of them put together, in the order of the puzzles.
    ordered = sorted(gather_object(batches), key=itemgetter(0))
    result = summarize(
        [sample for _, batch in ordered for sample in batch],
        task,
        max_completion_length=questions.max_completion_length,
        generator=by,
        step=trainer.state.global_step,
        seconds=round(time.monotonic() - started, 1),
    )
    if accelerator.is_main_process:
        write_json(evaluation_file(recipe.run_dir, name), result)
        low, high = result["ci95"]
        interval = f"95 % interval {low:.1%} to {high:.1%}"
        print(f"{name}: held-out success {result['success']:.1%} ({interval})", flush=True)
    return result


@contextmanager
def _generator(
    trainer: GRPOTrainer, recipe: Recipe, questions: Questions
) -> Generator[CompletionGenerator]:
    """What writes the completions of an evaluation: whatever writes those of the training."""
    if trainer.use_vllm:
        with by_training_vllm(trainer, questions) as generator:
            yield generator
        return
    accelerator = trainer.accelerator
    unwrapped = unwrap_model_for_generation(
        trainer.model_wrapped,  # ty: ignore[invalid-argument-type]  (bare models are fine, too)
        accelerator,
        gradient_checkpointing_kwargs=recipe.get("gradient_checkpointing_kwargs"),
    )
    rank, ranks = accelerator.process_index, accelerator.num_processes
    batch = evaluation_batch(recipe, ranks, gpu_memory())
    with (
        unwrapped as model,
        by_transformers(
            model, questions, batch=batch, process=rank, num_processes=ranks
        ) as generator,
    ):
        yield generator


def _sum_up(run_dir: Path, after: Evaluation, steps: int, train_seconds: float) -> Summary:
    before = load_evaluation(run_dir, BEFORE)
    summary: Summary = {
        "run_dir": str(run_dir),
        "steps": steps,
        "train_seconds": train_seconds,
        "success_before": before["success"],
        "ci95_before": before["ci95"],
        "mean_completion_tokens_before": before["mean_completion_tokens"],
        "success_after": after["success"],
        "ci95_after": after["ci95"],
        "mean_completion_tokens_after": after["mean_completion_tokens"],
        "num_puzzles": after["num_puzzles"],
        "num_samples": after["num_samples"],
        "temperature": after["temperature"],
        "split": after["split"],
        "rule": after["rule"],
    }
    if "plus_minus_only_share" in after:
        summary["plus_minus_only_share"] = after["plus_minus_only_share"]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved() / 2**30
        summary["peak_gpu_memory_gib"] = round(peak, 2)
    write_json(run_dir / SUMMARY_FILE, summary)
    return summary
