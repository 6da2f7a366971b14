"""The records of a sweep -> Markdown tables with intervals, and a figure of curves per table."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from mini_r1 import one_line, visible
from mini_r1.metrics import METRICS, SWEEP_COLUMNS, Metric
from mini_r1.report.chart import Curve, figure
from mini_r1.run import Evaluation, Group, write_text
from mini_r1.sweep import Record, Sweep, label, load_records

SMOOTHING = 3  # sampled batches; each holds few puzzles, so success jumps about

Records = Mapping[str, Sequence[Record]]  # a setting's label -> its records, seed by seed


def write_results(sweep: Sweep) -> None:
    """Write the tables and, beside them, the figures. Everything comes from the records.

    Raises:
        InputError: a record is missing, or was made by another recipe than today's.
    """
    records = {label(each): load_records(sweep, each) for each in ({}, *sweep.settings())}
    of_recipe, folder = records[label({})], sweep.results.parent
    link = os.path.relpath(sweep.recipe, folder)
    parts = [f"# Results of [{sweep.recipe.name}]({link})\n", _preamble(sweep, records)]
    for title, table in sweep.tables.items():
        file = f"figures/{sweep.name}-{title.lower().replace(' ', '-')}.svg"
        of_table = {label(settings): records[label(settings)] for settings in table}
        write_text(folder / file, _figure(title, of_table))
        parts += [f"## {title}\n", _table(of_table), f"![Learning curves: {title}]({file})\n"]
    parts += ["## Before and after, by difficulty\n", _by_difficulty(of_recipe)]
    parts += ["## Three puzzles, before and after\n", _examples(of_recipe[0])]
    write_text(sweep.results, "\n".join(parts))


def _preamble(sweep: Sweep, records: Records) -> str:
    everything = [record for of_setting in records.values() for record in of_setting]
    summary = everything[0]["summary"]
    easy = summary.get("plus_minus_only_share")
    return (
        f"Written by `mini-r1 sweep` from the records in `{sweep.records.as_posix()}`; nothing "
        "here is typed by hand.\n\n"
        f"Success is held-out success: {summary['num_puzzles']} puzzles that neither the base nor "
        f"the run has seen ({summary['split']}), {summary['num_samples']} sample(s) each, "
        f"temperature {summary['temperature']}; rule: {summary['rule']}"
        f"{'' if easy is None else f'; {easy:.0%} of them need only + and -'}. Brackets hold 95 % "
        "intervals with the puzzles as independent units; one entry per seed "
        f"({', '.join(map(str, sweep.seeds))}). Other columns are means over the seeds, before → "
        "after. Curves show training success (the sampled training batches, not held-out), mean "
        f"and range over the seeds, smoothed over {SMOOTHING} batches.\n\n"
        f"{'; '.join(sorted({_hardware(record) for record in everything}))}.\n"
    )


def _hardware(record: Record) -> str:
    hardware, versions = record["hardware"], record["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl"))
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    return f"{hardware['cpu_count']} CPU cores, {gpus}, {libraries}"


# ---- Tables ---------------------------------------------------------------------------------


def _table(records: Records) -> str:
    columns = ["setting", "success before", "success after", "mean"]
    columns += [name.replace("_", " ") for name in SWEEP_COLUMNS]
    rows = []
    for name, runs in records.items():
        cells = [f"`{name}`"]
        cells += [_lines(_success(run[when]) for run in runs) for when in ("before", "after")]
        cells.append(f"**{fmean(run['after']['success'] for run in runs):.1%}**")
        cells += [_change(METRICS[column], runs) for column in SWEEP_COLUMNS]
        cells.append(_lines(map(_minutes, runs)))
        rows.append(cells)
    return _markdown([*columns, "minutes (threads)"], rows)


def _by_difficulty(records: Sequence[Record]) -> str:
    """pass@k and success by difficulty, seed by seed."""
    rows, last = [], records[0]["after"]
    for k in last["pass_at"]:
        both = [[run[when]["pass_at"][k] for run in records] for when in ("before", "after")]
        shown = [_lines(f"{share:.1%}" for share in shares) for shares in both]
        rows.append([f"pass@{k}", str(last["num_puzzles"]), *shown, _ratio(*both)])
    for measure, groups in last.get("by_difficulty", {}).items():
        for value, group in groups.items():
            both = [
                [run[when].get("by_difficulty", {})[measure][value] for run in records]
                for when in ("before", "after")
            ]
            ratio = _ratio(*([each["success"] for each in results] for results in both))
            name = f"{measure.replace('_', ' ')}: {value}"
            shown = [_lines(map(_success, results)) for results in both]
            rows.append([name, str(group["num_puzzles"]), *shown, ratio])
    columns = ["puzzles", "before, per seed", "after, per seed", "ratio of means"]
    return _markdown(["of the recipe itself", *columns], rows)


def _examples(record: Record) -> str:
    """The same held-out puzzles thought through before and after, by one run."""
    parts = []
    pairs = zip(record["before"]["examples"], record["after"]["examples"], strict=True)
    for before, after in pairs:
        asked = one_line(json.dumps(before.get("row"), ensure_ascii=False), 200)
        if "nums" in before:
            nums = ", ".join(map(str, before["nums"]))
            asked = f"Make {before['target']} using each of {nums} once"
        parts.append(f"**{asked}**\n")
        for when, each in (("Before", before), ("After", after)):
            lines = visible(each["completion"].strip()).splitlines()
            code = "\n".join(f"    {line}" for line in lines)
            parts.append(f"{when}, {'solved' if each['solved'] else 'failed'}:\n\n{code}\n")
    return "\n".join(parts)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in cells] for cells in (columns, *rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join(lines) + "\n"


def _lines(texts: Iterable[str]) -> str:
    """A cell of several lines."""
    return "<br>".join(texts)


def _success(result: Evaluation | Group) -> str:
    return "{:.1%} [{:.1%}, {:.1%}]".format(result["success"], *result["ci95"])


def _minutes(record: Record) -> str:
    minutes = record["summary"]["train_seconds"] / 60
    return f"{minutes:.1f} ({record['hardware']['torch_threads']})"


def _change(metric: Metric, records: Sequence[Record]) -> str:
    """Means over the seeds; an evaluation without a single claim has no true ones."""
    before, after = (
        fmean(metric.of(record[when]) or 0.0 for record in records) for when in ("before", "after")
    )
    return f"{metric.shown.format(before)} → {metric.shown.format(after)}"


def _ratio(before: Sequence[float], after: Sequence[float]) -> str:
    return f"{fmean(after) / fmean(before):.1f}" if any(before) else "-"


# ---- Figures --------------------------------------------------------------------------------


def _figure(title: str, records: Records) -> str:
    curves = [_curve(name, runs) for name, runs in records.items()]
    return figure(title, curves, "optimizer step", "training success")


def _curve(name: str, runs: Sequence[Record]) -> Curve:
    """Mean and range over the seeds, as far as all of them go."""
    smooth = (_smooth(run["curve"]["success"]) for run in runs)
    by_step = list(zip(runs[0]["curve"]["step"], zip(*smooth, strict=False), strict=False))
    points = [(step, fmean(values)) for step, values in by_step]
    band = [(step, min(values), max(values)) for step, values in by_step]
    return Curve(name, points, band=band)


def _smooth(values: Sequence[float]) -> list[float]:
    return [fmean(values[max(0, end - SMOOTHING) : end]) for end in range(1, len(values) + 1)]
