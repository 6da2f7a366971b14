"""What a recipe may say; loading, checking, defaults, explaining mistakes.

A recipe is one flat YAML file. Its keys are the fields of `TaskConfig` below and of TRL's
`ModelConfig` and `GRPOConfig`. The latter two are read from the installed source files with `ast`,
types and defaults alike, not imported: importing GRPOConfig takes 4.5 s, and a typo must be told
in well under one.
"""

import ast
import difflib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mini_r1 import InputError, one_line
from mini_r1.countdown.puzzles import PuzzleSpace, PuzzleSpaceError
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.rewards import get_reward_functions

# Where the keys are defined: (package, file, class), subclasses last so that theirs win.
_TRAINING_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
)
_MODEL_CLASSES = (("trl", "trainer/model_config.py", "ModelConfig"),)
_TASK_CLASSES = (("mini_r1", "recipe.py", "TaskConfig"),)

# What every run wants unless its recipe says otherwise.
TRAINING_DEFAULTS = {
    "report_to": ["tensorboard"],  # the libraries' default is none
    "logging_steps": 1,  # a step takes seconds to a minute; its log line costs nothing
    "max_completion_length": 1024,  # the original's; TRL's 512 cuts off 3B models that think aloud
    # One spare in case of a torn write: a checkpoint of a 3B model with its optimizer is 40 GB.
    "save_total_limit": 2,
}

# Keys of TRL 0.14 and transformers 4.48, the tutorial's, and what to write instead.
OLD_KEYS = {
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps: a number below 1 is a share of all steps",
    "vllm_device": "leave it out: with vllm_mode: server the run starts vLLM on the last GPU",
    "vllm_max_model_len": "vllm_max_model_length",
    "vllm_dtype": "leave it out: vLLM uses the model's dtype",
    "dataset_splits": "dataset_split",
    "tokenizer_name_or_path": "leave it out: the tokenizer comes with the model",
    "use_liger_kernel": "model_init_kwargs: {use_kernels: true}",
    "logging_dir": "leave it out: TensorBoard files are in the run folder",
    "overwrite_output_dir": "leave it out: choose another output_dir, or remove the folder",
    "evaluation_strategy": "eval_strategy",
}

# What stops TRL 1.16 at the first sampling or has a key of its own: reason -> generation_kwargs.
REFUSED_IN_GENERATION = {
    "it wants the tokenizer, which TRL does not give to generate; leave it out, a completion ends "
    "with the model's eos_token": {"stop_strings", "token_healing"},
    "write num_generations, a key of the recipe": {"num_return_sequences", "n"},
    "write max_completion_length, a key of the recipe": {"max_new_tokens", "max_tokens"},
    "TRL wants the tokens alone; leave it out": {"return_dict_in_generate"},
    "TRL does not compile; leave it out": {"compile_config", "disable_compile"},
    "it takes one completion at a time; leave it out": {
        *("assistant_early_exit", "is_assistant", "prompt_lookup_num_tokens", "use_mtp")
    },
    "transformers has it no longer; leave it out": {
        *("constraints", "dola_layers", "force_words_ids", "num_beam_groups")
    },
}


