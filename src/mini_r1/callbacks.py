"""What happens beside the loop: TensorBoard, evaluations, checkpoints, pausing, the clock.

Everything here uses the public hooks of transformers: `TrainerCallback`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from mini_r1 import quirks, visible
from mini_r1.metrics import EVAL_SUCCESS, EVAL_TOKENS
from mini_r1.rollouts import Rollout, RolloutRecorder
from mini_r1.run import (
    AFTER,
    BEFORE,
    Evaluation,
    last_complete_checkpoint,
    mark_complete,
    stop_requested,
)

SAMPLE_TEXTS = 20  # per run, in TensorBoard
SAVING = "saving after {} step; Ctrl-C again to stop now"


class TensorBoard(TensorBoardCallback):
    """The libraries' TensorBoard log, with the recipe as hyper-parameters and twenty sample texts.

    Everything goes into one file: TensorBoard reads those of a folder one after the other, and
    never returns to an earlier one.
    """

    def __init__(self, recipe: Mapping[str, Any], recorder: RolloutRecorder):
        super().__init__()
        self._recipe, self._recorder = recipe, recorder
        self._shown: Rollout | None = None

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
        if latest is not None and (shown is None or latest.step - shown.step >= apart):
            # Markdown leaves indented lines as they are.
            text = visible(f"{latest.question}: {latest.verdict}\n\n{latest.text.strip()}")
            text = "\n".join(f"    {line}" for line in text.splitlines())
            self.tb_writer.add_text("samples", text, latest.step)
            self._shown = latest


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


class HeldOutEvaluation(TrainerCallback):
    """Evaluates before the first step, every `every` steps and after the last one.

    Logs success and length. Not done before `trainer.train()`: only there the model is wrapped, so
    that the ranks of ZeRO-3 can gather its weights. The last one waits until the last checkpoint
    is complete, for which `CheckpointMarker` must be called first.

    Args:
        every: steps from one to the next; None for none in between.
        evaluate: makes the evaluation of this name.
        log: takes what is to be logged.
    """

    def __init__(
        self,
        every: int | None,
        evaluate: Callable[[str], Evaluation],
        log: Callable[[dict[str, float]], None],
    ):
        self._every, self._evaluate, self._log = every, evaluate, log
        self._after: Evaluation | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._run(BEFORE)

    def on_step_end(self, args, state, control, **kwargs):
        due = self._every and state.global_step % self._every == 0
        if due and state.global_step < state.max_steps:
            # transformers takes any line in the log for the step's own, which comes after this.
            should_log = control.should_log
            self._run(f"step-{state.global_step:06d}")
            control.should_log = should_log

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            self._after = self._run(AFTER)

    def result_after(self) -> Evaluation:
        """The last evaluation.

        Made now if no checkpoint was saved after the last step, or a kill came between the two.
        """
        return self._after or self._run(AFTER)

    def _run(self, name: str) -> Evaluation:
        result = self._evaluate(name)
        self._log({EVAL_SUCCESS: result["success"], EVAL_TOKENS: result["mean_completion_tokens"]})
        return result


class CheckpointSigner(TrainerCallback):
    """Hands each checkpoint to `sign` before it is marked, on the main process."""

    def __init__(self, sign: Callable[[Path], None]):
        self._sign = sign

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._sign(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class CheckpointMarker(TrainerCallback):
    """Marks a checkpoint as complete after all ranks have written their part."""

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir), state.global_step)


class PauseOnRequest(TrainerCallback):
    """Saves and stops, on all ranks at the same step, when asked.

    A signal to any of them asks, and so does a STOP file in the run folder. It is done after the
    next step whose checkpoint can be continued exactly: not amid the steps that share one
    generation. The signals, that of a closed terminal among them, are only noted, so that a save or
    a collective under way is not torn.

    Ctrl-C asks in the same way between the first step and the last save, the evaluations amid the
    steps included; the second one ends the run at once, and so does the first where nothing would
    be lost. To be entered around the training, which gives Ctrl-C back its meaning afterwards.

    Attributes:
        paused: whether it has.
        interrupted: whether Ctrl-C asked for it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, run_dir: Path):
        self.paused = self.interrupted = False
        self._run_dir = run_dir
        self._requested = self._in_steps = self._in_step = self._speaks = False
        self._before: Any = None
        self._on_terminal = [fd for fd in (1, 2) if os.isatty(fd)]
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
        self._requested = True
        if number == signal.SIGHUP:  # the terminal was closed: what is printed now goes nowhere
            for fd in self._on_terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    def _interrupt(self, *_: Any) -> None:
        if not self._in_steps:
            raise KeyboardInterrupt
        if self.interrupted:
            saved = last_complete_checkpoint(self._run_dir)
            kept = f"{saved.name} is kept" if saved else "nothing was saved yet"
            raise KeyboardInterrupt(f"stopped; {kept}")
        self.interrupted = self._requested = True
        if self._speaks:
            # From a thread of its own: what the signal came into may be writing to the terminal.
            what = SAVING.format("this" if self._in_step else "the next")
            Thread(target=print, args=(what,), kwargs={"file": sys.stderr, "flush": True}).start()

    def on_step_begin(self, args, state, control, **kwargs):
        self._in_steps = self._in_step = True
        self._speaks = state.is_world_process_zero

    def on_step_end(self, args, state, control, **kwargs):
        self._in_step = False  # an evaluation may follow
        requested = self._requested or (
            state.is_world_process_zero and stop_requested(self._run_dir)
        )
        if torch.distributed.is_initialized():
            anywhere = torch.tensor(float(requested), device=args.device)
            torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
            requested = bool(anywhere.item())
        window = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        whole = window < 1 or state.global_step % window == 0
        if requested and whole and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.paused = True

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # all that is left to do can be done again
            self._in_steps = False
            if self.interrupted:
                raise KeyboardInterrupt(f"stopped after the last step, {state.global_step}")


class TrainClock(TrainerCallback, ExportableState):
    """Seconds spent in training, held-out evaluation excluded.

    Kept in the checkpoints, so that a resumed run counts on.
    """

    def __init__(self):
        self.train_seconds = 0.0
        self._since = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.train_seconds = saved.get("attributes", {}).get("train_seconds", 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.train_seconds += time.monotonic() - self._since

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"train_seconds": self.train_seconds}}
