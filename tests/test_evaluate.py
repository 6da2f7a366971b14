import io
import itertools
import json
import math
import random
import time
from dataclasses import replace

import pytest
import rich
from rich.console import Console

from mini_r1 import InputError, RunFailed
from mini_r1.bases.cold_start import COLD_STARTS
from mini_r1.countdown.puzzles import Puzzle
from mini_r1.data import load_split
from mini_r1.evaluate import (
    Sample,
    best_of_k,
    confidence_interval,
    describe,
    evaluate_model,
    heldout_puzzles,
    pass_at_k,
    progress_bar,
    sample_batches,
    summarize,
)
from mini_r1.generators import Questions, by_transformers
from mini_r1.model import load_model, load_tokenizer
from mini_r1.recipe import TaskConfig
from tests.tiny_models import build_tokenizer

TASK = COLD_STARTS["tiny_base"].task

KEYS = {
    *("success", "ci95", "pass_at", "by_difficulty", "mean_completion_tokens", "truncated"),
    *("num_puzzles", "num_samples", "temperature", "split"),
}


def wilson(successes, trials):
    z, p = 1.959964, successes / trials
    root = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    centre = p + z * z / (2 * trials)
    return tuple((centre + sign * root) / (1 + z * z / trials) for sign in (-1, 1))


def test_interval_with_one_sample_per_puzzle_is_wilsons():
    assert confidence_interval([1] * 30 + [0] * 70, 1) == pytest.approx(wilson(30, 100))
    assert confidence_interval([0] * 50, 1) == pytest.approx(wilson(0, 50), abs=1e-12)
    assert confidence_interval([1] * 50, 1) == pytest.approx(wilson(50, 50))


def test_samples_of_one_puzzle_do_not_count_as_independent():
    assert confidence_interval([4] * 30 + [0] * 70, 4) == pytest.approx(wilson(30, 100))
    # Binomial between the puzzles: nearly as good as independent samples.
    rng = random.Random(0)
    correct = [sum(rng.random() < 0.3 for _ in range(4)) for _ in range(500)]
    low, high = confidence_interval(correct, 4)
    assert high - low == pytest.approx(wilson(600, 2000)[1] - wilson(600, 2000)[0], rel=0.1)


def test_interval_covers_the_truth_19_times_in_20():
    rng = random.Random(1)
    covered = 0
    for _ in range(400):
        rates = [rng.betavariate(0.5, 1.0) for _ in range(100)]  # the true mean is 1/3
        correct = [sum(rng.random() < rate for _ in range(4)) for rate in rates]
        low, high = confidence_interval(correct, 4)
        covered += low <= 1 / 3 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_pass_at_k():
    assert pass_at_k(4, 0, 4) == 0
    assert pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert pass_at_k(4, 1, 4) == 1
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)


def test_summary():
    def sample(nums, target, equation, truncated=False):
        return Sample(Puzzle(nums, target), "", 10, truncated, 1.0, equation)

    samples = [
        sample((1, 2), 3, 1.0),
        sample((1, 2), 3, 0.0, True),
        sample((2, 3), 6, 0.0),
        sample((2, 3), 6, 0.0),
    ]
    result = summarize(samples, replace(TASK, num_eval_samples=2), step=5)
    assert result.keys() >= KEYS
    assert (result["success"], result["num_puzzles"]) == (0.25, 2)
    assert (result["truncated"], result["step"]) == (0.25, 5)
    assert result["pass_at"] == {"1": 0.25, "2": 0.5}
    assert result["plus_minus_only_share"] == 0.5
    assert result["by_difficulty"]["plus_minus_only"]["true"]["success"] == 0.5
    assert result["by_difficulty"]["operator_kinds"]["1"]["num_puzzles"] == 2
    json.dumps(result)

    samples = [sample((1, 2, 3), 6, 1.0), sample((2, 2, 4), 8, 1.0), sample((1, 2), 3, 1.0)]
    result = summarize(samples, replace(TASK, num_eval_samples=1))
    assert list(result["by_difficulty"]["solutions"]) == ["1", "2-3", "10+"]


@pytest.mark.slow
def test_evaluates_the_embedded_base_by_name():
    result = evaluate_model("tiny_base", num_puzzles=20, num_samples=2)
    assert result.keys() >= KEYS
    assert (result["num_puzzles"], result["num_samples"]) == (20, 2)


def test_an_evaluation_can_be_repeated(small_task):
    first, second = (evaluate_model(small_task, num_puzzles=20, num_samples=2) for _ in range(2))
    assert first == second


def test_what_cannot_be_evaluated_is_explained(small_task):
    with pytest.raises(InputError, match="is not in the cache"):
        evaluate_model("no/such-model", num_puzzles=5)
    with pytest.raises(InputError, match="puzzles are held out"):
        evaluate_model(small_task, num_puzzles=100_000)


