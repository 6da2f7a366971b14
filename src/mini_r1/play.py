"""Watch a model think about one puzzle: its text as it is written, then the judge's verdict.

If the model found no solution, one is shown.

mini-r1 play runs/tiny-cpu --nums 4 5 12 --target 68
mini-r1 play runs/tiny-cpu                # deals a held-out puzzle
mini-r1 play runs/tiny-cpu --compare      # the base it started from, beside it
"""

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from mini_r1 import InputError, visible
from mini_r1.completion import claims, parse_completion
from mini_r1.countdown.expression import ExpressionError, parse
from mini_r1.countdown.puzzles import Puzzle, PuzzleSpace
from mini_r1.countdown.solver import check_numbers, solve
from mini_r1.data import load_split, row_columns
from mini_r1.evaluate import success_of, success_reward
from mini_r1.generators import FiniteLogits, sampling, tokenize
from mini_r1.model import load_model, load_tokenizer, model_path
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import TaskConfig
from mini_r1.run import is_run, recipe_of, weights_and_task, weights_of

Write = Callable[[str], Any]
NARROWEST_COLUMN = 30  # characters; below twice that, two texts are written one after the other


class TextStream(BaseStreamer):
    """Writes a text while `generate` makes it, token by token; `text` is all of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write):
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] | None = None  # None until the prompt has passed

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = cast(str, self._tokenizer.decode(self._ids, skip_special_tokens=True))
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
        nums, target: the puzzle; None deals one that is held out.
        compare: also let the model think that the run started from.
        temperature: of the sampling; the recipe's evaluation temperature if None.
        seed: of the sampling and the dealing; another one every time if None.

    Raises:
        InputError: no such model, no puzzle, or nothing to compare with.
    """
    base = _base_of(name) if compare else None
    weights, task, max_completion_length, kwargs = weights_and_task(name)
    if temperature is not None:
        task = replace(task, eval_temperature=temperature)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    if (nums is None) != (target is None):
        raise InputError("give both, or neither to be dealt a puzzle", where="--nums and --target")
    further: Mapping[str, Mapping[str, Any]] = {}
    if nums is None or target is None:
        if task.prompt_template in PROMPT_TEMPLATES:
            # Dealing may take a while; a model that cannot be asked is refused at once.
            task.template.renderer(load_tokenizer(weights), kwargs)
        split = load_split(task)
        puzzle, further = random.Random(seed).choice(split.heldout), split.columns
    elif not task.is_countdown:
        raise InputError(
            "this run was not trained on number puzzles; leave it out to be dealt a held-out row",
            where="--nums",
        )
    else:
        try:
            check_numbers(nums)
        except ValueError as error:
            raise InputError(str(error), where="--nums") from None
        puzzle = Puzzle(tuple(nums), target)
    columns_of_row = row_columns(puzzle, further)
    if isinstance(puzzle, Puzzle):
        print(f"Make {puzzle.target} using each of {', '.join(map(str, puzzle.nums))} once.")
        known = is_run(Path(model_path(name))) and task.dataset_id_or_path == "generated"
        if known and (strange := beyond(puzzle, task.space)):
            print(f"This is not what it was trained on: {strange}.")
    else:
        print(visible(task.template.question(columns_of_row)))

    def written(model: str, write: Write) -> str:
        return think(model, columns_of_row, task, max_completion_length, seed, write, kwargs)

    def verdict(text: str) -> str:
        if isinstance(puzzle, Puzzle) and task.success_reward == "equation":
            return judge(text, puzzle)
        reward, tokenizer = success_reward(task), load_tokenizer(weights)
        prompt = task.template.renderer(tokenizer, kwargs, columns_of_row)(columns_of_row)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        (score,) = success_of(reward, [prompt], [text], [ids], [columns_of_row])
        return f"{reward.name}: {score:.3g}"

    if base is None:
        text = written(weights, _to_screen)
        print(f"\n{verdict(text)}")
        return

    def column(title: str, model: str) -> str:
        text = written(model, lambda part: None)
        return f"{title}\n\n{visible(text).strip()}\n\n{verdict(text)}"

    columns = shutil.get_terminal_size().columns
    print(side_by_side(column(base, base), column(name, weights), width=columns))


def beyond(puzzle: Puzzle, space: PuzzleSpace) -> str:
    """What sets a puzzle apart from those of a space, in words; nothing if it is one of them."""
    counts, (low, high), targets = space.num_numbers, space.number_range, space.target_range
    found = []
    if len(puzzle.nums) not in counts:
        found.append(f"{len(puzzle.nums)} numbers instead of {' or '.join(map(str, counts))}")
    if strange := [str(number) for number in puzzle.nums if not low <= number <= high]:
        found.append(f"{', '.join(strange)} instead of {low} to {high}")
    if not targets[0] <= puzzle.target <= targets[1]:
        found.append(f"target {puzzle.target} instead of {targets[0]} to {targets[1]}")
    return "; ".join(found)


def _to_screen(part: str) -> None:
    print(visible(part), end="", flush=True)


def think(
    weights: str,
    columns: Mapping[str, Any],
    task: TaskConfig,
    max_completion_length: int,
    seed: int,
    write: Write,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """One completion of a model for a row of data, written as it comes; returns the whole."""
    tokenizer = load_tokenizer(weights)
    render = task.template.renderer(tokenizer, chat_template_kwargs, columns)
    model = load_model(weights)
    inputs = tokenize(tokenizer, [render(columns)])
    generation = sampling(model, tokenizer, task, max_completion_length)
    stream, logits = TextStream(tokenizer, write), FiniteLogits()
    torch.manual_seed(seed)
    with torch.inference_mode():
        model.generate(  # ty: ignore[not-callable]  (GenerationMixin's)
            **inputs.to(model.device),
            generation_config=generation,
            logits_processor=logits.as_list(),
            streamer=stream,
        )
    logits.check()
    return stream.text


def judge(text: str, puzzle: Puzzle) -> str:
    """The judge's verdict with its reason, and what the thinking's arithmetic is worth.

    With a solution, if the model found none.
    """
    reason = _what_is_wrong(parse_completion(text).answer, puzzle)
    found = list(claims(parse_completion(text).think))
    arithmetic = f"{sum(claim.true for claim in found)} of {len(found)} arithmetic claims are true"
    if reason is None:
        return f"solved\n{arithmetic}"
    solution = solve(puzzle.nums, puzzle.target)
    rescue = f"a solution: {solution} = {puzzle.target}"
    if solution is None:
        rescue = "this puzzle has no solution"
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
    """Two texts as columns of a screen so many characters wide.

    One stands below the other if the screen is too narrow for them.
    """
    longest = max(map(len, left.splitlines()))
    if width < 2 * NARROWEST_COLUMN or longest + max(map(len, right.splitlines())) + 4 > width:
        return f"{left}\n\n{right}"
    lines = zip_longest(left.splitlines(), right.splitlines(), fillvalue="")
    return "\n".join(f"{a:<{longest}}    {b}".rstrip() for a, b in lines)


def _base_of(name: str) -> str:
    """The model that a run started from."""
    if not is_run(Path(name)):
        raise InputError(
            f"{name} is no run, so there is no base to compare it with", where="--compare"
        )
    return weights_of(recipe_of(Path(name))["model_name_or_path"])
