import json
import random
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mini_r1 import InputError
from mini_r1.countdown.puzzles import Puzzle, generate
from mini_r1.data import (
    Split,
    audit,
    check_head,
    is_heldout,
    load_rows,
    load_split,
    prompt_dataset,
    write_puzzles,
)
from mini_r1.model import load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import TaskConfig
from tests.tiny_models import build_tokenizer

SMALL = TaskConfig(num_puzzles=400, num_numbers=(3,), number_range=(1, 20), target_range=(1, 100))
PUZZLES = tuple(generate(400, 42, SMALL.space))


def keys(puzzles):
    return {puzzle.key for puzzle in puzzles}


def from_file(path, **changes):
    return load_split(TaskConfig(dataset_id_or_path=str(path), **{"num_puzzles": 400, **changes}))


def test_the_parts_share_no_puzzle_and_miss_none():
    split = load_split(SMALL)
    assert not keys(split.train) & keys(split.heldout)
    assert keys(split.train) | keys(split.heldout) == keys(PUZZLES)
    assert 20 <= len(split.heldout) <= 60


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_order_and_duplicates_of_the_rows_do_not_matter(tmp_path, suffix):
    rows = [*PUZZLES, *(Puzzle(puzzle.nums[::-1], puzzle.target) for puzzle in PUZZLES[:50])]
    write_puzzles(rows, tmp_path / f"a{suffix}")
    random.Random(0).shuffle(rows)
    write_puzzles(rows, tmp_path / f"b{suffix}")
    first, second = from_file(tmp_path / f"a{suffix}"), from_file(tmp_path / f"b{suffix}")
    assert first.hash == second.hash == load_split(SMALL).hash
    assert first.duplicates == 50


@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_puzzles_the_first_is_kept(tmp_path, order):
    pairs = [(puzzle, Puzzle(puzzle.nums[::-1], puzzle.target))[::order] for puzzle in PUZZLES]
    write_puzzles([puzzle for pair in pairs for puzzle in pair], tmp_path / "twice.jsonl")
    split = from_file(tmp_path / "twice.jsonl")
    assert {*split.train, *split.heldout} <= {first for first, _ in pairs}


def test_the_hash_tells_which_part_a_puzzle_is_in():
    split = load_split(SMALL)
    moved = Split(split.train[:-1], (split.train[-1], *split.heldout), 0)
    assert moved.hash != split.hash


def test_a_puzzle_is_held_out_wherever_it_stands(tmp_path):
    write_puzzles(PUZZLES[:200], tmp_path / "half.jsonl")
    assert keys(from_file(tmp_path / "half.jsonl").heldout) <= keys(load_split(SMALL).heldout)


def test_a_smaller_subset_is_part_of_a_larger_one(tmp_path):
    write_puzzles(PUZZLES, tmp_path / "all.jsonl")
    small, large = (from_file(tmp_path / "all.jsonl", num_puzzles=n) for n in (100, 300))
    assert keys(small.train) < keys(large.train)
    assert len(small.train) + len(small.heldout) == 100


def test_split_seed_changes_the_parts():
    other = TaskConfig(**{**SMALL.__dict__, "split_seed": 1})
    assert {key for key in keys(PUZZLES) if is_heldout(key, SMALL) != is_heldout(key, other)}


def read(path, **changes):
    """The puzzles of both parts, training rows first."""
    train, heldout = load_rows(TaskConfig(dataset_id_or_path=str(path), **changes))
    return [(list(row.item.nums), row.item.target) for row in (*train, *heldout)]


def refused(path, **changes):
    """The one line that refuses the data, without the path."""
    with pytest.raises(InputError) as caught:
        read(path, **changes)
    message = str(caught.value)
    assert len(message.replace(str(path), "")) <= 300
    assert "\n" not in message
    with pytest.raises(InputError) as in_advance:  # the doctor says the same
        check_head(TaskConfig(dataset_id_or_path=str(path), **changes))
    assert str(in_advance.value) == message
    return message