def test_a_model_that_cannot_be_asked_is_refused_before_its_weights_are_loaded(tmp_path):
    spoilt = build_tokenizer("qwen3", chat_template="{{ 1 / 0 }}")
    spoilt.save_pretrained(tmp_path)  # and no weights
    with pytest.raises(InputError, match="prompt_template: the model's chat template fails"):
        evaluate_model(str(tmp_path), num_puzzles=5)


# ---- Another task ---------------------------------------------------------------------------


def test_the_best_of_k_is_pass_at_k_and_more():
    for correct in range(5):
        scores = [1.0] * correct + [0.0] * (4 - correct)
        for k in (1, 2, 4):
            assert best_of_k(scores, k) == pass_at_k(4, correct, k)
    scores = [0.2, 0.9, 0.9, 0.5]
    pairs = list(itertools.combinations(scores, 2))
    assert best_of_k(scores, 2) == pytest.approx(sum(map(max, pairs)) / len(pairs))
    assert best_of_k(scores, 1) == pytest.approx(sum(scores) / 4)
    assert best_of_k(scores, 4) == pytest.approx(0.9)


def test_an_interval_of_shares_holds_them_and_shrinks():
    wide, narrow = confidence_interval([0.5, 1.5], 2), confidence_interval([0.5, 1.5] * 50, 2)
    assert 0 < wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1] < 1


OWN = """
def share(completions, words, completion_ids, trainer_state, **columns):
    assert trainer_state.global_step == 0 and len(completion_ids) == len(completions)
    return [len(word) / 4 for word in words]

async def later(completions, **columns):
    return [1.0] * len(completions)

def wild(completions, **columns):
    return [2.0] * len(completions)

def falsifying(completions, words, **columns):
    completions[:] = ["forged"] * len(completions)
    words[:] = ["forged"] * len(words)
    return [1.0] * len(completions)

def none(completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture
def own_task(own_folder):
    (own_folder / "my_task.py").write_text(OWN)
    (own_folder / "p.jinja").write_text("{{ words }}<think>")
    rows = [{"words": "x" * (1 + i % 3), "id": i} for i in range(60)]
    (own_folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def task(reward, **changes):
        keys = {"dataset_id_or_path": "x.jsonl", "prompt_template": "p.jinja", "test_share": 0.3}
        keys |= {"num_eval_puzzles": 6, "num_eval_samples": 2, "reward_funcs": (reward,)}
        return TaskConfig(**{**keys, **changes})

    return task


def evaluated(task):
    model, tokenizer, split = load_model("tiny_base"), load_tokenizer("tiny_base"), load_split(task)
    puzzles = heldout_puzzles(split, task)
    questions = Questions(puzzles, task, tokenizer, 4, split.columns)
    with by_transformers(model, questions) as generator:
        batches = sample_batches(generator, questions)
    samples = [sample for _, batch in batches for sample in batch]
    return summarize(samples, task), [puzzle.columns["words"] for puzzle in puzzles]


def test_a_run_may_have_any_name(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    with progress_bar(2, "{0} [/x] \x1b[2J", shown=True) as on_batch:
        on_batch(1)
    assert "{0} [/x] <U+001B>[2J" in console.file.getvalue()


def test_off_a_terminal_a_line_from_time_to_time_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("mini_r1.evaluate.PLAIN_SECONDS", 0.05)
    with progress_bar(2000, "before") as on_batch:
        on_batch(1024)
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert not out  # where the result goes
    assert err.splitlines()[0] == "evaluating before: 1,024 of 2,000 completions after 0 s"
    time.sleep(0.2)
    assert not capsys.readouterr().err
    with progress_bar(2000, "before", shown=False):
        time.sleep(0.2)
    assert not capsys.readouterr().err


def test_a_reward_changes_no_example(own_task):
    result, words = evaluated(own_task("my_task.falsifying"))
    assert result["success"] == 1.0
    assert "forged" not in json.dumps(result["examples"])
    assert [example["row"]["words"] for example in result["examples"]] == words[:3]


def test_the_mean_of_a_reward_is_reported(own_task):
    result, words = evaluated(own_task("my_task.share"))
    shares = [len(word) / 4 for word in words]
    assert result["success"] == pytest.approx(sum(shares) / 6)
    assert result["pass_at"] == {"1": pytest.approx(sum(shares) / 6)} | {
        "2": pytest.approx(sum(shares) / 6)
    }
    assert result["rule"] == "the mean of the reward share"
    assert result["examples"][0]["row"]["words"] == words[0]
    assert not result.keys() & {"by_difficulty", "behaviors", "format", "plus_minus_only_share"}
    assert "need only" not in describe(result)
    assert evaluated(own_task("my_task.wild", eval_reward="my_task.later"))[0]["success"] == 1.0


@pytest.mark.parametrize(("reward", "returned"), [("wild", "2.0"), ("none", "None")])
def test_a_reward_that_cannot_be_success_is_told(own_task, reward, returned):
    with pytest.raises(RunFailed, match=f"my_task.{reward} returned {returned}, and what is succ"):
        evaluated(own_task(f"my_task.{reward}"))
