"""A name -> weights and tokenizer: an embedded base, a folder, a run, or a model of the hub."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mini_r1 import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_BASES = ("tiny_base", "tiny_base_hard")  # folders of bases/; bases.cold_start makes them


def model_path(name: str) -> str:
    """The folder of an embedded base, or the name itself: a folder or a model id of the hub."""
    return str(Path(__file__).parent / "bases" / name) if name in EMBEDDED_BASES else name


def is_local(name: str) -> bool:
    """Whether a name can only mean a file or folder: ids of the hub are `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model: it pads, ends a text, and decodes the tags of an answer.

    Raises:
        InputError: it cannot be had; names an embedded base, which always can. Or no completion
            could be judged, since it names no end or loses the tags.
    """
    from transformers import AutoTokenizer

    from mini_r1.completion import TAGS

    key = "model_name_or_path"
    try:
        loaded = AutoTokenizer.from_pretrained(model_path(name), revision=revision)
    except Exception as error:  # the tokenizers library raises plain ones
        raise model_error(name, error) from error
    tokenizer = _with_plain_tags(cast("PreTrainedTokenizerBase", loaded))
    if tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of '{name}' has no eos_token, so no completion would end; "
            "write one into its tokenizer_config.json",
            key=key,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as TRL does
    for tag in TAGS:
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        if tag not in cast(str, tokenizer.decode(ids, skip_special_tokens=True)):
            raise InputError(
                f"the tokenizer of '{name}' cannot write {tag}, so no completion would earn a "
                "reward; choose another model",
                key=key,
            )
    return tokenizer


def _with_plain_tags(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer with tags that decoding keeps, where they are special tokens; the ids stay.

    Rewards are given for them, and TRL decodes without special tokens.
    """
    from mini_r1.completion import TAGS

    def holds_tag(token: object) -> bool:
        return any(tag in str(token) for tag in TAGS)

    added = tokenizer.added_tokens_decoder.values()
    special = [token for token in added if token.special and holds_tag(token)]
    if not special:
        return tokenizer
    for token in special:
        token.special = False
    tokenizer.add_tokens(special)
    # Of those that a model has besides eos and the like: saving would make them special again.
    others = [token for token in tokenizer.extra_special_tokens if not holds_tag(token)]
    tokenizer.extra_special_tokens = others
    # The tokens are plain now, but for the set of the special ones, which only grows. A copy is
    # rebuilt from the tokens.
    return copy.deepcopy(tokenizer)


def load_model(name: str, revision: str | None = None) -> "PreTrainedModel":
    """A causal language model for generation, LoRA adapters applied.

    In its own dtype, on the GPU if there is one.

    Raises:
        InputError: it cannot be had; names an embedded base, which always can.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path(name), revision=revision, dtype="auto"
        )
    except (OSError, ValueError) as error:
        raise model_error(name, error) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def model_error(name: str, error: Exception) -> InputError:
    """What to tell a user whose model cannot be loaded, in one line."""
    return InputError(
        f"'{name}' cannot be loaded ({one_line(error, 200)}); "
        f"without network write a local folder or {EMBEDDED_BASES[0]}",
        key="model_name_or_path",
    )
