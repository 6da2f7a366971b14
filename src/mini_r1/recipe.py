"""What a recipe may say; finding, loading, checking, defaults, explaining mistakes.

A recipe is one flat YAML file. Its keys are the fields of `TaskConfig` below and of TRL's
`ModelConfig` and `GRPOConfig`. How it is written is in syntax.py, what one key may be in keys.py,
what several may not be together in conflicts.py. No ML library is imported: a typo must be told in
well under a second.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mini_r1 import InputError
from mini_r1.completion import THINK_OPEN
from mini_r1.conflicts import conflicts
from mini_r1.countdown.puzzles import PuzzleSpace, PuzzleSpaceError
from mini_r1.files import read_text, reason
from mini_r1.keys import (
    MAPPING_OR_PATH,
    MODEL_CLASSES,
    TRAINING_CLASSES,
    Key,
    check_choice,
    check_number,
    keys_of,
    shortened,
)
from mini_r1.prompts import PROMPT_TEMPLATES, PromptTemplate, get_prompt_template
from mini_r1.rewards import REWARDS, get_reward_functions
from mini_r1.syntax import node_of, parse_overrides, read_yaml

_PACKAGE = Path(__file__).parent
# What lies beside the package in a checkout, recipes/, configs/ and scripts/, is inside of it once
# it is installed: see pyproject.toml.
ROOT = _PACKAGE.parents[1] if _PACKAGE.parent.name == "src" else _PACKAGE
RECIPES = ROOT / "recipes"

# A token as the hub makes them, and the password in an address.
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/\s]*:[^/\s]*@")

# What every run wants unless its recipe says otherwise.
TRAINING_DEFAULTS = {
    "report_to": ["tensorboard"],  # the libraries' default is none
    "logging_steps": 1,  # a step takes seconds to a minute; its log line costs nothing
    "max_completion_length": 1024,  # the original's; TRL's 512 cuts off 3B models that think aloud
    # One spare in case of a torn write: a checkpoint of a 3B model with its optimizer is 40 GB.
    "save_total_limit": 2,
}

# Keys that are gone, the tutorial's (TRL 0.14, transformers 4.48) and later ones, and what to do.
_NOW_ALWAYS = "leave it out: it is always so"
_NOW_NEVER = "leave it out: no longer supported"
OLD_KEYS = {
    "torch_dtype": "write dtype",
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of all steps",
    "vllm_device": "leave it out: with vllm_mode: server the run starts vLLM on the last GPU",
    "vllm_max_model_len": "write vllm_max_model_length",
    "vllm_dtype": "leave it out: vLLM uses the model's dtype",
    "vllm_guided_decoding_regex": "write vllm_structured_outputs_regex",
    "vllm_enable_prefix_caching": _NOW_ALWAYS,
    "use_liger_loss": "leave it out: the loss never holds all logits at once",
    "wandb_log_unique_prompts": "write log_unique_prompts",
    "dataset_name": "write dataset_id_or_path",
    "dataset_splits": "write dataset_split",
    "dataset_train_split": "write dataset_split",
    "dataset_streaming": _NOW_NEVER,
    "tokenizer_name_or_path": "leave it out: the tokenizer comes with the model",
    "gradient_checkpointing_use_reentrant": (
        "write gradient_checkpointing_kwargs: {use_reentrant: false}"
    ),
    "logging_dir": "leave it out: TensorBoard files are in the run folder",
    "overwrite_output_dir": "leave it out: choose another output_dir, or remove the folder",
    "evaluation_strategy": "write eval_strategy",
    "no_cuda": "write use_cpu",
    "adafactor": "write optim: adafactor",
    "group_by_length": "leave it out: GRPO draws a prompt's completions together",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "push_to_hub_model_id": "write hub_model_id",
    "push_to_hub_organization": "write hub_model_id: organization/name",
    "push_to_hub_token": "leave it out: give --hub_token on the command line, or set HF_TOKEN",
    "torchdynamo": "write torch_compile_backend",
    "dispatch_batches": "write accelerator_config: {dispatch_batches: ...}",
    "split_batches": "write accelerator_config: {split_batches: ...}",
    "fsdp_min_num_params": "write fsdp_config: {min_num_params: ...}",
    "fsdp_transformer_layer_cls_to_wrap": "write fsdp_config: {transformer_layer_cls_to_wrap: ...}",
    "include_inputs_for_metrics": "write include_for_metrics: [inputs]",
    "include_tokens_per_second": "leave it out: num_tokens is logged",
    "tpu_metrics_debug": "write debug: tpu_metrics_debug",
    "save_safetensors": _NOW_ALWAYS,
    **dict.fromkeys(("fp16_backend", "half_precision_backend", "use_mps_device"), _NOW_ALWAYS),
    **dict.fromkeys(("fp16_opt_level", "use_ipex", "jit_mode_eval", "past_index"), _NOW_NEVER),
    **dict.fromkeys(("mp_parameters", "ray_scope", "tpu_num_cores"), _NOW_NEVER),
    "use_legacy_prediction_loop": _NOW_NEVER,
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
    dataset_revision: str | None = field(
        default=None,
        metadata={"help": "the commit, branch or tag of a data set of the hub; main if not given"},
    )
    dataset_split: str = field(
        default="train",
        metadata={"help": "the part of a folder or of a hub data set to train on"},
    )
    heldout_split: str | None = field(
        default=None,
        metadata={
            "help": "the part to hold out as its author made it: test, or else validation, where "
            "there is one; the same as dataset_split holds out a test_share of that"
        },
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "which column is which, where they have other names, such as {nums: numbers, "
            "target: reward_model.ground_truth}; a dotted path leads into a column"
        },
    )
    num_puzzles: int = field(
        default=50_000,
        metadata={
            "help": "how many puzzles to take, held-out part included; an author's own held-out "
            "part comes on top, whole"
        },
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
        default="mini-r1-exact",
        metadata={
            "help": "how a row is put to the model: one of ours, or a file (a chat in YAML, or a "
            "text) with the columns of the data in Jinja, such as {{ target }}",
            "choices": tuple(PROMPT_TEMPLATES),
        },
    )
    max_prompt_length: int = field(
        default=256, metadata={"help": "longer prompts (tokens) are dropped and counted"}
    )
    num_gpus: int | None = field(
        default=None,
        metadata={
            "help": "GPUs of each machine to use, a vLLM server's included: the first so many; all "
            "if not given"
        },
    )
    reward_funcs: tuple[str, ...] = field(
        default=("format", "equation"),
        metadata={
            "help": "registered rewards, dotted paths or files (my_task.py:my_reward); see "
            "reward_weights"
        },
    )
    eval_reward: str | None = field(
        default=None,
        metadata={
            "help": "the reward that is success, 0 to 1, named as in reward_funcs: equation for "
            "puzzles, else the first of reward_funcs"
        },
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
        for name, value in vars(self).items():
            for item in value if isinstance(value, tuple) else [value]:
                if isinstance(item, int | float):
                    self._check(name, check_number, item)
        self._check("prompt_template", check_choice, self.prompt_template, PROMPT_TEMPLATES)
        if not self.reward_funcs:
            raise InputError("name at least one reward", key="reward_funcs")
        if not all(isinstance(each, str) for pair in (self.columns or {}).items() for each in pair):
            raise InputError(
                f"want names such as {{nums: numbers}}, got {self.columns}", key="columns"
            )
        try:
            space = self.space
            if self.dataset_id_or_path == "generated":
                space.check_size(self.num_puzzles)
        except PuzzleSpaceError as error:
            raise InputError(str(error), key=error.name) from error

    @staticmethod
    def _check(name: str, check: Callable[..., None], *value: Any) -> None:
        try:
            check(name, *value)
        except ValueError as error:
            raise InputError(str(error), key=name) from None

    @property
    def is_countdown(self) -> bool:
        """Whether rows are puzzles: they are generated, asked or judged as such."""
        return (
            self.dataset_id_or_path == "generated"
            or self.prompt_template in PROMPT_TEMPLATES
            or "equation" in self.reward_funcs
        )

    @property
    def success_reward(self) -> str:
        """The reward that evaluations report the mean of."""
        return self.eval_reward or ("equation" if self.is_countdown else self.reward_funcs[0])

    @property
    def template(self) -> PromptTemplate:
        """How a row is put to the model.

        Raises:
            InputError: it is a file that is not there, or cannot be used.
        """
        return get_prompt_template(self.prompt_template)

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
        return _placed(error, self.where, self.path)

    def get(self, key: str) -> Any:
        """The value of a key: the recipe's, else ours, else the library's.

        None stands for a default that the library works out when it runs.

        Raises:
            KeyError: no such key.
        """
        given = {**self.model, **vars(self.task), **self.training}
        return given[key] if key in given else default_of(key)

    @property
    def run_dir(self) -> Path:
        return Path(self.training["output_dir"])

    def as_dict(self) -> dict[str, Any]:
        """The recipe as resolved, ready for YAML.

        The task's keys with their defaults, the others as given.
        """
        return {**self.model, **self.task.as_dict(), **self.training}


def _placed(error: InputError, where: Mapping[str, str], path: Path) -> InputError:
    if error.where is not None:
        return error
    return InputError(error.problem, key=error.key, where=where.get(error.key or "", str(path)))


def default_of(key: str) -> Any:
    """What a model's or training's key is where a recipe says nothing, as `Recipe.get` has it.

    Raises:
        KeyError: no such key.
    """
    if key in TRAINING_DEFAULTS:
        return TRAINING_DEFAULTS[key]
    known = all_keys()
    return {**known["model"], **known["training"]}[key].default


@cache
def all_keys() -> dict[str, dict[str, Key]]:
    """Every key that a recipe may have, by whose it is: the task's, the model's, the training's."""
    task = {}
    for each in fields(TaskConfig):
        spelled = each.type.__name__ if isinstance(each.type, type) else str(each.type)
        default = getattr(TaskConfig(), each.name)
        about = each.metadata
        task[each.name] = Key(
            each.name, spelled, default, about.get("help", ""), about.get("choices", ())
        )
    return {"task": task, "model": keys_of(MODEL_CLASSES), "training": keys_of(TRAINING_CLASSES)}


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, to_train: bool = True
) -> Recipe:
    """Read a recipe, apply overrides (`--key value ...`), check everything that needs no machine.

    Args:
        path: or the name of a recipe, as `find_recipe` takes it.
        to_train: else its rewards are not looked for: a run can be evaluated without them.

    Raises:
        InputError: in one line, what is wrong, in which line of the file, and what to write.
    """
    path = find_recipe(path)
    given, where = read_yaml(path)
    for key, words in parse_overrides(overrides).items():
        given[key], where[key] = words, f"--{key}"
    _refuse_old_keys(path, where)
    _drop_revisions(given, where)
    parts = _read_values(given, where)
    _one_length(parts["training"], where)
    if parts["training"].get("output_dir") is None:
        parts["training"]["output_dir"] = f"runs/{path.stem}"
    try:
        task = TaskConfig(**parts["task"])
    except InputError as error:
        raise _placed(error, where, path) from None
    recipe = Recipe(path, tuple(overrides), where, task, parts["model"], parts["training"])
    for wrong, key, problem in conflicts(recipe.get):
        if wrong:
            raise recipe.error(problem, key)
    if to_train:
        _check_config_files(recipe)
        try:
            _check_task(task)
        except InputError as error:
            raise recipe.place(error) from None
    return recipe


