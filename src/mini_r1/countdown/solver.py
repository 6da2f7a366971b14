"""Which targets can be reached, a solution, how hard a puzzle is; exact, for two to six numbers.

The values of a multiset of numbers are built from those of its parts: every split into two parts,
every pair of their values, every operator. Signs are left out of the table: with |x| and |y| known,
x + y and x - y are |x| + |y| or ||x| - |y|| up to a sign, which halves the work and loses no target
(the grammar has a unary minus). The last step is never tabled when one target is asked for: its
second operand follows from the first, so six numbers take a second instead of minutes.

Out of scope: targets that are not integers, and the television game's rule that numbers may be left
out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import gcd

MIN_NUMBERS, MAX_NUMBERS = 2, 6
OPERATORS = "+-*/"

# A value is a reduced fraction (numerator >= 0, denominator > 0): tuples of ints are six times
# faster than fractions.Fraction.
Value = tuple[int, int]
Numbers = tuple[int, ...]


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


def reachable(nums: Iterable[int], operators: str = OPERATORS) -> set[int]:
    """All integers >= 0 that the numbers can make, each number used exactly once.

    -n can be made exactly when n can.

    Raises:
        ValueError: not two to six non-negative integers.
    """
    numbers = check_numbers(nums)
    return {numerator for numerator, denominator in _values(numbers, operators) if denominator == 1}


def solve(nums: Iterable[int], target: int) -> str | None:
    """One solution such as `(19 + 36) + 10`, or None if there is none.

    It does without * and / where + and - are enough.

    Raises:
        ValueError: not two to six non-negative integers.
    """
    numbers = check_numbers(nums)
    for operators in ("+-", "+-*", OPERATORS):
        if _can_make(numbers, (abs(target), 1), operators):
            expression = _expression(numbers, (abs(target), 1), operators)
            return expression if target >= 0 else f"-({expression})"
    return None


def difficulty(nums: Iterable[int], target: int) -> Difficulty | None:
    """The difficulty of a puzzle, or None if it has no solution.

    Raises:
        ValueError: not two to six non-negative integers.
    """
    numbers = check_numbers(nums)
    value = (abs(target), 1)
    for kinds in range(1, len(OPERATORS) + 1):
        if any(_can_make(numbers, value, "".join(some)) for some in combinations(OPERATORS, kinds)):
            return Difficulty(
                numbers=len(numbers),
                operator_kinds=kinds,
                solutions=_count_solutions(numbers, value),
                plus_minus_only=_can_make(numbers, value, "+-"),
            )
    return None


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


@lru_cache(maxsize=4096)
def _splits(numbers: Numbers) -> tuple[tuple[Numbers, Numbers], ...]:
    """All ways to part a multiset into two non-empty parts, each unordered pair once."""
    found = {}
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in combinations(range(len(numbers)), size):
            left = tuple(numbers[i] for i in chosen)
            right = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
            found[min((left, right), (right, left))] = None
    return tuple(found)


@lru_cache(maxsize=256)
def _values(numbers: Numbers, operators: str) -> dict[Value, int]:
    """Every value that the numbers can make -> in how many different ways."""
    if len(numbers) == 1:
        return {(numbers[0], 1): 1}
    ways: dict[Value, int] = {}
    for left, right in _splits(numbers):
        same = left == right
        right_items = list(_values(right, operators).items())
        for x, ways_x in _values(left, operators).items():
            for y, ways_y in right_items:
                if same and y < x:
                    continue  # with equal parts (x, y) and (y, x) are one pair
                count = _pairs(ways_x, ways_y, same and x == y)
                for value in _combine(x, y, operators):
                    ways[value] = ways.get(value, 0) + count
    return ways


def _pairs(ways_x: int, ways_y: int, interchangeable: bool) -> int:
    return ways_x * (ways_x + 1) // 2 if interchangeable else ways_x * ways_y


def _combine(x: Value, y: Value, operators: str) -> list[Value]:
    """All values of one operator between x and y, in either order, signs dropped."""
    (a, b), (c, d) = x, y
    ad, cb, bd = a * d, c * b, b * d
    results = []
    if "+" in operators:
        results.append(_reduced(ad + cb, bd))
    if "-" in operators:
        results.append(_reduced(abs(ad - cb), bd))
    if "*" in operators:
        results.append(_reduced(a * c, bd))
    if "/" in operators:
        if c:
            results.append(_reduced(ad, cb))
        if a and x != y:
            results.append(_reduced(cb, ad))
    return results


def _reduced(numerator: int, denominator: int) -> Value:
    if denominator == 1:
        return numerator, 1
    divisor = gcd(numerator, denominator)
    return numerator // divisor, denominator // divisor


def _last_steps(
    numbers: Numbers, target: Value, operators: str
) -> Iterator[tuple[str, Numbers, Value, Numbers, Value]]:
    """Every (operator, left part, left value, right part, right value) that makes the target."""
    for part, other in _splits(numbers):
        values, partners = _values(part, operators), _values(other, operators)
        if len(values) > len(partners):
            part, other, values, partners = other, part, partners, values
        for x in values:
            for operator, x_left, y in _partners(x, target, operators, partners):
                if y in partners and not (part == other and y < x):
                    yield (operator, part, x, other, y) if x_left else (operator, other, y, part, x)


def _partners(
    x: Value, target: Value, operators: str, candidates: Iterable[Value]
) -> Iterator[tuple[str, bool, Value]]:
    """Every (operator, x stands left, y) that makes the target from x: `_combine` inverted."""
    (a, b), (t, u) = x, target
    if "+" in operators and t * b >= a * u:
        yield "+", True, _reduced(t * b - a * u, u * b)
    if "-" in operators:
        if a * u >= t * b:
            yield "-", True, _reduced(a * u - t * b, u * b)
        if t:
            yield "-", False, _reduced(t * b + a * u, u * b)
    if a == 0:
        if t == 0:  # 0 * y and 0 / y for any y
            for y in candidates:
                if "*" in operators:
                    yield "*", True, y
                if "/" in operators and y[0]:
                    yield "/", True, y
        return
    if "*" in operators:
        yield "*", True, _reduced(t * b, u * a)
    if "/" in operators:
        if t:
            yield "/", True, _reduced(a * u, b * t)
        if t != u:  # x / y = 1 and y / x = 1 are the same pair
            yield "/", False, _reduced(t * a, u * b)


def _can_make(numbers: Numbers, target: Value, operators: str) -> bool:
    return next(_last_steps(numbers, target, operators), None) is not None


def _count_solutions(numbers: Numbers, target: Value) -> int:
    count = 0
    for _, left, x, right, y in _last_steps(numbers, target, OPERATORS):
        ways_x, ways_y = _values(left, OPERATORS)[x], _values(right, OPERATORS)[y]
        count += _pairs(ways_x, ways_y, interchangeable=(left, x) == (right, y))
    return count


def _expression(numbers: Numbers, target: Value, operators: str) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    operator, left, x, right, y = next(_last_steps(numbers, target, operators))
    return f"{_operand(left, x, operators)} {operator} {_operand(right, y, operators)}"


def _operand(numbers: Numbers, value: Value, operators: str) -> str:
    text = _expression(numbers, value, operators)
    return text if len(numbers) == 1 else f"({text})"
