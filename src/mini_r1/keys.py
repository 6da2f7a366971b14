"""The keys that TRL and transformers give a recipe: type, default, help, range and choices of each.

All but the ranges is read from the installed source files with `ast`, not imported: importing
GRPOConfig takes 4.5 s, and a mistake must be told in well under one. The libraries check most
values late or never, and some of their choices stand in no type: `_CHOICES` says where.
"""

import ast
import difflib
import importlib.util
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mini_r1 import InputError

# Where the keys are defined: (package, file, class), subclasses last so that theirs win.
TRAINING_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
)
MODEL_CLASSES = (("trl", "trainer/model_config.py", "ModelConfig"),)
# Where the enumerations are that types name: `SchedulerType | str`.
_ENUM_FILES = (
    ("transformers", "trainer_utils.py"),
    ("transformers", "training_args.py"),
    ("transformers", "debug_utils.py"),
)
LARGEST_INTEGER = 2**63 - 1  # beyond it the libraries' tensors overflow


# ---- Ranges ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The numbers that a key may be.

    Attributes:
        interval: such as `(0, 1]`: more than 0 and at most 1.
        off: one more number, which turns the thing off.
        of_steps: from 1 on a whole number; below it is a share of all steps.
    """

    interval: str
    off: int | None = None
    of_steps: bool = False

    def _ends(self) -> tuple[float, float]:
        low, high = map(float, self.interval[1:-1].split(","))
        return low, high

    def holds(self, number: float) -> bool:
        low, high = self._ends()
        above = number > low if self.interval[0] == "(" else number >= low
        below = number < high if self.interval[-1] == ")" else number <= high
        whole = number < 1 or number == int(number)
        return number == self.off or (above and below and (whole or not self.of_steps))

    def __str__(self) -> str:
        low, high = self._ends()
        words = "" if self.off is None else f"{self.off} or "
        if self.of_steps:
            words += f"a whole number{' or a share below 1' if low < 1 else ''}, "
        if self.interval[0] + self.interval[-1] == "[]":
            return words + f"{low:.12g} to {high:.12g}"
        words += f"{'more than' if self.interval[0] == '(' else 'at least'} {low:.12g}"
        if high < math.inf:
            words += f" and {'less than' if self.interval[-1] == ')' else 'at most'} {high:.12g}"
        return words


_COUNT, _POSITIVE, _NOT_NEGATIVE = Range("[1, inf)"), Range("(0, inf)"), Range("[0, inf)")
_SHARE, _SEED, _PORT = Range("[0, 1]"), Range(f"[0, {2**32 - 1}]"), Range("[1, 65535]")
# Of every key that is a number, ours included, if not every finite one will do. num_generations
# depends on the batch: `launch.plan.check_batch`.
_KEYS_OF_RANGE: dict[Range, tuple[str, ...]] = {
    _COUNT: (
        *("num_puzzles", "max_prompt_length", "num_eval_puzzles", "num_eval_samples"),
        "num_gpus",
        *("lora_r", "lora_alpha"),
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
        *("gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
        *("num_iterations", "num_generations_eval", "max_completion_length"),
        *("pad_to_multiple_of", "eval_accumulation_steps", "torch_empty_cache_steps"),
        *("save_total_limit", "ref_model_sync_steps", "max_tool_calling_iterations"),
        *("vllm_max_model_length", "vllm_tensor_parallel_size"),
        *("dataloader_prefetch_factor", "ddp_bucket_cap_mb"),
    ),
    Range("[1, inf)", off=-1): ("max_steps",),
    Range("(0, inf)", of_steps=True): ("logging_steps", "save_steps"),
    Range("[0, inf)", of_steps=True): ("warmup_steps",),
    Range("[1, inf)", of_steps=True): ("eval_steps",),  # of our evaluation, which takes no share
    _POSITIVE: (
        *("num_train_epochs", "learning_rate", "adam_epsilon", "neftune_noise_alpha"),
        *("temperature", "eval_temperature", "repetition_penalty"),
        *("epsilon", "epsilon_high", "delta", "off_policy_mask_threshold", "entropy_coef_delta"),
        *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_lambda_pos", "vespo_lambda_neg"),
        *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
        "vllm_server_timeout",
    ),
    _NOT_NEGATIVE: (
        *("weight_decay", "max_grad_norm", "beta", "top_k", "eval_delay", "entropy_target"),
        *("vespo_k_pos", "vespo_k_neg", "vllm_importance_sampling_clip_min"),
        *("router_aux_loss_coef", "num_completions_to_print"),
    ),
    _SHARE: ("min_p", "top_entropy_quantile"),
    Range("(0, 1]"): ("top_p", "ref_model_mixup_alpha"),
    Range("[0, 1)"): ("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor"),
    Range("(0, 1)"): ("test_share", "vllm_gpu_memory_utilization"),
    _SEED: ("seed", "data_seed"),
    _PORT: ("vllm_server_port", "vllm_group_port"),
    Range("[0, 1024]"): ("dataloader_num_workers",),
    Range(f"[1, {10**9}]"): ("ddp_timeout",),  # seconds; timedelta overflows
}
RANGES = {key: range_ for range_, keys in _KEYS_OF_RANGE.items() for key in keys}


def check_number(key: str, number: float) -> None:
    """Refuse a number that its key cannot be.

    Raises:
        ValueError: says which numbers it can be.
    """
    if isinstance(number, int) and abs(number) > LARGEST_INTEGER:
        raise ValueError(f"want less than 2^63, got {shortened(str(number))}")
    if not math.isfinite(number):
        raise ValueError(f"want a finite number, got {number}")
    if key in RANGES and not RANGES[key].holds(number):
        raise ValueError(f"want {RANGES[key]}, got {number}")


# ---- Choices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where the choices of a key stand: what code compares it with, or the keys of a dictionary.

    Attributes:
        dictionary: its name; without one, the texts that an attribute or variable of the key's
            name is compared with in the file.
        more: choices that stand elsewhere.
    """

    package: str
    file: str
    dictionary: str | None = None
    more: tuple[str, ...] = ()


