"""Model folders of real classes, and each way in which one can be useless."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mini_r1 import model_files
from mini_r1.model import model_path

BASE = Path(model_path("tiny_base"))
LENGTHS = (32, 120)
# What each class calls its sizes.
LLAMA_LIKE = {
    "vocab_size": 445,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GPT_LIKE = {"vocab_size": 445, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
KINDS = {
    "gemma": LLAMA_LIKE | {"head_dim": 8},
    "gpt2": GPT_LIKE,
    "gpt_neox": LLAMA_LIKE,
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4},
    "olmo2": LLAMA_LIKE,
    "opt": LLAMA_LIKE | {"ffn_dim": 32, "word_embed_proj_dim": 8},
    "phi": LLAMA_LIKE,
    "qwen3_moe": LLAMA_LIKE | EXPERTS,
}


def save(folder, kind, **changes):
    """A random model of a kind, with the tokenizer of the embedded base."""
    config = AutoConfig.for_model(kind, **{**KINDS[kind], **changes})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=changes.get("max_shard_size", "5GB"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE / name, folder)
    return folder


def problems(folder, lengths=LENGTHS):
    return [problem.problem for problem in model_files.problems(folder, lengths)]


def change(file, **values):
    """New values in a JSON file; None removes the key."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "llama", "llama", tie_word_embeddings=False)


