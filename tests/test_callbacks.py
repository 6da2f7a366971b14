import logging
import os
import signal
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import TrainerControl, TrainerState, TrainingArguments

from mini_r1.callbacks import (
    CheckpointMarker,
    HeldOutEvaluation,
    LastEvaluation,
    NoStepTooMany,
    NothingLeft,
    PauseOnRequest,
    StopRequested,
    TensorBoard,
    TrainClock,
)
from mini_r1.rollouts import Rollout
from mini_r1.run import last_complete_checkpoint, mark_begun, mark_complete, request_stop
from tests.hostile import TEXTS, is_inert


@pytest.fixture
def stage(tmp_path):
    state = TrainerState(global_step=0, max_steps=4)
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, TrainerControl()


RESULT = {"success": 0.5, "mean_completion_tokens": 30}
LOGGED = {"eval_success": 0.5, "eval_mean_completion_tokens": 30}


def test_held_out_evaluation_on_schedule(stage):
    happened = []

    def evaluate(name):
        happened.append(name)
        return RESULT

    callback = HeldOutEvaluation(2, evaluate, happened.append)
    callback.on_train_begin(*stage)
    for step in (1, 2, 3, 4):
        callback.on_step_begin(*stage)
        stage[1].global_step = step
        callback.on_step_end(*stage)
        happened.append(f"line and checkpoint of {step}")
    steps = [f"line and checkpoint of {step}" for step in (1, 2, 3, 4)]
    assert happened == ["before", LOGGED, steps[0], "step-000002", steps[1], LOGGED, *steps[2:]]


@pytest.mark.parametrize(
    ("step", "again"), [(0, ["before"]), (1, []), (2, ["step-000002"]), (4, [])]
)
def test_what_follows_the_checkpoint_that_a_run_goes_on_from_is_evaluated_again(stage, step, again):
    names, logged = [], []
    stage[1].global_step = step
    callback = HeldOutEvaluation(2, lambda name: names.append(name) or RESULT, logged.append)
    callback.on_train_begin(*stage)
    callback.on_step_begin(*stage)
    assert (names, logged) == (again, [LOGGED] * len(again))


def test_a_stop_within_an_evaluation_leaves_the_step_to_be_saved(stage):
    def evaluate(name):
        raise StopRequested

    logged = []
    callback = HeldOutEvaluation(2, evaluate, logged.append)
    stage[1].global_step = 2
    callback.on_step_end(*stage)
    assert logged == []
    with pytest.raises(StopRequested):
        callback.on_train_begin(*stage)  # what a checkpoint has is not saved once more


def test_the_last_evaluation_is_made_once(stage):
    names, logged = [], []
    last = LastEvaluation(lambda name: names.append(name) or RESULT, logged.append)
    for step in (2, 4):
        stage[1].global_step = step
        last.on_save(*stage)
    assert last.result() == RESULT
    assert (names, logged) == (["after"], [LOGGED])
    # After a kill between the last checkpoint and its evaluation.
    resumed = LastEvaluation(lambda name: names.append(name) or RESULT, logged.append)
    assert resumed.result() == RESULT
    assert (names, logged) == (["after"] * 2, [LOGGED] * 2)


@pytest.mark.parametrize(("step", "left"), [(0, True), (3, True), (4, False), (5, False)])
def test_no_step_is_taken_beyond_the_last(stage, step, left):
    stage[1].global_step = step
    with nullcontext() if left else pytest.raises(NothingLeft):
        NoStepTooMany().on_train_begin(*stage)


def test_a_checkpoint_is_marked_from_its_first_file_to_its_last(stage, tmp_path):
    marker, (_, state, control) = CheckpointMarker(limit=1), stage
    for step in (2, 4):
        state.global_step, control.should_log, control.should_save = step, False, True
        marker.on_step_end(*stage)
        assert control.should_log  # what is summed up for the next line would be lost
        assert [path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()] == ["begun"]
        marker.on_save(*stage)
        # The one before goes only then.
        assert last_complete_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step}"
        assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{step}"]
    control.should_save = False
    state.global_step = 5
    marker.on_step_end(*stage)
    assert not (tmp_path / "checkpoint-5").exists()


