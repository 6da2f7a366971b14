"""Will it run here, and if not, what to change: the installation, the run folder, model and data.

    mini-r1 doctor                                    # what is installed, which GPUs there are
    mini-r1 doctor RECIPE                             # and whether this recipe runs here
    mini-r1 doctor RECIPE --gpus 4 --gpu-memory 80    # or elsewhere; only the GPUs are known

`mini-r1 train` asks the same questions before it starts anything: `first_problem`. Imports no ML
library but the tokenizers of transformers, at the end, for the last question.
"""

import configparser
import difflib
import netrc
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.version import Version

from mini_r1 import InputError, hub, visible
from mini_r1.data import check_head
from mini_r1.launch.machine import Machine, leftover_variables, num_processes
from mini_r1.launch.memory import checkpoint_bytes, model_shape
from mini_r1.launch.plan import Plan, checkpoints_at_most, free_disk, make_plan, optimizer_steps
from mini_r1.model import (
    EMBEDDED_BASES,
    adapter_base,
    is_local,
    load_tokenizer,
    model_folder,
    whole_model,
)
from mini_r1.model_files import (
    CONFIG_FILE,
    QUANTIZED_BY,
    adapter_problems,
    is_model,
    quantized_by,
    read_json,
)
from mini_r1.model_files import problems as file_problems
from mini_r1.prompts import SAMPLE
from mini_r1.recipe import Recipe, all_keys, load_recipe
from mini_r1.rewards import get_reward_functions
from mini_r1.run import (
    checkpoints,
    finished_summary,
    folder_problems,
    is_run,
    weights_and_task,
    weights_of,
)
from mini_r1.tables import locate

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}  # of lora_target_modules
# Which package a key of a recipe needs.
PACKAGE_OF = {
    "use_vllm": "vllm",
    "use_peft": "peft",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
}
# Which one an optimizer needs, by what its name matches.
PACKAGE_OF_OPTIMIZER = {
    "galore_": "galore_torch",
    "apollo_": "apollo_torch",
    "lomo|adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free_": "schedulefree",
    "stable_adamw": "optimi",
    "adamw_torch_[48]bit": "torchao",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    ".*(8bit|bnb|paged|lion|ademamix)": "bitsandbytes",
}
# And a tracker, where that is not its name.
PACKAGE_OF_TRACKER = {"azure_ml": "azureml", "flyte": "flytekit"}
# What pip calls a package, where it is not the module's name.
PIP_NAMES = {"azureml": "azureml-core", "optimi": "torch-optimi"}
INSTALL_EXTRA = "run pip install -c constraints.txt -e '.[gpu]'"


def examine(recipe_path: str | None, machine: Machine, planned: bool) -> None:
    """Print the findings.

    Args:
        planned: the machine is not this one, so what is installed here does not matter.

    Raises:
        InputError: the recipe will not run; after all findings were printed.
    """
    print(f"machine     {machine}")
    if not planned:
        free = shutil.disk_usage(".").free / 1e9
        cores = f"{os.cpu_count()} cores; {free:.0f} GB of disk free here"
        print(f"python      {platform.python_version()}; {cores}")
        for line in _packages():
            print(f"package     {line}")
    if recipe_path is None:
        return
    plan = make_plan(load_recipe(recipe_path), machine)
    print(plan)
    found = [] if planned else list(problems(plan.recipe, plan))
    for problem in found:
        print(visible(f"problem     {problem}"))
    if found:
        many = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise InputError(f"{recipe_path} will not run here: {many}, listed above")
    print("verdict     it will run" if not planned else "verdict     it fits")


def first_problem(recipe: Recipe, plan: Plan | None = None) -> None:
    """Refuse a run that would fail later.

    Raises:
        InputError: the first of its problems.
    """
    for problem in problems(recipe, plan):
        raise recipe.place(problem)


