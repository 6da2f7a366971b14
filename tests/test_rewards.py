import asyncio
import pickle
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_r1 import InputError
from mini_r1.rewards import TRL_COLUMNS, equation_reward, format_reward, get_reward_functions
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


# ---- Rewards of one's own -------------------------------------------------------------------


@pytest.fixture
def write(own_folder):
    """Writes a file into the current folder."""

    def write(name, text):
        file = own_folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


CALLABLES = """
import functools

def length(completions, limit=1, **columns):
    return [float(len(text) > limit) for text in completions]

async def slow(completions, **columns):
    return length(completions)

def limited(function):
    def inner(**columns):
        return function(limit=1, **columns)
    return functools.wraps(function)(inner)

@limited
def wrapped(completions, limit, **columns):
    return length(completions, limit)

class Longer:
    def __init__(self, limit=1):
        self.limit = limit
    def __call__(self, completions, **columns):
        return length(completions, self.limit)
    def method(self, completions, **columns):
        return length(completions, self.limit)
    @classmethod
    def of_class(cls, completions, **columns):
        return length(completions)

class Slower(Longer):
    async def __call__(self, completions, **columns):
        return length(completions, self.limit)

partial = functools.partial(length, limit=1)
twice = functools.partial(partial, limit=1)
slow_partial = functools.partial(slow)
longer, slower = Longer(), Slower()
slower_partial = functools.partial(slower)
unnamed = lambda completions, **columns: length(completions)
"""


CALLED = ["length", "slow", "partial", "twice", "slow_partial", "longer", "longer.method"]
CALLED += ["Longer.of_class", "slower", "slower_partial", "unnamed", "wrapped"]


@pytest.mark.parametrize("attribute", CALLED)
@pytest.mark.parametrize("path", ["my_task.{}", "my_task:{}", "my_task.py:{}", "./my_task.py:{}"])
def test_whatever_can_be_called_is_a_reward(write, path, attribute):
    write("my_task.py", CALLABLES)
    (reward,) = get_reward_functions([path.format(attribute)])
    assert reward.name == attribute.rpartition(".")[2]
    assert reward.path == path.format(attribute)
    assert reward.is_async is attribute.startswith("slow")
    returned = reward.function(
        **dict.fromkeys((*TRL_COLUMNS, "nums", "target")) | {"completions": ["a", "bb"]}
    )
    assert (asyncio.run(returned) if reward.is_async else returned) == [0.0, 1.0]


def test_a_file_anywhere_is_found(write, tmp_path, monkeypatch):
    write("a folder/my-task.py", "import beside\ndef bonus(completions, **columns): return [1]\n")
    write("a folder/beside.py", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [
        "a folder/my-task.py:bonus",
        "~/a folder/my-task.py",
        f"{tmp_path}/a folder/my-task.py",
    ]
    functions = [get_reward_functions([path])[0].function for path in paths]
    assert functions[0] is functions[1] is functions[2]
    # Safe: what is unpickled was pickled in this line.
    assert pickle.loads(pickle.dumps(functions[0])) is functions[0]
    assert functions[0].__module__ in sys.modules


def test_of_a_package_the_module_or_what_it_exports(write):
    write("mine/__init__.py", "from mine.bonus import bonus\n")
    write("mine/bonus.py", "def bonus(completions, **columns): return [1]\ndef other(**c): ...\n")
    (exported,) = get_reward_functions(["mine.bonus"])
    assert exported.function(completions=["a"]) == [1]
    assert exported.function is sys.modules["mine.bonus"].bonus


BONUS = "def bonus(completions, **columns): return [1.0] * len(completions)\n"


NAMED_ALIKE = """
def decorated():
    def inner(completions, **columns): ...
    return inner

first, second = decorated(), decorated()

def equation_reward(completions, **columns): ...
"""


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["my_task.bonus", "other.bonus"], ["my_task.bonus", "other.bonus"]),
        (["my_task.bonus", "a/my_task.py"], ["HERE.my_task.bonus", "a.my_task.bonus"]),
        (["a.my_task.bonus", "b.my_task.bonus"], ["a.my_task.bonus", "b.my_task.bonus"]),
        (["my_task.bonus", "alike.first", "format"], ["bonus", "inner", "format_reward"]),
        (["alike.first", "alike.second"], ["alike.first", "alike.second"]),
        # Metrics and samples must not take another for ours.
        (["alike.equation_reward", "format"], ["alike.equation_reward", "format_reward"]),
        (["alike.equation_reward", "equation"], ["alike.equation_reward", "equation_reward"]),
    ],
)
def test_equal_names_are_told_apart_by_path(write, tmp_path, paths, names):
    for name in ("my_task", "other", "a/my_task", "b/my_task"):
        write(f"{name}.py", BONUS)
    write("alike.py", NAMED_ALIKE)
    found = [reward.name for reward in get_reward_functions(paths)]
    assert found == [name.replace("HERE", tmp_path.name) for name in names]


