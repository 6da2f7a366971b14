import re
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mini_r1.behaviors import behavior
from mini_r1.completion import claims, marked, parse_completion
from mini_r1.rewards import equation_reward, format_reward
from tests.countdown.reference import reference_value
from tests.hostile import CORPUS, HOSTILE, fuzz


def test_takes_a_completion_apart():
    parsed = parse_completion(" 1+2=3 </think>\n<answer> 1+2 </answer>")
    assert (parsed.think, parsed.answer, parsed.well_formed) == (" 1+2=3 ", " 1+2 ", True)


@pytest.mark.parametrize(
    ("text", "answer", "well_formed"),
    [
        ("a</think><answer>1</answer>", "1", True),
        ("a</think>\n\n <answer>\n1\n</answer>\n ", "\n1\n", True),
        ("</think><answer>1</answer>", "1", True),
        ("a <answer>2</answer> b</think><answer>1</answer>", "1", True),
        ("a</think><answer> </answer>", " ", False),
        ("a</think><answer></answer>", "", False),
        ("a</think> so <answer>1</answer>", "1", False),
        ("a</think><answer>1</answer> done", "1", False),
        ("<think>a</think><answer>1</answer>", "1", False),
        ("a</think><answer>1</answer><answer>1</answer>", None, False),
        ("a</think><answer><answer>1</answer>", None, False),
        ("a</think><answer>1</answer></answer>", None, False),
        ("a</think></answer>1<answer>", None, False),
        ("a</think><answer>1", None, False),
        ("a</think>b</think><answer>1</answer>", None, False),
        ("<answer>1</answer></think>", None, False),
        ("<answer>1</answer>", None, False),
        ("", None, False),
    ],
)
def test_one_think_block_one_answer(text, answer, well_formed):
    parsed = parse_completion(text)
    assert (parsed.answer, parsed.well_formed) == (answer, well_formed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 + 13 = 21, 24-13=12 low", [("8 + 13", "21", True), ("24-13", "12", False)]),
        (
            "- 99 - 75 + 62 = 24 + 62 = 86",
            [("99 - 75 + 62", "24 + 62", True), ("24 + 62", "86", True)],
        ),
        ("so (8 + 13 = 21), (2+3)*4=20 (yes)", [("8 + 13", "21", True), ("(2+3)*4", "20", True)]),
        ("4 / 3 = 1.33 and 4 / 2 = 2.", [("4 / 2", "2", True)]),
        ("61 - 94 = -33", [("61 - 94", "-33", True)]),
        ("x = 5, -5 = -5, = , 1/0 = 3, 2**2 = 4", []),
        ("no arithmetic at all", []),
    ],
)
def test_finds_the_arithmetic_claims(text, expected):
    found = list(claims(text))
    assert [(claim.left, claim.right, claim.true) for claim in found] == expected
    for claim in found:
        spelt_out = text[claim.start : claim.end]
        assert spelt_out.startswith(claim.left)
        assert spelt_out.endswith(claim.right)


def reference_claims(text):
    """What a claim is, in words that can be read and in time that grows with the square."""
    text = re.sub(r"(?m)^[ \t]*[-*][ \t]+", lambda bullet: " " * len(bullet[0]), text)
    for run in re.finditer(r"[0-9+\-*/()= \t]+", text):
        sides = run[0].split("=")
        if re.match(r"\.[0-9]", text[run.end() :]):
            sides.pop()
        for left, right in pairwise(map(outermost_dropped, sides)):
            values = reference_value(left), reference_value(right)
            if all(values) and not left.removeprefix("-").isdigit():
                yield left, right, values[0][1], values[1][0], values[0][0] == values[1][0]


def outermost_dropped(side):
    while side:
        unclosed = side.count("(") - side.count(")")
        if side[0] in " \t)" or (side[0] == "(" and unclosed > 0):
            side = side[1:]
        elif side[-1] in " \t(" or (side[-1] == ")" and unclosed < 0):
            side = side[:-1]
        else:
            break
    return side


SIDES = st.text(alphabet="0123456789+-*/()() \t\n", max_size=12)
EQUATIONS = st.lists(SIDES, min_size=2, max_size=4).map("=".join)
RUNNING = st.lists(EQUATIONS | st.sampled_from([" so ", ".5", ".", "\n- ", "(", ")"]), max_size=6)


