"""How the embedded bases are made from nothing: a tokenizer, a small Qwen2, and fine-tuning.

What it is fine-tuned on, supervised, are search traces. A trace combines two of the numbers, the
smallest pair first, with one operator after the other until two numbers are left, and finishes
every try with the operator that lands nearest to the target. Its arithmetic and its verdicts are
true:

    5*3=15, 16+15=31 low
    5-3=2, 16*2=32 yes
    </think>
    <answer>16*(5-3)</answer>

Most traces search until solved, but the choice to go on or to give up is hidden from the loss
there: they teach how to search. That choice is learned from the others, which give up after almost
every failed try. So the base can calculate, judge its own tries, search and write a well-formed
answer, but is too impatient to solve much: what reinforcement learning then has to discover is that
it pays to keep searching. The order of the search is fixed, so that little but patience differs
between two completions for a puzzle, and the reward is about little else.

Held-out puzzles (`data.is_heldout`) never appear in a trace. The command is
`mini-r1 base build [NAME] --output DIR`.
"""

import math
import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    set_seed,
)

from mini_r1.bases.search import tries
from mini_r1.bases.sft import fine_tune, labelled
from mini_r1.countdown.puzzles import Puzzle, generate
from mini_r1.data import is_heldout, load_split
from mini_r1.evaluate import heldout_puzzles, sample_batches, summarize
from mini_r1.generators import Questions, by_transformers
from mini_r1.manifest import versions, weights_hash
from mini_r1.model import load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import TaskConfig
from mini_r1.run import MANIFEST_FILE, Evaluation, new_folder, write_json, write_recipe

