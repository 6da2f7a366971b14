"""One recipe under several settings and seeds, and what came out of it as tables with intervals and learning curves.

    mini-r1 sweep recipes/sweeps/ablations.yaml             # runs what has no record yet, then writes docs/results.md
    mini-r1 sweep recipes/sweeps/ablations.yaml --jobs 2    # two runs at a time, each on half of the cores

A sweep is a YAML file: a `recipe`, its `seeds`, the `records` folder, the `results` file, and `tables`, each a list of settings
(overrides of the recipe's keys; `{}` is the recipe itself, run once for all tables). Every run is an ordinary one, in a process of
its own, under `runs/`. A record is what the tables need of a finished run; records are small and kept in git, so that anybody can
check the tables, or make them again, without the runs.
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
from mini_r1.manifest import weights_hash, write_json, write_text
from mini_r1.model import model_path
from mini_r1.recipe import load_recipe

Settings = Mapping[str, Any]
Records = Mapping[str, list[dict[str, Any]]]  # a setting's label -> its records, seed by seed
LOOKS = {"eval_strategy", "eval_steps"}  # how often a run is looked at changes nothing in it
SMOOTHING = 3  # sampled batches; each holds few puzzles, so success jumps about


@dataclass(frozen=True)
class Sweep:
    """A sweep file: the recipe's path, seeds, where records and results go, and tables: title -> settings."""

    name: str
    recipe: Path
    seeds: tuple[int, ...]
    records: Path
    results: Path
    tables: Mapping[str, Sequence[Settings]]

    def run_dir(self, settings: Settings, seed: int) -> Path:
        return Path("runs") / self.name / _label(settings).replace(" ", "") / f"seed-{seed}"

    def record_file(self, settings: Settings, seed: int) -> Path:
        return self.records / _label(settings).replace(" ", "") / f"seed-{seed}.json"

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
            name=path.stem,
            recipe=path.parent / content["recipe"],
            seeds=tuple(content["seeds"]),
            records=Path(content["records"]),
            results=Path(content["results"]),
            tables={title: [settings or {} for settings in table] for title, table in content["tables"].items()},
        )
    except FileNotFoundError:
        raise InputError(f"{path}: no such sweep") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a sweep, which has recipe, seeds, records, results and tables ({error!r})") from None
    for settings in sweep.settings():
        load_recipe(sweep.recipe, _overrides(settings))
    return sweep


def run_sweep(sweep: Sweep, jobs: int) -> None:
    """Run everything that has no record yet, `jobs` runs at a time.

    Raises:
        InputError: a run failed; the others were still run, and the next call goes on from here.
    """
    todo = [
        (settings, seed) for settings in sweep.settings() for seed in sweep.seeds if not sweep.record_file(settings, seed).exists()
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
        if done.returncode == 0:
            record = sweep.record_file(settings, seed)
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, _record_of(run_dir))
        print(f"{'done' if done.returncode == 0 else 'FAILED'}  {run_dir}", flush=True)
        return None if done.returncode == 0 else log

    with ThreadPoolExecutor(jobs) as pool:
        failed = [log for log in pool.map(run, todo) if log]
    if failed:
        raise InputError(f"{len(failed)} of {len(todo)} runs failed; read {failed[0]}, and call again to go on")


def write_results(sweep: Sweep) -> None:
    """Write the tables and, beside them, one learning-curve figure per table. Everything comes from the records.

    Raises:
        InputError: a record is missing, or was made by another recipe than today's.
    """
    records = {_label(settings): _records(sweep, settings) for settings in ({}, *sweep.settings())}
    title = f"# Results of [{sweep.recipe.name}]({os.path.relpath(sweep.recipe, sweep.results.parent)})\n"
    parts = [title, _preamble(sweep, records)]
    for title, table in sweep.tables.items():
        figure = sweep.results.parent / "figures" / f"{sweep.name}-{title.lower().replace(' ', '-')}.svg"
        _draw(records, title, table, figure)
        image = f"![Learning curves: {title}]({figure.relative_to(sweep.results.parent).as_posix()})\n"
        parts += [f"## {title}\n", _table(records, table), image]
    parts += ["## Before and after, by difficulty\n", _by_difficulty(records[_label({})])]
    parts += ["## Three puzzles, before and after\n", _examples(records[_label({})][0])]
    write_text(sweep.results, "\n".join(parts))


