"""What happens beside the loop: TensorBoard, evaluations, checkpoints, pausing, the clock.

Everything here uses the public hooks of transformers: `TrainerCallback`.
"""

import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from mini_r1 import quirks, visible
from mini_r1.launch.machine import outlive_launcher
from mini_r1.metrics import EVAL_SUCCESS, EVAL_TOKENS
from mini_r1.rollouts import RolloutRecorder
from mini_r1.run import (
    AFTER,
    BEFORE,
    Evaluation,
    discard_old_checkpoints,
    last_complete_checkpoint,
    mark_begun,
    mark_complete,
    stop_requested,
)

if TYPE_CHECKING:
    from trl import GRPOConfig

SAMPLE_TEXTS = 20  # per run, in TensorBoard
SAVING = "saving after this {}; Ctrl-C again to stop now"


def anywhere(here: int, device: Any) -> int:
    """The largest of what the ranks say; all of them must ask."""
    if not torch.distributed.is_initialized():
        return here
    answer = torch.tensor(int(here), device=device)
    torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
    return int(answer.item())


class TensorBoard(TensorBoardCallback, ExportableState):
    """The libraries' TensorBoard log, with the recipe as hyper-parameters and twenty sample texts.

    Everything goes into one file: TensorBoard reads those of a folder one after the other, and
    never returns to an earlier one.
    """

    def __init__(self, recipe: Mapping[str, Any], recorder: RolloutRecorder):
        super().__init__()
        self._recipe, self._recorder = recipe, recorder
        self._shown: int | None = None  # the step of the last sample text

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # what describes the run is not written again
            super().on_train_begin(args, state, control, **kwargs)
        self._shown = _kept(self, state).get("shown")

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"shown": self._shown}}

    def on_log(self, args, state, control, logs=None, **kwargs):
        # A reward that applied to nothing in this step has no mean: TRL logs None.
        known = {key: value for key, value in (logs or {}).items() if value is not None}
        super().on_log(args, state, control, logs=known, **kwargs)
        if not state.is_world_process_zero or not logs or self.tb_writer is None:
            return
        if state.global_step == 0 and EVAL_SUCCESS in logs:
            values = {
                key: value if isinstance(value, bool | int | float) else visible(str(value))
                for key, value in self._recipe.items()
            }
            quirks.add_hparams(self.tb_writer, values, {"eval/success": logs[EVAL_SUCCESS]})
        latest, shown = self._recorder.latest, self._shown
        apart = state.max_steps / SAMPLE_TEXTS
        if latest is not None and (shown is None or latest.step - shown >= apart):
            # Markdown leaves indented lines as they are.
            text = visible(f"{latest.question}: {latest.verdict}\n\n{latest.text.strip()}")
            text = "\n".join(f"    {line}" for line in text.splitlines())
            self.tb_writer.add_text("samples", text, latest.step)
            self._shown = latest.step
        self.tb_writer.flush()  # what a checkpoint counts on


class NothingLeft(Exception):
    """Every step was done before: the run was killed amid what comes after them."""


