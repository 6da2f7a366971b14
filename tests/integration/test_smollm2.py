"""A real language model goes every way that the embedded bases go: SmolLM2-135M-Instruct.

`make test-all` fetches it. A few tokens and steps each: that it works is shown here, and that it
learns is for a GPU.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from mini_r1.cli import main
from mini_r1.manifest import weights_hash
from mini_r1.model import load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.run import MANIFEST_FILE, REPORT_FILE, SUMMARY_FILE
from tests.integration.get_smollm2 import GGUF
from tests.integration.test_vllm import PYTHON, logp_differences
from tests.test_prompts import ORIGINAL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.minutes,
    pytest.mark.skipif(not GGUF.exists(), reason=f"needs {GGUF}: run make test-all"),
]
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"
SHORT = {
    "use_cpu": True,
    "bf16": False,
    "tf32": False,
    "num_puzzles": 200,
    "num_eval_puzzles": 8,
    "num_eval_samples": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 1,
    "lr_scheduler_type": "constant",  # else the first step is the warm-up's, and of length 0
    "save_strategy": "no",
}
# In so few tokens nothing is solved, and where all fare alike nothing is learned.
REWARD = """
def length(completions, **columns):
    return [float(len(text)) for text in completions]
"""
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
KINDS = {
    "full": {"max_steps": 2, "per_device_train_batch_size": 16},
    "lora": LORA,
    "qlora": {**LORA, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all of it lies; gigabytes, so it does not outlive the tests."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "letters.py").write_text(REWARD)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def model(folder):
    assert main(["model", "convert", str(GGUF), str(folder / "model")]) == 0
    return str(folder / "model")


@pytest.fixture(scope="module")
def recipe(folder, model):
    """The shipped recipe, cut short, for the model as it comes."""
    shortened = yaml.safe_load(RECIPE.read_text()) | SHORT | {"model_name_or_path": model}
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(shortened))
    return path


def train(recipe, output_dir, program=(sys.executable, "-m", "mini_r1", "train"), **changes):
    options = {"output_dir": output_dir, "reward_funcs": "letters.length", **changes}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [*map(str, program), str(recipe), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, cwd=output_dir.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out success" in done.stdout
    return output_dir


def test_the_converted_model_is_whole(model):
    with safe_open(Path(model) / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    tokenizer = load_tokenizer(model)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = "Start from 44 and 35: 44 + 35 = 79, which is 19 short of 98.\n</think>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_prompt_is_the_originals_word_for_word(model):
    tokenizer, template = load_tokenizer(model), PROMPT_TEMPLATES["mini-r1"]
    prompt = template.render([19, 36, 55, 7], 65, tokenizer)
    assert prompt == ORIGINAL
    assert len(tokenizer(prompt)["input_ids"]) == 157


def test_it_is_evaluated_and_speaks(folder, model, recipe, capsys):
    options = ["--recipe", str(recipe), "--json", str(folder / "eval.json")]
    assert main(["eval", model, *options]) == 0
    result = json.loads((folder / "eval.json").read_text())
    assert (result["num_puzzles"], result["mean_completion_tokens"]) == (8, 8)
    # A model with scrambled weights would write nothing of the kind.
    texts = " ".join(example["completion"] for example in result["examples"])
    assert {"the", "to", "numbers", "equation", "we", "I", "is", "a"} & set(texts.split())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained(folder, model, recipe, kind, capsys, monkeypatch):
    run_dir = train(recipe, folder / kind, **KINDS[kind])
    assert json.loads((run_dir / SUMMARY_FILE).read_text())["num_puzzles"] == 8
    assert (run_dir / REPORT_FILE).exists()
    if kind == "full":
        assert weights_hash(run_dir) != weights_hash(model)
    else:
        adapter = load_file(run_dir / "adapter_model.safetensors")
        assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    if kind == "lora":
        monkeypatch.chdir(folder)  # where the reward is
        assert main(["play", str(run_dir), "--nums", "4", "5", "12", "--target", "68"]) == 0
        assert "68" in capsys.readouterr().out


def test_it_is_taught_and_then_trained(folder, model, recipe):
    """The recipe's own way: a cold start on searches in plain English, then GRPO."""
    cold_start = folder / "cold-start.yaml"
    content = yaml.safe_load(recipe.read_text()) | {"max_completion_length": 80}
    cold_start.write_text(yaml.safe_dump(content))
    taught = folder / "taught"
    options = ["--recipe", str(cold_start), "--output", str(taught), "--num-traces", "16"]
    assert main(["base", "sft", model, *options]) == 0
    manifest = json.loads((taught / MANIFEST_FILE).read_text())
    assert manifest["model"]["sha256"] == weights_hash(model) != manifest["weights_sha256"]
    run_dir = train(recipe, folder / "cold-started", model_name_or_path=taught)
    assert (run_dir / SUMMARY_FILE).exists()


@pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM: run make test-all")
def test_colocated_vllm_follows_its_weights(folder, recipe):
    """It samples in 16 bit, as vLLM does with float32 weights: 0.04 off, with stale ones 5."""
    script = ROOT / "tests" / "integration" / "vllm_on_cpu.py"
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 200}
    # An update that would be seen in the next step, had vLLM not received it.
    changes = {"max_steps": 2, "learning_rate": 1e-3}
    program = (PYTHON, script, "--config")
    run_dir = train(recipe, folder / "vllm", program, **vllm, **changes)
    differences = logp_differences(run_dir)
    assert len(differences) == 2
    assert max(differences) < 0.1