def problems(recipe: Recipe, plan: Plan | None = None) -> Iterator[InputError]:
    """What would make this recipe fail on this machine, each with what to do about it.

    Args:
        plan: of the processes that are to be started; None if this is one of them.
    """
    launcher = plan.launcher if plan else None
    yield from leftover_variables() if launcher is None else ()
    yield from _missing_packages(recipe, launcher)
    yield from folder_problems(recipe)
    unusable, sample = list(_model(recipe)), None
    yield from unusable
    try:
        sample = _data(recipe)
    except InputError as error:
        yield error
    yield from _trackers(recipe)
    yield from _uploads(recipe)
    yield from _disk(recipe, plan)
    if sample and not unusable:
        yield from _prompt(recipe, sample)


def _missing_packages(recipe: Recipe, launcher: str | None) -> Iterator[InputError]:
    for key, package in PACKAGE_OF.items():
        if recipe.get(key) and find_spec(package) is None:
            yield InputError(
                f"{package} is not installed; {INSTALL_EXTRA}, or write {key}: false", key=key
            )
    if (launcher or "").startswith("deepspeed") and find_spec("deepspeed") is None:
        yield InputError(
            "deepspeed is not installed, and full fine-tuning on several GPUs needs it; "
            + INSTALL_EXTRA
        )
    if recipe.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        yield _not_installed("liger_kernel", "use_liger_kernel")
    attention = recipe.get("attn_implementation") or ""
    if "/" in attention and find_spec("kernels") is None:  # a kernel of the hub
        yield _not_installed("kernels", "attn_implementation")
    optimizer = recipe.get("optim") or ""
    patterns = (each for each in PACKAGE_OF_OPTIMIZER if re.match(each, optimizer))
    package = PACKAGE_OF_OPTIMIZER.get(next(patterns, ""))
    if package and find_spec(package) is None:
        yield _not_installed(package, "optim")


def _not_installed(package: str, key: str) -> InputError:
    pip_name = PIP_NAMES.get(package, package)
    return InputError(
        f"{package} is not installed; run pip install -c constraints.txt {pip_name}", key=key
    )


def _trackers(recipe: Recipe) -> Iterator[InputError]:
    """Whether what is to be logged can be logged."""
    chosen = recipe.get("report_to")
    chosen = [chosen] if isinstance(chosen, str) else chosen
    known = set(all_keys()["training"]["report_to"].choices) - {"all", "none"}
    packages = {tracker: PACKAGE_OF_TRACKER.get(tracker, tracker) for tracker in known}
    if chosen == ["all"]:  # that are installed
        chosen = sorted(tracker for tracker in known if find_spec(packages[tracker]))
    for tracker in known.intersection(chosen):
        # Kubeflow needs none, and DagsHub logs by MLflow.
        needed = [] if tracker == "kubeflow" else [packages[tracker]]
        needed += ["mlflow"] if tracker == "dagshub" else []
        for package in needed:
            if find_spec(package) is None:
                yield _not_installed(package, "report_to")
    if "wandb" in chosen and find_spec("wandb") and not _wandb_will_log():
        yield InputError(
            "wandb has no login here; run 'wandb login', or set WANDB_MODE=offline",
            key="report_to",
        )


