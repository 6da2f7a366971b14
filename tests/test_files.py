"""What may be any file: read within bounds, or told in one line."""

import os
import socket

import pytest

from mini_r1 import InputError
from mini_r1.files import MAX_BYTES, load_yaml, read_text
from mini_r1.prompts import get_prompt_template
from mini_r1.recipe import load_recipe
from mini_r1.report.page import write_report
from mini_r1.sweep import load_sweep
from mini_r1.tables import read_table


def special_files(folder):
    """What is no ordinary file, under a name each."""
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
    return [folder / name for name in ("pipe", "zero", "folder", "socket")]


READERS = [
    load_recipe,
    load_sweep,
    lambda path: get_prompt_template(str(path)),
    lambda path: load_recipe("tiny-cpu", ["--deepspeed", str(path)]),
    lambda path: write_report([], path.with_name("out.html"), path),
]


@pytest.mark.parametrize("read", READERS)
def test_special_files_are_refused_unread(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    for path in special_files(tmp_path.relative_to(tmp_path)):
        with pytest.raises(InputError, match=r"no ordinary file|a folder") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet"])
def test_so_are_those_that_pretend_to_be_data(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="no ordinary file"):
        read_table(tmp_path / name)


def test_a_text_has_a_limit(tmp_path):
    (tmp_path / "x").write_text("x" * MAX_BYTES)
    assert len(read_text(tmp_path / "x")) == MAX_BYTES
    (tmp_path / "x").write_text("x" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="more than 128 KiB"):
        read_text(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "line 1: nested too deeply"),
        ("\n- " * 6000, "more than 5000 keys and values"),
        ("a: &a [x]\nb: [*a, *a]", "line 1: anchors, aliases and tags"),
        ("!!python/object/apply:os.system [true]", "line 1: anchors, aliases and tags"),
        ("? [1]\n: 2", "line 1: a key is a word, not a list"),
        (f"a: {'1' * 5000}", "Exceeds the limit"),
        ("a: 2001-99-99", "month must be in"),
        ("a: [", "not valid YAML"),
    ],
)
@pytest.mark.parametrize("name", ["x.yaml", None])
def test_yaml_has_limits_wherever_it_is_read(tmp_path, text, message, name):
    if name is None:
        with pytest.raises(ValueError, match=message):
            load_yaml(text)
        return
    (tmp_path / name).write_text(text)
    for read in (load_sweep, lambda path: get_prompt_template(str(path))):
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)
