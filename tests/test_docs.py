"""What the documents say is so.

Their links and paths exist, their commands parse, their names are names, and every number has its
source. tests/integration/test_documented_commands.py runs the commands.
"""

import csv
import json
import re
import runpy
import shlex
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean

import nbformat
import pytest

from mini_r1 import FAILED
from mini_r1.bases.cold_start import COLD_STARTS
from mini_r1.bases.search import tries
from mini_r1.catalog import recipe_table
from mini_r1.cli import _parser
from mini_r1.countdown.solver import difficulty
from mini_r1.data import load_split
from mini_r1.launch.machine import Machine
from mini_r1.launch.plan import make_plan
from mini_r1.metrics import LOGP_DIFFERENCE, METRICS
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import all_keys, load_recipe
from mini_r1.report.page import ORIGINAL_MILESTONES
from mini_r1.report.results import SMOOTHING
from mini_r1.rewards import REWARDS
from tests.test_rewards import EXPLOITS

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "mini_r1"
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
GUIDE, METHOD = ROOT / "docs" / "guide.md", ROOT / "docs" / "method.md"
NOTEBOOK = ROOT / "notebooks" / "mini_r1.ipynb"
DOCUMENTS = [README, CHINESE, GUIDE, METHOD, NOTEBOOK]
CONTRIBUTING, CHANGELOG = ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"
ARCHITECTURE, LOG = ROOT / "docs" / "architecture.md", ROOT / "docs" / "log.md"
RELIABILITY, BENCHMARKS = ROOT / "docs" / "reliability.md", ROOT / "docs" / "benchmarks.md"
FOR_DEVELOPERS = [CONTRIBUTING, CHANGELOG, ARCHITECTURE, LOG, RELIABILITY, BENCHMARKS]
WITH_THE_DEVELOPERS = [*DOCUMENTS, *FOR_DEVELOPERS]
of_documents = pytest.mark.parametrize("document", WITH_THE_DEVELOPERS, ids=lambda path: path.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(
    r"\.?[\w.*-]+(/[\w.*-]*)+|[\w.*-]+\.(md|yaml|json|html|py|txt|csv|ipynb|safetensors|sbatch)"
)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?")
# Paths of a run: the test that runs the commands looks for them.
OF_A_RUN = re.compile(
    r"runs/|eval/|samples/|tensorboard/|checkpoint-|config\.json|model\.safetensors|report\.html"
    r"|summary\.json|trainer_state\.json|manifest\.json|recipe\.yaml|logs/vllm\.log"
    r"|failed-batch\.json"
)
LOGGED = {metric.key for metric in METRICS.values()} | {LOGP_DIFFERENCE}
OWN_RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def text_of(document):
    if document.suffix == ".ipynb":
        cells = nbformat.read(document, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return document.read_text(encoding="utf-8")


def blocks(document, wanted):
    return [block for language, block in FENCE.findall(text_of(document)) if language == wanted]


def inline(document):
    return CODE.findall(FENCE.sub("", text_of(document)))


def command_lines(document):
    """The lines of the shell blocks, without comments and with the placeholder RECIPE filled in."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+# .*", "", line) for line in lines]
    return [re.sub(r"\bRECIPE(?= |$)", "recipes/tiny-cpu.yaml", line) for line in lines]


def write_code_blocks(document, folder):
    """Write the files that are shown: those blocks begin with the file's name."""
    for block in blocks(document, "python") + blocks(document, "yaml"):
        if name := re.match(r"# (\w+\.\w+)\n", block):
            (folder / name[1]).write_text(block, encoding="utf-8")


# ---- Paths ----------------------------------------------------------------------------------


@of_documents
def test_links_lead_somewhere(document):
    links = [link for link in LINK.findall(text_of(document)) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    assert links


@of_documents
def test_paths_exist(document):
    elsewhere = {"Jiayi-Pan/Countdown-Tasks-3to4"} | LOGGED  # names with slashes that are no paths
    for path in (text.split(" ")[0] for text in inline(document)):
        if PATH.fullmatch(path) and not OF_A_RUN.match(path) and path not in elsewhere:
            assert any((folder / path).exists() for folder in (ROOT, document.parent)), path


def test_the_architecture_names_every_module_and_no_other():
    text = text_of(ARCHITECTURE)
    rows = re.findall(r"^\| \[([\w/.]+)\]\(\.\./src/mini_r1/([\w/.]+)\) \|", text, re.MULTILINE)
    assert [name for name, link in rows if name != link] == []
    names = [name for name, _ in rows]
    modules = {path.relative_to(SRC).as_posix() for path in SRC.rglob("[!_]*.py")}
    of_packages = [module for module in modules for name in names if module.startswith(f"{name}/")]
    assert sorted([name for name in names if name.endswith(".py")] + of_packages) == sorted(modules)
    # Elsewhere in the text a module goes by its path, or by the end of it.
    for name in re.findall(r"[\w/]+\.py\b", re.sub(r"\[[^]]*\]\([^)]*\)", "", text)):
        assert any(f"/{module}".endswith(f"/{name}") for module in modules), name


def table_of_plans():
    return runpy.run_path(str(ROOT / "scripts" / "plan_table.py"))["table"]()


def test_the_table_of_plans_is_what_dry_runs_say():
    assert table_of_plans() in text_of(GUIDE), "run python scripts/plan_table.py --write"


def test_every_promise_has_its_test():
    text = text_of(RELIABILITY)
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert [name for name in named if f"def {name}(" not in tests] == []
    assert len(named) > 30


# ---- Commands -------------------------------------------------------------------------------


@of_documents
def test_commands_can_be_given(document, own_folder):
    write_code_blocks(document, own_folder)
    variables = {}
    for command in (part for line in command_lines(document) for part in line.split(" && ")):
        if assigned := re.fullmatch(r"(\w)=(\S+)", command):
            variables[assigned[1]] = assigned[2]
        else:
            command = re.sub(r"\$(\w)\b", lambda match: variables[match[1]], command)
            check_command(shlex.split(command))
    for text in inline(document):
        program, _, rest = text.partition(" ")
        if program == "make" and rest:
            check_command(shlex.split(text))
        elif program == "mini-r1" and rest:  # names a command, not always all of its arguments
            words = rest.split()
            command = words[: 2 if words[0] in ("base", "data", "model") else 1]
            with pytest.raises(SystemExit) as end:
                _parser().parse_known_args([*command, "--help"])
            assert end.value.code == 0, text


def check_command(words):
    program, *rest = words or ["#"]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, assigns, _ = word.partition("=")
            line = rf"^{name} \?=" if assigns else rf"^{name}:"
            assert re.search(line, makefile, re.MULTILINE), words
    elif program.endswith("mini-r1"):
        args, overrides = _parser().parse_known_args(rest)
        assert not overrides or rest[0] in ("train", "slurm"), words
        if getattr(args, "recipe", None):
            load_recipe(ROOT / args.recipe, overrides)
    elif program == ".venv/bin/pip":
        extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        for word in rest[1:]:
            if word.startswith(".["):
                assert f"\n{word[2:-1]} = [" in extras, words
            elif not word.startswith("-"):
                assert (ROOT / word).exists() or f"\n{word}==" in pinned, words
    elif program == "accelerate":
        assert (ROOT / rest[rest.index("--config_file") + 1]).exists(), words
        assert (ROOT / next(word for word in rest if word.endswith(".py"))).exists(), words
        load_recipe(ROOT / rest[rest.index("--config") + 1])
    elif program == "sbatch":
        script, recipe_path = (word for word in rest if not word.startswith("-"))
        assert (ROOT / script).exists(), words
        load_recipe(ROOT / recipe_path)
    else:  # nothing of ours in them
        assert program in ("#", "export", "tail", ".venv/bin/python"), words


# ---- Names ----------------------------------------------------------------------------------


def test_the_metrics_are_called_as_trl_calls_them():
    import trl.trainer.grpo_trainer

    source = Path(trl.trainer.grpo_trainer.__file__).read_text(encoding="utf-8")
    for name in LOGGED:
        if not name.startswith(("behaviors/", "rewards/")):
            assert f'"{name}"' in source, name


def test_every_run_with_vllm_has_the_alarm_that_readers_are_sent_to():
    """TRL logs it with its importance sampling only, which the original did without."""
    assert f"`{LOGP_DIFFERENCE}` grows" in text_of(README)
    uncorrected = [
        path for path in OWN_RECIPES if "importance_sampling_correction" in one_line(path)
    ]
    assert uncorrected
    source = (SRC / "train.py").read_text(encoding="utf-8")
    with_vllm = re.search(r"^    if trainer\.use_vllm:\n((?: {8}.*\n)+)", source, re.MULTILINE)
    assert with_vllm
    assert "trainer.add_callback(StaleWeights(" in with_vllm[1]


KEYS = {name: key for part in all_keys().values() for name, key in part.items()}
NAMES_OF_OURS = {
    *(KEYS | REWARDS | PROMPT_TEMPLATES | COLD_STARTS),
    *LOGGED,
    *KEYS["report_to"].choices,
    *re.findall(r"^    (\w+)", _parser().format_help(), re.MULTILINE),  # commands
    "generated",
}
NAMES_OF_OTHERS = {
    *("nums", "target", "verified", "memory", "dapo"),  # columns, a behaviour, a line, a loss
    *("transformers", "make", "pip", "scancel"),
    *("task", "slow"),  # a variable, a mark of tests
}


@of_documents
def test_keys_and_names_are_real(document):
    """What looks like a key of recipes, a reward, template, base, metric or command is one."""
    for text in inline(document):
        name = text.partition(":")[0]
        if re.fullmatch(r"(?!test_)[a-z][a-z0-9_]+", name):
            assert name in NAMES_OF_OURS | NAMES_OF_OTHERS, text
        elif re.fullmatch(r"[a-z][a-z0-9_]+\*", name):
            assert any(key.startswith(name[:-1]) for key in NAMES_OF_OURS), text


# ---- Numbers --------------------------------------------------------------------------------
#
# Of what users read. docs/log.md and CHANGELOG.md are records themselves, docs/architecture.md has
# no figures, and the minutes of CONTRIBUTING.md depend on the machine.

# Numbers that are part of a name.
NAMES = (
    r"(?i:deepseek-r1(-zero)?|mini[-_]r1|Qwen-?[\d.]+(-3B)?(-Instruct)?|ZeRO-[23]|\bR1\b|\b3B\b"
    r"|Apache-2\.0|Countdown-Tasks-3to4)"
)
# The usual interval, which evaluate.py computes; and the ends of the scale of a share, which are
# what "near" is about.
CONVENTIONAL = r"\b95 % interval|\bnear [01]\b"
IN_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 16: "sixteen"}
# Of the puzzles that need * or /, those that the hard base's search comes to; counted below.
SEARCH_REACHES = 0.39

ORIGINAL_RECIPE = ROOT / "recipes" / "grpo-qwen-2.5-3b-deepseek-r1-countdown.yaml"
RECIPE_FOR_8 = ROOT / "recipes" / "grpo-qwen-2.5-3b-8gpu.yaml"
HARD_RECIPE = ROOT / "recipes" / "tiny-cpu-hard.yaml"
SUCCESS = r"expect: training success (\d+ %), said the original"
UNSTABLE = "learning_rate: 5.0e-7 # 1e-6 with beta 0.04 was unstable after about 150 steps"


class Claim(str):
    """A passage of a document; computed() or quoted() has seen where its numbers are from."""


def computed(template, *values):
    """A claim whose numbers are the values; none is typed."""
    typed = re.sub(r"\{.*?\}", "", without_names(template))
    assert not NUMBER.search(typed), f"where is this from? {template}"
    return Claim(template.format(*values))


def quoted(text, source, *passages):
    """A claim whose numbers stand in the passages, and these in the source, as they are.

    A source outside of the repository is a URL, which the claim gives to the reader.
    """
    if isinstance(source, str):
        assert source.startswith("https://")
        assert source in text
    else:
        content = one_line(source)
        assert [passage for passage in passages if passage not in content] == [], source
        assert figures(without_names(text)) <= figures(" ".join(passages)), text
    return Claim(text)


def figures(text):
    """The values of a text's numbers, also of those in words."""
    in_digits = {float(number.replace(",", "")) for number in NUMBER.findall(text)}
    words = re.findall("[a-z]+", text)
    return in_digits | {value for value, word in IN_WORDS.items() if word in words}


def without_names(text):
    return " ".join(re.sub(f"{NAMES}|{CONVENTIONAL}", "", text).split())


def one_line(path):
    """The text of a file as one line, also where it goes on from one comment to the next."""
    return " ".join(re.sub("^# ", "", path.read_text(encoding="utf-8"), flags=re.M).split())


def parsed(path, pattern):
    """What the groups of a pattern find in a file."""
    match = re.search(pattern, one_line(path))
    assert match, f"no {pattern} in {path}"
    return match.groups()


def card(path):
    """What a recipe says at its head: where it runs, what it takes, what to expect."""
    return dict(re.findall(r"^# (runs on|takes|expect): (.+)$", path.read_text("utf-8"), re.M))


def records(sweep):
    """Of the recipe itself, seed by seed."""
    files = sorted((ROOT / "docs" / "records" / sweep / "recipe").glob("seed-*.json"))
    assert len(files) == 3
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def original_run():
    """The run `main` of the original recipe, as published."""
    with (ROOT / "docs" / "records" / "original-3b-runs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("run") == "main"]
    return [{key: float(value) for key, value in row.items()} for row in rows]


def published_successes():
    """Of each of two files: how many there are, how many of them use only + and -."""
    pattern = r"([\d,]+) of ([\d,]+) successes in the one and ([\d,]+) of ([\d,]+) in the other"
    few, all_, few_too, all_too = (int(n.replace(",", "")) for n in parsed(LOG, pattern))
    return (all_, all_too), (few, few_too)


def minutes(runs):
    """From the evaluation before to the one after, on average; without what loading takes."""
    seconds = [
        run["summary"]["train_seconds"] + run["before"]["seconds"] + run["after"]["seconds"]
        for run in runs
    ]
    return fmean(seconds) / 60


def percent(value, digits=1):
    return f"{100 * value:.{digits}f} %"


def parameters():
    manifest = SRC / "bases" / "tiny_base" / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8"))["parameters"]


def test_the_recipes_say_what_was_measured():
    for path in (ROOT / "recipes" / "tiny-cpu.yaml", HARD_RECIPE):
        runs, said = records(path.stem), card(path)
        ends = (fmean(run[when]["success"] for run in runs) for when in ("before", "after"))
        shown = " -> ".join(percent(end, 0) for end in ends)
        seeds = IN_WORDS[len(runs)]
        assert said["expect"] == f"held-out success {shown} (measured, {seeds} seeds)"
        assert int(said["takes"].removesuffix(" minutes")) == pytest.approx(minutes(runs), rel=0.1)
        cores = {run["hardware"]["cpu_count"] for run in runs}
        assert cores == {int(said["runs on"].removesuffix(" CPU cores"))}


def test_the_recipes_say_what_was_published():
    said, pattern = card(ORIGINAL_RECIPE), r"(\d+) steps, (\d+) h, (\d+ %) of the training"
    steps, hours, success = parsed(ORIGINAL_RECIPE, pattern)
    assert load_recipe(ORIGINAL_RECIPE).training["max_steps"] == int(steps)
    assert said["takes"] == f"{hours} hours on H100, said the original"
    assert said["expect"].startswith(f"training success {success}, said the original")

    fastest, slowest = parsed(RECIPE_FOR_8, r"(\d+)-(\d+) s per step")
    said, steps = card(RECIPE_FOR_8), load_recipe(RECIPE_FOR_8).training["max_steps"]
    hours, seconds = re.fullmatch(r"(\d+) hours at .+'s (\d+) s per step", said["takes"]).groups()
    assert int(fastest) < int(seconds) < int(slowest)
    assert round(steps * int(seconds) / 3600) == int(hours)
    success = percent(ORIGINAL_MILESTONES["success"][steps], 0)
    assert said["expect"].startswith(f"training success {success} there at step {steps}")


def test_the_recipes_say_what_is_predicted():
    pattern = r"about ([\d.]+) hours, predicted \((\d+)-(\d+) s per step on an? .+\)"
    predicted = [path for path in OWN_RECIPES if "predicted (" in card(path).get("takes", "")]
    for path in predicted:
        hours, fastest, slowest = map(float, re.fullmatch(pattern, card(path)["takes"]).groups())
        steps = load_recipe(path).training["max_steps"] / 3600
        assert fastest * steps <= hours <= slowest * steps + 1, path  # evaluations come on top
        assert "Not run by us" in one_line(path), path
    assert len(predicted) > 3


@pytest.mark.parametrize("path", OWN_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_the_gpus_and_the_disk_that_it_says(path):
    recipe, said = load_recipe(path), card(path)["runs on"]
    if "GPU" not in said:
        return
    number, memory = map(int, re.match(r"(\d+) GPUs? of (\d+) GB", said).groups())
    assert recipe.task.num_gpus == number
    plan = str(make_plan(recipe, Machine(number, memory)))
    if most := re.search(r"at most (\d+) GB with the trained model", plan):
        (disk,) = map(int, parsed(path, r"[Ii]t wants about (\d+) GB of disk"))
        assert disk == pytest.approx(int(most[1]), rel=0.1)


def test_the_models_and_data_of_the_hub_are_pinned():
    for path in OWN_RECIPES:
        recipe = load_recipe(path)
        for name, revision in (
            (recipe.model["model_name_or_path"], recipe.model.get("model_revision")),
            (recipe.task.dataset_id_or_path, recipe.task.dataset_revision),
        ):
            of_hub = "/" in name and not name.startswith(".")
            assert bool(re.fullmatch("[0-9a-f]{40}", revision or "")) == of_hub, (path, name)


def of_readme():
    """What README.md says in numbers, from its sources; the same for the other documents below."""
    runs = records("tiny-cpu")
    first, summary = runs[0], runs[0]["summary"]
    yield computed("{}", recipe_table(ROOT / "recipes"))
    cores = first["hardware"]["cpu_count"]
    yield computed("On a machine with {} cores this took {:.0f} minutes once", cores, minutes(runs))
    yield computed(
        "held-out success {:.1%} -> {:.1%} (95 % interval {:.1%} to {:.1%}; {} puzzles x {}, "
        "temperature {})",
        *(summary["success_before"], summary["success_after"], *summary["ci95_after"]),
        *(summary["num_puzzles"], summary["num_samples"], summary["temperature"]),
    )
    yield computed(
        "completion tokens {:.0f} -> {:.0f} training {} steps in {:.1f} minutes",
        *(summary["mean_completion_tokens_before"], summary["mean_completion_tokens_after"]),
        *(summary["steps"], summary["train_seconds"] / 60),
    )
    curve = [fmean(batch) for batch in zip(*(run["curve"]["success"] for run in runs), strict=True)]
    yield computed("from {:.2f} to {:.2f}]", curve[0], fmean(curve[-SMOOTHING:]))
    seeds = [run["recipe"]["seed"] for run in runs]
    yield computed("The lines above are seed {}: all numbers must be used", seeds[0])
    share = percent(summary["plus_minus_only_share"], 0)
    yield computed("{} of the puzzles need only + and -", share)
    low, high = (100 * end for end in summary["ci95_before"])
    yield computed("before, the 95 % interval was {:.1f} to {:.1f} %", low, high)
    ends = [100 * run["after"]["success"] for run in runs]
    template = "over seeds {}, {} and {}, which end at {:.1f}, {:.1f} and {:.1f} % held-out"
    yield computed(template, *seeds, *ends)
    for when in ("before", "after"):
        (example,) = [each for each in first[when]["examples"] if each["target"] == 68]
        nums = ", ".join(map(str, example["nums"]))
        yield computed("*make {} using each of {} once*", example["target"], nums)
        for line in filter(None, example["completion"].replace("</think>", "").split("\n")):
            yield computed("{}", line)
    true = (
        100 * fmean(run[when]["behaviors"]["true_arithmetic"] for run in runs)
        for when in ("before", "after")
    )
    yield computed("(true arithmetic {:.1f} -> {:.1f} %)", *true)
    (python,) = parsed(ROOT / "pyproject.toml", r'requires-python = ">=([\d.]+)"')
    yield computed("You need Python {} or newer", python)
    tested = ROOT / "tests" / "integration" / "test_documented_commands.py"
    yield computed("and {} GB of disk", *parsed(tested, r"assert size < (\d+)e9"))
    yield quoted(
        "1 process, 2 processes (DDP, ZeRO-2, ZeRO-3, whose weights agree to 1e-5), LoRA, QLoRA "
        "in real 4 bit",
        ROOT / "tests" / "integration" / "test_distributed.py",
        "test_one_process_two_and_two_sharded_learn_the_same",
        "trained[launcher]) < 1e-5, launcher",
        "test_qlora_in_real_four_bit",
    )
    (seconds,) = parsed(ROOT / "scripts" / "slurm" / "train.sbatch", r"--signal=B:USR1@(\d+)")
    yield computed("{:g} minutes before the time limit", int(seconds) / 60)
    nodes = parsed(ROOT / "tests" / "slurm" / "minislurm.sh", r"NODES=\$\{NODES:-(\d+)\}")
    yield computed("a real SLURM of {} nodes", *nodes)
    text = "the original found 1e-6 unstable after 150 steps, and used 5e-7"
    yield quoted(text, ORIGINAL_RECIPE, UNSTABLE)


def of_guide():
    text = "exits with 0, 1 (failed) or 2 (bad input"
    yield quoted(text, SRC / "cli.py", "Exit codes: 0 done, 1 failed, 2 bad input")
    yield quoted("Ctrl-C ends it with 130", SRC / "cli.py", "130 ended by Ctrl-C")
    yield computed("with exit code {} and one line", FAILED)
    yield quoted("group apart for 20 steps", SRC / "health.py", "SILENT_STEPS = 20")
    text = "A recipe written for TRL 0.14 is refused"
    yield quoted(text, SRC / "recipe.py", "written for TRL 0.14, this is")
    yield computed("{}", table_of_plans())


def of_method():
    def exploit(name):
        completion, nums, target, *_ = EXPLOITS[name]
        return re.search("<answer>(.+)</answer>", completion)[1], nums, target

    power, decimal = exploit("power"), exploit("decimal made of two integers")
    yield computed("accept `{}` for {} -> {}, or `{}` for {} -> {};", *power, *decimal)
    yield computed("holds {} such cases", len(EXPLOITS))
    yield computed("is a Qwen2 of {:,} parameters", parameters())

    task, runs = load_recipe(HARD_RECIPE).task, records("tiny-cpu-hard")
    ends = (*task.num_numbers, *task.number_range, *task.target_range)
    yield computed("({} and {} numbers of {}-{}, targets {}-{})", *ends)
    yield computed("It takes about {}:", card(HARD_RECIPE)["takes"])
    first, *others = runs
    before, after, seeds = first["before"], first["after"], [run["recipe"]["seed"] for run in runs]

    def row(name, *groups):
        shares = (100 * share for each in groups for share in (each["success"], *each["ci95"]))
        cells = "{:.1f} % ({:.1f} to {:.1f})"
        return computed(f"| {{}} | {cells} | {cells} |", name, *shares)

    yield row("all puzzles", before, after)
    by_kind = [each["by_difficulty"]["plus_minus_only"] for each in (before, after)]
    share = percent(after["plus_minus_only_share"], 0)
    name = f"those that + and - alone can solve ({share})"
    yield row(name, *(groups["true"] for groups in by_kind))
    yield row("those that need * or /", *(groups["false"] for groups in by_kind))
    k = after["num_samples"]
    passed = [percent(each["pass_at"][str(k)]) for each in (before, after)]
    yield computed("| at least one of {} samples right (pass@{}) | {} | {} |", k, k, *passed)
    counts = (after["num_puzzles"], k, after["temperature"])
    yield computed("(Seed {}; {} puzzles x {}, temperature {}", seeds[0], *counts)
    apart = [abs(run["after"]["success"] - after["success"]) for run in others]
    assert max(apart) < 0.01
    yield computed("has seeds {} and {}, which end within a point of it", *seeds[1:])
    assert after["success"] > before["pass_at"][str(k)]
    yield computed("One sample after training solves more than {} did before", IN_WORDS[k])
    bound = IN_WORDS[COLD_STARTS["tiny_base_hard"].max_tries]
    reached = percent(SEARCH_REACHES, 0)
    yield computed("the search comes to {} of them within its {} tries", reached, bound)

    training, run, marks = load_recipe(RECIPE_FOR_8).training, original_run(), ORIGINAL_MILESTONES
    assert "(zzlzero/mini-R1) published a run of this shape" in one_line(RECIPE_FOR_8)
    (processes,) = map(int, parsed(RECIPE_FOR_8, r"--num_processes (\d+)"))
    gpus = int(card(RECIPE_FOR_8)["runs on"].split(" ")[0])
    each = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    (stride,) = {later["step"] - row["step"] for row, later in pairwise(run)}
    template = "({} training GPUs and {} for vLLM, {} completions per step, one row per {:g} steps)"
    yield computed(template, processes, gpus - processes, processes * each, stride)
    yield computed(
        "goes from {} to {} at step {} and {} at step {}, while completions shrink from {:.0f} "
        "tokens to {}.",
        percent(run[0]["equation_reward"], 0),
        *(percent(marks["success"][200], 0), 200, percent(marks["success"][1200], 0), 1200),
        *(run[0]["completion_tokens"], marks["tokens"][1200]),
    )
    every, few = published_successes()
    template = (
        "Of the {:,} successful completions published there ({:,} and {:,}), {} use only + and - "
        "({:,} and {:,})"
    )
    yield computed(template, sum(every), *every, percent(sum(few) / sum(every), 0), *few)
    yield computed("the celebrated {}", *parsed(ORIGINAL_RECIPE, SUCCESS))


def of_notebook():
    text = text_of(NOTEBOOK)
    nums, target = parsed(NOTEBOOK, r"solve\(\[([\d, ]+)\], (\d+)\)")
    yield computed("Try {} with {} and {}", target, *nums.rsplit(", ", 1))
    for number, title in re.findall(r"^## (\d)\. (.+)$", text, re.MULTILINE):
        topic = title.partition(" in ")[0]
        yield computed("{} {}", number, topic if topic.isupper() else topic[0].lower() + topic[1:])
    paper = "https://arxiv.org/abs/2402.03300"
    yield quoted(f"[DeepSeekMath]({paper}), section 4.1", paper)
    step = re.search(r"^(\d)\. \*\*Advantage", text, re.MULTILINE)[1]
    yield computed("Step {} in code", step)
    yield computed("a Qwen2 of {:.1f} million parameters", parameters() / 1e6)
    yield quoted("weights in 4 bits", NOTEBOOK, "load_in_4bit=True")
    qlora = ROOT / "recipes" / "grpo-qwen-2.5-3b-qlora.yaml"
    (billions,) = re.search(r"-(\d+)B-", load_recipe(qlora).model["model_name_or_path"]).groups()
    yield computed("the same lines train {} billion parameters", billions)
    yield computed("On one {}", card(qlora)["runs on"].removeprefix("1 "))
    yield computed("{}, which are the original's", card(ORIGINAL_RECIPE)["runs on"])

    record, run, marks = records("tiny-cpu")[0], original_run(), ORIGINAL_MILESTONES
    summary = record["summary"]
    yield computed(
        "goes from {} to {} held-out success in {} steps and {:.0f} minutes",
        *(percent(summary["success_before"]), percent(summary["success_after"])),
        *(summary["steps"], minutes([record])),
    )
    tokens = (summary["mean_completion_tokens_before"], summary["mean_completion_tokens_after"])
    yield computed("from {:.0f} to {:.0f} tokens, since", *tokens)
    first, late = run[0], run[-300:]
    learned = next(step for step, share in marks["format"].items() if share > 0.85)
    yield computed("The format is learned first, within some {} steps", learned)
    yield computed(
        "from {} to about {} at step {}, and slowly on to about {}",
        *(percent(first["equation_reward"], 0), percent(marks["success"][200], 0), 200),
        percent(fmean(row["equation_reward"] for row in late), 0),
    )
    tokens = (first["completion_tokens"], fmean(row["completion_tokens"] for row in late))
    yield computed("from {:.0f} to about {:.0f} tokens", tokens[0], round(tokens[1], -1))
    every, few = published_successes()
    yield computed("{} of the published", percent(sum(few) / sum(every), 0))
    yield computed("So {} is about", *parsed(ORIGINAL_RECIPE, SUCCESS))
    yield quoted(
        "the original found 1e-6 with beta 0.04 unstable after 150 steps, and used 5e-7 with 0.001",
        ORIGINAL_RECIPE,
        UNSTABLE,
        "beta: 0.001 gradient_checkpointing",
    )


CLAIMS = {README: of_readme, GUIDE: of_guide, METHOD: of_method, NOTEBOOK: of_notebook}


@pytest.mark.parametrize("document", CLAIMS, ids=lambda path: path.name)
def test_every_number_has_its_source(document):
    claims = list(CLAIMS[document]())
    assert [claim for claim in claims if not isinstance(claim, Claim)] == []
    text = FENCE.sub(lambda match: "" if match[1] else match[2], text_of(document))
    text = re.sub(r"\$\$.+?\$\$|\$[^$]+\$", "", text, flags=re.DOTALL)  # formulas
    text = re.sub(r"^(## )?\d\. ", "", text, flags=re.MULTILINE)  # numbered lists and headings
    text, *claims = map(without_names, (text, *claims))
    assert [claim for claim in claims if claim not in text] == []
    for claim in sorted(claims, key=len, reverse=True):
        text = text.replace(claim, " ")
    text = re.sub(r"`[^`]*`", "", LINK.sub("]", text))
    left = [text[max(0, match.start() - 40) : match.end() + 20] for match in NUMBER.finditer(text)]
    assert left == []  # numbers without a source


@pytest.mark.slow
def test_how_far_the_hard_bases_search_comes():
    task, settings, reached = load_recipe(HARD_RECIPE).task, COLD_STARTS["tiny_base_hard"], []
    for puzzle in load_split(task).heldout[: task.num_eval_puzzles]:
        if not difficulty(puzzle.nums, puzzle.target).plus_minus_only:
            every = tries(puzzle, settings.operators, settings.largest_result)
            first = islice(every, settings.max_tries)
            reached.append(any(value == puzzle.target for _, value, _ in first))
    assert percent(fmean(reached), 0) == percent(SEARCH_REACHES, 0)


# ---- The Chinese translation ----------------------------------------------------------------


def facts(*documents):
    """What a translation has to leave as it is."""
    found = {"commands": [], "code": [], "links": [], "numbers": []}
    for document in documents:
        text = FENCE.sub("", text_of(document))
        links = [link.removeprefix("../").replace(".zh-CN", "") for link in LINK.findall(text)]
        found["commands"] += command_lines(document)
        found["commands"] += blocks(document, "python") + blocks(document, "")
        found["code"] += CODE.findall(text)
        found["links"] += links
        found["numbers"] += NUMBER.findall(CODE.sub("", LINK.sub("]", text)))
    return {
        name: values if name == "commands" else sorted(values) for name, values in found.items()
    }


def test_the_translation_has_the_same_commands_names_links_and_numbers():
    english, chinese = facts(README, NOTEBOOK), facts(CHINESE)
    for kind, values in english.items():
        assert chinese[kind] == values, kind
