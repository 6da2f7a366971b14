"""Will it run here, and if not, what to change: the installation, the run folder, model and data.

    mini-r1 doctor                                    # what is installed, which GPUs there are
    mini-r1 doctor RECIPE                             # and whether this recipe runs here
    mini-r1 doctor RECIPE --gpus 4 --gpu-memory 80    # or elsewhere; only the GPUs are known

`mini-r1 train` asks the same questions before it starts anything: `first_problem`. Imports no ML
library.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from mini_r1 import InputError, one_line
from mini_r1.launch.plan import Machine, leftover_variables, make_plan
from mini_r1.model import EMBEDDED_BASES, is_local, model_path
from mini_r1.recipe import Recipe, load_recipe
from mini_r1.run import folder_problems

HUB_TIMEOUT = 1.0  # seconds; a mistake is told at once or later
# Which package a key of a recipe needs.
PACKAGE_OF = {
    "use_vllm": "vllm",
    "use_peft": "peft",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
}
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
        cores = f"{os.cpu_count()} cores; {free:.0f} GB of disk free here"
        print(f"python      {platform.python_version()}; {cores}")
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
        many = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise InputError(f"{recipe_path} will not run here: {many}, listed above")
    print("verdict     it will run" if not planned else "verdict     it fits")


def first_problem(recipe: Recipe, launcher: str | None = None) -> None:
    """Refuse a run that would fail later.

    Raises:
        InputError: the first of its problems.
    """
    for problem in problems(recipe, launcher):
        raise recipe.place(problem)


def problems(recipe: Recipe, launcher: str | None = None) -> Iterator[InputError]:
    """What would make this recipe fail on this machine, each with what to do about it.

    Args:
        launcher: the accelerate config that will start it, if any.
    """
    yield from leftover_variables() if launcher is None else ()
    yield from _missing_packages(recipe, launcher)
    yield from folder_problems(recipe)
    yield from _model(recipe)
    yield from _data(recipe)


def _missing_packages(recipe: Recipe, launcher: str | None) -> Iterator[InputError]:
    for key, package in PACKAGE_OF.items():
        if recipe.get(key) and find_spec(package) is None:
            yield InputError(
                f"{package} is not installed; {INSTALL_EXTRA}, or write {key}: false", key=key
            )
    if launcher == "deepspeed_zero3" and find_spec("deepspeed") is None:
        yield InputError(
            "deepspeed is not installed, and full fine-tuning on several GPUs needs it; "
            + INSTALL_EXTRA
        )
    for tracker in recipe.get("report_to"):
        if tracker in TRACKERS and find_spec(tracker) is None:
            yield InputError(
                f"{tracker} is not installed; run pip install -c constraints.txt {tracker}",
                key="report_to",
            )


def _model(recipe: Recipe) -> Iterator[InputError]:
    key, name = "model_name_or_path", recipe.model["model_name_or_path"]
    folder = Path(model_path(name))
    if folder.is_dir():
        if not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
            yield InputError(f"{folder} holds no model: no config.json in it", key=key)
    elif is_local(name):
        yield InputError(
            f"no folder '{name}'; write a folder with a model, an id of the hub, or "
            + EMBEDDED_BASES[0],
            key=key,
        )
    else:
        instead = f"write a local folder or {EMBEDDED_BASES[0]}"
        yield from _on_hub(name, "model", instead, recipe.get("model_revision"))


def _data(recipe: Recipe) -> Iterator[InputError]:
    source = recipe.task.dataset_id_or_path
    if source == "generated" or Path(source).exists():
        return
    if is_local(source):
        yield InputError(
            f"no file or folder '{source}'; write a path, a hub id such as owner/name, or "
            "generated",
            key="dataset_id_or_path",
        )
    else:
        yield from _on_hub(source, "dataset", "write a local file or generated")


def _on_hub(
    name: str, kind: str, instead: str, revision: str | None = None
) -> Iterator[InputError]:
    """Whether the local cache has it, or the hub."""
    import httpx  # what huggingface_hub talks with
    from huggingface_hub import HfApi, errors, snapshot_download

    key = "model_name_or_path" if kind == "model" else "dataset_id_or_path"
    try:
        snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)
        return
    except errors.LocalEntryNotFoundError:
        pass
    except errors.HFValidationError as error:
        yield InputError(one_line(error), key=key)
        return
    ask: Any = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, revision=revision, timeout=HUB_TIMEOUT)
    except errors.HfHubHTTPError as error:
        yield InputError(
            f"the hub refuses the {kind} '{name}' ({one_line(error, 120)}); check its name and "
            f"your access, or {instead}",
            key=key,
        )
    except httpx.TimeoutException:
        return  # slow, not absent: the download itself may be more patient
    except Exception as error:  # whatever keeps us from the hub: offline mode, no route, a proxy
        yield InputError(
            f"'{name}' is not in the cache and the hub cannot be reached "
            f"({type(error).__name__}); without network {instead}",
            key=key,
        )


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
