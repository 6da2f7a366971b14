"""Seeded defects: each must turn a test red, or that test guards nothing."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.faults.harness import ROOT

RUN, CALLBACKS, HEALTH = "src/mini_r1/run.py", "src/mini_r1/callbacks.py", "src/mini_r1/health.py"
# What it breaks: the file, the text, what takes its place, the test.
DEFECTS = {
    "accept **": (
        "src/mini_r1/countdown/expression.py",
        "tokens = _tokenize(text)",
        'tokens = _tokenize(text.replace("**", "*"))',
        "tests/countdown/test_expression.py",
    ),
    "drop the lock": (
        "src/mini_r1/cli.py",
        "with FolderLock(recipe.run_dir) if is_main_process() else nullcontext():",
        "with nullcontext():",
        "tests/integration/test_train.py -k started_twice",
    ),
    "skip the rename": (
        RUN,
        'partial = path.with_name(path.name + ".partial")\n    with',
        "partial = path\n    with",
        "tests/test_run.py -k whole_or_not",
    ),
    "forget the marker's hash": (
        RUN,
        'if _sha256(path) != file["sha256"]:',
        "if False:",
        "tests/test_run.py -k damaged_checkpoint",
    ),
    "keep what was recorded after the checkpoint": (
        RUN,
        "elif size < path.stat().st_size:",
        "elif False:",
        "tests/test_run.py -k rewinding",
    ),
    "mix data": (
        RUN,
        'if earlier["data"]["sha256"] != manifest["data"]["sha256"]:',
        "if False:",
        "tests/test_run.py -k began_with",
    ),
    "delete what the run did not write": (
        RUN,
        "(torn if ours else strange)",
        "(torn if True else strange)",
        "tests/test_run.py -k set_aside",
    ),
    "log an evaluation before the line of its step": (
        CALLBACKS,
        "self._unlogged = self._evaluate(_scheduled(state))\n\n    def _due",
        "self._unlogged = self._evaluate(_scheduled(state))\n            self._log_result()"
        "\n\n    def _due",
        "tests/test_callbacks.py -k on_schedule",
    ),
    "take a step too many": (
        CALLBACKS,
        "if state.global_step >= state.max_steps:\n            raise NothingLeft",
        "if state.global_step > state.max_steps:\n            raise NothingLeft",
        "tests/test_callbacks.py -k beyond_the_last",
    ),
    "discard the old checkpoint before the new one is complete": (
        CALLBACKS,
        "            mark_complete(Path(args.output_dir), state.global_step)\n"
        "            discard_old_checkpoints(Path(args.output_dir), self._limit)\n",
        "            discard_old_checkpoints(Path(args.output_dir), self._limit)\n",
        "tests/test_callbacks.py -k first_file_to_its_last",
    ),
    "end with a signal's name for success": (
        CALLBACKS,
        "asked = self._REQUEST + (0 if number == signal.SIGUSR1 else number)",
        "asked = self._REQUEST",
        "tests/test_callbacks.py -k no_ctrl_c",
    ),
    "leave the model as an interrupted evaluation had it": (
        "src/mini_r1/generators.py",
        "    finally:\n        model.train(was_training)",
        "    finally:\n        pass",
        "tests/test_generators.py -k leaves_the_model",
    ),
    "die with the reader of stdout": (
        "src/mini_r1/stdio.py",
        "except OSError:\n            nowhere",
        "except ValueError:\n            nowhere",
        "tests/test_stdio.py",
    ),
    "let anybody talk to the server": (
        "src/mini_r1/launch/guard.py",
        "or hmac.compare_digest(brought, self._wanted):",
        "or brought:",
        "tests/launch/test_guard.py",
    ),
    "keep variables by the beginning of their names": (
        "src/mini_r1/launch/slurm.py",
        "if KEPT_VARIABLES.fullmatch(k)",
        "if KEPT_VARIABLES.match(k)",
        "tests/launch/test_slurm.py -k harmless_and_its_owners",
    ),
    "keep a token in the command": (
        "src/mini_r1/syntax.py",
        "        words[:] = presentable(words)",
        "        pass",
        "tests/test_syntax.py -k token",
    ),
    "read equations without end": (
        "src/mini_r1/completion.py",
        "        if unread < 0:",
        "        if unread < -(10**9):",
        "tests/test_completion.py -k megabyte",
    ),
    "hand rewards the record itself": (
        "src/mini_r1/rewards.py",
        "self.function(**{name: _copied(value) for name, value in columns.items()})",
        "self.function(**columns)",
        "tests/test_rollouts.py -k falsifies_nothing",
    ),
    "let texts act in the page": (
        "src/mini_r1/report/chart.py",
        "else visible(str(value)),",
        "else value,",
        "tests/report/test_page.py -k corpus",
    ),
    "read files of any size": (
        "src/mini_r1/files.py",
        "self._nodes > MAX_NODES",
        "False",
        "tests/test_files.py -k limits",
    ),
    "miss an infinite gradient": (
        HEALTH,
        "0 <= norm < math.inf",
        "0 <= norm",
        "tests/test_health.py -k named_causes_first",
    ),
    "forget what a reward returned": (
        "src/mini_r1/rollouts.py",
        "self.fault = self.fault or fault",
        "pass",
        "tests/test_rollouts.py -k told_in_one_line",
    ),
    "say a diagnosis in every step": (
        HEALTH,
        "self._said |= DIAGNOSIS in entry",
        "pass",
        "tests/test_health.py -k said_once",
    ),
}


caught: list[str] = []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is tested, and of the tests."""
    copy = tmp_path_factory.mktemp("defects") / "checkout"
    copy.mkdir()
    for name in ("src", "tests", "recipes", "configs", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_turns_a_test_red(checkout, defect):
    name, text, instead, test = DEFECTS[defect]
    file = checkout / name
    sound = file.read_text()
    assert sound.count(text) == 1
    file.write_text(sound.replace(text, instead))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *test.split()]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
        )
    finally:
        file.write_text(sound)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-2000:]
    caught.append(defect)


def test_all_were_caught(saw):
    saw("a seeded defect", len(DEFECTS), f"{len(caught)} turn a test red")
    assert caught == list(DEFECTS)
