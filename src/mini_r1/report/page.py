"""Runs -> one HTML page that explains itself; it shows what the runs recorded, and loads nothing.

    mini-r1 report runs/tiny-cpu                    # writes runs/tiny-cpu/report.html
    mini-r1 report runs/seed-1 runs/seed-2 --output both.html
    mini-r1 report runs/big --reference curve.csv   # columns: step, and charts such as success

What is shown is chosen here; the markup is in page.html.jinja, which makes visible and escapes all
that it is given, so that a completion cannot change the page.
"""

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mini_r1 import InputError
from mini_r1.completion import marked
from mini_r1.files import read_text, reason
from mini_r1.metrics import CHARTS, METRICS
from mini_r1.report.chart import TEMPLATES, Curve, line_chart, with_classes
from mini_r1.rollouts import Rollout
from mini_r1.run import RECIPE_FILE, Example, Run, load_run, write_text

# Columns of published curves that have another name: those of the tutorial's Chinese edition.
REFERENCE_NAMES = {
    "equation_reward": "success",
    "format_reward": "format",
    "completion_tokens": "tokens",
}
# The original recipe at 3B as zzlzero/mini-R1 ran it (run `main`, 448 completions per step):
# training rewards, means of what was logged within 10 steps. docs/records/original-3b-runs.csv
# holds all of it, read from the TensorBoard logs published there.
ORIGINAL_MODEL = "Qwen/Qwen2.5-3B"
ORIGINAL_NAME = "the original recipe at 3B, training rewards (zzlzero/mini-R1)"
ORIGINAL_MILESTONES = {
    "success": {50: 0.09, 100: 0.19, 200: 0.45, 300: 0.45, 450: 0.50, 600: 0.51, 1200: 0.57},
    "format": {50: 0.88, 100: 0.98, 450: 0.96, 1200: 0.98},
    "tokens": {50: 453, 100: 389, 200: 289, 300: 251, 450: 219, 600: 190, 1200: 205},
}
MAX_REFERENCE = 16 * 2**20  # bytes of published curves: some 100,000 steps
MAX_SAMPLES = 150  # per run and page; evenly spread over the steps

Shares = Mapping[str, Any]  # a `success`, and its `ci95` where it is known


def write_report(folders: Sequence[Path], output: Path, reference: Path | None = None) -> None:
    """Write the page.

    Raises:
        InputError: a folder is no run or has recorded nothing yet, or the reference is unreadable.
    """
    runs = [load_run(folder) for folder in folders]
    write_text(output, render(runs, _load_reference(reference) if reference else {}))


def render(runs: Sequence[Run], references: Mapping[str, Sequence[Curve]]) -> str:
    """The whole page; `references` are further curves by the name of their chart."""
    references = {name: [*_milestones(name, runs), *references.get(name, ())] for name in CHARTS}
    return TEMPLATES.get_template("page.html.jinja").render(
        title="Mini-R1: " + ", ".join(run.name for run in runs),
        runs=runs,
        legend=_legend(runs, references),
        charts=[(METRICS[name].title, _chart(name, runs, references[name])) for name in references],
        difficulty=_difficulty,
        timeline=_timeline,
        samples=_samples,
        marked=marked,
        command=_command,
        yaml=lambda content: yaml.safe_dump(dict(content), sort_keys=False),
        json=lambda content: json.dumps(content, indent=2),
    )


# ---- Curves ---------------------------------------------------------------------------------