def _check_config_files(recipe: Recipe) -> None:
    """Whether the files that stand for a mapping, such as DeepSpeed's, hold one."""
    for key in MAPPING_OR_PATH:
        file = recipe.training.get(key)
        if isinstance(file, str) and Path(file).exists():
            try:
                json.loads(read_text(Path(file)))
            except (OSError, ValueError, RecursionError) as error:
                raise recipe.error(f"{file} cannot be read: {reason(error)}", key) from None


def _check_task(task: TaskConfig) -> None:
    """Whether prompt and rewards are there, and fit each other."""
    rewards = get_reward_functions(task.reward_funcs)
    get_reward_functions([task.success_reward], key="eval_reward")
    if task.dataset_id_or_path == "generated":
        for reward in rewards:
            reward.check_columns(("nums", "target"))
    template = task.template
    judged = next((name for name in REWARDS if name in task.reward_funcs), None)
    if judged and not template.opens_think:
        raise InputError(
            f"the reward {judged} wants a prompt that ends in {THINK_OPEN}; let the assistant's "
            "message end so, or leave that reward out",
            key="prompt_template",
        )


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or a name such as `tiny-cpu`.

    A name is looked for in the current folder and then among the shipped recipes; it may lack the
    `.yaml`.

    Raises:
        InputError: there is none; suggests the nearest.
    """
    path = Path(name).expanduser()
    tried = [path, path.with_name(f"{path.name}.yaml")] if path.name else []
    if path.parent == Path():
        tried += [RECIPES / each.name for each in tried]
    try:
        found = next((each for each in tried if each.is_file()), None)
        something = found is None and path.exists()
        beside = [] if found else list(path.parent.glob("*.yaml"))
    except (OSError, ValueError) as error:  # no right to look, or no name at all
        raise InputError(f"cannot be read: {reason(error)}", where=shortened(str(path))) from None
    if found:
        near = os.path.relpath(found)
        return found if near.startswith(os.pardir) else Path(near)
    if something:
        # A pipe is refused, too: every process of a run reads its recipe.
        kind = "a folder" if path.is_dir() else "no ordinary file"
        raise InputError(f"{kind}; want a recipe, a YAML file", where=path)
    known = {each.stem: str(each) for each in beside}
    known |= {each.stem: each.stem for each in RECIPES.glob("*.yaml")}
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), known, n=1)
    hint = (
        f"did you mean '{known[near[0]]}'?" if near else "'mini-r1 recipes' lists those there are"
    )
    raise InputError(f"no such recipe; {hint}", where=path)


def _refuse_old_keys(path: Path, where: Mapping[str, str]) -> None:
    """A recipe for TRL 0.14, the tutorial's, is not translated behind its author's back.

    Some of it means something else now.
    """
    old = {key: advice for key, advice in OLD_KEYS.items() if key in where}
    if len(old) == 1:
        ((key, advice),) = old.items()
        raise InputError(f"this key is gone; {advice}", key=key, where=where[key])
    if old:
        if "per_device_train_batch_size" in where:
            old["per_device_train_batch_size"] = (
                "now counts completions, not prompts: write the old value times num_generations"
            )
        rows = [f"  {key:<28} {advice}" for key, advice in old.items()]
        headline = "written for TRL 0.14, this is 1.16; instead of"
        raise InputError("\n".join([headline, *rows]), where=path)


def _drop_revisions(given: dict[str, Any], where: Mapping[str, str]) -> None:
    """A revision in the file is of the name in the file, not of one on the command line."""
    for name, revision in (
        ("model_name_or_path", "model_revision"),
        ("dataset_id_or_path", "dataset_revision"),
    ):
        if where.get(name) == f"--{name}" and where.get(revision) != f"--{revision}":
            given.pop(revision, None)


def _read_values(
    given: Mapping[str, yaml.Node | list[str]], where: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The three parts of a recipe, each value of its key's type, range and choices."""
    known = all_keys()
    parts: dict[str, dict[str, Any]] = {
        "task": {},
        "model": {},
        "training": dict(TRAINING_DEFAULTS),
    }
    for name, setting in given.items():
        owner = next((owner for owner, keys in known.items() if name in keys), None)
        if owner is None:
            every = [name for keys in known.values() for name in keys]
            near = difflib.get_close_matches(name, every, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see 'mini-r1 recipes --keys'"
            raise InputError(f"unknown key '{shortened(name)}'; {hint}", where=where[name])
        key = known[owner][name]
        try:
            node = node_of(setting, key) if isinstance(setting, list) else setting
            value = parts[owner][name] = _from_home(key.read(node))
            _refuse_secret(name, value)
        except (TypeError, ValueError) as error:
            raise InputError(str(error), key=name, where=where[name]) from None
    return parts


def _refuse_secret(name: str, value: Any) -> None:
    """A run keeps its recipe and its command, shows them in its report, and may upload both.

    Raises:
        ValueError: this is a secret, which it does not repeat.
    """
    if (name == "hub_token" and value) or SECRET.search(str(value)):
        raise ValueError(
            "no place for a secret, since the run keeps its recipe; give the hub's as --hub_token "
            "on the command line or as HF_TOKEN, or run 'hf auth login'"
        )


def _from_home(value: Any) -> Any:
    """A value whose paths do not begin with ~, which only a shell knows.

    Raises:
        ValueError: it is the home folder of nobody.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(_from_home, value))
    if not isinstance(value, str) or not re.match(r"~$|~[\w.-]*/", value):
        return value
    path = os.path.expanduser(value)
    if path == value:
        raise ValueError(f"no home folder '{value.partition('/')[0]}'")
    return path


def _one_length(training: dict[str, Any], where: Mapping[str, str]) -> None:
    """Either max_steps or num_train_epochs: one on the command line replaces one in the file.

    The Trainer takes both, and forgets the epochs.
    """
    steps, epochs = "max_steps", "num_train_epochs"
    if epochs not in training or training.get(steps, -1) < 1:
        return
    given = [key for key in (steps, epochs) if where[key] == f"--{key}"]
    if len(given) != 1:
        raise InputError(
            f"max_steps: {training[steps]} says how long, too; leave one of them out",
            key=epochs,
            where=where[epochs],
        )
    del training[steps if given == [epochs] else epochs]
