"""A run as it goes, on the terminal: how far it is, how good, and every few seconds a fresh sample.

Where the output is no terminal, or a dumb one, it is plain lines, twenty per run. All figures are
those that TensorBoard gets.
"""

import logging
import sys
import termios
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from statistics import fmean
from typing import Any

import rich
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from mini_r1 import quirks, visible
from mini_r1.callbacks import TrainClock
from mini_r1.completion import marked
from mini_r1.metrics import EVAL_SUCCESS, METRICS, PANEL
from mini_r1.rollouts import Rollout, RolloutRecorder

PLAIN_LINES = 20  # per run
SAMPLE_SECONDS = 8.0  # how long a sample stays at least: time to read it
SAMPLE_CHARS = 600  # of a longer one the end is shown, where the answer is
SPARKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 32
REFRESHES = 2  # of the panel, per second
LEGEND = "no signal: groups of equal rewards, which teach nothing"


class LiveView(TrainerCallback):
    """Shows the run of the main process: a panel on a terminal, else plain lines.

    To be entered around the training: whatever ends it, the panel stays whole and the cursor comes
    back.

    Args:
        name: of the run.
        clock: the seconds that training took so far; must be called before this callback.
        recorder: where the samples come from.
    """

    def __init__(self, name: str, clock: TrainClock, recorder: RolloutRecorder):
        self._name, self._clock, self._recorder = visible(name), clock, recorder
        self._live: Live | None = None
        self._redirected: list[tuple[logging.StreamHandler, Any]] = []
        self._sample: Rollout | None = None
        self._sample_since = 0.0
        self._started = time.monotonic()
        self._phase = "starting"
        self._micro_batches = 0  # of all steps so far
        self._sampled: Rollout | None = None  # the newest completion when sampling began

    def __enter__(self) -> "LiveView":
        return self

    def __exit__(self, *_: object) -> None:
        self._phase = "ended"
        if self._live is not None:
            self._live.stop()
            self._restore_terminal()
        for handler, stream in self._redirected:
            handler.setStream(stream)

    def on_train_begin(self, args, state, control, **kwargs):
        # An earlier attempt's seconds count as training, but say nothing about this one's pace.
        self._began = state.global_step, self._clock.train_seconds
        self._printed = state.global_step
        self._explained = False
        console = rich.get_console()
        if state.is_world_process_zero and console.is_interactive:
            streams = (sys.stdout, sys.stderr)
            self._restore_terminal = _quiet_ctrl_c(console)
            self._live = Live(
                get_renderable=lambda: self._panel(state, control),
                console=console,
                refresh_per_second=REFRESHES,
            )
            self._live.start()
            # What the libraries log goes where sys.stderr pointed before, into the panel; from
            # here on it comes above it.
            for handler in quirks.stream_handlers():
                if handler.stream in streams:
                    self._redirected.append((handler, handler.setStream(sys.stderr)))

    def on_step_begin(self, args, state, control, **kwargs):
        self._micro_batches = state.global_step * args.gradient_accumulation_steps
        self._begin_micro_batch(args)
        if self._live is not None:
            self._live.refresh()

    def on_substep_end(self, args, state, control, **kwargs):
        self._micro_batches += 1
        self._begin_micro_batch(args)

    def _begin_micro_batch(self, args: Any) -> None:
        samples = self._micro_batches % (args.steps_per_generation * args.num_iterations) == 0
        self._phase, self._sampled = "sampling" if samples else "learning", self._recorder.latest

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """What the run does meanwhile, as the panel says it."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._live is not None:
            self._live.refresh()
            return
        # Steps that share a batch of completions with an earlier one log no reward.
        apart = state.max_steps / PLAIN_LINES
        due = METRICS["reward"].key in (logs or {}) and state.global_step - self._printed >= apart
        if state.is_world_process_zero and due:
            self._printed = state.global_step
            step = f"step {state.global_step}/{state.max_steps}"
            if not self._explained:
                print(LEGEND)
                self._explained = True
            print(
                "  ".join([step, *figures(state.log_history), self._time_left(state)]), flush=True
            )

    def _panel(self, state: Any, control: Any) -> Panel:
        # How far it is.
        progress = Table.grid(padding=(0, 1), expand=True)
        progress.add_column(no_wrap=True)
        progress.add_column(ratio=1)
        progress.add_column(no_wrap=True)
        bar = ProgressBar(total=state.max_steps, completed=state.global_step)
        progress.add_row(f"step {state.global_step}/{state.max_steps}", bar, self._time_left(state))
        sampled = self._phase == "sampling" and self._recorder.latest is not self._sampled
        elapsed = timedelta(seconds=int(time.monotonic() - self._started))
        doing = "saving" if control.should_save else "learning" if sampled else self._phase
        phase = f"{doing}, {elapsed} elapsed"

        # How good it is.
        history = state.log_history
        logged = map(METRICS["success"].logged, history)
        training = sparkline([share for share in logged if share is not None])
        learned = [f"training success {training}" if training else ""]
        evaluated = [entry for entry in history if EVAL_SUCCESS in entry]
        for entry in evaluated[-1:]:
            learned.append(f"held-out success {entry[EVAL_SUCCESS]:.1%} at step {entry['step']}")
        lines: list[Any] = [progress, Text(phase), Text("   ".join(figures(history)))]
        lines.append(Text("   ".join(filter(None, learned))))

        # What it writes, for long enough to be read.
        latest, shown_for = self._recorder.latest, time.monotonic() - self._sample_since
        if latest is not self._sample and shown_for >= SAMPLE_SECONDS:
            self._sample, self._sample_since = latest, time.monotonic()
        if self._sample is not None:
            lines += ["", *_shown(self._sample)]
        return Panel(
            Group(*lines),
            title=Text(f"Mini-R1: {self._name}"),  # a text could hold markup
            title_align="left",
            subtitle=LEGEND,
            subtitle_align="left",
            # Behind a full line what a key echoes would begin another one.
            width=rich.get_console().width - 1,
        )

    def _time_left(self, state: Any) -> str:
        first_step, seconds_before = self._began
        steps = state.global_step - first_step
        if steps == 0:
            return "measuring"
        pace = (self._clock.train_seconds - seconds_before) / steps
        left = pace * (state.max_steps - state.global_step)
        return f"{left / 60:.1f} minutes left" if left < 6000 else f"{left / 3600:.1f} hours left"


def _quiet_ctrl_c(console: Console) -> Callable[[], None]:
    """Keep Ctrl-C from tearing the panel; returns what gives the terminal back as it was.

    It would write ^C into it, and throw away what is on its way to the screen.
    """
    try:
        terminal = console.file.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, termios.error):  # none of the system's
        return lambda: None
    quiet = [*before]
    quiet[3] = before[3] & ~termios.ECHOCTL | termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)

    def restore() -> None:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(terminal, termios.TCSANOW, before)

    return restore


def figures(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The newest value of each figure that was logged: `success 78%`."""
    shown = []
    for name in PANEL:
        metric = METRICS[name]
        logged = [value for value in map(metric.logged, history) if value is not None]
        if logged:
            shown.append(f"{name.replace('_', ' ')} {metric.shown.format(logged[-1])}")
    return shown


def sparkline(shares: Sequence[float]) -> str:
    """Shares (0 to 1) as a line of little bars, means of neighbours where there are many."""
    size = max(1, -(-len(shares) // SPARKLINE_WIDTH))
    means = [fmean(shares[start : start + size]) for start in range(0, len(shares), size)]
    return "".join(SPARKS[min(int(mean * len(SPARKS)), len(SPARKS) - 1)] for mean in means)


def _shown(sample: Rollout) -> list[Text]:
    """A sample's puzzle with the verdict, and its text with the arithmetic marked."""
    title = Text(f"step {sample.step}: {sample.question}  ", style="bold")
    title.append(sample.verdict, style="green" if sample.solved else "red")
    text = Text()
    for part, true in marked(sample.text.strip()):
        text.append(visible(part), style={True: "green", False: "red underline", None: ""}[true])
    return [title, Text("… ") + text[-SAMPLE_CHARS:] if len(text) > SAMPLE_CHARS else text]
