import json
import shutil
from pathlib import Path

import pytest
import yaml

from mini_r1 import InputError
from mini_r1.sweep import load_sweep, run_sweep, write_results

RECIPES = Path(__file__).parents[1] / "recipes"


def write_sweep(folder, **changes):
    content = {
        "recipe": "tiny.yaml",
        "seeds": [1],
        "records": str(folder / "docs" / "records"),
        "results": str(folder / "docs" / "results.md"),
        "tables": {"Beta": [{}, {"beta": 0.0}]},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content | changes))
    recipe = yaml.safe_load((RECIPES / "tiny-cpu.yaml").read_text())
    short = {"max_steps": 2, "save_steps": 2, "steps_per_generation": 2, "max_completion_length": 40, "num_puzzles": 500}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe | short | {"num_eval_puzzles": 20, "num_eval_samples": 1}))
    return folder / "sweep.yaml"


def test_the_shipped_ablations_are_valid_settings_of_the_recipe():
    sweep = load_sweep(RECIPES / "sweeps" / "ablations.yaml")
    assert len(sweep.seeds) == 3
    assert len({sweep.run_dir(settings, seed) for settings in sweep.settings() for seed in sweep.seeds}) == 3 * len(
        sweep.settings()
    )
    reference = {"max_steps": 70}  # what the settings of an ablation are compared with
    assert all(reference in table for title, table in sweep.tables.items() if title != "The recipe")
    assert sweep.tables["The recipe"] == [{}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": {"Beta": [{"betta": 0.0}]}}, "did you mean 'beta'"),
        ({"tables": 5}, "not a sweep, which has recipe, seeds"),
        ({"seeds": None}, "not a sweep, which has recipe, seeds"),
        ({"recipe": "none.yaml"}, "no such recipe"),
    ],
)
def test_a_broken_sweep_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_sweep(write_sweep(tmp_path, **changes))


def test_results_want_finished_runs(tmp_path):
    with pytest.raises(InputError, match=r"seed-1\.json is missing"):
        write_results(load_sweep(write_sweep(tmp_path)))
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize("file", sorted((RECIPES / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_published_results_are_what_their_records_say(file, monkeypatch, tmp_path):
    monkeypatch.chdir(RECIPES.parent)
    sweep = load_sweep(file.relative_to(RECIPES.parent))
    published = [sweep.results, *sorted((sweep.results.parent / "figures").glob(f"{sweep.name}-*.svg"))]
    for name in ("docs", "recipes"):
        shutil.copytree(name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    write_results(sweep)
    assert len(published) == 1 + len(sweep.tables)
    for path in published:
        assert path.read_bytes() == (RECIPES.parent / path).read_bytes(), path


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
        assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["beta"] == settings.get("beta", 0.04)
        after = json.loads((run_dir / "eval" / "after.json").read_text())
        assert f"{after['success']:.1%} [{after['ci95'][0]:.1%}, {after['ci95'][1]:.1%}]".encode() in written

    shutil.rmtree(tmp_path / "runs")  # the records are enough
    run_sweep(sweep, jobs=2)
    write_results(sweep)
    assert not (tmp_path / "runs").exists()
    assert sweep.results.read_bytes() == written
    assert (tmp_path / "docs" / "figures" / "sweep-beta.svg").read_bytes() == figure

    recipe = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe | {"learning_rate": 1e-5}))
    with pytest.raises(InputError, match=r"seed-1\.json: made with learning_rate: 0\.0005, now it is 1e-05"):
        write_results(sweep)


@pytest.mark.slow
def test_a_failed_run_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(write_sweep(tmp_path, tables={"Loss": [{"loss_type": "nonsense"}]}))
    with pytest.raises(InputError, match=r"1 of 1 runs failed; read .*seed-1\.log"):
        run_sweep(sweep, jobs=1)
