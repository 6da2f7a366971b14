"""Will it run here, and if not, what to change: the installation, the run folder, the model, the data. Imports no ML library.

    mini-r1 doctor                                    # what is installed, which GPUs there are
    mini-r1 doctor RECIPE                             # and whether this recipe runs here
    mini-r1 doctor RECIPE --gpus 4 --gpu-memory 80    # or on another machine, of which only the GPUs are known

`mini-r1 train` asks the same questions before it starts anything: `first_problem`.
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from mini_r1 import InputError
from mini_r1.model import EMBEDDED_BASES, is_local, model_path
from mini_r1.plan import Machine, make_plan
from mini_r1.recipe import Recipe, load_recipe

# Keys that may change when a run is continued: they do not touch what the earlier steps computed.
CONTINUABLE_KEYS = {"max_steps", "num_train_epochs", "report_to", "push_to_hub", "vllm_group_port", "output_dir"}
CONTINUABLE_PREFIXES = ("save_", "logging_", "log_", "hub_", "num_eval_", "eval_", "vllm_server_")
HUB_TIMEOUT = 1.0  # seconds; a mistake is told at once or later
# Which package a key of a recipe needs.
PACKAGE_OF = {"use_vllm": "vllm", "use_peft": "peft", "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes"}
TRACKERS = ("wandb", "trackio")  # of those that report_to can name; TensorBoard is always there
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
        print(f"python      {platform.python_version()}; {os.cpu_count()} cores; {free:.0f} GB of disk free here")
        for line in _packages():
            print(f"package     {line}")
    if recipe_path is None:
        return
    plan = make_plan(load_recipe(recipe_path), machine)
    print(plan)
    found = [] if planned else list(problems(plan.recipe, plan.launcher))
    for problem in found:
        print(f"problem     {problem}")
    if found:
        raise InputError(f"{recipe_path} will not run here: {len(found)} problem{'s' if len(found) > 1 else ''}, listed above")
    print("verdict     it will run" if not planned else "verdict     it fits")


def first_problem(recipe: Recipe, launcher: str | None = None) -> None:
    """Refuse a run that would fail later.

    Raises:
        InputError: the first of its problems.
    """
    for problem in problems(recipe, launcher):
        raise recipe.error(problem)


def problems(recipe: Recipe, launcher: str | None = None) -> Iterator[str]:
    """What would make this recipe fail on this machine, each with what to do about it.

    Args:
        launcher: the accelerate config that will start it, if any.
    """
    for key, package in PACKAGE_OF.items():
        if (recipe.training | recipe.model).get(key) and find_spec(package) is None:
            yield f"{key}: {package} is not installed; {INSTALL_EXTRA}, or write {key}: false"
    if launcher == "deepspeed_zero3" and find_spec("deepspeed") is None:
        yield f"deepspeed is not installed, and full fine-tuning on several GPUs needs it; {INSTALL_EXTRA}"
    for tracker in recipe.training["report_to"]:
        if tracker in TRACKERS and find_spec(tracker) is None:
            yield f"report_to: {tracker} is not installed; run pip install -c constraints.txt {tracker}"
    yield from _run_folder(recipe)
    yield from _model(recipe)
    yield from _data(recipe)


def _run_folder(recipe: Recipe) -> Iterator[str]:
    """Whether the folder can be written, and holds nothing but earlier steps of this very run."""
    run_dir = recipe.run_dir
    ancestor = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=ancestor).close()
    except OSError as error:
        yield f"output_dir: {run_dir} cannot be written ({error.strerror}: {ancestor}); choose another --output_dir"
        return
    if ancestor != run_dir or {path.name for path in run_dir.iterdir()} <= {"logs"}:  # of a server that did not start
        return
    try:
        earlier = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
    except OSError:
        yield f"output_dir: {run_dir} exists and is no run of ours; choose another --output_dir"
        return
    now = recipe.as_dict()
    for key in sorted(earlier.keys() | now.keys()):
        if earlier.get(key) != now.get(key) and key not in CONTINUABLE_KEYS and not key.startswith(CONTINUABLE_PREFIXES):
            yield (
                f"output_dir: {run_dir} holds a run with {key}: {earlier.get(key)}, this recipe says {now.get(key)}; "
                "choose another --output_dir, or remove the folder to start anew"
            )


def _model(recipe: Recipe) -> Iterator[str]:
    name = recipe.model["model_name_or_path"]
    folder = Path(model_path(name))
    if folder.is_dir():
        if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
            yield f"model_name_or_path: {folder} holds no model: no config.json in it"
    elif is_local(name):
        yield f"model_name_or_path: no folder '{name}'; write a folder with a model, an id of the hub, or {EMBEDDED_BASES[0]}"
    else:
        yield from _on_hub(name, "model", f"write a local folder or {EMBEDDED_BASES[0]}", recipe.model.get("model_revision"))


def _data(recipe: Recipe) -> Iterator[str]:
    source = recipe.task.dataset_id_or_path
    if source == "generated" or Path(source).exists():
        return
    if is_local(source):
        yield f"dataset_id_or_path: no file or folder '{source}'; write a path, a hub id such as owner/name, or generated"
    else:
        yield from _on_hub(source, "dataset", "write a local file or generated")


def _on_hub(name: str, kind: str, instead: str, revision: str | None = None) -> Iterator[str]:
    """Whether the hub has it, or the local cache of an earlier download."""
    import httpx  # what huggingface_hub talks with
    from huggingface_hub import HfApi, constants, errors

    key = "model_name_or_path" if kind == "model" else "dataset_id_or_path"
    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots").is_dir():
        return
    ask: Any = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, revision=revision, timeout=HUB_TIMEOUT)
    except errors.HfHubHTTPError as error:
        reason = " ".join(str(error).split())[:120]
        yield f"{key}: the hub refuses the {kind} '{name}' ({reason}); check its name and your access, or {instead}"
    except errors.HFValidationError as error:
        yield f"{key}: {' '.join(str(error).split())}"
    except httpx.TimeoutException:
        return  # slow, not absent: the download itself may be more patient
    except Exception as error:  # whatever keeps us from the hub: offline mode, no route, a proxy
        reason = f"the hub cannot be reached ({type(error).__name__})"
        yield f"{key}: '{name}' is not in the cache and {reason}; without network {instead}"


def _packages() -> Iterator[str]:
    """The packages a run may need, installed or not, against the tested versions in our own metadata."""
    for requirement in requires("mini-r1") or []:
        pinned, _, marker = (part.strip() for part in requirement.partition(";"))
        name, _, tested = pinned.partition("==")
        if '"dev"' in marker:
            continue
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield f"{name} is not installed{' (optional)' if marker else '; run make setup'}"
            continue
        same = not tested or installed.partition("+")[0] == tested
        yield f"{name} {installed}" + ("" if same else f"; tested with {tested}")
