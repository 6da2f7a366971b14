import json
import os

import pytest

from mini_r1 import InputError
from mini_r1.run import (
    COMPLETE_MARKER,
    checkpoint_to_resume,
    last_complete_checkpoint,
    new_folder,
    run_weights,
    write_json,
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
    (tmp_path / "config.json").touch()
    assert run_weights(tmp_path) == tmp_path


def test_torn_checkpoints_are_removed_and_the_last_complete_one_is_resumed(tmp_path, capsys):
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-10" / COMPLETE_MARKER).touch()
    assert checkpoint_to_resume(tmp_path, is_main=True) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert "checkpoint-15: it was not written to its end" in capsys.readouterr().out
    assert checkpoint_to_resume(tmp_path / "new", is_main=True) is None