@pytest.fixture
def model(saved, tmp_path):
    """A sound model, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_can_be_used(kind, tmp_path):
    assert problems(save(tmp_path, kind)) == []


@pytest.mark.parametrize("base", ["tiny_base", "tiny_base_hard"])
def test_the_embedded_bases_can_be_used(base):
    assert problems(Path(model_path(base))) == []


def test_shards_are_read_as_one_model(tmp_path):
    save(tmp_path, "llama", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert problems(tmp_path) == []
    next(tmp_path.glob("model-00002*")).unlink()
    (problem,) = problems(tmp_path)
    assert "lacks 1 of" in problem
    assert "model-00002" in problem


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_a_pickle_is_refused_in_one_line(tmp_path, name):
    save(tmp_path, "llama")
    torch.save({}, tmp_path / "training_args.bin")  # which a run leaves beside its weights
    torch.save({}, tmp_path / name)
    assert problems(tmp_path) == []  # nobody loads it
    (tmp_path / "model.safetensors").unlink()
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{tmp_path / name} is a pickle, which could run code of its")
    assert "\n" not in problem
    (tmp_path / name).unlink()
    assert "holds no weights" in problems(tmp_path)[0]


def test_an_adapter_in_a_pickle_is_refused_in_one_line(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny_base"}')
    torch.save({}, tmp_path / "adapter_model.bin")
    (problem,) = map(str, model_files.adapter_problems(tmp_path))
    assert "adapter_model.bin is a pickle" in problem


# ---- Damage ---------------------------------------------------------------------------------

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4096\n"


def truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def reshape(folder, name, *shape, dtype=torch.float32):
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.zeros(*shape, dtype=dtype)
    save_file(weights, folder / "model.safetensors")


def without(folder, *names):
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(names)}
    save_file(kept, folder / "model.safetensors")


def add_token(folder, content):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 445, "content": content}
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def quantize(folder, method):
    change(folder / "config.json", quantization_config={"quant_method": method})


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda f: truncate(f / "config.json", 0.5), "config.json cannot be read"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), "is no JSON object"),
    "no kind": (
        lambda f: change(f / "config.json", model_type=None, architectures=None),
        "names no model_type",
    ),
    "a kind of tomorrow": (
        lambda f: change(
            f / "config.json", model_type="llama9", architectures=["Llama9ForCausalLM"]
        ),
        "is a Llama9ForCausalLM, no causal language model that transformers 5.17",
    ),
    "code of its own": (
        lambda f: change(f / "config.json", model_type="mine", auto_map={"AutoConfig": "x.y"}),
        "needs code of its own",
    ),
    "without its head": (
        lambda f: change(f / "config.json", architectures=["LlamaModel"]),
        "is a LlamaModel, no causal language model",
    ),
    "a classifier": (
        lambda f: change(f / "config.json", architectures=["LlamaForSequenceClassification"]),
        "no causal language model",
    ),
    "broken generation config": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json cannot be read",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "GGUF": (
        lambda f: (f / "model.safetensors").rename(f / "model.gguf"),
        "holds GGUF files, which cannot be trained",
    ),
    "LFS pointer": (
        lambda f: (f / "model.safetensors").write_text(LFS),
        "is only a pointer of Git LFS; run 'git lfs install' and 'git lfs pull'",
    ),
    "LFS pointer of the tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(LFS),
        "tokenizer.json is only a pointer of Git LFS",
    ),
    "truncated": (lambda f: truncate(f / "model.safetensors", 0.9), "is cut off: "),
    "truncated header": (
        lambda f: truncate(f / "model.safetensors", 0.001),
        "is cut off within its header",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is no safetensors file"),
    "a web page": (
        lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html><html>"),
        "is no safetensors file",
    ),
    "a header without sense": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b'{"x": 1}'),
        "is no safetensors file",
    ),
    "wrong vocabulary": (
        lambda f: reshape(f, "model.embed_tokens.weight", 500, 16),
        "model.embed_tokens.weight is 500 x 16, and config.json says 445 x 16",
    ),
    "wrong width": (
        lambda f: reshape(f, "lm_head.weight", 445, 48),
        "lm_head.weight is 445 x 48, and config.json says 445 x 16",
    ),
    "no numbers": (
        lambda f: reshape(f, "model.embed_tokens.weight", 445, 16, dtype=torch.int8),
        "is of type I8",
    ),
    "no head": (lambda f: without(f, "lm_head"), "the weights have no lm_head"),
    "too few layers": (
        lambda f: without(f, "model.layers.1."),
        "the weights have 1 layers, and config.json says 2",
    ),
    "too many layers": (
        lambda f: change(f / "config.json", num_hidden_layers=1),
        "the weights have 2 layers, and config.json says 1",
    ),
    "a tokenizer without a model": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json describes no tokenizer",
    ),
    "no tokenizer": (
        lambda f: [file.unlink() for file in f.glob("tokenizer*")],
        "holds no tokenizer",
    ),
    "a tokenizer that counts too far": (
        lambda f: (
            reshape(f, "model.embed_tokens.weight", 300, 16),
            reshape(f, "lm_head.weight", 300, 16),
            change(f / "config.json", vocab_size=300),
        ),
        "but the embedding has only 300 rows; call resize_token_embeddings",
    ),
    "a tag without a row": (lambda f: add_token(f, "<think>"), "counts to 445 ('<think>')"),
    "AWQ": (lambda f: quantize(f, "awq"), "quantized by awq, and gptqmodel is not installed"),
    "GPTQ": (lambda f: quantize(f, "gptq"), "run pip install gptqmodel optimum, or write"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_makes_a_model_useless_is_told(damage, model):
    do, message = DAMAGE[damage]
    assert problems(model) == []
    do(model)
    (problem,) = problems(model)
    assert message in problem
    assert "\n" not in problem
    assert str(model) in problem


def test_a_token_that_no_prompt_holds_may_lack_a_row(model):
    # As the one for images in Gemma 3's text models.
    add_token(model, "<image_soft_token>")
    assert problems(model) == []


@pytest.mark.parametrize(
    ("kind", "names", "usable"),
    [
        ("bert", ["BertForMaskedLM"], False),
        ("bert", ["BertLMHeadModel"], False),
        ("roberta", ["RobertaForCausalLM"], False),
        ("t5", ["T5ForConditionalGeneration"], False),
        ("clip", ["CLIPModel"], False),
        ("qwen2", None, True),
        ("gemma3", ["Gemma3ForConditionalGeneration"], True),  # their text part is loaded
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], True),
    ],
)
def test_only_what_continues_text_can_be_used(kind, names, usable, model):
    change(model / "config.json", model_type=kind, architectures=names)
    told = list(model_files.config_problems(model))
    assert bool(told) is not usable
    assert all("no causal language model" in str(problem) for problem in told)


def test_an_encoder_that_was_made_a_decoder_can_be_used(model):
    lm_head = {"model_type": "bert", "architectures": ["BertLMHeadModel"]}
    change(model / "config.json", **lm_head, is_decoder=True)
    assert list(model_files.config_problems(model)) == []


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"max_position_embeddings": 152}, None),
        ({"max_position_embeddings": 100}, "write max_completion_length: 68, or another model"),
        ({"max_position_embeddings": None, "n_positions": 100}, "has 100 positions"),
        ({"max_position_embeddings": 30}, "max_completion_length 120; write another model"),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "yarn"}}, None),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear"}}, None),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_prompt_and_completion_must_fit_the_positions(config, problem, model):
    change(model / "config.json", **config)
    told = problems(model)
    assert len(told) == (problem is not None)
    assert problem is None or problem in told[0]


def test_the_text_part_of_a_model_that_sees_counts(model):
    config = json.loads((model / "config.json").read_text())
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (model / "config.json").write_text(json.dumps(whole | {"text_config": config}))
    assert problems(model) == []
    whole["text_config"] = config | {"num_hidden_layers": 3}
    (model / "config.json").write_text(json.dumps(whole))
    assert "config.json says 3" in problems(model)[0]


# ---- Adapters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "holds an adapter without weights"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"peft_type": "PROMPT_TUNING"}, "of the type PROMPT_TUNING, which cannot be merged"),
    ],
)
def test_what_makes_an_adapter_useless_is_told(config, message, tmp_path):
    sound = {"base_model_name_or_path": "tiny_base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(sound | config))
    (problem,) = model_files.adapter_problems(tmp_path)
    assert message in str(problem)


def test_a_folder_is_judged_without_torch():
    code = (
        "import sys; from pathlib import Path; from mini_r1.model_files import problems\n"
        f"print(list(problems(Path({str(BASE)!r}), (32, 120))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[] False\n"
