import logging
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import TrainerControl, TrainerState, TrainingArguments

from mini_r1.callbacks import CheckpointMarker, HeldOutEvaluation, TensorBoard, TrainClock
from mini_r1.rollouts import Rollout
from mini_r1.run import COMPLETE_MARKER


@pytest.fixture
def stage(tmp_path):
    state = TrainerState(global_step=0, max_steps=4)
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, TrainerControl()


def test_held_out_evaluation_on_schedule(stage):
    names, logged = [], []

    def evaluate(name):
        names.append(name)
        return {"success": 0.5, "mean_completion_tokens": 30}

    callback = HeldOutEvaluation(2, evaluate, logged.append)
    callback.on_train_begin(*stage)
    for step in (1, 2, 3, 4):
        stage[1].global_step = step
        callback.on_step_end(*stage)
        callback.on_save(*stage)
    assert names == ["before", "step-000002", "after"]
    assert callback.result_after()["success"] == 0.5
    assert logged == [{"eval_success": 0.5, "eval_mean_completion_tokens": 30}] * 3
    callback.on_train_begin(*stage)  # resumed: `before` was measured by the first start
    assert len(names) == 3
    # After a kill between the last checkpoint and its evaluation.
    resumed = HeldOutEvaluation(2, evaluate, logged.append)
    assert resumed.result_after()["success"] == 0.5
    assert (names[3:], len(logged)) == (["after"], 4)


def test_a_complete_checkpoint_is_marked(stage, tmp_path):
    stage[1].global_step = 2
    (tmp_path / "checkpoint-2").mkdir()
    CheckpointMarker().on_save(*stage)
    assert (tmp_path / "checkpoint-2" / COMPLETE_MARKER).exists()


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
        recorder.latest = Rollout(state.global_step, (1, 2), 3, rewards, "1+2\n</think>")
        board.on_log(args, state, None, logs={"reward": 1.0})
    board.on_train_end(args, state, None)
    assert len(list(tmp_path.glob("events*"))) == 1  # TensorBoard never returns to an earlier file
    events = EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/success")] == [(0, 0.25)]
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == list(range(1, 101, 5))
    text = texts[0].tensor_proto.string_val[0].decode()
    assert text == "make 3 from 1, 2: failed\n\n    1+2\n    </think>"

    def hparams(name):
        metadata = events.summary_metadata[f"_hparams_/{name}"]
        return HParamsPluginData.FromString(metadata.plugin_data.content)

    hyperparameters = hparams("session_start_info").session_start_info.hparams
    assert hyperparameters["beta"].number_value == 0.04
    assert hyperparameters["reward_funcs"].string_value == "['format', 'equation']"
    metrics = hparams("experiment").experiment.metric_infos
    assert [info.name.tag for info in metrics] == ["eval/success"]
