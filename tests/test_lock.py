import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mini_r1 import InputError
from mini_r1.lock import LOCK_FILE, FolderLock, holder
from mini_r1.recipe import load_recipe
from mini_r1.run import folder_problems

HOLD = """
import sys, time
from pathlib import Path
from mini_r1.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other():
    """Another process that holds a folder, until it is killed."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_is_refused_and_told_who_is_the_first(tmp_path, other):
    folder = tmp_path / "runs" / "a"
    first = other(folder)
    started = time.monotonic()
    with pytest.raises(InputError) as caught, FolderLock(folder):
        pass
    assert time.monotonic() - started < 2
    told = str(caught.value)
    assert told.startswith(f"output_dir: {folder} is in use by process {first.pid} on ")
    assert f"on {socket.gethostname()}, since 20" in told
    assert f"mini-r1 pause {folder}" in told
    assert json.loads((folder / LOCK_FILE).read_text())["pid"] == first.pid  # as it was


def test_kill_9_gives_the_folder_back(tmp_path, other):
    first = other(tmp_path / "a")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert holder(tmp_path / "a") is None
    with FolderLock(tmp_path / "a"):
        assert json.loads((tmp_path / "a" / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert holder(tmp_path / "a") is None  # nobody else


def test_what_was_refused_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="no"), FolderLock(tmp_path / "there" / "new" / "run"):
        raise ValueError("no")
    assert list((tmp_path / "there").iterdir()) == []
    with FolderLock(tmp_path / "there" / "run"):
        (tmp_path / "there" / "run" / "recipe.yaml").touch()
    assert [path.name for path in (tmp_path / "there" / "run").iterdir()] == ["recipe.yaml"]


def test_a_recipe_is_told_that_its_folder_is_in_use(tmp_path, other):
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: tiny_base\noutput_dir: {tmp_path}/run\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert list(folder_problems(recipe)) == []
    other(tmp_path / "run")
    (problem,) = folder_problems(recipe)
    assert "is in use by process" in str(problem)


def test_where_nothing_can_be_written_the_doctor_speaks(tmp_path):
    (tmp_path / "file").touch()
    with FolderLock(tmp_path / "file"):
        pass
    assert (tmp_path / "file").is_file()


@pytest.mark.slow
def test_of_many_at_once_one_gets_it(tmp_path):
    code = HOLD.replace("time.sleep(60)", "time.sleep(1)")
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    outputs = [
        process.communicate() for process in [subprocess.Popen(command, **pipes) for _ in range(8)]
    ]
    assert sorted(out for out, _ in outputs) == [""] * 7 + ["held\n"]
