"""`mini-r1 ...`: thin; every command imports what it needs only when it runs.

Exit codes: 0 done, 1 failed, 2 bad input (one clear line, no traceback), 130 ended by Ctrl-C, 143
by SIGTERM, 129 by a terminal that was closed.
"""

import argparse
import difflib
import errno
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mini_r1 import BAD_INPUT, FAILED, SIGNALLED, InputError, RunFailed, __version__, visible
from mini_r1.model import EMBEDDED_BASES

if TYPE_CHECKING:
    from mini_r1.launch.machine import Machine
    from mini_r1.recipe import Recipe

STDOUT = "-"  # what --json is without a file
# How safetensors says that the disk, or a quota, is full; and torch.save that it could not write.
FULL_DISK = ("os error 28)", "os error 122)", "PytorchStreamWriter failed", "unexpected pos ")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    _refuse_unknown_command(parser, sys.argv[1:] if arguments is None else arguments)
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command not in (train, slurm):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    args.overrides = rest
    return exit_code(lambda: args.command(args))


def entry_point() -> None:
    """The console script."""
    code = main()
    gc.freeze()  # else Python looks for garbage in all of torch before it ends: half a second
    sys.exit(code)


def exit_code(command: Callable[[], None]) -> int:
    """Run a command and return its exit code.

    An InputError becomes one line on stderr and 2, a RunFailed its own words and 1, Ctrl-C one
    line and 130. Bad input is met by all processes of a launch and told by the first; what fails
    may fail in any.
    """
    from mini_r1.launch.machine import is_main_process

    try:
        command()
    except (InputError, RunFailed) as error:
        if isinstance(error, RunFailed) or is_main_process():
            print(visible(f"error: {error}"), file=sys.stderr)
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    except KeyboardInterrupt as interrupt:
        if is_main_process():
            # The terminal has written ^C, and what was there before it may be half a line.
            said = str(interrupt) or ("\n" if sys.stderr.isatty() else "") + "interrupted"
            print(f"{said}; to go on: {_command_line()}", file=sys.stderr)
        # CPython 3.11 remembers a Ctrl-C that came into code from a string, as dataclasses have it,
        # and `python -m` would die of it in the end; any other such code makes it forget.
        exec("")
        return SIGNALLED + getattr(interrupt, "number", signal.SIGINT)
    return 0


def _command_line() -> str:
    """What was typed to start this process, or the launcher that did, fit to be shown."""
    import psutil

    from mini_r1.launch.machine import launched
    from mini_r1.syntax import presentable

    parent = psutil.Process().parent() if launched() else None
    words = parent.cmdline() if parent else sys.orig_argv
    if len(words) > 1 and os.access(words[1], os.X_OK):  # a command: `python /the/path/of/it ...`
        words = words[1:]
        name = os.path.basename(words[0])
        words[0] = name if shutil.which(name) == words[0] else words[0]
    return shlex.join(presentable(words))


def train_here(recipe: "Recipe") -> None:
    """Train in this process, alone or as one of a launch.

    What is cheap to check is checked before the slow imports, and before CUDA counts the GPUs.
    """
    from mini_r1.launch.machine import (
        end_with_launcher,
        is_main_process,
        num_processes,
        processes_here,
    )
    from mini_r1.launch.plan import check_processes
    from mini_r1.lock import FolderLock
    from mini_r1.stdio import outlive_readers

    check_processes(recipe, num_processes(), processes_here())
    end_with_launcher()
    outlive_readers()
    threading.excepthook = _thread_failed
    try:
        with FolderLock(recipe.run_dir) if is_main_process() else nullcontext():
            _train(recipe)
    except InputError as error:
        raise recipe.place(error) from error
    except Exception as error:
        if _of_a_full_disk(error):
            raise RunFailed(
                f"the disk under {recipe.run_dir} is full; make room, and the same command goes on"
            ) from None
        raise


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread; that the disk is full is told once, by the main one."""
    if not _of_a_full_disk(args.exc_value):
        threading.__excepthook__(args)


def _of_a_full_disk(error: BaseException | None) -> bool:
    """Whether this came of a disk, or its quota, that is full; libraries wrap it in their ways."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(said in str(error) for said in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _train(recipe: "Recipe") -> None:
    """Train in a folder that is held."""
    from mini_r1 import quirks
    from mini_r1.launch.doctor import first_problem
    from mini_r1.launch.machine import is_main_process
    from mini_r1.launch.plan import take_gpus
    from mini_r1.run import TRACKER_FOLDERS, withdraw_stop

    if is_main_process():
        first_problem(recipe)
        withdraw_stop(recipe.run_dir)  # of an earlier attempt; from here on one is meant for this
    for variable, folder in TRACKER_FOLDERS.items():  # Trackio reads its own when it is imported
        os.environ[variable] = str((recipe.run_dir / folder).absolute())
    server_gpu = None
    if recipe.get("use_cpu"):
        quirks.quiet_cpu_imports()
    else:
        server_gpu = take_gpus(recipe)
    from mini_r1.train import run

    run(recipe, server_gpu)


