import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mini_r1.cli import main
from mini_r1.countdown.expression import is_solution

RECIPES = Path(__file__).parents[1] / "recipes"
ORIGINAL = RECIPES / "grpo-qwen-2.5-3b-deepseek-r1-countdown.yaml"
TINY = RECIPES / "tiny-cpu.yaml"


def test_help_imports_no_torch():
    code = (
        "import sys; from mini_r1.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    for command, printed in (
        ([sys.executable, "-c", code], "eval"),
        ([Path(sys.executable).parent / "mini-r1", "--version"], "mini-r1 "),
    ):
        assert printed in subprocess.run(command, check=True, capture_output=True, text=True).stdout


COMMANDS = [
    *("train", "doctor", "eval", "play", "pause", "slurm", "recipes", "report", "solve", "sweep"),
    *("data build", "data check", "base build", "base sft", "model convert"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert "usage: mini-r1" in capsys.readouterr().out


def test_solve(capsys):
    assert main(["solve", "25", "50", "75", "100", "3", "6", "--target", "952"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert is_solution(first, [25, 50, 75, 100, 3, 6], 952)
    assert "solutions" in second
    assert main(["solve", "1", "1", "--target", "9"]) == 0
    assert capsys.readouterr().out == "9 cannot be made from [1, 1]\n"
    assert main(["solve", "1", "--target", "9"]) == 2
    assert capsys.readouterr().err == "error: want 2 to 6 numbers, got 1\n"


def test_a_dry_run_plans_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    machine = ["--gpus", "4", "--gpu-memory", "80"]
    change = ["--gradient_accumulation_steps", "4"]
    assert main(["train", str(ORIGINAL), *machine, "--dry-run", *change]) == 0
    plan = capsys.readouterr().out
    assert "3 processes on GPUs 0-2" in plan
    assert "96 completions per optimizer step" in plan
    assert plan.count("--gradient_accumulation_steps 4") == 1
    assert main(["doctor", str(ORIGINAL), *machine]) == 0
    assert "verdict     it fits" in capsys.readouterr().out
    assert main(["train", str(ORIGINAL), "--gpus", "1", "--gpu-memory", "80", "--dry-run"]) == 2
    assert "needs a GPU of its own" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


BUILD = ["data", "build", "--num-puzzles"]


def test_data_build_and_check(tmp_path, capsys):
    for name in ("a", "b"):
        output = str(tmp_path / f"{name}.jsonl")
        assert main([*BUILD, "50", "--seed", "3", "--output", output]) == 0
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert len(digests) == 1
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "a.jsonl")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["puzzles"], report["distinct"], report["solvable"]) == (50, 50, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*BUILD, "9", "--number-range", "1", "1", "--output", "x.jsonl"],
            "found 0 different puzzles",
        ),
        (
            [*BUILD, "9", "--target-range", "9", "1", "--output", "x.jsonl"],
            "--target-range: want",
        ),
        ([*BUILD, "9", "--output", "x.txt"], "ends in .jsonl or .parquet"),
        (["data", "check", "no.jsonl"], "no file or folder 'no.jsonl'"),
        (["train", "no.yaml"], "no.yaml: no such recipe"),
        (
            ["train", str(ORIGINAL), "--gpus", "4", "--gpu-memory", "80"],
            "--gpus: a run takes the GPUs it finds",
        ),
        (["doctor", "--gpus", "4"], "--gpus and --gpu-memory: give both"),
        (["pause", "no-such-run"], "no-such-run: no run; want a folder such as runs/tiny-cpu"),
        (["eval", "no/such-model"], "cannot be loaded"),
        (["model", "convert", "no.gguf", "out"], "no.gguf: cannot be read: No such file"),
        (
            ["base", "sft", "./no-such-model", "--recipe", str(TINY), "--output", "out"],
            "'./no-such-model' cannot be loaded",
        ),
        (
            ["base", "sft", "tiny_base", "--recipe", "no.yaml", "--output", "out"],
            "no.yaml: no such recipe",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["solve", "1", "2", "--target", "3", "--no-such-flag"]]
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
