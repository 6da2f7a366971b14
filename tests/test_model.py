import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mini_r1 import InputError
from mini_r1.bases.cold_start import COLD_STARTS
from mini_r1.manifest import weights_hash
from mini_r1.model import EMBEDDED_BASES, load_model, load_tokenizer, model_path
from mini_r1.run import MANIFEST_FILE
from tests.tiny_models import KINDS, build_tokenizer


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
    from transformers import AutoModelForCausalLM

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


# ---- Tokenizers -----------------------------------------------------------------------------

COMPLETION = "2+3=5\n</think>\n<answer>(2+3)*4</answer>"


def saved(folder, kind="qwen3", **changes):
    build_tokenizer(kind, **changes).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_tags_that_are_special_tokens_survive_decoding(kind, tmp_path):
    """Every reward is given for them, and TRL decodes without special tokens."""
    folder = saved(tmp_path / "special", kind, special_tags=True)
    ids = AutoTokenizer.from_pretrained(folder)(COMPLETION)["input_ids"]
    tokenizer = load_tokenizer(folder)
    assert tokenizer(COMPLETION)["input_ids"] == ids
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [COMPLETION]
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""
    # Saved beside the trained weights, it is the same for everybody.
    tokenizer.save_pretrained(tmp_path / "trained")
    for load in (load_tokenizer, AutoTokenizer.from_pretrained):
        again = load(str(tmp_path / "trained"))
        assert again(COMPLETION)["input_ids"] == ids
        assert again.decode(ids, skip_special_tokens=True) == COMPLETION


def test_tags_among_the_further_special_tokens_survive_decoding(tmp_path):
    folder = saved(tmp_path, special_tags=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = ["<think>", "</think>", "<|im_start|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(f"<|im_start|>{COMPLETION}")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == COMPLETION
    tokenizer.save_pretrained(tmp_path / "trained")
    again = AutoTokenizer.from_pretrained(tmp_path / "trained")
    assert again.extra_special_tokens == ["<|im_start|>"]
    assert again.decode(ids, skip_special_tokens=True) == COMPLETION


def test_a_tag_may_end_every_completion(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, eos="</answer>", special_tags=True))
    ids = tokenizer(COMPLETION)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == COMPLETION


def test_a_tokenizer_without_the_letters_of_a_tag_is_refused(tmp_path):
    backend = Tokenizer(WordLevel({"2": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model_name_or_path: .* cannot write <think>"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_a_pad_token_padding_is_trls(kind, tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, kind))
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize("pad", [None, "<pad>"])
def test_without_an_end_there_is_no_completion(pad, tmp_path):
    folder = saved(tmp_path, bos=None, eos=None, pad=pad)
    with pytest.raises(InputError, match=r"model_name_or_path: .* has no eos_token"):
        load_tokenizer(folder)


def test_a_torn_tokenizer_is_explained(tmp_path):
    folder = saved(tmp_path)
    for torn in ("version https://git-lfs.github.com/spec/v1\n", "{}"):
        (tmp_path / "tokenizer.json").write_text(torn)
        with pytest.raises(InputError, match="cannot be loaded"):
            load_tokenizer(folder)
