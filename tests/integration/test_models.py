"""Models of other families than the embedded base's: trained, evaluated and played with."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import GenerationMixin

from mini_r1.cli import main
from mini_r1.model import load_tokenizer, model_path
from mini_r1.prompts import THINK_PREFILL
from mini_r1.recipe import load_recipe
from mini_r1.run import RECIPE_FILE, STATE_FILE, SUMMARY_FILE
from mini_r1.train import run
from tests.tiny_models import CHATML, build, build_tokenizer, trl_template

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHORT = {
    "prompt_template": "mini-r1",
    "max_prompt_length": 480,
    "max_completion_length": 8,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_generations": 4,
    "num_puzzles": 60,
    "num_eval_puzzles": 4,
    "num_eval_samples": 1,
    "eval_strategy": "no",
}


def train(model, run_dir, **changes):
    options = {**SHORT, "model_name_or_path": model, "output_dir": run_dir, **changes}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    run(load_recipe(ROOT / "recipes" / "tiny-cpu.yaml", arguments))


@pytest.fixture
def asked(monkeypatch):
    """The prompts that models have been asked from now on, as token ids without padding."""
    prompts, generate = [], GenerationMixin.generate

    def listen(self, *args, **options):
        masked = zip(options["input_ids"], options["attention_mask"], strict=True)
        prompts.extend(ids[mask.bool()].tolist() for ids, mask in masked)
        return generate(self, *args, **options)

    monkeypatch.setattr(GenerationMixin, "generate", listen)
    return prompts


@pytest.mark.parametrize(("kind", "bos"), [("llama", 1), ("gemma", 1), ("gpt2", 0), ("qwen3", 0)])
def test_a_family_is_asked_the_same_wherever_it_is_asked(kind, bos, asked, tmp_path, capsys):
    model, run_dir = build(tmp_path / "model", kind), tmp_path / "run"
    train(model, run_dir)
    assert json.loads((run_dir / SUMMARY_FILE).read_text())["steps"] == 2
    counts = [len(asked)]
    capsys.readouterr()
    # The trained model, and one that is no run: then a recipe says how it is asked.
    for of in ([str(run_dir)], [model, "--recipe", str(run_dir / RECIPE_FILE)]):
        assert main(["eval", *of, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_puzzles"] == 4
        counts.append(len(asked))
    assert main(["play", str(run_dir), "--nums", "1", "2", "3", "--target", "6"]) == 0
    assert counts == [2 * 4 + 2 * 8, 28, 32]
    assert len(asked) == 33

    tokenizer = load_tokenizer(model)
    for ids in asked:
        assert ids.count(tokenizer.bos_token_id) == bos
        assert ids[0] == tokenizer.bos_token_id or not bos
        assert tokenizer.decode(ids).endswith(THINK_PREFILL)


def test_what_a_recipe_says_to_the_chat_template_is_said_wherever(asked, tmp_path):
    """Qwen3.8's says how hard to think, unless it is told that there is no thinking."""
    chat_template = trl_template("qwen3_8")
    model = build(tmp_path / "model", "qwen3", chat_template=chat_template)
    train(model, tmp_path / "run", chat_template_kwargs="{enable_thinking: false}")
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert main(["play", str(tmp_path / "run"), "--nums", "1", "2", "3", "--target", "6"]) == 0
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer.decode(ids) for ids in asked]
    assert len(prompts) == 24 + 4 + 1
    assert not any("Reasoning effort" in prompt for prompt in prompts)
    assert all(prompt.endswith(f"assistant\n{THINK_PREFILL}") for prompt in prompts)


def test_tags_that_are_special_tokens_earn_rewards(tmp_path, capsys):
    """The embedded base writes well-formed completions; TRL and the evaluation have to see it."""
    model = shutil.copytree(model_path("tiny_base"), tmp_path / "model")
    tokenizer = build_tokenizer("qwen2", chat_template=CHATML, special_tags=True)
    tokenizer.save_pretrained(model)
    train(model, tmp_path / "run", prompt_template="compact", max_completion_length=120)
    logged = json.loads((tmp_path / "run" / STATE_FILE).read_text())["log_history"]
    assert max(line.get("rewards/format_reward/mean", 0) for line in logged) > 0.5
    capsys.readouterr()
    for name in (str(model), "tiny_base"):
        few = ["--num-puzzles", "20", "--num-samples", "2"]
        assert main(["eval", name, *few, "--json"]) == 0
    special, plain = map(json.loads, capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    assert special["format"] > 0.5
    assert {**special, "model": "tiny_base"} == plain
