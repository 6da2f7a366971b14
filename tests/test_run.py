import json
import os
from pathlib import Path

import pytest
import yaml

from mini_r1 import InputError
from mini_r1.recipe import load_recipe
from mini_r1.run import (
    COMPLETE_MARKER,
    MANIFEST_FILE,
    RECIPE_FILE,
    check_same_start,
    checkpoint_to_resume,
    last_complete_checkpoint,
    new_folder,
    run_weights,
    weights_and_task,
    weights_of,
    write_json,
    write_recipe,
)

# ---- Writing --------------------------------------------------------------------------------


def test_records_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new = tmp_path / "eval" / "before.json", tmp_path / "eval" / "after.json"
    write_json(old, {"success": 0.5})
    assert [file.name for file in old.parent.iterdir()] == ["before.json"]

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    for path in (old, new):
        with pytest.raises(OSError, match="disk full"):
            write_json(path, {"success": 0.75})
    assert json.loads(old.read_text()) == {"success": 0.5}
    assert not new.exists()


def test_a_new_folder_gets_its_name_once_it_is_whole(tmp_path):
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "a" / "model"):
        raise OSError("disk full")
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "a" / "model.partial").mkdir()
    (tmp_path / "a" / "model.partial" / "of an attempt that was killed").touch()
    with new_folder(tmp_path / "a" / "model") as folder:
        (folder / "config.json").touch()
    assert [path.name for path in (tmp_path / "a" / "model").iterdir()] == ["config.json"]
    for taken, message in (
        (tmp_path / "a" / "model", "exists; choose a new folder"),
        (tmp_path / "a" / "model" / "config.json" / "b", "cannot be written: Not a directory"),
    ):
        with pytest.raises(InputError, match=message), new_folder(taken):
            pass


# ---- Checkpoints ----------------------------------------------------------------------------


def test_only_complete_checkpoints_count(tmp_path):
    with pytest.raises(InputError, match="no complete checkpoint"):
        run_weights(tmp_path)
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 20:
            (tmp_path / f"checkpoint-{step}" / COMPLETE_MARKER).touch()
    assert last_complete_checkpoint(tmp_path) == run_weights(tmp_path) == tmp_path / "checkpoint-10"
    assert weights_of(str(tmp_path)) == str(tmp_path)  # no run yet: no recipe
    write_recipe(tmp_path, {})
    assert weights_of(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "config.json").touch()
    assert run_weights(tmp_path) == tmp_path
    for name in ("tiny_base", "owner/model", "./no/such/folder"):
        assert weights_of(name) == name


def test_a_run_goes_on_from_the_weights_it_began_with(tmp_path):
    def model(sha256):
        return {"name": "runs/a", "sha256": sha256, "revision": None}

    write_json(tmp_path / MANIFEST_FILE, {"model": model("1")})
    check_same_start(tmp_path, model("1"))
    with pytest.raises(InputError, match="the weights of 'runs/a' have changed since"):
        check_same_start(tmp_path, model("2"))
    write_json(tmp_path / MANIFEST_FILE, {"model": model(None)})
    check_same_start(tmp_path, model("2"))


def test_torn_checkpoints_are_removed_and_the_last_complete_one_is_resumed(tmp_path, capsys):
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-10" / COMPLETE_MARKER).touch()
    assert checkpoint_to_resume(tmp_path, is_main=True) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert "checkpoint-15: it was not written to its end" in capsys.readouterr().out
    assert checkpoint_to_resume(tmp_path / "new", is_main=True) is None


# ---- A run from another folder --------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder, the current one, that is not the one in which the run was started."""
    start, here = tmp_path / "start", tmp_path / "here"
    here.mkdir()
    (start / "data").mkdir(parents=True)
    (start / "24.jsonl").touch()
    monkeypatch.chdir(here)
    return start, here


def a_run(start, **keys):
    run_dir = start / "runs" / "24"
    write_recipe(run_dir, {"model_name_or_path": "tiny_base", **keys})
    write_json(run_dir / MANIFEST_FILE, {"folder": str(start)})
    (run_dir / "config.json").touch()
    return run_dir


def test_a_run_is_evaluated_without_its_rewards(elsewhere):
    rewards = ["format", "my_task.multiplies", "./my_task.py:bonus"]
    run_dir = a_run(elsewhere[0], reward_funcs=rewards, max_completion_length=7)
    weights, task, length, _ = weights_and_task(str(run_dir))
    assert (weights, list(task.reward_funcs), length) == (str(run_dir), rewards, 7)
    with pytest.raises(InputError, match=r"recipe\.yaml line 2: reward_funcs: cannot import 'my_t"):
        load_recipe(run_dir / RECIPE_FILE)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("24.jsonl", "{start}/24.jsonl"),
        ("./24.jsonl", "{start}/24.jsonl"),
        ("data", "{start}/data"),
        ("moved.jsonl", "moved.jsonl"),  # which is here, but not there
        ("lost.jsonl", "{start}/lost.jsonl"),  # where it should be
        ("/anywhere/24.jsonl", "/anywhere/24.jsonl"),
        ("generated", "generated"),
        ("owner/puzzles", "owner/puzzles"),
    ],
)
def test_its_data_are_those_of_its_start(elsewhere, source, found):
    start, here = elsewhere
    for name in ("24.jsonl", "moved.jsonl"):
        (here / name).touch()
    run_dir = a_run(start, dataset_id_or_path=source)
    _, task, *_ = weights_and_task(str(run_dir))
    assert Path(task.dataset_id_or_path) == Path(found.format(start=start))
    assert yaml.safe_load((run_dir / RECIPE_FILE).read_text())["dataset_id_or_path"] == source
    # Another recipe's paths count from here, and so do those of a run that does not say.
    _, task, *_ = weights_and_task(str(run_dir), str(run_dir / RECIPE_FILE))
    assert task.dataset_id_or_path == source
    write_json(run_dir / MANIFEST_FILE, {})
    _, task, *_ = weights_and_task(str(run_dir))
    assert task.dataset_id_or_path == source
