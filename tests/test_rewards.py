import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_r1 import InputError
from mini_r1.rewards import equation_reward, format_reward, get_reward_functions
from tests.countdown.reference import reference_value

# The tutorial's five examples, in our words.
TUTORIAL = [
    " I have 19, 36, 55 and 7 and want 65. Start large: 55 + 36 = 91, which is 26 too much.\n"
    "The other two make 26 together: 19 + 7 = 26. So both are subtracted: "
    "91 - 7 = 84, 84 - 19 = 65. </think>\n"
    "<answer> 55 + 36 - 7 - 19 </answer>",
    " ... </think>\n<answer> 55 + 36 - 7 - 19 </answer>",
    "User: Using the numbers [19, 36, 55, 7], create an equation that equals 65.",
    "To get 79 from 95, 78, 6, 88:\n95 + 88 = 183\n183 - 104 = 79\n"
    "<think> 183 - 104 = 79 </think><think> 183 - 104 = 79 </think>"
    "<answer> 183 - 104 = 79 </answer>",
    " ... </think>\n<answer> 55 + 36 - 7 - 18 </answer>",
]


def test_the_tutorials_examples():
    columns = {"target": ["65"] * 5, "nums": [[19, 36, 55, 7]] * 5}
    assert format_reward(completions=TUTORIAL, **columns) == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert equation_reward(completions=TUTORIAL, **columns) == [1.0, 1.0, 0.0, 0.0, 0.0]


def answer(equation: str) -> str:
    return f"hm</think>\n<answer>{equation}</answer>"


# Exploits and false negatives of other projects' rewards:
# (completion, nums, target, format, equation).
EXPLOITS = {
    "power": (answer("2**3+1"), [1, 2, 3], 9, 1, 0),
    "floor division": (answer("7//2+1"), [1, 2, 7], 4, 1, 0),
    "decimal made of two integers": (answer("1.5*2"), [1, 2, 5], 3, 1, 0),
    "leading dot": (answer(".5*4"), [4, 5], 2, 1, 0),
    "unary minus is allowed": (answer("-3+8"), [3, 8], 5, 1, 1),
    "tower of powers": (answer("9**9**9"), [9, 9, 9], 1, 1, 0),
    "factorial": (answer("4!"), [4], 24, 1, 0),
    "named function": (answer("sqrt(16)+3"), [16, 3], 7, 1, 0),
    "rounding function": (answer("floor(7/2)"), [7, 2], 3, 1, 0),
    "relative tolerance": (answer("1000*1000+0"), [1000, 1000, 0], 1000005, 1, 0),
    "code": (answer("1+2 + __import__('os').system('true')"), [1, 2], 3, 1, 0),
    "right inside the thinking, wrong at the end": (
        "<answer>1+2</answer></think>\n<answer>2-1</answer>",
        [1, 2],
        3,
        1,
        0,
    ),
    "only inside the thinking": ("<answer>1+2</answer></think>", [1, 2], 3, 0, 0),
    "shotgun": ("</think><answer>2-1</answer><answer>1+2</answer>", [1, 2], 3, 0, 0),
    "empty answer": (answer(""), [1, 2], 3, 0, 0),
    "answer on its own lines": (answer("\n1+2\n"), [1, 2], 3, 1, 1),
    "blank line before the answer": ("</think>\n\n<answer>1+2</answer>", [1, 2], 3, 1, 1),
    "no newline before the answer": ("</think><answer>1+2</answer>", [1, 2], 3, 1, 1),
    "stated value": (answer("1+2 = 3"), [1, 2], 3, 1, 1),
    "wrong stated value": (answer("1+2 = 4"), [1, 2], 3, 1, 0),
    "target stated for a wrong equation": (answer("2-1 = 3"), [1, 2], 3, 1, 0),
    "trailing text": (answer("1+2") + " qed", [1, 2], 3, 0, 1),
    "trailing end-of-sequence token": (answer("1+2") + "<|im_end|>", [1, 2], 3, 0, 1),
    "the target itself": (answer("3"), [1, 2], 3, 1, 0),
    "a number twice": (answer("1+2+1-1"), [1, 2], 3, 1, 0),
    "a number left out": (answer("1+2"), [1, 2, 5], 3, 1, 0),
    "numbers run together": (answer("12"), [1, 2], 12, 1, 0),
    "other script's digits": (answer("١+٢"), [1, 2], 3, 1, 0),
}


