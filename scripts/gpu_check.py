"""One command for a machine with GPUs and no internet: does GRPO run, learn, how fast, how large?

    make gpu-check          # or: python scripts/gpu_check.py --output gpu-check.json
    python scripts/gpu_check.py --write docs/benchmarks.md docs/records/gpu-check.json

Half an hour on one H100, what matters first. Every step is a training of its own with a time-out,
whose log is kept; the JSON is written after each, and Ctrl-C keeps what there is. Models of the hub
are random weights in their shape: nothing is downloaded. Without a GPU all that can runs on tiny
shapes, and the figures mean nothing.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from mini_r1 import FAILED, SIGNALLED, InputError, one_line
from mini_r1.catalog import markdown_table
from mini_r1.cli import exit_code
from mini_r1.launch.machine import Machine, this_machine, visible_gpus
from mini_r1.launch.memory import phases
from mini_r1.manifest import versions
from mini_r1.metrics import LOGP_DIFFERENCE, METRICS
from mini_r1.recipe import ROOT, load_recipe
from mini_r1.run import load_run, write_json, write_section

RECIPES, SCRIPTS = ROOT / "recipes", ROOT / "scripts"
MINUTES = 29.0  # for all steps together
SMALL_CARD = 24.0  # GiB
LEARNED = 0.85  # held-out success of tiny-cpu, whose seeds reach 0.91 to 0.92
# Between vLLM's log-probabilities and the trainer's; of tiny_base rounding to bf16 makes 0.0002.
ALARM = 0.01
BEGIN = "<!-- written by scripts/gpu_check.py -->"

# The first of four steps warms up and does not count; an evaluation is one batch, 256 completions.
SHORT = {
    "dataset_id_or_path": "generated",
    "num_puzzles": 2000,
    "num_numbers": [3, 4],
    "prompt_template": "compact",
    "max_prompt_length": 36,
    "max_steps": 4,
    "save_strategy": "no",
    "logging_steps": 1,
    "num_eval_puzzles": 64,
    "num_eval_samples": 4,
}
CPU = {"use_cpu": True, "bf16": False, "tf32": False, "use_vllm": False}
SHORT_ON_CPU = {
    **SHORT,
    **CPU,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 16,
    "num_eval_puzzles": 4,
}
TINY = {
    "use_cpu": False,
    "bf16": True,
    "save_strategy": "no",
    "use_vllm": True,
    "vllm_max_model_length": 152,
}
COLOCATED = {
    "vllm_mode": "colocate",
    "vllm_enable_sleep_mode": True,
    "vllm_gpu_memory_utilization": 0.3,
}


# ---- The steps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A training to be measured.

    Attributes:
        shape: of the random weights it starts from; None for the recipe's own model.
        memory: GiB of the GPU that it may take; None for all.
        gpus: that it needs.
        needs: a package.
        learns: it must, by tiny-cpu's measure, and vLLM must have the weights that are trained.
        open_ended: its time ends it, and what counts is how far it came.
    """

    name: str
    recipe: str
    minutes: float
    changes: Mapping[str, Any] = field(default_factory=dict)
    shape: str | None = None
    memory: float | None = None
    gpus: int = 0
    needs: str | None = None
    learns: bool = False
    open_ended: bool = False

    def obstacle(self, machine: Machine, seconds: float) -> str | None:
        """Why it cannot be done here, or in so many seconds."""
        if machine.gpus < self.gpus:
            return f"needs {self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        if self.needs and find_spec(self.needs) is None:
            return f"needs {self.needs}, which is not installed"
        return "no time is left" if seconds < 60 else None


