"""A name -> weights and tokenizer: an embedded base, a folder, a run, or a model of the hub."""

import copy
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mini_r1 import InputError, hub, one_line, quirks
from mini_r1.model_files import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    adapter_config,
    config_problems,
    problems,
    quantized_by,
    read_json,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_BASES = ("tiny_base", "tiny_base_hard")  # folders of bases/; bases.cold_start makes them


# ---- Names ----------------------------------------------------------------------------------


def model_path(name: str) -> str:
    """The folder of an embedded base, or the name itself: a folder or a model id of the hub."""
    return str(Path(__file__).parent / "bases" / name) if name in EMBEDDED_BASES else name


def is_local(name: str) -> bool:
    """Whether a name can only mean a file or folder: ids of the hub are `owner/name`."""
    return name.startswith((".", "/", "~", "runs/")) or name.count("/") != 1


def model_folder(name: str, revision: str | None = None) -> Path | None:
    """Where the files of a model lie: in its folder, or what the cache has of one of the hub.

    None if they are not on this machine.
    """
    folder = Path(model_path(name))
    if folder.is_dir() or is_local(name):
        return folder if folder.is_dir() else None
    return hub.cached(name, "model", revision)


def adapter_base(folder: Path) -> str | None:
    """The name of the base that an adapter goes with; None if the folder holds no adapter.

    A relative folder is looked for from here, then beside the adapter and above it, so that a run
    can be used from anywhere. Runs that stored where an embedded base lay mean that base.

    Raises:
        InputError: adapter_config.json cannot be read.
    """
    config = adapter_config(folder)
    if config is None:
        return None
    base = Path(str(config.get("base_model_name_or_path")))
    if str(base) in EMBEDDED_BASES or base.is_dir():
        return str(base)
    if base.name in EMBEDDED_BASES and base.parent.name == "bases":
        return base.name
    places = (above / base for above in (folder, *folder.absolute().parents))
    return next((str(place) for place in places if place.is_dir()), str(base))


def whole_model(name: str, revision: str | None = None) -> str:
    """The model that an adapter, or an adapter of an adapter, was trained on; else the name.

    For those who need a model's shape, and its weights only later.
    """
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        folder = model_folder(name, revision)
        base = adapter_base(folder) if folder else None
        name, revision = base or name, revision if base is None else None
    return name


def tokenizer_path(name: str, revision: str | None = None) -> str:
    """Where a model's tokenizer is: an adapter saved without one was trained with its base's.

    Raises:
        InputError: neither here nor to be had.
    """
    _require(name, revision)
    folder = model_folder(name, revision)
    base = adapter_base(folder) if folder else None
    has_one = folder and any((folder / file).is_file() for file in TOKENIZER_FILES)
    return model_path(name) if base is None or has_one else tokenizer_path(base)


def _require(name: str, revision: str | None) -> None:
    """Refuse at once what is neither here nor to be had."""
    if Path(model_path(name)).is_dir():
        return
    if is_local(name):
        raise InputError(f"no run or model '{name}' here", key="model_name_or_path")
    hub.require(name, "model", revision)


# ---- Loading --------------------------------------------------------------------------------


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
        path = tokenizer_path(name, revision)
        # Else transformers would ask a user at a terminal whether to run what the model brings.
        loaded = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except InputError:
        raise
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
    """A causal language model for generation: in its own dtype, or on a GPU in 16 bit.

    An adapter is applied to its base, and kept apart from it: as it was trained.

    Raises:
        InputError: it cannot be had; names an embedded base, which always can.
    """
    import torch

    model = _load(name, revision)
    check_finite(name, not_finite(model))
    return (_narrowed(model).to("cuda") if torch.cuda.is_available() else model).eval()


def gpu_memory() -> float:
    """GiB of the GPU that this process computes on; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30


def _narrowed(model: "PreTrainedModel") -> "PreTrainedModel":
    """A model in 16 bit: 32 take a GPU twice the memory, and far longer."""
    import torch

    if model.dtype != torch.float32 or getattr(model, "is_quantized", False):
        return model
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return model.to(torch.bfloat16 if has_bf16 else torch.float16)


def load_merged(name: str, revision: str | None = None) -> "PreTrainedModel":
    """A causal language model to train on, in its own dtype; an adapter merged into its base.

    Raises:
        InputError: it cannot be had; names an embedded base, which always can.
    """
    model = _merged(_load(name, revision))
    check_finite(name, not_finite(model))
    settle_generation(model)
    return model


def not_finite(model: "nn.Module") -> str | None:
    """The first weight with NaN or infinity in it; of a sharded one, in this process's part."""
    weights = ((name, quirks.own_part(weight)) for name, weight in model.named_parameters())
    return next((name for name, weight in weights if not weight.isfinite().all()), None)