# ---- Commands -------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    from mini_r1.launch.doctor import first_problem
    from mini_r1.launch.plan import launch, make_plan

    plan = make_plan(_recipe(args), _machine(args))
    if args.dry_run:
        print(plan)
        return
    if args.gpus is not None:
        raise InputError(
            "a run takes the GPUs it finds; plan for another machine with --dry-run, or set "
            "CUDA_VISIBLE_DEVICES",
            where="--gpus",
        )
    if plan.launcher:
        first_problem(plan.recipe, plan)
        launch(plan)
    else:
        train_here(plan.recipe)


def _recipe(args: argparse.Namespace) -> "Recipe":
    from mini_r1.recipe import load_recipe
    from mini_r1.syntax import take_hub_token

    return load_recipe(args.recipe, take_hub_token(args.overrides))


def doctor(args: argparse.Namespace) -> None:
    from mini_r1.launch.doctor import examine

    gc.disable()  # there is none in what is imported, and looking for it takes a fifth of the time
    try:
        examine(args.recipe, _machine(args), planned=args.gpus is not None)
    finally:
        gc.enable()


def _machine(args: argparse.Namespace) -> "Machine":
    from mini_r1.launch.machine import Machine, this_machine

    if (args.gpus is None) != (args.gpu_memory is None) and args.gpus != 0:
        raise InputError("give both, or neither for this machine", where="--gpus and --gpu-memory")
    return this_machine() if args.gpus is None else Machine(args.gpus, args.gpu_memory or 0.0)


def evaluate(args: argparse.Namespace) -> None:
    file = _output_file(args.json, "--json") if args.json not in (None, STDOUT) else None
    from mini_r1.launch.doctor import check_model

    check_model(args.model, args.recipe, args.vllm)  # before the slow imports
    from mini_r1.evaluate import describe, evaluate_model
    from mini_r1.run import write_json

    result = evaluate_model(
        args.model,
        recipe_path=args.recipe,
        num_puzzles=args.num_puzzles,
        num_samples=args.num_samples,
        temperature=args.temperature,
        seed=args.seed,
        vllm=args.vllm,
    )
    if file:
        write_json(file, result)
    print(json.dumps(result, indent=2) if args.json == STDOUT else describe(result))


def _output_file(name: str, option: str) -> Path:
    """The file to write, refused before the work is done if it cannot be written."""
    file = Path(name)
    folder = next(path for path in file.absolute().parents if path.exists())
    try:
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "not a file")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{name} cannot be written: {error.strerror}", where=option) from None
    return file


def slurm(args: argparse.Namespace) -> None:
    from mini_r1.launch.machine import Machine
    from mini_r1.launch.slurm import plan_job, submit_command
    from mini_r1.recipe import ROOT

    recipe = _recipe(args)
    job = plan_job(recipe, args.nodes, Machine(args.gpus_per_node, args.gpu_memory))
    command = submit_command(recipe, args.nodes, args.gpus_per_node, args.time)
    print(f"{job}\nsubmit      {shlex.join(command)}", flush=True)
    if args.dry_run:
        return
    if shutil.which("sbatch") is None:
        raise InputError(
            "not here; run this on a login node of the cluster, or add --dry-run", where="sbatch"
        )
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)


