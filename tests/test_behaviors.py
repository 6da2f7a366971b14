from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_r1.bases.cold_start import COLD_STARTS, traces
from mini_r1.behaviors import Behavior, _readings, behavior, summarize_behaviors
from tests.hostile import HOSTILE, fuzz

NUMS = (8, 13, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # claims, true claims, tries, verified, gave up
        (
            "\n8*3=24, 24-13=11 low\n13+8=21, 21+3=24 yes\n</think>\n<answer>(13+8)+3</answer>",
            (4, 4, 2, True, False),
        ),
        ("\n8*3=24, 24-13=11 low\n</think>\n<answer>8*3-13</answer>", (2, 2, 1, True, True)),
        # Believes a false claim.
        ("\n13-8=5, 5*3=24 yes\n</think>\n<answer>(13-8)*3</answer>", (2, 1, 1, False, False)),
        # 4 is not given.
        ("\n13-8=6, 6*4=24 yes\n</think>\n<answer>(13-8)*3</answer>", (2, 1, 0, False, True)),
        (
            "8 + 13 = 22, 22 + 3 = 25, no.\nSo 8 + 13 + 3 = 24."
            "</think><answer>8+13+3 = 24</answer>",
            (3, 2, 2, True, False),
        ),
        ("Let me see.</think>\n<answer>8+13+3</answer>", (0, 0, 0, False, True)),
        ("8+13=21 and then", (1, 1, 0, False, False)),  # cut off: neither an answer nor given up
        ("8 + 13 + 3 = 21 + 3 = 24</think><answer>nothing</answer>", (2, 2, 1, False, False)),
    ],
)
def test_behaviors_of_one_completion(text, expected):
    assert behavior(text, 24, NUMS) == Behavior(*expected)


def test_a_number_may_be_a_result_or_given():
    text = "3+2=5, 5+5=10 low\n5*3=15, 15-2=13 yes\n</think>\n<answer>5*3-2</answer>"
    assert behavior(text, 13, (5, 3, 2)) == Behavior(
        claims=4, true_claims=4, tries=2, verified=True, gave_up=False
    )


def test_results_of_an_earlier_try_may_be_used_again():
    text = "99-75=24. 24+62=86, too high. 24-62=-38.</think><answer>99-75-62</answer>"
    assert behavior(text, -38, (99, 75, 62)) == Behavior(
        claims=3, true_claims=3, tries=2, verified=True, gave_up=False
    )


def test_counts_the_tries_of_generated_traces():
    for trace in traces(replace(COLD_STARTS["tiny_base"], num_traces=1000)):
        seen = behavior(trace.completion, trace.puzzle.target, trace.puzzle.nums)
        lines = trace.completion.count("\n") - 2
        assert seen == Behavior(2 * lines, 2 * lines, lines, True, " yes" not in trace.completion)


@given(st.text(alphabet="0123456789+-*/=()., \n<>/answerthink", max_size=400) | HOSTILE)
@fuzz
def test_never_raises(text):
    seen = behavior(text, 24, NUMS)
    assert 0 <= seen.true_claims <= seen.claims


NUMBERS = st.lists(st.integers(1, 4), max_size=5).map(tuple)


@given(NUMBERS, NUMBERS, st.dictionaries(st.integers(1, 9), st.tuples(NUMBERS, st.booleans())))
@fuzz
def test_readings_are_all_combinations_of_results_and_given_numbers(numbers, given, made):
    options = [[made[n], ((n,), True)] if n in made else [((n,), True)] for n in numbers]
    combinations = [
        (Counter(given) - Counter(used), all(true for _, true in chosen))
        for chosen in product(*options)
        if Counter(used := sum((each for each, _ in chosen), ())) <= Counter(given)
    ]
    found = [(Counter(left), true) for left, true in _readings(numbers, given, made).items()]
    assert found == list(first_of_each(combinations)) or len(numbers) > len(given)


def first_of_each(pairs):
    seen = []
    for left, true in pairs:
        if left not in seen:
            seen.append(left)
            yield left, true


def test_summary():
    seen = [Behavior(4, 3, 2, True, False), Behavior(0, 0, 0, False, True)]
    assert summarize_behaviors(seen) == {
        "tries": 1,
        "verified": 0.5,
        "true_arithmetic": 0.75,
        "gave_up": 0.5,
    }
    assert summarize_behaviors(seen[1:])["true_arithmetic"] is None
