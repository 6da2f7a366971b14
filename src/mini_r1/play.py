"""Watch a model think about one puzzle: its text as it is written, the judge's verdict last, and a solution if it found none.

mini-r1 play runs/tiny-cpu --nums 4 5 12 --target 68
mini-r1 play runs/tiny-cpu                # deals a held-out puzzle
mini-r1 play runs/tiny-cpu --compare      # the base it started from, beside it
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.generation.streamers import BaseStreamer

from mini_r1 import InputError
from mini_r1.completion import claims, parse_completion, printable
from mini_r1.countdown.expression import ExpressionError, parse
from mini_r1.countdown.puzzles import Puzzle
from mini_r1.countdown.solver import check_numbers, solve
from mini_r1.data import load_split
from mini_r1.evaluate import sampling, weights_and_task
from mini_r1.model import load_model, load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import TaskConfig

Write = Callable[[str], Any]
NARROWEST_COLUMN = 30  # characters; below twice that, two texts are written one after the other


class TextStream(BaseStreamer):
    """Writes a text while `generate` makes it, token by token; `text` is all of it."""

    def __init__(self, tokenizer: Any, write: Write):
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] | None = None  # None until the prompt has passed

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter that is not complete yet
            self._write(text[len(self.text) :])
            self.text = text

    def end(self) -> None:
        self._write("\n")


def play(
    name: str,
    nums: list[int] | None,
    target: int | None,
    compare: bool = False,
    temperature: float | None = None,
    seed: int | None = None,
) -> None:
    """Let a model think about a puzzle, on the screen.

    Args:
        name: a run folder, an embedded base, a model folder, or a model id of the hub.
        nums, target: the puzzle; None deals one of the held-out puzzles.
        compare: also let the model think that the run started from.
        temperature: of the sampling; the recipe's evaluation temperature if None.
        seed: of the sampling and the dealing; another one every time if None.

    Raises:
        InputError: no such model, no puzzle, or nothing to compare with.
    """
    base = _base_of(name) if compare else None
    weights, task, max_completion_length = weights_and_task(name)
    if temperature is not None:
        task = replace(task, eval_temperature=temperature)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    if (nums is None) != (target is None):
        raise InputError("--nums and --target: give both, or neither to be dealt a puzzle")
    if nums is None:
        puzzle = random.Random(seed).choice(load_split(task).heldout)
    else:
        try:
            check_numbers(nums)
        except ValueError as error:
            raise InputError(f"--nums: {error}") from None
        puzzle = Puzzle(tuple(nums), target)
    print(f"Make {puzzle.target} using each of {', '.join(map(str, puzzle.nums))} once.")
    if base is None:
        text = think(weights, puzzle, task, max_completion_length, seed, lambda part: print(printable(part), end="", flush=True))
        print(f"\n{judge(text, puzzle)}")
        return
    columns = []
    for title, model in ((base, base), (name, weights)):
        text = think(model, puzzle, task, max_completion_length, seed, lambda part: None)
        columns.append(f"{title}\n\n{printable(text).strip()}\n\n{judge(text, puzzle)}")
    print(side_by_side(*columns, width=shutil.get_terminal_size().columns))


def think(weights: str, puzzle: Puzzle, task: TaskConfig, max_completion_length: int, seed: int, write: Write) -> str:
    """One completion of a model for a puzzle, written as it comes; returns the whole."""
    tokenizer, model = load_tokenizer(weights), load_model(weights)
    inputs = tokenizer(PROMPT_TEMPLATES[task.prompt_template].render(puzzle.nums, puzzle.target, tokenizer), return_tensors="pt")
    generation = sampling(model, tokenizer, task, max_completion_length)
    stream = TextStream(tokenizer, write)
    torch.manual_seed(seed)
    with torch.inference_mode():
        model.generate(**inputs.to(model.device), generation_config=generation, streamer=stream)
    return stream.text


def judge(text: str, puzzle: Puzzle) -> str:
    """The judge's verdict with its reason, what the thinking's arithmetic is worth, and a solution if the model found none."""
    reason = _what_is_wrong(parse_completion(text).answer, puzzle)
    found = list(claims(parse_completion(text).think))
    arithmetic = f"{sum(claim.true for claim in found)} of {len(found)} arithmetic claims are true"
    if reason is None:
        return f"solved\n{arithmetic}"
    solution = solve(puzzle.nums, puzzle.target)
    rescue = f"a solution: {solution} = {puzzle.target}" if solution else "this puzzle has no solution"
    return f"not solved: {reason}\n{arithmetic}\n{rescue}"


def _what_is_wrong(answer: str | None, puzzle: Puzzle) -> str | None:
    if answer is None:
        return "no answer: one <answer> must follow the one </think>"
    try:
        equation = parse(answer)
    except ExpressionError as error:
        return f"the answer is no equation: {error}"
    if sorted(equation.numbers) != sorted(puzzle.nums):
        return f"the answer uses {', '.join(map(str, equation.numbers))}"
    if equation.value != puzzle.target:
        return f"the answer is worth {equation.value}"
    return None


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts as columns of a screen so many characters wide, one below the other if it is too narrow for them."""
    longest = max(map(len, left.splitlines()))
    if width < 2 * NARROWEST_COLUMN or longest + max(map(len, right.splitlines())) + 4 > width:
        return f"{left}\n\n{right}"
    lines = zip_longest(left.splitlines(), right.splitlines(), fillvalue="")
    return "\n".join(f"{a:<{longest}}    {b}".rstrip() for a, b in lines)


def _base_of(name: str) -> str:
    """The model that a run started from."""
    try:
        return yaml.safe_load((Path(name) / "recipe.yaml").read_text(encoding="utf-8"))["model_name_or_path"]
    except (OSError, KeyError, TypeError):
        raise InputError(f"--compare: {name} is no run, so there is no base to compare it with") from None