@pytest.mark.parametrize(
    "paths",
    [
        ["my_task.bonus", "my_task.bonus"],
        ["my_task.bonus", "./my_task.py:bonus"],
        ["my_task.alias", "my_task.bonus"],
        ["format", "mini_r1.rewards.format_reward"],
    ],
)
def test_the_same_reward_twice_is_refused(write, paths):
    write("my_task.py", f"{BONUS}alias = bonus\n")
    with pytest.raises(InputError, match="are the same reward") as caught:
        get_reward_functions(paths)
    assert caught.value.key == "reward_funcs"


# What is wrong, what my_task.py holds, the path, and what the message says.
MISTAKES = {
    "misspelt": ("", "fromat", "did you mean 'format'"),
    "no such name": ("", "zzz", "choose from format, equation"),
    "no such module": ("", "no_such_module.reward", "no 'no_such_module' is installed, or in /"),
    "nothing of that name": (
        BONUS,
        "my_task.bonsu",
        "my_task.py has no 'bonsu'; did you mean 'b",
    ),
    "nothing alike": (BONUS, "my_task.py:zzz", "my_task.py has no 'zzz'; it has bonus"),
    "nothing in an object": (BONUS, "my_task.bonus.x", "my_task.py has no 'x'; it has bonus"),
    "no function at all": (
        "x = 1\n",
        "my_task.py",
        "'my_task.py' has no function; write",
    ),
    "several": (BONUS + "def b(): ...\n", "my_task.py", "has bonus, b; write my_task.py:NAME"),
    "a module only": (BONUS, "my_task", "no reward 'my_task'; write my_task.py:NAME"),
    "a module of a folder": (BONUS, "mine.module", "has no 'module'; write mine/module.py:NAME"),
    "no such file": ("", "./no_task.py:bonus", "no file /"),
    "a hub id": ("", "owner/reward-model", "no reward 'owner/reward-model'; choose from format"),
    "dots": ("", "..my_task.bonus", "no reward '..my_task.bonus'"),
    "nobody's home": ("", "~nobody-at-all/x.py", "home"),
    "missing dependency": (
        "import os\nimport no_such_dependency\n",
        "my_task.bonus",
        "my_task.py line 2: ModuleNotFoundError: No module named 'no_such_dependency'",
    ),
    "missing name of a dependency": (
        "from json import lods\n",
        "my_task.py:bonus",
        "my_task.py line 1: ImportError: cannot import name 'lods' from 'json'",
    ),
    "raises": (
        "import json\njson.loads('')\n",
        "my_task.bonus",
        "my_task.py line 2: JSONDecode",
    ),
    "raises in a file": ("\n1 / 0\n", "my_task.py:bonus", "my_task.py line 2: ZeroDivisionError: "),
    "raises beside": ("import beside\n", "my_task.bonus", "beside.py line 1: KeyError: 'x'"),
    "many lines": (
        "raise ValueError('a\\nb' * 300)\n",
        "my_task.bonus",
        "line 1: ValueError: a b",
    ),
    "ours to raise": (
        "from mini_r1 import InputError\nraise InputError('no', key='seed')\n",
        "my_task.bonus",
        "cannot import 'my_task.bonus': my_task.py line 2: InputError: seed: no",
    ),
    "ends the program": (
        "import sys\nsys.exit()\n",
        "my_task.bonus",
        "my_task.py line 2: System",
    ),
    "syntax error": (
        "x = 1\nx = = 2\n",
        "my_task.bonus",
        "my_task.py line 2: SyntaxError: inval",
    ),
    "not Python": ("\0", "my_task.py:bonus", "null bytes"),
    "relative import": ("from . import x\n", "./my_task.py", "my_task.py line 1: ImportError: att"),
    "a constant": ("bonus = 0.5\n", "my_task.bonus", "'my_task.bonus' is not callable: 0.5"),
    "ours, a constant": ("", "mini_r1.rewards.REWARDS", "is not callable"),
    "a class": (
        "class Bonus:\n    pass\n",
        "my_task.Bonus",
        "write my_reward = Bonus()",
    ),
    "no columns": (
        "def bonus(completions): return [1.0]\n",
        "my_task.bonus",
        "cannot be called: got an unexpected keyword argument 'prompts'; it gets prompts, compl",
    ),
    "no room for columns": (
        "def bonus(completions, answer): return [1.0]\n",
        "my_task.bonus",
        "cannot be called: got an unexpected keyword argument 'prompts'; it gets prompts, compl",
    ),
    "a method of nothing": (
        "class Bonus:\n    def score(self, completions, **columns): return [1.0]\n",
        "my_task.Bonus.score",
        "'my_task.Bonus.score' is a method; make an object, and name the method of that",
    ),
    "name of a library": (BONUS, "colorsys.bonus", "rename it, or write colorsys.py:bonus"),
    "name of a built-in": (BONUS, "time.bonus", "installed module (built-in), which comes first"),
    "name of an imported one": (
        BONUS,
        "random.bonus",
        "random.py has the name of an installed",
    ),
    "package of that name": (
        BONUS,
        "datasets.bonus",
        "__init__.py has the name of an installed",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_had_is_explained_in_one_line(write, mistake):
    text, path, message = MISTAKES[mistake]
    for name in ("my_task.py", "colorsys.py", "time.py", "random.py", "datasets/__init__.py"):
        write(name, text)
    write("beside.py", "{}['x']\n")
    write("mine/module.py", BONUS)
    with pytest.raises(InputError) as caught:
        get_reward_functions([path])
    assert message in caught.value.problem
    assert caught.value.key == "reward_funcs"
    assert "\n" not in caught.value.problem
    assert len(caught.value.problem) < 400
    with pytest.raises(InputError, match=re.escape(message)):  # a second look finds the same
        get_reward_functions([path])


def test_a_file_with_the_name_of_a_library_is_no_library(write):
    for name in ("colorsys", "datasets", "random"):
        write(f"{name}.py", BONUS)
        (reward,) = get_reward_functions([f"{name}.py:bonus"])
        assert reward.function(completions=["a"]) == [1.0]
    import colorsys

    assert not hasattr(colorsys, "bonus")


def test_modules_beside_a_reward_do_not_stand_in_for_libraries(write, tmp_path):
    """Neither in our commands nor in what they start."""
    for name in ("datasets", "random", "torch", "yaml"):
        write(f"{name}.py", "raise SystemExit('taken for the library')\n")
    write("my_task.py", f"import random, yaml\nassert random.random() < 1\n{BONUS}")
    write("recipe.yaml", "model_name_or_path: tiny_base\nreward_funcs: my_task.bonus\n")
    command = [sys.executable, "-m", "mini_r1", "train", "recipe.yaml", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sys.path.count(str(tmp_path)) == 0
    get_reward_functions(["my_task.bonus"])
    assert sys.path[-1] == str(tmp_path)


def test_imports_in_milliseconds_without_torch():
    code = (
        "import sys, time; started = time.perf_counter(); import mini_r1.rewards;"
        "seconds = time.perf_counter() - started; assert seconds < 0.3, seconds;"
        "assert not {'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- The columns of the data ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        ("def f(completions, words, **columns): pass", ["words", "level"], None),
        ("def f(words, **columns): pass", ["words"], None),
        ("def f(completions, words=None, **columns): pass", ["level"], None),
        (
            "def f(completions, wrods, **columns): pass",
            ["words", "level"],
            "'my_task.f' wants 'wrods', and the data have words, level; write columns: {wrods: its",
        ),
        ("f = functools.partial(lambda a, words, **columns: 0, 1)", ["words"], None),
        (
            f"def f({', '.join(TRL_COLUMNS)}, w): 0",
            ["w", "x"],
            "'my_task.f' cannot be called: got an unexpected keyword argument 'x'; it gets prompts",
        ),
    ],
)
def test_a_reward_wants_the_columns_that_the_data_have(write, reward, columns, message):
    write("my_task.py", f"import functools\n{reward}\n")
    (found,) = get_reward_functions(["my_task.f"])
    if message is None:
        found.check_columns(columns)
    else:
        with pytest.raises(InputError, match=r"^reward_funcs: ") as caught:
            found.check_columns(columns)
        assert message in str(caught.value)