WAVE_PERIODS = (2, 3, 4, 5, 7, 10, 13, 20, 32, 50, 100, 200, 400)
LOG_WAVE_FREQUENCIES = (1, 2, 4, 8, 16)
WORD_TOKENS = [
    *("<think>", "</think>", "<answer>", "</answer>", "system", "user", "assistant"),
    *("Make ", " using each of ", ", ", " once."),
    *(" low", " high", " yes"),
    # So that to give up or to go on ("\n") is one choice between two tokens.
    "\n</think>\n<answer>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ColdStart:
    """Everything a base depends on besides the library versions.

    Attributes:
        task: puzzles and prompt; a recipe for this base trains on the same.
        max_completion_length: in tokens, for the evaluation.
        num_traces: searches to learn from; each puzzle of the training part is used equally often.
        operators: in the order in which a search goes through them.
        largest_result: results stay at or below this, which bounds the arithmetic to be learned;
            each is one token.
        max_tries: after so many tries every search ends.
        patient: the share of traces that search until solved or through, with the choice to go on
            hidden from the loss.
        hopeless: the share of those whose target is drawn at random, mostly out of reach, so that
            late tries are seen often enough.
        give_up: the chance to give up after each failed try in all other traces.
        number_waves: the amplitude of the waves that the embeddings of numbers start from.
    """

    task: TaskConfig
    max_completion_length: int
    seed: int = 0
    num_traces: int = 240_000
    operators: str = "+-*/"
    largest_result: int = 100
    max_tries: int = 12
    patient: float = 0.8
    hopeless: float = 0.25
    give_up: float = 0.8
    number_waves: float = 0.1
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 1
    batch_size: int = 64
    learning_rate: float = 3e-3


COLD_STARTS = {
    # All but 1 % of the puzzles can be solved by such a search.
    "tiny_base": ColdStart(
        task=TaskConfig(
            num_puzzles=16_000,  # of about 16,300
            num_numbers=(3,),
            number_range=(1, 20),
            target_range=(1, 100),
            prompt_template="compact",
            max_prompt_length=32,
            num_eval_puzzles=1000,
            num_eval_samples=4,
        ),
        max_completion_length=120,  # twelve tries and an answer
    ),
    # The numbers and targets of the original's data set. Its searches reach all puzzles that plus
    # and minus alone can solve, and 39 % of the others: most of those with four numbers lie further
    # than 16 tries away.
    "tiny_base_hard": ColdStart(
        task=TaskConfig(
            num_puzzles=50_000,
            num_numbers=(3, 4),
            number_range=(1, 99),
            target_range=(10, 99),
            prompt_template="compact",
            max_prompt_length=36,
            num_eval_puzzles=500,
            num_eval_samples=16,
        ),
        max_completion_length=220,  # sixteen tries with four numbers and an answer
        num_traces=200_000,
        max_tries=16,
        hopeless=0.0,  # a quarter of the puzzles are out of its reach anyway
        batch_size=32,  # after 38,000 traces the loss was 0.20, with 64 it was 0.35
    ),
}


@dataclass(frozen=True)
class Trace:
    """A supervised example: a completion for the puzzle.

    `patient` hides the choice to go on from the loss.
    """

    puzzle: Puzzle
    completion: str
    patient: bool


def search_trace(puzzle: Puzzle, rng: random.Random, settings: ColdStart, patient: bool) -> Trace:
    """One search with a verdict on every try, and the last try as the answer."""
    lines: list[str] = []
    every = tries(puzzle, settings.operators, settings.largest_result)
    # The answer is the last try's.
    for steps, value, answer in islice(every, settings.max_tries):  # noqa: B007
        verdict = "yes" if value == puzzle.target else "low" if value < puzzle.target else "high"
        lines.append(f"{', '.join(steps)} {verdict}\n")
        if verdict == "yes" or (not patient and rng.random() < settings.give_up):
            break
    return Trace(puzzle, f"\n{''.join(lines)}</think>\n<answer>{answer}</answer>", patient)


@lru_cache(maxsize=1)
def _training_puzzles(task: TaskConfig, seed: int) -> tuple[Puzzle, ...]:
    puzzles = generate(task.num_puzzles, seed, task.space)
    return tuple(puzzle for puzzle in puzzles if not is_heldout(puzzle.key, task))


def traces(settings: ColdStart) -> Iterator[Trace]:
    """The supervised examples, each puzzle of the training part used equally often."""
    rng = random.Random(settings.seed)
    puzzles = list(_training_puzzles(settings.task, settings.seed))
    for index in range(settings.num_traces):
        if index % len(puzzles) == 0:
            rng.shuffle(puzzles)
        puzzle, patient = puzzles[index % len(puzzles)], rng.random() < settings.patient
        if patient and rng.random() < settings.hopeless:
            other = Puzzle(puzzle.nums, rng.randint(*settings.task.target_range))
            puzzle = puzzle if is_heldout(other.key, settings.task) else other
        yield search_trace(puzzle, rng, settings, patient)


def build_tokenizer(settings: ColdStart) -> Qwen2Tokenizer:
    """A lossless tokenizer.

    Integers up to the largest result, tags and frequent phrases are one token, all else falls to
    bytes. It is a Qwen2Tokenizer because AutoTokenizer rebuilds that class for every qwen2 model,
    with Qwen's own pre-tokenizer, whatever tokenizer.json says. Added tokens are matched before the
    pre-tokenizer, so that they survive.
    """
    alphabet = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=alphabet,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)], special_tokens=True)
    numbers = (str(n) for n in range(10, settings.largest_result + 1))
    words = [*WORD_TOKENS, *_operand_tokens(settings), *numbers]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def _operand_tokens(settings: ColdStart) -> dict[str, int]:
    """Text -> number. "*3=" is one token, not three, so that a try takes 9 tokens instead of 13."""
    smallest, largest = settings.task.number_range
    numbers = range(smallest, largest + 1)
    return {f"{operator}{n}=": n for operator in settings.operators for n in numbers}


