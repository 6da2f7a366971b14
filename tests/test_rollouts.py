import asyncio
import inspect
import json
import traceback
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerState

from mini_r1 import InputError, RunFailed
from mini_r1.recipe import TaskConfig
from mini_r1.rewards import RewardFunction, get_reward_functions
from mini_r1.rollouts import (
    ALL_FILE,
    SHARE,
    SOLVED_FILE,
    Rollout,
    RolloutRecorder,
    append_samples,
    read_samples,
)
from tests.hostile import HOSTILE, TEXTS, fuzz, is_inert

# ---- The recorder ---------------------------------------------------------------------------

COMPLETIONS = ["</think>\n<answer>1+2</answer>", "</think>\n<answer>2-1</answer>"] * 100


def feed(recorder, step, main=True, log_metric=lambda name, value: None):
    """What TRL hands to the reward functions in one step."""
    state = SimpleNamespace(global_step=step - 1, is_world_process_zero=main)
    for function in recorder.watch(get_reward_functions(["format", "equation"])):
        scores = function(
            prompts=[f"puzzle {index // 4}" for index in range(200)],
            completions=COMPLETIONS,
            completion_ids=[[1]] * 200,
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
    assert set(map(repr, solved)) == {
        repr(Rollout(7, {"nums": [1, 2], "target": 3}, rewards, COMPLETIONS[0]))
    }
    assert recorder.latest == Rollout(7, {"nums": [1, 2], "target": 3}, rewards, COMPLETIONS[0])


def test_only_rank_zero_writes_and_every_rank_logs_behaviors_once(tmp_path):
    logged = []
    feed(RolloutRecorder(tmp_path), 1, main=False, log_metric=lambda *metric: logged.append(metric))
    assert list(tmp_path.iterdir()) == []
    # No claims at all: no true_arithmetic.
    expected = {"behaviors/tries": 0.0, "behaviors/verified": 0.0, "behaviors/gave_up": 1.0}
    assert logged == [("same_text", 0.0), *expected.items()]


def test_the_share_of_groups_of_one_text_is_logged(tmp_path):
    task = TaskConfig("x.jsonl", prompt_template="p.yaml", reward_funcs=("a",), eval_reward="b")

    def logged(prompts, texts):
        values, recorder = [], RolloutRecorder(tmp_path, task)
        (function,) = recorder.watch(
            [RewardFunction("a", "a", (), lambda completions, **columns: [0.0] * len(completions))]
        )
        function(
            prompts=prompts,
            completions=texts,
            completion_ids=[[1]] * len(texts),
            trainer_state=SimpleNamespace(global_step=4, is_world_process_zero=False),
            log_metric=lambda *metric: values.append(metric),
        )
        return values

    assert logged("aabb", ["x", "x", "x", "y"]) == [("same_text", 0.5)]
    assert logged("abb", ["x", "y", "y"]) == [("same_text", 1.0)]  # the rest is another rank's
    assert logged("ab", ["x", "y"]) == []


# ---- What rewards return --------------------------------------------------------------------

TWO = ["</think>\n<answer>1+2</answer>", "hm\n\x1b[31m" + "so " * 1000]


def observed(folder, *functions, completions=TWO, main=True):
    """What TRL gets from reward functions in step 5, and the recorder."""
    rewards = [
        RewardFunction(f"reward_{index}", f"my_task.reward_{index}", (), function)
        for index, function in enumerate(functions)
    ]
    recorder = RolloutRecorder(folder)
    watched = recorder.watch(rewards)
    assert [each.__name__ for each in watched] == [reward.name for reward in rewards]
    many = len(completions)
    columns = {
        "prompts": ["x"] * many,
        "completions": completions,
        "completion_ids": [[1]] * many,
        "nums": [[1, 2]] * many,
        "target": [3] * many,
        "trainer_state": SimpleNamespace(global_step=4, is_world_process_zero=main),
        "log_metric": lambda name, value: None,
    }
    scores = []
    for function in watched:
        returned = function(**columns)
        is_coroutine = inspect.iscoroutinefunction(function)  # as TRL asks
        scores.append(asyncio.run(returned) if is_coroutine else returned)
    return scores, recorder


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (True, Fraction(1, 2)),
        iter([1.0, Decimal("0.5")]),
        numpy.array([1.0, 0.5], dtype=numpy.float32),
        [numpy.float64(1), numpy.array(0.5)],
        [numpy.bool_(True), torch.tensor(0.5)],
        torch.tensor([1.0, 0.5], requires_grad=True),
        pandas.Series([1, 0.5], index=[7, 8]),
    ],
)
def test_numbers_of_all_kinds_become_plain_ones(tmp_path, returned):
    ((scores,), recorder) = observed(tmp_path, lambda **columns: returned)
    assert scores == [1.0, 0.5]
    assert {type(score) for score in scores} == {float}
    assert recorder.latest.rewards == {"reward_0": 1.0}
    json.dumps(recorder.latest.rewards)


