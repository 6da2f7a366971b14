import asyncio
import inspect
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import TrainerControl, TrainerState, TrainingArguments

from mini_r1.callbacks import CheckpointMarker, HeldOutEvaluation, RolloutRecorder, TensorBoard, TrainClock
from mini_r1.model import COMPLETE_MARKER
from mini_r1.rewards import equation_reward, format_reward
from mini_r1.samples import ALL_FILE, SOLVED_FILE, Sample, read_samples, rewind_samples

COMPLETIONS = ["</think>\n<answer>1+2</answer>", "</think>\n<answer>2-1</answer>"] * 100


def feed(writer, step, functions=(format_reward, equation_reward), main=True, log_metric=lambda name, value: None):
    for function in writer.watch(functions):
        scores = function(
            completions=COMPLETIONS,
            target=[3] * 200,
            nums=[[1, 2]] * 200,
            trainer_state=SimpleNamespace(global_step=step - 1, is_world_process_zero=main),
            log_metric=log_metric,
        )
        assert len(scores) == 200


def test_samples_carry_step_puzzle_and_rewards(tmp_path):
    recorder = RolloutRecorder(tmp_path)
    feed(recorder, 7)
    everything, solved = (read_samples(tmp_path / name) for name in (ALL_FILE, SOLVED_FILE))
    assert 8 <= len(everything) <= 35  # a tenth of 200
    assert 3 <= len(solved) <= 20  # a tenth of the 100 solved ones
    rewards = {"format_reward": 1.0, "equation_reward": 1.0}
    assert set(map(repr, solved)) == {repr(Sample(7, (1, 2), 3, rewards, COMPLETIONS[0]))}
    assert recorder.latest == Sample(7, (1, 2), 3, rewards, COMPLETIONS[0])


def test_only_rank_zero_writes_and_every_rank_logs_behaviors_once(tmp_path):
    logged = []
    feed(RolloutRecorder(tmp_path), 1, main=False, log_metric=lambda *metric: logged.append(metric))
    assert list(tmp_path.iterdir()) == []
    assert logged == [("behaviors/tries", 0.0), ("behaviors/verified", 0.0), ("behaviors/gave_up", 1.0)]  # no claims at all


def test_a_resumed_run_ends_with_the_same_files(tmp_path):
    straight, resumed = RolloutRecorder(tmp_path / "straight"), RolloutRecorder(tmp_path / "resumed")
    for step in (1, 2, 3, 4):
        feed(straight, step)
    for step in (1, 2, 3):
        feed(resumed, step)
    rewind_samples(resumed.folder, 2)
    for step in (3, 4):
        feed(resumed, step)
    for name in (ALL_FILE, SOLVED_FILE):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_watched_rewards_keep_name_kind_and_result(tmp_path):
    async def slow_reward(completions, **columns):
        return [0.25] * len(completions)

    watched_format, watched_slow = RolloutRecorder(tmp_path).watch([format_reward, slow_reward])
    assert (watched_format.__name__, watched_slow.__name__) == ("format_reward", "slow_reward")
    assert inspect.iscoroutinefunction(watched_slow)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    columns = {"nums": [[1, 2]], "target": [3], "trainer_state": state, "log_metric": lambda name, value: None}
    assert asyncio.run(watched_slow(completions=["a"], **columns)) == [0.25]
    assert watched_format(completions=["a"], **columns) == [0.0]


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
    resumed = HeldOutEvaluation(2, evaluate, logged.append)  # after a kill between the last checkpoint and its evaluation
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
    stage[1].stateful_callbacks = {"TrainClock": {"args": {}, "attributes": {"train_seconds": 100.0}}}
    resumed = TrainClock()
    resumed.on_train_begin(*stage)
    assert resumed.train_seconds == 100.0
    assert resumed.state()["attributes"] == {"train_seconds": 100.0}


def test_tensorboard_gets_scalars_the_recipe_and_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    recorder = SimpleNamespace(latest=None)
    board = TensorBoard({"model_name_or_path": "tiny_base", "beta": 0.04, "reward_funcs": ["format", "equation"]}, recorder)
    args, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(global_step=0, max_steps=100)
    board.on_train_begin(args, state, None)
    board.on_log(args, state, None, logs={"eval_success": 0.25})
    for state.global_step in range(1, 101):
        recorder.latest = Sample(state.global_step, (1, 2), 3, {"equation_reward": 0.0}, "1+2\n</think>")
        board.on_log(args, state, None, logs={"reward": 1.0})
    board.on_train_end(args, state, None)
    assert len(list(tmp_path.glob("events*"))) == 1  # TensorBoard never returns to an earlier file
    events = EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/success")] == [(0, 0.25)]
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == list(range(1, 101, 5))
    assert texts[0].tensor_proto.string_val[0].decode() == "make 3 from 1, 2: failed\n\n    1+2\n    </think>"
    start = HParamsPluginData.FromString(events.summary_metadata["_hparams_/session_start_info"].plugin_data.content)
    hyperparameters = start.session_start_info.hparams
    assert hyperparameters["beta"].number_value == 0.04
    assert hyperparameters["reward_funcs"].string_value == "['format', 'equation']"
    experiment = HParamsPluginData.FromString(events.summary_metadata["_hparams_/experiment"].plugin_data.content)
    assert [info.name.tag for info in experiment.experiment.metric_infos] == ["eval/success"]
