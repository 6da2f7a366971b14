import re

import pytest

from mini_r1 import InputError
from mini_r1.bases.english import MAX_TRIES, search, searches
from mini_r1.behaviors import behavior
from mini_r1.completion import parse_completion
from mini_r1.countdown.puzzles import Puzzle
from mini_r1.data import is_heldout, load_split
from mini_r1.recipe import TaskConfig
from mini_r1.rewards import equation_reward, format_reward

TASK = TaskConfig(num_puzzles=800)
TRY = re.compile(
    r"(Or|(Start from|Now) \d+ and \d+:)( \d+ [-+*/] \d+ = \d+, (then|which))+ is "
    r"((?P<off>\d+) (?P<side>short of|more than) \d+\.|\d+\. Done!)"
)


@pytest.fixture(scope="module")
def puzzles():
    return load_split(TASK).train


@pytest.fixture(scope="module")
def examples(puzzles):
    return searches(puzzles, 500, seed=1)


def test_it_reads_like_this():
    completion = search(Puzzle((4, 4, 6), 10), MAX_TRIES)
    assert completion == (
        "\nStart from 4 and 4: 4 + 4 = 8, then 8 + 6 = 14, which is 4 more than 10.\n"
        "Or 4 * 4 = 16, then 16 - 6 = 10, which is 10. Done!\n"
        "</think>\n<answer> (4 * 4) - 6 </answer>"
    )


def test_the_rewards_find_every_answer_right(examples):
    texts = [completion for _, completion in examples]
    targets, nums = [p.target for p, _ in examples], [p.nums for p, _ in examples]
    assert format_reward(texts) == [1.0] * 500
    assert equation_reward(texts, target=targets, nums=nums) == [1.0] * 500


def test_every_line_is_a_try_whose_arithmetic_and_verdict_are_true(examples):
    for puzzle, completion in examples:
        lines = parse_completion(completion).think.strip().split("\n")
        found = behavior(completion, puzzle.target, puzzle.nums)
        assert found.tries == len(lines)
        assert found.claims == found.true_claims == len(lines) * (len(puzzle.nums) - 1)
        assert found.verified
        assert not found.gave_up
        for line in lines:
            match = TRY.fullmatch(line)
            value = int(re.findall(r"= (\d+)", line)[-1])
            off = int(match["off"] or 0) * (-1 if match["side"] == "short of" else 1)
            assert value - off == puzzle.target


def test_patience_varies(examples):
    tries = [completion.count("\n") - 2 for _, completion in examples]
    assert set(tries) >= {1, 2, 3, 4, 5, 6}
    assert max(tries) <= MAX_TRIES
    assert tries.count(1) > tries.count(6)
    puzzle = Puzzle((12, 5, 4), 68)  # its search arrives with the eighth try
    assert search(puzzle, 7) is None
    assert search(puzzle, 8) is not None


def test_no_held_out_puzzle_is_shown_and_the_same_seed_gives_the_same(puzzles, examples):
    assert not any(is_heldout(puzzle.key, TASK) for puzzle, _ in examples)
    assert searches(puzzles, 500, seed=1) == examples
    assert searches(puzzles, 500, seed=2) != examples


def test_what_does_not_fit_is_left_out_and_nothing_at_all_is_refused(puzzles):
    short = searches(puzzles, 50, seed=1, fits=lambda text: text.count("\n") < 5)
    assert max(completion.count("\n") for _, completion in short) == 4
    with pytest.raises(InputError, match="max_completion_length: no search of at most 12 tries"):
        searches(puzzles, 50, seed=1, fits=lambda text: False)
