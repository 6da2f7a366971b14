"""A name -> weights and tokenizer: an embedded base, a folder, a run, or a model of the hub."""

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
    """The tokenizer of a model.

    Raises:
        InputError: it cannot be had; names an embedded base, which always can.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(name), revision=revision)
    except (OSError, ValueError) as error:
        raise model_error(name, error) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


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
