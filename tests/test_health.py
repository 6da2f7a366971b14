import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer

from mini_r1 import RunFailed
from mini_r1.health import FiniteNumbers, LearningSignal, StaleWeights, diagnosis
from mini_r1.metrics import LOGP_DIFFERENCE
from mini_r1.model import load_model, load_tokenizer
from mini_r1.rewards import get_reward_functions
from mini_r1.rollouts import RolloutRecorder
from mini_r1.run import FAILED_BATCH_FILE

PROMPT = "Make 3 using each of 1, 2 once.\n<think>"


# ---- NaN and infinity -----------------------------------------------------------------------


class Poison(TrainerCallback):
    """Makes a number of step 2 wrong, where a callback can reach it."""

    def __init__(self, what, value):
        self.what, self.value = what, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and self.what == "weight before":
            model.lm_head.weight.data[0] = self.value

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and self.what == "weight after":
            model.model.norm.weight.data[0] = self.value


@pytest.fixture
def train(tmp_path):
    """Three steps of four completions: call it with callbacks and arguments."""

    def run(*callbacks, **changes):
        tokenizer, recorder = load_tokenizer("tiny_base"), RolloutRecorder(tmp_path / "samples")
        given = {"max_steps": 3, "save_steps": 1, "seed": 1, "beta": 0.04, "learning_rate": 1e-4}
        args = GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=12,
            gradient_checkpointing=False,
            **given | changes,
        )
        rows = [{"prompt": PROMPT, "nums": [1, 2], "target": 3}] * 4
        trainer = GRPOTrainer(
            load_model("tiny_base"),
            recorder.watch(get_reward_functions(["format", "equation"])),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.add_callback(FiniteNumbers(trainer, tokenizer, recorder, tmp_path))
        for callback in callbacks:
            trainer.add_callback(callback(trainer) if callable(callback) else callback)
        trainer.train()
        return trainer

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("weight before", math.nan, "the loss became nan in step 2, with learning_rate 0.0001"),
        ("weight before", 1e30, "the norm of the gradient became "),
        ("weight after", math.inf, "the weight model.norm.weight became NaN or infinite in step 2"),
    ],
)
def test_it_ends_before_the_step_is_logged_or_saved(train, tmp_path, what, value, said):
    with pytest.raises(RunFailed) as caught:
        train(Poison(what, value))
    assert said in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert "max_grad_norm 1; try a lower learning_rate" in str(caught.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    kept = (tmp_path / FAILED_BATCH_FILE).read_text()
    batch = json.loads(kept, parse_constant=pytest.fail)  # NaN is no JSON
    assert batch["problem"] in str(caught.value)
    (micro_batch,) = batch["micro_batches"]
    assert [each["prompt"] for each in micro_batch["completions"]] == [PROMPT] * 4
    for each in micro_batch["completions"]:
        assert each["rewards"].keys() == {"format_reward", "equation_reward"}
        assert each["tokens"] > 0


class Numbers(FiniteNumbers):
    """As it stands after a step with these numbers."""

    def __init__(self, folder, losses=(0.5,), norm=1.0, precision="no", scale=None, fault=None):
        self._batches = [(torch.tensor(loss), {}) for loss in losses]
        self._norm, self._failed_step = norm, None
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        self._accelerator = SimpleNamespace(mixed_precision=precision, scaler=scaler)
        self._recorder, self._run_dir = SimpleNamespace(fault=fault), folder

    def said(self, weight=1.0):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, weight)
        return self._fault(SimpleNamespace(learning_rate=1e-6, max_grad_norm=0.2), 7, model)


def test_what_is_wrong_is_named_causes_first(tmp_path):
    inf, nan = math.inf, math.nan
    assert Numbers(tmp_path).said() is None
    assert Numbers(tmp_path, norm=torch.tensor(0.0)).said() is None
    fault = RunFailed("the reward x returned")
    assert Numbers(tmp_path, [nan], nan, fault=fault).said(nan) == (0, "the reward x returned")
    for losses, norm, weight, order, said in [
        ([0.1, inf], nan, nan, 1, "the loss became inf in step 7, with learning_rate 1e-06 and "),
        ([0.1], inf, nan, 2, "the norm of the gradient became inf in step 7"),
        ([0.1], torch.tensor(nan), 1.0, 2, "the norm of the gradient became nan in step 7"),
        ([0.1], -1.0, 1.0, 2, "the norm of the gradient became nan"),  # DeepSpeed's way
        ([0.1], 1.0, -inf, 3, "the weight weight became NaN or infinite in step 7"),
    ]:
        found, line = Numbers(tmp_path, losses, norm).said(weight)
        assert found == order
        assert line.startswith(said)


