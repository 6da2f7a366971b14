"""What a completion's thinking does: tries, truth, verification, giving up.

Told exactly, by its arithmetic claims. Works on any text that shows its arithmetic, the embedded
model's and a large model's alike. No language model judges here.
"""

from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from statistics import fmean

from mini_r1.completion import claims, parse_completion
from mini_r1.countdown.expression import ExpressionError, parse

# The given numbers that went into a value, and whether the arithmetic behind it is true.
Result = tuple[Counter[int], bool]
Results = dict[Fraction, Result]


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

    Never raises; linear in the length of the text.
    """
    parsed = parse_completion(completion)
    count = true_count = 0
    given = Counter(nums)
    # The claimed value of each try, and whether all arithmetic behind it is true.
    tries: list[tuple[Fraction, bool]] = []
    recent: Results = {}  # since the last complete try
    earlier: Results = {}
    for claim in claims(parsed.think):
        count += 1
        true_count += claim.true
        value, numbers = parse(claim.right).value, parse(claim.left).numbers
        fitting = _readings(numbers, given, recent)
        fitting = fitting or _readings(numbers, given, ChainMap(recent, earlier))
        complete = [true and claim.true for used, true in fitting if used == given]
        if complete:
            tries.append((value, complete[0]))
            earlier |= recent
            recent = {}
        elif fitting:
            used, true = fitting[0]
            recent[value] = used, true and claim.true
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
    numbers: Sequence[int], given: Counter[int], made: Mapping[Fraction, Result]
) -> list[Result]:
    """What a claim's numbers can stand for without using a given number too often.

    Each is a result made before, or given.
    """
    if len(numbers) > given.total():
        return []
    options: list[list[Result]] = []
    for n in numbers:
        result, as_given = made.get(Fraction(n)), (Counter([n]), True)
        options.append([as_given] if result is None else [result, as_given])
    readings = [
        (sum((used for used, _ in chosen), Counter()), all(true for _, true in chosen))
        for chosen in product(*options)
    ]
    return [(used, true) for used, true in readings if used <= given]


def _value(answer: str | None) -> Fraction | None:
    try:
        return parse(answer).value if answer is not None else None
    except ExpressionError:
        return None
