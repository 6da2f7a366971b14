"""A search through a puzzle: every try, in the one order that all traces follow.

Two of the numbers are combined, the smallest pair first, with one operator after the other until
two numbers are left, and those with the operator that lands nearest to the target. The order is
fixed, so that little but patience differs between two searches.
"""

from collections.abc import Iterator
from itertools import combinations
from operator import itemgetter

from mini_r1.countdown.puzzles import Puzzle

# A number, and the expression that made it.
Item = tuple[int, str]


def tries(
    puzzle: Puzzle, operators: str, largest_result: int
) -> Iterator[tuple[list[str], int, str]]:
    """All ways to make one number of all that are given, in search order.

    Args:
        operators: in the order in which the search goes through them.
        largest_result: results are positive integers up to this.

    Yields:
        the steps such as `5-3=2`, the value of the last one, and the whole as one expression.
    """
    items = [(n, str(n)) for n in puzzle.nums]
    return _tries(items, puzzle.target, operators, largest_result)


def _tries(
    items: list[Item], target: int, operators: str, largest_result: int
) -> Iterator[tuple[list[str], int, str]]:
    for (larger, left), (smaller, right), rest in _pairs(items):
        results = _results(larger, smaller, operators, largest_result)
        if not rest and results:
            nearest = min(results, key=lambda operator: abs(results[operator] - target))
            value = results[nearest]
            yield [f"{larger}{nearest}{smaller}={value}"], value, f"{left}{nearest}{right}"
            continue
        for operator, value in results.items():
            left_over = [*rest, (value, f"({left}{operator}{right})")]
            for steps, last, expression in _tries(left_over, target, operators, largest_result):
                yield [f"{larger}{operator}{smaller}={value}", *steps], last, expression


def _pairs(items: list[Item]) -> Iterator[tuple[Item, Item, list[Item]]]:
    """(larger, smaller, the others) for every two of the items, smallest first.

    Pairs that look alike come once.
    """
    ordered = sorted(items, key=itemgetter(0))
    seen = set()
    for i, j in combinations(range(len(ordered)), 2):
        if (key := (ordered[i][0], ordered[j][0])) not in seen:
            seen.add(key)
            others = [item for k, item in enumerate(ordered) if k not in (i, j)]
            yield ordered[j], ordered[i], others


def _results(larger: int, smaller: int, operators: str, largest_result: int) -> dict[str, int]:
    """What the operators make of two numbers, positive integers only."""
    results = {
        "+": larger + smaller,
        "-": larger - smaller,
        "*": larger * smaller,
        "/": larger // smaller if smaller and larger % smaller == 0 else 0,
    }
    return {
        operator: results[operator]
        for operator in operators
        if 0 < results[operator] <= largest_result
    }
