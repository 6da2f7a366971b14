from itertools import islice

import pytest

from mini_r1.bases.search import tries
from mini_r1.countdown.expression import parse
from mini_r1.countdown.puzzles import Puzzle


def test_the_order_is_pairs_then_operators_and_the_last_operator_aims_at_the_target():
    found = list(islice(tries(Puzzle((12, 5, 4), 68), "+-*/", 100), 8))
    assert [steps for steps, _, _ in found] == [
        ["5+4=9", "12+9=21"],
        ["5-4=1", "12+1=13"],
        ["5*4=20", "20+12=32"],
        ["12+4=16", "16*5=80"],
        ["12-4=8", "8*5=40"],
        ["12*4=48", "48+5=53"],
        ["12/4=3", "5*3=15"],
        ["12+5=17", "17*4=68"],
    ]
    assert found[-1][1:] == (68, "(12+5)*4")


@pytest.mark.parametrize("nums", [(3, 3, 3, 7), (0, 0, 5), (5000, 1, 2), (1, 2)])
def test_every_try_uses_every_number_and_calculates_truly(nums):
    found = list(islice(tries(Puzzle(nums, 24), "+-*/", 100), 200))
    assert len({tuple(steps) for steps, _, _ in found}) == len(found)
    for steps, value, expression in found:
        assert parse(expression).value == value
        assert sorted(parse(expression).numbers) == sorted(nums)
        for step in steps:
            left, _, right = step.partition("=")
            assert parse(left).value == parse(right).value
            assert 0 < int(right) <= 100
