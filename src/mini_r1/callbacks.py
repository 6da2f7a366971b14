"""What happens beside the training loop: recording rollouts, TensorBoard, scheduled evaluation, checkpoints, pausing, the clock.

Everything here uses the public hooks of TRL and transformers: reward functions, `log_metric` and `TrainerCallback`.
"""

import functools
import inspect
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard.summary import hparams
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from mini_r1.behaviors import behavior, summarize_behaviors
from mini_r1.model import COMPLETE_MARKER, STOP_FILE
from mini_r1.rewards import RewardFunction, completion_text
from mini_r1.samples import Sample, append_samples

SAMPLE_TEXTS = 20  # per run, in TensorBoard


class RolloutRecorder:
    """Logs how the model behaves, and keeps samples of its completions; `latest` is a fresh one on the main process.

    It watches the reward functions, so it sees exactly what was judged. Behaviours are logged over the completions of all ranks;
    rank 0 keeps samples of its own. With `rewind_samples` before a resume the files end up as if never interrupted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.latest: Sample | None = None
        self._names: list[str] = []
        self._scores: dict[str, list[float]] = {}

    def watch(self, functions: Sequence[RewardFunction]) -> list[RewardFunction]:
        """The same reward functions under the same names, observed."""
        self._names = [function.__name__ for function in functions]
        return [self._watched(function) for function in functions]

    def _watched(self, function: RewardFunction) -> RewardFunction:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def watched(**columns: Any) -> list[float]:
                return self._note(function.__name__, await function(**columns), columns)
        else:

            @functools.wraps(function)
            def watched(**columns: Any) -> list[float]:
                return self._note(function.__name__, function(**columns), columns)

        return watched

    def _note(self, name: str, scores: list[float], columns: dict[str, Any]) -> list[float]:
        self._scores[name] = scores
        if len(self._scores) == len(self._names):
            self._log_behaviors(columns)
            if columns["trainer_state"].is_world_process_zero:
                samples = self._samples(columns)
                self.latest = samples[0]
                append_samples(self.folder, samples)
            self._scores = {}
        return scores

    @staticmethod
    def _log_behaviors(columns: dict[str, Any]) -> None:
        texts = map(completion_text, columns["completions"])
        seen = [behavior(*each) for each in zip(texts, columns["target"], columns["nums"], strict=True)]
        for name, value in summarize_behaviors(seen).items():
            if value is not None:
                columns["log_metric"](f"behaviors/{name}", value)

    def _samples(self, columns: dict[str, Any]) -> list[Sample]:
        step = columns["trainer_state"].global_step + 1
        texts = map(completion_text, columns["completions"])
        return [
            Sample(step, tuple(nums), target, {name: self._scores[name][index] for name in self._names}, text)
            for index, (nums, target, text) in enumerate(zip(columns["nums"], columns["target"], texts, strict=True))
        ]


class TensorBoard(TensorBoardCallback):
    """The libraries' TensorBoard log, with the recipe as a hyper-parameter entry and twenty sample texts.

    Everything goes into one file: TensorBoard reads those of a folder one after the other, and never returns to an earlier one.
    """

    def __init__(self, recipe: Mapping[str, Any], recorder: RolloutRecorder):
        super().__init__()
        self._recipe, self._recorder = recipe, recorder
        self._sample: Sample | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if not state.is_world_process_zero:
            return
        if state.global_step == 0 and "eval_success" in logs:
            values = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in self._recipe.items()}
            for summary in hparams(values, {"eval/success": logs["eval_success"]}):
                self.tb_writer.file_writer.add_summary(summary, 0)
        sample, shown = self._recorder.latest, self._sample
        if sample is not None and (shown is None or sample.step - shown.step >= state.max_steps / SAMPLE_TEXTS):
            text = "\n".join(f"    {line}" for line in sample.text.strip().splitlines())  # Markdown leaves such lines as they are
            self.tb_writer.add_text("samples", f"{sample.puzzle}: {sample.verdict}\n\n{text}", sample.step)
            self._sample = sample


class HeldOutEvaluation(TrainerCallback):
    """Evaluates on the held-out puzzles before the first step, every `every` steps and after the last; logs success and length.

    Not done before `trainer.train()`: only there the model is wrapped, so that the ranks of ZeRO-3 can gather its weights. The last
    one, `after`, waits until the last checkpoint is complete, for which `CheckpointMarker` must be called first.
    """

    def __init__(self, every: int | None, evaluate: Callable[[str], dict[str, Any]], log: Callable[[dict[str, float]], None]):
        self._every, self._evaluate, self._log = every, evaluate, log
        self._after: dict[str, Any] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._run("before")

    def on_step_end(self, args, state, control, **kwargs):
        if self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._run(f"step-{state.global_step:06d}")

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            self._after = self._run("after")

    def result_after(self) -> dict[str, Any]:
        """The last evaluation; made now if no checkpoint was saved after the last step, or a kill came between it and that."""
        return self._after or self._run("after")

    def _run(self, name: str) -> dict[str, Any]:
        result = self._evaluate(name)
        self._log({"eval_success": result["success"], "eval_mean_completion_tokens": result["mean_completion_tokens"]})
        return result


class CheckpointMarker(TrainerCallback):
    """Marks a checkpoint as complete after all ranks have written their part."""

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_MARKER).touch()


class PauseOnRequest(TrainerCallback):
    """Saves and stops, on all ranks at the same step, after a signal to any of them or once a STOP file is in the run folder.

    That is the next step after which a checkpoint can be continued exactly: not amid the steps that share one generation. The
    signals are only noted, so that a save or a collective under way is not torn; SIGKILL remains for the impatient.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, run_dir: Path):
        self.paused = False
        self._stop_file = run_dir / STOP_FILE
        self._requested = False
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self._requested = True

    def on_step_end(self, args, state, control, **kwargs):
        requested = self._requested or (state.is_world_process_zero and self._stop_file.exists())
        if torch.distributed.is_initialized():
            anywhere = torch.tensor(float(requested), device=args.device)
            torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
            requested = bool(anywhere.item())
        window = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        if requested and (window < 1 or state.global_step % window == 0) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.paused = True


class TrainClock(TrainerCallback, ExportableState):
    """Seconds spent in training, held-out evaluation excluded; kept in the checkpoints, so a resumed run counts on."""

    def __init__(self):
        self.train_seconds = 0.0
        self._since = None

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.train_seconds = saved.get("attributes", {}).get("train_seconds", 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.train_seconds += time.monotonic() - self._since

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"train_seconds": self.train_seconds}}
