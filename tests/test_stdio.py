import os
import pty
import subprocess
import sys

import pytest

PRINTING = """
import sys
from mini_r1.stdio import outlive_readers
outlive_readers()
sys.stdin.readline()
for number in range(3):
    print("x" * 100_000, flush=number == 1)
    print("said", file=sys.stderr)
open(sys.argv[1], "w").write("survived")
"""


def printing(path, **streams):
    return subprocess.Popen(
        [sys.executable, "-c", PRINTING, path], stdin=subprocess.PIPE, text=True, **streams
    )


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_ends_nothing(tmp_path, stream):
    process = printing(tmp_path / "file", **{stream: subprocess.PIPE})
    getattr(process, stream).close()
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "survived"


def test_a_terminal_that_was_closed_ends_nothing(tmp_path):
    parent_end, terminal = pty.openpty()
    process = printing(tmp_path / "file", stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.close(parent_end)
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "survived"


def test_a_full_disk_under_the_log_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        process = printing(tmp_path / "file", stdout=full)
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "survived"


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    command = f"exec {sys.executable} -c '{PRINTING}' {tmp_path / 'file'} >&- 2>&-"
    process = subprocess.run(["bash", "-c", command], input=b"\n", timeout=60, check=False)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "survived"