def all_steps(machine: Machine, smollm2: Path | None) -> list[Step]:
    """In the order of what they tell; but the last takes all the time that is left."""
    vllm = bool(machine.gpus) and find_spec("vllm") is not None

    def short(name: str, recipe: str, minutes: float, memory: float | None = None, **more) -> Step:
        given = load_recipe(RECIPES / recipe)
        needs = "bitsandbytes" if given.get("load_in_4bit") else None
        if not machine.gpus:
            return Step(name, recipe, minutes, {**SHORT_ON_CPU, **more}, "tiny", needs=needs)
        if given.get("use_vllm") and not vllm:
            # What vLLM writes in seconds takes transformers minutes: a third of the batch.
            accumulated = max(1, given.get("gradient_accumulation_steps") // 3)
            more |= {"use_vllm": False, "gradient_accumulation_steps": accumulated}
        elif given.get("use_vllm") and memory and memory < machine.gpu_memory:
            share = given.get("vllm_gpu_memory_utilization") * memory / machine.gpu_memory
            more["vllm_gpu_memory_utilization"] = round(share, 3)
        return Step(name, recipe, minutes, {**SHORT, **more}, "3B", memory, needs=needs)

    def tiny(name: str, minutes: float, gpus: int, **more: Any) -> Step:
        return Step(
            name, "tiny-cpu.yaml", minutes, TINY | more, gpus=gpus, needs="vllm", learns=True
        )

    one_gpu, of = "grpo-qwen-2.5-3b-1gpu.yaml", f"of {SMALL_CARD:g} GiB"
    beta = 0.0 if load_recipe(RECIPES / one_gpu).get("beta") else 0.001
    steps = [
        short("3B", one_gpu, 8),
        short(f"3B, beta {beta:g}", one_gpu, 6, beta=beta),
        tiny("tiny, colocated", 5, 1, **COLOCATED),
        tiny("tiny, server", 4, 2, vllm_mode="server"),
        short(f"3B, QLoRA {of}", "grpo-qwen-2.5-3b-qlora.yaml", 5, SMALL_CARD),
        short(f"3B, LoRA {of}", "grpo-qwen-2.5-3b-lora.yaml", 4, SMALL_CARD),
    ]
    if smollm2:
        curve = {"model_name_or_path": smollm2, "save_strategy": "no"}
        curve |= {"eval_strategy": "steps", "eval_steps": 10}
        curve |= {} if machine.gpus else CPU
        curve |= {"use_vllm": True, "vllm_max_model_length": 672, **COLOCATED} if vllm else {}
        steps.append(Step("SmolLM2", "smollm2-135m.yaml", MINUTES, curve, open_ended=True))
    return steps


def check(output: Path, steps: Sequence[Step], machine: Machine) -> dict[str, Any]:
    """Do the steps one after the other; the file has what is known so far."""
    logs = output.with_name(f"{output.stem}-logs")
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=logs) from None
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": str(machine),
        "versions": versions(),
        "steps": [],
    }
    deadline = time.monotonic() + 60 * MINUTES
    with TemporaryDirectory(prefix="running-", dir=logs) as work:
        for step in steps:
            log = logs / f"{step.name.replace(',', '').replace(' ', '-')}.log"
            left = deadline - time.monotonic()
            entry = {"name": step.name, "recipe": step.recipe}
            if why := step.obstacle(machine, left):
                entry |= {"outcome": "skipped", "why": why}
            else:
                seconds = min(60 * step.minutes, left)
                print(f"{step.name}: {seconds:.0f} s at most; log: {log}", flush=True)
                entry |= run_step(step, log, Path(work), seconds, machine)
            result["steps"].append(entry)
            print(f"{step.name}: {entry['outcome']} {entry.get('why', '')}".rstrip(), flush=True)
            write_json(output, result)
            if entry["outcome"] == "interrupted":
                break
    return result


