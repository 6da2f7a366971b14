"""How `tiny_base` is made from nothing: a tokenizer, a small Qwen2, and supervised fine-tuning on generated search traces.

A trace tries combinations one per line, with true arithmetic and a true verdict, and never the same one twice. Most traces give
up after a failed try or two and answer with what they have; one in twenty is patient. So the base can calculate, judge its own
tries and write a well-formed answer, but is too impatient to solve much: what reinforcement learning then has to discover is that
it pays to keep searching, and where to look first.

    8*3=24, 24-13=11 low
    13+8=21, 21+3=24 yes
    </think>
    <answer>(13+8)+3</answer>

Held-out puzzles (`data.is_heldout`) never appear in a trace. Command: `mini-r1 base build`.
"""

import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import yaml
from datasets import Dataset
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from mini_r1 import InputError
from mini_r1.completion import claims, parse_completion
from mini_r1.countdown.puzzles import Puzzle, generate
from mini_r1.data import is_heldout, load_split
from mini_r1.evaluate import heldout_puzzles, sample_batches, summarize
from mini_r1.manifest import versions, weights_hash, write_json, write_text
from mini_r1.model import TINY_BASE
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import TaskConfig

# The puzzles and the prompt of the base; `recipes/tiny-cpu.yaml` trains on the same. The space holds about 16,300 puzzles.
TASK = TaskConfig(
    num_puzzles=16_000,
    num_numbers=(3,),
    number_range=(1, 20),
    target_range=(1, 100),
    prompt_template="compact",
    max_prompt_length=32,
    num_eval_puzzles=1000,
    num_eval_samples=4,
)
MAX_COMPLETION_LENGTH = 140  # ten tries and an answer

LARGEST_INTEGER_TOKEN = 255  # each further token costs time in every sampling step
WORD_TOKENS = [
    *("<think>", "</think>", "<answer>", "</answer>", "system", "user", "assistant"),
    *("Make ", " using each of ", ", ", " once."),
    *(" low\n", " high\n", " yes\n"),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ColdStart:
    """Everything the base depends on besides the library versions.

    Attributes:
        num_traces: searches to learn from; each puzzle of the training part is used equally often.
        largest_result: products stay at or below this, which bounds the arithmetic to be learned (all but 1 % of the puzzles
            stay solvable).
        directed: how often the last operator of a try is the one that lands nearest to the target; otherwise any.
        patient: the share of traces that search until solved.
        give_up: the chance to give up after each failed try in all other traces.
        max_tries: after so many tries a patient trace gives up, too.
    """

    seed: int = 0
    num_traces: int = 250_000
    largest_result: int = 100
    directed: float = 0.7
    patient: float = 0.05
    give_up: float = 0.6
    max_tries: int = 10
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    batch_size: int = 128
    learning_rate: float = 2e-3  # 3e-3 never learned to look at its operands


@dataclass(frozen=True)
class Term:
    """A number made so far: its value and the text that makes it, bracketed unless it is a given number."""

    value: int
    text: str


def search_trace(puzzle: Puzzle, rng: random.Random, recipe: ColdStart) -> str:
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


def _fresh_try(puzzle: Puzzle, rng: random.Random, recipe: ColdStart, seen: set[str]) -> tuple[str, Term]:
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


def _step(first: Term, second: Term, target: int, is_last: bool, rng: random.Random, recipe: ColdStart) -> tuple[str, Term]:
    """Combine two terms, the larger one first: the step's text and the term it makes."""
    left, right = (first, second) if first.value >= second.value else (second, first)
    results = _results(left.value, right.value, recipe.largest_result)
    if is_last and rng.random() < recipe.directed:
        operator = min(results, key=lambda operator: abs(results[operator] - target))
    else:
        operator = rng.choice(list(results))
    value = results[operator]
    return f"{left.value}{operator}{right.value}={value}", Term(value, f"({left.text}{operator}{right.text})")


@lru_cache(maxsize=1)
def _training_puzzles(seed: int) -> tuple[Puzzle, ...]:
    return tuple(puzzle for puzzle in generate(TASK.num_puzzles, seed, TASK.space) if not is_heldout(puzzle.key, TASK))


def _results(larger: int, smaller: int, largest_product: int) -> dict[str, int]:
    """What the operators make of two numbers >= 1: positive integers only."""
    results = {"+": larger + smaller}
    if larger > smaller:
        results["-"] = larger - smaller
    if larger * smaller <= largest_product:
        results["*"] = larger * smaller
    if larger % smaller == 0:
        results["/"] = larger // smaller
    return results


def traces(recipe: ColdStart) -> Iterator[tuple[Puzzle, str]]:
    """The supervised examples: puzzles of the training part, each used equally often, and a completion for each."""
    rng = random.Random(recipe.seed)
    puzzles = list(_training_puzzles(recipe.seed))
    for index in range(recipe.num_traces):
        if index % len(puzzles) == 0:
            rng.shuffle(puzzles)
        puzzle = puzzles[index % len(puzzles)]
        yield puzzle, search_trace(puzzle, rng, recipe)


def build_tokenizer() -> Qwen2Tokenizer:
    """A lossless tokenizer whose integers 0..255, tags and frequent phrases are one token each; everything else falls to bytes.

    It is a Qwen2Tokenizer because AutoTokenizer rebuilds that class for every qwen2 model, with Qwen's own pre-tokenizer, whatever
    tokenizer.json says. Added tokens are matched before the pre-tokenizer, so that they survive.
    """
    alphabet = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=alphabet, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)], special_tokens=True)
    words = WORD_TOKENS + [str(n) for n in range(10, LARGEST_INTEGER_TOKEN + 1)]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def build_base(output_dir: Path, recipe: ColdStart | None = None) -> dict[str, object]:
    """Make the base in a new folder and return its manifest. Two builds on one machine are identical, byte for byte.

    Raises:
        InputError: the folder exists already.
    """
    recipe = recipe or ColdStart()
    if output_dir.exists():
        raise InputError(f"--output: {output_dir} exists; choose a new folder or remove it")
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)

    set_seed(recipe.seed)
    tokenizer = build_tokenizer()
    dataset, data_hash = _dataset(recipe, tokenizer)
    model = Qwen2ForCausalLM(_model_config(recipe, tokenizer))
    print(f"{model.num_parameters():,} parameters, {recipe.num_traces:,} traces", flush=True)
    arguments = SFTConfig(
        output_dir=str(partial),
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        adam_beta2=0.98,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",  # half of all tokens would be padding otherwise
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=recipe.seed,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
    )
    SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer).train()

    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    # What `mini-r1 eval` needs to know of a model that is not a run: its puzzles, prompt and length.
    own_recipe = {"model_name_or_path": TINY_BASE, **TASK.as_dict(), "max_completion_length": MAX_COMPLETION_LENGTH}
    write_text(partial / "recipe.yaml", yaml.safe_dump(own_recipe, sort_keys=False))
    manifest = {
        "made_by": "mini-r1 base build",
        "cold_start": asdict(recipe),
        "parameters": model.num_parameters(),
        "data_sha256": data_hash,
        "weights_sha256": weights_hash(partial),
        "versions": versions(),
        **measure(model, AutoTokenizer.from_pretrained(partial)),
    }
    write_json(partial / "manifest.json", manifest)
    for leftover in ("training_args.bin", "README.md"):
        (partial / leftover).unlink(missing_ok=True)
    partial.rename(output_dir)
    return manifest


