"""What all fault tests share, and the table of what they have seen.

With --write it goes into docs/reliability.md, between the two lines that say so.
"""

import pytest

from mini_r1.run import write_section
from tests.faults.harness import ROOT, Zygote, clear, outcome, zygote

DOC = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- seen by make test-faults -->"
seen: list[tuple[str, str, str]] = []


def pytest_addoption(parser):
    parser.addoption("--write", action="store_true", help="write what is seen into reliability.md")


@pytest.fixture
def saw():
    """Takes a row of the table: what was done, how often, what came of it."""
    return lambda *row: seen.append(tuple(map(str, row)))


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    rows = [("what was done", "how often", "what came of it"), ("---", "---:", "---"), *seen]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    terminalreporter.section("seen")
    terminalreporter.write(table)
    if config.getoption("write", False) and exitstatus == 0:
        write_section(DOC, BEGIN, table)


@pytest.fixture(scope="session")
def started():
    with zygote() as process:
        yield process


@pytest.fixture(scope="session", params=[1, 2], ids=["one process", "two processes"])
def straight(request, started, tmp_path_factory):
    """(what starts trainings, their folder, what an uninterrupted one leaves, its operations).

    All trainings have the same folder, whose name they keep.
    """
    launcher = Zygote(started, request.param)
    folder = tmp_path_factory.mktemp(f"faults-{request.param}")
    run_dir, operations = folder / "run", folder / "operations"
    for _ in range(2):  # and another one just the same
        clear(run_dir)
        operations.unlink(missing_ok=True)
        assert launcher.train(run_dir, operations=operations) == [0] * request.param
        left = outcome(run_dir)
    return launcher, run_dir, left, operations.read_text().splitlines()


@pytest.fixture(scope="session")
def alone(started, tmp_path_factory):
    """The same, of one process."""
    launcher, run_dir = Zygote(started), tmp_path_factory.mktemp("faults-alone") / "run"
    assert launcher.train(run_dir) == [0]
    return launcher, run_dir, outcome(run_dir)
