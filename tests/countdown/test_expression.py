import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mini_r1.countdown.expression import MAX_CHARS, ExpressionError, is_solution, parse
from tests.countdown.reference import reference_value

WRONG = {
    "power": "2**3+1",
    "floor division": "7//2+1",
    "decimal": "1.5*2",
    "leading dot": ".5*4",
    "underscore": "1_000",
    "leading zero": "07+1",
    "two zeros": "00",
    "unary plus": "+3+4",
    "two numbers side by side": "1 2",
    "implicit product": "(1+2)(3)",
    "name": "sqrt(16)",
    "factorial": "4!",
    "import": "__import__('os').system('true')",
    "other script's digits": "٣+٤",
    "full-width digits": "３+４",
    "typographic minus": "3−1",
    "typographic times": "3×2",
    "no-break space": "3\u00a0+4",
    "empty": "",
    "blank": "  \n",
    "empty brackets": "()",
    "open bracket": "(1+2",
    "closing bracket": "1+2)",
    "missing right operand": "1+",
    "missing left operand": "*2",
    "division by zero": "1/(3-3)",
    "zero divided by zero": "0/0",
    "two equals signs": "1+2=3=3",
    "wrong stated value": "1+2=4",
    "stated value is an expression": "1+2=1+2",
    "stated value in brackets": "1+2=(3)",
    "stated value is a decimal": "1+2=3.0",
    "no stated value": "1+2=",
    "only a stated value": "=3",
    "comma": "1,2",
    "null byte": "1+2\x00",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_everything_outside_the_grammar_is_refused(text):
    with pytest.raises(ExpressionError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1+2*3", 7, (1, 2, 3)),
        ("(1+2)*3", 9, (1, 2, 3)),
        ("8/4/2", 1, (8, 4, 2)),
        ("8-4-2", 2, (8, 4, 2)),
        ("-3+8", 5, (3, 8)),
        ("-(3-8)", 5, (3, 8)),
        ("2*-3", -6, (2, 3)),
        ("--3", 3, (3,)),
        ("-2*3+7", 1, (2, 3, 7)),
        ("3 - - 2", 5, (3, 2)),
        (" 1\n+\t2 \r\n", 3, (1, 2)),
        ("1+2 = 3", 3, (1, 2)),
        ("2-5 = - 3", -3, (2, 5)),
        ("1/3*3 = 1", 1, (1, 3, 3)),
        ("0+0", 0, (0, 0)),
        ("8/(3-8/3)", 24, (8, 3, 8, 3)),
    ],
)
def test_values_are_exact(text, value, numbers):
    equation = parse(text)
    assert (equation.value, equation.numbers) == (value, numbers)


def test_near_misses_are_misses():
    assert not is_solution("1/3+1/3+1/3", [1, 1, 1, 3, 3, 3], 2)
    assert is_solution("1/3+1/3+1/3", [1, 1, 1, 3, 3, 3], 1)
    assert not is_solution("1000*1000+0", [0, 1000, 1000], 1_000_005)


@pytest.mark.parametrize("nums", [[1, 2], [1, 2, 3, 3], [1, 2, 4]])
def test_every_number_is_used_exactly_once(nums):
    assert is_solution("1+2+3", [3, 2, 1], 6)
    assert not is_solution("1+2+3", nums, 6)


ARITHMETIC = st.text(alphabet="0123456789+-*/()= \n", max_size=40)
TREES = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.builds("({} {}{})".format, inner, st.sampled_from("+-*/"), inner),
        inner.map("-{}".format),
    ),
    max_leaves=8,
)
STATED = st.builds("{} = {}".format, TREES, st.integers(-99, 99))


@given(st.one_of(ARITHMETIC, TREES, STATED))
@example("1+2=3")
@example("1 - -(2/4)")
def test_agrees_with_an_independent_reference(text):
    try:
        equation = parse(text)
        judged = equation.value, list(equation.numbers)
    except ExpressionError:
        judged = None
    assert judged == reference_value(text)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "(" * 100_000,
        "-" * MAX_CHARS,
        "(" * 249 + "1" + ")" * 249,
        "+".join(f"1/{n}" for n in range(11, 96)),
        "/".join(["9" * 49] * 10),
        "*".join(["9" * 49] * 10),
        "1" * MAX_CHARS,
        " " * 1_000_000,
        "1 " * 1_000_000,
    ],
    ids=lambda text: text[:12],
)
def test_cost_is_bounded(text):
    def seconds():
        started = time.perf_counter()
        is_solution(text, [1, 2, 3], 6)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.005