# ---- Records ----------------------------------------------------------------------------------------------------------------


def _record_of(run_dir: Path) -> dict[str, Any]:
    """What the tables need of a finished run."""

    def read(name: str) -> Any:
        return json.loads((run_dir / name).read_text(encoding="utf-8"))

    manifest, history = read("manifest.json"), read("trainer_state.json")["log_history"]
    sampled = [entry for entry in history if "rewards/equation_reward/mean" in entry]
    return {
        "recipe": yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8")),
        "versions": manifest["versions"],
        "hardware": {key: manifest["hardware"][key] for key in ("cpu_count", "torch_threads", "gpus")},
        "weights": manifest["model"]["sha256"],
        "summary": read("summary.json"),
        "before": read("eval/before.json"),
        "after": read("eval/after.json"),
        "curve": {
            "step": [entry["step"] for entry in sampled],
            "success": [round(entry["rewards/equation_reward/mean"], 4) for entry in sampled],
            "tokens": [round(entry["completions/mean_length"], 2) for entry in sampled],
        },
    }


def _records(sweep: Sweep, settings: Settings) -> list[dict[str, Any]]:
    """The records of one setting, seed by seed."""
    records = []
    for seed in sweep.seeds:
        path = sweep.record_file(settings, seed)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path} is missing: this run has not finished; call the sweep again to run it") from None
        then = {**record["recipe"], "weights": record["weights"]}
        now = json.loads(json.dumps(load_recipe(sweep.recipe, [*_overrides(settings), "--seed", str(seed)]).as_dict()))
        now |= {"output_dir": then["output_dir"], "weights": weights_hash(model_path(now["model_name_or_path"]))}
        changed = sorted(key for key in (now.keys() | then.keys()) - LOOKS if now.get(key) != then.get(key))
        if changed:
            key = changed[0]
            raise InputError(
                f"{path}: made with {key}: {then.get(key)}, now it is {now.get(key)}; remove the record and its run to run it again"
            )
        records.append(record)
    return records


# ---- Tables -----------------------------------------------------------------------------------------------------------------


def _preamble(sweep: Sweep, records: Records) -> str:
    everything = [record for of_setting in records.values() for record in of_setting]
    summary = everything[0]["summary"]
    hardware = {_hardware(record) for record in everything}
    return (
        f"Written by `mini-r1 sweep` from the records in `{sweep.records.as_posix()}`; nothing here is typed by hand.\n\n"
        f"Success is held-out success: {summary['num_puzzles']} puzzles that neither the base nor the run has seen "
        f"({summary['split']}), {summary['num_samples']} sample(s) each, temperature {summary['temperature']}; rule: "
        f"{summary['rule']}; {summary['plus_minus_only_share']:.0%} of them need only + and -. Brackets hold 95 % intervals with "
        f"the puzzles as independent units; one entry per seed ({', '.join(map(str, sweep.seeds))}). Other columns are means over "
        f"the seeds, before → after. Curves show training success (the sampled training batches, not held-out), mean and range "
        f"over the seeds, smoothed over {SMOOTHING} batches.\n\n"
        f"{'; '.join(sorted(hardware))}.\n"
    )


def _hardware(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "trl"))
    gpus = ", ".join(record["hardware"]["gpus"]) or "no GPU"
    return f"{record['hardware']['cpu_count']} CPU cores, {gpus}, {versions}"