def test_a_coroutine_is_observed_as_one(tmp_path):
    async def slow(completions, **columns):
        return [numpy.float32(0.25)] * len(completions)

    class Slow:
        __call__ = staticmethod(slow)

    scores, recorder = observed(tmp_path, slow, Slow(), lambda **columns: [0, None])
    assert scores == [[0.25, 0.25], [0.25, 0.25], [0.0, None]]
    assert recorder.latest.rewards == {"reward_0": 0.25, "reward_1": 0.25, "reward_2": 0.0}


# What must not be returned, and what is said.
BAD = {
    "too few": ([1.0], "1 rewards for 2 completions; want one each"),
    "too many": ([1.0] * 3, "3 rewards for 2 completions; want one each"),
    "none at all": ([], "0 rewards for 2 completions; want one each"),
    "nothing": (None, "None; want a list of numbers"),
    "one number": (0.5, "0.5; want a list of numbers"),
    "one number of numpy": (numpy.float32(0.5), "np.float32(0.5); want a list of numbers"),
    "one number of torch": (torch.tensor(0.5), "tensor(0.5000); want a list of numbers"),
    "text": ("10", "'10'; want a list of numbers"),
    "bytes": (b"10", "b'10'; want a list of numbers"),
    "a mapping": ({0: 1.0, 1: 0.0}, "{0: 1.0, 1: 0.0}; want a list of numbers"),
    "a set": ({1.0, 0.0}, "{0.0, 1.0}; want a list of numbers"),
    "texts": ([1.0, "1.0"], "'1.0' for completion 2 of 2"),
    "texts of numpy": (numpy.array(["1.0", "0.0"]), "np.str_('1.0') for completion 1 of 2"),
    "lists": ([1.0, [0.0]], "[0.0] for completion 2 of 2"),
    "a column": (torch.zeros(2, 1), "tensor([0.]) for completion 1 of 2"),
    "NaN": ([1.0, float("nan")], "nan for completion 2 of 2, 'hm\\n\\x1b[31mso so"),
    "NaN of numpy": (numpy.array([1.0, numpy.nan]), "np.float64(nan) for completion 2 of 2"),
    "NaN of torch": (torch.tensor([torch.nan, 1]), "tensor(nan) for completion 1 of 2, '</think>"),
    "infinite": ([-float("inf"), 1.0], "-inf for completion 1 of 2"),
    "infinite in 32 bits": ([1e39, 1.0], "1e+39 for completion 1 of 2"),
    "infinite when squared": ([1.0, -1e20], "-1e+20 for completion 2 of 2"),
    "an integer too large": ([10**400, 1], "1000000"),
    "complex": ([1.0, 1j], "1j for completion 2 of 2"),
    "complex of numpy": ([numpy.complex64(1), 1.0], "np.complex64(1+0j) for completion 1 of 2"),
    "missing": ([1.0, pandas.NA], "<NA> for completion 2 of 2"),
}


@pytest.mark.parametrize("mistake", BAD)
@pytest.mark.parametrize("main", [True, False])
def test_anything_else_is_a_fault_told_in_one_line(tmp_path, mistake, main):
    returned, said = BAD[mistake]
    functions = (lambda **columns: [0.0, 0.0], lambda **columns: returned)
    scores, recorder = observed(tmp_path, *functions, main=main)
    assert scores == [[0.0, 0.0], [None, None]]
    assert [rewards for _, _, rewards in recorder.scored] == [{"reward_0": 0, "reward_1": None}] * 2
    text = str(recorder.fault)
    assert f"the reward my_task.reward_1 returned, in step 5, {said}" in text
    assert text.isprintable()
    assert len(text) < 400
    assert not list(tmp_path.iterdir())


class Interrupted(Exception):
    pass


def raising(error):
    def reward(**columns):
        raise error

    return reward


