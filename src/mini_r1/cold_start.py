"""How `tiny_base` is made from nothing: a tokenizer, a small Qwen2, and supervised fine-tuning on generated search traces.

A trace tries combinations one per line, with true arithmetic and a true verdict on each, and never tries the same one twice. Most
traces give up after a failed try or two and answer with what they have; one in twenty is patient. So the base can calculate,
judge its own tries and write a well-formed answer, but is too impatient to solve much: what reinforcement learning then has to
discover is that it pays to keep searching, and where to look first.

    8*3=24, 24-13=11 low
    13+8=21, 21+3=24 yes
    </think>
    <answer>(13+8)+3</answer>

Held-out puzzles (`data.is_heldout`) never appear in a trace. Command: `mini-r1 base build`.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mini_r1.countdown.puzzles import Puzzle, PuzzleSpace, generate
from mini_r1.data import SPLIT_SEED, TEST_SHARE, is_heldout
from mini_r1.prompts import PROMPT_TEMPLATES

PROMPT_TEMPLATE = "compact"
SPACE = PuzzleSpace(num_numbers=(3,), number_range=(1, 20), target_range=(1, 100))

LARGEST_INTEGER_TOKEN = 999
WORD_TOKENS = (
    ["<think>", "</think>", "<answer>", "</answer>", "system", "user", "assistant"]
    + ["Make ", " using each of ", ", ", " once."]
    + [" low\n", " high\n", " yes\n"]
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything the base depends on besides the library versions.

    Attributes:
        num_traces: supervised examples; each puzzle of the training part is used equally often.
        largest_result: tries stay at or below this, which bounds the arithmetic to be learned (every puzzle of SPACE but 0.1 %
            stays solvable).
        directed: how often the last operator of a try is the one that lands nearest to the target; otherwise any.
        patient: the share of traces that search until solved.
        give_up: the chance to give up after each failed try in all other traces.
        max_tries: after so many tries a patient trace gives up, too.
    """

    seed: int = 0
    num_traces: int = 300_000
    largest_result: int = 200
    directed: float = 0.5
    patient: float = 0.05
    give_up: float = 0.6
    max_tries: int = 20
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    batch_size: int = 128
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Term:
    """A number made so far: its value and the text that makes it, bracketed unless it is a given number."""

    value: int
    text: str


def search_trace(puzzle: Puzzle, rng: random.Random, recipe: Recipe) -> str:
    """One completion for the puzzle: the search, a verdict on every try, and the last try as the answer."""
    patient = rng.random() < recipe.patient
    lines: list[str] = []
    seen: set[str] = set()
    while True:
        line, made = _fresh_try(puzzle, rng, recipe, seen)
        seen.add(line)
        verdict = "yes" if made.value == puzzle.target else "low" if made.value < puzzle.target else "high"
        lines.append(f"{line} {verdict}\n")
        gives_up = len(lines) == recipe.max_tries or (not patient and rng.random() < recipe.give_up)
        if verdict == "yes" or gives_up:
            answer = made.text[1:-1]  # without the outer brackets
            return f"\n{''.join(lines)}</think>\n<answer>{answer}</answer>"


def _fresh_try(puzzle: Puzzle, rng: random.Random, recipe: Recipe, seen: set[str]) -> tuple[str, Term]:
    """A random try that is not in `seen`, or any if 30 draws find none: its line and the term it ends with."""
    for _ in range(30):
        terms = [Term(n, str(n)) for n in puzzle.nums]
        steps = []
        while len(terms) > 1:
            rng.shuffle(terms)
            step, made = _step(terms.pop(), terms.pop(), puzzle.target, not terms, rng, recipe)
            steps.append(step)
            terms.append(made)
        line = ", ".join(steps)
        if line not in seen:
            break
    return line, terms[0]


def _step(
    first: Term, second: Term, target: int, is_last: bool, rng: random.Random, recipe: Recipe
) -> tuple[str, Term]:
    """Combine two terms, the larger one first: the step's text and the term it makes."""
    left, right = (first, second) if first.value >= second.value else (second, first)
    results = {"+": left.value + right.value}
    if left.value > right.value:
        results["-"] = left.value - right.value
    if left.value * right.value <= recipe.largest_result:
        results["*"] = left.value * right.value
    if left.value % right.value == 0:
        results["/"] = left.value // right.value
    if is_last and rng.random() < recipe.directed:
        operator = min(results, key=lambda operator: abs(results[operator] - target))
    else:
        operator = rng.choice(list(results))
    value = results[operator]
    return f"{left.value}{operator}{right.value}={value}", Term(value, f"({left.text}{operator}{right.text})")


def traces(recipe: Recipe) -> Iterator[dict[str, object]]:
    """The supervised examples: a puzzle of the training part and a completion for it."""
    rng = random.Random(recipe.seed)
    puzzles = [p for p in generate(16_000, recipe.seed, SPACE) if not is_heldout(p.key, SPLIT_SEED, TEST_SHARE)]
    for index in range(recipe.num_traces):
        if index % len(puzzles) == 0:
            rng.shuffle(puzzles)
        puzzle = puzzles[index % len(puzzles)]
        yield {"puzzle": puzzle, "completion": search_trace(puzzle, rng, recipe)}


def build_tokenizer():
    """A lossless tokenizer whose integers 0..999, tags and frequent phrases are one token each; everything else falls to bytes.

    It is a Qwen2Tokenizer because AutoTokenizer rebuilds that class for every qwen2 model, with Qwen's own pre-tokenizer, whatever
    tokenizer.json says. Added tokens are matched before the pre-tokenizer, so that they survive.
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    alphabet = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=alphabet, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)], special_tokens=True)
    words = WORD_TOKENS + [str(n) for n in range(10, LARGEST_INTEGER_TOKEN + 1)]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer
