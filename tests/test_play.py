import shutil
from pathlib import Path

import pytest

from mini_r1 import InputError, play
from mini_r1.cli import main
from mini_r1.countdown.puzzles import Puzzle, PuzzleSpace
from mini_r1.model import load_tokenizer, model_path
from mini_r1.play import TextStream, beyond, judge, side_by_side, think
from mini_r1.run import RECIPE_FILE, weights_and_task
from tests.tiny_models import build

PUZZLE = Puzzle((4, 5, 12), 68)


def test_the_text_comes_in_parts_that_make_the_whole():
    parts = []
    weights, task, length, _ = weights_and_task("tiny_base")
    text = think(weights, PUZZLE.columns, task, length, 1, parts.append)
    assert len(parts) > 10
    assert "".join(parts) == text + "\n"
    assert "</think>" in text
    assert think(weights, PUZZLE.columns, task, length, 1, lambda part: None) == text


def test_a_letter_of_several_tokens_waits_until_it_is_complete():
    import torch

    tokenizer, parts = load_tokenizer("tiny_base"), []
    stream = TextStream(tokenizer, parts.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for token in tokenizer("5€")["input_ids"]:
        stream.put(torch.tensor([token]))
    assert parts == ["5", "€"]


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        (
            "12+5=17, 17*4=68 yes\n</think>\n<answer>(12+5)*4</answer>",
            "solved\n2 of 2 arithmetic claims are true",
        ),
        (
            "12+5=18\n</think>\n<answer>(12+5)*4 = 68</answer>",
            "solved\n0 of 1 arithmetic claims are true",
        ),
        ("4+5=9", "not solved: no answer: one <answer> must follow the one </think>"),
        (
            "</think>\n<answer>twelve</answer>",
            "not solved: the answer is no equation: unexpected text at character 0",
        ),
        ("</think>\n<answer>12*5</answer>", "not solved: the answer uses 12, 5"),
        ("</think>\n<answer>12*5+4</answer>", "not solved: the answer is worth 64"),
    ],
)
def test_the_verdict_has_its_reason(completion, verdict):
    found = judge(completion, PUZZLE)
    assert found.startswith(verdict)
    assert ("a solution: " in found) == found.startswith("not solved")


def test_an_impossible_puzzle_is_called_so():
    assert judge("", Puzzle((1, 1), 9)).endswith("this puzzle has no solution")


def test_columns_where_they_fit():
    assert side_by_side("a\nbbb", "c", width=80) == "a      c\nbbb"
    assert side_by_side("a" * 50, "b" * 50, width=80) == f"{'a' * 50}\n\n{'b' * 50}"


def test_a_run_beside_its_base(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(model_path("tiny_base"), run)
    play.play(str(run), [4, 5, 12], 68, compare=True, seed=1)
    printed = capsys.readouterr().out
    assert printed.startswith("Make 68 using each of 4, 5, 12 once.\n")
    assert printed.count("arithmetic claims are true") == 2
    assert "tiny_base" in printed
    assert str(run) in printed


SPACE = PuzzleSpace((3, 4), (1, 20), (10, 99))


@pytest.mark.parametrize(
    ("nums", "target", "told"),
    [
        ((1, 2, 20), 10, ""),
        ((1, 2, 3, 4), 99, ""),
        ((1, 2), 50, "2 numbers instead of 3 or 4"),
        ((1, 21, 0, 4), 50, "21, 0 instead of 1 to 20"),
        ((1, 2, 3), 9, "target 9 instead of 10 to 99"),
        ((1, 30), 100, "2 numbers instead of 3 or 4; 30 instead of 1 to 20; target 100 instead of"),
    ],
)
def test_what_a_run_was_not_trained_on(nums, target, told):
    found = beyond(Puzzle(nums, target), SPACE)
    assert found.startswith(told)
    assert bool(found) == bool(told)


@pytest.mark.parametrize("source", ["generated", "puzzles.jsonl", None])
def test_a_puzzle_unlike_those_of_the_training_is_told(source, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(model_path("tiny_base"), run)
    recipe = (run / RECIPE_FILE).read_text()
    if source is None:  # a model that brings no recipe
        (run / RECIPE_FILE).unlink()
    else:
        (run / RECIPE_FILE).write_text(recipe.replace("path: generated", f"path: {source}"))
    play.play(str(run), [44, 19, 35], 98, seed=1)
    told = "This is not what it was trained on: 44, 35 instead of 1 to 20.\n"
    assert (told in capsys.readouterr().out) == (source == "generated")


def test_a_held_out_puzzle_is_dealt(small_task, capsys):
    assert main(["play", small_task, "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert main(["play", small_task, "--seed", "3"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nums", "1", "--target", "3"], "--nums: want 2 to 6 numbers, got 1"),
        (["--target", "3"], "give both, or neither"),
        (["--compare"], "is no run, so there is no base"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["play", "tiny_base", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_asked_is_refused_before_its_weights_are_loaded(tmp_path, capsys):
    config = {"max_position_embeddings": 2048}
    build(tmp_path, "qwen3", config, chat_template="{{ 1 / 0 }}")
    capsys.readouterr()  # DeepSpeed's
    assert main(["play", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "prompt_template: the model's chat template fails" in printed.err
    assert printed.out == ""  # not even a puzzle, whose dealing may take a while


def test_a_run_that_has_saved_nothing_yet(tmp_path):
    shutil.copy(Path(model_path("tiny_base")) / RECIPE_FILE, tmp_path)
    with pytest.raises(InputError, match="no model and no complete checkpoint yet"):
        play.play(str(tmp_path), None, None)
