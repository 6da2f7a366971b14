import json

import pytest
import yaml
from peft import LoraConfig

from mini_r1 import InputError
from mini_r1.bases.english import search
from mini_r1.bases.sft import labelled, teach
from mini_r1.countdown.puzzles import Puzzle
from mini_r1.evaluate import evaluate_model
from mini_r1.manifest import weights_hash
from mini_r1.model import load_merged, load_model, load_tokenizer, model_path
from mini_r1.run import MANIFEST_FILE

RECIPE = {
    "model_name_or_path": "tiny_base",
    "num_puzzles": 200,
    "num_numbers": [3],
    "number_range": [1, 20],
    "target_range": [1, 100],
    "prompt_template": "compact",
    "max_completion_length": 200,
    "num_eval_puzzles": 4,
    "num_eval_samples": 1,
    "seed": 5,
}


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(RECIPE | changes))
        return str(path)

    return write


def test_the_completion_is_learned_and_what_is_hidden_is_not():
    tokenizer = load_tokenizer("tiny_base")
    completion = f"{search(Puzzle((4, 4, 6), 10), 12)}{tokenizer.eos_token}"
    prompt_ids, ids = (tokenizer(text)["input_ids"] for text in ("Make 10<think>", completion))
    newline = tokenizer("\n")["input_ids"][0]
    plain, hiding = labelled(
        tokenizer, ["Make 10<think>"] * 2, [completion] * 2, [set(), {newline}]
    )
    for row in (plain, hiding):
        assert row["input_ids"] == prompt_ids + ids
        assert row["labels"][: len(prompt_ids)] == [-100] * len(prompt_ids)
    assert plain["labels"][len(prompt_ids) :] == ids
    shown = hiding["labels"][len(prompt_ids) :]
    for position, token in enumerate(ids):
        after_newline = position > 0 and ids[position - 1] == newline
        assert shown[position] == (-100 if after_newline else token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_completion_length": 9}, "max_completion_length: no search of at most 12 tries"),
        ({"num_puzzles": 1}, "leave"),
        ({"prompt_template": "r1"}, "prompt_template: no 'r1'"),
    ],
)
def test_what_cannot_be_taught_is_refused_and_leaves_nothing(recipe, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        teach("tiny_base", recipe(**changes), tmp_path / "taught", 16)
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.slow
def test_an_adapter_is_merged_and_taught_as_a_whole(recipe, tmp_path):
    base = load_model("tiny_base")
    base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    base.save_pretrained(tmp_path / "adapter")
    load_tokenizer("tiny_base").save_pretrained(tmp_path / "adapter")
    teach(str(tmp_path / "adapter"), recipe(), tmp_path / "taught", 16)
    merged, taught = (load_merged(str(tmp_path / name)) for name in ("adapter", "taught"))
    moved = [
        (name, float((weight - taught.get_parameter(name)).detach().abs().max()))
        for name, weight in merged.named_parameters()
    ]
    assert [name for name, change in moved if not 0 < change < 0.1] == []


def test_quantized_weights_are_not_taught(recipe, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        model_path("tiny_base"), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("tiny_base").save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="model: quantized; teach the whole model"):
        teach(str(tmp_path / "model"), recipe(), tmp_path / "taught", 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "r.yaml"]


@pytest.mark.slow
def test_a_taught_model_is_a_folder_like_any_other_and_repeatable(recipe, tmp_path):
    for name in ("a", "b"):
        teach("tiny_base", recipe(), tmp_path / name, 16)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    manifest = json.loads((tmp_path / "a" / MANIFEST_FILE).read_text())
    assert manifest["model"] == {
        "name": "tiny_base",
        "sha256": weights_hash(model_path("tiny_base")),
    }
    assert manifest["weights_sha256"] == weights_hash(tmp_path / "a")
    assert manifest["weights_sha256"] != manifest["model"]["sha256"]
    result = evaluate_model(str(tmp_path / "a"))  # the recipe beside it says the task
    assert (result["num_puzzles"], result["max_completion_length"]) == (4, 200)
    with pytest.raises(InputError, match="exists"):
        teach("tiny_base", recipe(), tmp_path / "a", 16)