class NoStepTooMany(TrainerCallback):
    """Stops a resumed training that has no step left, when all is loaded and none was taken.

    To be called last. transformers 5.17 looks at max_steps only after a step.

    Raises:
        NothingLeft: out of `trainer.train()`.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise NothingLeft


class StopRequested(Exception):
    """An evaluation has ended between two batches, since the run was asked to stop."""


class HeldOutEvaluation(TrainerCallback):
    """Evaluates before the first step and every `every` steps, and logs the results.

    Not done before `trainer.train()`: only there the model is wrapped, so that the ranks of ZeRO-3
    can gather its weights. What follows a step is logged after the line of the step itself, and
    after its checkpoint: a run that goes on from there evaluates and logs again.

    Args:
        every: steps from one to the next; None for none in between.
        evaluate: makes the evaluation of this name; may raise StopRequested.
        log: takes what is to be logged.
    """

    def __init__(
        self,
        every: int | None,
        evaluate: Callable[[str], Evaluation],
        log: Callable[[dict[str, float]], None],
    ):
        self._every, self._evaluate, self._log = every, evaluate, log
        self._unlogged: Evaluation | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._unlogged = self._evaluate(BEFORE)
        elif self._due(state):
            self._unlogged = self._evaluate(_scheduled(state))
        self._log_result()

    def on_step_begin(self, args, state, control, **kwargs):
        self._log_result()

    def on_step_end(self, args, state, control, **kwargs):
        if self._due(state):
            with suppress(StopRequested):  # PauseOnRequest saves
                self._unlogged = self._evaluate(_scheduled(state))

    def _due(self, state: TrainerState) -> bool:
        scheduled = self._every is not None and state.global_step % self._every == 0
        return scheduled and state.global_step < state.max_steps

    def _log_result(self) -> None:
        if self._unlogged is not None:
            log_evaluation(self._log, self._unlogged)
        self._unlogged = None


class LastEvaluation(TrainerCallback):
    """Evaluates once the checkpoint of the last step is complete.

    To be called after `CheckpointMarker`. The arguments are those of HeldOutEvaluation.
    """

    def __init__(
        self, evaluate: Callable[[str], Evaluation], log: Callable[[dict[str, float]], None]
    ):
        self._evaluate, self._log = evaluate, log
        self._result: Evaluation | None = None

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            self.result()

    def result(self) -> Evaluation:
        """The last evaluation.

        Made now if no checkpoint was saved after the last step, or a kill came between the two.

        Raises:
            StopRequested: the run was asked to stop.
        """
        if self._result is None:
            self._result = self._evaluate(AFTER)
            log_evaluation(self._log, self._result)
        return self._result


def log_evaluation(log: Callable[[dict[str, float]], None], result: Evaluation) -> None:
    """Log what of an evaluation has a curve."""
    log({EVAL_SUCCESS: result["success"], EVAL_TOKENS: result["mean_completion_tokens"]})


def _scheduled(state: TrainerState) -> str:
    return f"step-{state.global_step:06d}"


class CheckpointSigner(TrainerCallback):
    """Hands each checkpoint to `sign` before it is marked, on the main process."""

    def __init__(self, sign: Callable[[Path], None]):
        self._sign = sign

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._sign(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class CheckpointMarker(TrainerCallback):
    """Marks a checkpoint as begun, and as complete after all ranks have written their part.

    To be called after whatever asks for a checkpoint at the end of a step.

    Args:
        limit: how many checkpoints to keep; None for all.
    """

    def __init__(self, limit: int | None = None):
        self._limit = limit

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            # A checkpoint does not hold what is summed up for the next line of the log.
            control.should_log = True
            if state.is_world_process_zero:
                mark_begun(Path(args.output_dir), state.global_step)

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir), state.global_step)
            discard_old_checkpoints(Path(args.output_dir), self._limit)


class PauseOnRequest(TrainerCallback):
    """Saves and stops, on all ranks at the same step, when asked.

    A signal to any of them asks, and so does a STOP file in the run folder. It is done after the
    next step whose checkpoint can be continued exactly: not amid the steps that share one
    generation. An evaluation ends after its next batch. The signals, that of a closed terminal
    among them, are only noted, so that a save or a collective under way is not torn.

    Ctrl-C asks in the same way between the first step and the last save, the evaluations amid the
    steps included; the second one ends the run at once, and so does the first where nothing would
    be lost. To be entered around the training, which gives Ctrl-C back its meaning afterwards.

    Attributes:
        paused: whether it has.
        signal: that asked for it: the largest number if several did, 0 if no more than a request.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    _REQUEST = 1  # by a STOP file or SIGUSR1, which are no reason to end with an error

    def __init__(self, run_dir: Path):
        self.paused, self.signal = False, 0
        self._run_dir = run_dir
        self._asked = 0  # how: a signal's number plus _REQUEST, or _REQUEST, or 0
        self._in_steps = self._in_step = self._speaks = False
        self._before: Any = None
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                signal.signal(number, self._note)

    def __enter__(self) -> "PauseOnRequest":
        self._before = signal.getsignal(signal.SIGINT)
        if self._before != signal.SIG_IGN:  # as in a background job: it stays so
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, _frame: Any) -> None:
        outlive_launcher()
        asked = self._REQUEST + (0 if number == signal.SIGUSR1 else number)
        self._asked = max(self._asked, asked)

    def _interrupt(self, number: int, frame: Any) -> None:
        if not self._in_steps:
            raise KeyboardInterrupt
        if self._asked > self._REQUEST:
            saved = last_complete_checkpoint(self._run_dir)
            kept = f"{saved.name} is kept" if saved else "nothing was saved yet"
            raise KeyboardInterrupt(f"stopped; {kept}")
        self._note(number, frame)
        if self._speaks:
            # From a thread of its own: what the signal came into may be writing to the terminal.
            what = SAVING.format("step" if self._in_step else "batch of the evaluation")
            Thread(target=print, args=(what,), kwargs={"file": sys.stderr, "flush": True}).start()

    def on_step_begin(self, args, state, control, **kwargs):
        self._in_steps = self._in_step = True
        self._speaks = state.is_world_process_zero

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._in_step = False  # an evaluation may follow

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps and self.stops(args, state):
            control.should_save = control.should_training_stop = True

    def stops(self, args: "GRPOConfig", state: TrainerState) -> bool:
        """Whether the run pauses as it is now; all ranks must ask together."""
        asked = self._asked
        if state.is_world_process_zero and stop_requested(self._run_dir):
            asked = max(asked, self._REQUEST)
        asked = anywhere(asked, args.device)
        assert args.steps_per_generation is not None  # GRPOConfig works it out
        window = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        whole = window < 1 or state.global_step % window == 0
        if not asked or not (whole or state.global_step >= state.max_steps):
            return False
        self.paused, self.signal = True, asked - self._REQUEST
        return True

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # all that is left to do can be done again
            self._in_steps = False
            if self._asked == self._REQUEST + signal.SIGINT:
                raise KeyboardInterrupt(f"stopped after the last step, {state.global_step}")


class TrainClock(TrainerCallback, ExportableState):
    """Seconds spent in training, held-out evaluation excluded.

    Kept in the checkpoints, so that a resumed run counts on. To be called first.
    """

    def __init__(self):
        self.train_seconds = 0.0
        self._since = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.train_seconds = _kept(self, state).get("train_seconds", 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.train_seconds += time.monotonic() - self._since

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "train_runtime" in logs:
            # transformers' closing line, whose seconds and mean loss are this attempt's only.
            state.log_history.pop()
            logs.clear()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"train_seconds": self.train_seconds}}


def _kept(callback: TrainerCallback, state: Any) -> Mapping[str, Any]:
    """What a callback's `state` returned when the checkpoint was saved from which this goes on."""
    return state.stateful_callbacks.get(type(callback).__name__, {}).get("attributes", {})
