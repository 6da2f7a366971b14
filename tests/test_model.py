import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.bases.cold_start import COLD_STARTS
from mini_r1.manifest import weights_hash
from mini_r1.model import EMBEDDED_BASES, load_model, load_tokenizer, model_path
from mini_r1.run import MANIFEST_FILE


def manifest_of(name):
    return json.loads((Path(model_path(name)) / MANIFEST_FILE).read_text())


def test_the_shipped_base_calculates_well_and_is_impatient():
    heldout = manifest_of("tiny_base")["heldout"]
    assert 0.2 < heldout["success"] < 0.3
    assert heldout["behaviors"]["true_arithmetic"] > 0.98
    assert heldout["behaviors"]["gave_up"] > 0.7


@pytest.mark.parametrize("name", EMBEDDED_BASES)
def test_an_embedded_base_is_what_its_manifest_says(name):
    folder = Path(model_path(name))
    manifest = manifest_of(name)
    assert weights_hash(folder) == manifest["weights_sha256"]
    assert load_model(name).num_parameters() == manifest["parameters"]
    assert manifest["cold_start"] == json.loads(json.dumps(asdict(COLD_STARTS[name])))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6


def test_the_embedded_base_loads_with_plain_auto_classes():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        kind.from_pretrained(model_path("tiny_base"))
        for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.config.model_type == "qwen2"
    assert len(tokenizer) == model.config.vocab_size
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_that_cannot_be_had_is_explained(load):
    with pytest.raises(InputError, match=r"'no/such-model' cannot be loaded .* or tiny_base"):
        load("no/such-model")