def run_step(step: Step, log: Path, work: Path, seconds: float, machine: Machine) -> dict[str, Any]:
    """What came of a step, and its figures, also if it did not come to its end."""
    # As a command. torch must not be imported before a server's GPU is hidden.
    run_dir, figures = work / "run", log.with_suffix(".json")
    figures.unlink(missing_ok=True)
    changes = {**step.changes, "output_dir": run_dir}
    script: list[Any] = ["run_r1_grpo.py"]
    if step.gpus < 2:
        script = ["measured_run.py", "--figures", figures]
    if step.shape:
        changes["model_name_or_path"] = work / step.shape
        script += ["--random-weights", step.shape]
    if step.memory:
        script += ["--memory-cap", step.memory]
    overrides = arguments(changes)
    command = [sys.executable, str(SCRIPTS / script[0]), *map(str, script[1:])]
    command += ["--config", str(RECIPES / step.recipe), *overrides]
    gpus = ",".join(visible_gpus()[: max(1, step.gpus)])
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": gpus}

    # What came of it.
    try:
        code = run_child(command, log, seconds, {**os.environ, **offline})
        outcome = {"outcome": "failed" if code else "ok"}
    except KeyboardInterrupt:
        code, outcome = 0, {"outcome": "interrupted"}
    found = {"log": f"{log.parent.name}/{log.name}", **measured(figures, run_dir)}
    if code is None and not (step.open_ended and "success" in found):
        outcome = {"outcome": "timed out", "why": f"after {seconds:.0f} s"}
    elif code:
        words = log.read_text(errors="replace").strip().rpartition("\n")[2]
        outcome["why"] = f"exit code {code}: {one_line(words, 160)}"
    elif step.learns and outcome["outcome"] == "ok":
        outcome |= unlearned(found)
    if machine.gpus and step.shape and (work / step.shape).exists():
        memory = phases(load_recipe(RECIPES / step.recipe, overrides), 1, machine.gpu_memory) or {}
        found["planned"] = {name: sum(parts.values()) for name, parts in memory.items()}
    with suppress(OSError):
        shutil.copy(run_dir / "logs" / "vllm.log", log.with_suffix(".vllm.log"))
    shutil.rmtree(run_dir, ignore_errors=True)  # a 3B model is 12 GB
    return outcome | found


def arguments(changes: Mapping[str, Any]) -> list[str]:
    """Keys of a recipe as the command line takes them."""
    given = []
    for key, value in changes.items():
        given += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return given


def run_child(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]
) -> int | None:
    """Its exit code; None if its time ran out. What it started has ended afterwards, too."""
    with log.open("wb") as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        child = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def measured(figures: Path, run_dir: Path) -> dict[str, Any]:
    """The figures that a run has left, whole or not."""
    found: dict[str, Any] = {}
    with suppress(OSError):
        noted = json.loads(figures.read_text())
        counted = noted["steps"][1:]
        parts = dict.fromkeys(part for step in counted for part in step)
        found["seconds"] = {part: fmean(step.get(part, 0) for step in counted) for part in parts}
        found |= {"evaluation_seconds": noted["evaluations"], "memory": noted["memory"]}
    with suppress(InputError):
        run = load_run(run_dir)
        found["hardware"] = run.manifest["hardware"]
        found["success"] = [[step, each["success"]] for step, _, each in run.evaluations]
        found["tokens"] = METRICS["tokens"].of(run.last)
        differences = [each[LOGP_DIFFERENCE] for each in run.history if LOGP_DIFFERENCE in each]
        found |= {"logp_difference": max(differences)} if differences else {}
    return found


