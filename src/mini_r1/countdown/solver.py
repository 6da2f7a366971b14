"""Which targets can be reached, a solution, how hard a puzzle is; exact, for two to six numbers.

The values of a multiset of numbers are built from those of its parts: every split into two parts,
every pair of their values, every operator. Signs are left out of the table: with |x| and |y| known,
x + y and x - y are |x| + |y| or ||x| - |y|| up to a sign, which halves the work and loses no target
(the grammar has a unary minus).

When one target is asked for, the way leads back from it: the second operand of the last step
follows from the first, and becomes the target of its part. Only the smaller parts are tabled, so
six numbers take a fraction of a second, and four less than a millisecond.

Out of scope: targets that are not integers, and the television game's rule that numbers may be left
out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations
from math import gcd

MIN_NUMBERS, MAX_NUMBERS = 2, 6
# Every set of operators is a number from 0 to 15, a bit for each operator. Which sets are enough to
# make a value is a mask of 16 bits, a bit for each set: a step needs a set that is enough for both
# operands and holds its operator, so one `&` does it.
OPERATORS = "+-*/"
PLUS_MINUS, PLUS_MINUS_TIMES, ALL_OPERATORS = 0b0011, 0b0111, 0b1111
_SETS = range(16)
_HOLDING = {
    operator: sum(1 << each for each in _SETS if each >> place & 1)
    for place, operator in enumerate(OPERATORS)
}

# A value is a reduced fraction (numerator >= 0, denominator > 0): tuples of ints are six times
# faster than fractions.Fraction.
Value = tuple[int, int]
Numbers = tuple[int, ...]
# In how many different ways a value can be made, and which sets of operators are enough for it.
Ways = tuple[int, int]
_NO_WAY: Ways = (0, 0)
_ANY_SET = (1 << len(_SETS)) - 1


@dataclass(frozen=True)
class Difficulty:
    """How hard a solvable puzzle is.

    Attributes:
        numbers: how many numbers are given.
        operator_kinds: the fewest kinds of operators that any solution needs, 1 to 4.
        solutions: how many solutions there are. Two are the same when they differ in the order of
            the operands of + and *, or in where a minus sign stands; `(1 + 2) + 3` and
            `1 + (2 + 3)` are two.
        plus_minus_only: whether + and - alone are enough.
    """

    numbers: int
    operator_kinds: int
    solutions: int
    plus_minus_only: bool


def reachable(nums: Iterable[int]) -> set[int]:
    """All integers >= 0 that the numbers can make, each number used exactly once.

    -n can be made exactly when n can.

    Raises:
        ValueError: not two to six non-negative integers.
    """
    values = _values(check_numbers(nums))
    return {numerator for numerator, denominator in values if denominator == 1}


def solve(nums: Iterable[int], target: int) -> str | None:
    """One solution such as `(19 + 36) + 10`, or None if there is none.

    It does without * and / where + and - are enough.

    Raises:
        ValueError: not two to six non-negative integers.
    """
    numbers = check_numbers(nums)
    _, enough = _ways(numbers, (abs(target), 1), _tabled(numbers))
    for operators in (PLUS_MINUS, PLUS_MINUS_TIMES, ALL_OPERATORS):
        if enough >> operators & 1:
            expression = _expression(numbers, (abs(target), 1), operators)
            return expression if target >= 0 else f"-({expression})"
    return None


def difficulty(nums: Iterable[int], target: int) -> Difficulty | None:
    """The difficulty of a puzzle, or None if it has no solution.

    Raises:
        ValueError: not two to six non-negative integers.
    """
    numbers = check_numbers(nums)
    solutions, enough = _ways(numbers, (abs(target), 1), _tabled(numbers))
    if not solutions:
        return None
    return Difficulty(
        numbers=len(numbers),
        operator_kinds=min(each.bit_count() for each in _SETS if enough >> each & 1),
        solutions=solutions,
        plus_minus_only=bool(enough >> PLUS_MINUS & 1),
    )


def check_numbers(nums: Iterable[int]) -> Numbers:
    """The numbers, sorted.

    Raises:
        ValueError: not two to six non-negative integers.
    """
    numbers = tuple(sorted(nums))
    if not MIN_NUMBERS <= len(numbers) <= MAX_NUMBERS:
        raise ValueError(f"want {MIN_NUMBERS} to {MAX_NUMBERS} numbers, got {len(numbers)}")
    if numbers[0] < 0:
        raise ValueError(f"want numbers >= 0, got {list(numbers)}")
    return numbers


@cache
def _index_splits(size: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """All ways to part the places of a tuple in two, the smaller part first."""
    places = range(size)
    return tuple(
        (chosen, tuple(place for place in places if place not in chosen))
        for count in range(1, size // 2 + 1)
        for chosen in combinations(places, count)
    )


@lru_cache(maxsize=4096)
def _splits(numbers: Numbers) -> tuple[tuple[Numbers, Numbers], ...]:
    """All ways to part a multiset in two, the smaller part first, each unordered pair once."""
    found = {}
    for chosen, others in _index_splits(len(numbers)):
        part, other = tuple(numbers[i] for i in chosen), tuple(numbers[i] for i in others)
        if len(part) == len(other) and other < part:
            part, other = other, part
        found[part, other] = None
    return tuple(found)


@lru_cache(maxsize=256)
def _values(numbers: Numbers) -> dict[Value, None]:
    """Every value that the numbers can make, in a fixed order."""
    if len(numbers) == 1:
        return {(numbers[0], 1): None}
    values: dict[Value, None] = {}
    for part, other in _splits(numbers):
        others = _values(other)
        for x in _values(part):
            for y in others:
                for value in _combine(x, y):
                    values[value] = None
    return values


def _combine(x: Value, y: Value) -> list[Value]:
    """All values of one operator between x and y, in either order, signs dropped."""
    (a, b), (c, d) = x, y
    ad, cb, bd = a * d, c * b, b * d
    results = [_reduced(ad + cb, bd), _reduced(abs(ad - cb), bd), _reduced(a * c, bd)]
    if c:
        results.append(_reduced(ad, cb))
    if a:
        results.append(_reduced(cb, ad))
    return results


def _reduced(numerator: int, denominator: int) -> Value:
    if denominator == 1:
        return numerator, 1
    divisor = gcd(numerator, denominator)
    return numerator // divisor, denominator // divisor


def _tabled(numbers: Numbers) -> int:
    """How large a part may be to be tabled: all pairs are, and the smaller parts of any split."""
    return max(2, len(numbers) // 2)


@lru_cache(maxsize=6000)  # the 5,000 pairs of the numbers up to 99
def _table(numbers: Numbers) -> dict[Value, Ways]:
    return {value: _ways(numbers, value, _tabled(numbers) - 1) for value in _values(numbers)}


def _ways(numbers: Numbers, target: Value, tabled: int) -> Ways:
    """In how many ways the numbers make the target, and which sets of operators are enough."""
    if len(numbers) == 1:
        return (1, _ANY_SET) if target == (numbers[0], 1) else _NO_WAY
    ways = enough = 0
    for part, other in _splits(numbers):
        same = part == other
        table = _table(other) if len(other) <= tabled else None
        for x, (ways_x, enough_x) in _table(part).items():
            for operator, _, y in _partners(x, target, other):
                if table is None:
                    ways_y, enough_y = _ways(other, y, tabled)
                else:
                    ways_y, enough_y = table.get(y, _NO_WAY)
                if not ways_y or (same and y < x):
                    continue  # with equal parts (x, y) and (y, x) are one pair
                interchangeable = same and x == y
                ways += ways_x * (ways_x + 1) // 2 if interchangeable else ways_x * ways_y
                enough |= enough_x & enough_y & _HOLDING[operator]
    return ways, enough


def _partners(x: Value, target: Value, other: Numbers) -> list[tuple[str, bool, Value]]:
    """Every (operator, x stands left, y) that makes the target from x: `_combine` inverted.

    y may be out of reach of the other numbers.
    """
    (a, b), (t, u) = x, target
    au, tb, ub = a * u, t * b, u * b
    found = []
    if tb >= au:
        found.append(("+", True, _reduced(tb - au, ub)))
    if au >= tb:
        found.append(("-", True, _reduced(au - tb, ub)))
    if t:
        found.append(("-", False, _reduced(tb + au, ub)))
    if a:
        found.append(("*", True, _reduced(tb, au)))
        if t:
            found.append(("/", True, _reduced(au, tb)))
        if t != u:  # x / y = 1 and y / x = 1 are the same pair
            found.append(("/", False, _reduced(t * a, ub)))
    elif not t:  # 0 * y and 0 / y for any y
        for y in _values(other):
            found.append(("*", True, y))
            if y[0]:
                found.append(("/", True, y))
    return found


def _expression(numbers: Numbers, target: Value, operators: int) -> str:
    """A solution with this set of operators, which is known to be enough."""
    if len(numbers) == 1:
        return str(numbers[0])
    for part, other in _splits(numbers):
        for x, (_, enough_x) in _table(part).items():
            for operator, x_left, y in _partners(x, target, other):
                _, enough_y = _ways(other, y, _tabled(other))
                if (enough_x & enough_y & _HOLDING[operator]) >> operators & 1:
                    left, right = ((part, x), (other, y)) if x_left else ((other, y), (part, x))
                    return f"{_operand(*left, operators)} {operator} {_operand(*right, operators)}"
    raise AssertionError(f"{target} cannot be made from {numbers}")


def _operand(numbers: Numbers, value: Value, operators: int) -> str:
    text = _expression(numbers, value, operators)
    return text if len(numbers) == 1 else f"({text})"