def measure(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> dict[str, object]:
    """Held-out success of a model on the base's task, and what its thinking is like."""
    batches = sample_batches(
        model,
        tokenizer,
        heldout_puzzles(load_split(TASK), TASK),
        PROMPT_TEMPLATES[TASK.prompt_template],
        num_samples=TASK.num_eval_samples,
        temperature=TASK.eval_temperature,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    samples = [sample for _, batch in batches for sample in batch]
    thoughts = [parse_completion(sample.completion).think for sample in samples]
    return {
        "heldout": summarize(samples, TASK, max_completion_length=MAX_COMPLETION_LENGTH),
        "true_arithmetic": fmean(claim.true for thought in thoughts for claim in claims(thought)),
        "tries_per_completion": fmean(len(thought.split("\n")) - 2 for thought in thoughts),
    }


def _dataset(recipe: ColdStart, tokenizer: Qwen2Tokenizer) -> tuple[Dataset, str]:
    """The traces as columns input_ids and labels (-100 on the prompt), and the SHA-256 of their text."""
    template = PROMPT_TEMPLATES[TASK.prompt_template]
    examples = list(traces(recipe))
    prompts = [template.render(puzzle.nums, puzzle.target, tokenizer) for puzzle, _ in examples]
    completions = [completion + tokenizer.eos_token for _, completion in examples]
    columns = {"input_ids": [], "labels": []}
    for prompt, completion in zip(tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"], strict=True):
        columns["input_ids"].append(prompt + completion)
        columns["labels"].append([-100] * len(prompt) + completion)
    return Dataset.from_dict(columns), sha256("".join(prompts + completions).encode()).hexdigest()


def _model_config(recipe: ColdStart, tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
