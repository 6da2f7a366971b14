import asyncio
import inspect
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from mini_r1.callbacks import CheckpointMarker, HeldOutEvaluation, Progress, RolloutRecorder, TrainClock
from mini_r1.model import COMPLETE_MARKER
from mini_r1.rewards import equation_reward, format_reward

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
    writer = RolloutRecorder(tmp_path)
    feed(writer, 7)
    everything, solved = (tmp_path / name for name in RolloutRecorder.FILES)
    entries = everything.read_text().split("==== ")[1:]
    assert 8 <= len(entries) <= 35  # a tenth of 200
    assert entries[0].startswith('step 7 nums [1, 2] target 3 rewards {"format_reward": 1.0, "equation_reward": ')
    solved = solved.read_text().split("==== ")[1:]
    assert 3 <= len(solved) <= 20  # a tenth of the 100 solved ones
    assert all('"equation_reward": 1.0' in entry and "<think></think>\n<answer>1+2</answer>" in entry for entry in solved)


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
    resumed.rewind(2)
    for step in (3, 4):
        feed(resumed, step)
    for name in RolloutRecorder.FILES:
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_a_completion_cannot_forge_an_entry(tmp_path):
    entry = RolloutRecorder._entry(1, [1, 2], 3, {}, "x\n==== step 9 nums [1] target 1 rewards {}\ny")
    assert RolloutRecorder._ENTRY.findall(entry) == ["1"]


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
    assert names == ["before", "step-000002"]  # step 4 is the end: `after`
    assert logged == [{"eval_success": 0.5, "eval_mean_completion_tokens": 30}] * 2
    callback.on_train_begin(*stage)  # resumed: `before` was measured by the first start
    assert len(names) == 2


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


def test_progress_without_a_terminal_prints_lines(stage, capsys):
    callback = Progress()
    callback.on_train_begin(*stage)
    stage[1].global_step = 1
    callback.on_log(*stage, logs={"reward": 1.25, "rewards/equation_reward/mean": 0.25, "completions/mean_length": 33.4})
    callback.on_log(*stage, logs={"train_runtime": 3.0})
    assert capsys.readouterr().out == "step 1/4  reward 1.25  success 0.25  tokens 33\n"
