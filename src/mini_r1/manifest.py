"""What produced a run: versions, hardware, git state, hashes of recipe, data and model."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mini_r1.model import adapter_base, model_path

PACKAGES = (
    "mini-r1",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "vllm",
    "bitsandbytes",
)


class Hardware(TypedDict):
    """What a process runs on."""

    platform: str
    cpu_count: int | None
    torch_threads: int
    gpus: list[str]
    world_size: int


class GitState(TypedDict):
    """The source tree that the package runs from."""

    commit: str
    dirty: bool


class ModelRecord(TypedDict):
    """The model that a run starts from: `sha256` of a local one, `revision` of one of the hub.

    `base` is what an adapter was trained on; `sha256` is then of both.
    """

    name: str
    sha256: str | None
    revision: str | None
    base: NotRequired[str]


class DataRecord(TypedDict):
    """The puzzles of a run: their hash, how many in each part, how many were dropped.

    `revision` is the commit of a data set of the hub.
    """

    sha256: str
    revision: str | None
    train: int
    heldout: int
    duplicates: int
    too_long: int


class RunManifest(TypedDict):
    """What `manifest.json` of a run holds.

    `folder` is where the command was given: relative paths of the recipe count from there. In both
    the home folder is ~: a record may be shown. `started` is UTC.
    """

    command: list[str]
    folder: str
    started: str
    versions: dict[str, str]
    hardware: Hardware
    git: GitState | None
    recipe_sha256: str
    model: ModelRecord
    data: DataRecord


def build_manifest(
    recipe: Mapping[str, Any], weights: str, model_revision: str | None, data: DataRecord
) -> RunManifest:
    """The record of a run that starts now.

    Args:
        recipe: the resolved recipe.
        weights: what its model's name stands for: a local folder, which is hashed, or a hub id.
        model_revision: the commit of a hub model.
    """
    model: ModelRecord = {
        "name": recipe["model_name_or_path"],
        "sha256": weights_hash(weights),
        "revision": model_revision,
    }
    base = adapter_base(Path(weights))
    if base is not None:
        model["base"] = base
    return {
        "command": [_without_home(word) for word in sys.argv],
        "folder": _without_home(os.getcwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "git": _git_state(),
        "recipe_sha256": sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "model": model,
        "data": data,
    }


def _without_home(word: str) -> str:
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(^|=){re.escape(home)}(?=/|$)", r"\1~", word) if home else word


def versions() -> dict[str, str]:
    """The installed versions of Python and of the packages that shape a run."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> Hardware:
    """What this process runs on."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


def weights_hash(folder: str | Path) -> str | None:
    """SHA-256 over the weights of a local model folder, in the order of their names.

    Of an adapter, over those of its base before them. None for what is no local model.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = sha256()
    base = adapter_base(folder)
    if base is not None:
        digest.update((weights_hash(model_path(base)) or base).encode())
    for file in files:
        with file.open("rb") as weights:
            while block := weights.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _git_state() -> GitState | None:
    """Commit and cleanliness of the source tree; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
