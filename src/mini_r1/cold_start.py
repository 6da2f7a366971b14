"""How `tiny_base` is made from nothing: a tokenizer, a small Qwen2, and supervised fine-tuning on generated search traces.

A trace starts with a random pair of the numbers, adds, subtracts, multiplies and divides them, goes on to the next pair, and
finishes every try with the operator that lands nearest to the target. Its arithmetic and its verdicts are true:

    16+5=21, 21*3=63 high
    16-5=11, 11*3=33 yes
    </think>
    <answer>(16-5)*3</answer>

Half of the traces search until solved, but the choice to go on or to give up is hidden from the loss there: they teach how to
search. That choice is learned from the other half, which gives up after almost every failed try. So the base can calculate, judge
its own tries, search and write a well-formed answer, but is too impatient to solve much: what reinforcement learning then has to
discover is that it pays to keep searching.

Held-out puzzles (`data.is_heldout`) never appear in a trace. Command: `mini-r1 base build`.
"""

import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from mini_r1 import InputError
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
MAX_COMPLETION_LENGTH = 170  # twelve tries and an answer

LARGEST_INTEGER_TOKEN = 255  # each further token costs time in every sampling step
WAVE_PERIODS = (2, 3, 4, 5, 7, 10, 13, 20, 32, 50, 100, 200, 400)
LOG_WAVE_FREQUENCIES = (1, 2, 4, 8, 16)
WORD_TOKENS = [
    *("<think>", "</think>", "<answer>", "</answer>", "system", "user", "assistant"),
    *("Make ", " using each of ", ", ", " once."),
    *(" low", " high", " yes"),
    "\n</think>\n<answer>",  # so that to give up or to go on ("\n") is one choice between two tokens
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
        largest_result: products stay at or below this, which bounds the arithmetic to be learned (all but 2 % of the puzzles
            stay solvable).
        patient: the share of traces that search until solved or through, with the choice to go on hidden from the loss.
        give_up: the chance to give up after each failed try in all other traces.
        number_waves: the amplitude of the waves that integer embeddings start from.
    """

    seed: int = 0
    num_traces: int = 250_000
    largest_result: int = 100
    patient: float = 0.5
    give_up: float = 0.8
    number_waves: float = 0.1
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 1
    batch_size: int = 64
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Trace:
    """A supervised example: a completion for the puzzle; `patient` hides the choice to go on from the loss."""

    puzzle: Puzzle
    completion: str
    patient: bool


def search_trace(puzzle: Puzzle, rng: random.Random, recipe: ColdStart) -> Trace:
    """One search with a verdict on every try, and the last try as the answer."""
    patient = rng.random() < recipe.patient
    lines: list[str] = []
    for left, operator, right, value, remaining in _first_steps(puzzle, rng.randrange(3), recipe.largest_result):
        larger, smaller = max(value, remaining), min(value, remaining)
        results = _results(larger, smaller, recipe.largest_result)
        nearest = min(results, key=lambda operator: abs(results[operator] - puzzle.target))
        made = results[nearest]
        verdict = "yes" if made == puzzle.target else "low" if made < puzzle.target else "high"
        lines.append(f"{left}{operator}{right}={value}, {larger}{nearest}{smaller}={made} {verdict}\n")
        if verdict == "yes" or (not patient and rng.random() < recipe.give_up):
            break
    first = f"({left}{operator}{right})"
    answer = f"{first}{nearest}{remaining}" if value >= remaining else f"{remaining}{nearest}{first}"
    return Trace(puzzle, f"\n{''.join(lines)}</think>\n<answer>{answer}</answer>", patient)


def _first_steps(puzzle: Puzzle, start: int, largest_product: int) -> list[tuple[int, str, int, int, int]]:
    """The ways to combine two of the three numbers, the larger one first: (left, operator, right, value, remaining number).

    All of one pair, then of the next; `start`, 0 to 2, says which pair comes first.
    """
    pairs = [(0, 1, 2), (0, 2, 1), (1, 2, 0)]
    steps = []
    for i, j, k in pairs[start:] + pairs[:start]:
        larger, smaller = max(puzzle.nums[i], puzzle.nums[j]), min(puzzle.nums[i], puzzle.nums[j])
        for operator, value in _results(larger, smaller, largest_product).items():
            steps.append((larger, operator, smaller, value, puzzle.nums[k]))
    return steps


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


def traces(recipe: ColdStart) -> Iterator[Trace]:
    """The supervised examples, each puzzle of the training part used equally often."""
    rng = random.Random(recipe.seed)
    puzzles = list(_training_puzzles(recipe.seed))
    for index in range(recipe.num_traces):
        if index % len(puzzles) == 0:
            rng.shuffle(puzzles)
        yield search_trace(puzzles[index % len(puzzles)], rng, recipe)


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
    _embed_values(model, tokenizer, recipe.number_waves)
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
        "heldout": measure(model, AutoTokenizer.from_pretrained(partial)),
    }
    write_json(partial / "manifest.json", manifest)
    for leftover in ("training_args.bin", "README.md"):
        (partial / leftover).unlink(missing_ok=True)
    partial.rename(output_dir)
    return manifest


def measure(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> dict[str, object]:
    """Held-out success of a model on the base's task, as in `eval/*.json`."""
    puzzles = heldout_puzzles(load_split(TASK), TASK)
    batches = sample_batches(model, tokenizer, puzzles, TASK, max_completion_length=MAX_COMPLETION_LENGTH)
    samples = [sample for _, batch in batches for sample in batch]
    return summarize(samples, TASK, max_completion_length=MAX_COMPLETION_LENGTH)


def _dataset(recipe: ColdStart, tokenizer: Qwen2Tokenizer) -> tuple[Dataset, str]:
    """The traces as columns input_ids and labels (-100 where nothing is learned), and the SHA-256 of their text."""
    template = PROMPT_TEMPLATES[TASK.prompt_template]
    examples = list(traces(recipe))
    prompts = [template.render(example.puzzle.nums, example.puzzle.target, tokenizer) for example in examples]
    completions = [example.completion + tokenizer.eos_token for example in examples]
    failed = set(tokenizer.convert_tokens_to_ids([" low", " high"]))
    columns = {"input_ids": [], "labels": []}
    encoded = zip(examples, tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"], strict=True)
    for example, prompt, completion in encoded:
        hidden = [example.patient and before in failed for before in [None, *completion]]
        labels = [-100 if hide else token for token, hide in zip(completion, hidden, strict=False)]
        columns["input_ids"].append(prompt + completion)
        columns["labels"].append([-100] * len(prompt) + labels)
    return Dataset.from_dict(columns), sha256("".join(prompts + completions).encode()).hexdigest()


def _embed_values(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, amplitude: float) -> None:
    """Add waves of their value to the integers' random embeddings, so that arithmetic is learned in minutes instead of hours.

    Trained networks come to add with such waves (Nanda et al., arXiv:2301.05217; Zhou et al., arXiv:2406.03445): a sum turns the
    phase. Waves of the logarithm do the same for products.
    """
    values = torch.arange(LARGEST_INTEGER_TOKEN + 1.0)
    phases = [2 * math.pi * values / period for period in WAVE_PERIODS]
    phases += [frequency * (values + 1).log() for frequency in LOG_WAVE_FREQUENCIES]
    waves = torch.stack([wave(phase) for phase in phases for wave in (torch.cos, torch.sin)], dim=1)
    tokens = tokenizer.convert_tokens_to_ids([str(int(value)) for value in values])
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens, : waves.shape[1]] += amplitude * waves


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
