"""One recipe under several settings and seeds: which runs there are, and what is kept of them.

    mini-r1 sweep recipes/sweeps/ablations.yaml             # runs what has no record yet, then
                                                            # writes docs/results.md
    mini-r1 sweep recipes/sweeps/ablations.yaml --jobs 2    # two runs at a time, each on half of
                                                            # the cores

A sweep is a YAML file: a `recipe`, its `seeds`, the `records` folder, the `results` file, and
`tables`, each a list of settings (overrides of the recipe's keys; `{}` is the recipe itself, run
once for all tables). Every run is an ordinary one, in a process of its own, under `runs/`. A record
is what the tables need of a finished run; records are small and kept in git, so that anybody can
check the tables, or make them again, without the runs. report/results.py makes them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from mini_r1 import SIGNALLED, InputError
from mini_r1.files import load_yaml, read_text, reason
from mini_r1.manifest import weights_hash
from mini_r1.metrics import METRICS, SWEEP_CURVE
from mini_r1.model import model_path
from mini_r1.recipe import load_recipe
from mini_r1.run import (
    AFTER,
    BEFORE,
    Evaluation,
    Summary,
    load_evaluation,
    load_run,
    load_summary,
    paused_step,
    weights_of,
    write_json,
)

Settings = Mapping[str, Any]
LOOKS = {"eval_strategy", "eval_steps"}  # how often a run is looked at changes nothing in it


class RecordedHardware(TypedDict):
    """What a run had."""

    cpu_count: int | None
    torch_threads: int
    gpus: list[str]


class Record(TypedDict):
    """What the tables need of a finished run.

    `weights` is the hash of the model that it started from. `curve` holds equally long lists:
    `step`, and those of metrics.SWEEP_CURVE at these steps.
    """

    recipe: Mapping[str, Any]
    versions: dict[str, str]
    hardware: RecordedHardware
    weights: str | None
    summary: Summary
    before: Evaluation
    after: Evaluation
    curve: dict[str, list[float]]


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Attributes:
        recipe: the recipe's path.
        records, results: where records and results go.
        tables: title -> settings.
    """

    name: str
    recipe: Path
    seeds: tuple[int, ...]
    records: Path
    results: Path
    tables: Mapping[str, Sequence[Settings]]

    def run_dir(self, settings: Settings, seed: int) -> Path:
        return Path("runs") / self.name / label(settings).replace(" ", "") / f"seed-{seed}"

    def record_file(self, settings: Settings, seed: int) -> Path:
        return self.records / label(settings).replace(" ", "") / f"seed-{seed}.json"

    def settings(self) -> list[Settings]:
        """All different settings, in the order of the tables."""
        every = (settings for table in self.tables.values() for settings in table)
        return list({label(settings): settings for settings in every}.values())


def label(settings: Settings) -> str:
    """What a setting is called in tables and figures."""
    texts = (
        f"{key}={'+'.join(value) if isinstance(value, list) else value}"
        for key, value in settings.items()
    )
    return ", ".join(texts) or "recipe"


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file and check every setting against the recipe.

    Raises:
        InputError: in one line, what is wrong.
    """
    try:
        content = load_yaml(read_text(path))
        sweep = Sweep(
            name=path.stem,
            recipe=path.parent / content["recipe"],
            seeds=tuple(content["seeds"]),
            records=Path(content["records"]),
            results=Path(content["results"]),
            tables={
                title: [settings or {} for settings in table]
                for title, table in content["tables"].items()
            },
        )
    except FileNotFoundError:
        raise InputError("no such sweep", where=path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {reason(error)}", where=path) from None
    except (AttributeError, KeyError, TypeError) as error:
        problem = "not a sweep, which has recipe, seeds, records, results and tables"
        raise InputError(f"{problem} ({error!r})", where=path) from None
    for settings in sweep.settings():
        load_recipe(sweep.recipe, _overrides(settings))
    return sweep


# ---- Running --------------------------------------------------------------------------------


def run_sweep(sweep: Sweep, jobs: int) -> None:
    """Run everything that has no record yet, `jobs` runs at a time.

    Ctrl-C ends the runs under way, those that are training after a save.

    Raises:
        InputError: a run failed; the others were still run, and the next call goes on from here.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    todo = [
        (settings, seed)
        for settings in sweep.settings()
        for seed in sweep.seeds
        if not sweep.record_file(settings, seed).exists()
    ]
    processes: set[subprocess.Popen] = set()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            logs = pool.map(lambda job: _run(sweep, *job, threads, processes), todo)
            failed = [log for log in logs if log]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            print("ending the runs under way; Ctrl-C again to stop them now", file=sys.stderr)
            for process in list(processes):
                process.terminate()  # asks for the same as Ctrl-C, which a terminal sends them, too
            raise
    if failed:
        raise InputError(
            f"{len(failed)} of {len(todo)} runs failed; read {failed[0]}, and call again to go on"
        )


