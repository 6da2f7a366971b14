"""Models that are not the embedded base: trained for two steps, evaluated and played with.

How each family is asked, random models of many kinds, the way from an adapter to what is trained on
it, and from the cache without a network.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationMixin

from mini_r1.cli import main
from mini_r1.evaluate import evaluate_model
from mini_r1.model import load_merged, load_model, load_tokenizer, model_path
from mini_r1.prompts import THINK_PREFILL
from mini_r1.run import MANIFEST_FILE, MERGED_FOLDER, RECIPE_FILE, STATE_FILE, SUMMARY_FILE
from tests.test_hub import put_into_cache
from tests.tiny_models import CHATML, build, build_tokenizer, trl_template

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHORT = {
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_generations": 4,
    "max_completion_length": 16,
    "num_puzzles": 60,
    "num_eval_puzzles": 4,
    "num_eval_samples": 1,
    "eval_strategy": "no",
}
MINI_R1 = {"prompt_template": "mini-r1", "max_prompt_length": 480}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 0.01}


def options(run_dir, **changes):
    given = {**SHORT, "output_dir": run_dir, **changes}
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


def train(run_dir, **changes):
    recipe = ROOT / "recipes" / "tiny-cpu.yaml"
    assert main(["train", str(recipe), *options(run_dir, **changes)]) == 0
    return run_dir


# ---- How they are asked ---------------------------------------------------------------------


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
    train(run_dir, model_name_or_path=model, **MINI_R1)
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
    quiet = {"chat_template_kwargs": "{enable_thinking: false}"}
    train(tmp_path / "run", model_name_or_path=model, **MINI_R1, **quiet)
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
    train(tmp_path / "run", model_name_or_path=model, max_completion_length=120)
    logged = json.loads((tmp_path / "run" / STATE_FILE).read_text())["log_history"]
    assert max(line.get("rewards/format_reward/mean", 0) for line in logged) > 0.5
    capsys.readouterr()
    for name in (str(model), "tiny_base"):
        few = ["--num-puzzles", "20", "--num-samples", "2"]
        assert main(["eval", name, *few, "--json"]) == 0
    special, plain = map(json.loads, capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    assert special["format"] > 0.5
    assert {**special, "model": "tiny_base"} == plain


# ---- Kinds ----------------------------------------------------------------------------------


def check_run(run_dir):
    """A finished run, whose evaluation anybody can repeat."""
    after = json.loads((run_dir / "eval" / "after.json").read_text())
    again = evaluate_model(str(run_dir))
    assert [e["completion"] for e in again["examples"]] == [
        e["completion"] for e in after["examples"]
    ]
    assert not (run_dir / MERGED_FOLDER).exists()


@pytest.mark.parametrize(
    "kind", ["gemma2", "gpt2", "llama", "mistral", "mixtral", "olmo2", "phi", "qwen3_moe"]
)
def test_a_model_of_any_kind_can_be_evaluated_and_trained(kind, tmp_path, capsys):
    build(tmp_path / "model", kind)
    recipe = tmp_path / f"{kind}.yaml"
    text = (ROOT / "recipes" / "tiny-cpu.yaml").read_text()
    recipe.write_text(text.replace("path: tiny_base\n", f"path: {tmp_path}/model\n"))
    assert main(["doctor", str(recipe)]) == 0
    assert "an estimate: " in capsys.readouterr().out
    short = ["--recipe", str(recipe), "--num-puzzles", "2", "--num-samples", "1"]
    assert main(["eval", str(tmp_path / "model"), *short]) == 0
    check_run(train(tmp_path / "run", model_name_or_path=tmp_path / "model"))
    lora = LORA | ({"lora_dropout": 0} if kind in ("mixtral", "qwen3_moe") else {})
    check_run(train(tmp_path / "lora", model_name_or_path=tmp_path / "model", **lora))


def test_a_model_in_shards(tmp_path):
    model = load_model(build(tmp_path / "model", "llama"))
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    check_run(train(tmp_path / "run", model_name_or_path=tmp_path / "model"))


def test_a_generation_config_that_contradicts_itself(tmp_path):
    build(tmp_path / "model", "llama")
    chat = '{"do_sample": false, "temperature": 0.6, "eos_token_id": 256}'
    (tmp_path / "model" / "generation_config.json").write_text(chat)
    check_run(train(tmp_path / "run", model_name_or_path=tmp_path / "model"))


# ---- Adapters -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A finished LoRA run on the embedded base, in a folder that is not the current one."""
    run_dir = tmp_path_factory.mktemp("runs") / "lora"
    return train(run_dir, model_name_or_path="tiny_base", **LORA)


def test_an_adapter_names_its_base_and_no_folder_of_this_machine(lora):
    for folder in (lora, lora / "checkpoint-2"):
        adapter = json.loads((folder / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "tiny_base"
        assert model_path("tiny_base") not in (folder / "README.md").read_text()
    check_run(lora)


@pytest.mark.parametrize("how", [{}, LORA], ids=["in full", "with LoRA"])
def test_training_goes_on_from_an_adapter(lora, how, tmp_path, capsys):
    # Steps too small for float32, so that what is saved is what was started from.
    still = {"learning_rate": 1e-30, "beta": 0.04}
    run_dir = train(tmp_path / "run", model_name_or_path=lora, **{**how, **still})
    printed = capsys.readouterr().out
    assert printed.count(f"training starts from {lora}, merged into tiny_base\n") == 1
    check_run(run_dir)
    merged, trained = load_merged(str(lora)).state_dict(), load_merged(str(run_dir))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, merged[name]), name
    manifest = json.loads((run_dir / MANIFEST_FILE).read_text())
    assert manifest["model"]["base"] == "tiny_base"
    # It goes on once more, and an adapter on an adapter on an adapter is evaluated.
    check_run(train(run_dir, model_name_or_path=lora, max_steps=3, **{**how, **still}))
    check_run(train(tmp_path / "next", model_name_or_path=run_dir, **LORA))


def test_training_starts_from_the_checkpoint_of_an_unfinished_run(lora, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(lora, unfinished)
    for file in ("adapter_config.json", "adapter_model.safetensors", "summary.json"):
        (unfinished / file).unlink()
    run_dir = train(tmp_path / "run", model_name_or_path=unfinished, **LORA)
    assert f"starts from {unfinished}/checkpoint-2, merged into" in capsys.readouterr().out
    adapter = json.loads((run_dir / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == f"{unfinished}/checkpoint-2"
    check_run(run_dir)
    # With other weights, what goes on would be another model.
    weights = unfinished / "checkpoint-2" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    again = options(run_dir, model_name_or_path=unfinished, **LORA | {"max_steps": 4})
    assert main(["train", str(ROOT / "recipes" / "tiny-cpu.yaml"), *again]) == 2
    assert "have changed since" in capsys.readouterr().err


# ---- The hub --------------------------------------------------------------------------------


@pytest.mark.parametrize("hub", ["http://127.0.0.1:9", None], ids=["refused", "as it is"])
def test_from_the_cache_without_a_network(hub, tmp_path):
    put_into_cache(tmp_path, "owner/model", model_path("tiny_base"))
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub or "http://no.such.host"}
    del env["HF_HUB_OFFLINE"]
    recipe = str(ROOT / "recipes" / "tiny-cpu.yaml")
    model = ["owner/model", "--recipe", recipe, "--num-puzzles", "4", "--num-samples", "1"]
    run = [recipe, *options(tmp_path / "run", model_name_or_path="owner/model")]
    for command in (["eval", *model], ["train", *run]):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "mini_r1", *command], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Retrying" not in done.stderr
        assert time.monotonic() - started < 60