def pause(args: argparse.Namespace) -> None:
    from mini_r1.run import recipe_of, request_stop

    run_dir = Path(args.run)
    recipe_of(run_dir)  # refuses what is no run
    request_stop(run_dir)
    print(
        f"if it is running, {run_dir} will save and stop after its next step; "
        "the command that started it goes on from there"
    )


def play(args: argparse.Namespace) -> None:
    from mini_r1.launch.doctor import check_model

    check_model(args.model)  # before the slow imports
    from mini_r1.play import play as play_puzzle

    play_puzzle(args.model, args.nums, args.target, args.compare, args.temperature, args.seed)


def report(args: argparse.Namespace) -> None:
    from mini_r1.report.page import write_report
    from mini_r1.run import REPORT_FILE

    runs = [Path(run) for run in args.runs]
    output = _output_file(args.output, "--output") if args.output else runs[0] / REPORT_FILE
    write_report(runs, output, Path(args.reference) if args.reference else None)
    print(f"the report is {output}")


def recipes(args: argparse.Namespace) -> None:
    from mini_r1.catalog import CARD, key_rows, markdown_table, recipe_cards, recipe_table
    from mini_r1.recipe import RECIPES
    from mini_r1.stdio import outlive_readers

    if args.keys is not None:
        columns = ("key", "type = default: what it is")
        tables = [(f"{owner} keys", columns, rows) for owner, rows in key_rows(args.keys).items()]
    else:
        tables = [("recipes", ("recipe", *CARD), recipe_cards(RECIPES))]
    outlive_readers()  # `mini-r1 recipes --keys | head`
    if sys.stdout.isatty():
        for table in tables:
            _show_table(*table)
    elif args.keys is None:
        print(recipe_table(RECIPES))
    else:
        for title, columns, rows in tables:
            print(f"## {title}\n\n{markdown_table(columns, rows)}\n")
    sys.stdout.flush()


def _show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that fits the terminal; the names stay whole, to be copied."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0 and console.width >= 80, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}\n", style="bold")
    console.print(table)


def solve(args: argparse.Namespace) -> None:
    from mini_r1.countdown.solver import difficulty
    from mini_r1.countdown.solver import solve as solve_puzzle

    try:
        solution = solve_puzzle(args.nums, args.target)
        found = difficulty(args.nums, args.target)
    except ValueError as error:
        raise InputError(str(error)) from None
    if solution is None or found is None:
        print(f"{args.target} cannot be made from {args.nums}")
        return
    print(f"{solution} = {args.target}")
    print(f"{found.solutions} solutions; at least {found.operator_kinds} kinds of operators")


def data_build(args: argparse.Namespace) -> None:
    from mini_r1.countdown.puzzles import PuzzleSpace, PuzzleSpaceError, generate
    from mini_r1.data import write_puzzles

    try:
        space = PuzzleSpace(
            tuple(args.num_numbers), tuple(args.number_range), tuple(args.target_range)
        )
        puzzles = list(generate(args.num_puzzles, args.seed, space))
    except PuzzleSpaceError as error:
        raise InputError(str(error), where=f"--{error.name.replace('_', '-')}") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    write_puzzles(puzzles, Path(args.output))
    print(f"{len(puzzles)} puzzles in {args.output}")