@pytest.mark.parametrize(
    ("completion", "nums", "target", "format_score", "equation_score"),
    EXPLOITS.values(),
    ids=EXPLOITS,
)
def test_exploits_score_as_the_rules_say(completion, nums, target, format_score, equation_score):
    assert format_reward([completion]) == [format_score]
    assert equation_reward([completion], target=[target], nums=[nums]) == [equation_score]


def test_takes_conversational_completions_and_extra_columns():
    completions = [[{"role": "assistant", "content": answer("1+2")}]]
    assert format_reward(completions, prompts=[""], trainer_state=None) == [1.0]
    assert equation_reward(completions, target=[3], nums=[(1, 2)], completion_ids=[[1]]) == [1.0]


@pytest.mark.parametrize(
    "columns",
    [
        {"target": ["x"], "nums": [[1, 2]]},
        {"target": [3, 3], "nums": [[1, 2]]},
        {"target": [3], "nums": [["a"]]},
    ],
)
def test_a_defect_raises(columns):
    with pytest.raises(ValueError):
        equation_reward([answer("1+2")], **columns)
    with pytest.raises(TypeError):
        equation_reward([answer("1+2")], target=[3])


EQUATIONS = st.text(alphabet="0123456789+-*/()= ", max_size=20)


@given(EQUATIONS, st.lists(st.integers(0, 20), min_size=2, max_size=4), st.integers(-20, 20))
def test_agrees_with_an_independent_reference(equation, nums, target):
    value, numbers = reference_value(equation) or (None, [])
    expected = value == target and sorted(numbers) == sorted(nums)
    assert equation_reward([answer(equation)], target=[target], nums=[nums]) == [float(expected)]


@given(st.permutations([2, 3, 7]), st.lists(st.sampled_from("+-*"), min_size=2, max_size=2))
def test_every_right_answer_is_accepted(nums, operators):
    equation = f"({nums[0]}{operators[0]}{nums[1]}){operators[1]}{nums[2]}"
    target = reference_value(equation)[0]
    assert equation_reward([answer(equation)], target=[int(target)], nums=[[2, 3, 7]]) == [1.0]


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = st.sampled_from([*TAGS, "(", ")", "1", "99", *"+-*/= \né\x00", "9" * 60])


@given(st.one_of(st.text(), st.lists(PIECES, max_size=60).map("".join)), st.integers(1, 2000))
def test_no_text_raises(text, repeats):
    scores = []
    for completion in (text, text * repeats):
        scores += format_reward([completion])
        scores += equation_reward([completion], target=[3], nums=[[1, 2]])
    assert set(scores) <= {0.0, 1.0}


SLOW_TEXTS = [
    "</think>" * 20_000,
    "<answer>" * 20_000,
    "</think>" + "<answer>" * 20_000 + "</answer>" * 20_000,
    "<" * 200_000,
    answer("(" * 100_000),
    answer("1+" * 100_000 + "1"),
    answer("9" * 200_000),
    answer("9**9**9"),
    answer("/".join(["9" * 40] * 12)),
    answer("+".join(f"1/{n}" for n in range(11, 96))),
    answer(" " * 200_000),
]


@pytest.mark.parametrize("text", SLOW_TEXTS, ids=lambda text: text[:30])
def test_no_text_takes_longer_than_5_ms(text):
    def seconds():
        started = time.perf_counter()
        format_reward([text])
        equation_reward([text], target=[3], nums=[[1, 2]])
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.005


def test_registry_and_plug_ins(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def shortness(completions, **columns):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    functions = get_reward_functions(["format", "my_rewards.shortness"])
    assert [function.__name__ for function in functions] == ["format_reward", "shortness"]
    assert functions[1](completions=["a", "b"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fromat", "did you mean 'format'"),
        ("zzz", "choose from format, equation"),
        ("no_such_module.reward", "cannot import"),
        ("mini_r1.rewards.no_such", "has no 'no_such'"),
        ("mini_r1.rewards.REWARDS", "not callable"),
    ],
)
def test_unknown_rewards_are_explained(name, message):
    with pytest.raises(InputError, match=message):
        get_reward_functions([name])


def test_imports_in_milliseconds_without_torch():
    code = (
        "import sys, time; started = time.perf_counter(); import mini_r1.rewards;"
        "seconds = time.perf_counter() - started; assert seconds < 0.3, seconds;"
        "assert not {'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
