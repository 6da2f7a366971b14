"""What a model folder holds, told from its files without loading a weight: can it be used?

    config.json  generation_config.json             as transformers writes them
    model.safetensors                               or model.safetensors.index.json and its shards
    tokenizer.json  ...                             as transformers writes them
    adapter_config.json  adapter_model.safetensors  instead: an adapter of PEFT and its base's name

Of the weights only the headers are read, so this takes no longer for large models. What only
transformers can tell, every tensor's name and shape, is told when it loads them:
`model.check_weights`. Imports no ML library.
"""

import ast
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mini_r1 import InputError, one_line

CONFIG_FILE, ADAPTER_CONFIG_FILE = "config.json", "adapter_config.json"
SAFETENSORS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
# Which packages transformers wants for weights that were quantized before they were saved.
QUANTIZED_BY = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "eetq": ("kernels",),
    "gptq": ("gptqmodel", "optimum"),
    "hqq": ("hqq",),
    "quanto": ("optimum",),
    "torchao": ("torchao",),
}
# Adapters that change prompts, not weights.
PROMPT_ADAPTERS = (
    "ADAPTION_PROMPT",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
)
# What the names of a config.json's sizes are: of most models, and of GPT-2 and its relatives.
VOCABULARY = ("vocab_size",)
HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
POSITIONS = ("max_position_embeddings", "n_positions")
# The tensors that turn tokens into vectors and back; the layers' numbers. Not those of vision.
EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$"
)
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output|head)\.weight$")
LAYER = re.compile(
    r"^(?:(?:model|transformer|gpt_neox|language_model|decoder)\.)*(?:layers|h|blocks)\.(\d+)\."
)
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype and shape


def is_model(folder: Path) -> bool:
    """Whether a folder says that it holds a model or an adapter."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE))


def problems(folder: Path, lengths: tuple[int, int] | None = None) -> Iterator[InputError]:
    """What makes a model folder useless for training and evaluation, each with what to do.

    Args:
        lengths: the tokens of the longest prompt and of the longest completion.
    """
    unusable = list(config_problems(folder))
    if unusable:
        yield from unusable
        return
    config = text_config(read_json(folder / CONFIG_FILE))
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    checks: list[Callable[[], None]] = [
        lambda: _check_generation(folder),
        lambda: _check_quantization(folder, config),
        lambda: found.update(tensors(folder)),
        lambda: _check_shapes(folder, config, found),
        lambda: _check_tokenizer(folder, config, found),
        lambda: _check_positions(folder, config, lengths),
    ]
    for check in checks:
        try:
            check()
        except InputError as error:
            yield error


def config_problems(folder: Path) -> Iterator[InputError]:
    """What config.json alone tells: whether it is a causal language model that can be run here."""
    try:
        _check_architecture(folder, text_config(read_json(folder / CONFIG_FILE)))
    except InputError as error:
        yield error


def adapter_problems(folder: Path) -> Iterator[InputError]:
    """What makes an adapter's folder useless, its base apart."""
    try:
        config = read_json(folder / ADAPTER_CONFIG_FILE)
        if not config.get("base_model_name_or_path"):
            raise _error(f"{folder / ADAPTER_CONFIG_FILE} names no base_model_name_or_path")
        if config.get("peft_type") in PROMPT_ADAPTERS:
            raise _error(
                f"{folder} is an adapter of the type {config['peft_type']}, which cannot be merged "
                "into its base; write a model, or a LoRA adapter"
            )
        if not (folder / ADAPTER_WEIGHTS).is_file():
            _refuse_pickles(folder)
            raise _error(f"{folder} holds an adapter without weights: no {ADAPTER_WEIGHTS}")
        _tensors_of(folder / ADAPTER_WEIGHTS)
    except InputError as error:
        yield error


