"""Countdown searches in plain English: what a real model is shown before reinforcement learning.

R1 began like this, too: with a cold start on readable solutions (arXiv:2501.12948, section 2.3.1).
The arithmetic and the verdicts are true, and every search arrives:

    Start from 5 and 4: 5 + 4 = 9, then 12 + 9 = 21, which is 47 short of 68.
    Or 5 - 4 = 1, then 12 + 1 = 13, which is 55 short of 68.
    Or 5 * 4 = 20, then 20 + 12 = 32, which is 36 short of 68.
    Now 12 and 4: 12 + 4 = 16, then 16 * 5 = 80, which is 12 more than 68.
    Or 12 - 4 = 8, then 8 * 5 = 40, which is 28 short of 68.
    Or 12 * 4 = 48, then 48 + 5 = 53, which is 15 short of 68.
    Or 12 / 4 = 3, then 5 * 3 = 15, which is 53 short of 68.
    Now 12 and 5: 12 + 5 = 17, then 17 * 4 = 68, which is 68. Done!
    </think>
    <answer> (12 + 5) * 4 </answer>

Patience varies: each search stands for a drawn number of tries and is left out if it has not
arrived by then, so short ones are many and long ones few. Left out with them: puzzles that the
order of `search.tries` comes to later than `MAX_TRIES`.
"""

import random
import re
from collections.abc import Callable, Sequence
from itertools import islice

from mini_r1 import InputError
from mini_r1.bases.search import tries
from mini_r1.countdown.puzzles import Puzzle

MAX_TRIES = 12  # as tiny_base, which comes to all but 1 % of its puzzles by then
LARGEST_RESULT = 100  # as tiny_base: it bounds the arithmetic to be learned; a larger target counts


def search(puzzle: Puzzle, max_tries: int) -> str | None:
    """A completion that searches until solved; None if it is not after so many tries."""
    lines: list[str] = []
    pair = None
    every = tries(puzzle, "+-*/", max(LARGEST_RESULT, puzzle.target))
    for steps, value, expression in islice(every, max_tries):
        before, pair = pair, re.findall(r"\d+", steps[0])[:2]
        if pair == before:
            opening = "Or"
        else:
            opening = f"{'Now' if lines else 'Start from'} {pair[0]} and {pair[1]}:"
        arithmetic = ", then ".join(map(_spaced, steps))
        lines.append(f"{opening} {arithmetic}, which is {_verdict(value, puzzle.target)}\n")
        if value == puzzle.target:
            return f"\n{''.join(lines)}</think>\n<answer> {_spaced(expression)} </answer>"
    return None


def searches(
    puzzles: Sequence[Puzzle],
    num_traces: int,
    seed: int,
    fits: Callable[[str], bool] = lambda completion: True,
) -> list[tuple[Puzzle, str]]:
    """Puzzles and completions, the same from the same seed; each puzzle used about equally often.

    Args:
        fits: whether a completion is short enough.

    Raises:
        InputError: no search for any of the puzzles arrives and fits.
    """
    rng, shuffled = random.Random(seed), list(puzzles)
    found: list[tuple[Puzzle, str]] = []
    while len(found) < num_traces:
        had = len(found)
        rng.shuffle(shuffled)
        for puzzle in shuffled:
            completion = search(puzzle, rng.randint(1, MAX_TRIES))
            if completion is not None and fits(completion):
                found.append((puzzle, completion))
        if len(found) == had:
            raise InputError(
                f"no search of at most {MAX_TRIES} tries solves one of these puzzles in so few "
                "tokens; raise it, or take smaller numbers",
                key="max_completion_length",
            )
    return found[:num_traces]


def _verdict(value: int, target: int) -> str:
    if value == target:
        return f"{target}. Done!"
    return f"{abs(value - target)} {'short of' if value < target else 'more than'} {target}."


def _spaced(equation: str) -> str:
    return re.sub(r"([-+*/=])", r" \1 ", equation)
