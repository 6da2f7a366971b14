import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mini_r1 import InputError
from mini_r1.bases.cold_start import COLD_STARTS
from mini_r1.manifest import weights_hash
from mini_r1.model import (
    EMBEDDED_BASES,
    _narrowed,
    adapter_base,
    check_weights,
    is_local,
    load_merged,
    load_model,
    load_tokenizer,
    model_path,
    settle_generation,
    tokenizer_path,
    whole_model,
)
from mini_r1.run import MANIFEST_FILE
from tests.test_hub import put_into_cache
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    shutil.copytree(model_path("tiny_base"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[3]
    weights[name].view(-1)[5] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "model"))
    assert f"model' cannot be used: its weight {name} holds NaN or infinity; " in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_that_cannot_be_had_is_explained(load):
    with pytest.raises(InputError, match=r"'no/such-model' is not in the cache .* or tiny_base"):
        load("no/such-model")
    with pytest.raises(InputError, match="no run or model 'tiny_bas' here"):
        load("tiny_bas")


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("Qwen/Qwen2.5-3B", False),
        ("runs/tiny-cpu", True),
        ("./model", True),
        ("tiny_bas", True),
        ("a/b/c", True),
    ],
)
def test_which_names_cannot_be_of_the_hub(name, local):
    assert is_local(name) is local


# ---- What only loading tells ----------------------------------------------------------------


def damaged(folder, **tensors):
    """The embedded base with other tensors; None takes one away."""
    shutil.copytree(model_path("tiny_base"), folder)
    weights = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("check", [load_model, check_weights])
def test_weights_that_would_be_random_are_refused(check, tmp_path, capsys):
    missing = damaged(tmp_path / "a", **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(
        InputError, match=r"1 of its weights are missing.* model\.layers\.1\.mlp\.up"
    ):
        check(missing)
    wrong = damaged(tmp_path / "b", **{"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 128)})
    with pytest.raises(InputError, match=r"up_proj\.weight is 3 x 128, not 512 x 128"):
        check(wrong)
    assert capsys.readouterr() == ("", "")


def test_checking_the_weights_of_a_sound_model_says_nothing():
    check_weights("tiny_base")


def test_a_bert_is_not_evaluated_as_if_it_continued_text(tmp_path):
    folder = Path(damaged(tmp_path / "bert"))
    config = json.loads((folder / "config.json").read_text())
    changed = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(InputError, match="is a BertForMaskedLM, no causal language model"):
        load_model(str(folder))


def test_a_generation_config_that_contradicts_itself_can_be_saved(tmp_path):
    # As Llama-2-chat's; transformers refuses to save it, at the first checkpoint.
    folder = Path(damaged(tmp_path / "chat"))
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    model = load_model(str(folder))
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "saved")
    settle_generation(model)
    model.save_pretrained(tmp_path / "saved")


# ---- Adapters -------------------------------------------------------------------------------


def adapt(base, folder, names=None):
    """An adapter with random weights on a base, saved; it names the base so."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(load_merged(base), config)
    adapted.peft_config["default"].base_model_name_or_path = names or base
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(20)[None]).logits


def test_an_adapter_is_applied_as_it_was_trained_and_can_be_merged(tmp_path):
    adapter = adapt("tiny_base", tmp_path / "adapter")
    applied, merged = load_model(adapter), load_merged(adapter)
    assert isinstance(applied, PeftModel)
    assert not isinstance(merged, PeftModel)
    assert merged.num_parameters() == load_model("tiny_base").num_parameters()
    assert torch.allclose(logits(applied), logits(merged), atol=1e-3)
    assert not torch.allclose(logits(applied), logits(load_model("tiny_base")), atol=0.1)


def test_a_merged_model_has_its_bases_dtype(tmp_path):
    load_model("tiny_base").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for file in Path(model_path("tiny_base")).glob("*token*"):
        shutil.copy(file, tmp_path / "half")
    merged = load_merged(adapt(str(tmp_path / "half"), tmp_path / "adapter"))
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_generates_in_16_bit_and_trains_on_what_there_is(tmp_path, monkeypatch, has_bf16):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    expected = torch.bfloat16 if has_bf16 else torch.float16
    for name in ("tiny_base", adapt("tiny_base", tmp_path / "adapter")):
        assert load_model(name).dtype == load_merged(name).dtype == torch.float32  # on a CPU
        dtypes = {weight.dtype for weight in _narrowed(load_model(name)).parameters()}
        assert dtypes == {expected}
    half = load_model("tiny_base").to(torch.float16)
    assert _narrowed(half).dtype == torch.float16


def test_an_adapter_of_an_adapter(tmp_path):
    first = adapt("tiny_base", tmp_path / "first")
    second = adapt(first, tmp_path / "second")
    assert whole_model(second) == "tiny_base"
    bottom = load_merged(first)
    expected = PeftModel.from_pretrained(bottom, second)
    assert torch.allclose(logits(load_model(second)), logits(expected), atol=1e-5)
    # Saved without one, it has its base's tokenizer.
    assert tokenizer_path(second) == model_path("tiny_base")


def test_the_base_of_an_adapter_is_found_from_anywhere(tmp_path, monkeypatch):
    project, base = tmp_path / "project", tmp_path / "project" / "models" / "mine"
    base.mkdir(parents=True)
    for written, found in (
        ("models/mine", str(base)),
        (str(base), str(base)),
        ("tiny_base", "tiny_base"),
        # Runs of before stored where it lay.
        ("/home/somebody/mini-r1/src/mini_r1/bases/tiny_base", "tiny_base"),
        ("owner/model", "owner/model"),
    ):
        folder = project / "runs" / "a"
        folder.mkdir(parents=True, exist_ok=True)
        config = {"base_model_name_or_path": written, "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert adapter_base(folder) == found
    monkeypatch.chdir(project)
    config["base_model_name_or_path"] = "models/mine"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_base(Path("runs/a")) == "models/mine"
    assert adapter_base(base) is None


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    adapter = Path(adapt("tiny_base", tmp_path / "a"))
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: torch.zeros(7, 7)}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="size mismatch"):
        load_model(str(adapter))
    del weights[name]
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="missing adapter keys"):
        load_model(str(adapter))
    itself = adapt("tiny_base", tmp_path / "b", names=str(tmp_path / "b"))
    with pytest.raises(InputError, match="is an adapter of itself"):
        load_model(itself)
    assert whole_model(itself) == itself


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


# ---- Strangers' files -----------------------------------------------------------------------


def test_what_a_model_brings_of_code_is_neither_run_nor_offered(tmp_path, monkeypatch):
    shutil.copytree(model_path("tiny_base"), tmp_path, dirs_exist_ok=True)
    for file, changes in (
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Mine", None]}}),
    ):
        content = json.loads((tmp_path / file).read_text()) | changes
        (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "code.py").write_text("raise SystemExit('run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("offered"))
    assert load_tokenizer(str(tmp_path)).eos_token  # tokenizer.json needs no code
    with pytest.raises(InputError, match="needs code of its own; that is not run here"):
        load_model(str(tmp_path))


def test_a_pickle_of_the_hub_is_not_loaded(tmp_path, monkeypatch):
    shutil.copytree(model_path("tiny_base"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    put_into_cache(tmp_path, "owner/model", tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match=r"it comes as a pickle, which could run"):
        load_model("owner/model")