THREE, FOUR = ([19, 36, 55], 98), ([44, 19, 35, 7], 65)
# How a list may be written in a CSV, and an integer.
NUMS_AS_TEXT = [
    ('"[44, 19, 35]"', [44, 19, 35]),
    ('"[44.0, 19.0, 35.0]"', [44, 19, 35]),
    ("44 19 35", [44, 19, 35]),
    ('"44,19,35"', [44, 19, 35]),
    ("[44 19 35]", [44, 19, 35]),
    ('"[44 19\n 35]"', [44, 19, 35]),  # a long array of numpy's
    ("[44. 19. 35.]", [44, 19, 35]),
    ('"(44, 19)"', [44, 19]),
    ('" [ 44,19 , 35 ] "', [44, 19, 35]),
    ('"[[44, 19, 35]]"', [44, 19, 35]),
    ("\"['44', '19']\"", [44, 19]),
    ('"[""44"", ""19""]"', [44, 19]),
    ('"[0, 7]"', [0, 7]),
    ('"[1.5, 2]"', "line 2: nums: want a whole number, got '1.5'"),
    ('"[44.0.0, 19]"', "line 2: nums: want a whole number, got '44.0.0'"),
    ('"[44, 19, 35"', "line 2: nums: want a whole number, got '[44'"),
    ('"[44, 19)"', "line 2: nums: want a whole number, got '[44'"),
    ('"[44, , 19]"', "line 2: nums: missing"),
    ('"[44, -19]"', "line 2: nums: want numbers >= 0, got [-19, 44]"),
    ("44-19-35", "line 2: nums: want a whole number, got '44-19-35'"),
    ("44;19;35", "line 2: nums: want a whole number, got '44;19;35'"),
    ("1_000 2", "line 2: nums: want a whole number, got '1_000'"),
    ("1e2 3", "line 2: nums: want a whole number, got '1e2'"),
    ("0x1F 3", "line 2: nums: want a whole number, got '0x1F'"),
    ("４４ １９", "line 2: nums: want a whole number, got '４４'"),
    ('"[True, 2]"', "line 2: nums: want a whole number, got 'True'"),
    ('"[nan, 2]"', "line 2: nums: want a whole number, got 'nan'"),
    ('"[np.int64(44), 2]"', "line 2: nums: want a whole number, got 'np.int64(44)'"),
    ("\"__import__('os').abort()\"", "line 2: nums: want a whole number"),
    ('"[]"', "line 2: nums: want 2 to 6 numbers, got 0"),
    ("44", "line 2: nums: want a list such as [19, 36, 55, 7], got 44"),
    ("", "line 2: nums: missing"),
    ('"[1,2,3,4,5,6,7]"', "line 2: nums: want 2 to 6 numbers, got 7"),
    ("9" * 30 + " 2", "line 2: nums: want a whole number"),
    ("9999999999999999999 2", "line 2: nums: want a number of at most 63 bits"),
]


@pytest.mark.parametrize(("text", "expected"), NUMS_AS_TEXT)
def test_lists_in_text(tmp_path, text, expected):
    path = tmp_path / "x.csv"
    path.write_text(f"nums,target\n{text},98\n", encoding="utf-8")
    if isinstance(expected, list):
        assert read(path) == [(expected, 98)]
    else:
        assert f"{path} {expected}" in refused(path)


TARGETS = [
    ("65", 65),
    ("65.0", 65),
    ('"65"', 65),
    ('"65.0"', 65),
    ('" +65 "', 65),
    ("[65]", 65),
    ("-5", -5),  # can be made: the grammar has a minus
    ("6.5e1", 65),
    ("27.4", "want a whole number, got 27.4"),
    ('"27.4"', "want a whole number, got '27.4'"),
    ("true", "want a whole number, got True"),
    ("null", "missing"),
    ('""', "missing"),
    ("NaN", "missing"),
    ("Infinity", "want a whole number, got inf"),
    ("1e300", "want a whole number, got 1e+300"),
    ("[1, 2]", "want a whole number, got [1, 2]"),
    ('{"a": 1}', "want a whole number, got {'a': 1}"),
    (f"{2**63}", "want a number of at most 63 bits, got 9223372036854775808"),
    ('"sixty-five"', "want a whole number, got 'sixty-five'"),
]


@pytest.mark.parametrize(("text", "expected"), TARGETS)
def test_targets(tmp_path, text, expected):
    path = tmp_path / "x.jsonl"
    path.write_text(f'\n{{"nums": [19, 36, 55], "target": {text}}}\n')
    if isinstance(expected, int):
        assert read(path) == [([19, 36, 55], expected)]
    else:
        assert refused(path).endswith(f"{path} line 2: target: {expected}")


NUMS = [
    ("[44.0, 19.0]", [44, 19]),
    ('["44", "19.0"]', [44, 19]),
    ("[[44, 19]]", [44, 19]),
    ("[[44], [19]]", [44, 19]),
    ("[44, 19.5]", "want a whole number, got 19.5"),
    ("[true, 19]", "want a whole number, got True"),
    ("[null, 19]", "missing"),
    ("[NaN, 19]", "missing"),
    ("[-1, 19]", "want numbers >= 0, got [-1, 19]"),
    ("[]", "want 2 to 6 numbers, got 0"),
    ("[[1, 2], [3, 4]]", "want a whole number, got [1, 2]"),
    ("null", "missing"),
    ("NaN", "missing"),
    ("5", "want a list such as [19, 36, 55, 7], got 5"),
    ('{"0": 44, "1": 19}', "want a list such as [19, 36, 55, 7], got {'0': 44, '1': 19}"),
    (f"[{'9' * 400}, 2]", "want a whole number, got 9999"),
    (f'"{"x" * 9000}"', "want a whole number, got 'xxxx"),
]


