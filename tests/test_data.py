import json
import random

import pytest

from mini_r1 import InputError
from mini_r1.countdown.puzzles import Puzzle, generate
from mini_r1.data import (
    Split,
    audit,
    is_heldout,
    load_puzzles,
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


def test_reads_every_format_and_folders(tmp_path):
    rows = [{"nums": list(puzzle.nums), "target": puzzle.target} for puzzle in PUZZLES[:5]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lines = ["target,nums", *(f'{row["target"]},"{row["nums"]}"' for row in rows), ""]
    (tmp_path / "b.csv").write_text("\n".join(lines))
    write_puzzles(PUZZLES[:5], tmp_path / "c.jsonl")
    write_puzzles(PUZZLES[:5], tmp_path / "d.parquet")
    assert load_puzzles(str(tmp_path)) == list(PUZZLES[:5]) * 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"nums": [1, 2]}\n', r"no column 'target'"),
        (
            "x.jsonl",
            '{"nums": [1, 2], "target": 3}\n{"nums": [1, 2], "target": 27.4}\n',
            r"row 2: no puzzle: want an integer, got 27.4",
        ),
        (
            "x.jsonl",
            '{"nums": [1], "target": 1}\n',
            r"row 1: no puzzle: want 2 to 6 numbers, got 1",
        ),
        ("x.jsonl", '{"nums": 5, "target": 1}\n', r"row 1: no puzzle"),
        ("x.jsonl", "not json\n", r"cannot be read"),
        ("x.parquet", "not parquet", r"cannot be read"),
        ("x.txt", "", r"cannot be read"),
    ],
)
def test_bad_files_are_explained(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_puzzles(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such.jsonl", "no file or folder 'no/such.jsonl'"),
        ("./nothing", "no file or folder"),
        (
            "generatd",
            "no file or folder 'generatd'; write a path, a hub id such as owner/name, or generated",
        ),
        (
            "owner/offline-data-set",
            "cannot be loaded from the hub .* write 'dataset_id_or_path: generated'",
        ),
    ],
)
def test_missing_data_is_explained(source, message):
    with pytest.raises(InputError, match=message):
        load_puzzles(source)


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


def test_writing_elsewhere_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.jsonl or \.parquet"):
        write_puzzles(PUZZLES[:1], tmp_path / "x.csv")
    with pytest.raises(InputError, match="cannot be written"):
        write_puzzles(PUZZLES[:1], tmp_path / "no" / "x.jsonl")
    assert list(tmp_path.iterdir()) == []
