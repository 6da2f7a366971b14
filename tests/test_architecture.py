"""Who may import whom, and what stands in one place only: docs/architecture.md as tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "mini_r1"
# From the ground up: a module may import, early or late, only what stands above it.
ORDER = [
    "mini_r1",
    "files",
    "countdown.expression",
    "countdown.solver",
    "countdown.puzzles",
    "completion",
    "prompts",
    "rewards",
    "behaviors",
    "metrics",
    "quirks",
    "keys",
    "syntax",
    "conflicts",
    "hub",
    "model_files",
    "recipe",
    "catalog",
    "model",
    "manifest",
    "rollouts",
    "lock",
    "stdio",
    "run",
    "tables",
    "data",
    "launch.guard",
    "launch.machine",
    "launch.memory",
    "launch.network",
    "launch.plan",
    "launch.vllm_server",
    "launch.doctor",
    "launch.slurm",
    "callbacks",
    "health",
    "live",
    "start",
    "generators",
    "evaluate",
    "play",
    "report.chart",
    "report.page",
    "sweep",
    "report.results",
    "bases.search",
    "bases.english",
    "bases.sft",
    "bases.cold_start",
    "bases.gguf",
    "train",
    "cli",
    "__main__",
]
KNOW_THE_GAME_ONLY = ["completion", "rewards", "behaviors", "prompts", "metrics"]
FREE_OF_ML = ORDER[: ORDER.index("callbacks")]
ML = {"torch", "transformers", "datasets", "trl", "accelerate", "peft", "vllm"}


def module_name(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "mini_r1"


MODULES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SRC.rglob("*.py")
}


def imported(tree):
    """The modules of ours that a module names in an import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "mini_r1":
            for alias in node.names:
                yield alias.name if alias.name in MODULES else "mini_r1"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mini_r1."):
            yield node.module.removeprefix("mini_r1.")
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("mini_r1.")
                for alias in node.names
                if alias.name.startswith("mini_r1")
            )


def test_every_module_has_its_place():
    packages = {"countdown", "launch", "report", "bases"}
    assert MODULES.keys() - packages == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_nothing_imports_what_stands_above_it(name):
    below = set(ORDER[: ORDER.index(name)])
    assert set(imported(MODULES[name])) <= below


@pytest.mark.parametrize("name", KNOW_THE_GAME_ONLY)
def test_what_knows_the_game_only(name):
    ours = set(imported(MODULES[name]))
    allowed = {"mini_r1", "files", "completion"}
    assert {each for each in ours if not each.startswith("countdown")} <= allowed


def test_no_ml_library_before_it_is_needed():
    names = [f"mini_r1.{name}" if name != "mini_r1" else name for name in [*FREE_OF_ML, "cli"]]
    code = f"import sys, {', '.join(names)}; print(*sys.modules.keys() & {ML!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_the_command_line_imports_late():
    code = "import sys, mini_r1.cli; print(*(n for n in sys.modules if n.startswith('mini_r1.')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    of_model = {"mini_r1.hub", "mini_r1.model_files", "mini_r1.quirks"}
    assert set(done.stdout.split()) == {"mini_r1.cli", "mini_r1.model", *of_model}


def test_only_run_knows_the_name_of_the_recipe_file():
    holding = [path for path in SRC.rglob("*.py") if "recipe.yaml" in path.read_text("utf-8")]
    assert holding == [SRC / "run.py"]


@pytest.mark.parametrize("name", [name for name in ORDER if name != "quirks"])
def test_no_private_attribute_of_a_library_outside_quirks(name):
    def private(node):
        of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ours = of_self or ast.unparse(node) == "os._exit"  # a documented name, for all its looks
        return node.attr.startswith("_") and not node.attr.startswith("__") and not ours

    nodes = (node for node in ast.walk(MODULES[name]) if isinstance(node, ast.Attribute))
    assert [ast.unparse(node) for node in nodes if private(node)] == []