def test_while_the_loss_scale_of_fp16_is_sought_overflows_are_no_fault(tmp_path):
    assert Numbers(tmp_path, norm=math.inf, precision="fp16", scale=4096.0).said() is None
    assert Numbers(tmp_path, norm=-1.0, precision="fp16").said() is None  # DeepSpeed gives up
    assert Numbers(tmp_path, norm=math.inf, precision="fp16", scale=0.5).said()[0] == 2
    assert Numbers(tmp_path, [math.nan], precision="fp16", scale=4096.0).said()[0] == 1


def test_a_run_that_gets_beyond_the_step_drops_its_batch(tmp_path):
    file = tmp_path / FAILED_BATCH_FILE
    file.write_text('{"step": 3}')
    numbers, args = (
        Numbers(tmp_path),
        SimpleNamespace(device="cpu", learning_rate=1, max_grad_norm=1),
    )
    state = TrainerState(global_step=2)
    numbers.on_train_begin(args, state, None)
    for step, there in ((2, True), (3, False), (4, False)):
        state.global_step = step
        numbers.on_step_end(args, state, None, model=torch.nn.Linear(1, 1))
        assert file.exists() is there


# ---- Another model's completions ------------------------------------------------------------


def add_sampled(trainer, apart):
    """Add what vLLM would say of the tokens: the policy's log-probabilities, and so much more."""
    prepare = trainer._prepare_inputs

    def prepared(inputs):
        inputs = dict(prepare(inputs))
        ids, mask = (
            torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], 1)
            for what in ("ids", "mask")
        )
        chosen = inputs["completion_ids"][..., None]
        with torch.no_grad():
            logits = trainer.model(ids, attention_mask=mask).logits[:, -chosen.shape[1] - 1 : -1]
        sampled = logits.log_softmax(-1).gather(-1, chosen)[..., 0]
        sampled[0, 0] = math.nan  # one that vLLM did not score
        return inputs | {"sampling_per_token_logps": sampled + apart}

    trainer._prepare_inputs = prepared


class Change(TrainerCallback):
    """Makes another model of it after every step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.model.norm.weight.data *= 1.1


@pytest.mark.parametrize("apart", [0.0, 0.3])
@pytest.mark.parametrize("correction", [False, True])
def test_weights_that_vllm_has_not_are_told_once(train, capsys, apart, correction):
    def stale_weights(trainer):
        add_sampled(trainer, apart)
        return StaleWeights(trainer, correction)

    # Two steps share a generation: the second one's log-probabilities have a right to differ.
    shared = {"steps_per_generation": 2, "max_steps": 6, "save_steps": 2, "logging_steps": 1}
    run = train(stale_weights, Change(), **shared)
    logged = [entry.get(LOGP_DIFFERENCE) for entry in run.state.log_history if "loss" in entry]
    if correction:
        assert set(logged) == {None}  # TRL does
    else:
        assert logged[1::2] == [None] * 3
        assert logged[::2] == pytest.approx([apart] * 3, abs=1e-5)
    said = capsys.readouterr().out
    assert said.count("step 1: vLLM samples from other weights than are trained") == bool(apart)
    assert said.count("vLLM samples") == bool(apart)


# ---- Nothing to learn from ------------------------------------------------------------------


def logged(step, **changes):
    """A step's line in the log: well-formed, wrong, and all alike."""
    entry = {
        "step": step,
        "loss": 0.0,
        "reward": 1.0,
        "rewards/format_reward/mean": 1.0,
        "rewards/equation_reward/mean": 0.0,
        "completions/clipped_ratio": 0.0,
        "frac_reward_zero_std": 1.0,
        "same_text": 0.1,
    }
    return {key: value for key, value in (entry | changes).items() if value != "unknown"}