def _wandb_will_log() -> bool:
    """Whether wandb finds a login where it looks for one, or is told to do without."""
    env = os.environ
    without = ("offline", "dryrun", "disabled")
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if "WANDB_MODE" in env:
        return env["WANDB_MODE"] in without or _has_netrc_entry()
    settings = configparser.ConfigParser(default_section="default")
    folder = Path(env.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    with suppress(OSError, UnicodeDecodeError, configparser.Error):  # wandb itself will complain
        settings.read(folder / "settings")
    mode = settings.defaults().get("mode")
    return mode in without or "api_key" in settings.defaults() or _has_netrc_entry()


def _has_netrc_entry() -> bool:
    places = (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    for place in filter(None, places):
        try:
            return netrc.netrc(Path(place).expanduser()).authenticators(host) is not None
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError):
            return False
    return False


def _uploads(recipe: Recipe) -> Iterator[InputError]:
    """Whether the hub lets this run write to it: some of them begin by making a repository."""
    keys = ("push_to_hub", "log_completions_hub_repo", "trackio_space_id")
    key = next((key for key in keys if recipe.get(key)), None)
    if key is None:
        return
    from huggingface_hub import get_token

    instead = "write push_to_hub: false" if key == "push_to_hub" else "leave it out"
    token = get_token()
    if not token:
        yield InputError(
            f"no hub token here; run 'hf auth login', give --hub_token, or {instead}", key=key
        )
        return
    if refusal := hub.token_refusal(token):
        yield InputError(f"{refusal}; {instead}", key=key)


def check_model(name: str, recipe_path: str | None = None, vllm: bool = False) -> None:
    """Refuse a run or model, named on the command line, that could not be loaded.

    Args:
        vllm: it is to be loaded by vLLM.

    Raises:
        InputError: the first of its problems.
    """
    if vllm and find_spec("vllm") is None:
        raise InputError(f"vllm is not installed; {INSTALL_EXTRA}, or leave it out", where="--vllm")
    weights, task, max_completion_length, _ = weights_and_task(name, recipe_path)
    lengths = (task.max_prompt_length, max_completion_length)
    for problem in model_problems(weights, lengths=lengths):
        raise InputError(problem.problem, where="RUN_OR_MODEL")


def model_problems(
    name: str,
    revision: str | None = None,
    lengths: tuple[int, int] | None = None,
    above: tuple[str, ...] = (),
) -> Iterator[InputError]:
    """What makes a model useless here, told without loading it.

    Args:
        name: as a recipe has it.
        lengths: the tokens of the longest prompt and of the longest completion.
        above: the adapters that this is the base of.
    """
    # Where is it?
    try:
        name = weights_of(name)
        folder = model_folder(name, revision)
    except InputError as error:
        yield error
        return
    on_hub = not is_local(name) and (folder is None or folder != Path(name))
    if name not in EMBEDDED_BASES and on_hub:
        refused = hub.refusal(name, "model", revision)
        if refused is not None:
            near = _nearest(name)
            advice = f"; did you mean '{near}'?" if near else ""
            yield InputError(refused.problem + advice, key=refused.key)
        if refused is not None or folder is None or hub.unreachable() is None:
            return  # what the cache lacks can still be fetched
    if folder is None:
        yield _no_model(name)
        return

    # What is in it?
    base = None
    try:
        base = adapter_base(folder)
    except InputError as error:
        yield error
        return
    if base is None and not is_model(folder):
        yield InputError(f"{folder} holds no model: no config.json in it", key="model_name_or_path")
    elif base is None:
        yield from file_problems(folder, lengths)
    elif base in above or base == name:
        yield InputError(f"{folder} is an adapter of itself", key="model_name_or_path")
    else:
        found = list(adapter_problems(folder))
        yield from found
        if not found:
            for problem in model_problems(base, None, lengths, (*above, name)):
                yield InputError(
                    f"the base of the adapter {folder}: {problem.problem}", key=problem.key
                )


def _model(recipe: Recipe) -> Iterator[InputError]:
    key, name = "model_name_or_path", recipe.model["model_name_or_path"]
    lengths = (recipe.task.max_prompt_length, recipe.get("max_completion_length"))
    revision = recipe.get("model_revision")
    found = list(model_problems(name, revision, lengths))
    yield from found
    folder = None if found else model_folder(whole_model(weights_of(name), revision), revision)
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return
    method = quantized_by(read_json(folder / CONFIG_FILE))
    if method in QUANTIZED_BY and not recipe.get("use_peft"):
        yield InputError(
            f"{name} is quantized by {method}, and such weights cannot be trained in full; write "
            "use_peft: true, or a model in 16 bit",
            key=key,
        )
    shape, targets = model_shape(name), set(recipe.get("lora_target_modules") or ())
    adapts_experts = shape is not None and shape.num_experts > 0 and bool(targets - ATTENTION)
    if recipe.get("use_peft") and adapts_experts and recipe.get("lora_dropout"):
        yield InputError(
            f"PEFT adapts the experts of {name} without dropout only; write lora_dropout: 0, or "
            "only projections of attention as lora_target_modules",
            key="lora_dropout",
        )


def _no_model(name: str) -> InputError:
    near = _nearest(name)
    advice = f"write a folder with a model, an id of the hub, or {EMBEDDED_BASES[0]}"
    if Path(name).is_file():
        advice = "it is a file; write the folder that holds it"
    elif near:
        advice = f"did you mean '{near}'?"
    return InputError(f"no run or model '{name}' here; {advice}", key="model_name_or_path")


def _nearest(name: str) -> str | None:
    """The embedded base, run or model folder here whose name is most like this one."""
    spelt = {base: base for base in EMBEDDED_BASES}
    for parent in dict.fromkeys((Path("runs"), Path(name).parent)):
        with suppress(OSError):
            for folder in sorted(parent.iterdir()):
                if is_run(folder) or is_model(folder):
                    spelt |= {folder.name: str(folder), str(folder): str(folder)}
    near = difflib.get_close_matches(name.rstrip("/"), spelt, n=1, cutoff=0.75)
    return spelt[near[0]] if near else None


def _disk(recipe: Recipe, plan: Plan | None) -> Iterator[InputError]:
    """Whether the checkpoints and the trained model fit on the disk."""
    unsaid = 3 if "ACCELERATE_USE_DEEPSPEED" in os.environ else 0  # accelerate launch sets these
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", unsaid))
    processes = num_processes()
    if plan:
        stage, processes = plan.zero_stage, plan.processes
    size = checkpoint_bytes(recipe, stage)
    if size is None or finished_summary(recipe) is not None:
        return
    number = checkpoints_at_most(recipe, optimizer_steps(recipe, processes))
    number = 1 if number is None else number
    checkpoint, model = sum(size.values()), size["weights"]
    # A run that goes on replaces the checkpoints that it has.
    old = (file for folder in checkpoints(recipe.run_dir) for file in folder.rglob("*"))
    free = free_disk(recipe.run_dir) + sum(file.stat().st_size for file in old if file.is_file())
    needed = number * checkpoint + model
    if needed > free:
        fewer = "write a lower save_total_limit, or " if number > 2 else ""
        yield InputError(
            f"{number} checkpoints of {checkpoint / 1e9:.1f} GB and the trained model of "
            f"{model / 1e9:.1f} GB take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
            f"there; {fewer}choose another --output_dir",
            key="output_dir",
        )


def _prompt(recipe: Recipe, sample: Mapping[str, Any]) -> Iterator[InputError]:
    """Whether the model can be asked as the recipe says, if its tokenizer is on this machine.

    Comes last, since importing the tokenizers takes seconds; the weights are not touched.
    """
    weights, revision = weights_of(recipe.model["model_name_or_path"]), recipe.get("model_revision")
    if model_folder(whole_model(weights, revision), revision) is None:
        return  # the run asks once it has fetched it
    try:
        tokenizer, kwargs = load_tokenizer(weights, revision), recipe.get("chat_template_kwargs")
        recipe.task.template.renderer(tokenizer, kwargs, sample)
    except InputError as error:
        yield error


def _data(recipe: Recipe) -> Mapping[str, Any] | None:
    """The columns of the data's first row; None if the data are not here yet.

    Raises:
        InputError: they can be neither had nor used.
    """
    source, revision = recipe.task.dataset_id_or_path, recipe.task.dataset_revision
    if source == "generated":
        return SAMPLE
    if locate(source, revision):
        columns = check_head(recipe.task)
        for reward in get_reward_functions(recipe.task.reward_funcs):
            reward.check_columns(columns)
        return columns
    if refused := hub.refusal(source, "dataset", revision):
        raise refused
    return None


def _packages() -> Iterator[str]:
    """The packages a run may need, installed or not, against the versions in our own metadata."""
    for requirement in map(Requirement, requires("mini-r1") or []):
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": "dev"}):
            continue
        try:
            installed = Version(version(requirement.name))
        except PackageNotFoundError:
            missing = " (optional)" if marker is not None else "; run make setup"
            yield f"{requirement.name} is not installed{missing}"
            continue
        tested = requirement.specifier.contains(installed)
        pinned = str(requirement.specifier).removeprefix("==")
        yield f"{requirement.name} {installed.public}" + (
            "" if tested else f"; tested with {pinned}"
        )
