import asyncio
import inspect
from types import SimpleNamespace

import pytest

from mini_r1.rewards import RewardFunction, format_reward, get_reward_functions
from mini_r1.rollouts import (
    ALL_FILE,
    SHARE,
    SOLVED_FILE,
    Rollout,
    RolloutRecorder,
    append_samples,
    read_samples,
    rewind_samples,
)

# ---- The recorder ---------------------------------------------------------------------------

COMPLETIONS = ["</think>\n<answer>1+2</answer>", "</think>\n<answer>2-1</answer>"] * 100


def feed(recorder, step, main=True, log_metric=lambda name, value: None):
    """What TRL hands to the reward functions in one step."""
    state = SimpleNamespace(global_step=step - 1, is_world_process_zero=main)
    for function in recorder.watch(get_reward_functions(["format", "equation"])):
        scores = function(
            completions=COMPLETIONS,
            target=[3] * 200,
            nums=[[1, 2]] * 200,
            trainer_state=state,
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
    assert set(map(repr, solved)) == {repr(Rollout(7, (1, 2), 3, rewards, COMPLETIONS[0]))}
    assert recorder.latest == Rollout(7, (1, 2), 3, rewards, COMPLETIONS[0])


def test_only_rank_zero_writes_and_every_rank_logs_behaviors_once(tmp_path):
    logged = []
    feed(RolloutRecorder(tmp_path), 1, main=False, log_metric=lambda *metric: logged.append(metric))
    assert list(tmp_path.iterdir()) == []
    # No claims at all: no true_arithmetic.
    expected = {"behaviors/tries": 0.0, "behaviors/verified": 0.0, "behaviors/gave_up": 1.0}
    assert logged == list(expected.items())


def test_a_resumed_run_ends_with_the_same_files(tmp_path):
    straight, resumed = (RolloutRecorder(tmp_path / name) for name in ("straight", "resumed"))
    for step in (1, 2, 3, 4):
        feed(straight, step)
    for step in (1, 2, 3):
        feed(resumed, step)
    rewind_samples(resumed.folder, 2)
    for step in (3, 4):
        feed(resumed, step)
    for name in (ALL_FILE, SOLVED_FILE):
        assert (straight.folder / name).read_bytes() == (resumed.folder / name).read_bytes()


def test_watched_rewards_keep_name_kind_and_result(tmp_path):
    async def slow_reward(completions, **columns):
        return [0.25] * len(completions)

    functions = (format_reward, slow_reward)
    rewards = [RewardFunction(each.__name__, each.__name__, (), each) for each in functions]
    watched_format, watched_slow = RolloutRecorder(tmp_path).watch(rewards)
    assert (watched_format.__name__, watched_slow.__name__) == ("format_reward", "slow_reward")
    assert inspect.iscoroutinefunction(watched_slow)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    columns = {"completions": ["a"], "nums": [[1, 2]], "target": [3], "trainer_state": state}
    columns["log_metric"] = lambda name, value: None
    assert asyncio.run(watched_slow(**columns)) == [0.25]
    assert watched_format(**columns) == [0.0]


# ---- The files ------------------------------------------------------------------------------


def samples(step, count=200, text="1+1=2\n</think>\n<answer>1+1</answer>"):
    return [
        Rollout(step, (1, 1), 2, {"format_reward": 1.0, "equation_reward": float(i % 2)}, text)
        for i in range(count)
    ]


def test_one_in_ten_is_kept_and_reads_back_as_it_was(tmp_path):
    append_samples(tmp_path, samples(7))
    append_samples(tmp_path, samples(8))
    everything, solved = (read_samples(tmp_path / name) for name in (ALL_FILE, SOLVED_FILE))
    assert 0.5 * SHARE * 400 < len(everything) < 1.5 * SHARE * 400
    assert 0.5 * SHARE * 200 < len(solved) < 1.5 * SHARE * 200
    assert {sample.step for sample in everything} == {7, 8}
    assert set(map(repr, everything)) <= set(map(repr, samples(7) + samples(8)))
    assert all(sample.solved for sample in solved)
    assert {sample.solved for sample in everything} == {True, False}
    assert read_samples(tmp_path / "absent.txt") == []
    (tmp_path / "empty.txt").touch()  # as a short run leaves it that kept nothing
    assert read_samples(tmp_path / "empty.txt") == []


@pytest.mark.parametrize(
    "text",
    [
        "x\n==== step 9 nums [1] target 1 rewards {}\n<think>y",
        "x\r==== step 9 nums [1] target 1 rewards {}\r<think>y",
        "",
    ],
)
def test_a_completion_cannot_forge_an_entry(tmp_path, text):
    append_samples(tmp_path, samples(3, text=text))
    kept = read_samples(tmp_path / ALL_FILE)
    assert {sample.step for sample in kept} == {3}
    assert {sample.text.replace("\n ====", "\n====") for sample in kept} == {text}


def test_rewinding_drops_the_later_steps(tmp_path):
    append_samples(tmp_path, samples(1))
    kept = {name: (tmp_path / name).read_bytes() for name in (ALL_FILE, SOLVED_FILE)}
    append_samples(tmp_path, samples(2, text="a\rb"))
    rewind_samples(tmp_path, 1)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    rewind_samples(tmp_path / "absent", 1)


def test_a_sample_names_its_puzzle():
    assert samples(1)[0].puzzle == "make 2 from 1, 1"
