import hashlib
import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mini_r1 import InputError, RunFailed
from mini_r1.cli import exit_code, main
from mini_r1.countdown.expression import is_solution
from mini_r1.launch.machine import LAUNCH_VARIABLES
from tests.hostile import is_inert

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
    printed = capsys.readouterr().out
    assert "usage: mini-r1" in printed
    assert "%%" not in printed


@pytest.mark.parametrize(
    ("arguments", "commands"), [([], "train"), (["data"], "check"), (["base"], "build")]
)
def test_without_a_command_the_help_is_shown(arguments, commands, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {shlex.join(['mini-r1', *arguments])} [-h]")
    assert commands in printed


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["trian", "recipes/tiny-cpu.yaml"], "no command 'trian'; did you mean 'train'?"),
        (["data", "chek", "x.jsonl"], "no command 'chek'; did you mean 'check'?"),
        (["base", "x"], "no command 'x'; choose from build, sft"),
    ],
)
def test_an_unknown_command_is_told_with_the_nearest(arguments, error, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("error", "rank", "code", "told"),
    [
        (InputError, "0", 2, "error: no\n"),
        (InputError, "1", 2, ""),  # the first process of the launch has met it, too
        (RunFailed, "0", 1, "error: no\n"),
        (RunFailed, "1", 1, "error: no\n"),  # none of the others may have
    ],
)
def test_what_ends_a_command_is_told_once(monkeypatch, capsys, error, rank, code, told):
    def command():
        raise error("no")

    for variable in LAUNCH_VARIABLES:
        monkeypatch.setenv(variable, rank)
    assert exit_code(command) == code
    assert capsys.readouterr().err == told


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


def test_data_check_finds_columns_and_leaks(tmp_path, capsys):
    for part, targets in (("train", (3, 2)), ("test", (3,))):
        rows = [json.dumps({"numbers": [1, 2], "answer": target}) + "\n" for target in targets]
        (tmp_path / f"{part}.jsonl").write_text("".join(rows))
    check = ["data", "check", str(tmp_path), "--columns", "{nums: numbers, target: answer}"]
    assert main(check) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["puzzles"], report["heldout"], report["also_in_heldout"]) == (2, 1, 1)
    assert main([*check, "--split", "test"]) == 0
    assert json.loads(capsys.readouterr().out)["puzzles"] == 1