def yielding(error):
    def reward(**columns):
        yield 1.0
        raise error

    return reward


def awaited(error):
    async def reward(**columns):
        raise error

    return reward


@pytest.mark.parametrize("reward", [raising, yielding, awaited])
def test_a_defect_of_a_reward_keeps_its_traceback_and_names_it(tmp_path, reward):
    with pytest.raises(Interrupted) as caught:
        observed(tmp_path, reward(Interrupted("at work")))
    shown = "".join(traceback.format_exception(caught.value))
    assert "raise error" in shown
    assert "in the reward my_task.reward_0, step 5" in shown


@pytest.mark.parametrize("error", [SystemExit(), InputError("no"), RunFailed("no")], ids=repr)
@pytest.mark.parametrize("reward", [raising, yielding, awaited])
def test_no_defect_of_a_reward_passes_for_an_end_or_bad_input(tmp_path, reward, error):
    with pytest.raises(RuntimeError, match=r"in the reward my_task\.reward_0, step 5") as caught:
        observed(tmp_path, reward(error))
    assert type(caught.value) is RuntimeError
    assert caught.value.__cause__ is error


def test_completions_that_nothing_scores_are_told_of_once(tmp_path, capsys):
    def for_the_first(completions, **columns):
        return [1.0, *[None] * (len(completions) - 1)]

    many = [TWO[0]] * 300
    scores, recorder = observed(tmp_path, for_the_first, for_the_first, completions=many)
    assert scores == [[1.0, *[None] * 299]] * 2
    said = capsys.readouterr().out
    assert said.startswith("step 5: every reward was None for 299 of 300 completions; ")
    assert said.count("\n") == 1
    rewards = [sample.rewards for sample in read_samples(tmp_path / ALL_FILE)]
    assert {"reward_0": None, "reward_1": None} in rewards
    assert "NaN" not in (tmp_path / ALL_FILE).read_text()
    recorder._tell_unscored(6)
    observed(tmp_path, for_the_first, lambda **columns: [0.0, 0.0])
    observed(tmp_path, for_the_first, main=False)
    assert capsys.readouterr().out == ""


# ---- What rewards may change ----------------------------------------------------------------


def falsifying(completions, nums, words, trainer_state, **columns):
    """Changes everything it can lay its hands on."""
    completions[:] = ["</think>\n<answer>1+2</answer>"] * len(completions)
    for row, word in zip(nums, words, strict=True):
        row.clear()
        word["of"]["deep"] = "changed"
        word["new"] = True
    for column in columns.values():
        if isinstance(column, list):
            column.clear()
    trainer_state.global_step = 99
    trainer_state.log_history[0]["reward"] = 9.9
    trainer_state.should_training_stop = True
    return [1.0] * len(completions)


async def falsifying_later(**columns):
    return falsifying(**columns)


@pytest.mark.parametrize("reward", [falsifying, falsifying_later])
def test_a_reward_falsifies_nothing(tmp_path, reward):
    def columns():
        return {
            "prompts": ["p"] * 2,
            "completions": [*TWO],
            "completion_ids": [[1, 2], [3]],
            "nums": [[1, 2], [1, 2]],
            "target": [3, 3],
            "words": [{"of": {"deep": [1]}} for _ in TWO],
        }

    state = TrainerState(global_step=4, log_history=[{"reward": 0.5}])
    seen, given, recorder = [], columns(), RolloutRecorder(tmp_path)

    def honest(log_metric, trainer_state, log_extra, **columns):
        seen.append((columns, trainer_state.global_step))
        return [0.0, 0.0]

    rewards = [RewardFunction(each.__name__, each.__name__, (), each) for each in (reward, honest)]
    for function in recorder.watch(rewards):
        logging = {"log_metric": lambda *_: None, "log_extra": lambda *_: None}
        returned = function(**given, trainer_state=state, **logging)
        if inspect.isawaitable(returned):
            asyncio.run(returned)
    assert given == columns()  # what TRL goes on with
    assert seen == [(columns(), 4)]  # what the next reward gets
    assert (state.global_step, state.log_history) == (4, [{"reward": 0.5}])
    assert recorder.latest.text == TWO[0]
    assert recorder.latest.row == {"nums": [1, 2], "target": 3}
    assert recorder.latest.step == 5


# ---- The files ------------------------------------------------------------------------------


