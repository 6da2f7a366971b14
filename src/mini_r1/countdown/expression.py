"""Text -> exact value: the only judge of an equation in the whole project.

Grammar (ASCII only, whitespace allowed between tokens):

    equation := sum [ "=" [ "-" ] integer ]      the stated value must be the exact value of the sum
    sum      := product (("+" | "-") product)*
    product  := factor (("*" | "/") factor)*
    factor   := "-" factor | integer | "(" sum ")"
    integer  := "0" | [1-9][0-9]*

Values are exact rationals. There is no `eval`, no float and no recursion, and the length of the
text is bounded, so that no completion can stall a training step.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

# The longest accepted text, in characters. A solution with six 3-digit numbers and every possible
# bracket needs about 50; the cap keeps the slowest accepted text (a sum of 1-digit fractions)
# below 2 ms.
MAX_CHARS = 500

_TOKEN = re.compile(r"[ \t\r\n\f\v]*(?:(0(?![0-9])|[1-9][0-9]*)|([-+*/()=]))")
_BLANK = " \t\r\n\f\v"
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3}


class ExpressionError(ValueError):
    """The text is no equation by the grammar above, divides by zero, or states a wrong value."""


@dataclass(frozen=True)
class Equation:
    """A judged equation: its exact `value` and the `numbers` on its left side, in their order."""

    value: Fraction
    numbers: tuple[int, ...]


def parse(text: str) -> Equation:
    """Judge `text` by the grammar.

    Raises:
        ExpressionError: with the reason, in one line.
    """
    if len(text) > MAX_CHARS:
        raise ExpressionError(f"longer than {MAX_CHARS} characters")
    tokens = _tokenize(text)
    if "=" in tokens:
        cut = tokens.index("=")
        left, stated = _evaluate(tokens[:cut]), _stated_value(tokens[cut + 1 :])
        if left.value != stated:
            raise ExpressionError(f"the left side is {left.value}, not {stated}")
        return left
    return _evaluate(tokens)


def is_solution(text: str, nums: Iterable[int], target: int | Fraction) -> bool:
    """Whether `text` is an equation that uses each of `nums` once and is worth exactly `target`."""
    try:
        equation = parse(text)
    except ExpressionError:
        return False
    return equation.value == target and sorted(equation.numbers) == sorted(nums)


def _tokenize(text: str) -> list[int | str]:
    tokens: list[int | str] = []
    text = text.rstrip(_BLANK)
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(
                f"unexpected text at character {position}: {text[position : position + 10]!r}"
            )
        tokens.append(int(match[1]) if match[1] else match[2])
        position = match.end()
    return tokens


def _stated_value(tokens: list[int | str]) -> int:
    match tokens:
        case [int(value)]:
            return value
        case ["-", int(value)]:
            return -value
    raise ExpressionError("after '=' stands one integer")


def _evaluate(tokens: list[int | str]) -> Equation:
    """Shunting-yard: one pass, two stacks, so brackets may nest as deep as the length cap lets."""
    values: list[Fraction | int] = []  # exact alike, and integers are fast
    operators: list[str] = []
    numbers: list[int] = []
    operand_expected = True

    for token in tokens:
        if operand_expected:
            if isinstance(token, int):
                numbers.append(token)
                values.append(token)
                operand_expected = False
            elif token == "-":
                operators.append("neg")
            elif token == "(":
                operators.append("(")
            else:
                raise ExpressionError(f"a number is missing before {token!r}")
        elif token == ")":
            while operators and operators[-1] != "(":
                _apply(operators.pop(), values)
            if not operators:
                raise ExpressionError("a ')' without its '('")
            operators.pop()
        elif token in ("+", "-", "*", "/"):
            while (
                operators
                and operators[-1] != "("
                and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]
            ):
                _apply(operators.pop(), values)
            operators.append(token)
            operand_expected = True
        else:
            raise ExpressionError(f"an operator is missing before {token!r}")

    if operand_expected:
        raise ExpressionError("a number is missing at the end")
    while operators:
        operator = operators.pop()
        if operator == "(":
            raise ExpressionError("a '(' without its ')'")
        _apply(operator, values)
    return Equation(Fraction(values[0]), tuple(numbers))


def _apply(operator: str, values: list[Fraction | int]) -> None:
    right = values.pop()
    if operator == "neg":
        values.append(-right)
        return
    left = values.pop()
    if operator == "+":
        values.append(left + right)
    elif operator == "-":
        values.append(left - right)
    elif operator == "*":
        values.append(left * right)
    elif right == 0:
        raise ExpressionError("division by zero")
    else:
        values.append(Fraction(left, right))
