"""Held-out success with its 95 % interval, pass@k, by difficulty.

Every completion is sampled with plain `model.generate` and judged by the same rewards as in
training. Batches have a fixed content and a seed of their own, so the result does not depend on
the number of processes, and the training's random state is untouched.

    mini-r1 eval runs/tiny-cpu --num-puzzles 1000 --num-samples 4
"""

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import rich
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mini_r1 import InputError
from mini_r1.behaviors import behavior, summarize_behaviors
from mini_r1.countdown.puzzles import Puzzle, uniform_hash
from mini_r1.countdown.solver import Difficulty, difficulty
from mini_r1.data import Split, load_split
from mini_r1.launch.memory import EVALUATION_BATCH
from mini_r1.model import load_model, load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import TaskConfig
from mini_r1.rewards import equation_reward, format_reward
from mini_r1.run import Evaluation, Example, Group, weights_and_task

RULE = "every given number used exactly once, exact arithmetic"


@dataclass(frozen=True)
class Sample:
    """One judged completion of one held-out puzzle; `tokens` counts the end-of-sequence token."""

    nums: tuple[int, ...]
    target: int
    completion: str
    tokens: int
    truncated: bool
    format: float
    equation: float


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
    tokenizer = load_tokenizer(weights)
    PROMPT_TEMPLATES[task.prompt_template].renderer(tokenizer, chat_template_kwargs)
    puzzles = heldout_puzzles(load_split(task), task)
    model = load_model(weights)
    with progress_bar(len(puzzles) * task.num_eval_samples, Path(name).name) as on_batch:
        batches = sample_batches(
            model,
            tokenizer,
            puzzles,
            task,
            max_completion_length=max_completion_length,
            chat_template_kwargs=chat_template_kwargs,
            seed=seed,
            on_batch=on_batch,
        )
    samples = [sample for _, batch in batches for sample in batch]
    return summarize(
        samples, task, max_completion_length=max_completion_length, model=name, seed=seed
    )