_TRAINER = _Source("trl", "trainer/grpo_trainer.py")
_LOG_LEVELS = _Source("transformers", "utils/logging.py", "log_levels", ("passive",))
_CHOICES: dict[str, _Source | tuple[str, ...]] = {
    "loss_type": _TRAINER,
    "scale_rewards": _TRAINER,
    "importance_sampling_level": _TRAINER,
    "multi_objective_aggregation": _TRAINER,
    "vllm_mode": _TRAINER,
    "vllm_importance_sampling_mode": _TRAINER,
    "bnb_4bit_quant_storage": _Source("transformers", "utils/quantization_config.py"),
    "attn_implementation": _Source(
        "transformers", "modeling_utils.py", "_global_mapping", ("eager",)
    ),
    "report_to": _Source(
        "transformers",
        "integrations/integration_utils.py",
        "INTEGRATION_TO_CALLBACK",
        ("all", "none"),
    ),
    "log_level": _LOG_LEVELS,
    "log_level_replica": _LOG_LEVELS,
    # These stand in prose only, or in more code than is worth reading.
    "vllm_model_impl": ("vllm", "transformers"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "include_for_metrics": ("inputs", "loss"),
    "lora_task_type": ("CAUSAL_LM",),  # of PEFT's, the one that generates
    "torch_compile_mode": (
        *("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        "lite",
    ),
    "cache_implementation": (
        *("dynamic", "static", "offloaded", "offloaded_static", "quantized", "paged"),
        *("sliding_window", "hybrid", "hybrid_chunked"),
        *("offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),
}
# What needs the Trainer's own evaluation, in whose place ours is.
_NOT_HERE = {
    ("eval_strategy", "epoch"),
    ("save_strategy", "best"),
    ("lr_scheduler_type", "reduce_lr_on_plateau"),
    ("lr_scheduler_type", "greedy"),
}
# What else a key takes: TRL reads scale_rewards: true and false so.
_SYNONYMS = {("scale_rewards", "true"): "group", ("scale_rewards", "false"): "none"}


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a text that is none of a key's choices.

    Raises:
        ValueError: names the nearest of them, or all.
    """
    choices = tuple(choices)
    kernel = key == "attn_implementation" and "/" in value  # of the hub: owner/name
    file = key == "prompt_template" and Path(value).suffix
    if not choices or value in choices or kernel or file:
        return
    near = [choice for choice in choices if value and choice.startswith(value)]
    near = near or difflib.get_close_matches(value.lower(), choices, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(choices)}"
    raise ValueError(f"no '{shortened(value)}'; {hint}")


# ---- Keys -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A key as its source says it.

    Attributes:
        annotation: the type, as text.
        default: None also stands for one that the library works out when it runs.
        listed: the choices that its definition lists.
    """

    name: str
    annotation: str
    default: Any
    help: str = ""
    listed: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts it may be; none if any will do."""
        source = _CHOICES.get(self.name, ())
        found = _found(self.name, source) if isinstance(source, _Source) else source
        found = found or self.listed or _enumerated(self.annotation)
        return tuple(text for text in found if (self.name, text) not in _NOT_HERE)

    @property
    def kind(self) -> str:
        """The type without null, and without the enumerations whose values are texts."""
        names = [name for name in _union(self.annotation) if name != "None"]
        return " | ".join([name for name in names if name[0].islower()] or names)

    def read(self, node: yaml.Node) -> Any:
        """The value that is written for this key, of its type, in its range, among its choices.

        Raises:
            TypeError, ValueError: it is not; the message says what is wanted.
        """
        value = typed(node, self.annotation)
        if isinstance(value, str) and "dict" in self.annotation:
            value = self._mapping(value)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str):
                check_choice(self.name, _SYNONYMS.get((self.name, item), item), self.choices)
            elif isinstance(item, int | float) and not isinstance(item, bool):
                check_number(self.name, item)
        if isinstance(value, float) and self.name in RANGES and RANGES[self.name].of_steps:
            return value if value < 1 else int(value)
        return _SYNONYMS.get((self.name, value), value) if isinstance(value, str) else value

    def _mapping(self, text: str) -> dict[str, Any] | str:
        """The mapping in a text, which the libraries read as JSON; else it can only be a path."""
        if text.startswith("{"):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                pass
        elif self.name in MAPPING_OR_PATH:
            return text
        raise TypeError(f"want a mapping, got {shortened(text)!r}")


@cache
def keys_of(classes: tuple[tuple[str, str, str], ...]) -> dict[str, Key]:
    """The dataclass fields of installed classes, by name, read from their source files."""
    found: dict[str, Key] = {}
    for package, file, class_name in classes:
        classes_there = (n for n in _source(package, file).body if isinstance(n, ast.ClassDef))
        for node in next(node.body for node in classes_there if node.name == class_name):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if "init=False" in ast.unparse(node.value or ast.Constant(None)):
                continue
            default, metadata = node.value, {}
            if isinstance(node.value, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.value.keywords}
                default = given.get("default")
                metadata = _entries(given.get("metadata"))
            name = node.target.id
            found[name] = Key(
                name,
                _never_null(name, ast.unparse(node.annotation)),
                _literal(default),
                help=_literal(metadata.get("help")) or "",
                listed=tuple(_literal(metadata.get("choices")) or ()),
            )
    return found


@cache
def generation_keys() -> frozenset[str]:
    """The keys of transformers' GenerationConfig, read from its source file."""
    return frozenset(
        str(_name(node.targets[0]))
        for node in ast.walk(_source("transformers", "generation/configuration_utils.py"))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "kwargs.pop"
        and ast.unparse(node.targets[0]).startswith("self.")
        and not str(_name(node.targets[0])).startswith("_")
    )


@cache
def _source(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{package} is not installed; run 'make setup'")
    path = Path(spec.submodule_search_locations[0]) / file
    return ast.parse(path.read_text(encoding="utf-8"))


def _literal(node: ast.expr | None) -> Any:
    """The value of an expression; None for one that is worked out."""
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _entries(node: ast.expr | None) -> dict[str, ast.expr]:
    """The entries of a dictionary that stands in the source, by the keys that are texts."""
    if not isinstance(node, ast.Dict):
        return {}
    return {
        key.value: value
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


@cache
def _enumerations() -> dict[str, tuple[str, ...]]:
    """The values of each enumeration that types name."""
    return {
        node.name: tuple(
            entry.value.value
            for entry in node.body
            if isinstance(entry, ast.Assign)
            and isinstance(entry.value, ast.Constant)
            and isinstance(entry.value.value, str)
        )
        for package, file in _ENUM_FILES
        for node in _source(package, file).body
        if isinstance(node, ast.ClassDef)
        and [ast.unparse(base) for base in node.bases] == ["ExplicitEnum"]
    }


def _enumerated(annotation: str) -> tuple[str, ...]:
    """The texts that a type lists, in a Literal or as an enumeration."""
    if literal := re.search(r"Literal\[(.*?)\]", annotation):
        return tuple(each for each in ast.literal_eval(f"[{literal[1]}]") if isinstance(each, str))
    names = re.findall(r"[A-Z]\w+", annotation)
    return next((_enumerations()[name] for name in names if name in _enumerations()), ())


@cache
def _found(key: str, source: _Source) -> tuple[str, ...]:
    """The choices of a key that stand in a source file; none if it looks otherwise by now."""
    texts: set[str] = set()
    for node in ast.walk(_source(source.package, source.file)):
        if source.dictionary is None:
            if isinstance(node, ast.Compare) and _name(node.left) == key:
                compared = (n for n in ast.walk(node.comparators[0]) if isinstance(n, ast.Constant))
                texts.update(n.value for n in compared if isinstance(n.value, str))
        elif isinstance(node, ast.Assign) and _name(node.targets[0]) == source.dictionary:
            texts.update(_entries(node.value))
    return (*sorted(texts), *source.more) if texts else ()


def _name(node: ast.expr) -> str | None:
    """`name` of `name` and of `anything.name`."""
    return getattr(node, "attr", getattr(node, "id", None))


def _never_null(key: str, annotation: str) -> str:
    """The type without null, where the libraries say that null will do and then fail."""
    if key not in ("num_generations", "max_completion_length", "output_dir", "report_to"):
        return annotation
    return " | ".join(name for name in _union(annotation) if name != "None")


# ---- Types ----------------------------------------------------------------------------------

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_SPOKEN = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}
# Keys that take a mapping, or the path of a file with one.
MAPPING_OR_PATH = ("accelerator_config", "fsdp_config", "deepspeed")


def typed(node: yaml.Node, annotation: str) -> Any:
    """What a YAML node says to a key of this type.

    The type decides, not YAML's guesses: `no` is text to `save_strategy` and false to `use_cpu`,
    `5e-7` is a number, `010` is ten, and `2024-01-01` is no date.

    Raises:
        TypeError, ValueError: it is not of the type.
    """
    types = _union(annotation)
    kinds = {name.partition("[")[0] for name in types}
    if unknown := kinds - _SPOKEN.keys() - {"None", "Any"}:
        kinds |= {"str"} if unknown & _enumerations().keys() else set()
    containers = kinds & {"list", "tuple"}
    if isinstance(node, yaml.ScalarNode):
        fits, value = _scalar(node, kinds)
        if fits:
            return value
        if containers:  # one value where a list is wanted
            node = yaml.SequenceNode("tag:yaml.org,2002:seq", [node])
    if isinstance(node, yaml.SequenceNode) and containers:
        return _sequence(node, next(name for name in types if name.startswith(("list", "tuple"))))
    if isinstance(node, yaml.SequenceNode) and "Any" in kinds:
        return [typed(item, "Any") for item in node.value]
    if isinstance(node, yaml.MappingNode) and kinds & {"dict", "Any"}:
        return {key.value: typed(value, "Any") for key, value in node.value}
    wanted = " or ".join(_SPOKEN[kind] for kind in sorted(kinds) if kind in _SPOKEN)
    if not wanted:
        raise TypeError("cannot be written in a recipe; leave it out")
    raise TypeError(f"want {wanted}, got {said(node)}")


def _scalar(node: yaml.ScalarNode, kinds: set[str]) -> tuple[bool, Any]:
    """Whether a scalar can be of one of the types, and what it then is."""
    text, plain = node.value, node.style is None
    if unwritable := re.search("[\0\ud800-\udfff]", text):  # no path, and no UTF-8
        raise ValueError(f"no text may hold U+{ord(unwritable[0]):04X}")
    anything = "Any" in kinds
    if plain and text in _NULLS:
        return anything or "None" in kinds, None
    if plain and text.lower() in _BOOLEANS and (anything or "bool" in kinds):
        return True, _BOOLEANS[text.lower()]
    if plain and (anything or kinds & {"int", "float"}):
        number = _number(text, whole="float" not in kinds and not anything)
        if number is not None:
            return True, number
    if anything or "str" in kinds:
        return True, text
    return False, None


def _number(text: str, whole: bool) -> int | float | None:
    """The number in a text, if it is one.

    Raises:
        ValueError: too long a number, or none that is finite.
    """
    if re.fullmatch(r"[-+]?[0-9]+(_[0-9]+)*", text):
        if len(text) > 100:
            raise ValueError(f"want less than 2^63, got {shortened(text)}")
        return int(text)
    if whole or not text.isascii():
        return None
    try:
        number = float(re.sub(r"^([-+]?)\.(?=[A-Za-z])", r"\1", text))  # YAML writes .inf and .nan
    except ValueError:
        return None
    if not math.isfinite(number):
        raise ValueError(f"want a finite number, got {shortened(text)}")
    return number


def _sequence(node: yaml.SequenceNode, container: str) -> list[Any] | tuple[Any, ...]:
    """The items of `list[str]`, `tuple[int, ...]` or `tuple[int, int]`."""
    tree = ast.parse(container, mode="eval").body
    inner = tree.slice if isinstance(tree, ast.Subscript) else ast.Name("Any")
    parts = [ast.unparse(part) for part in inner.elts] if isinstance(inner, ast.Tuple) else None
    if parts and "..." not in parts and len(parts) != len(node.value):
        raise TypeError(f"want {len(parts)} values, got {len(node.value)}")
    item = parts[0] if parts else ast.unparse(inner)
    items = [typed(each, item) for each in node.value]
    return items if container.startswith("list") else tuple(items)


def _union(annotation: str) -> list[str]:
    """The types that an annotation allows: `int | None`, `Optional[int]`."""

    def parts(node: ast.expr) -> list[ast.expr]:
        if isinstance(node, ast.BinOp):
            return parts(node.left) + parts(node.right)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return [part for item in inner for part in parts(item)] + [ast.Constant(None)]
        return [node]

    names = [ast.unparse(part) for part in parts(ast.parse(annotation, mode="eval").body)]
    names = [name.removeprefix("typing.") for name in names]
    return [
        ("str" if _enumerated(name) else "bool") if name.startswith("Literal") else name
        for name in names
    ]


def said(node: yaml.Node) -> str:
    """A node as a message quotes it: what was written, shortened."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    style = getattr(node, "style", None)  # of quotes
    if style is None and not node.value:
        return "nothing"
    text = shortened(node.value)
    return repr(text) if style or node.tag == "tag:yaml.org,2002:str" else text


def shortened(text: str, limit: int = 40) -> str:
    """A text that fits into a message."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
