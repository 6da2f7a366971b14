"""A run folder -> one HTML page that explains itself: works from disk, loads nothing, shows only what the run recorded.

    mini-r1 report runs/tiny-cpu                             # writes runs/tiny-cpu/report.html
    mini-r1 report runs/seed-1 runs/seed-2 --output both.html
    mini-r1 report runs/big --reference curve.csv            # columns: step, and names of charts such as success or tokens

Every text of a model is escaped, so a completion cannot change the page. Charts are inline SVG; each says in words what it shows.
"""

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from mini_r1 import InputError
from mini_r1.completion import marked
from mini_r1.model import checkpoints
from mini_r1.samples import ALL_FILE, Sample, read_samples

# Chart -> (title, key in the trainer's log). The short names are also the columns of a reference CSV.
CHARTS = {
    "success": ("Success: sampled completions that are right", "rewards/equation_reward/mean"),
    "format": ("Format reward", "rewards/format_reward/mean"),
    "tokens": ("Completion length, tokens", "completions/mean_length"),
    "truncated": ("Truncated completions, share", "completions/clipped_ratio"),
    "tries": ("Tries per completion", "behaviors/tries"),
    "gave_up": ("Gave up, share", "behaviors/gave_up"),
    "verified": ("Worked out before answering, share", "behaviors/verified"),
    "true_arithmetic": ("True arithmetic claims, share", "behaviors/true_arithmetic"),
    "kl": ("KL divergence from the base", "kl"),
    "entropy": ("Entropy per token, nats", "entropy"),
    "no_signal": ("Groups without signal, share", "frac_reward_zero_std"),
    "step_time": ("Seconds per step", "step_time"),
}
# Columns of published curves that have another name: those of the tutorial's Chinese edition.
REFERENCE_NAMES = {"equation_reward": "success", "format_reward": "format", "completion_tokens": "tokens"}
# The original recipe at 3B as zzlzero/mini-R1 ran it (run `main`, 448 completions per step): training rewards, means of what was
# logged within 10 steps. docs/records/original-3b-runs.csv holds all of it, read from the TensorBoard logs published there.
ORIGINAL_MODEL = "Qwen/Qwen2.5-3B"
ORIGINAL_NAME = "the original recipe at 3B, training rewards (zzlzero/mini-R1)"
ORIGINAL_MILESTONES = {
    "success": {50: 0.09, 100: 0.19, 200: 0.45, 300: 0.45, 450: 0.50, 600: 0.51, 1200: 0.57},
    "format": {50: 0.88, 100: 0.98, 450: 0.96, 1200: 0.98},
    "tokens": {50: 453, 100: 389, 200: 289, 300: 251, 450: 219, 600: 190, 1200: 205},
}
MAX_POINTS = 80  # of a line
MAX_SAMPLES = 150  # per run and page; evenly spread over the steps
WIDTH, HEIGHT, LEFT, BOTTOM = 340, 170, 50, 20  # of a chart, in its own units


@dataclass(frozen=True)
class Curve:
    """One line of a chart: (step, value) pairs; `held_out`: points with a 95 % interval (step, value, low, high); `marks`: bare."""

    name: str
    points: Sequence[tuple[float, float]]
    held_out: Sequence[tuple[float, float, float, float]] = ()
    marks: Sequence[tuple[float, float]] = ()
    reference: bool = False


@dataclass(frozen=True)
class Run:
    """What a run folder records."""

    folder: Path
    recipe: Mapping[str, Any]
    manifest: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    evaluations: Sequence[tuple[int, str, Mapping[str, Any]]]  # (step, name, content), in order
    samples: Sequence[Sample]

    @property
    def name(self) -> str:
        return self.folder.name