@dataclass(frozen=True)
class TaskConfig:
    """The keys of a recipe that are Mini-R1's own.

    Raises:
        InputError: a value that cannot work.
    """

    dataset_id_or_path: str = field(
        default="generated",
        metadata={
            "help": "'generated', a local file or folder (parquet, json, jsonl, csv), or a data "
            "set id of the hub"
        },
    )
    dataset_split: str = field(
        default="train", metadata={"help": "split of a hub data set; both our parts come from it"}
    )
    num_puzzles: int = field(
        default=50_000, metadata={"help": "how many puzzles to take, held-out part included"}
    )
    num_numbers: tuple[int, ...] = field(
        default=(3, 4), metadata={"help": "generated: how many numbers a puzzle gives"}
    )
    number_range: tuple[int, int] = field(
        default=(1, 99), metadata={"help": "generated: smallest and largest number"}
    )
    target_range: tuple[int, int] = field(
        default=(10, 99), metadata={"help": "generated: smallest and largest target"}
    )
    split_seed: int = field(
        default=42,
        metadata={
            "help": "decides, with a puzzle's canonical key alone, what is taken and held out"
        },
    )
    test_share: float = field(
        default=0.1, metadata={"help": "share of the puzzles that is held out"}
    )
    prompt_template: str = field(
        default="mini-r1-exact", metadata={"help": f"one of {', '.join(PROMPT_TEMPLATES)}"}
    )
    max_prompt_length: int = field(
        default=256, metadata={"help": "longer prompts (tokens) are dropped and counted"}
    )
    reward_funcs: tuple[str, ...] = field(
        default=("format", "equation"),
        metadata={"help": "registered rewards or dotted paths; see reward_weights"},
    )
    num_eval_puzzles: int = field(
        default=500, metadata={"help": "held-out puzzles to evaluate before and after training"}
    )
    num_eval_samples: int = field(
        default=4, metadata={"help": "completions per held-out puzzle: the largest k of pass@k"}
    )
    eval_temperature: float = field(
        default=1.0, metadata={"help": "sampling temperature of the evaluation"}
    )

    def __post_init__(self):
        for name in ("num_puzzles", "max_prompt_length", "num_eval_puzzles", "num_eval_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"want at least 1, got {getattr(self, name)}", key=name)
        if not 0 < self.test_share < 1:
            raise InputError(
                f"want a share between 0 and 1, got {self.test_share}", key="test_share"
            )
        if self.eval_temperature <= 0:
            raise InputError(
                f"want more than 0, got {self.eval_temperature}", key="eval_temperature"
            )
        if self.prompt_template not in PROMPT_TEMPLATES:
            raise InputError(
                f"no '{self.prompt_template}'; choose from {', '.join(PROMPT_TEMPLATES)}",
                key="prompt_template",
            )
        if not self.reward_funcs:
            raise InputError("name at least one reward", key="reward_funcs")
        self._check_space()

    def _check_space(self) -> None:
        try:
            _ = self.space
        except PuzzleSpaceError as error:
            raise InputError(str(error), key=error.name) from error

    @property
    def space(self) -> PuzzleSpace:
        return PuzzleSpace(
            tuple(self.num_numbers), tuple(self.number_range), tuple(self.target_range)
        )

    def as_dict(self) -> dict[str, Any]:
        """All keys, ready for YAML."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        where: the place where each key was set.
        task: our part.
        model, training: what goes into TRL's `ModelConfig` and `GRPOConfig`.
    """

    path: Path
    overrides: tuple[str, ...]
    where: Mapping[str, str]
    task: TaskConfig
    model: dict[str, Any]
    training: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    def error(self, problem: str, key: str) -> InputError:
        """The error for a problem with a key: it tells where the key was set."""
        return self.place(InputError(problem, key=key))

    def place(self, error: InputError) -> InputError:
        """The same error, with where its key was set; as it is if it says where already."""
        if error.where is not None:
            return error
        where = self.where.get(error.key or "", str(self.path))
        return InputError(error.problem, key=error.key, where=where)

    def get(self, key: str) -> Any:
        """The value of a model's or training's key: the recipe's, else ours, else the library's.

        None stands for a default that the library works out when it runs.

        Raises:
            KeyError: no such key.
        """
        given = {**self.model, **self.training}
        return given[key] if key in given else default_of(key)

    @property
    def run_dir(self) -> Path:
        return Path(self.training["output_dir"])

    def as_dict(self) -> dict[str, Any]:
        """The recipe as resolved, ready for YAML.

        The task's keys with their defaults, the others as given.
        """
        return {**self.model, **self.task.as_dict(), **self.training}


def default_of(key: str) -> Any:
    """What a model's or training's key is where a recipe says nothing, as `Recipe.get` has it.

    Raises:
        KeyError: no such key.
    """
    if key in TRAINING_DEFAULTS:
        return TRAINING_DEFAULTS[key]
    return {**_fields_of(_MODEL_CLASSES), **_fields_of(_TRAINING_CLASSES)}[key].default


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides (`--key value ...`), check everything that needs no machine.

    Raises:
        InputError: in one line, what is wrong, in which line of the file, and what to write.
    """
    path = Path(path)
    given, lines = _read_yaml(path)
    for key, value in _parse_overrides(overrides).items():
        given[key] = value
        lines[key] = f"--{key}"
    _refuse_old_keys(path, given)
    return Recipe(path, tuple(overrides), lines, *_resolve(path, given, lines))


CARD = ("runs on", "takes", "expect")


def recipe_table(folder: Path) -> str:
    """The recipes of a folder as a Markdown table.

    What stands in it are the lines `# runs on: ...` at the head of each file.

    Raises:
        InputError: there are none.
    """
    cards = []
    for path in sorted(folder.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line.removeprefix("# ").partition(": ") for line in lines if line[:1] == "#"]
        card = {key: value for key, _, value in comments}
        link = f"[{path.stem}](recipes/{path.name})"
        cards.append([link, *(card.get(key, "not known") for key in CARD)])
    if not cards:
        raise InputError(
            "no recipes here; run from a clone of the repository, installed with 'make setup'",
            where=folder,
        )
    # The ones that anybody can run come first.
    cards.sort(key=lambda card: ("CPU" not in card[1], card[1], len(card[0])))
    return "\n".join(f"| {' | '.join(row)} |" for row in [["recipe", *CARD], ["---"] * 4, *cards])


def _refuse_old_keys(path: Path, given: Mapping[str, Any]) -> None:
    """A recipe for TRL 0.14, the tutorial's, is not translated behind its author's back.

    Some of it means something else now.
    """
    old = {key: new for key, new in OLD_KEYS.items() if key in given}
    if not old:
        return
    if "per_device_train_batch_size" in given:
        old["per_device_train_batch_size"] = (
            "now counts completions, not prompts: write the old value times num_generations"
        )
    rows = [f"  {key:<28} {new}" for key, new in old.items()]
    headline = "written for TRL 0.14, this is 1.16; write instead:"
    raise InputError("\n".join([headline, *rows]), where=path)


def _resolve(
    path: Path, given: dict[str, Any], where: dict[str, str]
) -> tuple[TaskConfig, dict[str, Any], dict[str, Any]]:
    """The three parts of a recipe, typed and checked: the task's, the model's, the training's."""
    # Whose key is it, and does the value fit?
    kinds = {
        "task": _fields_of(_TASK_CLASSES),
        "model": _fields_of(_MODEL_CLASSES),
        "training": _fields_of(_TRAINING_CLASSES),
    }
    parts: dict[str, dict[str, Any]] = {
        "task": {},
        "model": {},
        "training": dict(TRAINING_DEFAULTS),
    }
    for key, value in given.items():
        owner = next((owner for owner, known in kinds.items() if key in known), None)
        if owner is None:
            raise InputError(f"unknown key '{key}'; {_nearest(key, kinds)}", where=where[key])
        annotation = kinds[owner][key].annotation
        if key.endswith("_kwargs"):  # TRL takes a mapping as text, too, and any other text as well
            value = _scalar(key, value) if isinstance(value, str) else value
            annotation = "dict | None"
        try:
            parts[owner][key] = _typed(value, annotation)
        except TypeError as error:
            raise InputError(str(error), key=key, where=where[key]) from None

    # What no single key can tell.
    if not parts["model"].get("model_name_or_path"):
        raise InputError(
            "missing; write tiny_base, a folder, or a model id of the hub",
            key="model_name_or_path",
            where=path,
        )
    if "resume_from_checkpoint" in given:
        raise InputError(
            "a run resumes by itself; to start from another model, write its folder as "
            "model_name_or_path",
            key="resume_from_checkpoint",
            where=where["resume_from_checkpoint"],
        )
    parts["training"].setdefault("output_dir", f"runs/{path.stem}")
    try:
        task = TaskConfig(**parts["task"])
        get_reward_functions(task.reward_funcs)
    except InputError as error:
        place = where.get(error.key or "", path)
        raise InputError(error.problem, key=error.key, where=place) from None
    weights = parts["training"].get("reward_weights")
    if weights is not None and len(weights) != len(task.reward_funcs):
        raise InputError(
            f"{len(weights)} weights for {len(task.reward_funcs)} reward_funcs",
            key="reward_weights",
            where=where["reward_weights"],
        )
    _check_generation(parts["training"], where)
    return task, parts["model"], parts["training"]


def _generation_keys() -> set[str]:
    source = _source("transformers", "generation/configuration_utils.py")
    return set(re.findall(r"self\.([a-z]\w+) = kwargs\.pop\(", source))


def _check_generation(training: Mapping[str, Any], where: Mapping[str, str]) -> None:
    """Refuse generation_kwargs that would stop the first sampling, or be passed over in silence.

    Without vLLM they go into transformers' GenerationConfig, whose source file tells its keys.
    """
    given, known, ours = training.get("generation_kwargs") or {}, set[str](), set[str]()
    if given and not training.get("use_vllm"):
        known = _generation_keys()
        ours = known & _fields_of(_TRAINING_CLASSES).keys()
    for key in given:
        reasons = [reason for reason, keys in REFUSED_IN_GENERATION.items() if key in keys]
        if key in ours:
            reasons.append("write it as a key of the recipe")
        elif known and key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            reasons.append(f"unknown; did you mean '{near[0]}'?" if near else "unknown")
        if reasons:
            place = where["generation_kwargs"]
            raise InputError(f"{key}: {reasons[0]}", key="generation_kwargs", where=place)


def _nearest(key: str, kinds: Mapping[str, Mapping[str, "Field"]]) -> str:
    near = difflib.get_close_matches(key, [name for part in kinds.values() for name in part], n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return "see the keys of TaskConfig, and TRL's GRPOConfig and ModelConfig"


# ---- Reading --------------------------------------------------------------------------------


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file and, for every key, where it stands (`FILE line 7`)."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "no such recipe; the recipes are in the folder recipes/", where=path
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read: {one_line(error)}", where=path) from None
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise InputError("not a recipe; want lines of the form 'key: value'", where=path)
        where: dict[str, str] = {}
        for key, _ in node.value:
            place = f"{path} line {key.start_mark.line + 1}"
            if key.value in where:
                first = where[key.value].rpartition(" line ")[2]
                raise InputError(f"{key.value} is set twice; first in {first}", where=place)
            where[key.value] = place
        return {str(key): value for key, value in loader.construct_document(node).items()}, where
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {one_line(error)}", where=path) from None


def _parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key a b` (a list) and `--flag` (true).

    Values are YAML scalars.
    """
    values: dict[str, list[Any]] = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument.removeprefix("--").partition("=")
            key = key.replace("-", "_")
            values[key] = [_scalar(key, value)] if equals else []
        elif key is None:
            raise InputError(f"{argument!r}: want --key value")
        else:
            values[key].append(_scalar(key, argument))
    return {key: given[0] if len(given) == 1 else given or True for key, given in values.items()}


def _scalar(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(one_line(error), where=f"--{key}") from None


# ---- Types ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A field of a configuration class, as its source says it: the type, the literal default."""

    annotation: str
    default: Any


@cache
def _fields_of(classes: tuple[tuple[str, str, str], ...]) -> dict[str, Field]:
    """The dataclass fields of installed classes, by name, read from their source files."""
    found: dict[str, Field] = {}
    for package, file, class_name in classes:
        tree = ast.parse(_source(package, file))
        classes_there = (node for node in tree.body if isinstance(node, ast.ClassDef))
        for node in next(node.body for node in classes_there if node.name == class_name):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if "init=False" not in ast.unparse(node.value or ast.Constant(None)):
                annotation = ast.unparse(node.annotation)
                found[node.target.id] = Field(annotation, _literal_default(node.value))
    return found


def _source(package: str, file: str) -> str:
    """The text of a source file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{package} is not installed; run 'make setup'")
    return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")


def _literal_default(node: ast.expr | None) -> Any:
    """The default in `= 8` or `= field(default=8, ...)`; None for one that is worked out."""
    if isinstance(node, ast.Call):
        node = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _typed(value: Any, annotation: str) -> Any:
    """The value as its field wants it.

    Unknown types are left to the library that owns the field.

    Raises:
        TypeError: it is not of the field's type.
    """
    union = ast.parse(annotation.strip("'\""), mode="eval").body
    names = [ast.unparse(part) for part in _union_parts(union)]
    kinds = {name.partition("[")[0] for name in names}
    if value is None and kinds & {"None", "Any"}:
        return None
    if isinstance(value, bool) and "bool" not in kinds:
        value = "yes" if value else "no"  # YAML 1.1 reads `save_strategy: no` as false
    if isinstance(value, bool):
        fits = "bool" in kinds
    elif isinstance(value, int):
        fits = "int" in kinds or "float" in kinds
    elif isinstance(value, float):
        fits = "float" in kinds
    elif isinstance(value, str):
        fits = "str" in kinds
        if not fits and "float" in kinds:
            # YAML 1.1 reads 5e-7 as text: it wants a point in the mantissa.
            try:
                return float(value)
            except ValueError:
                pass
    elif isinstance(value, list):
        fits = bool(kinds & {"list", "tuple"})
    elif isinstance(value, dict):
        fits = "dict" in kinds
    else:
        fits = False
    containers = kinds & {"list", "tuple"}
    known = {"None", "bool", "int", "float", "str", "list", "tuple", "dict"}
    if not fits and kinds <= known:
        if not containers or isinstance(value, list | dict):
            wanted = " or ".join(_SPOKEN[kind] for kind in sorted(kinds - {"None"}))
            raise TypeError(f"want {wanted}, got {value!r}")
        value = [value]  # one value where a list is wanted
    if isinstance(value, list) and containers:
        items = [_typed(item, _item(names)) for item in value]
        return tuple(items) if "tuple" in kinds else items
    return value


_SPOKEN = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}


def _union_parts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return _union_parts(node.left) + _union_parts(node.right)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return [part for item in inner for part in _union_parts(item)] + [ast.Constant(None)]
    return [node]


def _item(names: list[str]) -> str:
    """The annotation of a list's items: `int` of `tuple[int, ...] | None`."""
    container = ast.parse(
        next(name for name in names if name.startswith(("list", "tuple"))), mode="eval"
    ).body
    if not isinstance(container, ast.Subscript):
        return "Any"
    return ast.unparse(
        container.slice.elts[0] if isinstance(container.slice, ast.Tuple) else container.slice
    )
