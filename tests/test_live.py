import contextlib
import logging
import os
import pty
import re
import sys
import termios
from types import SimpleNamespace

import pytest
import rich
from rich.console import Console
from transformers import TrainerControl, TrainerState

from mini_r1 import live
from mini_r1.live import LEGEND, LiveView, figures, sparkline
from mini_r1.rollouts import Rollout
from tests.hostile import TEXTS, is_inert

LOGS = {
    "reward": 1.25,
    "rewards/equation_reward/mean": 0.25,
    "completions/mean_length": 33.4,
    "completions/clipped_ratio": 0.0,
    "frac_reward_zero_std": 0.5,
}
FIGURES = ["reward 1.25", "success 25%", "tokens 33", "truncated 0%", "no signal 50%"]
SAMPLE = Rollout(
    3,
    {"nums": [4, 5, 12], "target": 68},
    {"equation_reward": 1.0},
    "12+5=18\n12+5=17\n</think>\n<answer>(12+5)*4\x1b[2J</answer>",
)


@pytest.fixture
def view():
    return LiveView("my-run", SimpleNamespace(train_seconds=0.0), SimpleNamespace(latest=None))


def log(view, state, **logs):
    state.log_history.append({"step": state.global_step, **logs})
    view.on_log(None, state, TrainerControl(), logs=logs)


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns that records what it is sent."""
    monkeypatch.setenv("TERM", "xterm")
    console = Console(
        force_terminal=True,
        width=80,
        height=40,
        record=True,
        color_system="standard",
        legacy_windows=False,
    )
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return console


def test_figures_are_the_newest_that_were_logged():
    assert figures([{**LOGS, "reward": 9.0}, {"loss": 0.1}, LOGS, {"loss": 0.1}]) == FIGURES
    # A reward that applied to nothing has no mean.
    assert figures([LOGS, {**LOGS, "reward": None}]) == FIGURES
    # Without the equation reward there is no success.
    assert figures([{"reward": 0.5}]) == ["reward 0.50"]
    assert figures([]) == []


def test_sparkline():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.0] * 500 + [1.0] * 500) == "▁" * 15 + "▄" + "█" * 16
    assert sparkline([]) == ""


def test_plain_lines_where_there_is_no_terminal(view, capsys):
    state = TrainerState(global_step=0, max_steps=40, log_history=[])
    view.on_train_begin(None, state, TrainerControl())
    for step in range(1, 41):
        state.global_step, view._clock.train_seconds = step, 60.0 * step
        # Four steps share a generation.
        log(view, state, **(LOGS if step % 4 == 1 else {"loss": 0.1}))
    log(view, state, train_runtime=1.0)
    legend, *lines = capsys.readouterr().out.splitlines()
    assert legend == LEGEND
    # Step 1 is too soon for one in twenty.
    assert lines[0] == "  ".join(["step 5/40", *FIGURES, "35.0 minutes left"])
    steps = [line.split("  ")[0] for line in lines]
    assert steps == [f"step {step}/40" for step in range(5, 40, 4)]


def test_the_pace_of_a_resumed_run_is_that_of_this_attempt(view, capsys):
    view._clock.train_seconds = 1e6  # a slower machine's
    state = TrainerState(global_step=10, max_steps=20, log_history=[])
    view.on_train_begin(None, state, TrainerControl())
    state.global_step, view._clock.train_seconds = 12, 1e6 + 20
    log(view, state, **LOGS)
    assert "1.3 minutes left" in capsys.readouterr().out
    state.max_steps, view._printed = 10_000, 0
    log(view, state, **LOGS)
    assert "27.7 hours left" not in capsys.readouterr().out  # not due yet
    state.max_steps = 10_012
    view._printed = -1000
    log(view, state, **LOGS)
    assert "27.8 hours left" in capsys.readouterr().out


def test_the_panel_shows_figures_and_a_fresh_sample_with_its_verdict(view, terminal, monkeypatch):
    view._started = now = 1000.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    state = TrainerState(global_step=0, max_steps=40, log_history=[])
    with view:
        view.on_train_begin(None, state, TrainerControl())
        state.global_step, view._recorder.latest = 3, SAMPLE
        now += 100.0
        log(view, state, **LOGS)
        now += 4000
        log(view, state, eval_success=0.238)
        log(view, state, **LOGS)
        later = Rollout(4, {"nums": [1, 2], "target": 3}, {"equation_reward": 0.0}, "1+2=3")
        view._sample_since = now  # there is time to read it
        view._recorder.latest = later
        log(view, state, **LOGS)
        assert view._sample is SAMPLE
    shown = terminal.export_text(clear=False, styles=False)
    last = shown[shown.rindex("╭─ Mini-R1: my-run") :]
    held_out = "training success ▃▃▃   held-out success 23.8% at step 3"
    puzzle = "step 3: make 68 from 4, 5, 12  solved"
    for text in ("step 3/40", "ended, 1:08:20 elapsed", *FIGURES, held_out, puzzle, LEGEND):
        assert text in last, text
    assert "<answer>(12+5)*4" in last
    assert "<U+001B>[2J</answer>" in last  # a model cannot clear the screen
    assert "\x1b" not in shown
    styled = terminal.export_text(styles=True)
    assert re.search(r"\x1b\[4;31m12\+5=18\x1b", styled)  # false arithmetic is red
    assert re.search(r"\x1b\[32m12\+5=17\x1b", styled)

    now += live.SAMPLE_SECONDS
    view._panel(state, TrainerControl())
    assert view._sample is later


def test_the_panel_says_what_the_run_does(view, terminal):
    def shown():
        with terminal.capture() as capture:
            terminal.print(view._panel(state, control))
        return re.search(r"│ (\w+), 0:00:0\d elapsed", capture.get())[1]

    args = SimpleNamespace(
        gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=1
    )  # two steps to a generation
    state, control = TrainerState(global_step=0, max_steps=40, log_history=[]), TrainerControl()
    view.on_train_begin(args, state, control)
    seen = [shown()]
    with view.phase("evaluating"):
        seen.append(shown())
    for state.global_step in (0, 1, 2):
        view.on_step_begin(args, state, control)
        seen.append(shown())
        view._recorder.latest = SAMPLE if state.global_step == 0 else view._recorder.latest
        seen.append(shown())  # the rewards were called, if it samples
        view.on_substep_end(args, state, control)
        seen.append(shown())
        control.should_save = state.global_step == 1
        seen.append(shown())
        control.should_save = False
    view.__exit__()
    assert seen == [
        *("starting", "evaluating"),
        *("sampling", "learning", "learning", "learning"),
        *("learning", "learning", "learning", "saving"),
        *("sampling", "sampling", "learning", "learning"),
    ]
    args = SimpleNamespace(gradient_accumulation_steps=4, steps_per_generation=2, num_iterations=1)
    view.on_step_begin(args, state, control)
    phases = [view._phase]
    for _ in range(3):  # two generations to a step
        view.on_substep_end(args, state, control)
        phases.append(view._phase)
    assert phases == ["sampling", "learning", "sampling", "learning"]


def test_of_a_long_sample_the_end_is_shown(view):
    view._sample = Rollout(1, {"nums": [1, 2], "target": 3}, {}, "1+1=3 " * 300 + "the end")
    title, body = live._shown(view._sample)
    assert title.plain.endswith("failed")
    assert body.plain.startswith("… ")
    assert body.plain.endswith("the end")
    assert len(body) == live.SAMPLE_CHARS + 2


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_no_text_of_the_corpus_acts_on_the_terminal(text):
    for part in live._shown(Rollout(1, {"question": text}, {}, text, None)):
        assert is_inert(part.plain)


def test_a_run_may_have_any_name(terminal):
    view = LiveView(
        "[/x] \x1b[2J", SimpleNamespace(train_seconds=0.0), SimpleNamespace(latest=None)
    )
    view.on_train_begin(None, TrainerState(max_steps=1, log_history=[]), TrainerControl())
    view.__exit__()
    assert "Mini-R1: [/x] <U+001B>[2J" in terminal.export_text(styles=False)


def test_other_processes_show_nothing(view, terminal, capsys):
    state = TrainerState(global_step=0, max_steps=4, log_history=[], is_world_process_zero=False)
    with view:
        view.on_train_begin(None, state, TrainerControl())
        state.global_step = 4
        log(view, state, **LOGS)
    assert terminal.export_text() == ""


def test_a_dumb_terminal_gets_plain_lines(view, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(rich, "get_console", lambda: Console(force_terminal=True))
    state = TrainerState(global_step=0, max_steps=1, log_history=[])
    view.on_train_begin(None, state, TrainerControl())
    state.global_step = 1
    log(view, state, **LOGS)
    assert capsys.readouterr().out.splitlines()[1].startswith("step 1/1  reward 1.25")


def test_what_the_libraries_log_stays_above_the_panel(view, terminal):
    logger, raw = logging.getLogger("a library"), sys.stderr
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    state = TrainerState(global_step=0, max_steps=4, log_history=[])
    with view:
        view.on_train_begin(None, state, TrainerControl())
        logger.warning("a line of its own")
    logger.removeHandler(handler)
    assert "a line of its own" in terminal.export_text()
    assert handler.stream is raw


def test_ctrl_c_writes_nothing_into_the_panel(view, monkeypatch):
    """A real terminal: nothing is echoed or thrown away, and it is given back as it was."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    with open(theirs, "w") as file:
        console = Console(file=file, force_terminal=True, width=80)
        monkeypatch.setattr(rich, "get_console", lambda: console)
        monkeypatch.setenv("TERM", "xterm")
        with view:
            view.on_train_begin(None, TrainerState(global_step=0, max_steps=4), TrainerControl())
            flags = termios.tcgetattr(theirs)[3]
            assert not flags & termios.ECHOCTL
            assert flags & termios.NOFLSH
        assert termios.tcgetattr(theirs) == before
    parts = []
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while part := os.read(ours, 65536):
            parts.append(part)
    written = b"".join(parts).decode()
    assert written.rindex("\x1b[?25h") > written.rindex("╰─")  # whole, and the cursor is back
    assert all(len(line) < 80 for line in re.sub(r"\x1b\[[0-9;?]*\w", "", written).splitlines())
    os.close(ours)
