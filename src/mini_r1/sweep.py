"""One recipe under several settings and seeds, and what came out of it as tables with intervals and learning curves.

    mini-r1 sweep recipes/sweeps/ablations.yaml             # runs what has not finished yet, then writes docs/results.md
    mini-r1 sweep recipes/sweeps/ablations.yaml --jobs 2    # two runs at a time, each on half of the cores

A sweep is a YAML file: a `recipe`, its `seeds`, an `output_dir` for the runs, and `tables`, each a list of settings (overrides of
the recipe's keys; `{}` is the recipe itself, run once for all tables). Every run is an ordinary one, in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from mini_r1 import InputError
from mini_r1.manifest import write_text
from mini_r1.recipe import load_recipe

Settings = Mapping[str, Any]
SMOOTHING = 5  # steps; a step's batch holds few puzzles, so its success jumps about


@dataclass(frozen=True)
class Sweep:
    """A sweep file: the recipe's path, seeds, the runs' folder, and tables: title -> settings."""

    recipe: Path
    seeds: tuple[int, ...]
    output_dir: Path
    tables: Mapping[str, Sequence[Settings]]

    def run_dir(self, settings: Settings, seed: int) -> Path:
        return self.output_dir / _label(settings).replace(" ", "") / f"seed-{seed}"

    def settings(self) -> list[Settings]:
        """All different settings, in the order of the tables."""
        different = {_label(settings): settings for table in self.tables.values() for settings in table}
        return list(different.values())


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file and check every setting against the recipe.

    Raises:
        InputError: in one line, what is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        sweep = Sweep(
            recipe=path.parent / content["recipe"],
            seeds=tuple(content["seeds"]),
            output_dir=Path(content["output_dir"]),
            tables={title: [settings or {} for settings in table] for title, table in content["tables"].items()},
        )
    except FileNotFoundError:
        raise InputError(f"{path}: no such sweep") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a sweep, which has recipe, seeds, output_dir and tables ({error!r})") from None
    for settings in sweep.settings():
        load_recipe(sweep.recipe, _overrides(settings))
    return sweep


def run_sweep(sweep: Sweep, jobs: int) -> None:
    """Run everything that has not finished yet, `jobs` runs at a time.

    Raises:
        InputError: a run failed; the others were still run, and the next call goes on from here.
    """
    todo = [
        (settings, seed)
        for seed in sweep.seeds
        for settings in sweep.settings()
        if not (sweep.run_dir(settings, seed) / "summary.json").exists()
    ]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))

    def run(job: tuple[Settings, int]) -> Path | None:
        settings, seed = job
        run_dir = sweep.run_dir(settings, seed)
        run_dir.mkdir(parents=True, exist_ok=True)
        log = run_dir.with_suffix(".log")
        overrides = [*_overrides(settings), "--seed", str(seed), "--output_dir", str(run_dir)]
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                [sys.executable, "-m", "mini_r1", "train", str(sweep.recipe), *overrides],
                env={**os.environ, "OMP_NUM_THREADS": threads},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        print(f"{'done' if done.returncode == 0 else 'FAILED'}  {run_dir}", flush=True)
        return None if done.returncode == 0 else log

    with ThreadPoolExecutor(jobs) as pool:
        failed = [log for log in pool.map(run, todo) if log]
    if failed:
        raise InputError(f"{len(failed)} of {len(todo)} runs failed; read {failed[0]}, and call again to go on")


def write_results(sweep: Sweep, file: Path) -> None:
    """Write the tables and, beside the file, one learning-curve figure per table. Everything comes from the run folders.

    Raises:
        InputError: a run has not finished.
    """
    parts = ["# Results\n", _preamble(sweep)]
    for title, table in sweep.tables.items():
        figure = file.parent / "figures" / f"{title.lower().replace(' ', '-')}.svg"
        _draw(sweep, title, table, figure)
        parts += [f"## {title}\n", _table(sweep, table), f"![Learning curves: {title}]({figure.relative_to(file.parent)})\n"]
    write_text(file, "\n".join(parts))


# ---- Tables -----------------------------------------------------------------------------------------------------------------


def _preamble(sweep: Sweep) -> str:
    summary = _record(sweep, sweep.settings()[0], sweep.seeds[0], "summary.json")
    manifest = _record(sweep, sweep.settings()[0], sweep.seeds[0], "manifest.json")
    versions = ", ".join(f"{name} {manifest['versions'][name]}" for name in ("torch", "transformers", "trl"))
    return (
        f"Written by `mini-r1 sweep` from the run folders under `{sweep.output_dir}/`; nothing here is typed by hand.\n\n"
        f"Success is held-out success: {summary['num_puzzles']} puzzles that neither the base nor the run has seen "
        f"({summary['split']}), {summary['num_samples']} sample(s) each, temperature {summary['temperature']}; rule: "
        f"{summary['rule']}; {summary['plus_minus_only_share']:.0%} of them need only + and -. Brackets hold 95 % intervals with "
        f"the puzzles as independent units; one entry per seed ({', '.join(map(str, sweep.seeds))}). Curves show training success "
        f"(the sampled training batches, not held-out), mean and range over the seeds, smoothed over {SMOOTHING} steps.\n\n"
        f"{manifest['hardware']['cpu_count']} CPU cores, {manifest['hardware']['torch_threads']} thread(s) per run; {versions}.\n"
    )


def _table(sweep: Sweep, table: Sequence[Settings]) -> str:
    rows = [
        "| setting | success before | success after, per seed | mean | tokens | tries | true arithmetic | gave up | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for settings in table:
        before = [_record(sweep, settings, seed, "eval/before.json") for seed in sweep.seeds]
        after = [_record(sweep, settings, seed, "eval/after.json") for seed in sweep.seeds]
        minutes = [_record(sweep, settings, seed, "summary.json")["train_seconds"] / 60 for seed in sweep.seeds]
        cells = [
            f"`{_label(settings)}`",
            f"{fmean(result['success'] for result in before):.1%}",
            "<br>".join("{:.1%} [{:.1%}, {:.1%}]".format(result["success"], *result["ci95"]) for result in after),
            f"**{fmean(result['success'] for result in after):.1%}**",
            _change(before, after, lambda result: result["mean_completion_tokens"], "{:.0f}"),
            _change(before, after, lambda result: result["behaviors"]["tries"], "{:.1f}"),
            _change(before, after, lambda result: result["behaviors"]["true_arithmetic"] or 0.0, "{:.1%}"),
            _change(before, after, lambda result: result["behaviors"]["gave_up"], "{:.0%}"),
            f"{fmean(minutes):.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _change(before: Sequence[Any], after: Sequence[Any], value: Any, text: str) -> str:
    return " → ".join(text.format(fmean(map(value, results))) for results in (before, after))


def _draw(sweep: Sweep, title: str, table: Sequence[Settings], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = title  # the same data, the same bytes
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for settings in table:
        curves = [_curve(sweep, settings, seed) for seed in sweep.seeds]
        steps = range(1, min(map(len, curves)) + 1)
        by_step = list(zip(*curves, strict=False))
        (line,) = axes.plot(steps, [fmean(values) for values in by_step], label=_label(settings))
        axes.fill_between(steps, list(map(min, by_step)), list(map(max, by_step)), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="optimizer step", ylabel="training success", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _curve(sweep: Sweep, settings: Settings, seed: int) -> list[float]:
    """Training success after each step, averaged over the last `SMOOTHING` steps."""
    history = _record(sweep, settings, seed, "trainer_state.json")["log_history"]
    values = [entry["rewards/equation_reward/mean"] for entry in history if "rewards/equation_reward/mean" in entry]
    return [fmean(values[max(0, end - SMOOTHING) : end]) for end in range(1, len(values) + 1)]


def _record(sweep: Sweep, settings: Settings, seed: int, name: str) -> dict[str, Any]:
    path = sweep.run_dir(settings, seed) / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: this run has not finished; call the sweep again to run it") from None


def _label(settings: Settings) -> str:
    texts = (f"{key}={'+'.join(value) if isinstance(value, list) else value}" for key, value in settings.items())
    return ", ".join(texts) or "recipe"


def _overrides(settings: Settings) -> list[str]:
    arguments = []
    for key, value in settings.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return arguments
