"""A completion -> its think part, its answer, and the arithmetic claims it makes.

A completion is what the model wrote after the prompt's prefilled `<think>`. Nothing here decides
about rewards: `rewards.py` does.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mini_r1.countdown.expression import MAX_CHARS, ExpressionError, parse

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

# What equations in running text are made of; a line's bullet dash is not part of one.
_ARITHMETIC = re.compile(r"[0-9+\-*/()= \t]+")
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
    """An arithmetic claim `left = right` in a text, its place there, and whether it is true."""

    left: str
    right: str
    start: int
    end: int
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
    left and plain integer arithmetic on both sides; `4 / 3 = 1.33` is none.
    """
    text = _BULLET.sub(lambda match: " " * len(match[0]), text)
    for run in _ARITHMETIC.finditer(text):
        sides = run[0].split("=")
        if _DECIMALS.match(text, run.end()):
            sides.pop()
        ends = list(accumulate((len(side) + 1 for side in sides), initial=run.start()))
        spans = [_trimmed(text, start, end - 1) for start, end in pairwise(ends)]
        for (start, left_end), (right_start, end) in pairwise(spans):
            left, right = text[start:left_end], text[right_start:end]
            if len(left) > MAX_CHARS or left.removeprefix("-").isdigit():
                continue  # no operator: `-5 = -5` claims nothing
            try:
                yield Claim(left, right, start, end, parse(left).value == parse(right).value)
            except ExpressionError:
                continue


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


def printable(text: str) -> str:
    """The text without control characters, by which a model could write anywhere on a terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without outer blanks and outer brackets that have no partner in it.

    The claim in `(8 + 13 = 21)` has two such brackets, one on either side.
    """
    while start < end:
        unclosed = text.count("(", start, end) - text.count(")", start, end)
        first, last = text[start], text[end - 1]
        if first in " \t)" or (unclosed > 0 and first == "("):
            start += 1
        elif last in " \t(" or (unclosed < 0 and last == ")"):
            end -= 1
        else:
            break
    return start, end
