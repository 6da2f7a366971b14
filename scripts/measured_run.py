"""A training like run_r1_grpo.py's that notes where its seconds and its GPU's memory go.

    python scripts/measured_run.py --config RECIPE --figures FILE [--random-weights SHAPE]
      [--memory-cap GIB] [--key value ...]

gpu_check.py starts it; one process, one GPU. The boundaries of the parts are those of TRL's own
profiler, which reports to trackers only, and of a few methods. At each the GPU is waited for.
"""

import argparse
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mini_r1 import quirks
from mini_r1.cli import exit_code, train_here
from mini_r1.launch.memory import QWEN, Shape
from mini_r1.model import model_path
from mini_r1.recipe import Recipe, load_recipe
from mini_r1.run import new_folder, write_json

SHAPES = {**QWEN, "tiny": Shape(1024, 64, 2, 2, 1, 128, True)}
SAMPLES = 10  # of the memory, per second
# What is called -> the part of a step that it is, and the phase of the memory's plan.
PARTS = {
    "sync_weights": ("wake and sync", "generation"),
    "wake_up": ("wake and sync", "generation"),
    "vLLM.generate": ("generate", "generation"),
    "transformers.generate": ("generate", "generation"),
    "sleep": ("sleep", None),
    "_calculate_rewards": ("rewards", None),
    "_get_per_token_logps_and_entropies": ("log-probs", "training"),
    "training_step": ("forward and backward", "training"),
    "compute_loss": ("forward and backward", "training"),
    "step": ("optimizer", "training"),
    "_prepare_inputs": ("rest", None),
    "_evaluate": ("evaluation", "evaluation"),
}
UNDIVIDED = ("compute_loss", "_evaluate")  # what they call belongs to them


def used_memory() -> float | None:
    """GiB of the GPU that are taken, whoever took them; None without one.

    torch's own peaks count what vLLM has asleep as if it were awake.
    """
    if not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


class Clock:
    """Seconds by part, step by step, and the peak of the memory by phase.

    Args:
        file: has them after every step and evaluation, so that a killed run leaves its figures.
    """

    def __init__(self, file: Path, memory: Callable[[], float | None] = used_memory):
        self._file, self._memory = file, memory
        self._calls: list[str] = []  # under way, the innermost last
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = 0.0
        self._began: float | None = None  # when the step under way did
        self._phase: str | None = None
        self._steps: list[dict[str, float]] = []
        self._evaluations: list[float] = []
        self._peaks: dict[str, float] = {}

    @contextmanager
    def during(self, name: str) -> Generator[None]:
        """Charge what happens inside to the part that a call of this name is, if it is one."""
        if name not in PARTS:
            yield
            return
        self._charge()
        if name == "training_step" and self._began is None:
            self._began = self._since
            self._seconds.clear()
        self._calls.append(name)
        phase = self._now()[1] or self._phase
        if phase != self._phase and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what a phase has cached is not the next one's
        self._phase = phase
        try:
            yield
        finally:
            self.sample()
            self._charge()
            self._calls.pop()
            self._note(name)

    def sample(self) -> None:
        """Note the memory for the phase that is going on.

        Outside of all CUDA is left alone: vLLM captures graphs there, which other calls can spoil.
        """
        phase = self._now()[1]
        used = self._memory() if phase else None
        if phase and used is not None:
            self._peaks[phase] = max(used, self._peaks.get(phase, 0.0))

    def sample_forever(self) -> None:
        while True:
            time.sleep(1 / SAMPLES)
            self.sample()

    def _now(self) -> tuple[str | None, str | None]:
        calls = [*self._calls]  # the sampling thread looks at it, too
        name = next((name for name in calls if name in UNDIVIDED), calls[-1] if calls else "")
        return PARTS.get(name, (None, None))

    def _charge(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, (part, _) = time.perf_counter(), self._now()
        if part:
            self._seconds[part] += now - self._since
        self._since = now

    def _note(self, ended: str) -> None:
        if ended == "_evaluate":
            self._evaluations.append(self._seconds.pop("evaluation"))
        elif ended == "step" and self._began is not None:
            self._seconds["rest"] += self._since - self._began - sum(self._seconds.values())
            known = {
                part: self._seconds[part] for part, _ in PARTS.values() if part in self._seconds
            }
            self._steps.append(known)
            self._began = None
        else:
            return
        figures = {"steps": self._steps, "evaluations": self._evaluations, "memory": self._peaks}
        write_json(self._file, figures)


def watch(clock: Clock, recipe: Recipe) -> None:
    """Have the libraries and our own training tell the clock what they are at."""
    from accelerate.optimizer import AcceleratedOptimizer
    from trl import GRPOTrainer
    from trl.extras import profiling
    from trl.trainer import grpo_trainer

    from mini_r1 import train

    def around(owner: Any, method: str) -> None:
        inner = getattr(owner, method)

        @wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            with clock.during(method):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)

    for module in (profiling, grpo_trainer):
        setattr(module, "profiling_context", lambda trainer, name: clock.during(name))  # noqa: B010
    around(GRPOTrainer, "training_step")
    around(AcceleratedOptimizer, "step")
    around(train, "_evaluate")
    if recipe.get("use_vllm") and find_spec("vllm"):
        from vllm import LLM

        around(LLM, "wake_up")
        around(LLM, "sleep")
    threading.Thread(target=clock.sample_forever, daemon=True).start()


def make_random_weights(folder: Path, shape: Shape, device: str) -> None:
    """A model of random weights, with the tokenizer of an embedded base.

    Its ids are the first of the vocabulary. What such a model writes is noise and runs to the full
    length: the worst case.
    """
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny_base_hard"))
    config = Qwen2Config(
        **{key: value for key, value in vars(shape).items() if value is not None},
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    with new_folder(folder) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a YAML recipe")
    parser.add_argument("--figures", required=True, type=Path, help="the JSON to write")
    parser.add_argument("--random-weights", choices=SHAPES, help="made where the model is to be")
    parser.add_argument("--memory-cap", type=float, help="GiB that torch may take of the GPU")
    args, overrides = parser.parse_known_args()
    recipe = load_recipe(args.config, overrides)
    on_cpu = bool(recipe.get("use_cpu"))
    if on_cpu:
        quirks.quiet_cpu_imports()
    model = Path(recipe.model["model_name_or_path"])
    if args.random_weights and not model.exists():
        make_random_weights(model, SHAPES[args.random_weights], "cpu" if on_cpu else "cuda")
        torch.cuda.empty_cache()
    if args.memory_cap and not on_cpu:
        total = torch.cuda.mem_get_info()[1] / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_cap / total))
    watch(Clock(args.figures), recipe)
    train_here(recipe)


if __name__ == "__main__":
    sys.exit(exit_code(main))
