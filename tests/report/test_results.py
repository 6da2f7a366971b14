import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from mini_r1 import InputError
from mini_r1.manifest import weights_hash
from mini_r1.model import model_path
from mini_r1.recipe import load_recipe
from mini_r1.report import results
from mini_r1.report.results import write_results
from mini_r1.run import write_json
from mini_r1.sweep import load_sweep, run_sweep
from tests.hostile import TEXTS, is_inert
from tests.test_sweep import RECIPES, write_sweep

ROOT = Path(__file__).parents[2]


def evaluation(success, tokens, tries, true_arithmetic):
    group = {"success": success, "ci95": [success - 0.1, success + 0.1], "num_puzzles": 10}
    behaviors = {"tries": tries, "verified": 0.5, "true_arithmetic": true_arithmetic, "gave_up": 0}
    example = {"nums": [1, 2], "target": 3, "completion": "\n1+2=3\n</think>", "solved": tries > 1}
    return {
        **group,
        "pass_at": {"1": success},
        "by_difficulty": {"plus_minus_only": {"true": group}},
        "mean_completion_tokens": tokens,
        "behaviors": behaviors,
        "examples": [example],
    }


def write_record(sweep, seed, before, after, curve):
    recipe = load_recipe(sweep.recipe, ["--seed", str(seed)]).as_dict()
    facts = {"num_puzzles": 10, "num_samples": 2, "temperature": 1.0, "split": "held-out"}
    record = {
        "recipe": recipe,
        "versions": dict.fromkeys(("torch", "transformers", "trl"), "1.0"),
        "hardware": {"cpu_count": 2, "torch_threads": 1, "gpus": []},
        "weights": weights_hash(model_path(recipe["model_name_or_path"])),
        "summary": {"train_seconds": 90, "rule": "all", "plus_minus_only_share": 0.3, **facts},
        "before": before,
        "after": after,
        "curve": {"step": [2 * step for step in range(len(curve))], "success": curve},
    }
    write_json(sweep.record_file({}, seed), record)


@pytest.fixture
def written(tmp_path):
    """The tables and the figure of one setting with two seeds."""
    sweep = load_sweep(write_sweep(tmp_path, seeds=[1, 2], tables={"The recipe": [{}]}))
    before = evaluation(0.2, 20, 1.0, None)
    curve = [0.25, 0.25, 0.25, 0.5, 0.75, 0.75, 0.75]
    write_record(sweep, 1, before, evaluation(0.6, 30, 3.0, 1.0), curve)
    write_record(sweep, 2, before, evaluation(0.8, 50, 4.0, 0.9), [each / 5 for each in curve])
    write_results(sweep)
    figure = tmp_path / "docs" / "figures" / "sweep-the-recipe.svg"
    return sweep.results.read_text(), figure.read_text()


def test_a_table_has_every_seed_and_the_means(written):
    before = "20.0% [10.0%, 30.0%]<br>20.0% [10.0%, 30.0%]"
    after = "60.0% [50.0%, 70.0%]<br>80.0% [70.0%, 90.0%]"
    head = "| setting | success before | success after | mean | tokens | tries | verified "
    assert head + "| true arithmetic | gave up | minutes (threads) |\n" in written[0]
    row = f"| `recipe` | {before} | {after} | **70.0%** | 20 → 40 | 1.0 → 3.5 | 50.0% → 50.0% "
    assert row + "| 0.0% → 95.0% | 0% → 0% | 1.5 (1)<br>1.5 (1) |\n" in written[0]
    assert f"| plus minus only: true | 10 | {before} | {after} | 3.5 |\n" in written[0]
    assert "| pass@1 | 10 | 20.0%<br>20.0% | 60.0%<br>80.0% | 3.5 |\n" in written[0]
    assert "**Make 3 using each of 1, 2 once**\n\nBefore, failed:\n\n    1+2=3\n" in written[0]


