"""What a completion's thinking does: tries, truth, verification, giving up.

Told exactly, by its arithmetic claims. Works on any text that shows its arithmetic, the embedded
model's and a large model's alike. No language model judges here.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean

from mini_r1.completion import claims, parse_completion
from mini_r1.countdown.expression import ExpressionError, parse

# The given numbers that went into a value, and whether the arithmetic behind it is true.
Numbers = tuple[int, ...]
Results = dict[Fraction, tuple[Numbers, bool]]


@dataclass(frozen=True)
class Behavior:
    """The behaviour of one completion.

    Attributes:
        claims: arithmetic claims in the think part, such as `8 + 13 = 21`.
        true_claims: how many of them are exactly true.
        tries: claims that use every given number exactly once, results of earlier claims written
            out.
        verified: the answer was worked out before it was given: a try with true arithmetic has the
            answer's value.
        gave_up: an answer is given although no try claims to have reached the target.
    """

    claims: int
    true_claims: int
    tries: int
    verified: bool
    gave_up: bool


def behavior(completion: str, target: int, nums: Sequence[int]) -> Behavior:
    """Read one completion, the text after a prefilled `<think>`.

    Never raises; linear in the length of the text, of which no more is read than `claims` does.
    """
    parsed = parse_completion(completion)
    count = true_count = 0
    given = tuple(nums)
    # The claimed value of each try, and whether all arithmetic behind it is true.
    tries: list[tuple[Fraction, bool]] = []
    recent: Results = {}  # since the last complete try
    earlier: Results = {}
    for claim in claims(parsed.think):
        count += 1
        true_count += claim.true
        readings = _readings(claim.numbers, given, recent)
        readings = readings or _readings(claim.numbers, given, ChainMap(recent, earlier))
        if () in readings:
            tries.append((claim.value, readings[()] and claim.true))
            earlier |= recent
            recent = {}
        elif readings:
            left, true = next(iter(readings.items()))
            used = _without(given, left) or ()
            recent[claim.value] = used, true and claim.true
    answer = _value(parsed.answer)
    return Behavior(
        claims=count,
        true_claims=true_count,
        tries=len(tries),
        verified=any(true and value == answer for value, true in tries),
        gave_up=parsed.answer is not None and all(value != target for value, _ in tries),
    )


def summarize_behaviors(behaviors: Sequence[Behavior]) -> dict[str, float | None]:
    """Means over completions.

    `true_arithmetic` is the share of true claims among all claims, None if there are none.
    """
    claimed = sum(one.claims for one in behaviors)
    return {
        "tries": fmean(one.tries for one in behaviors),
        "verified": fmean(one.verified for one in behaviors),
        "true_arithmetic": sum(one.true_claims for one in behaviors) / claimed if claimed else None,
        "gave_up": fmean(one.gave_up for one in behaviors),
    }


def _readings(
    numbers: Numbers, given: Numbers, made: Mapping[Fraction, tuple[Numbers, bool]]
) -> dict[Numbers, bool]:
    """What a claim's numbers can stand for without using a given number too often.

    Each is a result made before, or given.

    Returns:
        what each reading leaves of the given numbers, and whether the arithmetic behind its results
        is true. Of readings that leave the same the first counts, results before given numbers.
    """
    if len(numbers) > len(given):
        return {}
    readings = {given: True}
    for number in numbers:
        options = [((number,), True)]
        if (result := made.get(Fraction(number))) is not None:
            options.insert(0, result)
        further: dict[Numbers, bool] = {}
        for left, true in readings.items():
            for used, also_true in options:
                rest = _without(left, used)
                if rest is not None:
                    further.setdefault(rest, true and also_true)
        readings = further
    return readings


def _without(numbers: Numbers, used: Numbers) -> Numbers | None:
    """The numbers that are left; None if not all that were used are among them."""
    rest = list(numbers)
    for number in used:
        if number not in rest:
            return None
        rest.remove(number)
    return tuple(rest)


def _value(answer: str | None) -> Fraction | None:
    try:
        return parse(answer).value if answer is not None else None
    except ExpressionError:
        return None