# ---- Pausing --------------------------------------------------------------------------------


@pytest.fixture
def run(stage, tmp_path):
    """A run of 8 steps, two to a generation: call it with a step, or with a hook and a step."""
    before = {number: signal.getsignal(number) for number in range(1, signal.NSIG)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = SimpleNamespace(
        steps_per_generation=4, num_iterations=1, gradient_accumulation_steps=2, device="cpu"
    )
    state, control = TrainerState(global_step=0, max_steps=8), TrainerControl()
    with PauseOnRequest(tmp_path) as pause:

        def call(hook, step):
            state.global_step = step
            getattr(pause, hook)(args, state, control)
            return control.should_save and control.should_training_stop

        def stops(step):
            state.global_step = step
            return pause.stops(args, state)

        yield SimpleNamespace(pause=pause, call=call, stops=stops, folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    for number, handler in before.items():
        if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, handler)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    for thread in set(threading.enumerate()) - {threading.current_thread()}:
        thread.join(1) if thread.name.endswith("(print)") else None


def test_the_first_ctrl_c_saves_after_the_next_step_that_can_be_continued(run, capsys):
    run.call("on_step_begin", 0)
    ctrl_c()
    assert capsys.readouterr().err == "saving after this step; Ctrl-C again to stop now\n"
    assert not run.call("on_step_end", 1)  # amid a generation
    assert run.call("on_step_end", 2)
    assert (run.pause.paused, run.pause.signal) == (True, signal.SIGINT)


def test_the_second_ctrl_c_ends_it_and_says_what_is_left(run):
    run.call("on_step_begin", 0)
    ctrl_c()
    with pytest.raises(KeyboardInterrupt, match=r"^stopped; nothing was saved yet$"):
        ctrl_c()
    mark_begun(run.folder, 2)
    mark_complete(run.folder, 2)
    mark_begun(run.folder, 4)  # torn
    with pytest.raises(KeyboardInterrupt, match=r"^stopped; checkpoint-2 is kept$"):
        ctrl_c()


def test_ctrl_c_between_two_steps_loses_nothing_either(run, capsys):
    run.call("on_step_begin", 1)
    run.call("on_optimizer_step", 1)
    ctrl_c()  # in an evaluation
    said = "saving after this batch of the evaluation; Ctrl-C again to stop now\n"
    assert capsys.readouterr().err == said
    assert run.stops(2)
    assert run.call("on_step_end", 2)


@pytest.mark.parametrize(("step", "stops"), [(0, True), (1, False), (2, True), (8, True)])
def test_an_evaluation_ends_early_where_the_run_can_be_continued(run, step, stops):
    assert not run.stops(step)
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.stops(step) == run.pause.paused == stops


def test_where_nothing_can_be_lost_ctrl_c_ends_it_at_once(run):
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        ctrl_c()  # before the first step
    run.call("on_step_begin", 7)
    run.call("on_step_end", 8)
    run.call("on_save", 8)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        ctrl_c()  # in the last evaluation
    assert not run.pause.paused


def test_ctrl_c_in_the_last_step_waits_for_its_checkpoint(run):
    run.call("on_step_begin", 7)
    ctrl_c()
    assert not run.call("on_step_end", 8)  # it is saved anyway
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after the last step, 8$"):
        run.call("on_save", 8)


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGTERM, 15), (signal.SIGUSR1, 0), (signal.SIGHUP, 1), (None, 0)]
)
def test_others_ask_for_the_same_and_are_no_ctrl_c(run, number, reason):
    os.kill(os.getpid(), number) if number else request_stop(run.folder)
    assert run.call("on_step_end", 2)
    assert (run.pause.paused, run.pause.signal) == (True, reason)


