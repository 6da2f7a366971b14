"""A name -> weights and tokenizer: an embedded base, a folder, a run, or a model of the hub; and which checkpoints are whole."""

from pathlib import Path
from typing import Any

from mini_r1 import InputError

EMBEDDED_BASES = ("tiny_base", "tiny_base_hard")  # folders of this package; mini_r1.cold_start makes them
# Written into a checkpoint once every rank has finished its part: without it the checkpoint was torn by a kill.
COMPLETE_MARKER = "complete"
STOP_FILE = "STOP"  # in a run folder: asks the run to save and stop; see callbacks.PauseOnRequest
PAUSED_MARKER = "PAUSED"  # in a run folder: it did; holds the step


def model_path(name: str) -> str:
    """The folder of an embedded base, or the name itself: a folder or a model id of the hub."""
    return str(Path(__file__).parent / name) if name in EMBEDDED_BASES else name


def is_local(name: str) -> bool:
    """Whether a name can only mean a file or folder: ids of the hub are `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model.

    Raises:
        InputError: it cannot be had; names an embedded base, which always can.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(name), revision=revision)
    except (OSError, ValueError) as error:
        raise model_error(name, error) from error


def load_model(name: str, revision: str | None = None) -> Any:
    """A causal language model for generation, LoRA adapters applied: in its own dtype, on the GPU if there is one.

    Raises:
        InputError: it cannot be had; names an embedded base, which always can.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path(name), revision=revision, dtype="auto")
    except (OSError, ValueError) as error:
        raise model_error(name, error) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def keep_4bit_trainable(model: Any) -> None:
    """Keep bitsandbytes 0.50 from packing 4-bit weights at their first evaluation on AVX512-BF16 CPUs: it cannot train those."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def model_error(name: str, error: Exception) -> InputError:
    """What to tell a user whose model cannot be loaded, in one line."""
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"model_name_or_path: '{name}' cannot be loaded ({reason}); without network write a local folder or {EMBEDDED_BASES[0]}"
    )


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first, torn ones included."""
    return sorted(run_dir.glob("checkpoint-*"), key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_complete_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next((path for path in checkpoints(run_dir) if (path / COMPLETE_MARKER).exists()), None)


def run_weights(run_dir: Path) -> Path:
    """Where a run's newest weights are: the run folder itself once it has finished, else its last complete checkpoint.

    Raises:
        InputError: the run has saved nothing yet.
    """
    if any((run_dir / name).exists() for name in ("config.json", "adapter_config.json")):
        return run_dir
    checkpoint = last_complete_checkpoint(run_dir)
    if checkpoint is None:
        raise InputError(f"{run_dir}: this run has no model and no complete checkpoint yet")
    return checkpoint
