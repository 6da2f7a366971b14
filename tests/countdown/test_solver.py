import random
import time
from fractions import Fraction
from itertools import combinations, permutations

import pytest

from mini_r1.countdown.expression import is_solution
from mini_r1.countdown.solver import Difficulty, difficulty, reachable, solve
from tests.countdown.reference import brute_force


@pytest.mark.parametrize("size", [2, 3, 4])
def test_reaches_exactly_what_a_brute_force_reaches(size):
    rng = random.Random(size)
    for _ in range({2: 50, 3: 50, 4: 8}[size]):
        nums = tuple(rng.randint(0, 12) for _ in range(size))
        expected = {abs(value.numerator) for value in brute_force(nums) if value.denominator == 1}
        assert reachable(nums) == expected, nums


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_solution_is_one(size):
    rng = random.Random(size)
    for _ in range({2: 40, 3: 40, 4: 10, 5: 2}[size]):
        nums = [rng.randint(0, 20) for _ in range(size)]
        for target in sorted(reachable(nums))[:30]:
            assert is_solution(solve(nums, target), nums, target), (nums, target)
            assert is_solution(solve(nums, -target), nums, -target), (nums, -target)
            assert difficulty(nums, target) is not None


def test_known_puzzles():
    assert is_solution(solve([25, 50, 75, 100, 3, 6], 952), [25, 50, 75, 100, 3, 6], 952)
    assert solve([8, 8, 3, 3], 24) == "8 / (3 - (8 / 3))"
    assert solve([1, 1], 5) is None
    assert difficulty([1, 1], 5) is None
    assert solve([2, 2, 2, 2], 9) is None


def test_difficulty():
    assert difficulty([1, 2], 3) == Difficulty(
        numbers=2, operator_kinds=1, solutions=1, plus_minus_only=True
    )
    assert difficulty([8, 8, 3, 3], 24) == Difficulty(
        numbers=4, operator_kinds=2, solutions=1, plus_minus_only=False
    )
    # (1+2)+3, (1+3)+2, (2+3)+1, the same three as products.
    assert difficulty([1, 2, 3], 6).solutions == 6 + len(
        ["3 / (1 / 2)", "2 / (1 / 3)", "2 * 3 / 1", "(2 / 1) * 3", "(3 / 1) * 2"]
    )
    # 5 - 5 and 5 / 5 * 0 are different, 5 - 5 and its mirror image are not.
    assert difficulty([5, 5], 0).solutions == 1


def made_with(operators, values):
    """What can be made with these operators alone: combine any two, drop the sign, repeat."""
    if len(values) == 1:
        return {values[0]}
    found = set()
    for i, j in permutations(range(len(values)), 2):
        x, y = values[i], values[j]
        rest = [values[k] for k in range(len(values)) if k not in (i, j)]
        results = {"+": x + y, "-": abs(x - y), "*": x * y, "/": x / y if y else None}
        for operator in operators:
            if results[operator] is not None:
                found |= made_with(operators, [*rest, results[operator]])
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_fewest_kinds_of_operators(size):
    rng = random.Random(size)
    sets = ["".join(some) for kinds in (1, 2, 3, 4) for some in combinations("+-*/", kinds)]
    for _ in range({2: 40, 3: 20, 4: 1}[size]):
        nums = [rng.randint(0, 12) for _ in range(size)]
        made = {some: made_with(some, [Fraction(n) for n in nums]) for some in sets}
        for target in range(60):
            enough = [some for some in sets if target in made[some]]
            found = difficulty(nums, target)
            if not enough:
                assert found is None
                continue
            assert found.operator_kinds == min(map(len, enough)), (nums, target)
            assert found.plus_minus_only == ("+-" in enough), (nums, target)


def test_zero_and_division():
    assert reachable([0, 7]) == {0, 7}
    assert is_solution(solve([0, 7], 0), [0, 7], 0)
    assert reachable([0, 0, 3]) == {0, 3}


def test_six_numbers_take_seconds():
    started = time.perf_counter()
    values = reachable([25, 50, 75, 100, 3, 6])
    assert 952 in values
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("nums", [[], [1], [1] * 7, [-1, 2]])
def test_bad_numbers_are_refused(nums):
    with pytest.raises(ValueError, match="want"):
        solve(nums, 1)