def check_finite(name: str, weight: str | None) -> None:
    """Refuse a model of which `not_finite` names a weight.

    Raises:
        InputError: it does.
    """
    if weight is not None:
        raise InputError(
            f"'{name}' cannot be used: its weight {weight} holds NaN or infinity; take a model, or "
            "a checkpoint, from before that",
            key="model_name_or_path",
        )


def find_adapter(name: str, revision: str | None = None) -> Path | None:
    """The folder of an adapter, here or in the cache; None if `name` is a whole model.

    Asks the hub for its adapter_config.json where that is not in the cache yet.
    """
    from transformers.utils import find_adapter_config_file

    _require(name, revision)
    with _loading(name):
        file = find_adapter_config_file(model_path(name), revision=revision)
    return Path(file).parent if file else None


def check_weights(name: str, revision: str | None = None) -> None:
    """Whether a model's files hold all its weights, in the shapes that config.json says.

    Asks transformers' own class, on the meta device: nothing is computed or kept.

    Raises:
        InputError: with the first that is missing or of another shape.
    """
    folder = _checked_folder(name, revision)
    if not quantized_by(read_json(folder / CONFIG_FILE)):  # what is packed has other shapes
        _load_whole(name, revision, device_map="meta")


def settle_generation(model: "PreTrainedModel") -> None:
    """Let a model be saved whose generation_config.json contradicts itself.

    Some, such as Llama-2-chat, name a temperature and do not sample. transformers loads them, and
    refuses to save them: at the first checkpoint.
    """
    if model.generation_config is None:
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def _load(name: str, revision: str | None, above: tuple[str, ...] = ()) -> "PreTrainedModel":
    """A model; an adapter as a PeftModel."""
    folder = find_adapter(name, revision)
    if folder is None:
        return _load_whole(name, revision)
    config, base = adapter_config(folder) or {}, str(adapter_base(folder))
    if base in above:
        raise InputError(f"'{name}' is an adapter of itself", key="model_name_or_path")
    import torch

    if not torch.cuda.is_available():
        quirks.quiet_cpu_imports()
    from peft import PeftModel

    model = _merged(_load(base, config.get("revision"), (*above, name)))

    with _loading(name), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, str(folder))
    return cast("PreTrainedModel", adapted)


def _merged(model: "PreTrainedModel") -> "PreTrainedModel":
    from peft import PeftModel

    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model


def _checked_folder(name: str, revision: str | None) -> Path:
    """Where config.json is, which of a hub's model is fetched first, once its model may be used."""
    from transformers.utils import cached_file

    with _loading(name):
        config = cached_file(model_path(name), CONFIG_FILE, revision=revision)
    folder = Path(str(config)).parent
    for problem in problems(folder) if Path(model_path(name)).is_dir() else config_problems(folder):
        raise problem
    return folder


def _load_whole(name: str, revision: str | None, **how: Any) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _checked_folder(name, revision)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is a table; ours is a line
    try:
        with _loading(name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model_path(name),
                revision=revision,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **how,
            )
    finally:
        logging.set_verbosity(verbosity)
    model, found = loaded
    for weight, written, wanted in sorted(found["mismatched_keys"]):
        shapes = [" x ".join(map(str, shape)) for shape in (written, wanted)]
        raise InputError(
            f"'{name}' cannot be used: {weight} is {shapes[0]}, not {shapes[1]}; weights and "
            "config.json are of different models",
            key="model_name_or_path",
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(
            f"'{name}' cannot be used: {len(missing)} of its weights are missing, the first is "
            f"{missing[0]}; weights and config.json are of different models",
            key="model_name_or_path",
        )
    return model


@contextmanager
def _loading(name: str) -> Generator[None]:
    """Whatever a library says about files it cannot use becomes one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise model_error(name, error) from error


def model_error(name: str, error: Exception) -> InputError:
    """What to tell a user whose model cannot be loaded, in one line."""
    if "use_safetensors" in str(error):
        error = OSError("it comes as a pickle, which could run code of its author's")
    here = Path(model_path(name)).is_dir()
    instead = "" if here else f"; without network write a local folder or {EMBEDDED_BASES[0]}"
    return InputError(
        f"'{name}' cannot be loaded ({one_line(error, 200)}){instead}", key="model_name_or_path"
    )
