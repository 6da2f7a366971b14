import hashlib
from fractions import Fraction

import pytest

from mini_r1.countdown.puzzles import (
    Puzzle,
    PuzzleSpace,
    PuzzleSpaceError,
    candidate,
    generate,
)
from tests.countdown.reference import brute_force

SMALL = PuzzleSpace(num_numbers=(2, 3), number_range=(1, 20), target_range=(1, 50))


def test_every_puzzle_is_solvable_in_range_and_new():
    puzzles = list(generate(300, 7, SMALL))
    assert len({puzzle.key for puzzle in puzzles}) == 300
    for puzzle in puzzles:
        assert len(puzzle.nums) in (2, 3)
        assert all(1 <= n <= 20 for n in puzzle.nums)
        assert 1 <= puzzle.target <= 50
        assert Fraction(puzzle.target) in brute_force(puzzle.nums)
    assert {len(puzzle.nums) for puzzle in puzzles} == {2, 3}


def test_a_longer_run_starts_with_the_same_puzzles():
    assert list(generate(100, 3, SMALL)) == list(generate(200, 3, SMALL))[:100]


def test_candidates_do_not_depend_on_what_was_asked_before():
    backwards = {index: candidate(3, index, SMALL) for index in reversed(range(50))}
    for index in range(50):
        assert backwards[index] == candidate(3, index, SMALL)


def test_neighbouring_seeds_share_next_to_nothing():
    space = PuzzleSpace()
    first, second = ({puzzle.key for puzzle in generate(500, seed, space)} for seed in (1, 2))
    assert len(first & second) <= 5


def test_the_same_bytes_on_any_machine():
    text = "\n".join(puzzle.key for puzzle in generate(200, 42, PuzzleSpace()))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "d91aa8c526ef921b711a0864ca88bf22982733479ff332994458a76effe188e6"


def test_more_puzzles_than_there_can_be_are_refused_without_a_search():
    space = PuzzleSpace(num_numbers=(6,), number_range=(1, 2), target_range=(1, 10))
    with pytest.raises(
        PuzzleSpaceError, match="at most 70 different puzzles are like this"
    ) as caught:
        generate(71, 0, space)
    assert caught.value.name == "num_puzzles"


def test_what_is_out_of_reach_is_so():
    """The bound is never below what numbers can really make."""
    for numbers in ((1, 1, 1), (2, 2, 2), (1, 4, 5, 5), (9, 9, 9)):
        reach = (2 * max(numbers)) ** len(numbers)
        assert max(brute_force(numbers)) <= reach
        space = {"num_numbers": (len(numbers),), "number_range": (1, max(numbers))}
        assert PuzzleSpace(**space, target_range=(reach, reach))
        with pytest.raises(PuzzleSpaceError, match="no puzzle: "):
            PuzzleSpace(**space, target_range=(reach + 1, reach + 1))


def test_key_forgets_the_order_of_the_numbers():
    assert Puzzle((19, 36, 55, 7), 65).key == Puzzle((7, 19, 36, 55), 65).key == "7,19,36,55=65"


def test_an_exhausted_space_says_so():
    space = PuzzleSpace(num_numbers=(2,), number_range=(1, 2), target_range=(3, 9))
    with pytest.raises(ValueError, match="found 2 different puzzles of 10 asked for"):
        list(generate(10, 0, space))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_numbers": ()},
        {"num_numbers": (1,)},
        {"num_numbers": (7,)},
        {"number_range": (9, 1)},
        {"target_range": (-1, 5)},
        {"num_numbers": (3, 3)},
        {"target_range": (10**12, 10**13)},
    ],
)
def test_bad_spaces_are_refused(wrong):
    with pytest.raises(PuzzleSpaceError) as caught:
        PuzzleSpace(**wrong)
    assert [caught.value.name] == list(wrong)