def adapter_config(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a folder; None if the folder holds no adapter.

    Raises:
        InputError: it cannot be read.
    """
    file = folder / ADAPTER_CONFIG_FILE
    return read_json(file) if file.is_file() else None


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, flat: models that see, too, keep what describes their text part inside."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return dict(config)
    # What the whole says about itself counts: its type and class, how its weights are stored.
    kept = ("model_type", "architectures", "quantization_config")
    return {**config, **nested, **{key: config[key] for key in kept if key in config}}


def number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these values of a config.json that is a positive integer."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        InputError: it is not there, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise _error(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        if _is_pointer(path):
            raise _pointer(path) from None
        raise _error(f"{path} cannot be read ({one_line(error, 100)})") from None
    if not isinstance(content, dict):
        raise _error(f"{path} is no JSON object")
    return content


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of every tensor, by name.

    Raises:
        InputError: files are missing, or are not what they should be.
    """
    # As transformers looks for them, in this order.
    if (folder / SAFETENSORS).is_file():
        return _tensors_of(folder / SAFETENSORS)
    index = folder / f"{SAFETENSORS}.index.json"
    if index.is_file():
        return _tensors_of_shards(index)
    _refuse_pickles(folder)
    if any(folder.glob("*.gguf")):
        raise _error(f"{folder} holds GGUF files, which cannot be trained; take its safetensors")
    raise _error(f"{folder} holds no weights: no {SAFETENSORS} in it")


def _tensors_of_shards(index: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _error(f"{index} has no weight_map")
    shards = sorted(set(map(str, weight_map.values())))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise _error(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards that {index.name} names: "
            f"{', '.join(missing[:3])}; download it again"
        )
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards:
        found |= _tensors_of(index.parent / shard)
    absent = sorted(weight_map.keys() - found.keys())
    if found and absent:
        raise _error(f"{index.parent}: {index.name} names {absent[0]}, which no shard holds")
    return found


def _tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The header of a safetensors file."""
    try:
        return _safetensors_header(path)
    except OSError as error:
        raise _error(f"{path} cannot be read: {error.strerror}") from None


def _refuse_pickles(folder: Path) -> None:
    """Such a file is a program for whoever loads it, and old libraries run it.

    Raises:
        InputError: the weights are in one.
    """
    pickles = (path for end in ("bin", "pt", "pth") for path in sorted(folder.glob(f"*.{end}")))
    pickle = next((path for path in pickles if path.name != "training_args.bin"), None)
    if pickle is not None:
        raise _error(
            f"{pickle} is a pickle, which could run code of its author's, and is not loaded; take "
            "the model's safetensors: https://huggingface.co/spaces/safetensors/convert makes them"
        )


def _safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """8 bytes that say how long the header is, the header in JSON, the data.

    As in https://github.com/huggingface/safetensors#format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if _is_pointer(path):
            raise _pointer(path)
        try:
            if length > LARGEST_HEADER:
                raise ValueError("its header would be larger than the format allows")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {k: (str(v["dtype"]), tuple(map(int, v["shape"]))) for k, v in header.items()}
            end = 8 + length + max((int(v["data_offsets"][1]) for v in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            if 8 < size < 8 + length <= LARGEST_HEADER:
                raise _error(f"{path} is cut off within its header; download it again") from None
            raise _error(f"{path} is no safetensors file ({one_line(error, 80)})") from None
    if size < end:
        raise _error(f"{path} is cut off: {size:,} of {end:,} bytes; download it again")
    return found


# ---- Checks ---------------------------------------------------------------------------------


def _check_architecture(folder: Path, config: Mapping[str, Any]) -> None:
    """Whether transformers has a causal language model for it, and the weights are of one."""
    kind, named = config.get("model_type"), config.get("architectures")
    written = str(named[0]) if isinstance(named, list) and named else None
    causal = _auto_classes("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES").get(str(kind))
    what = f"{folder} is a {written or kind}"
    if not kind and not written:
        raise _error(f"{folder / CONFIG_FILE} names no model_type: no model of transformers")
    if causal is None and "auto_map" in config:
        raise _error(f"{what}, which needs code of its own; that is not run here")
    # Encoders can be run as if they were causal models, and say nothing that makes sense.
    masked = str(kind) in _auto_classes("MODEL_FOR_MASKED_LM_MAPPING_NAMES")
    encoder = config.get("is_encoder_decoder") or (masked and not config.get("is_decoder"))
    # With its head, or as the text part of a model that sees.
    sees = _auto_classes("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES").get(str(kind))
    has_head = written is None or written in (causal, sees)
    has_head = has_head or str(written).endswith(("ForCausalLM", "LMHeadModel"))
    if causal is None or encoder or not has_head:
        raise _error(
            f"{what}, no causal language model that transformers {version('transformers')} knows; "
            "write one that continues text"
        )


@cache
def _auto_classes(name: str) -> dict[str, str]:
    """One of transformers' own tables, model type -> class, read from its source.

    Importing it would import torch.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("transformers is not installed; run 'make setup'")
    source = Path(spec.submodule_search_locations[0]) / "models" / "auto" / "modeling_auto.py"
    for node in _module(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            assert isinstance(node.value, ast.Call)
            return dict(ast.literal_eval(node.value.args[0]))
    raise LookupError(f"{source} defines no {name}")


@cache
def _module(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def _check_generation(folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")


def _check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    method = quantized_by(config)
    wanted = QUANTIZED_BY.get(str(method), ())
    missing = " ".join(name for name in wanted if importlib.util.find_spec(name) is None)
    if missing:
        raise _error(
            f"{folder} holds weights quantized by {method}, and {missing} is not installed; run "
            f"pip install {missing}, or write the model in 16 bit (load_in_4bit quantizes it here)"
        )


def quantized_by(config: Mapping[str, Any]) -> str | None:
    """How the weights were quantized before they were saved; None if they were not."""
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _check_shapes(folder: Path, config: Mapping[str, Any], found: Tensors) -> None:
    """Whether embedding, head and layers are what config.json says.

    Names that are not known here are left to transformers.
    """
    if not found or quantized_by(config):
        return
    vocabulary, hidden = number(config, VOCABULARY), number(config, HIDDEN_SIZE)
    for pattern in (EMBEDDING, HEAD):
        matrices = {n: d for n, d in _named(pattern, found).items() if len(d[1]) == 2}
        if not matrices or not vocabulary or not hidden:
            continue
        name, (dtype, shape) = max(matrices.items(), key=lambda item: item[1][1][0])
        # Some project a narrower embedding, and say how wide it is.
        if shape[0] != vocabulary or shape[1] not in (hidden, *_numbers(config)):
            raise _error(
                f"{folder}: {name} is {shape[0]} x {shape[1]}, and config.json says "
                f"{vocabulary} x {hidden}; weights and config are of different models"
            )
        if dtype not in ("BF16", "F16", "F32", "F64"):
            raise _error(f"{folder}: {name} is of type {dtype}, and config.json does not say how")
    untied = config.get("tie_word_embeddings") is False
    if untied and _named(EMBEDDING, found) and not _named(HEAD, found):
        raise _error(f"{folder}: the weights have no lm_head; it is not a causal language model")
    numbers = {int(match[1]) for match in map(LAYER.match, found) if match}
    layers = number(config, LAYERS)
    # Some bring layers that predict further tokens, behind the others.
    extra = number(config, ("num_nextn_predict_layers",)) or 0
    if numbers and layers and not layers <= max(numbers) + 1 <= layers + extra:
        raise _error(
            f"{folder}: the weights have {max(numbers) + 1} layers, and config.json says {layers}"
        )


def _named(pattern: re.Pattern[str], found: Tensors) -> Tensors:
    """The tensors outside the layers whose name ends so."""
    return {n: d for n, d in found.items() if pattern.search(n) and not re.search(r"\.\d+\.", n)}


def _numbers(config: Mapping[str, Any]) -> Iterator[int]:
    return (value for value in config.values() if type(value) is int)


def _check_tokenizer(folder: Path, config: Mapping[str, Any], found: Tensors) -> None:
    """Whether there is a tokenizer, and every token that may turn up has a row in the embedding."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise _error(
            f"{folder} holds no tokenizer: no {TOKENIZER_FILES[0]} in it; copy its files from the "
            "model that it was made from"
        )
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        return
    shapes = (shape for _, shape in _named(EMBEDDING, found).values())
    rows = max((shape[0] for shape in shapes), default=number(config, VOCABULARY))
    if rows is None:
        return
    try:
        highest, token = _highest_token(read_json(tokenizer), _texts_with_tokens(folder), rows)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise _error(f"{tokenizer} describes no tokenizer ({one_line(repr(error), 80)})") from None
    if highest >= rows:
        raise _error(
            f"{folder}: the tokenizer counts to {highest} ('{token}'), but the embedding has only "
            f"{rows} rows; call resize_token_embeddings and save the model again, or take the "
            "tokenizer that belongs to it"
        )


def _highest_token(content: Mapping[str, Any], texts: str, rows: int) -> tuple[int, str]:
    """The highest id of tokenizer.json that may turn up, and its token.

    Args:
        texts: what special tokens beyond the embedding's rows must stand in to turn up: Gemma 3
            ships one for images, which its text models have no row for, nor any use.
    """
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, in order
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    for added in content.get("added_tokens") or ():
        if added["id"] < rows or not added.get("special") or added["content"] in texts:
            vocabulary[added["content"]] = added["id"]
    token = max(vocabulary, key=lambda each: vocabulary[each], default="")
    return vocabulary.get(token, -1), token


def _texts_with_tokens(folder: Path) -> str:
    """Where tokens stand that a prompt or a completion may hold: tags, template, special ones."""
    texts = ["<think> </think> <answer> </answer>"]
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        texts.append(template.read_text(encoding="utf-8", errors="replace"))
    if config.is_file():
        told = read_json(config)
        names = ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token")
        texts += [str(told[name]) for name in names if name in told]
    return "\n".join(texts)


def _check_positions(
    folder: Path, config: Mapping[str, Any], lengths: tuple[int, int] | None
) -> None:
    """Whether prompt and completion fit the positions a model was made for.

    Scaled rotary positions (RoPE) reach further than config.json's number.
    """
    positions = number(config, POSITIONS)
    if lengths is None or positions is None or sum(lengths) <= positions:
        return
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if isinstance(rope, dict):
        kinds = {str(part.get("rope_type", part.get("type"))) for part in _ropes(rope)}
        if kinds - {"default", "None"}:
            return
    prompt, completion = lengths
    write = f"write max_completion_length: {positions - prompt}, or" if positions > prompt else ""
    raise _error(
        f"{folder} has {positions} positions, fewer than max_prompt_length {prompt} + "
        f"max_completion_length {completion}; {write or 'write'} another model"
    )


def _ropes(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary positions of a model: one description, or one for each kind of layer."""
    nested = [part for part in rope.values() if isinstance(part, dict)]
    return [*nested] or [rope]


# ---- Words ----------------------------------------------------------------------------------


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."


def _pointer(path: Path) -> InputError:
    return _error(
        f"{path} is only a pointer of Git LFS; run 'git lfs install' and 'git lfs pull' in "
        f"{path.parent}"
    )


def _error(problem: str) -> InputError:
    return InputError(problem, key="model_name_or_path")