@pytest.mark.parametrize(("text", "expected"), NUMS)
def test_lists(tmp_path, text, expected):
    path = tmp_path / "x.json"
    path.write_text(f'[{{"nums": [1, 2], "target": 3}},\n{{"nums": {text}, "target": 65}}]')
    if isinstance(expected, list):
        assert read(path)[1] == (expected, 65)
    else:
        assert f"{path} line 2: nums: {expected}" in refused(path)


@pytest.mark.parametrize(
    ("nums", "targets", "expected"),
    [
        (pa.array([[19, 36, 55]], pa.list_(pa.int64())), [98], [THREE]),
        (pa.array([[19, 36, 55]], pa.list_(pa.float32())), [98.0], [THREE]),
        (pa.array([[19, 36, 55]], pa.list_(pa.int8(), 3)), [Decimal("98.00")], [THREE]),
        (pa.array([["19", "36", "55"]], pa.large_list(pa.string())), ["98"], [THREE]),
        (pa.array(["[19 36 55]"]).dictionary_encode(), [98], [THREE]),
        ([[19, 36, 55], [1, None]], [98, 3], "row 2: nums: missing"),
        ([[19, 36, 55], None], [98, 3], "row 2: nums: missing"),
        ([[19, 36, 55], [1, 2]], [98, None], "row 2: target: missing"),
        ([[True, False]], [1], "row 1: nums: want a whole number, got True"),
        ([[1, 2]], [Decimal("3.5")], "row 1: target: want a whole number, got Decimal('3.5')"),
        ([b"[1, 2]"], [3], "row 1: nums: want a list such as [19, 36, 55, 7], got b'[1, 2]'"),
        (pa.array([], pa.list_(pa.int64())), pa.array([], pa.int64()), "holds no rows"),
    ],
)
def test_parquet(tmp_path, nums, targets, expected):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"nums": nums, "target": targets}), path)
    if isinstance(expected, list):
        assert read(path) == expected
    else:
        assert f"{path} {expected}" in refused(path)


# ---- Columns --------------------------------------------------------------------------------

VERL = {
    "data_source": "countdown",
    "prompt": [{"role": "user", "content": "make 98"}],
    "reward_model": {"style": "rule", "ground_truth": {"target": 98, "numbers": [19, 36, 55]}},
    "extra_info": {"split": "train", "index": 0},
}
INSIDE = {
    "nums": "reward_model.ground_truth.numbers",
    "target": "reward_model.ground_truth.target",
}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"numbers": [19, 36, 55], "answer": 98}, {"nums": "numbers", "target": "answer"}),
        ({"numbers": "19 36 55", "target": "98"}, {"nums": "numbers"}),
        (VERL, INSIDE),
        ({**VERL, "reward_model": json.dumps(VERL["reward_model"])}, INSIDE),
        ({"a.b": {"c": [19, 36, 55]}, "t": 98}, {"nums": "a.b.c", "target": "t"}),
        ({"nums": "kept", "x": [19, 36, 55], "target": 98}, {"nums": "x"}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_with_other_names(tmp_path, row, columns, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".jsonl":
        path.write_text(json.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    assert read(path, columns=columns) == [THREE]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"numbers": [1, 2], "target": 3},
            None,
            "columns: no column 'nums' in {}; it has numbers, target; write columns: {{nums: "
            "numbers}}",
        ),
        (
            {"nums": [1, 2], "answer": 3},
            None,
            "columns: no column 'target' in {}; it has nums, answer; write columns: {{target: "
            "its name}}",
        ),
        (
            {"numbers": [1, 2], "target": 3},
            {"nums": "nubmers"},
            "columns: no column 'nubmers' in {}; it has numbers, target; write columns: {{nums: "
            "numbers}}",
        ),
        (VERL, None, "write columns: {{nums: reward_model.ground_truth.numbers}}"),
        (
            VERL,
            {**INSIDE, "target": "reward_model.target"},
            "no column 'reward_model.target' in {}; it has data_source, prompt, "
            "reward_model.style, reward_model.ground_truth.target,",
        ),
        ({f"column_{i}": i for i in range(500)}, None, "it has column_0, column_1,"),
    ],
)
def test_missing_columns_are_explained(tmp_path, row, columns, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    assert message.format(path) in refused(path, columns=columns)


def test_columns_map_names():
    with pytest.raises(InputError, match=r"columns: want names such as \{nums: numbers\}, got"):
        TaskConfig(columns={"nums": 0})


def test_further_columns_are_kept_as_they_are(tmp_path):
    rows = [
        {"nums": puzzle.nums, "target": puzzle.target, "level": {"of": i}, "prompt": "no"}
        for i, puzzle in enumerate(PUZZLES)
    ]
    rows[3]["note"] = "a"
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    split = from_file(path, columns={"depth": "level.of", "again": "level.of"})
    for i, puzzle in enumerate(PUZZLES):
        note = "a" if i == 3 else None
        expected = {"depth": i, "again": i, "level": {"of": i}, "note": note}
        assert list(split.columns[puzzle.key].items()) == list(expected.items())
    tokenizer, template = load_tokenizer("tiny_base"), PROMPT_TEMPLATES["compact"]
    dataset, _ = prompt_dataset(split.train, template, tokenizer, 99, columns=split.columns)
    depths = {Puzzle(tuple(row["nums"]), row["target"]).key: row["depth"] for row in dataset}
    assert depths == {puzzle.key: PUZZLES.index(puzzle) for puzzle in split.train}
    assert dataset[0]["prompt"] != "no"
    assert load_split(SMALL).columns == {}


@pytest.mark.parametrize("row", [{"note": "\ud800"}, {"\ud800": 1}, {"note": {"x": ["\udfff"]}}])
def test_half_a_letter_is_no_text(tmp_path, row):
    path = tmp_path / "x.jsonl"
    write_puzzles(PUZZLES, path)
    lines = [{**json.loads(line), **row} for line in path.open()]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="holds text that is none: 'utf-8' codec can't encode"):
        from_file(path)