def _load_reference(path: Path) -> dict[str, list[Curve]]:
    """Chart -> curves of a CSV with a column step, and a column run where it holds several runs."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, MAX_REFERENCE), newline="")))
        curves = _reference_curves(path.stem, rows) if rows and "step" in rows[0] else None
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}", where="--reference") from None
    if curves is None:
        raise InputError(f"{path} has no column step", where="--reference")
    if not curves:
        raise InputError(f"{path} has none of the columns {', '.join(CHARTS)}", where="--reference")
    return curves


def _reference_curves(source: str, rows: Sequence[Mapping[str, str]]) -> dict[str, list[Curve]]:
    by_run: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        by_run.setdefault(row.get("run", source), []).append(row)
    curves: dict[str, list[Curve]] = {}
    for run, its_rows in by_run.items():
        for column in rows[0]:
            name = REFERENCE_NAMES.get(column, column)
            if name in CHARTS:
                points = [(float(row["step"]), float(row[column])) for row in its_rows]
                curve = Curve(f"{source}: {run}", points, reference=True)
                curves.setdefault(name, []).append(curve)
    return curves


def _milestones(name: str, runs: Sequence[Run]) -> list[Curve]:
    """How far the original was, for a chart of runs of its model, as far as they go."""
    lengths = [
        run.recipe.get("max_steps", 0)
        for run in runs
        if run.recipe["model_name_or_path"].startswith(ORIGINAL_MODEL)
    ]
    milestones = ORIGINAL_MILESTONES.get(name, {}).items()
    marks = [(step, value) for step, value in milestones if step <= max(lengths, default=0)]
    return [Curve(ORIGINAL_NAME, marks=marks, reference=True)] if marks else []


def _legend(
    runs: Sequence[Run], references: Mapping[str, Sequence[Curve]]
) -> list[tuple[str, Curve]]:
    different = {curve.name: curve for curves in references.values() for curve in curves}
    return with_classes([*(Curve(run.name) for run in runs), *different.values()])


def _chart(name: str, runs: Sequence[Run], references: Sequence[Curve]) -> str:
    metric, curves = METRICS[name], []
    for run in runs:
        values = ((entry["step"], metric.logged(entry)) for entry in run.history)
        known = ((step, value) for step, value in values if value is not None)
        points = [(step, value) for step, value in known if math.isfinite(value)]
        held_out = []
        if name == "success":
            held_out = [(step, each["success"], *each["ci95"]) for step, _, each in run.evaluations]
        curves.append(Curve(run.name, points, held_out))
    return line_chart(metric.title, [*curves, *references])


# ---- What is beside them --------------------------------------------------------------------


def _difficulty(run: Run) -> list[tuple[str, int, Shares | None, Shares]]:
    """Rows: (name, number of puzzles, before, last)."""
    rows = []
    for k, share in run.last["pass_at"].items():
        before = {"success": run.first["pass_at"][k]} if k in run.first["pass_at"] else None
        rows.append((f"pass@{k}", run.last["num_puzzles"], before, {"success": share}))
    for measure, groups in run.last.get("by_difficulty", {}).items():
        for value, group in groups.items():
            before = run.first.get("by_difficulty", {}).get(measure, {}).get(value)
            name = f"{measure.replace('_', ' ')}: {value}"
            rows.append((name, group["num_puzzles"], before, group))
    return rows


def _timeline(run: Run) -> list[tuple[Example, list[tuple[int, Example]]]]:
    """The puzzles that every evaluation shows, each with (step, what was thought)."""
    shown = [(step, each["examples"]) for step, _, each in run.evaluations]
    return [
        (first, [(step, examples[index]) for step, examples in shown if index < len(examples)])
        for index, first in enumerate(run.first["examples"])
    ]


def _samples(samples: Sequence[Rollout]) -> list[tuple[Rollout, list[str]]]:
    """Some in order, with tags; the first that is solved and the longest are among them."""
    every = range(len(samples))
    chosen = set(every[:: max(1, -(-len(samples) // MAX_SAMPLES))])
    special = {"first": next((index for index in every if samples[index].solved), None)}
    special["longest"] = max(every, key=lambda index: len(samples[index].text), default=None)
    chosen.update(index for index in special.values() if index is not None)
    return [
        (
            samples[index],
            [samples[index].verdict, *(tag for tag in special if special[tag] == index)],
        )
        for index in sorted(chosen)
    ]


def _command(run: Run) -> str:
    """What makes the run again."""
    return f"mini-r1 train {shlex.quote(str(run.folder / RECIPE_FILE))} --output_dir NEW_FOLDER"