def write_report(folders: Sequence[Path], output: Path, reference: Path | None = None) -> None:
    """Write the page.

    Raises:
        InputError: a folder is no run or has recorded nothing yet, or the reference cannot be read.
    """
    from mini_r1.manifest import write_text

    runs = [load_run(folder) for folder in folders]
    write_text(output, render(runs, _load_reference(reference) if reference else {}))


def load_run(folder: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        InputError: it is no run, or has recorded nothing yet.
    """
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{folder}: no run; want a folder such as runs/tiny-cpu") from None
    states = [folder / "trainer_state.json", *(path / "trainer_state.json" for path in checkpoints(folder))]
    state = next((path for path in states if path.exists()), None)
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state else []
    evaluations = []
    for path in (folder / "eval").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        evaluations.append((content.get("step", 0), path.stem, content))
    if not evaluations:
        raise InputError(f"{folder}: nothing recorded yet; the first evaluation is still under way")
    evaluations.sort(key=lambda entry: (entry[0], entry[1] == "after"))
    return Run(folder, recipe, manifest, history, evaluations, read_samples(folder / "samples" / ALL_FILE))


def _load_reference(path: Path) -> dict[str, list[Curve]]:
    """Chart -> curves of a CSV with a column step, and a column run where it holds several runs."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or "step" not in rows[0]:
            raise InputError(f"--reference: {path} has no column step")
        curves: dict[str, list[Curve]] = {}
        for name in dict.fromkeys(row.get("run", path.stem) for row in rows):
            for column in rows[0].keys() - {"run", "step"}:
                chart = REFERENCE_NAMES.get(column, column)
                points = [(float(row["step"]), float(row[column])) for row in rows if row.get("run", path.stem) == name]
                if chart in CHARTS:
                    curves.setdefault(chart, []).append(Curve(f"{path.stem}: {name}", points, reference=True))
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--reference: {path} cannot be read: {' '.join(str(error).split())}") from None
    if not curves:
        raise InputError(f"--reference: {path} has none of the columns {', '.join(CHARTS)}")
    return curves


# ---- The page ---------------------------------------------------------------------------------------------------------------


def render(runs: Sequence[Run], references: Mapping[str, Sequence[Curve]]) -> str:
    """The whole page."""
    title = "Mini-R1: " + ", ".join(run.name for run in runs)
    references = {key: [*_milestones(key, runs), *references.get(key, ())] for key in CHARTS}
    charts = "".join(_chart(key, runs, references[key]) for key in CHARTS)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<section class="columns" aria-label="Held-out success">{"".join(map(_headline, runs))}</section>',
        f'<section><h2>Learning curves</h2>{_legend(runs, references)}<div class="charts">{charts}</div></section>',
        *(_section(run, len(runs) > 1) for run in runs),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing may be loaded, and no script but ours may run.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">\n"
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(body)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _headline(run: Run) -> str:
    before, last = run.evaluations[0][2], run.evaluations[-1][2]
    finished = run.evaluations[-1][1] == "after"
    cells = f'<span class="from">{before["success"]:.1%}</span>'
    if len(run.evaluations) > 1:
        cells += f' <span aria-hidden="true">→</span><span class="sr"> to </span> <span class="to">{last["success"]:.1%}</span>'
    intervals = " → ".join("{:.1%} to {:.1%}".format(*each["ci95"]) for each in (before, last)[: len(run.evaluations)])
    return (
        f'<article><h2>{escape(run.name)}</h2><p class="big">{cells}</p>'
        f"<p>Held-out success{'' if finished else ' (still training)'}; 95 % intervals {intervals}. "
        f"{last['num_puzzles']} puzzles × {last['num_samples']}, temperature {last['temperature']}; {escape(last['split'])}; rule: "
        f"{escape(last['rule'])}; {last['plus_minus_only_share']:.0%} of them need only + and −. Mean completion: "
        f"{before['mean_completion_tokens']:.0f} → {last['mean_completion_tokens']:.0f} tokens.</p></article>"
    )


def _section(run: Run, named: bool) -> str:
    suffix = f" of {escape(run.name)}" if named else ""
    reproduce = f"mini-r1 train {shlex.quote(str(run.folder / 'recipe.yaml'))} --output_dir NEW_FOLDER"
    return (
        f"<section><h2>By difficulty{suffix}</h2>{_difficulty(run)}</section>"
        f"<section><h2>The same puzzles, thought through{suffix}</h2>{_timeline(run)}</section>"
        f"<section><h2>Samples{suffix}</h2>{_samples(run)}</section>"
        f"<section><h2>How to make it again{suffix}</h2><pre>{escape(reproduce)}</pre>"
        f"<details><summary>Recipe</summary><pre>{escape(yaml.safe_dump(dict(run.recipe), sort_keys=False))}</pre></details>"
        f"<details><summary>Manifest: versions, hardware, hashes</summary><pre>{escape(json.dumps(run.manifest, indent=2))}</pre>"
        "</details></section>"
    )


def _legend(runs: Sequence[Run], references: Mapping[str, Sequence[Curve]]) -> str:
    names = [(run.name, f"c{index}") for index, run in enumerate(runs)]
    names += [(name, "ref") for name in dict.fromkeys(curve.name for curves in references.values() for curve in curves)]
    items = "".join(f'<li><span class="key {kind}" aria-hidden="true"></span>{escape(name)}</li>' for name, kind in names)
    note = "Lines: the sampled training batches. Dots: held-out, with 95 % intervals."
    return f'<ul class="legend">{items}</ul><p class="note">{note}</p>'


def _chart(key: str, runs: Sequence[Run], references: Sequence[Curve]) -> str:
    title, log_key = CHARTS[key]
    curves = []
    for run in runs:
        points = [(entry["step"], entry[log_key]) for entry in run.history if log_key in entry]
        held_out = []
        if key == "success":
            held_out = [(step, each["success"], *each["ci95"]) for step, _, each in run.evaluations]
        curves.append(Curve(run.name, points, held_out))
    curves += references
    points = [point for curve in curves for point in (*curve.points, *curve.held_out, *curve.marks)]
    if not points:
        return ""
    steps, values = [point[0] for point in points], [value for point in points for value in point[1:]]
    low, high = min(0.0, *values), max(values)
    high = 1.0 if 0.5 < high <= 1.0 and low == 0 else high or 1.0
    last = max(steps) or 1

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - 8)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - 10)

    parts = [
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y(value) + 3:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (low, (low + high) / 2, high)
    ]
    parts.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 5}" text-anchor="end">step {last:.0f}</text>')
    words = []
    for index, curve in enumerate(curves):
        kind = "ref" if curve.reference else f"c{index}"
        if curve.points:
            line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in _binned(curve.points))
            parts.append(f'<polyline class="{kind}" points="{line}"/>')
            (_, first), (_, end) = curve.points[0], curve.points[-1]
            all_values = [value for _, value in curve.points]
            words.append(f"{curve.name}: from {first:.3g} to {end:.3g}, between {min(all_values):.3g} and {max(all_values):.3g}")
        for step, value, low_end, high_end in curve.held_out:
            parts.append(
                f'<line class="{kind}" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{y(low_end):.1f}" y2="{y(high_end):.1f}"/>'
            )
            parts.append(f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"/>')
            words.append(f"{curve.name} held-out at step {step}: {value:.3g}")
        parts += [f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>' for step, value in curve.marks]
        words += [f"{curve.name} at step {step}: {value:.3g}" for step, value in curve.marks]
    text = escape(f"{title}. {'; '.join(words)}.")
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _milestones(key: str, runs: Sequence[Run]) -> list[Curve]:
    """How far the original was, for a chart of runs of its model, as far as they go."""
    lengths = [run.recipe.get("max_steps", 0) for run in runs if run.recipe["model_name_or_path"].startswith(ORIGINAL_MODEL)]
    marks = [(step, value) for step, value in ORIGINAL_MILESTONES.get(key, {}).items() if step <= max(lengths, default=0)]
    return [Curve(ORIGINAL_NAME, (), marks=marks, reference=True)] if marks else []


def _binned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, so that a line has at most MAX_POINTS points and steps that share a batch do not make it a comb."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]


def _difficulty(run: Run) -> str:
    before, last = run.evaluations[0][2], run.evaluations[-1][2]
    rows = [(f"pass@{k}", last["num_puzzles"], before["pass_at"].get(k), value, None, None) for k, value in last["pass_at"].items()]
    for measure, groups in last["by_difficulty"].items():
        for value, group in groups.items():
            earlier = before["by_difficulty"].get(measure, {}).get(value)
            name = f"{measure.replace('_', ' ')}: {value}"
            rows.append(
                (
                    name,
                    group["num_puzzles"],
                    earlier and earlier["success"],
                    group["success"],
                    earlier and earlier["ci95"],
                    group["ci95"],
                )
            )

    def cell(value: float | None, interval: Sequence[float] | None) -> str:
        if value is None:
            return "<td>–</td>"
        shown = " <small>{:.1%} to {:.1%}</small>".format(*interval) if interval else ""
        return f"<td>{value:.1%}{shown}</td>"

    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{count}</td>{cell(old, old_interval)}{cell(new, interval)}</tr>'
        for name, count, old, new, old_interval, interval in rows
    )
    head = '<tr><th scope="col">held-out</th><th scope="col">puzzles</th><th scope="col">before</th><th scope="col">last</th></tr>'
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Success by difficulty">{table}</div>'


def _timeline(run: Run) -> str:
    parts = []
    for index, example in enumerate(run.evaluations[0][2]["examples"]):
        cards = []
        for step, _, content in run.evaluations:
            if index < len(content["examples"]):
                each = content["examples"][index]
                cards.append(_thought(f"step {step}", each["completion"], each["solved"]))
        puzzle = f"Make {example['target']} using each of {', '.join(map(str, example['nums']))} once"
        parts.append(f'<h3>{escape(puzzle)}</h3><div class="columns steps">{"".join(cards)}</div>')
    return "".join(parts)


def _thought(title: str, text: str, solved: bool) -> str:
    verdict = '<span class="verdict good">solved</span>' if solved else '<span class="verdict bad">failed</span>'
    return f"<article><h4>{escape(title)} {verdict}</h4><pre>{_marked(text.strip())}</pre></article>"


def _marked(text: str) -> str:
    """The text with its arithmetic claims marked, true or false by the judge."""
    wrapped = {
        None: "{}",
        True: '<mark class="true">{}</mark>',
        False: '<mark class="false">{}</mark><span class="sr"> (false)</span>',
    }
    return "".join(wrapped[true].format(escape(part)) for part, true in marked(text))


def _samples(run: Run) -> str:
    if not run.samples:
        return "<p>None were kept.</p>"
    stride = -(-len(run.samples) // MAX_SAMPLES)
    chosen = list(run.samples[::stride])
    first = next((sample for sample in run.samples if sample.solved), None)
    longest = max(run.samples, key=lambda sample: len(sample.text))
    chosen += [sample for sample in (first, longest) if sample is not None and not any(sample is each for each in chosen)]
    chosen.sort(key=lambda sample: sample.step)
    cards = []
    for sample in chosen:
        tags = [
            sample.verdict,
            *(["first"] if sample is first else []),
            *(["longest"] if sample is longest else []),
        ]
        title = f"step {sample.step}: {sample.puzzle}"
        cards.append(f'<div class="sample" data-tags="{" ".join(tags)}">{_thought(title, sample.text, sample.solved)}</div>')
    filters = {"all": "all", "solved": "solved", "failed": "failed", "longest": "the longest", "first": "the first solved"}
    buttons = "".join(
        f'<button type="button" data-show="{key}" aria-pressed="{"true" if key == "all" else "false"}">{label}</button>'
        for key, label in filters.items()
    )
    shown = f"{len(chosen)} of the {len(run.samples)} that were kept"
    bar = f'<p class="buttons">{buttons} <span class="note" role="status">{shown}</span></p>'
    return f'<div class="filter" tabindex="0" role="region" aria-label="Samples">{bar}{"".join(cards)}</div>'


STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --soft: #5b6570; --line: #d5dae0; --card: #f6f8fa; --good: #116329;
  --bad: #a40e26; --true: #d8f3dc; --false: #ffd6d6; --c0: #0b62c4; --c1: #b3500b; --c2: #6b3fa0; --c3: #0f766e; --ref: #8a929b; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1216; --text: #e4e8ec; --soft: #a3adb8; --line: #333b44; --card: #181d23;
  --good: #6fdc8c; --bad: #ff9a9a; --true: #123d23; --false: #571c1c;
  --c0: #6cb2ff; --c1: #ffab6b; --c2: #c7a3ff; --c3: #5eead4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
h4 { font-size: .9rem; margin: 0 0 .4rem; font-weight: 600; }
article h2 { margin-top: 0; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 1rem; }
.steps { grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; min-width: 0; }
.steps article { padding: .8rem .6rem; }
.big { font-size: clamp(1.8rem, 8vw, 2.4rem); font-weight: 700; margin: .2rem 0; }
.from { color: var(--soft); } .to { color: var(--good); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 10px; } .axis { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; } svg line:not(.axis) { stroke-width: 1.6; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.ref { stroke: var(--ref); stroke-dasharray: 4 3; } circle.ref { fill: none; stroke-width: 1.6; stroke-dasharray: none; }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); }
circle.c2 { fill: var(--c2); } circle.c3 { fill: var(--c3); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: 0; font-size: .9rem; }
.key { display: inline-block; width: 1.4em; height: 0; border-top: 3px solid; margin-right: .4em; vertical-align: middle; }
.key.c0 { border-color: var(--c0); } .key.c1 { border-color: var(--c1); } .key.c2 { border-color: var(--c2); }
.key.c3 { border-color: var(--c3); } .key.ref { border-color: var(--ref); border-top-style: dashed; }
.note { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
small { color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; margin: 0; }
.steps pre { font-size: .8rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
mark { color: inherit; border-radius: 3px; padding: 0 2px; } mark.true { background: var(--true); }
mark.false { background: var(--false); text-decoration: underline wavy; }
.verdict { font-size: .8rem; border: 1px solid; border-radius: 99px; padding: 0 .5em; }
.good { color: var(--good); } .bad { color: var(--bad); }
.sample { margin-bottom: .6rem; } .filter { max-height: 42rem; overflow-y: auto; position: relative; }
.buttons { position: sticky; top: 0; background: var(--back); margin: 0; padding: .5rem 0; display: flex; flex-wrap: wrap;
  gap: .4rem; }
button { font: inherit; font-size: .9rem; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 99px; padding: .2rem .8rem; cursor: pointer; }
button[aria-pressed=true] { border-color: var(--c0); box-shadow: inset 0 0 0 1px var(--c0); }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
"""
SCRIPT = """
for (const filter of document.querySelectorAll('.filter')) {
  const samples = [...filter.querySelectorAll('.sample')], buttons = [...filter.querySelectorAll('button')];
  for (const button of buttons) button.addEventListener('click', () => {
    const wanted = button.dataset.show;
    for (const other of buttons) other.setAttribute('aria-pressed', String(other === button));
    for (const sample of samples) sample.hidden = wanted !== 'all' && !sample.dataset.tags.split(' ').includes(wanted);
    filter.querySelector('[role=status]').textContent = samples.filter((sample) => !sample.hidden).length + ' shown';
  });
}
"""