def test_data_check_shows_its_progress_on_a_terminal_only(tmp_path):
    output = tmp_path / "x.jsonl"
    assert main([*BUILD, "50", "--output", str(output)]) == 0
    command = [sys.executable, "-m", "mini_r1", "data", "check", str(output)]
    piped = subprocess.run(command, check=True, capture_output=True, text=True)
    assert piped.stderr == ""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    shown = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    assert b"solving" in os.read(ours, 4096)
    assert shown.stdout.decode() == piped.stdout


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
        (["data", "check", "."], "no .parquet, .jsonl, .json, .csv file in the folder ."),
        (["data", "check", "owner/name"], "'owner/name' is no file or folder here"),
        (["data", "check", ".", "--columns", "{nums: 1}"], "columns: want names such as {nums:"),
        (["train", "no.yaml"], "no.yaml: no such recipe"),
        (
            ["train", str(ORIGINAL), "--gpus", "4", "--gpu-memory", "80"],
            "--gpus: a run takes the GPUs it finds",
        ),
        (["doctor", "--gpus", "4"], "--gpus and --gpu-memory: give both"),
        (["eval", "tiny_base", "--json", "."], "--json: . cannot be written: not a file"),
        (["eval", "tiny_base", "--json", "/dev/null"], "/dev/null cannot be written: not a file"),
        (["eval", "tiny_base", "--json", "/proc/x.json"], "--json: /proc/x.json cannot be written"),
        (["pause", "no-such-run"], "no-such-run: no run; want a folder such as runs/tiny-cpu"),
        (["eval", "no/such-model"], "is not in the cache"),
        (["model", "convert", "no.gguf", "out"], "no.gguf: cannot be read: No such file"),
        (
            ["base", "sft", "./no-such-model", "--recipe", str(TINY), "--output", "out"],
            "no run or model './no-such-model' here",
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


@pytest.mark.parametrize("name", ["x\x1b[2J", "x\u202e", "x\udce9", "x\r\x9b2J"])
def test_no_name_acts_in_a_message(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", name]) == 2
    assert is_inert(capsys.readouterr().err)
    assert main(["train", str(TINY), f"--{name}", "1", "--dry-run"]) == 2
    assert is_inert(capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["solve", "1", "2", "--target", "3", "--no-such-flag"],
        ["solve", "1", "2", "--targ", "3"],
        ["doctor", "--gpus", "-1"],
        ["doctor", "--gpus", "1", "--gpu-memory", "nan"],
    ],
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_eval_prints_words_and_json_on_request(small_task, tmp_path, capsys):
    few = ["eval", small_task, "--num-puzzles", "8", "--num-samples", "2"]
    assert main([*few, "--json", str(tmp_path / "eval.json")]) == 0
    words = capsys.readouterr().out
    assert main([*few, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "eval.json").read_text())
    low, high = result["ci95"]
    for part in (
        f"held-out success  {result['success']:.1%} (95 % interval {low:.1%} to {high:.1%}; "
        "8 puzzles x 2, temperature 1.0)",
        f"{result['pass_at']['1']:.1%} at 1, {result['pass_at']['2']:.1%} at 2",
        f"completion tokens {result['mean_completion_tokens']:.0f}, 0% truncated",
        "held-out, split_seed 42, test_share 0.1",
        f"{result['plus_minus_only_share']:.0%} need only + and -",
        result["rule"],
    ):
        assert part in words


# ---- Exit codes -----------------------------------------------------------------------------


def test_only_a_launcher_silences_the_other_processes(monkeypatch, capsys):
    def fail():
        raise InputError("no")

    for variable in LAUNCH_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("RANK", "1")  # as containers export it
    assert exit_code(fail) == 2
    assert capsys.readouterr().err == "error: no\n"


def test_ctrl_c_is_one_line_with_the_command_and_exit_code_130(tmp_path):
    # What is run from a string, as dataclasses are made, is the hard case under `python -m`.
    code = "import sys; from mini_r1.cli import exit_code\n" + (
        "sys.exit(exit_code(lambda: exec('raise KeyboardInterrupt(' + repr(sys.argv[1]) + ')')))"
    )
    (tmp_path / "module.py").write_text(code)
    (tmp_path / "command").write_text(f"#!{sys.executable}\n{code}\n")
    (tmp_path / "command").chmod(0o755)
    for command, typed in (
        ([sys.executable, "-m", "module"], f"{sys.executable} -m module"),
        ([sys.executable, "module.py"], f"{sys.executable} module.py"),
        (["./command"], "./command"),
    ):
        for said, printed in (("", "interrupted"), ("paused after step 2", "paused after step 2")):
            arguments = [said, "a b"]
            done = subprocess.run(
                [*command, *arguments], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 130
            go_on = f"to go on: {typed} {shlex.join(arguments)}"
            assert done.stderr == f"{printed}; {go_on}\n"


@pytest.mark.parametrize("is_launched", [False, True])
def test_the_command_that_goes_on_shows_no_token(tmp_path, is_launched):
    code = "import signal, sys; from mini_r1.cli import exit_code\n" + (
        "sys.exit(exit_code(lambda: signal.raise_signal(signal.SIGINT)))"
    )
    launcher = (
        f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {code!r}]))"
    )
    words = ["-c", launcher if is_launched else code, "--hub_token", "secret", "--seed=1"]
    env = {**os.environ, **(dict.fromkeys(LAUNCH_VARIABLES, "0") if is_launched else {})}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.endswith("--seed=1 --hub_token '***'\n")
    assert "secret" not in done.stderr
