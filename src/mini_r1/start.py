"""The weights that a run starts from: checked, and if they are an adapter, merged into its base.

Neither TRL nor vLLM trains on top of an adapter. So a plain model lies in the run folder until
every process has loaded it; its config.json stays until the run has ended, for PEFT asks the hub
for one that it does not find whenever it saves.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mini_r1.launch.machine import is_main_process
from mini_r1.model import (
    adapter_base,
    check_weights,
    find_adapter,
    is_local,
    load_merged,
    model_path,
)
from mini_r1.model_files import ADAPTER_CONFIG_FILE, CONFIG_FILE, read_json
from mini_r1.recipe import Recipe
from mini_r1.run import MERGED_FOLDER, weights_of, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import GRPOConfig, GRPOTrainer


class Start:
    """What a recipe's model stands for. Every process has one; the main process reads and writes.

    To be made before TRL's arguments are: from there on DeepSpeed shards what is loaded.

    Attributes:
        weights: a folder, a hub id or an embedded base.
        folder: what TRL loads instead: the same, or the merged adapter.

    Raises:
        InputError: they cannot be used.
    """

    def __init__(self, recipe: Recipe):
        name, self.revision = recipe.model["model_name_or_path"], recipe.get("model_revision")
        self.weights = weights_of(name)
        self.folder = model_path(self.weights)
        self._merged: PreTrainedModel | None = None
        is_main = is_main_process()
        adapter = find_adapter(self.weights, self.revision)
        self.is_adapter = adapter is not None
        if adapter is None:
            check_weights(self.weights, self.revision)
            told = f"training starts from {self.weights}" if self.weights != name else None
        else:
            self.folder = str(recipe.run_dir / MERGED_FOLDER)
            if is_main:
                self._merged = load_merged(self.weights, self.revision)
            told = f"training starts from {self.weights}, merged into {adapter_base(adapter)}"
        if told and is_main:
            print(told)

    def write(self, args: "GRPOConfig") -> None:
        """Put a merged adapter where every process finds it."""
        if not self.is_adapter:
            return
        if self._merged is not None:
            self._merged.save_pretrained(self.folder)
            self._merged = None
        assert args.distributed_state is not None
        args.distributed_state.wait_for_everyone()

    def loaded(self, trainer: "GRPOTrainer") -> None:
        """Every process has built its trainer: the merged weights can go."""
        if not self.is_adapter:
            return
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            for file in Path(self.folder).iterdir():
                if file.name != CONFIG_FILE:
                    file.unlink()

    def sign(self, folder: Path) -> None:
        """Let a saved adapter name what it was trained on, not where that lay on this machine."""
        file, card = folder / ADAPTER_CONFIG_FILE, folder / "README.md"
        if not file.is_file():
            return
        revision = None if is_local(self.weights) or Path(self.weights).is_dir() else self.revision
        base = {"base_model_name_or_path": self.weights, "revision": revision}
        write_json(file, read_json(file) | base)
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            write_text(card, text.replace(self.folder, self.weights))

    def ended(self) -> None:
        """The run is over, nothing is saved any more."""
        if self.is_adapter:
            shutil.rmtree(self.folder, ignore_errors=True)
