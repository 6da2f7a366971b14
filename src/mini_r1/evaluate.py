"""Held-out success with its 95 % interval, pass@k, by difficulty.

Every completion is sampled as generators.py says and judged by the same rewards as in training.
Batches have a fixed content and seeds of their own, so the result does not depend on the number of
processes, and the training's random state is untouched.

    mini-r1 eval runs/tiny-cpu --num-puzzles 1000 --num-samples 4
    mini-r1 eval runs/grpo-qwen-2.5-3b-1gpu --vllm
"""

import asyncio
import inspect
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean, variance
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import rich
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)

from mini_r1 import InputError, RunFailed, quirks, visible
from mini_r1.behaviors import behavior, summarize_behaviors
from mini_r1.countdown.puzzles import Puzzle
from mini_r1.countdown.solver import Difficulty, difficulty
from mini_r1.data import Item, Split, load_split, row_columns
from mini_r1.generators import CompletionGenerator, Questions, by_new_vllm, by_transformers
from mini_r1.launch.memory import batch_that_fits, model_shape
from mini_r1.model import gpu_memory, load_model, load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import TaskConfig
from mini_r1.rewards import (
    REWARDS,
    RewardFunction,
    equation_reward,
    format_reward,
    get_reward_functions,
)
from mini_r1.run import Evaluation, Example, Group, OfPuzzles, weights_and_task

if TYPE_CHECKING:
    from transformers import TrainerState

PLAIN_SECONDS = 30.0  # from one line to the next while an evaluation goes on, off a terminal
RULE = "every given number used exactly once, exact arithmetic"


@dataclass(frozen=True)
class Sample:
    """One judged completion of one held-out puzzle or question.

    Attributes:
        tokens: the end-of-sequence token included.
        format: of the format reward.
        success: of the task's success reward, 0 to 1.
    """

    item: Item
    completion: str
    tokens: int
    truncated: bool
    format: float
    success: float


def evaluate_model(
    name: str,
    *,
    recipe_path: str | None = None,
    num_puzzles: int | None = None,
    num_samples: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    vllm: bool = False,
) -> Evaluation:
    """Evaluate a run or a model on held-out puzzles, in one process.

    Args:
        name: a run folder, `tiny_base`, a model folder, or a model id of the hub.
        recipe_path: says puzzles, prompt and length; else the recipe beside the weights does, else
            the defaults.
        num_puzzles, num_samples, temperature: override the recipe's.
        vllm: generate with an engine of vLLM, else with transformers.

    Raises:
        InputError: no such model, data or recipe, or more puzzles asked for than are held out.
    """
    weights, task, max_completion_length, chat_template_kwargs = weights_and_task(name, recipe_path)
    changes = {
        "num_eval_puzzles": num_puzzles,
        "num_eval_samples": num_samples,
        "eval_temperature": temperature,
    }
    task = replace(task, **{key: value for key, value in changes.items() if value is not None})
    # Whatever can be refused is refused before the weights are loaded.
    tokenizer, ours = load_tokenizer(weights), task.prompt_template in PROMPT_TEMPLATES
    if ours:  # else it takes a row of the data
        task.template.renderer(tokenizer, chat_template_kwargs)
    split = load_split(task)
    puzzles = heldout_puzzles(split, task)
    if not ours:
        sample = row_columns(puzzles[0], split.columns)
        task.template.renderer(tokenizer, chat_template_kwargs, sample)
    questions = Questions(
        puzzles, task, tokenizer, max_completion_length, split.columns, chat_template_kwargs, seed
    )
    if vllm:
        by = by_new_vllm(weights, questions)
    else:
        tokens = task.max_prompt_length + max_completion_length
        batch = batch_that_fits(model_shape(weights), tokens, gpu_memory())
        by = by_transformers(load_model(weights), questions, batch=batch)
    bar = progress_bar(len(puzzles) * task.num_eval_samples, Path(name).name)
    with by as generator, bar as on_batch:
        batches = sample_batches(generator, questions, on_batch)
    samples = [sample for _, batch in batches for sample in batch]
    return summarize(
        samples,
        task,
        max_completion_length=max_completion_length,
        generator=generator.name,
        model=name,
        seed=seed,
    )


