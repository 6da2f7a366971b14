"""Who writes the completions of an evaluation: transformers, or vLLM.

All sample at the task's temperature, from the whole distribution, with seeds that depend on the
puzzle alone and not on the process; a training evaluates with what it generates with. Left out:
judging (evaluate.py), and how the training itself samples, which is TRL's.
"""

import math
import os
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList

from mini_r1 import RunFailed, quirks
from mini_r1.countdown.puzzles import uniform_hash
from mini_r1.data import Item
from mini_r1.launch.memory import EVALUATION_BATCH
from mini_r1.model import find_adapter, load_merged, model_path
from mini_r1.recipe import TaskConfig

if TYPE_CHECKING:
    from trl import GRPOTrainer

VLLM_BATCH = 512  # completions that an evaluation hands to an engine at once
REQUESTS = 64  # to a server at once; each may ask for several completions


@dataclass(frozen=True)
class Questions:
    """What an evaluation asks, and how.

    Attributes:
        task: says prompt, temperature and the number of samples per puzzle.
        max_completion_length: in tokens; longer completions are cut and count as truncated.
        columns: further ones of the puzzles: `Split.columns`.
        chat_template_kwargs: see `PromptTemplate.renderer`.
        seed: of the sampling.
    """

    puzzles: Sequence[Item]
    task: TaskConfig
    tokenizer: PreTrainedTokenizerBase
    max_completion_length: int
    columns: Mapping[str, Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    seed: int = 0

    def at_once(self, batch: int) -> int:
        """Puzzles in a batch of so many completions."""
        return max(1, batch // self.task.num_eval_samples)


@dataclass(frozen=True)
class Completion:
    """What a model wrote, as tokens.

    Attributes:
        ids: the end-of-sequence token included, if it came that far.
        truncated: whether it did not.
    """

    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class CompletionGenerator:
    """Writes completions, batch by batch.

    Attributes:
        name: for people, and in `eval/*.json`.
        batch: completions at a time.
        write: prompts and the places of their puzzles in the evaluation -> `num_eval_samples`
            completions of each, side by side.
        process, num_processes: which of those that share the batches this one is.
        keeps: whether what it writes counts; else it only takes part in what all must do together.
    """

    name: str
    batch: int
    write: Callable[[Sequence[str], range], list[Completion]]
    process: int = 0
    num_processes: int = 1
    keeps: bool = True


# ---- transformers ---------------------------------------------------------------------------


@contextmanager
def by_transformers(
    model: PreTrainedModel,
    questions: Questions,
    *,
    batch: int = EVALUATION_BATCH,
    process: int = 0,
    num_processes: int = 1,
) -> Generator[CompletionGenerator]:
    """Generate with `model.generate`, and leave the model and the random state as they were.

    Under ZeRO-3 all processes must write together.

    Raises:
        NoProbabilities: once all is sampled, so that the other processes need not wait.
    """
    task, tokenizer = questions.task, questions.tokenizer
    num_samples, length = task.num_eval_samples, questions.max_completion_length
    per_batch = questions.at_once(batch)
    stops = stop_ids(model, tokenizer)
    generation = sampling(model, tokenizer, task, length, num_samples)
    logits = FiniteLogits()

    def write(prompts: Sequence[str], places: range) -> list[Completion]:
        torch.manual_seed(uniform_hash("evaluate", questions.seed, places.start // per_batch) >> 1)
        # [batch, prompt] -> [batch * num_samples, prompt + completion]
        inputs = tokenize(tokenizer, list(prompts)).to(model.device)
        sequences = model.generate(  # ty: ignore[not-callable]  (GenerationMixin's)
            **inputs, generation_config=generation, logits_processor=logits.as_list()
        )
        return [_cut(ids, stops) for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist()]

    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    name = f"transformers {version('transformers')}, {dtype}, {batch} at a time"
    with _in_eval_mode(model), torch.inference_mode(), _random_state_kept(model.device):
        yield CompletionGenerator(name, batch, write, process, num_processes)
    logits.check()


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Generator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _cut(ids: list[int], stop_ids: set[int]) -> Completion:
    """A completion without the padding behind its end."""
    end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
    return Completion(ids if end is None else ids[: end + 1], truncated=end is None)


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

    def __init__(self):
        super().__init__(
            "the model gives NaN or infinity in place of probabilities; take one of an earlier "
            "checkpoint, or another dtype"
        )


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
            raise NoProbabilities


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in [*configured, tokenizer.eos_token_id] if token is not None}


# ---- vLLM -----------------------------------------------------------------------------------


@contextmanager
def by_training_vllm(
    trainer: "GRPOTrainer", questions: Questions
) -> Generator[CompletionGenerator]:
    """Generate with the vLLM of a training, after it was sent the weights as they are now.

    With a server the main process asks for all completions; colocated engines share the batches.
    All processes must call this, and write, together.
    """
    accelerator, request = trainer.accelerator, _Request(questions)
    with (
        quirks.vllm_with_current_weights(trainer) as vllm,
        _random_state_kept(accelerator.device),
    ):
        if vllm.mode == "server":
            keeps = accelerator.is_main_process
            stops = stop_ids(accelerator.unwrap_model(trainer.model), questions.tokenizer)
            write = request.to_server(vllm.vllm_client, stops) if keeps else lambda *_: []
            yield CompletionGenerator(_vllm_name("server"), request.batch, write, keeps=keeps)
        else:
            # The processes of a tensor-parallel group hold one engine between them.
            group, place = divmod(accelerator.process_index, vllm.tensor_parallel_size)
            yield CompletionGenerator(
                _vllm_name("colocated", vllm.llm),
                request.batch,
                request.to_engine(vllm.llm),
                process=group,
                num_processes=accelerator.num_processes // vllm.tensor_parallel_size,
                keeps=place == 0,
            )
    request.check()


@contextmanager
def by_new_vllm(weights: str, questions: Questions) -> Generator[CompletionGenerator]:
    """Generate with an engine of vLLM that is started for it.

    Args:
        weights: a model or an adapter, which is merged into its base.
    """
    # Its log is not the result.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    vllm = import_module("vllm")  # is not in every environment
    request = _Request(questions)
    with tempfile.TemporaryDirectory(prefix="mini-r1-merged-") as folder:
        if find_adapter(weights) is not None:
            load_merged(weights).save_pretrained(folder)
            questions.tokenizer.save_pretrained(folder)
            weights = folder
        engine = vllm.LLM(
            model=model_path(weights),
            max_model_len=questions.task.max_prompt_length + questions.max_completion_length,
            max_num_seqs=request.batch,
            disable_log_stats=True,
        )
        name = _vllm_name("an engine of its own", engine)
        yield CompletionGenerator(name, request.batch, request.to_engine(engine))
    request.check()


def _vllm_name(place: str, engine: Any = None) -> str:
    dtype = "" if engine is None else f", {engine.llm_engine.model_config.dtype}"
    return f"vLLM {import_module('vllm').__version__}, {place}{dtype.replace('torch.', '')}"


class _Request:
    """What is asked of a vLLM, and whether its log-probabilities were numbers.

    Attributes:
        batch: completions at a time.
    """

    def __init__(self, questions: Questions):
        self._questions, self._task = questions, questions.task
        self.batch = quirks.vllm_batch(VLLM_BATCH, questions.task.max_prompt_length)
        self._broken = False

    def check(self) -> None:
        """Whether all were numbers.

        Raises:
            NoProbabilities: they were not.
        """
        if self._broken:
            raise NoProbabilities

    def to_engine(self, engine: Any) -> Callable[[Sequence[str], range], list[Completion]]:
        """What has an engine of this process write."""
        sampling_params = import_module("vllm").SamplingParams

        def params(seed: int) -> Any:
            return sampling_params(
                temperature=self._task.eval_temperature,
                max_tokens=self._questions.max_completion_length,
                seed=seed,
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )

        def write(prompts: Sequence[str], places: range) -> list[Completion]:
            asked = [
                ({"prompt_token_ids": ids}, params(seed))
                for ids, place in zip(self._encoded(prompts), places, strict=True)
                for seed in self._seeds(place)
            ]
            inputs, ways = map(list, zip(*asked, strict=True))
            outputs = [each.outputs[0] for each in engine.generate(inputs, ways, use_tqdm=False)]
            self._broken |= not all(math.isfinite(each.cumulative_logprob) for each in outputs)
            return [Completion([*o.token_ids], o.finish_reason == "length") for o in outputs]

        return write

    def to_server(
        self, client: Any, stop_ids: set[int]
    ) -> Callable[[Sequence[str], range], list[Completion]]:
        """What asks a server, through TRL's client, for each puzzle by itself."""

        def ask(prompt: list[int], place: int) -> list[Completion]:
            seeds = self._seeds(place)
            written = client.generate(
                [prompt],
                n=len(seeds),
                temperature=self._task.eval_temperature,
                max_tokens=self._questions.max_completion_length,
                generation_kwargs={"seed": seeds.start},  # vLLM counts up from it
            )
            self._broken |= any(None in each for of in written["logprobs"] for each in of)
            return [Completion(ids, ids[-1] not in stop_ids) for ids in written["completion_ids"]]

        def write(prompts: Sequence[str], places: range) -> list[Completion]:
            with ThreadPoolExecutor(REQUESTS) as pool:
                return [*chain.from_iterable(pool.map(ask, self._encoded(prompts), places))]

        return write

    def _encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        return cast("list[list[int]]", self._questions.tokenizer(list(prompts))["input_ids"])

    def _seeds(self, place: int) -> range:
        """Of the samples of a puzzle."""
        # vLLM takes 63 bits, and counts up.
        first = uniform_hash("evaluate", self._questions.seed, place) >> 2
        return range(first, first + self._task.num_eval_samples)