def _table(records: Records, table: Sequence[Settings]) -> str:
    columns = [
        "setting",
        "success before",
        "success after",
        "mean",
        "tokens",
        "tries",
        "verified",
        "true arithmetic",
        "gave up",
        "minutes (threads)",
    ]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for settings in table:
        runs = records[_label(settings)]
        times = [(record["summary"]["train_seconds"] / 60, record["hardware"]["torch_threads"]) for record in runs]
        cells = [
            f"`{_label(settings)}`",
            "<br>".join(_with_interval(record["before"]) for record in runs),
            "<br>".join(_with_interval(record["after"]) for record in runs),
            f"**{fmean(record['after']['success'] for record in runs):.1%}**",
            _change(runs, lambda result: result["mean_completion_tokens"], "{:.0f}"),
            _change(runs, lambda result: result["behaviors"]["tries"], "{:.1f}"),
            _change(runs, lambda result: result["behaviors"]["verified"], "{:.1%}"),
            _change(runs, lambda result: result["behaviors"]["true_arithmetic"] or 0.0, "{:.1%}"),
            _change(runs, lambda result: result["behaviors"]["gave_up"], "{:.0%}"),
            "<br>".join(f"{minutes:.1f} ({threads})" for minutes, threads in times),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _by_difficulty(records: Sequence[Mapping[str, Any]]) -> str:
    """pass@k and success by difficulty, seed by seed."""
    rows = ["| of the recipe itself | puzzles | before, per seed | after, per seed | ratio of means |", "|---|---|---|---|---|"]
    for k in records[0]["after"]["pass_at"]:
        cells = [[record[when]["pass_at"][k] for record in records] for when in ("before", "after")]
        shown = ["<br>".join(f"{value:.1%}" for value in values) for values in cells]
        rows.append(f"| pass@{k} | {records[0]['after']['num_puzzles']} | {' | '.join(shown)} | {_ratio(*cells)} |")
    for measure, groups in records[0]["after"]["by_difficulty"].items():
        for value, group in groups.items():
            cells = [[record[when]["by_difficulty"][measure][value] for record in records] for when in ("before", "after")]
            shown = ["<br>".join(map(_with_interval, results)) for results in cells]
            ratio = _ratio(*([result["success"] for result in results] for results in cells))
            rows.append(f"| {measure.replace('_', ' ')}: {value} | {group['num_puzzles']} | {' | '.join(shown)} | {ratio} |")
    return "\n".join(rows) + "\n"


def _examples(record: Mapping[str, Any]) -> str:
    """The same held-out puzzles thought through before and after, by one run."""
    parts = []
    for before, after in zip(record["before"]["examples"], record["after"]["examples"], strict=True):
        parts.append(f"**Make {before['target']} using each of {', '.join(map(str, before['nums']))} once**\n")
        for when, example in (("Before", before), ("After", after)):
            indented = "\n".join(f"    {line}" for line in example["completion"].strip().splitlines())
            parts.append(f"{when}, {'solved' if example['solved'] else 'failed'}:\n\n{indented}\n")
    return "\n".join(parts)


def _ratio(before: Sequence[float], after: Sequence[float]) -> str:
    return f"{fmean(after) / fmean(before):.1f}" if any(before) else "-"


def _with_interval(result: Mapping[str, Any]) -> str:
    return "{:.1%} [{:.1%}, {:.1%}]".format(result["success"], *result["ci95"])


def _change(records: Sequence[Mapping[str, Any]], value: Any, text: str) -> str:
    return " → ".join(text.format(fmean(value(record[when]) for record in records)) for when in ("before", "after"))


def _draw(records: Records, title: str, table: Sequence[Settings], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = title  # the same data, the same bytes
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for settings in table:
        runs = records[_label(settings)]
        by_step = list(zip(*(_smooth(record["curve"]["success"]) for record in runs), strict=False))
        steps = runs[0]["curve"]["step"][: len(by_step)]
        (line,) = axes.plot(steps, [fmean(values) for values in by_step], label=_label(settings))
        axes.fill_between(steps, list(map(min, by_step)), list(map(max, by_step)), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="optimizer step", ylabel="training success", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    return [fmean(values[max(0, end - SMOOTHING) : end]) for end in range(1, len(values) + 1)]


def _label(settings: Settings) -> str:
    texts = (f"{key}={'+'.join(value) if isinstance(value, list) else value}" for key, value in settings.items())
    return ", ".join(texts) or "recipe"


def _overrides(settings: Settings) -> list[str]:
    arguments = []
    for key, value in settings.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return arguments