ARGS = SimpleNamespace(max_completion_length=40, temperature=0.7)


def lines(history, capsys, resumed_after=0, main=True):
    """What is said, line by line, of a run that is resumed after so many lines of the log."""
    state = TrainerState(is_world_process_zero=main, log_history=[])
    signal = LearningSignal()
    signal.on_train_begin(ARGS, state, None)
    for index, entry in enumerate(history):
        if index == resumed_after:
            state.log_history = json.loads(json.dumps(state.log_history))
            signal = LearningSignal()
            signal.on_train_begin(ARGS, state, None)
        state.log_history.append(entry)
        signal.on_log(ARGS, state, None)
    assert capsys.readouterr().out.splitlines() == [
        entry["diagnosis"] for entry in state.log_history if main and "diagnosis" in entry
    ]
    return [
        (entry["step"], entry["diagnosis"]) for entry in state.log_history if "diagnosis" in entry
    ]


@pytest.mark.parametrize("resumed_after", [0, 1, 12, 20, 22, 25])
def test_it_is_said_once_after_twenty_steps_without_signal(capsys, resumed_after):
    history = [logged(1), logged(2, frac_reward_zero_std=0.9)]
    history += [logged(step) for step in range(3, 26)]
    history.insert(10, {"step": 9, "eval_success": 0.5})
    ((step, said),) = lines(history, capsys, resumed_after)
    assert step == 22
    assert said == (
        "step 22: nothing was learned from rewards for 20 steps: 100% of the completions have an "
        "answer, and a wrong one; take easier puzzles, a stronger base, or more num_generations"
    )


def test_no_word_while_there_is_signal_and_none_on_other_ranks(capsys):
    every_tenth = [logged(step, frac_reward_zero_std=step % 10 > 0) for step in range(1, 60)]
    assert lines(every_tenth, capsys) == []
    assert len(lines([logged(step) for step in range(1, 60)], capsys, main=False)) == 1


def test_steps_that_share_a_generation_share_its_signal(capsys):
    def pair(step, **changes):
        return [logged(step, **changes), {"step": step + 1, "loss": 0.0}]

    history = pair(1, frac_reward_zero_std=0.5)
    for step in range(3, 31, 2):
        history += pair(step)
    ((step, _),) = lines(history, capsys)
    assert step == 22


@pytest.mark.parametrize(
    "alike", [{"reward": None, "frac_reward_zero_std": 0.0}, {"same_text": 1.0}]
)
def test_what_else_leaves_no_signal(capsys, alike):
    history = [logged(step, **{"frac_reward_zero_std": 0.0, **alike}) for step in range(1, 21)]
    assert len(lines(history, capsys)) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "100% of the completions have an answer, and a wrong one; take easier puzzles"),
        (
            {"rewards/format_reward/mean": 0.04, "completions/clipped_ratio": 0.9},
            "90% of the completions were cut at max_completion_length; raise it (40)",
        ),
        (
            {"rewards/format_reward/mean": 0.03, "completions/clipped_ratio": 0.1},
            "87% of the completions lack the form that the format reward wants; show it in",
        ),
        ({"rewards/equation_reward/mean": 0.98}, "98% of the completions are right already"),
        (
            {"same_text": 1.0},
            "in 100% of the groups all completions are the same text; raise temperature (0.7)",
        ),
        ({"same_text": 1.0, "rewards/equation_reward/mean": 1.0}, "100% of the completions are ri"),
        ({"reward": None}, "every reward was None; "),
        (
            {"rewards/format_reward/mean": None, "rewards/equation_reward/mean": "unknown"},
            "the rewards gave all completions of a group the same (reward 1 on average); ",
        ),
        (
            {"rewards/equation_reward/mean": "unknown", "success": 0.1},
            "90% of the completions have an answer, and a wrong one",
        ),
    ],
)
def test_the_cause_that_explains_most_is_told(changes, said):
    found = diagnosis([logged(step, **changes) for step in range(1, 21)], 40, 0.7)
    assert found.startswith(said)
    assert "\n" not in found
