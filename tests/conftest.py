"""Quick tests first; the same examples on every run; no network."""

import os
import shutil
import signal
import socket
import sys

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub must fail, not hang
# A background job and nohup hand down their deafness.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A new current folder; the modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name, module in [*sys.modules.items()]:
        if (getattr(module, "__file__", None) or "").startswith(f"{tmp_path}{os.sep}"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def small_task(tmp_path_factory):
    """The embedded base in a folder, with a recipe for few puzzles: they are there at once."""
    from mini_r1.model import model_path
    from mini_r1.run import RECIPE_FILE

    folder = tmp_path_factory.mktemp("small_task")
    shutil.copytree(model_path("tiny_base"), folder, dirs_exist_ok=True)
    recipe = (folder / RECIPE_FILE).read_text()
    (folder / RECIPE_FILE).write_text(recipe.replace("num_puzzles: 16000", "num_puzzles: 300"))
    return str(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run what takes minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if not config.getoption("all"):
        for item in items:
            if item.get_closest_marker("minutes"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run make test-all"))


@pytest.fixture
def online(monkeypatch):
    """Returns a function that puts the hub elsewhere, for a process that has not been offline."""
    from huggingface_hub import constants

    from mini_r1 import hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.unreachable.cache_clear()
    yield lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)
    hub.unreachable.cache_clear()


@pytest.fixture
def listening():
    """The address of a port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