def _run(
    sweep: Sweep, settings: Settings, seed: int, threads: int, processes: set[subprocess.Popen]
) -> Path | None:
    """Train and record; the log of a run that failed.

    Args:
        processes: holds the training's while it runs.
    """
    run_dir = sweep.run_dir(settings, seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_suffix(".log")
    overrides = [*_overrides(settings), "--seed", str(seed), "--output_dir", str(run_dir)]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mini_r1", "train", str(sweep.recipe), *overrides],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        processes.add(process)
        process.wait()
        processes.remove(process)
    code, paused = process.returncode, paused_step(run_dir) is not None
    if code == 0 and not paused:
        write_json(sweep.record_file(settings, seed), record_of(run_dir))
        print(f"done  {run_dir}", flush=True)
        return None
    stopped = paused or code > SIGNALLED or code == -signal.SIGTERM
    print(f"{'stopped' if stopped else 'FAILED'}  {run_dir}", flush=True)
    return log


def _overrides(settings: Settings) -> list[str]:
    arguments = []
    for key, value in settings.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


# ---- Records --------------------------------------------------------------------------------


def record_of(run_dir: Path) -> Record:
    """The record of a finished run."""
    run = load_run(run_dir)
    hardware = run.manifest["hardware"]
    points: list[tuple[Any, ...]] = [
        (entry["step"], *(METRICS[name].logged(entry) for name in SWEEP_CURVE))
        for entry in run.history
    ]
    sampled = [point for point in points if None not in point]
    return {
        "recipe": run.recipe,
        "versions": run.manifest["versions"],
        "hardware": {
            "cpu_count": hardware["cpu_count"],
            "torch_threads": hardware["torch_threads"],
            "gpus": hardware["gpus"],
        },
        "weights": run.manifest["model"]["sha256"],
        "summary": load_summary(run_dir),
        "before": load_evaluation(run_dir, BEFORE),
        "after": load_evaluation(run_dir, AFTER),
        "curve": {
            name: [round(point[index], 4) for point in sampled]
            for index, name in enumerate(("step", *SWEEP_CURVE))
        },
    }


def load_records(sweep: Sweep, settings: Settings) -> list[Record]:
    """The records of one setting, seed by seed.

    Raises:
        InputError: one is missing, or was made by another recipe than today's.
    """
    records = []
    for seed in sweep.seeds:
        path = sweep.record_file(settings, seed)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{path} is missing: this run has not finished; call the sweep again to run it"
            ) from None
        _check_recipe(path, record, [*_overrides(settings), "--seed", str(seed)], sweep.recipe)
        records.append(record)
    return records


def _check_recipe(path: Path, record: Record, overrides: Sequence[str], recipe: Path) -> None:
    then = {**record["recipe"], "weights": record["weights"]}
    now = json.loads(json.dumps(load_recipe(recipe, overrides).as_dict()))
    now["output_dir"] = then["output_dir"]
    now["weights"] = weights_hash(model_path(weights_of(now["model_name_or_path"])))
    for key in sorted((now.keys() | then.keys()) - LOOKS):
        if now.get(key) != then.get(key):
            raise InputError(
                f"made with {key}: {then.get(key)}, now it is {now.get(key)}; "
                "remove the record and its run to run it again",
                where=path,
            )
