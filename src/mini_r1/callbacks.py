"""What happens beside the training loop: samples, the progress bar, scheduled evaluation, checkpoint markers, pausing, the clock.

Everything here uses the public hooks of TRL and transformers: reward functions, `log_metric` and `TrainerCallback`.
"""

import functools
import inspect
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mini_r1.behaviors import behavior, summarize_behaviors
from mini_r1.countdown.puzzles import uniform_hash
from mini_r1.model import COMPLETE_MARKER, STOP_FILE
from mini_r1.rewards import RewardFunction, completion_text

# The share of completions that `samples/` keeps: the original's.
SAMPLE_SHARE = 0.1


class RolloutRecorder:
    """Logs how the model behaves, and writes one in ten completions and one in ten solved ones to the original's two files.

    It watches the reward functions, so it sees exactly what was judged. Behaviours are logged over the completions of all ranks;
    rank 0 writes its own. Which completions are kept depends on step and position alone, and a resumed run first drops the entries
    after its checkpoint: the files end up as if never interrupted.
    """

    FILES = ("completion_samples.txt", "success_completion_samples.txt")
    _ENTRY = re.compile(r"^==== step (\d+) ", re.MULTILINE)

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: list[str] = []
        self._scores: dict[str, list[float]] = {}

    def watch(self, functions: Sequence[RewardFunction]) -> list[RewardFunction]:
        """The same reward functions under the same names, observed."""
        self._names = [function.__name__ for function in functions]
        return [self._watched(function) for function in functions]

    def rewind(self, step: int) -> None:
        """Drop all entries of later steps than the one to resume from."""
        for name in self.FILES:
            path = self.folder / name
            if path.exists():
                text = path.read_text(encoding="utf-8")
                later = next((match.start() for match in self._ENTRY.finditer(text) if int(match[1]) > step), len(text))
                path.write_text(text[:later], encoding="utf-8")

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
                self._write(columns)
            self._scores = {}
        return scores

    @staticmethod
    def _log_behaviors(columns: dict[str, Any]) -> None:
        texts = map(completion_text, columns["completions"])
        seen = [behavior(*each) for each in zip(texts, columns["target"], columns["nums"], strict=True)]
        for name, value in summarize_behaviors(seen).items():
            if value is not None:
                columns["log_metric"](f"behaviors/{name}", value)

    def _write(self, columns: dict[str, Any]) -> None:
        step = columns["trainer_state"].global_step + 1
        entries: dict[str, list[str]] = {name: [] for name in self.FILES}
        for index, completion in enumerate(columns["completions"]):
            rewards = {name: self._scores[name][index] for name in self._names}
            entry = self._entry(step, columns["nums"][index], columns["target"][index], rewards, completion)
            if uniform_hash("sample", step, index) < SAMPLE_SHARE * 2**64:
                entries[self.FILES[0]].append(entry)
            if rewards.get("equation_reward") == 1.0 and uniform_hash("success", step, index) < SAMPLE_SHARE * 2**64:
                entries[self.FILES[1]].append(entry)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, chosen in entries.items():
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write("".join(chosen))

    @staticmethod
    def _entry(step: int, nums: Sequence[int], target: int, rewards: dict[str, float], completion: Any) -> str:
        # A completion cannot forge an entry: a line of its own that looks like a header is indented.
        text = completion_text(completion).replace("\n==== step ", "\n ==== step ")
        return f"==== step {step} nums {json.dumps(list(nums))} target {target} rewards {json.dumps(rewards)}\n<think>{text}\n\n"


class Progress(TrainerCallback):
    """A progress bar with live reward, success and length; plain lines, twenty per run, when the output is no terminal."""

    _bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._every, self._printed = state.max_steps / 20, state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        # Steps that share a batch of completions with an earlier one log no reward.
        if not state.is_world_process_zero or "reward" not in (logs or {}):
            return
        shown = {
            "reward": logs["reward"],
            "success": logs.get("rewards/equation_reward/mean"),
            "tokens": logs["completions/mean_length"],
        }
        texts = {name: f"{value:.0f}" if name == "tokens" else f"{value:.2f}" for name, value in shown.items() if value is not None}
        if self._bar is not None:
            self._bar.set_postfix(texts)
        elif state.global_step - self._printed >= self._every:
            self._printed = state.global_step
            facts = "  ".join(f"{name} {text}" for name, text in texts.items())
            print(f"step {state.global_step}/{state.max_steps}  {facts}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()


class HeldOutEvaluation(TrainerCallback):
    """Evaluates on the held-out puzzles before the first step and every `every` steps, and logs success and length.

    Not done before `trainer.train()`: only there the model is wrapped, so that the ranks of ZeRO-3 can gather its weights.
    """

    def __init__(self, every: int | None, evaluate: Callable[[str], dict[str, Any]], log: Callable[[dict[str, float]], None]):
        self._every, self._evaluate, self._log = every, evaluate, log

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._run("before")

    def on_step_end(self, args, state, control, **kwargs):
        if self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._run(f"step-{state.global_step:06d}")

    def _run(self, name: str) -> None:
        result = self._evaluate(name)
        self._log({"eval_success": result["success"], "eval_mean_completion_tokens": result["mean_completion_tokens"]})


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