def test_no_text_of_the_corpus_acts_in_the_results():
    record = {when: {"examples": []} for when in ("before", "after")}
    for each in record.values():
        each["examples"] = [
            {"row": {"x": text}, "completion": text, "solved": False} for text in TEXTS
        ]
    shown = results._examples(record)
    assert is_inert(shown)
    ours = ("**{", "Before, failed:", "After, failed:", "    ")  # all else is Markdown's code
    assert all(line.startswith(ours) for line in shown.split("\n") if line.strip())
    assert "| a\\|b |" in results._markdown(["x"], [["a|b"]])


def test_a_figure_has_the_mean_and_the_range_of_the_smoothed_seeds(written):
    assert "![Learning curves: The recipe](figures/sweep-the-recipe.svg)" in written[0]
    # Means of 0.25 and 0.05 first, of 0.75 and 0.15 last.
    assert (
        'aria-label="The recipe. recipe: from 0.15 to 0.45, between 0.15 and 0.45."' in written[1]
    )
    *_, line = re.findall(r'<polyline class="c0" points="([^"]+)"', written[1])
    (area,) = re.findall(r'<polygon class="c0" points="([^"]+)"', written[1])
    ys = [float(point.partition(",")[2]) for point in line.split()]
    edge = [float(point.partition(",")[2]) for point in area.split()]
    bottom = ys[0] + (ys[0] - ys[-1]) * 0.15 / 0.3  # where 0 is
    assert ys[:3] == [ys[0]] * 3
    # Of three batches each: 0.25 0.25 0.5, 0.25 0.5 0.75, 0.5 0.75 0.75.
    assert [(bottom - y) / (bottom - ys[0]) for y in ys[3:]] == pytest.approx(
        [4 / 3, 2, 8 / 3, 3], abs=0.01
    )
    assert (bottom - edge[0]) / (bottom - ys[0]) == pytest.approx(1 / 3, abs=0.01)
    assert (bottom - edge[-1]) / (bottom - ys[0]) == pytest.approx(5 / 3, abs=0.01)


def test_results_want_finished_runs(tmp_path):
    with pytest.raises(InputError, match=r"seed-1\.json is missing"):
        write_results(load_sweep(write_sweep(tmp_path)))
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    "file", sorted((RECIPES / "sweeps").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_published_results_are_what_their_records_say(file, monkeypatch, tmp_path):
    for name in ("docs", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(file.relative_to(ROOT))
    figures = (sweep.results.parent / "figures").glob(f"{sweep.name}-*.svg")
    published = [sweep.results, *sorted(figures)]
    assert len(published) == 1 + len(sweep.tables)
    for path in published:
        path.unlink()
    write_results(sweep)
    for path in published:
        assert path.read_bytes() == (ROOT / path).read_bytes(), path


@pytest.mark.slow
def test_a_sweep_runs_once_and_reports_what_the_runs_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(write_sweep(tmp_path))
    run_sweep(sweep, jobs=1)
    write_results(sweep)
    written = sweep.results.read_bytes()
    figure = (tmp_path / "docs" / "figures" / "sweep-beta.svg").read_bytes()
    for settings in ({}, {"beta": 0.0}):
        run_dir = sweep.run_dir(settings, 1)
        recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
        assert recipe["beta"] == settings.get("beta", 0.04)
        after = json.loads((run_dir / "eval" / "after.json").read_text())
        low, high = after["ci95"]
        assert f"{after['success']:.1%} [{low:.1%}, {high:.1%}]".encode() in written

    shutil.rmtree(tmp_path / "runs")  # the records are enough
    run_sweep(sweep, jobs=2)
    write_results(sweep)
    assert not (tmp_path / "runs").exists()
    assert sweep.results.read_bytes() == written
    assert (tmp_path / "docs" / "figures" / "sweep-beta.svg").read_bytes() == figure

    recipe = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe | {"learning_rate": 1e-5}))
    changed = r"seed-1\.json: made with learning_rate: 0\.0005, now it is 1e-05"
    with pytest.raises(InputError, match=changed):
        write_results(sweep)