def heldout_puzzles(split: Split, task: TaskConfig) -> tuple[Puzzle, ...]:
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
    what = TextColumn(f"evaluating {name}")
    columns = (what, BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(name, total=completions)
        yield lambda new: progress.advance(task, new)


def sample_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    puzzles: Sequence[Puzzle],
    task: TaskConfig,
    *,
    max_completion_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
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
        on_batch: called after each batch with the number of completions it held.

    Returns:
        (batch index, its samples), the samples of one puzzle side by side.
    """
    # What all batches share.
    num_samples, template = task.num_eval_samples, PROMPT_TEMPLATES[task.prompt_template]
    render = template.renderer(tokenizer, chat_template_kwargs)
    per_batch = max(1, EVALUATION_BATCH // num_samples)  # puzzles
    stops = stop_ids(model, tokenizer)
    generation = sampling(model, tokenizer, task, max_completion_length, num_samples)
    # Leave the training as it was: its mode, and its random state.
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    batches = []
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        num_batches = math.ceil(len(puzzles) / per_batch)
        for first in range(0, num_batches, num_processes):
            # Under ZeRO-3 all processes must generate together: one without a batch of its own
            # repeats the last, for nothing.
            index = min(first + process, num_batches - 1)
            batch = puzzles[index * per_batch : (index + 1) * per_batch]
            torch.manual_seed(uniform_hash("evaluate", seed, index) >> 1)

            # Sample: [batch, prompt] -> [batch * num_samples, prompt + completion].
            prompts = [render(puzzle.nums, puzzle.target) for puzzle in batch]
            inputs = tokenize(tokenizer, prompts).to(model.device)
            sequences = model.generate(  # ty: ignore[not-callable]  (GenerationMixin's)
                **inputs, generation_config=generation
            )

            # Judge: [batch * num_samples, completion].
            if index == first + process:
                completions = sequences[:, inputs["input_ids"].shape[1] :].tolist()
                repeated = [puzzle for puzzle in batch for _ in range(num_samples)]
                batches.append((index, _judge(repeated, completions, tokenizer, stops)))
                on_batch(len(completions))
    model.train(was_training)
    return batches


def summarize(samples: Sequence[Sample], task: TaskConfig, **facts: Any) -> Evaluation:
    """What `eval/*.json` holds.

    Args:
        samples: puzzle by puzzle, `num_eval_samples` of each.
        facts: added as they are.
    """
    num_samples = task.num_eval_samples
    by_puzzle = [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]
    correct = [sum(int(sample.equation) for sample in group) for group in by_puzzle]
    pass_at = {
        str(k): fmean(pass_at_k(num_samples, c, k) for c in correct)
        for k in _powers_of_two(num_samples)
    }
    difficulties = [difficulty(group[0].nums, group[0].target) for group in by_puzzle]
    behaviors = [behavior(sample.completion, sample.target, sample.nums) for sample in samples]
    result: Evaluation = {
        "success": fmean(sample.equation for sample in samples),
        "ci95": confidence_interval(correct, num_samples),
        "pass_at": pass_at,
        "by_difficulty": _by_difficulty(correct, difficulties, num_samples),
        "plus_minus_only_share": fmean(d is not None and d.plus_minus_only for d in difficulties),
        "format": fmean(sample.format for sample in samples),
        "behaviors": summarize_behaviors(behaviors),
        "mean_completion_tokens": fmean(sample.tokens for sample in samples),
        "truncated": fmean(sample.truncated for sample in samples),
        "num_puzzles": len(by_puzzle),
        "num_samples": num_samples,
        "temperature": task.eval_temperature,
        "split": f"held-out, split_seed {task.split_seed}, test_share {task.test_share}",
        "rule": RULE,
        "examples": [_example(group[0]) for group in by_puzzle[:3]],
        **facts,
    }
    return result


def describe(result: Evaluation) -> str:
    """The result for people, a few lines."""
    low, high = result["ci95"]
    passed = (f"{share:.1%} at {k}" for k, share in result["pass_at"].items())
    return (
        f"held-out success  {result['success']:.1%} (95 % interval {low:.1%} to {high:.1%}; "
        f"{result['num_puzzles']} puzzles x {result['num_samples']}, "
        f"temperature {result['temperature']})\n"
        f"pass@k            {', '.join(passed)}\n"
        f"completion tokens {result['mean_completion_tokens']:.0f}, "
        f"{result['truncated']:.0%} truncated\n"
        f"puzzles           {result['split']}; {result['plus_minus_only_share']:.0%} need only "
        "+ and -\n"
        f"rule              {result['rule']}"
    )


def _example(sample: Sample) -> Example:
    return {
        "nums": sample.nums,
        "target": sample.target,
        "completion": sample.completion,
        "solved": sample.equation == 1.0,
    }


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of the samples hold a correct one.

    1 - C(n-c, k) / C(n, k), which is unbiased (Chen et al., arXiv:2107.03374).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def confidence_interval(correct: Sequence[int], num_samples: int) -> tuple[float, float]:
    """The 95 % interval of the mean success: Wilson's, with the puzzles as the independent units.

    Samples of one puzzle resemble each other, so `num_puzzles * num_samples` would promise too
    much. The effective number of samples is the one whose binomial variance equals the variance
    seen between puzzles (Kish's design effect); with one sample per puzzle this is Wilson's
    interval itself.

    Args:
        correct: correct samples per puzzle, each 0 to `num_samples`.
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


def _judge(
    puzzles: Sequence[Puzzle],
    completions: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: set[int],
) -> list[Sample]:
    lengths, truncated = [], []
    for ids in completions:
        end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
        truncated.append(end is None)
        lengths.append(len(ids) if end is None else end + 1)
    kept = [ids[:length] for ids, length in zip(completions, lengths, strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    formats = format_reward(texts)
    targets, numbers = [p.target for p in puzzles], [p.nums for p in puzzles]
    equations = equation_reward(texts, target=targets, nums=numbers)
    columns = zip(puzzles, texts, lengths, truncated, formats, equations, strict=True)
    return [Sample(puzzle.nums, puzzle.target, *rest) for puzzle, *rest in columns]


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


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in [*configured, tokenizer.eos_token_id] if token is not None}


def _powers_of_two(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length()) if 2**i <= largest]


def _by_difficulty(
    correct: Sequence[int], difficulties: Sequence[Difficulty | None], num_samples: int
) -> dict[str, dict[str, Group]]:
    """Success by each measure of difficulty and its values: {"numbers": {"3": ...}, ...}."""
    counts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for count, found in zip(correct, difficulties, strict=True):
        measures: dict[str, Any] = asdict(found) if found else {"solvable": False}
        if found:
            bands = (label for limit, label in _SOLUTION_BANDS if found.solutions <= limit)
            measures["solutions"] = next(bands)
        for measure, value in measures.items():
            counts[measure][str(value).lower()].append(count)

    def group(of_group: Sequence[int]) -> Group:
        return {
            "success": fmean(of_group) / num_samples,
            "ci95": confidence_interval(of_group, num_samples),
            "num_puzzles": len(of_group),
        }

    return {
        measure: {value: group(values[value]) for value in sorted(values, key=_band_order)}
        for measure, values in counts.items()
    }


def _band_order(value: str) -> tuple[int, str]:
    """Sorts the values of one measure of difficulty: 2-3 before 10+, false before true."""
    digits = "".join(takewhile(str.isdigit, value))
    return int(digits or 0), value


_SOLUTION_BANDS = [(1, "1"), (3, "2-3"), (9, "4-9"), (math.inf, "10+")]
