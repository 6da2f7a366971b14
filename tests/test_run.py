import json
import os
from pathlib import Path

import pytest
import yaml

from mini_r1 import InputError
from mini_r1.recipe import load_recipe
from mini_r1.rollouts import ALL_FILE
from mini_r1.run import (
    COMPLETE_MARKER,
    MANIFEST_FILE,
    RECIPE_FILE,
    SUMMARY_FILE,
    check_same_start,
    checkpoint_to_resume,
    discard_old_checkpoints,
    finished_summary,
    folder_problems,
    last_complete_checkpoint,
    load_run,
    mark_begun,
    mark_complete,
    new_folder,
    rewind,
    run_weights,
    weights_and_task,
    weights_of,
    write_json,
    write_recipe,
    write_text,
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


def saved(run_dir, *steps):
    """Complete checkpoints, with a file in a folder as DeepSpeed writes them."""
    for step in steps:
        mark_begun(run_dir, step)
        shards = run_dir / f"checkpoint-{step}" / f"global_step{step}"
        shards.mkdir()
        (shards / "rank_0.pt").write_text(f"optimizer {step}")
        (shards.parent / "model.safetensors").write_text(f"weights {step}")
        mark_complete(run_dir, step)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_complete_checkpoints_count(tmp_path):
    with pytest.raises(InputError, match="no complete checkpoint"):
        run_weights(tmp_path)
    saved(tmp_path, 5, 10)
    mark_begun(tmp_path, 20)
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30" / COMPLETE_MARKER).touch()  # emptied by a crash
    (tmp_path / "checkpoint-40").mkdir()
    (tmp_path / "checkpoint-40" / COMPLETE_MARKER).write_text("{}")
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-99").touch()
    assert last_complete_checkpoint(tmp_path) == run_weights(tmp_path) == tmp_path / "checkpoint-10"
    assert weights_of(str(tmp_path)) == str(tmp_path)  # no run yet: no recipe
    write_recipe(tmp_path, {})
    assert weights_of(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "config.json").touch()
    assert run_weights(tmp_path) == tmp_path / "checkpoint-10"  # half a model, of a kill
    write_json(tmp_path / SUMMARY_FILE, {})
    assert run_weights(tmp_path) == tmp_path
    for name in ("tiny_base", "owner/model", "./no/such/folder"):
        assert weights_of(name) == name


def test_a_run_goes_on_from_the_weights_and_data_it_began_with(tmp_path):
    def manifest(sha256, revision=None, data="d"):
        model = {"name": "runs/a", "sha256": sha256, "revision": revision}
        return {"model": model, "data": {"sha256": data}}

    write_json(tmp_path / MANIFEST_FILE, manifest("1"))
    check_same_start(tmp_path, manifest("1"))
    with pytest.raises(InputError, match="the weights of 'runs/a' have changed since"):
        check_same_start(tmp_path, manifest("2"))
    with pytest.raises(InputError, match="dataset_id_or_path: the data have changed since"):
        check_same_start(tmp_path, manifest("1", data="e"))
    write_json(tmp_path / MANIFEST_FILE, manifest(None))
    check_same_start(tmp_path, manifest("2"))
    write_json(tmp_path / MANIFEST_FILE, manifest(None, "commit 1"))
    with pytest.raises(InputError, match="the weights of 'runs/a' have changed since"):
        check_same_start(tmp_path, manifest(None, "commit 2"))


def test_torn_checkpoints_are_removed_and_the_last_complete_one_is_resumed(tmp_path, capsys):
    saved(tmp_path, 10)
    mark_begun(tmp_path, 5)
    mark_begun(tmp_path, 15)
    (tmp_path / "checkpoint-20").mkdir()  # killed between folder and marker
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-10"
    assert names(tmp_path) == ["checkpoint-10"]
    assert "checkpoint-15: it was not written to its end" in capsys.readouterr().out
    assert checkpoint_to_resume(tmp_path / "new") is None


def test_what_this_run_has_not_written_is_set_aside(tmp_path, capsys):
    saved(tmp_path, 10)
    for number in ("", "-2"):
        (tmp_path / "checkpoint-15").mkdir()
        (tmp_path / "checkpoint-15" / "notes.txt").write_text("mine")
        assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-10"
        aside = f"set-aside-checkpoint-15{number}"
        assert f"checkpoint-15 is not whole: set aside as {aside}\n" in capsys.readouterr().out
        assert (tmp_path / aside / "notes.txt").read_text() == "mine"


def lose(path):
    path.unlink()
    return "is missing"


def cut(path):
    path.write_text(path.read_text()[:3])
    return "has 3 bytes instead of"


def flip(path):
    path.write_text(path.read_text().replace("10", "11"))
    return "has changed"


@pytest.mark.parametrize("name", ["model.safetensors", "global_step10/rank_0.pt"])
@pytest.mark.parametrize("harm", [lose, cut, flip])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, name, harm):
    saved(tmp_path, 5, 10)
    what = f"{name} {harm(tmp_path / 'checkpoint-10' / name)}"
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-5"
    said = capsys.readouterr().out
    assert f"checkpoint-10 is damaged ({what}" in said
    assert said.endswith("): set aside as set-aside-checkpoint-10\n")
    assert names(tmp_path) == ["checkpoint-5", "set-aside-checkpoint-10"]