def heldout_puzzles(split: Split, task: TaskConfig) -> tuple[Item, ...]:
    """The held-out puzzles to evaluate on.

    Raises:
        InputError: fewer are held out than asked for.
    """
    if len(split.heldout) < task.num_eval_puzzles:
        raise InputError(
            f"{task.num_eval_puzzles} asked for, but {len(split.heldout)} puzzles are held out; "
            "lower it, or raise num_puzzles or test_share",
            key="num_eval_puzzles",
        )
    return split.heldout[: task.num_eval_puzzles]


@contextmanager
def progress_bar(
    completions: int, name: str, shown: bool = True
) -> Generator[Callable[[int], None]]:
    """A bar that counts completions; off a terminal a plain line from time to time.

    Yields:
        what to call with the number of new ones.
    """
    console, name = rich.get_console(), f"evaluating {visible(name)}"
    what = TextColumn("{task.description}", markup=False)  # a name could hold some
    columns = (what, BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    disable = not (shown and console.is_interactive)
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(name, total=completions)
        with _plain_lines(name, progress.tasks[0], shown and disable):
            yield lambda new: progress.advance(task, new)


@contextmanager
def _plain_lines(name: str, task: Task, shown: bool) -> Generator[None]:
    """Says how far a task is, beside the result, from a thread: a single batch may take minutes."""
    ended = Event()

    def tell() -> None:
        while not ended.wait(PLAIN_SECONDS):
            far = f"{task.completed:,.0f} of {task.total:,.0f} completions"
            print(f"{name}: {far} after {task.elapsed or 0:.0f} s", file=sys.stderr, flush=True)

    thread = Thread(target=tell, daemon=True)
    if shown:
        thread.start()
    try:
        yield
    finally:
        ended.set()


def sample_batches(
    generator: CompletionGenerator,
    questions: Questions,
    on_batch: Callable[[int], None] = lambda completions: None,
) -> list[tuple[int, list[Sample]]]:
    """Sample and judge this process's share of the batches.

    Args:
        on_batch: called after each batch with the number of its completions; by all processes,
            also by one that has only repeated a batch.

    Returns:
        (batch index, its samples), the samples of one puzzle side by side.

    Raises:
        InputError: this model cannot be asked so.
        RunFailed: the success reward returned something else than 0 to 1.
    """
    puzzles, num_samples = questions.puzzles, questions.task.num_eval_samples
    rows = [row_columns(item, questions.columns) for item in puzzles]
    template, reward = questions.task.template, success_reward(questions.task)
    render = template.renderer(questions.tokenizer, questions.chat_template_kwargs, rows[0])
    per_batch = questions.at_once(generator.batch)
    num_batches = math.ceil(len(puzzles) / per_batch)
    batches = []
    for first in range(0, num_batches, generator.num_processes):
        # One without a batch of its own repeats the last, for nothing: under ZeRO-3 all must
        # generate together.
        index = min(first + generator.process, num_batches - 1)
        places = range(len(puzzles))[index * per_batch : (index + 1) * per_batch]
        prompts = [render(rows[place]) for place in places]
        written = generator.write(prompts, places)
        if not generator.keeps or index != first + generator.process:
            on_batch(0)
            continue

        # Judge: [batch * num_samples].
        ids = [each.ids for each in written]
        texts = questions.tokenizer.batch_decode(ids, skip_special_tokens=True)
        repeated = [place for place in places for _ in range(num_samples)]
        asked = [prompt for prompt in prompts for _ in range(num_samples)]
        scores = success_of(reward, asked, texts, ids, [rows[place] for place in repeated])
        columns_of_samples = zip(
            (puzzles[place] for place in repeated),
            texts,
            map(len, ids),
            (each.truncated for each in written),
            format_reward(texts),
            scores,
            strict=True,
        )
        batches.append((index, [Sample(*each) for each in columns_of_samples]))
        on_batch(len(written))
    return batches


def summarize(samples: Sequence[Sample], task: TaskConfig, **facts: Any) -> Evaluation:
    """What `eval/*.json` holds.

    Args:
        samples: puzzle by puzzle, `num_eval_samples` of each.
        facts: added as they are.
    """
    num_samples = task.num_eval_samples
    by_puzzle = [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]
    scores = [[sample.success for sample in group] for group in by_puzzle]
    pass_at = {
        str(k): fmean(best_of_k(each, k) for each in scores) for k in _powers_of_two(num_samples)
    }
    of_puzzles = _of_puzzles(by_puzzle, scores) if task.is_countdown else {}
    result: Evaluation = {
        "success": fmean(sample.success for sample in samples),
        "ci95": confidence_interval([sum(each) for each in scores], num_samples),
        "pass_at": pass_at,
        **of_puzzles,
        "mean_completion_tokens": fmean(sample.tokens for sample in samples),
        "truncated": fmean(sample.truncated for sample in samples),
        "num_puzzles": len(by_puzzle),
        "num_samples": num_samples,
        "temperature": task.eval_temperature,
        "split": f"held-out, split_seed {task.split_seed}, test_share {task.test_share}",
        "rule": _rule(task),
        "examples": [_example(group[0]) for group in by_puzzle[:3]],
        **facts,
    }
    return result


def _rule(task: TaskConfig) -> str:
    judge = success_reward(task)
    return RULE if judge.function is equation_reward else f"the mean of the reward {judge.name}"


def describe(result: Evaluation) -> str:
    """The result for people, a few lines."""
    low, high = result["ci95"]
    share = result.get("plus_minus_only_share")
    easy = "" if share is None else f"; {share:.0%} need only + and -"
    generator = f"\ngenerated by      {result['generator']}" if "generator" in result else ""
    passed = (f"{share:.1%} at {k}" for k, share in result["pass_at"].items())
    return (
        f"held-out success  {result['success']:.1%} (95 % interval {low:.1%} to {high:.1%}; "
        f"{result['num_puzzles']} puzzles x {result['num_samples']}, "
        f"temperature {result['temperature']})\n"
        f"pass@k            {', '.join(passed)}\n"
        f"completion tokens {result['mean_completion_tokens']:.0f}, "
        f"{result['truncated']:.0%} truncated\n"
        f"puzzles           {result['split']}{easy}\n"
        f"rule              {result['rule']}{generator}"
    )


def _of_puzzles(
    by_puzzle: Sequence[Sequence[Sample]], scores: Sequence[Sequence[float]]
) -> OfPuzzles:
    """What can be said of number puzzles only."""
    samples = [sample for group in by_puzzle for sample in group]
    puzzles = [(sample.item.columns["nums"], sample.item.columns["target"]) for sample in samples]
    difficulties = [difficulty(*puzzle) for puzzle in puzzles[:: len(by_puzzle[0])]]
    behaviors = [
        behavior(sample.completion, target, nums)
        for sample, (nums, target) in zip(samples, puzzles, strict=True)
    ]
    return {
        "by_difficulty": _by_difficulty(scores, difficulties),
        "plus_minus_only_share": fmean(d is not None and d.plus_minus_only for d in difficulties),
        "format": fmean(sample.format for sample in samples),
        "behaviors": summarize_behaviors(behaviors),
    }


def _example(sample: Sample) -> Example:
    columns = sample.item.columns
    row: Any = columns if isinstance(sample.item, Puzzle) else {"row": columns}
    return {**row, "completion": sample.completion, "solved": sample.success == 1.0}


def best_of_k(scores: Sequence[float], k: int) -> float:
    """The expected best of k of the scores; of scores 0 and 1 it is pass@k."""
    levels = [0.0, *sorted({score for score in scores if score > 0})]
    return sum(
        (level - below) * pass_at_k(len(scores), sum(score >= level for score in scores), k)
        for below, level in pairwise(levels)
    )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of the samples hold a correct one.

    1 - C(n-c, k) / C(n, k), which is unbiased (Chen et al., arXiv:2107.03374).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def confidence_interval(correct: Sequence[float], num_samples: int) -> tuple[float, float]:
    """The 95 % interval of the mean success: Wilson's, with the puzzles as the independent units.

    Samples of one puzzle resemble each other, so `num_puzzles * num_samples` would promise too
    much. The effective number of samples is the one whose binomial variance equals the variance
    seen between puzzles (Kish's design effect); with one sample per puzzle this is Wilson's
    interval itself.

    Args:
        correct: correct samples per puzzle, each 0 to `num_samples`; of scores between 0 and 1 the
            sum.
    """
    rates = [c / num_samples for c in correct]
    p, n = fmean(rates), len(rates)
    between = variance(rates) * (n - 1) / n if n > 1 else 0.0
    if between > 0:
        n = min(n * p * (1 - p) / between, n * num_samples)
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half


def success_reward(task: TaskConfig) -> RewardFunction:
    """The reward that is success.

    Raises:
        InputError: there is no such reward.
    """
    return get_reward_functions([task.success_reward], key="eval_reward")[0]


def success_of(
    reward: RewardFunction,
    prompts: Sequence[str],
    texts: Sequence[str],
    ids: Sequence[list[int]],
    rows: Sequence[Mapping[str, Any]],
) -> list[float]:
    """What a reward says of completions outside of a training: 0 (failed) to 1 (solved).

    Args:
        ids: the tokens of the texts.
        rows: what was asked.

    Raises:
        RunFailed: it says something else.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    returned = reward.call(
        prompts=list(prompts),
        completions=list(texts),
        completion_ids=list(ids),
        trainer_state=None if reward.function in REWARDS.values() else _trainer_state(),
        log_extra=lambda *_: None,
        log_metric=lambda *_: None,
        **columns,
    )
    if inspect.isawaitable(returned):
        returned = asyncio.run(_awaited(returned))
    scores = reward.scores(returned, texts, step=0)
    for score in scores:
        if score is None or not 0 <= score <= 1:
            raise RunFailed(
                f"the reward {reward.path} returned {score}, and what is success must be 0 "
                "(failed) to 1 (solved); name another as eval_reward"
            )
    return [score for score in scores if score is not None]


def _trainer_state() -> "TrainerState":
    """That of no training. Importing it takes a second, and our own rewards do not look at it."""
    if not torch.cuda.is_available():
        quirks.quiet_cpu_imports()
    from transformers import TrainerState

    return TrainerState()


async def _awaited(returned: Any) -> Any:
    return await returned


def _powers_of_two(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length()) if 2**i <= largest]


def _by_difficulty(
    scores: Sequence[Sequence[float]], difficulties: Sequence[Difficulty | None]
) -> dict[str, dict[str, Group]]:
    """Success by each measure of difficulty and its values: {"numbers": {"3": ...}, ...}."""
    num_samples = len(scores[0])
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each, found in zip(scores, difficulties, strict=True):
        measures: dict[str, Any] = asdict(found) if found else {"solvable": False}
        if found:
            bands = (label for limit, label in _SOLUTION_BANDS if found.solutions <= limit)
            measures["solutions"] = next(bands)
        for measure, value in measures.items():
            sums[measure][str(value).lower()].append(sum(each))

    def group(of_group: Sequence[float]) -> Group:
        return {
            "success": fmean(of_group) / num_samples,
            "ci95": confidence_interval(of_group, num_samples),
            "num_puzzles": len(of_group),
        }

    return {
        measure: {value: group(values[value]) for value in sorted(values, key=_band_order)}
        for measure, values in sums.items()
    }


def _band_order(value: str) -> tuple[int, str]:
    """Sorts the values of one measure of difficulty: 2-3 before 10+, false before true."""
    digits = "".join(takewhile(str.isdigit, value))
    return int(digits or 0), value


_SOLUTION_BANDS = [(1, "1"), (3, "2-3"), (9, "4-9"), (math.inf, "10+")]
