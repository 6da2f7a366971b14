import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mini_r1 import InputError
from mini_r1.metrics import METRICS
from mini_r1.run import paused_step, write_json
from mini_r1.sweep import load_sweep, record_of, run_sweep

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
    short = {
        "max_steps": 2,
        "save_steps": 2,
        "steps_per_generation": 2,
        "max_completion_length": 40,
        "num_puzzles": 500,
    }
    (folder / "tiny.yaml").write_text(
        yaml.safe_dump(recipe | short | {"num_eval_puzzles": 20, "num_eval_samples": 1})
    )
    return folder / "sweep.yaml"


def test_the_shipped_ablations_are_valid_settings_of_the_recipe():
    sweep = load_sweep(RECIPES / "sweeps" / "ablations.yaml")
    assert len(sweep.seeds) == 3
    assert len(
        {sweep.run_dir(settings, seed) for settings in sweep.settings() for seed in sweep.seeds}
    ) == 3 * len(sweep.settings())
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


def test_a_record_keeps_what_was_sampled_step_by_step(tmp_path):
    keys = [METRICS[name].key for name in ("success", "tokens")]
    sampled = [(1, 0.25, 20.5), (3, 0.123456, 30.0)]
    history = [{"step": step, **dict(zip(keys, values, strict=True))} for step, *values in sampled]
    history += [{"step": 3, "eval_success": 0.5}, {"step": 3, "train_runtime": 9.0}]
    hardware = {"platform": "x", "cpu_count": 2, "torch_threads": 1, "gpus": [], "world_size": 1}
    manifest = {"versions": {"trl": "1"}, "hardware": hardware, "model": {"sha256": "abc"}}
    for name, content in (
        ("recipe.yaml", {"seed": 5}),  # JSON is YAML
        ("manifest.json", manifest),
        ("trainer_state.json", {"log_history": history}),
        ("summary.json", {"steps": 3}),
        ("eval/before.json", {"step": 0, "success": 0.1}),
        ("eval/later.json", {"success": 0.7}),  # of another command, which knows no step
        ("eval/after.json", {"step": 3, "success": 0.6}),
    ):
        write_json(tmp_path / name, content)
    assert record_of(tmp_path) == {
        "recipe": {"seed": 5},
        "versions": {"trl": "1"},
        "hardware": {"cpu_count": 2, "torch_threads": 1, "gpus": []},
        "weights": "abc",
        "summary": {"steps": 3},
        "before": {"step": 0, "success": 0.1},
        "after": {"step": 3, "success": 0.6},
        "curve": {"step": [1, 3], "success": [0.25, 0.1235], "tokens": [20.5, 30.0]},
    }


@pytest.mark.slow
def test_a_failed_run_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(write_sweep(tmp_path, tables={"Data": [{"dataset_id_or_path": "no.csv"}]}))
    with pytest.raises(InputError, match=r"1 of 1 runs failed; read .*seed-1\.log"):
        run_sweep(sweep, jobs=1)


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_under_way_after_a_save(tmp_path):
    path = write_sweep(
        tmp_path, tables={"Beta": [{"max_steps": 200}, {"max_steps": 200, "beta": 0}]}
    )
    command = [sys.executable, "-m", "mini_r1", "sweep", str(path)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first, second = (
        tmp_path / "runs/sweep" / name for name in ("max_steps=200", "beta=0,max_steps=200")
    )
    while not (first / "seed-1" / "samples").exists():  # its first step has begun
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert paused_step(first / "seed-1")
    assert printed == "stopped  runs/sweep/max_steps=200/seed-1\n"
    ending, line = errors.splitlines()
    assert ending == "ending the runs under way; Ctrl-C again to stop them now"
    assert line == f"interrupted; to go on: {shlex.join(command)}"
    assert not second.exists()
