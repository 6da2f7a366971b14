import random
import re
from dataclasses import replace
from itertools import islice
from statistics import fmean

import pytest

from mini_r1 import InputError
from mini_r1.bases.cold_start import (
    COLD_STARTS,
    _dataset,
    build_base,
    build_tokenizer,
    search_trace,
    traces,
)
from mini_r1.completion import claims, parse_completion
from mini_r1.countdown.expression import parse
from mini_r1.countdown.puzzles import Puzzle
from mini_r1.data import is_heldout
from mini_r1.model import load_model, load_tokenizer
from mini_r1.run import MANIFEST_FILE, RECIPE_FILE

TINY = COLD_STARTS["tiny_base"]
TRY = re.compile(r"(?P<steps>[0-9+\-*/=, ]+) (?P<verdict>low|high|yes)")


@pytest.mark.slow
def test_traces_calculate_and_judge_truly():
    for trace in traces(replace(TINY, num_traces=2000)):
        puzzle, parsed = trace.puzzle, parse_completion(trace.completion)
        assert parsed.well_formed
        assert all(claim.true for claim in claims(trace.completion))
        lines = parsed.think.strip().split("\n")
        assert len(lines) == len(set(lines))
        for line in lines:
            match = TRY.fullmatch(line)
            value = int(match["steps"].rpartition("=")[2])
            sign = (value > puzzle.target) - (value < puzzle.target)
            assert match["verdict"] == {0: "yes", -1: "low", 1: "high"}[sign]
        assert parse(parsed.answer).value == value  # the answer is the last try, right or wrong
        assert sorted(parse(parsed.answer).numbers) == sorted(puzzle.nums)


def test_a_patient_search_finds_nearly_every_solution():
    patient = list(traces(replace(TINY, num_traces=2000, patient=1.0, hopeless=0.0)))
    assert sum(" yes" in trace.completion for trace in patient) > 0.96 * len(patient)
    assert max(trace.completion.count("\n") - 2 for trace in patient) <= 12


def test_traces_show_no_held_out_puzzle():
    shown = {trace.puzzle.key for trace in traces(replace(TINY, num_traces=20_000))}
    assert not any(is_heldout(key, TINY.task) for key in shown)


def test_impatience_is_what_the_settings_say():
    puzzle = Puzzle((2, 3, 19), 100)  # out of reach
    rng = random.Random(0)
    impatient = [search_trace(puzzle, rng, TINY, patient=False) for _ in range(2000)]
    tries = fmean(trace.completion.count("\n") - 2 for trace in impatient)
    assert tries == pytest.approx(1 / TINY.give_up, rel=0.05)


def test_hopeless_searches_go_through_all_tries():
    hopeless = list(traces(replace(TINY, num_traces=2000, patient=1.0, hopeless=1.0)))
    unsolved = [trace for trace in hopeless if " yes" not in trace.completion]
    assert len(unsolved) > 0.75 * len(hopeless)
    assert fmean(trace.completion.count("\n") - 2 for trace in unsolved) > 7


def test_the_loss_does_not_see_a_patient_search_go_on():
    tokenizer = build_tokenizer(TINY)
    settings = replace(TINY, num_traces=400)
    dataset, _ = _dataset(settings, tokenizer)
    hidden = 0
    for trace, row in zip(traces(settings), dataset, strict=True):
        learned = [label != -100 for label in row["labels"]]
        completion = tokenizer(trace.completion + tokenizer.eos_token)["input_ids"]
        start = len(learned) - len(completion)
        assert row["input_ids"][start:] == completion
        assert not any(learned[:start])
        failed = [tokenizer.decode(token).strip() in ("low", "high") for token in completion]
        for position in range(1, len(completion)):
            assert learned[start + position] != (trace.patient and failed[position - 1])
        hidden += learned[start:].count(False)
    assert hidden > 400


def test_the_same_settings_give_the_same_traces():
    first, second = (list(islice(traces(TINY), 500)) for _ in range(2))
    assert first == second


TEXTS = [
    "<|im_start|>user\nMake 34 using each of 17, 17, 19 once.<|im_end|>\n"
    "<|im_start|>assistant\n<think>",
    "\n19-17=2, 17*2=34 yes\n</think>\n<answer>17*(19-17)</answer><|im_end|>",
    "Hällo ½ 1234 0005  \n\n I'm 🙂 <b>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_saved_and_loaded_the_tokenizer_gives_equal_ids(tmp_path, text):
    built, shipped = build_tokenizer(TINY), load_tokenizer("tiny_base")
    # model_type qwen2 is what makes AutoTokenizer rebuild it.
    load_model("tiny_base").config.save_pretrained(tmp_path)
    built.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    ids = built(text)["input_ids"]
    assert ids == loaded(text)["input_ids"] == shipped(text)["input_ids"]
    assert loaded.decode(ids) == text


def test_every_small_integer_is_one_token():
    ids = load_tokenizer("tiny_base")([str(n) for n in range(TINY.largest_result + 1)])["input_ids"]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == TINY.largest_result + 1


@pytest.mark.slow
def test_a_small_build_is_whole_and_repeatable(tmp_path):
    small = replace(
        TINY, num_traces=512, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2
    )
    for name in ("a", "b"):
        build_base("tiny_base", tmp_path / name, small)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert files >= {MANIFEST_FILE, RECIPE_FILE}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    with pytest.raises(InputError, match="exists"):
        build_base("tiny_base", tmp_path / "a", small)