def unlearned(found: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with a run that should have learned through vLLM."""
    success, apart = found["success"][-1][1], found.get("logp_difference", 1.0)
    wrong = {f"held-out success {success:.0%}, not {LEARNED:.0%}": success < LEARNED}
    wrong[f"log-probabilities {apart:.2g} apart, not less than {ALARM}"] = apart >= ALARM
    why = "; ".join(what for what, so in wrong.items() if so)
    return {"outcome": "failed", "why": why} if why else {}


# ---- The table ------------------------------------------------------------------------------


def table(steps: Sequence[Mapping[str, Any]]) -> str:
    """A column per step, as Markdown that can be read as it is; lines nobody fills are left out."""

    def number(value: float | None, shown: str = "{:.3g}") -> str:
        return shown.format(value) if value else ""

    def memory(step: Mapping[str, Any], phase: str) -> str:
        seen, planned = (step.get(of, {}).get(phase) for of in ("memory", "planned"))
        return f"{seen:.1f} ({number(planned, '{:.1f}') or 'not known'})" if seen else ""

    def success(step: Mapping[str, Any]) -> str:
        curve = step.get("success") or [[0, 0.0]]
        return f"{curve[0][1]:.0%} to {curve[-1][1]:.0%}" if curve[-1][1] else ""

    parts = dict.fromkeys(part for step in steps for part in step.get("seconds", {}))
    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "outcome": lambda step: step["outcome"],
        "seconds per step": lambda step: number(sum(step.get("seconds", {}).values())),
        **{f"- {p}": lambda step, p=p: number(step.get("seconds", {}).get(p)) for p in parts},
        "seconds per evaluation": lambda step: number(max(step.get("evaluation_seconds") or [0])),
        "tokens per completion": lambda step: number(step.get("tokens"), "{:.0f}"),
        "GiB to train (planned)": lambda step: memory(step, "training"),
        "GiB to generate (planned)": lambda step: memory(step, "generation"),
        "GiB to evaluate (planned)": lambda step: memory(step, "evaluation"),
        "held-out success": success,
        "log-prob difference": lambda step: number(step.get("logp_difference"), "{:.2g}"),
    }
    rows = [[name, *map(cell, steps)] for name, cell in cells.items()]
    rows = [["", *(step["name"] for step in steps)], *(row for row in rows if any(row[1:]))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rest = [[*map(str.ljust, row, widths)] for row in rows]
    whys = [
        f"- {step['name']}: {step['outcome']}: {step['why']}" for step in steps if "why" in step
    ]
    return "\n".join([markdown_table(head, rest), *([""] if whys else []), *whys])


def section(result: Mapping[str, Any] | None) -> str:
    """What docs/benchmarks.md says of GPUs."""
    if result is None:
        return "Nothing has been measured on a GPU yet."
    names = [step["hardware"]["gpus"] for step in result["steps"] if "hardware" in step]
    gpus = ", ".join(names[0]) if names else result["machine"]
    found = result["versions"]
    known = ", ".join(f"{name} {found[name]}" for name in ("torch", "trl", "vllm") if name in found)
    return f"Measured {result['date']} on {gpus}, with {known}.\n\n{table(result['steps'])}"


def write_figures(document: Path, record: Path | None) -> None:
    """Put the section into a document, between the two lines that say so.

    Raises:
        InputError: the document has no such lines, or the record is none of this script's.
    """
    try:
        text = section(json.loads(record.read_text(encoding="utf-8")) if record else None)
    except (ValueError, LookupError, TypeError):
        raise InputError("not written by scripts/gpu_check.py", where=record) from None
    write_section(document, BEGIN, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--output", default="gpu-check.json", type=Path, help="default: %(default)s")
    add("--smollm2", type=Path, help="SmolLM2's folder, made as recipes/smollm2-135m.yaml says")
    add("--write", nargs="+", type=Path, metavar=("DOC", "JSON"), help="write its section only")
    args = parser.parse_args()
    for path in args.write or ():
        if not path.is_file():
            raise InputError("no such file", where=path)
    if args.write:
        write_figures(args.write[0], next(iter(args.write[1:]), None))
        return
    if args.smollm2 and not (args.smollm2 / "config.json").exists():
        problem = "no model is there; make it as recipes/smollm2-135m.yaml says"
        raise InputError(problem, where=args.smollm2)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    machine = this_machine()
    result = check(args.output, all_steps(machine, args.smollm2), machine)
    if not machine.gpus:
        print("\nThere is no GPU: all shapes were tiny, and the figures mean nothing.")
    print(f"\n{table(result['steps'])}\n\neverything is in {args.output}")
    outcomes = {step["outcome"] for step in result["steps"]}
    if "interrupted" in outcomes:
        sys.exit(SIGNALLED + signal.SIGINT)
    sys.exit(FAILED if outcomes - {"ok", "skipped"} else 0)


if __name__ == "__main__":
    sys.exit(exit_code(main))
