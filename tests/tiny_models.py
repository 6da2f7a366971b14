"""Tiny random models of many families, built in a moment, without a hub.

    build(folder, "llama")                     # as the family comes: BOS printed and added, no pad
    build(folder, "qwen3", pad=None, hidden_size=16)

What is real: the architecture, the special tokens, TRL's copy of the chat template. What is not:
the vocabulary, which is the embedded base's with the family's special tokens, and the weights.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import trl
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mini_r1.completion import TAGS
from mini_r1.model import model_path

CHAT_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (Path(model_path("tiny_base")) / "chat_template.jinja").read_text(encoding="utf-8")


def trl_template(name: str) -> str:
    """One of the chat templates that TRL ships, such as `qwen3`."""
    return (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Kind:
    """A family: its configuration, its chat template, its special tokens.

    Attributes:
        adds: the special tokens that the tokenizer puts around every text, $A, by itself.
        special: further special tokens.
    """

    model_type: str = "qwen2"
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = CHATML
    bos: str | None = None
    eos: str | None = "<|im_end|>"
    pad: str | None = "<|endoftext|>"
    adds: str = "$A"
    special: tuple[str, ...] = ()


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
KINDS = {
    "qwen2": Kind("qwen2", SMALL, trl_template("qwen2_5"), special=("<|im_start|>",)),
    "qwen3": Kind("qwen3", SMALL, trl_template("qwen3"), special=("<|im_start|>",)),
    "llama": Kind(
        "llama",
        SMALL,
        trl_template("llama3"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad=None,
        adds="<|begin_of_text|> $A",
        special=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "gemma": Kind(
        "gemma",
        SMALL,
        trl_template("gemma"),
        bos="<bos>",
        eos="<end_of_turn>",
        pad="<pad>",
        adds="<bos> $A",
        special=("<start_of_turn>",),
    ),
    "gemma2": Kind("gemma2", SMALL),
    "mistral": Kind("mistral", SMALL),
    "mixtral": Kind("mixtral", {**SMALL, "num_local_experts": 4}),
    "olmo2": Kind("olmo2", SMALL),
    "phi": Kind("phi", {**SMALL, "num_key_value_heads": 2}),
    "qwen3_moe": Kind(
        "qwen3_moe",
        {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt2": Kind(
        "gpt2",
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 1024},
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad=None,
    ),
}


def build_tokenizer(kind: str, special_tags: bool = False, **changes: Any) -> Any:
    """The tokenizer of a family.

    Args:
        special_tags: make special tokens of <think>, </think>, <answer> and </answer>.
        changes: other values for the attributes of its `Kind`.
    """
    made = replace(KINDS[kind], **changes)
    backend = Tokenizer.from_file(str(Path(model_path("tiny_base")) / "tokenizer.json"))
    special = {made.bos, made.eos, made.pad, *made.special, *(TAGS if special_tags else ())}
    backend.add_special_tokens([AddedToken(token) for token in sorted(special - {None})])
    ids = backend.get_vocab()
    around = [(token, ids[token]) for token in made.adds.split() if token != "$A"]
    backend.post_processor = TemplateProcessing(single=made.adds, special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=made.bos,
        eos_token=made.eos,
        pad_token=made.pad,
        chat_template=made.chat_template,
    )


def build(folder: Path, kind: str, config: dict[str, Any] | None = None, **changes: Any) -> str:
    """Save a model of a family, with its tokenizer, and return the folder's name.

    Args:
        config: other values for its configuration.
        changes: see `build_tokenizer`.
    """
    tokenizer = build_tokenizer(kind, **changes)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    made = AutoConfig.for_model(
        KINDS[kind].model_type,
        **{**KINDS[kind].config, **(config or {})},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return str(folder)