@given(RUNNING.map("".join))
@fuzz
@example("((8+13=21)) (so)")
@example(")(1+1 = 2 and (((1+1) = 2")
@example(")(2)*(3 = (6)( ( = 6)")
def test_claims_agree_with_a_reference(text):
    found = list(claims(text))
    judged = [(each.left, each.right, list(each.numbers), each.value, each.true) for each in found]
    assert judged == list(reference_claims(text))
    assert [text[each.start : each.start + len(each.left)] for each in found] == [
        each.left for each in found
    ]


def test_marked_parts_make_the_whole():
    text = "so 1 + 1 = 3\n99 - 75 + 62 = 24 + 62 = 86, and that is it"
    parts = list(marked(text))
    assert "".join(part for part, _ in parts) == text
    assert [(part, true) for part, true in parts if true is not None] == [
        ("1 + 1 = 3", False),
        ("99 - 75 + 62 = 24 + 62", True),
    ]


@given(HOSTILE)
@fuzz
def test_any_text_is_taken_apart(text):
    parsed = parse_completion(text)
    assert text.startswith(parsed.think)
    assert parsed.answer is None or f"<answer>{parsed.answer}</answer>" in text
    assert not parsed.well_formed or parsed.answer
    assert "".join(part for part, _ in marked(text)) == text
    for claim in claims(text):
        assert text[claim.start : claim.end].startswith(claim.left)
        assert text[claim.start : claim.end].endswith(claim.right)


@pytest.mark.parametrize("entry", [e for e in CORPUS if "solved" in e], ids=lambda e: e["name"])
def test_no_trick_of_the_corpus_is_rewarded(entry):
    columns = {"target": [entry["target"]], "nums": [entry["nums"]]}
    assert equation_reward([entry["text"]], **columns) == [entry["solved"]]


# What is repeated to a megabyte: each was slow once, or aims at a loop of the readers.
DENSE = ["(", ")", " ", "\n", "7", "=", "= ", "1=", "1+", "1+1=", "1+1=2\n", "1+1=2 ", "(1)=", "&"]
DENSE += ["( ", "(1+1=2", "\n- ", "-\t\n", "1 a", "a=b ", "8+3=11,11+13=24\n", "1/8=2/16\n"]
DENSE += ["(" * 499 + "1=1\n", "1+" * 249 + "1=1\n", "9" * 499 + "+1=1\n", "\ud800", "<answer>"]
DENSE += ["+".join(f"1/{n}" for n in range(11, 96)) + "=1\n", "-" * 400 + "1=1\n", "\x1b[31m"]
DENSE += ["<think>", "1*1=1,2*1=2,(3)=3,(4)=4,1+2+3+4=10\n", "==== step 1 nums [1] target "]
MEGABYTE = 1_000_000


@pytest.mark.parametrize("part", DENSE, ids=lambda part: repr(part[:12]))
def test_a_megabyte_of_anything_takes_less_than_50_ms(part):
    text = (part * (MEGABYTE // len(part) + 1))[:MEGABYTE]
    answered = f"</think>\n<answer>{text}</answer>"

    def seconds(read, *arguments):
        times = []
        while len(times) < 5 and (not times or min(times) >= 0.05):  # another process had its turn
            started = time.process_time()
            read(*arguments)
            times.append(time.process_time() - started)
        return min(times)

    assert seconds(lambda: list(marked(text))) < 0.05  # and claims()
    assert seconds(behavior, text, 10, (1, 2, 3, 4)) < 0.05
    assert seconds(format_reward, [answered]) < 0.05
    assert seconds(lambda: equation_reward([answered], target=[10], nums=[[1, 2, 3, 4]])) < 0.05


def test_the_claims_of_a_long_text_are_all_read():
    lines = [f"{n} + {n} = {2 * n}, and so on\n" for n in range(1, 401)]
    assert [claim.value for claim in claims("".join(lines))] == [2 * n for n in range(1, 401)]
    assert len(list(claims("1+1=2\n" * 100_000))) == 1600
