"""Held-out success with its 95 % interval, pass@k, by difficulty.

Every completion is sampled with plain `model.generate` and judged by the same rewards as in
training. Batches have a fixed content and a seed of their own, so the result does not depend on
the number of processes, and the training's random state is untouched.

    mini-r1 eval runs/tiny-cpu --num-puzzles 1000 --num-samples 4
"""

import asyncio
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any

import rich
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    BatchEncoding,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import LogitsProcessor, LogitsProcessorList

from mini_r1 import InputError, RunFailed, quirks, visible
from mini_r1.behaviors import behavior, summarize_behaviors
from mini_r1.countdown.puzzles import Puzzle, uniform_hash
from mini_r1.countdown.solver import Difficulty, difficulty
from mini_r1.data import Item, Split, load_split, row_columns
from mini_r1.launch.memory import EVALUATION_BATCH
from mini_r1.model import load_model, load_tokenizer
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
) -> Evaluation:
    """Evaluate a run or a model on held-out puzzles, in one process.

    Args:
        name: a run folder, `tiny_base`, a model folder, or a model id of the hub.
        recipe_path: says puzzles, prompt and length; else the recipe beside the weights does, else
            the defaults.
        num_puzzles, num_samples, temperature: override the recipe's.

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
    model = load_model(weights)
    with progress_bar(len(puzzles) * task.num_eval_samples, Path(name).name) as on_batch:
        batches = sample_batches(
            model,
            tokenizer,
            puzzles,
            task,
            max_completion_length=max_completion_length,
            chat_template_kwargs=chat_template_kwargs,
            columns=split.columns,
            seed=seed,
            on_batch=on_batch,
        )
    samples = [sample for _, batch in batches for sample in batch]
    return summarize(
        samples, task, max_completion_length=max_completion_length, model=name, seed=seed
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
    """A bar that counts completions, on a terminal only.

    Yields:
        what to call with the number of new ones.
    """
    console = rich.get_console()
    disable = not (shown and console.is_interactive)
    what = TextColumn("{task.description}", markup=False)  # a name could hold some
    columns = (what, BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(f"evaluating {visible(name)}", total=completions)
        yield lambda new: progress.advance(task, new)


def sample_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    puzzles: Sequence[Item],
    task: TaskConfig,
    *,
    max_completion_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    columns: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    process: int = 0,
    num_processes: int = 1,
    on_batch: Callable[[int], None] = lambda completions: None,
) -> list[tuple[int, list[Sample]]]:
    """Sample and judge this process's share of the batches.

    Args:
        model: a causal language model with `generate`.
        task: says the prompt, the temperature and the number of samples per puzzle.
        max_completion_length: in tokens; longer completions are cut and count as truncated.
        chat_template_kwargs: see `PromptTemplate.renderer`.
        columns: further ones of the puzzles: `Split.columns`.
        on_batch: called after each batch with the number of its completions; by all processes,
            also by one that has only repeated a batch.

    Returns:
        (batch index, its samples), the samples of one puzzle side by side.

    Raises:
        InputError: this model cannot be asked so.
        RunFailed: the success reward returned something else than 0 to 1.
        NoProbabilities: once all is sampled, so that the other processes need not wait.
    """
    # What all batches share.
    num_samples, rows = task.num_eval_samples, [row_columns(item, columns) for item in puzzles]
    render = task.template.renderer(tokenizer, chat_template_kwargs, rows[0])
    reward = success_reward(task)
    per_batch = max(1, EVALUATION_BATCH // num_samples)  # puzzles
    stops = stop_ids(model, tokenizer)
    generation = sampling(model, tokenizer, task, max_completion_length, num_samples)
    logits = FiniteLogits()
    # Leave the training as it was, also when `on_batch` raises: its mode, and its random state.
    devices = [model.device] if model.device.type == "cuda" else []
    batches = []
    with _in_eval_mode(model), torch.inference_mode(), torch.random.fork_rng(devices=devices):
        num_batches = math.ceil(len(puzzles) / per_batch)
        for first in range(0, num_batches, num_processes):
            # Under ZeRO-3 all processes must generate together: one without a batch of its own
            # repeats the last, for nothing.
            index = min(first + process, num_batches - 1)
            places = range(len(puzzles))[index * per_batch : (index + 1) * per_batch]
            torch.manual_seed(uniform_hash("evaluate", seed, index) >> 1)

            # Sample: [batch, prompt] -> [batch * num_samples, prompt + completion].
            prompts = [render(rows[place]) for place in places]
            inputs = tokenize(tokenizer, prompts).to(model.device)
            sequences = model.generate(  # ty: ignore[not-callable]  (GenerationMixin's)
                **inputs, generation_config=generation, logits_processor=logits.as_list()
            )

            # Judge: [batch * num_samples, completion].
            kept = []
            if index == first + process:
                completions = sequences[:, inputs["input_ids"].shape[1] :].tolist()
                kept, truncated = _cut(completions, stops)
                texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
                repeated = [place for place in places for _ in range(num_samples)]
                asked = [prompt for prompt in prompts for _ in range(num_samples)]
                scores = success_of(reward, asked, texts, kept, [rows[i] for i in repeated])
                columns_of_samples = zip(
                    (puzzles[place] for place in repeated),
                    texts,
                    map(len, kept),
                    truncated,
                    format_reward(texts),
                    scores,
                    strict=True,
                )
                batches.append((index, [Sample(*each) for each in columns_of_samples]))
            on_batch(len(kept))
    logits.check()
    return batches


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Generator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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
    passed = (f"{share:.1%} at {k}" for k, share in result["pass_at"].items())
    return (
        f"held-out success  {result['success']:.1%} (95 % interval {low:.1%} to {high:.1%}; "
        f"{result['num_puzzles']} puzzles x {result['num_samples']}, "
        f"temperature {result['temperature']})\n"
        f"pass@k            {', '.join(passed)}\n"
        f"completion tokens {result['mean_completion_tokens']:.0f}, "
        f"{result['truncated']:.0%} truncated\n"
        f"puzzles           {result['split']}{easy}\n"
        f"rule              {result['rule']}"
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


def _cut(
    completions: Sequence[list[int]], stop_ids: set[int]
) -> tuple[list[list[int]], list[bool]]:
    """The tokens of each completion up to its end, and whether it has none."""
    kept, truncated = [], []
    for ids in completions:
        end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
        truncated.append(end is None)
        kept.append(ids if end is None else ids[: end + 1])
    return kept, truncated


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


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> BatchEncoding:
    """Prompts as input_ids and attention_mask, [batch, prompt] each, wherever a model is judged.

    With the special tokens that TRL adds, too, and without the token types that models which
    generate do not take.
    """
    return tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )


def sampling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    max_completion_length: int,
    num_samples: int = 1,
) -> GenerationConfig:
    """How completions are sampled wherever a model is judged.

    At the task's temperature, with nothing else in between.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=task.eval_temperature,
        # Spelt out, since what is left out is filled in from the model's own generation_config.
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_completion_length,
        num_return_sequences=num_samples,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(stop_ids(model, tokenizer)),
    )


class NoProbabilities(RunFailed):
    """A model gave NaN or infinity in place of logits."""


class FiniteLogits(LogitsProcessor):
    """Lets sampling go on where a model's logits are NaN or infinite, and remembers them.

    torch would end it with an error of its own, on a GPU with all else that was under way.
    """

    def __init__(self):
        self._broken: Any = False

    def as_list(self) -> LogitsProcessorList:
        """As `generate` takes it."""
        return LogitsProcessorList([self])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        broken = ~scores.logsumexp(-1, keepdim=True).isfinite()  # [batch, 1]
        self._broken = broken.any() | self._broken  # not looked at yet: a GPU would have to wait
        return scores.masked_fill(broken, 0.0)

    def check(self) -> None:
        """Whether all of them were finite.

        Raises:
            NoProbabilities: they were not; what was sampled means nothing.
        """
        if self._broken:
            raise NoProbabilities(
                "the model gives NaN or infinity in place of probabilities; take one of an earlier "
                "checkpoint, or another dtype"
            )


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in [*configured, tokenizer.eos_token_id] if token is not None}


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