def test_what_a_background_job_ignores_stays_ignored(tmp_path):
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in (*numbers, signal.SIGTERM)]
    try:
        with PauseOnRequest(tmp_path):
            assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in zip((*numbers, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


# ---- The clock, TensorBoard -----------------------------------------------------------------


def test_the_clock_counts_on_after_a_resume(stage):
    clock = TrainClock()
    clock.on_train_begin(*stage)
    clock.on_step_begin(*stage)
    clock.on_step_end(*stage)
    assert clock.train_seconds > 0
    saved = {"args": {}, "attributes": {"train_seconds": 100.0}}
    stage[1].stateful_callbacks = {"TrainClock": saved}
    resumed = TrainClock()
    resumed.on_train_begin(*stage)
    assert resumed.train_seconds == 100.0
    assert resumed.state()["attributes"] == {"train_seconds": 100.0}


def test_a_mean_of_nothing_is_not_for_tensorboard(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    board = TensorBoard({}, SimpleNamespace(latest=None))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=1, max_steps=100)
    board.on_train_begin(args, state, None)
    board.on_log(args, state, None, logs={"reward": 1.0, "rewards/bonus/mean": None})
    board.on_train_end(args, state, None)
    assert caplog.messages == []
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("train/reward")] == [1.0]


def test_no_text_acts_in_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    recorder = SimpleNamespace(latest=None)
    board = TensorBoard({"columns": "\ud800\x1b[2J"}, recorder)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=0, max_steps=1)
    board.on_train_begin(args, state, None)
    board.on_log(args, state, None, logs={"eval_success": 0.25})
    for state.global_step, text in enumerate(TEXTS, 1):
        recorder.latest = Rollout(state.global_step, {"question": text}, {}, text, None)
        board.on_log(args, state, None, logs={"reward": 1.0})
    board.on_train_end(args, state, None)
    events = EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    shown = [each.tensor_proto.string_val[0] for each in events.Tensors("samples/text_summary")]
    assert len(shown) == len(TEXTS)
    for text in map(bytes.decode, shown):
        assert is_inert(text)
        assert all(line.startswith("    ") for line in text.split("\n"))  # Markdown's code


def test_tensorboard_gets_scalars_the_recipe_and_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    recorder = SimpleNamespace(latest=None)
    recipe = {"model_name_or_path": "tiny_base", "beta": 0.04}
    board = TensorBoard({**recipe, "reward_funcs": ["format", "equation"]}, recorder)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=0, max_steps=100)
    board.on_train_begin(args, state, None)
    board.on_log(args, state, None, logs={"eval_success": 0.25})
    for state.global_step in range(1, 101):
        rewards = {"equation_reward": 0.0}
        recorder.latest = Rollout(
            state.global_step, {"nums": [1, 2], "target": 3}, rewards, "1+2\n</think>"
        )
        board.on_log(args, state, None, logs={"reward": 1.0})
    board.on_train_end(args, state, None)
    assert len(list(tmp_path.glob("events*"))) == 1  # TensorBoard never returns to an earlier file
    events = EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/success")] == [(0, 0.25)]
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == list(range(1, 101, 5))
    text = texts[0].tensor_proto.string_val[0].decode()
    assert text == "    make 3 from 1, 2: failed\n    \n    1+2\n    </think>"

    def hparams(name):
        metadata = events.summary_metadata[f"_hparams_/{name}"]
        return HParamsPluginData.FromString(metadata.plugin_data.content)

    hyperparameters = hparams("session_start_info").session_start_info.hparams
    assert hyperparameters["beta"].number_value == 0.04
    assert hyperparameters["reward_funcs"].string_value == "['format', 'equation']"
    metrics = hparams("experiment").experiment.metric_infos
    assert [info.name.tag for info in metrics] == ["eval/success"]
