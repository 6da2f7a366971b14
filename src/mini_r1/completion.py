"""A completion -> its think part, its answer, and the arithmetic claims it makes.

A completion is what the model wrote after the prompt's prefilled `<think>`. Nothing here decides
about rewards: `rewards.py` does.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from mini_r1.countdown.expression import Equation, ExpressionError, parse

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

# How much of a text's equations is read, in characters: a thousand claims. The longest completion
# of our recipes, 1024 tokens, has some 4000 characters in all.
MAX_EQUATIONS = 8_000

# What equations in running text are made of; a line's bullet dash is not part of one. A run is
# tried from its first character only, and given up as a whole: linear whatever the text.
_SIDE = r"[0-9+\-*/() \t]"
_EQUATIONS = re.compile(rf"(?<!{_SIDE}){_SIDE}++(?:={_SIDE}*+)+")
_BULLET = re.compile(r"^[ \t]*[-*][ \t]+", re.MULTILINE)
_DECIMALS = re.compile(r"\.[0-9]")


@dataclass(frozen=True)
class Completion:
    """A completion, taken apart.

    Attributes:
        think: everything up to the one `</think>`; the whole text if there is not exactly one.
        answer: the content of the one `<answer>...</answer>` that follows the one `</think>`, or
            None.
        well_formed: one think block, whitespace, one non-empty answer block, nothing but whitespace
            after it.
    """

    think: str
    answer: str | None
    well_formed: bool


@dataclass(frozen=True)
class Claim:
    """An arithmetic claim `left = right` in a text, and its place there.

    Attributes:
        numbers: those on the left, in their order.
        value: what the right side is worth.
        true: whether the left side is worth that, too.
    """

    left: str
    right: str
    start: int
    end: int
    numbers: tuple[int, ...]
    value: Fraction
    true: bool


def parse_completion(text: str) -> Completion:
    """Take a completion apart. Never raises; linear in the length of the text."""
    think, close, rest = text.partition(THINK_CLOSE)
    if not close or THINK_CLOSE in rest:
        return Completion(text, None, False)
    if rest.count(ANSWER_OPEN) != 1 or rest.count(ANSWER_CLOSE) != 1:
        return Completion(think, None, False)
    before, _, rest = rest.partition(ANSWER_OPEN)
    answer, close, after = rest.partition(ANSWER_CLOSE)
    if not close:
        return Completion(think, None, False)
    well_formed = (
        THINK_OPEN not in text and not before.strip() and bool(answer.strip()) and not after.strip()
    )
    return Completion(think, answer, well_formed)


def claims(text: str) -> Iterator[Claim]:
    """The arithmetic claims of a text, in order.

    `8 + 13 = 21` is one, `99 - 75 + 62 = 24 + 62 = 86` holds two. A claim has an operator on its
    left and plain integer arithmetic on both sides; `4 / 3 = 1.33` is none. Linear in the length of
    the text: no more than its first MAX_EQUATIONS characters of equations are read.
    """
    unread = MAX_EQUATIONS
    for run in _EQUATIONS.finditer(text):
        unread -= len(run[0])
        if unread < 0:
            return
        start = run.start()
        if bullet := _BULLET.match(text, start):
            start = bullet.end()
        sides = text[start : run.end()].split("=")
        if _DECIMALS.match(text, run.end()):
            sides.pop()
        judged = []
        for side in sides:
            judged.append(_judged(side, start))
            start += len(side) + 1
        for left, right in pairwise(judged):
            # Without an operator, as in `-5 = -5`, nothing is claimed.
            if left and right and not left.text.removeprefix("-").isdigit():
                numbers, value = left.equation.numbers, right.equation.value
                true = left.equation.value == value
                yield Claim(left.text, right.text, left.start, right.end, numbers, value, true)


def marked(text: str) -> Iterator[tuple[str, bool | None]]:
    """The text in parts that make the whole.

    Those that are arithmetic claims come with their truth, those between them with None.
    """
    position = 0
    for claim in claims(text):
        if claim.start < position:
            continue  # the second claim of a chain shares its left side with the first
        yield text[position : claim.start], None
        yield text[claim.start : claim.end], claim.true
        position = claim.end
    yield text[position:], None


@dataclass(frozen=True)
class _Side:
    """One side of an equation, its place in the text, and what it is worth."""

    text: str
    start: int
    end: int
    equation: Equation


def _judged(side: str, start: int) -> _Side | None:
    """What stands there, from `start` on, without outer blanks and brackets without a partner.

    The claim in `(8 + 13 = 21)` has two such brackets, one on either side. None if the rest is no
    arithmetic.
    """
    first, last = 0, len(side)
    unclosed = side.count("(") - side.count(")")
    while first < last and (side[first] in " \t)" or (unclosed > 0 and side[first] == "(")):
        unclosed += {"(": -1, ")": 1}.get(side[first], 0)
        first += 1
    while first < last and (side[last - 1] in " \t(" or (unclosed < 0 and side[last - 1] == ")")):
        unclosed += {"(": -1, ")": 1}.get(side[last - 1], 0)
        last -= 1
    text = side[first:last]
    try:
        return _Side(text, start + first, start + last, parse(text))
    except ExpressionError:
        return None
