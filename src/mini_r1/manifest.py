"""What produced this run: versions, hardware, git state, hashes of recipe, data and model. Also how every record is written."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("mini-r1", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "vllm", "bitsandbytes")


def build_manifest(recipe: Mapping[str, Any], model_path: str, model_revision: str | None, **facts: Any) -> dict[str, Any]:
    """The record that `manifest.json` of a run holds.

    Args:
        recipe: the resolved recipe.
        model_path: a local folder, whose weights are hashed, or a hub id.
        model_revision: the commit of a hub model.
        facts: whatever else belongs to the run, such as the hash and the sizes of its data.
    """
    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "git": _git_state(),
        "recipe_sha256": sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "model": {"name": recipe["model_name_or_path"], "sha256": weights_hash(model_path), "revision": model_revision},
        **facts,
    }


def versions() -> dict[str, str]:
    """The installed versions of Python and of the packages that shape a run."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
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


def weights_hash(model_path: str | Path) -> str | None:
    """SHA-256 over the safetensors files of a local model folder, in the order of their names; None for anything else."""
    files = sorted(Path(model_path).glob("*.safetensors"))
    if not files:
        return None
    digest = sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record whole or not at all: a killed process leaves the old file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the source tree that this package runs from, or None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
