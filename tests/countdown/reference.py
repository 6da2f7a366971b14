"""Independent references: Python's own parser as the judge, and a brute force as the solver."""

import ast
import re
from fractions import Fraction
from itertools import permutations

_OPERATIONS = {
    ast.Add: lambda x, y: x + y,
    ast.Sub: lambda x, y: x - y,
    ast.Mult: lambda x, y: x * y,
    ast.Div: lambda x, y: x / y,
}


def reference_value(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an equation, or None if it is none, by way of Python's parser."""
    if re.search(r"[^0-9+\-*/()= \t\n]|\*\*|//|(?<![0-9])0[0-9]", text) or len(text) > 500:
        return None
    left, equals, stated = re.sub(r"\s", " ", text).partition("=")
    numbers: list[int] = []

    def walk(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(value)):
                numbers.append(value)
                return Fraction(value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATIONS:
                return _OPERATIONS[type(operator)](walk(left), walk(right))
        raise ValueError("not in the grammar")

    try:
        value = walk(ast.parse(left.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    if not equals:
        return value, numbers
    is_integer = re.fullmatch(r" *(- *)?(0|[1-9][0-9]*) *", stated)
    true = is_integer and Fraction(stated.replace(" ", "")) == value
    return (value, numbers) if true else None


def brute_force(nums: tuple[int, ...]) -> set[Fraction]:
    """Every value that can be made from all of the numbers: combine any ordered pair, repeat."""
    found: set[Fraction] = set()
    seen: set[tuple[Fraction, ...]] = set()

    def combine(values: tuple[Fraction, ...]) -> None:
        if values in seen:
            return
        seen.add(values)
        if len(values) == 1:
            found.add(values[0])
            return
        for i, j in permutations(range(len(values)), 2):
            rest = [values[k] for k in range(len(values)) if k not in (i, j)]
            results = [values[i] + values[j], values[i] - values[j], values[i] * values[j]]
            if values[j] != 0:
                results.append(values[i] / values[j])
            for result in results:
                combine(tuple(sorted([*rest, result])))

    combine(tuple(sorted(Fraction(n) for n in nums)))
    return found