def test_columns_that_no_data_set_can_hold_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    write_puzzles(PUZZLES, path)
    lines = [
        {**json.loads(line), "note": i if i % 2 else str(i)} for i, line in enumerate(path.open())
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="the column 'note' cannot go to the rewards"):
        from_file(path)


# ---- The author's parts ---------------------------------------------------------------------


def test_what_the_author_holds_out_is_held_out(tmp_path):
    write_puzzles(PUZZLES[:200], tmp_path / "train.parquet")
    turned = [Puzzle(puzzle.nums[::-1], puzzle.target) for puzzle in PUZZLES[:20]]
    write_puzzles([*turned, *PUZZLES[300:330]], tmp_path / "test.parquet")
    split = from_file(tmp_path, num_puzzles=150)
    assert keys(split.heldout) == keys(PUZZLES[:20]) | keys(PUZZLES[300:330])
    assert keys(split.train) <= keys(PUZZLES[20:200])
    assert (len(split.train), split.duplicates) == (150, 20)
    by_hash = from_file(tmp_path, heldout_split="train")
    assert keys(by_hash.train) | keys(by_hash.heldout) == keys(PUZZLES[:200])


def test_a_training_part_that_was_held_out_is_refused(tmp_path):
    for name in ("train", "test"):
        write_puzzles(PUZZLES[:20], tmp_path / f"{name}.jsonl")
    with pytest.raises(InputError, match=r"0 puzzles in .* leave 0 to train on and 20 held out"):
        from_file(tmp_path)


def test_too_few_puzzles_are_explained(tmp_path):
    write_puzzles(PUZZLES[:1], tmp_path / "one.jsonl")
    with pytest.raises(InputError, match="use more puzzles or another test_share"):
        from_file(tmp_path / "one.jsonl")
    with pytest.raises(InputError, match="num_puzzles: found"):
        load_split(TaskConfig(num_puzzles=100, num_numbers=(2,), number_range=(1, 3)))


def test_long_prompts_are_dropped_and_counted():
    tokenizer, template = load_tokenizer("tiny_base"), PROMPT_TEMPLATES["compact"]
    puzzles = [Puzzle((1, 2, 3), 6), Puzzle((1, 2, 3, 4), 10)]
    length = len(tokenizer(template.render((1, 2, 3), 6, tokenizer))["input_ids"])
    dataset, dropped = prompt_dataset(puzzles, template, tokenizer, max_prompt_length=length)
    assert dataset.to_list() == [
        {"prompt": template.render((1, 2, 3), 6, tokenizer), "target": 6, "nums": [1, 2, 3]}
    ]
    assert dropped == 1
    with pytest.raises(InputError, match="all prompts are longer than 3 tokens"):
        prompt_dataset(puzzles, template, tokenizer, max_prompt_length=3)