def test_if_all_are_damaged_the_user_decides(tmp_path):
    saved(tmp_path, 5, 10)
    for step in (5, 10):
        lose(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(InputError, match=r"checkpoint-10 is damaged .*and there is no other to go"):
        checkpoint_to_resume(tmp_path)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-5"]


def test_rewinding_takes_back_what_was_recorded_later(tmp_path):
    kept = {"samples/a.txt": "1", "tensorboard/events.1": "11", "eval/before.json": "x"}
    kept |= {"eval/step-000002.json": "x", "eval/after.json": "x", "logs/vllm.log": "x"}
    for name, text in kept.items():
        write_text(tmp_path / name, text)
    saved(tmp_path, 2)
    for name in ("samples/a.txt", "samples/b.txt", "tensorboard/events.1", "tensorboard/events.2"):
        write_text(tmp_path / name, kept.get(name, "") + "later")
    for name in ("eval/step-000004.json", "report.html.partial", "eval/after.json.partial"):
        write_text(tmp_path / name, "later")
    (tmp_path / "checkpoint-0.partial" / "x").mkdir(parents=True)
    rewind(tmp_path, tmp_path / "checkpoint-2")

    def texts():
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        found = {str(path.relative_to(tmp_path)): path.read_text() for path in files}
        return {name: text for name, text in found.items() if not name.startswith("checkpoint-2")}

    assert texts() == kept
    rewind(tmp_path, None)
    left = ("eval/before.json", "eval/after.json", "logs/vllm.log")
    assert texts() == {name: kept[name] for name in left}


def test_old_checkpoints_are_discarded(tmp_path):
    saved(tmp_path, 5, 10, 15)
    discard_old_checkpoints(tmp_path, None)
    assert len(names(tmp_path)) == 3
    discard_old_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-15"]


# ---- Damaged records ------------------------------------------------------------------------


@pytest.fixture
def a_start(tmp_path):
    """A run with a checkpoint: (its recipe, its folder)."""
    recipe = load_recipe("tiny-cpu", ["--output_dir", str(tmp_path)])
    write_recipe(tmp_path, recipe.as_dict())
    write_json(tmp_path / MANIFEST_FILE, {})
    write_json(tmp_path / "eval" / "before.json", {})
    saved(tmp_path, 5)
    assert list(folder_problems(recipe)) == []
    return recipe, tmp_path


@pytest.mark.parametrize("name", [RECIPE_FILE, MANIFEST_FILE, "eval/before.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": [', b"- 1\n", b"\xff", b"[" * 300, b"a: b: c"])
def test_a_damaged_record_is_named_before_anything_starts(a_start, name, content):
    recipe, run_dir = a_start
    (run_dir / name).write_bytes(content)
    (problem,) = folder_problems(recipe)
    assert str(problem).startswith(f"{run_dir / name}: damaged (")
    with pytest.raises(InputError, match="damaged"):
        load_run(run_dir)


@pytest.mark.parametrize("name", [MANIFEST_FILE, "eval/before.json"])
def test_a_record_that_a_resume_needs_is_missed(a_start, name):
    recipe, run_dir = a_start
    (run_dir / name).unlink()
    (problem,) = folder_problems(recipe)
    assert f"{run_dir} exists and has lost its {Path(name).name}; choose another" in str(problem)


def test_samples_that_are_no_text_are_named(a_start):
    _, run_dir = a_start
    write_text(run_dir / "samples" / ALL_FILE, "")
    assert load_run(run_dir).samples == []
    (run_dir / "samples" / ALL_FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"completion_samples\.txt: damaged \("):
        load_run(run_dir)


def test_a_damaged_summary_is_no_reason_to_train_again(a_start):
    recipe, run_dir = a_start
    assert finished_summary(recipe) is None
    (run_dir / SUMMARY_FILE).write_text('{"steps":')
    with pytest.raises(InputError, match=r"summary\.json: damaged \("):
        finished_summary(recipe)


@pytest.mark.parametrize("left", ["lock", "recipe.yaml.partial", "logs", "start"])
def test_what_a_start_leaves_that_was_killed_is_no_strange_folder(tmp_path, left):
    run_dir = tmp_path / "run"
    recipe = load_recipe("tiny-cpu", ["--output_dir", str(run_dir)])
    run_dir.mkdir()
    (run_dir / left).touch()
    assert list(folder_problems(recipe)) == []
    (run_dir / "thesis.txt").touch()
    (problem,) = folder_problems(recipe)
    assert "exists and is no run of ours" in str(problem)


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
