"""Numbers gone wrong: what ends a run before it is saved, and what is said when nothing is learned.

NaN and infinity are met at the end of the step that made them, before its line in the log, its
evaluation and its checkpoint: the newest checkpoint stays the last good one. What is left out: to
mend anything, or to skip a batch; a run is what its recipe says, or ends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer

from mini_r1 import FAILED, RunFailed, quirks
from mini_r1.callbacks import anywhere
from mini_r1.metrics import LOGP_DIFFERENCE, METRICS, SAME_TEXT
from mini_r1.model import not_finite
from mini_r1.rollouts import RolloutRecorder
from mini_r1.run import (
    DIAGNOSIS,
    FAILED_BATCH_FILE,
    failed_step,
    last_complete_checkpoint,
    write_json,
)

STALE = 0.1  # between the log-probabilities of a token, where rounding makes less than 0.05
SILENT_STEPS = 20  # in which no reward told one completion from another


# ---- NaN and infinity -----------------------------------------------------------------------


def end_all(accelerator: Accelerator, problem: str) -> NoReturn:
    """End a run that failed; every process must call this.

    Raises:
        RunFailed: on the main process, which tells what the problem is.
        SystemExit: on the others.
    """
    accelerator.end_training()
    if accelerator.is_main_process:
        raise RunFailed(problem)
    raise SystemExit(FAILED)


class FiniteNumbers(TrainerCallback):
    """Ends the run, on all ranks after the same step, when a number is NaN or infinite.

    Looks at what the rewards returned, the loss of each micro-batch, the norm of the gradient and
    the weights: one pass over the weights and two small collectives in a step, far below 1 % of it.
    To be called first, so that nothing else sees such a step; see `end_all` for what it raises.

    With fp16 a loss scale that is still sought makes gradients overflow; such steps are skipped by
    the libraries, and count only once it has sunk below 1.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        tokenizer: PreTrainedTokenizerBase,
        recorder: RolloutRecorder,
        run_dir: Path,
    ):
        self._accelerator, self._tokenizer = trainer.accelerator, tokenizer
        self._recorder, self._run_dir = recorder, run_dir
        # Of the step under way; on the device, until it has ended.
        self._batches: list[tuple[Any, Mapping[str, Any]]] = []
        self._norm: Any = 0.0
        quirks.watch_step(trainer, self._note_loss, self._note_norm)
        if not trainer.use_vllm:
            # Else torch ends a sampling from NaN, on this rank alone; the loss tells of it, too.
            trainer.generation_config.remove_invalid_values = True

    def _note_loss(self, loss: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        self._batches.append((loss.detach(), inputs))

    def _note_norm(self, norm: Any) -> None:
        self._norm = 0.0 if norm is None else norm  # DeepSpeed may have none yet

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = state.global_step
        self._failed_step = failed_step(self._run_dir) if state.is_world_process_zero else None

    def on_step_end(self, args, state, control, **kwargs):
        fault = self._fault(args, state.global_step, kwargs["model"])
        if anywhere(fault is not None, args.device):
            self._end(fault, args, state)
        self._batches.clear()
        if self._failed_step is not None and state.global_step >= self._failed_step:
            (self._run_dir / FAILED_BATCH_FILE).unlink(missing_ok=True)
            self._failed_step = None

    def _fault(self, args: Any, step: int, model: torch.nn.Module) -> tuple[int, str] | None:
        """What is wrong on this process, causes before effects; with its place in that order."""
        if self._recorder.fault is not None:
            return 0, str(self._recorder.fault)
        losses, norm, largest = self._numbers(model)
        said = (
            f"in step {step}, with learning_rate {args.learning_rate:g} and max_grad_norm "
            f"{args.max_grad_norm:g}; try a lower learning_rate, or dtype: float32, in a new "
            "--output_dir"
        )
        wrong = [loss for loss in losses if not math.isfinite(loss)]
        if wrong:
            return 1, f"the loss became {wrong[0]} {said}"
        if not (0 <= norm < math.inf or self._seeks_loss_scale()):  # DeepSpeed says -1, too
            return 2, f"the norm of the gradient became {norm if norm >= 0 else math.nan} {said}"
        if not math.isfinite(largest):
            return 3, f"the weight {not_finite(model)} became NaN or infinite {said}"
        return None

    def _numbers(self, model: torch.nn.Module) -> tuple[list[float], float, float]:
        """The losses, the norm and the largest weight, fetched from the device at once."""
        weights = (quirks.own_part(each) for each in model.parameters() if each.requires_grad)
        weights = [each for each in weights if each.numel()]
        largest = torch.nn.utils.get_total_norm(weights, math.inf)
        numbers = [*(loss for loss, _ in self._batches), self._norm, largest]
        numbers = [torch.as_tensor(each, device=largest.device).float() for each in numbers]
        *losses, norm, largest = torch.stack(numbers).tolist()
        return losses, norm, largest

    def _seeks_loss_scale(self) -> bool:
        scaler = self._accelerator.scaler  # DeepSpeed has its own, which gives up by itself
        found = scaler is not None and scaler.get_scale() < 1
        return self._accelerator.mixed_precision == "fp16" and not found

    def _end(self, fault: tuple[int, str] | None, args: Any, state: Any) -> None:
        """Keep the batch of the process that knows the cause, and end all."""
        file = self._run_dir / FAILED_BATCH_FILE
        faults = enumerate(gather_object([fault]))
        (order, problem), process = min((each, index) for index, each in faults if each is not None)
        if process == args.process_index:
            record = {
                "step": state.global_step,
                "process": process,
                "problem": problem,
                "learning_rate": args.learning_rate,
                "max_grad_norm": args.max_grad_norm,
                "gradient_norm": _plain(self._norm),
                "micro_batches": [
                    {"loss": _plain(loss), "completions": self._completions(inputs)}
                    for loss, inputs in self._batches
                ],
            }
            write_json(file, record)
        self._accelerator.wait_for_everyone()  # it is written
        newest = last_complete_checkpoint(self._run_dir)
        kept = f"{newest.name} is the newest checkpoint" if newest else "there is no checkpoint yet"
        if newest and order > 0 and state.global_step == self._began + 1:
            kept += " (if this comes again, remove it: it leads here)"
        end_all(self._accelerator, f"{problem}; {kept}, the batch is kept in {file}")

    def _completions(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A micro-batch for people: texts, rewards, and what each token was worth."""
        tokenizer, mask = self._tokenizer, inputs["completion_mask"].bool()
        scored = {
            (tuple(tokenizer(prompt)["input_ids"]), tuple(ids)): rewards
            for prompt, ids, rewards in self._recorder.scored
        }
        per_token = {  # log-probabilities when sampled and of the reference, where there are any
            name: values
            for name, values in inputs.items()
            if torch.is_tensor(values) and values.is_floating_point() and values.shape == mask.shape
        }
        rows = []
        for index, advantage in enumerate(inputs["advantages"].tolist()):
            asked = inputs["prompt_ids"][index][inputs["prompt_mask"][index].bool()].tolist()
            wrote = inputs["completion_ids"][index][mask[index]].tolist()
            row = {
                "prompt": tokenizer.decode(asked),
                "completion": tokenizer.decode(wrote),
                "tokens": len(wrote),
                "rewards": scored.get((tuple(asked), tuple(wrote))),
                "advantage": _plain(advantage),
            }
            rows.append(
                row
                | {name: _spread(values[index][mask[index]]) for name, values in per_token.items()}
            )
        return rows


def _spread(values: torch.Tensor) -> dict[str, Any]:
    """Some tokens' values in four numbers."""
    finite = values[values.isfinite()].tolist()
    spread = {"min": min(finite), "mean": fmean(finite), "max": max(finite)} if finite else {}
    return {**spread, "not_finite": values.numel() - len(finite)}


def _plain(number: Any) -> float | str:
    """As JSON has it, which knows no NaN."""
    value = float(number)
    return value if math.isfinite(value) else str(value)


# ---- Another model's completions ------------------------------------------------------------


class StaleWeights(TrainerCallback):
    """Says once if vLLM samples from other weights than are trained, and logs how far apart it is.

    The figure is the mean difference, per token, between vLLM's log-probability and the one that
    the loss is made of: TRL's, without its additional pass through the model. Rounding to 16 bit
    makes it 0.001 for the embedded base and 0.04 for SmolLM2-135M (docs/log.md).

    Args:
        correction: TRL's importance sampling is on, which logs the figure itself.
    """

    def __init__(self, trainer: GRPOTrainer, correction: bool):
        self._trainer, self._correction, self._said = trainer, correction, False
        self._sums: list[torch.Tensor] = []  # [difference, tokens] of each micro-batch
        quirks.watch_fresh_log_probabilities(trainer, self._note)

    def _note(self, log_probabilities: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        sampled = inputs["sampling_per_token_logps"]
        known = inputs["completion_mask"].bool() & ~sampled.isnan()
        apart = (log_probabilities - sampled).abs()[known]
        self._sums.append(torch.stack([apart.sum(), known.sum()]).float())

    def on_step_end(self, args, state, control, **kwargs):
        if not self._sums:  # the same steps on all ranks
            return
        sums = self._trainer.accelerator.reduce(torch.stack(self._sums).sum(0))
        self._sums.clear()
        difference = (sums[0] / sums[1].clamp(min=1)).item()
        if not self._correction:
            quirks.log_with_step(self._trainer, LOGP_DIFFERENCE, difference)
        if difference > STALE and not self._said and state.is_world_process_zero:
            self._said = True
            print(
                f"step {state.global_step}: vLLM samples from other weights than are trained: the "
                f"log-probabilities of its tokens are {difference:.2g} apart on average, where "
                f"rounding explains {STALE / 2:g}; stop the run, and start it again to send them "
                "anew",
                flush=True,
            )


# ---- Nothing to learn from ------------------------------------------------------------------


class LearningSignal(TrainerCallback):
    """Says once why nothing is learned, when no reward has told two completions of a group apart.

    All of it is read from the trainer's log, and becomes part of it, in the entry of the step: so a
    resumed run counts on, and what was said goes with the checkpoints, to the report.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self._said, self._silent, self._signal_at = False, True, 0
        for entry in state.log_history:
            self._read(entry)

    def _read(self, entry: Mapping[str, Any]) -> None:
        if METRICS["reward"].key in entry:  # further steps of a generation log none
            self._silent = _is_silent(entry)
        if "loss" in entry and not self._silent:
            self._signal_at = entry["step"]
        self._said |= DIAGNOSIS in entry

    def on_log(self, args, state, control, **kwargs):
        entry = state.log_history[-1]
        self._read(entry)
        if self._said or "loss" not in entry or entry["step"] - self._signal_at < SILENT_STEPS:
            return
        silent = [each for each in state.log_history if each["step"] > self._signal_at]
        why = diagnosis(silent, args.max_completion_length, args.temperature)
        steps = entry["step"] - self._signal_at
        line = f"step {entry['step']}: nothing was learned from rewards for {steps} steps: {why}"
        entry[DIAGNOSIS], self._said = line, True
        if state.is_world_process_zero:
            print(line, flush=True)


def _is_silent(entry: Mapping[str, Any]) -> bool:
    """Whether the completions of each group fared alike."""
    alike = METRICS["no_signal"].key, SAME_TEXT
    unscored = entry[METRICS["reward"].key] is None
    return unscored or any((entry.get(key) or 0) >= 1 for key in alike)


def diagnosis(
    entries: Sequence[Mapping[str, Any]], max_completion_length: int, temperature: float
) -> str:
    """Why steps without signal have none, and what to do: the cause that explains most of them.

    Every completion was either cut, or malformed, or wrong, or right; the largest share is told.
    Groups that are all the same text come before these, unless they are right.

    Args:
        entries: of the trainer's log.
    """

    def mean(value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        known = [each for each in map(value, entries) if each is not None]
        return fmean(known) if known else None

    reward = mean(METRICS["reward"].logged)
    if reward is None:
        return "every reward was None; see whether it applies to these data"
    cut, formed = mean(METRICS["truncated"].logged) or 0.0, mean(METRICS["format"].logged)
    right, same = mean(METRICS["success"].logged), mean(lambda entry: entry.get(SAME_TEXT)) or 0.0
    shares = {"cut": cut, "right": right or 0.0}
    if formed is not None:
        shares["malformed"] = max(0.0, 1 - formed - cut)
    rest = "wrong" if right is not None else "constant"
    shares[rest] = max(0.0, 1 - sum(shares.values()))
    cause = max(shares, key=lambda name: shares[name])
    if same > 0.9 and cause != "right":
        return (
            f"in {same:.0%} of the groups all completions are the same text; raise temperature "
            f"({temperature:g})"
        )
    return {
        "cut": "{:.0%} of the completions were cut at max_completion_length; raise it "
        f"({max_completion_length})",
        "right": "{:.0%} of the completions are right already; take harder puzzles",
        "malformed": "{:.0%} of the completions lack the form that the format reward wants; show "
        "it in the prompt, or start from a base that knows it (mini-r1 base sft)",
        "wrong": "{:.0%} of the completions have an answer, and a wrong one; take easier puzzles, "
        "a stronger base, or more num_generations",
        "constant": f"the rewards gave all completions of a group the same (reward {reward:.3g} on "
        "average); a reward must tell better ones from worse",
    }[cause].format(shares[cause])