def data_check(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from mini_r1.data import audit, load_rows, puzzles_of
    from mini_r1.recipe import TaskConfig

    train, heldout = (
        puzzles_of(row.item for row in rows)
        for rows in load_rows(
            TaskConfig(
                dataset_id_or_path=args.source, dataset_split=args.split, columns=args.columns
            )
        )
    )
    console = Console(stderr=True)
    bar = track(train, "solving", console=console, transient=True, disable=not console.is_terminal)
    print(json.dumps(audit(bar, heldout), indent=2))


def sweep(args: argparse.Namespace) -> None:
    from mini_r1.report.results import write_results
    from mini_r1.sweep import load_sweep, run_sweep

    loaded = load_sweep(Path(args.sweep))
    run_sweep(loaded, args.jobs)
    write_results(loaded)
    print(f"results in {loaded.results}")


def base_build(args: argparse.Namespace) -> None:
    from mini_r1.bases.cold_start import build_base

    build_base(args.name, Path(args.output or args.name))


def base_sft(args: argparse.Namespace) -> None:
    from mini_r1 import quirks

    quirks.quiet_cpu_imports()
    from mini_r1.bases.sft import teach

    teach(args.model, args.recipe, Path(args.output), args.num_traces)


def model_convert(args: argparse.Namespace) -> None:
    from mini_r1.bases.gguf import convert

    convert(Path(args.file), Path(args.output))


# ---- Arguments ------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mini-r1",
        description="See reinforcement learning teach a language model to reason, on the "
        "Countdown number game.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mini-r1 {__version__}")
    commands = _commands(parser)

    command = _command(
        commands, "train", train, "run a recipe: evaluate, train with GRPO, evaluate again"
    )
    command.add_argument(
        "recipe", help="a YAML recipe; any of its keys can be overridden with --key value"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="only say what would run where, and whether it fits"
    )
    _machine_arguments(command)

    command = _command(commands, "doctor", doctor, "will it run here, and if not, what to change")
    command.add_argument(
        "recipe", nargs="?", help="a YAML recipe; without one, only the installation is examined"
    )
    _machine_arguments(command)

    command = _command(
        commands, "eval", evaluate, "held-out success of a run or a model, with its 95 %% interval"
    )
    command.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run folder, tiny_base, a model folder, or a hub id"
    )
    command.add_argument(
        "--recipe", help="recipe that says puzzles and prompt; a run and tiny_base bring their own"
    )
    command.add_argument(
        "--num-puzzles", type=_positive, help="held-out puzzles (default: the recipe's)"
    )
    command.add_argument(
        "--num-samples", type=_positive, help="completions per puzzle (default: the recipe's)"
    )
    command.add_argument(
        "--temperature", type=float, help="sampling temperature (default: the recipe's)"
    )
    command.add_argument(
        "--vllm", action="store_true", help="generate with vLLM, which is much faster on a GPU"
    )
    command.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    command.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="all of the result: into this file, or without one on stdout instead of the words",
    )

    command = _command(
        commands, "report", report, "one HTML page about a run, or about several side by side"
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, finished or not")
    command.add_argument(
        "--output", metavar="FILE", help="default: report.html in the (first) run's folder"
    )
    command.add_argument(
        "--reference",
        metavar="CSV",
        help="a published curve to lay under the charts; columns step, success, tokens, ...",
    )

    command = _command(
        commands,
        "recipes",
        recipes,
        "every recipe: hardware, time, expected result, measured or not",
    )
    command.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="instead: every key that a recipe may have, or those with PATTERN in their name",
    )

    command = _command(commands, "slurm", slurm, "train a recipe on a SLURM cluster")
    command.add_argument(
        "recipe", help="a YAML recipe; any of its keys can be overridden with --key value"
    )
    command.add_argument(
        "--nodes",
        type=_positive,
        default=1,
        help="with vllm_mode: server, the last of several serves (default: 1)",
    )
    command.add_argument("--gpus-per-node", type=_not_negative, default=0, help="default: 0")
    command.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="GB",
        default=80.0,
        help="of each GPU, for the check (default: 80)",
    )
    command.add_argument(
        "--time",
        metavar="LIMIT",
        help="of sbatch; account, partition and the like come from SBATCH_* variables",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="only check and show the job; needs no SLURM"
    )

    command = _command(commands, "pause", pause, "ask a running training to save and stop")
    command.add_argument("run", metavar="RUN", help="its run folder")

    command = _command(
        commands, "play", play, "watch a model think about a puzzle, and hear the judge"
    )
    command.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run folder, tiny_base, a model folder, or a hub id"
    )
    command.add_argument(
        "--nums",
        type=int,
        nargs="+",
        help="two to six numbers (default: a held-out puzzle is dealt)",
    )
    command.add_argument("--target", type=int)
    command.add_argument(
        "--compare", action="store_true", help="beside the model that the run started from"
    )
    command.add_argument(
        "--temperature", type=float, help="sampling temperature (default: the recipe's)"
    )
    command.add_argument(
        "--seed", type=int, help="of dealing and sampling (default: another one every time)"
    )

    command = _command(commands, "solve", solve, "solve a puzzle exactly")
    command.add_argument("nums", type=int, nargs="+", help="two to six numbers")
    command.add_argument("--target", type=int, required=True)

    data = _commands(_command(commands, "data", None, "make or audit puzzles"))
    command = _command(data, "build", data_build, "make solvable puzzles, without duplicates")
    command.add_argument("--num-puzzles", type=_positive, required=True)
    command.add_argument(
        "--seed",
        type=int,
        default=42,
        help="the same seed gives the same bytes anywhere (default: 42)",
    )
    command.add_argument(
        "--num-numbers",
        type=int,
        nargs="+",
        default=[3, 4],
        help="numbers per puzzle (default: 3 4)",
    )
    command.add_argument(
        "--number-range", type=int, nargs=2, default=[1, 99], metavar=("LOW", "HIGH")
    )
    command.add_argument(
        "--target-range", type=int, nargs=2, default=[10, 99], metavar=("LOW", "HIGH")
    )
    command.add_argument(
        "--output", required=True, metavar="FILE", help=".jsonl or .parquet; columns nums, target"
    )
    command = _command(
        data, "check", data_check, "audit a data set: solvable, duplicates, difficulty"
    )
    command.add_argument("source", metavar="FILE_OR_HUB_ID")
    command.add_argument(
        "--split", default="train", help="the part of a folder or hub data set (default: train)"
    )
    command.add_argument(
        "--columns", type=_mapping, help="as in a recipe: '{nums: numbers, target: answer}'"
    )

    command = _command(
        commands,
        "sweep",
        sweep,
        "run a recipe under several settings and seeds, and write tables and curves",
    )
    command.add_argument("sweep", help="a YAML file such as recipes/sweeps/ablations.yaml")
    command.add_argument(
        "--jobs",
        type=_positive,
        default=1,
        help="runs at a time, each on its share of the cores (default: 1)",
    )

    base = _commands(_command(commands, "base", None, "make a model to start from"))
    command = _command(
        base, "build", base_build, "remake an embedded base from nothing (less than an hour)"
    )
    command.add_argument(
        "name",
        nargs="?",
        default=EMBEDDED_BASES[0],
        choices=EMBEDDED_BASES,
        help="default: %(default)s",
    )
    command.add_argument("--output", metavar="DIR", help="a new folder (default: the name)")
    command = _command(
        base, "sft", base_sft, "teach a model to search in plain English, before a recipe trains it"
    )
    command.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run folder, a model folder, or a hub id"
    )
    command.add_argument(
        "--recipe", required=True, help="recipe that says puzzles, prompt and length"
    )
    command.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    command.add_argument(
        "--num-traces",
        type=_positive,
        default=8000,
        help="searches to learn from (default: 8000)",
    )

    model = _commands(_command(commands, "model", None, "bring a model along"))
    command = _command(
        model, "convert", model_convert, "make a folder that can be trained of a GGUF file"
    )
    command.add_argument("file", metavar="FILE.gguf")
    command.add_argument("output", metavar="OUTPUT", help="a new folder")
    return parser


def _commands(parser: argparse.ArgumentParser):
    """Give a parser commands; without one it prints its help."""
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(command=lambda _: parser.print_help(), commands=commands.choices)
    return commands


def _command(commands, name, function, help):
    description = help[0].upper() + help[1:].replace("%%", "%") + "."
    parser = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
    parser.set_defaults(command=function, commands={})
    return parser


def _refuse_unknown_command(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    for word in arguments:
        commands = parser.get_default("commands")
        if not commands or word.startswith("-"):
            return
        if word not in commands:
            near = difflib.get_close_matches(word, commands, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(commands)}"
            parser.exit(BAD_INPUT, f"error: no command '{word}'; {advice}\n")
        parser = commands[word]


def _machine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        type=_not_negative,
        help="plan for a machine with so many GPUs (default: this one)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="GB",
        help="of each of them, as the card says: 24, 80, ...",
    )


def _mapping(text: str) -> dict:
    from mini_r1.files import load_yaml

    try:
        value = load_yaml(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("want a mapping such as '{nums: numbers}'")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("want at least 0")
    return value


def _size(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("want more than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("want at least 1")
    return value
