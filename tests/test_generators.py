import copy
import math
from dataclasses import replace

import pytest
import torch

from mini_r1 import RunFailed
from mini_r1.bases.cold_start import COLD_STARTS
from mini_r1.countdown.puzzles import Puzzle
from mini_r1.data import load_split
from mini_r1.evaluate import heldout_puzzles, sample_batches
from mini_r1.generators import Questions, by_transformers, sampling, tokenize
from mini_r1.model import load_model, load_tokenizer
from tests.tiny_models import build_tokenizer

TASK = COLD_STARTS["tiny_base"].task


@pytest.fixture(scope="module")
def base():
    return load_model("tiny_base"), load_tokenizer("tiny_base")


def sample_base(
    base, puzzles, num_samples=2, max_completion_length=60, on_batch=lambda new: None, **options
):
    model, tokenizer = base
    task = replace(TASK, num_eval_samples=num_samples)
    questions = Questions(puzzles, task, tokenizer, max_completion_length)
    with by_transformers(model, questions, **options) as generator:
        return dict(sample_batches(generator, questions, on_batch))


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(base):
    puzzles = heldout_puzzles(load_split(TASK), TASK)[:20]
    alone = sample_base(base, puzzles, batch=16)
    shared = [
        sample_base(base, puzzles, batch=16, process=rank, num_processes=2) for rank in range(2)
    ]
    assert sorted(alone) == [0, 1, 2]
    assert alone == shared[0] | shared[1]
    sampled = [sample.item.nums for batch in alone.values() for sample in batch]
    assert sampled == [puzzle.nums for puzzle in puzzles for _ in range(2)]


def test_leaves_the_training_untouched(base):
    base[0].train()
    state = torch.get_rng_state()
    sample_base(base, [Puzzle((1, 2, 3), 6)])
    assert base[0].training
    assert torch.equal(torch.get_rng_state(), state)
    base[0].eval()


def test_leaves_the_model_in_its_mode_also_when_it_is_stopped(base):
    def stop(completions):
        raise InterruptedError

    base[0].train()
    with pytest.raises(InterruptedError):
        sample_base(base, [Puzzle((1, 2), 3)], on_batch=stop)
    assert base[0].training
    base[0].eval()


def test_samples_from_the_whole_distribution(base):
    """A model that knows nothing writes every token: no filter stands between it and the sample."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    # Tied: all logits are equal but for a hair, by which a filter would choose.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1e-3)
    model.generation_config.top_k, model.generation_config.top_p = 5, 0.5  # a model's own
    model.generation_config.repetition_penalty = 2.0
    generation = sampling(model, tokenizer, TASK, max_completion_length=1, num_samples=4000)
    assert generation.repetition_penalty == 1.0
    inputs = tokenizer("Make", return_tensors="pt")
    torch.manual_seed(0)
    written = model.generate(**inputs, generation_config=generation)[:, -1].tolist()
    size = model.config.vocab_size
    expected = size * (1 - (1 - 1 / size) ** 4000)  # different tokens among 4000 fair draws
    assert len(set(written)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_model_without_probabilities_is_told(base, value, temperature):
    model, tokenizer = base
    broken = copy.deepcopy(model)
    broken.lm_head.register_forward_hook(lambda module, inputs, output: output * 0 + value)
    questions = Questions(
        [Puzzle((1, 2), 3)], replace(TASK, eval_temperature=temperature), tokenizer, 2
    )
    with (
        pytest.raises(RunFailed, match=r"^the model gives NaN or infinity in place of prob.*e$"),
        by_transformers(broken, questions) as generator,
    ):
        sample_batches(generator, questions)


def test_the_temperature_reaches_the_sampling(base):
    task = replace(TASK, eval_temperature=0.3)
    assert sampling(*base, task, 1).temperature == 0.3


def test_counts_tokens_up_to_the_end_and_truncation(base):
    puzzles = [Puzzle((1, 2, 3), 6)]
    (cut,) = sample_base(base, puzzles, num_samples=8, max_completion_length=5).values()
    assert all(sample.truncated and sample.tokens == 5 for sample in cut)
    assert all(sample.success == 0.0 for sample in cut)
    (batch,) = sample_base(base, puzzles, num_samples=8, max_completion_length=240).values()
    finished = [sample for sample in batch if not sample.truncated]
    assert finished
    for sample in finished:
        assert sample.tokens == len(base[1](sample.completion)["input_ids"]) + 1


def test_prompts_are_padded_and_have_no_token_types(tmp_path):
    """As TRL has them: left, with the end for want of a pad token."""
    tokenizer = build_tokenizer("llama")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    inputs = tokenize(tokenizer, ["2", "2+3"])
    assert inputs.keys() == {"input_ids", "attention_mask"}
    end, (two,) = tokenizer.eos_token_id, tokenizer("2", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"][0].tolist() == [end, end, tokenizer.bos_token_id, two]
    assert inputs["attention_mask"][0].tolist() == [0, 0, 1, 1]