@contextmanager
def _one_thread() -> Generator[None]:
    """Sums over several threads would make the bytes of a base depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def build_base(name: str, output_dir: Path, settings: ColdStart | None = None) -> dict[str, object]:
    """Make a base in a new folder and return its manifest.

    Two builds on one machine are identical, byte for byte.

    Args:
        name: of an embedded base.
        settings: other settings than those of that name.

    Raises:
        InputError: the folder exists already.
    """
    settings = settings or COLD_STARTS[name]
    with new_folder(output_dir) as folder:
        # what to learn and what to start from: the traces, and random weights, all from one seed
        set_seed(settings.seed)
        tokenizer = build_tokenizer(settings)
        dataset, data_hash = _dataset(settings, tokenizer)
        model = Qwen2ForCausalLM(_model_config(settings, tokenizer))
        _embed_values(model, tokenizer, settings)
        print(f"{model.num_parameters():,} parameters, {settings.num_traces:,} traces", flush=True)

        # supervised fine-tuning: every trace once
        fine_tune(
            model,
            tokenizer,
            dataset,
            folder,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=100,
            adam_beta2=0.98,
            weight_decay=0.01,
            bf16=False,
            use_cpu=True,
            seed=settings.seed,
            logging_steps=50,
        )

        # what `mini-r1 eval` needs to know of a model that is not a run: puzzles, prompt and length
        own_recipe = {
            "model_name_or_path": name,
            **settings.task.as_dict(),
            "max_completion_length": settings.max_completion_length,
        }
        write_recipe(folder, own_recipe)

        # the record: what it was made from, and what it can do, with the tokenizer as it loads
        manifest = {
            "made_by": f"mini-r1 base build {name}",
            "cold_start": asdict(settings),
            "parameters": model.num_parameters(),
            "data_sha256": data_hash,
            "weights_sha256": weights_hash(folder),
            "versions": versions(),
            "heldout": measure(model, load_tokenizer(str(folder)), settings),
        }
        write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def measure(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: ColdStart
) -> Evaluation:
    """Held-out success of a model on the base's task, as in `eval/*.json`."""
    task, max_completion_length = settings.task, settings.max_completion_length
    puzzles = heldout_puzzles(load_split(task), task)
    questions = Questions(puzzles, task, tokenizer, max_completion_length)
    with by_transformers(model, questions) as generator:
        batches = sample_batches(generator, questions)
    samples = [sample for _, batch in batches for sample in batch]
    return summarize(samples, task, max_completion_length=max_completion_length)


def _dataset(settings: ColdStart, tokenizer: Qwen2Tokenizer) -> tuple[Dataset, str]:
    """The traces as columns input_ids and labels, and the SHA-256 of their text.

    A label is -100 where nothing is learned.
    """
    # every trace as text, which is what the hash is of
    render = PROMPT_TEMPLATES[settings.task.prompt_template].renderer(tokenizer)
    examples = list(traces(settings))
    puzzles = [example.puzzle for example in examples]
    prompts = [render(puzzle.columns) for puzzle in puzzles]
    completions = [example.completion + tokenizer.eos_token for example in examples]

    # as tokens: hidden is the token after a patient one's failed try
    failed = {tokenizer.convert_tokens_to_ids(verdict) for verdict in (" low", " high")}
    hidden_after = [failed if example.patient else set() for example in examples]
    dataset = labelled(tokenizer, prompts, completions, hidden_after)
    return dataset, sha256("".join(prompts + completions).encode()).hexdigest()


def _embed_values(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, settings: ColdStart) -> None:
    """Add waves of their value to the numbers' random embeddings.

    With them arithmetic is learned in minutes instead of hours. Trained networks come to add with
    such waves (Nanda et al., arXiv:2301.05217; Zhou et al., arXiv:2406.03445): a sum turns the
    phase. Waves of the logarithm do the same for products.
    """
    values = {str(n): n for n in range(settings.largest_result + 1)} | _operand_tokens(settings)
    numbers = torch.tensor(list(values.values()), dtype=torch.float32)
    # each of the phases: [numbers]
    phases = [2 * math.pi * numbers / period for period in WAVE_PERIODS]
    phases += [frequency * (numbers + 1).log() for frequency in LOG_WAVE_FREQUENCIES]
    # [numbers, 2 * phases]
    waves = torch.stack([wave(phase) for phase in phases for wave in (torch.cos, torch.sin)], dim=1)
    tokens = tokenizer.convert_tokens_to_ids(list(values))
    weight = model.get_parameter("model.embed_tokens.weight")  # [vocabulary, hidden_size]
    with torch.no_grad():
        weight[tokens, : waves.shape[1]] += settings.number_waves * waves


def _model_config(settings: ColdStart, tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
