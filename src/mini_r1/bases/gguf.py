"""A GGUF file -> a folder that loads like any other model.

    mini-r1 model convert MODEL.gguf OUTPUT

GGUF is llama.cpp's one-file format; transformers reads it with the package `gguf` and unpacks its
blocks. The folder is in float32: that holds whatever a block unpacks to, without another rounding
on top of the quantization's, and a recipe's `dtype` narrows it when it is loaded. Left out: the way
back, and files that are cut into several.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mini_r1 import InputError, one_line, quirks
from mini_r1.run import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"GGUF"


def convert(file: Path, output: Path) -> None:
    """Unpack a GGUF file into a new folder: weights, config, tokenizer with its chat template.

    Raises:
        InputError: no such file, no whole GGUF file of a causal language model, the package `gguf`
            is missing, or the folder exists.
    """
    # what is cheap to tell, before the slow imports
    try:
        with file.open("rb") as content:
            magic = content.read(len(MAGIC))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=file) from None
    if magic != MAGIC:
        raise InputError(f"no GGUF file: it begins with {magic!r}, not with {MAGIC!r}", where=file)
    if find_spec("gguf") is None:
        raise InputError(
            "the package gguf is not installed; run pip install -c constraints.txt -e '.[convert]'"
        )
    with new_folder(output) as folder:
        quirks.quiet_cpu_imports()
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # whatever their reader says of a file that is torn or of a kind that it does not know
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        try:
            tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(**source))
            loading = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:
            raise InputError(
                "cannot be converted; is it whole, and a causal language model? "
                f"({one_line(error, 200)})",
                where=file,
            ) from error
        model, loaded = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loading)
        if missing := sorted(loaded["missing_keys"]):
            raise InputError(
                f"{len(missing)} tensors are missing, {missing[0]} first; "
                "is it one part of a file that was cut?",
                where=file,
            )
        tokenizer.clean_up_tokenization_spaces = False  # it would drop spaces before punctuation
        quirks.forget_gguf(model)
        quirks.end_as_config_says(tokenizer, model.config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{output}: {model.num_parameters():,} parameters in float32")
    if not tokenizer.chat_template:
        print("it has no chat template: ask it with prompt_template: tinyzero")