def test_a_model_that_cannot_be_asked_is_refused():
    tokenizer = build_tokenizer("qwen3", chat_template="{{ 1 / 0 }}")
    with pytest.raises(InputError, match="prompt_template: the model's chat template fails"):
        prompt_dataset([Puzzle((1, 2), 3)], PROMPT_TEMPLATES["compact"], tokenizer, 99)


def test_audit():
    report = audit([Puzzle((1, 2), 3), Puzzle((2, 1), 3), Puzzle((2, 3), 6), Puzzle((1, 1), 9)])
    assert (report["puzzles"], report["distinct"], report["solvable"]) == (4, 3, 2)
    assert report["plus_minus_only_share"] == 0.5
    assert report["unsolvable_examples"] == ["1,1=9"]
    assert "heldout" not in report
    leaks = audit(PUZZLES[:9], PUZZLES[5:20])
    assert (leaks["heldout"], leaks["also_in_heldout"]) == (15, 4)


def test_writing_elsewhere_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.jsonl or \.parquet"):
        write_puzzles(PUZZLES[:1], tmp_path / "x.csv")
    with pytest.raises(InputError, match="cannot be written"):
        write_puzzles(PUZZLES[:1], tmp_path / "no" / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


# ---- Another task ---------------------------------------------------------------------------

WORDS = [{"words": f"w{i} x", "prompt": "no", "level": i % 3, "note": None} for i in range(40)]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A task of words: its data and its prompt are files in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, [*WORDS, *WORDS[:5]])))
    (tmp_path / "p.jinja").write_text("Say backwards: {{ words }}\n<think>")

    def task(**changes):
        keys = {"dataset_id_or_path": "words.jsonl", "prompt_template": "p.jinja"}
        return TaskConfig(**{**keys, "reward_funcs": ("my_task.backwards",), **changes})

    return task


def test_rows_that_are_no_puzzles_are_parted_in_the_same_way(words):
    task = words()
    split = load_split(task)
    assert (len(split.train) + len(split.heldout), split.duplicates) == (40, 5)
    assert not keys(split.train) & keys(split.heldout)
    assert all(is_heldout(question.key, task) for question in split.heldout)
    assert split.columns == {}
    every = sorted(each.columns["words"] for each in (*split.train, *split.heldout))
    assert every == sorted(row["words"] for row in WORDS)
    assert split.train[0].columns.keys() == {"words", "level", "note"}
    assert load_split(task).hash == split.hash


def test_their_columns_reach_prompt_and_rewards(words):
    task = words(columns={"depth": "level"}, test_share=0.3)
    split, tokenizer = load_split(task), load_tokenizer("tiny_base")
    dataset, _ = prompt_dataset(split.train, task.template, tokenizer, 99)
    assert dataset.column_names == ["prompt", "depth", "words", "note"]
    for row in dataset:
        assert row["prompt"] == f"Say backwards: {row['words']}\n<think>"
        assert row["depth"] == int(row["words"][1:-2]) % 3
    assert check_head(task) == {"depth": 0, "words": "w0 x", "note": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"prompt": "words"}}, "columns: 'prompt' is a name of TRL's; choose another"),
        ({"columns": {"text": "wrods"}}, "columns: no column 'wrods' in words.jsonl; it has words"),
        ({"prompt_template": "note.jinja"}, "prompt_template: a column that is filled in holds no"),
        ({"prompt_template": "text.jinja"}, "'text' is undefined; the row has the columns words"),
        ({"prompt_template": "no.jinja"}, "prompt_template: no.jinja cannot be read"),
        ({"prompt_template": "compact"}, "columns: no column 'nums' in words.jsonl"),
        ({"reward_funcs": ("equation",)}, "columns: no column 'nums' in words.jsonl"),
    ],
)
def test_what_cannot_be_asked_of_them_is_told_in_advance(words, tmp_path, changes, message):
    for name in ("note", "text"):
        (tmp_path / f"{name}.jinja").write_text(f"{{{{ {name} }}}}")
    with pytest.raises(InputError) as caught:
        check_head(words(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_without_a_usable_column_are_refused(words, tmp_path):
    (tmp_path / "only.jsonl").write_text('{"prompt": "Say hello"}')
    with pytest.raises(InputError, match=r"no column of only.jsonl can be used: prompt; TRL takes"):
        check_head(words(dataset_id_or_path="only.jsonl"))
    task = words(dataset_id_or_path="only.jsonl", columns={"words": "prompt"})
    assert check_head(task) == {"words": "Say hello"}