def samples(step, count=200, text="1+1=2\n</think>\n<answer>1+1</answer>"):
    return [
        Rollout(
            step,
            {"nums": [1, 1], "target": 2},
            {"format_reward": 1.0, "equation_reward": float(i % 2)},
            text,
        )
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
    assert {sample.text for sample in kept} == {text}


@given(st.lists(HOSTILE, min_size=1, max_size=4), HOSTILE)
@fuzz
def test_any_text_is_kept_inert_and_reads_back_as_it_was(texts, asked):
    with TemporaryDirectory() as name:
        folder = Path(name)
        for row in ({"nums": [1, 2], "target": 3}, {"question": asked}):
            written = [Rollout(i, row, {"a": 1.0}, text, "a") for i, text in enumerate(texts)]
            for rollout in written:
                append_samples(folder, [rollout] * 40)
        for file in folder.iterdir():
            assert is_inert(file.read_bytes().decode())
        kept = read_samples(folder / ALL_FILE)
        assert len(kept) > len(texts)
        assert {(each.step, each.text) for each in kept} <= {*enumerate(texts)}
        assert all(each.row in ({"nums": [1, 2], "target": 3}, row) for each in kept)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_the_corpus_reads_back_as_it_was(tmp_path, text):
    append_samples(tmp_path, samples(3, text=text))
    kept = read_samples(tmp_path / ALL_FILE)
    assert {(sample.step, sample.text) for sample in kept} == {(3, text)}
    assert is_inert((tmp_path / ALL_FILE).read_bytes().decode())


def test_a_sample_names_its_puzzle():
    assert samples(1)[0].question == "make 2 from 1, 1"


# ---- Another task ---------------------------------------------------------------------------


def test_the_rows_of_another_task_are_kept_as_they_are(tmp_path):
    task = TaskConfig(
        dataset_id_or_path="x.jsonl", prompt_template="p.yaml", reward_funcs=("a", "b")
    )
    rewards = [
        RewardFunction("a", "a", (), lambda completions, **columns: [1.0, 0.25] * 50),
        RewardFunction("b", "b", (), lambda completions, **columns: [None] * 100),
    ]
    recorder, logged = RolloutRecorder(tmp_path, task), []
    texts = ["==== step 9 row {} rewards {}\n", "<think>\n==== step 1 "] * 50
    for function in recorder.watch(rewards):
        function(
            prompts=["no"] * 100,
            completions=texts,
            completion_ids=[[1]] * 100,
            words=['a "b" rewards {c}\nd'] * 100,
            level=[{"of": 1}] * 100,
            trainer_state=SimpleNamespace(global_step=4, is_world_process_zero=True),
            log_metric=lambda *metric: logged.append(metric),
            log_extra=None,
        )
    assert logged == [("success", 0.625), ("same_text", 0.0)]  # and no behaviours
    row = {"words": 'a "b" rewards {c}\nd', "level": {"of": 1}}
    first = Rollout(5, row, {"a": 1.0, "b": None}, texts[0], "a")
    assert recorder.latest == first
    assert (first.solved, first.verdict) == (True, "solved")
    assert first.question == "words a \"b\" rewards {c} d, level {'of': 1}"
    kept, solved = (read_samples(tmp_path / name) for name in (ALL_FILE, SOLVED_FILE))
    assert {(each.step, str(each.row), each.judge) for each in kept} == {(5, str(row), "a")}
    assert {each.text for each in kept} == {*texts}
    assert {each.score for each in solved} == {1.0}


def test_without_a_reward_for_success_none_is_told(tmp_path):
    task = TaskConfig(
        dataset_id_or_path="x.jsonl", prompt_template="p.yaml", reward_funcs=("a",), eval_reward="b"
    )
    recorder, logged = RolloutRecorder(tmp_path, task), []
    reward = RewardFunction("a", "a", (), lambda completions, **columns: [1.0] * 100)
    (function,) = recorder.watch([reward])
    function(
        prompts=["no"] * 100,
        completions=["x"] * 100,
        completion_ids=[[1]] * 100,
        words=["a"] * 100,
        trainer_state=SimpleNamespace(global_step=4, is_world_process_zero=True),
        log_metric=lambda *metric: logged.append(metric),
    )
    assert logged == [("same_text", 1.0)]
    kept = read_samples(tmp_path / ALL_FILE)
    assert {(each.judge, each.score, each.solved) for each in kept} == {(None, None, False)}
