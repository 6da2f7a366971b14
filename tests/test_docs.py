"""What the documents say is so: their paths exist, their commands parse, their names are names, and every number has its source.

tests/integration/test_documented_commands.py runs the commands.
"""

import csv
import json
import re
import shlex
from itertools import islice
from pathlib import Path
from statistics import fmean

import nbformat
import pytest

from mini_r1 import recipe
from mini_r1.cli import _parser
from mini_r1.cold_start import COLD_STARTS, _tries
from mini_r1.countdown.solver import difficulty
from mini_r1.data import load_split
from mini_r1.doctor import TRACKERS
from mini_r1.live import FIGURES
from mini_r1.prompts import PROMPT_TEMPLATES
from mini_r1.recipe import load_recipe, recipe_table
from mini_r1.report import CHARTS, ORIGINAL_MILESTONES
from mini_r1.rewards import REWARDS
from mini_r1.sweep import SMOOTHING
from tests.test_rewards import EXPLOITS

ROOT = Path(__file__).parents[1]
README, GUIDE, METHOD = (ROOT / name for name in ("README.md", "docs/guide.md", "docs/method.md"))
CHINESE, NOTEBOOK = ROOT / "README.zh-CN.md", ROOT / "notebooks" / "mini_r1.ipynb"
ORIGINAL_RECIPE = ROOT / "recipes" / "grpo-qwen-2.5-3b-deepseek-r1-countdown.yaml"
DOCUMENTS = [README, CHINESE, GUIDE, METHOD, NOTEBOOK]
of_documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"\.?[\w.*-]+(/[\w.*-]*)+|[\w.*-]+\.(md|yaml|json|html|py|txt|csv|ipynb|safetensors|sbatch)")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?")
# Paths of a run: the test that runs the commands looks for them.
OF_A_RUN = re.compile(
    r"(runs/|eval/|samples/|tensorboard/|checkpoint-|config\.json|model\.safetensors|report\.html|summary\.json|trainer_state\.json"
    r"|manifest\.json|recipe\.yaml|logs/vllm\.log)"
)
METRICS = {key for _, key in CHARTS.values()} | {key for key, _ in FIGURES.values()} | {"sampling/sampling_logp_difference/mean"}


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
    """The lines of a document's shell blocks, without comments and with the placeholder RECIPE filled in."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\bRECIPE(?= |$)", "recipes/tiny-cpu.yaml", re.sub(r"\s+# .*", "", line)) for line in lines]


def write_code_blocks(document, folder):
    """Write the Python blocks, each of which begins with its file's name."""
    for block in blocks(document, "python"):
        (folder / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block, encoding="utf-8")


# ---- Paths ------------------------------------------------------------------------------------------------------------------


@of_documents
def test_links_lead_somewhere(document):
    links = [link for link in LINK.findall(text_of(document)) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    assert links


@of_documents
def test_paths_exist(document):
    elsewhere = {"Jiayi-Pan/Countdown-Tasks-3to4"} | METRICS  # names with slashes that are no paths
    for path in (text.split(" ")[0] for text in inline(document)):
        if PATH.fullmatch(path) and not OF_A_RUN.match(path) and path not in elsewhere:
            assert any((folder / path).exists() for folder in (ROOT, document.parent)), path


# ---- Commands ---------------------------------------------------------------------------------------------------------------


@of_documents
def test_commands_can_be_given(document, tmp_path, monkeypatch):
    write_code_blocks(document, tmp_path)
    monkeypatch.chdir(tmp_path)
    variables = {}
    for line in command_lines(document):
        for command in line.split(" && "):
            if assigned := re.fullmatch(r"(\w)=(\S+)", command):
                variables[assigned[1]] = assigned[2]
            else:
                check_command(shlex.split(re.sub(r"\$(\w)\b", lambda match: variables[match[1]], command)))
    for text in inline(document):
        program, _, rest = text.partition(" ")
        if program == "make" and rest:
            check_command(shlex.split(text))
        elif program == "mini-r1" and rest:  # names a command, not always all of its arguments
            words = rest.split()
            with pytest.raises(SystemExit) as end:
                _parser().parse_known_args([*words[: 2 if words[0] in ("base", "data") else 1], "--help"])
            assert end.value.code == 0, text


def check_command(words):
    program, *rest = words or ["#"]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, assigns, _ = word.partition("=")
            assert re.search(rf"^{name} \?=" if assigns else rf"^{name}:", makefile, re.MULTILINE), words
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


# ---- Names ------------------------------------------------------------------------------------------------------------------


def test_the_metrics_are_called_as_trl_calls_them():
    import trl.trainer.grpo_trainer

    source = Path(trl.trainer.grpo_trainer.__file__).read_text(encoding="utf-8")
    for name in METRICS:
        if not name.startswith(("behaviors/", "rewards/")):
            assert f'"{name}"' in source, name


@of_documents
def test_keys_and_names_are_real(document):
    """What stands in code type and looks like a key of recipes, or the name of a reward, template, base or metric, is one."""
    classes = (*recipe._TRAINING_CLASSES, *recipe._MODEL_CLASSES, ("mini_r1", "recipe.py", "TaskConfig"))
    known = {name for each in classes for name in recipe._fields_of((each,))}
    known |= {*REWARDS, *PROMPT_TEMPLATES, *METRICS, *COLD_STARTS, *TRACKERS, "generated", "tensorboard"}
    others = {"nums", "target", "verified", "memory", "dapo", "transformers", "make", "pip", "scancel", "task", "main", "eval"}
    for text in inline(document):
        name = text.partition(":")[0]
        if re.fullmatch(r"[a-z][a-z0-9_]+\*?", name):
            assert name in known | others or (name.endswith("*") and any(key.startswith(name[:-1]) for key in known)), text


# ---- Numbers ----------------------------------------------------------------------------------------------------------------

# Those that are part of a name.
NAMES = re.compile(
    r"(?i)deepseek-r1(-zero)?|mini[-_]r1|Qwen-?[\d.]+(-3B)?(-Instruct)?|ZeRO-[23]|\bR1\b|\b3B\b|TRL 0\.14|Python 3\.11|Apache-2\.0"
    r"|Countdown-Tasks-3to4"
)


def record(sweep, seed):
    return json.loads((ROOT / "docs" / "records" / sweep / "recipe" / f"seed-{seed}.json").read_text(encoding="utf-8"))


def original_runs():
    with (ROOT / "docs" / "records" / "original-3b-runs.csv").open(newline="") as file:
        rows = [{key: value if key == "run" else float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {name: [row for row in rows if row["run"] == name] for name in ("main", "format_0.1")}


def minutes(records):
    """A run from the evaluation before to the one after, on average; what loading takes is left out."""
    return fmean(one["summary"]["train_seconds"] + one["before"]["seconds"] + one["after"]["seconds"] for one in records) / 60


def percent(value, digits=1):
    return f"{100 * value:.{digits}f} %"


def of_readme():
    """What README.md says in numbers, made from what was measured; the same for the other documents below."""
    easy = [record("tiny-cpu", seed) for seed in (1, 2, 3)]
    hard = [record("tiny-cpu-hard", seed) for seed in (1, 2, 3)]
    table = recipe_table(ROOT / "recipes")
    for name, records in (("tiny-cpu", easy), ("tiny-cpu-hard", hard)):
        before, after = (percent(fmean(one[when]["success"] for one in records), 0) for when in ("before", "after"))
        (row,) = [row for row in table.splitlines() if f"[{name}]" in row]
        assert f"held-out success {before} -> {after} (measured, three seeds)" in row
        assert abs(minutes(records) / int(re.search(r"(\d+) minutes", row)[1]) - 1) < 0.1
    assert f"training success {percent(ORIGINAL_MILESTONES['success'][450], 0)} there at step 450" in table
    yield table
    yield f"On a machine with 2 cores this took {minutes(easy):.0f} minutes once"
    summary = easy[0]["summary"]
    low, high = summary["ci95_after"]
    yield (
        f"held-out success {summary['success_before']:.1%} -> {summary['success_after']:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}; "
        f"{summary['num_puzzles']} puzzles x {summary['num_samples']}, temperature {summary['temperature']}) "
        f"completion tokens {summary['mean_completion_tokens_before']:.0f} -> {summary['mean_completion_tokens_after']:.0f} "
        f"training {summary['steps']} steps in {summary['train_seconds'] / 60:.1f} minutes"
    )
    curve = [fmean(values) for values in zip(*(one["curve"]["success"] for one in easy), strict=True)]
    yield f"from {curve[0]:.2f} to {fmean(curve[-SMOOTHING:]):.2f}]"
    yield "The lines above are seed 1: all numbers must be used"
    yield f"{percent(summary['plus_minus_only_share'], 0)} of the puzzles need only + and -"
    yield "before, the 95 % interval was {:.1f} to {:.1f} %".format(*(100 * end for end in summary["ci95_before"]))
    yield "over seeds 1, 2 and 3, which end at {:.1f}, {:.1f} and {:.1f} %".format(*(100 * one["after"]["success"] for one in easy))
    for when in ("before", "after"):
        (example,) = [each for each in easy[0][when]["examples"] if each["target"] == 68]
        yield f"*make 68 using each of {', '.join(map(str, example['nums']))} once*"
        yield from filter(None, example["completion"].replace("</think>", "").split("\n"))
    before, after = (fmean(one[when]["behaviors"]["true_arithmetic"] for one in easy) for when in ("before", "after"))
    yield f"(true arithmetic {100 * before:.1f} -> {percent(after)})"
    assert "1e-6 with beta 0.04 was unstable after about 150 steps" in ORIGINAL_RECIPE.read_text(encoding="utf-8")
    assert load_recipe(ORIGINAL_RECIPE).training["learning_rate"] == 5e-7
    yield "the original found 1e-6 unstable after 150 steps, and used 5e-7"
    assert "#SBATCH --signal=B:USR1@300" in (ROOT / "scripts" / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    yield "5 minutes before the time limit"
    # Other tests are these: test_distributed, the cluster's, and the one that runs the commands.
    yield "1 process, 2 processes (DDP, ZeRO-2, ZeRO-3, whose weights agree to 1e-5), LoRA, QLoRA in real 4 bit"
    yield "a real SLURM of 2 nodes"
    yield "and 3 GB of disk"
    yield from ("The game of 24", "`rewards/format_reward/mean` near 0", "`rewards/equation_reward/mean` near 0")
    yield "`frac_reward_zero_std` near 1"


def of_guide():
    yield from ("exits with 0, 1 (failed) or 2 (bad input", "held-out success, 95 % interval")


def of_method():
    hard = [record("tiny-cpu-hard", seed) for seed in (1, 2, 3)]
    before, after = hard[0]["before"], hard[0]["after"]

    def row(name, *results):
        cells = ["{:.1f} % ({:.1f} to {:.1f})".format(*(100 * x for x in (one["success"], *one["ci95"]))) for one in results]
        return f"| {name} | {' | '.join(cells)} |"

    yield "held-out success (95 % interval)"
    yield row("all puzzles", before, after)
    easier, others = ([one["by_difficulty"]["plus_minus_only"][key] for one in (before, after)] for key in ("true", "false"))
    yield row(f"those that + and - alone can solve ({percent(after['plus_minus_only_share'], 0)})", *easier)
    yield row("those that need * or /", *others)
    yield f"| at least one of 16 samples right (pass@16) | {percent(before['pass_at']['16'])} | {percent(after['pass_at']['16'])} |"
    assert after["success"] > before["pass_at"]["16"]
    yield "One sample after training solves more than sixteen did before"
    yield f"(Seed 1; {after['num_puzzles']} puzzles x {after['num_samples']}, temperature {after['temperature']}"
    assert all(abs(one["after"]["success"] - after["success"]) < 0.01 for one in hard)
    yield "has seeds 2 and 3, which end within a point of it"
    assert round(minutes(hard)) in range(23, 28)
    yield "It takes about 25 minutes:"
    task = load_recipe(ROOT / "recipes" / "tiny-cpu-hard.yaml").task
    numbers, targets = ("{}-{}".format(*ends) for ends in (task.number_range, task.target_range))
    yield "({} and {} numbers of {}, targets {})".format(*task.num_numbers, numbers, targets)
    yield "the search comes to 39 % of them within its sixteen tries"  # a test below counts them
    manifest = json.loads((ROOT / "src" / "mini_r1" / "tiny_base" / "manifest.json").read_text(encoding="utf-8"))
    yield f"is a Qwen2 of {manifest['parameters']:,} parameters"
    yield f"holds {len(EXPLOITS)} such cases"
    yield from ("for [1, 2, 3] -> 9", "for [1, 2, 5] -> 3", "with its 95 % interval")
    first, marks = original_runs()["main"][0], ORIGINAL_MILESTONES
    yield "(7 training GPUs and 1 for vLLM, 448 completions per step, one row per 2 steps)"
    yield (
        f"goes from {percent(first['equation_reward'], 0)} to {percent(marks['success'][200], 0)} at step 200 and "
        f"{percent(marks['success'][1200], 0)} at step 1200, while completions shrink from "
        f"{first['completion_tokens']:.0f} tokens to {marks['tokens'][1200]}."
    )
    few, everything = 7_471 + 10_507, 8_085 + 11_486  # counted in the published sample files
    yield f"Of the {everything:,} successful completions published there (8,085 and 11,486)"
    yield from (f"{percent(few / everything, 0)} use only + and - (7,471 and 10,507)", "the celebrated 50 %")


def of_notebook():
    easy, run = record("tiny-cpu", 1), original_runs()["main"]
    summary, first, late = easy["summary"], run[0], run[-300:]
    yield (
        f"goes from {percent(summary['success_before'])} to {percent(summary['success_after'])} held-out success in "
        f"{summary['steps']} steps and {minutes([easy]):.0f} minutes"
    )
    yield f"from {summary['mean_completion_tokens_before']:.0f} to {summary['mean_completion_tokens_after']:.0f} tokens, since"
    assert ORIGINAL_MILESTONES["format"][50] > 0.85
    yield "The format is learned first, within some 50 steps"
    success, tokens = (fmean(row[column] for row in late) for column in ("equation_reward", "completion_tokens"))
    yield f"from {percent(first['equation_reward'], 0)} to about {percent(ORIGINAL_MILESTONES['success'][200], 0)} at step 200"
    yield f"and slowly on to about {percent(success, 0)}"
    yield f"from {first['completion_tokens']:.0f} to about {round(tokens, -1):.0f} tokens"
    yield from ("92 % of the published", "So 50 % is about")  # docs/method.md has the counts
    assert load_recipe(ORIGINAL_RECIPE).training["beta"] == 0.001
    yield "1e-6 with beta 0.04 unstable after 150 steps, and used 5e-7 with 0.001"
    manifest = json.loads((ROOT / "src" / "mini_r1" / "tiny_base" / "manifest.json").read_text(encoding="utf-8"))
    yield f"a Qwen2 of {manifest['parameters'] / 1e6:.1f} million parameters"
    yield from ("weights in 4 bits", "the same lines train 3 billion parameters", "On one GPU of 24 GB", "4 GPUs of 80 GB")
    yield "Try 952 with 3, 6, 25, 50, 75 and 100"  # its cell prints a solution
    yield "Contents: 1 GRPO, 2 the data, 3 the rewards, 4 training with QLoRA, 5 many GPUs, 6 what was observed."
    yield from ("section 4.1", "Step 3 in code")


CLAIMS = {README: of_readme, GUIDE: of_guide, METHOD: of_method, NOTEBOOK: of_notebook}


@pytest.mark.parametrize("document", CLAIMS, ids=lambda path: path.name)
def test_every_number_has_its_source(document):
    text = FENCE.sub(lambda match: "" if match[1] else match[2], text_of(document))
    text = re.sub(r"\$\$.+?\$\$|\$[^$]+\$", "", text, flags=re.DOTALL)  # formulas
    text = re.sub(r"^(## )?\d\. ", "", text, flags=re.MULTILINE)  # numbered lists and headings
    text, *claims = (" ".join(NAMES.sub("", LINK.sub("]", each)).split()) for each in (text, *CLAIMS[document]()))
    assert [claim for claim in claims if claim not in text] == []
    for claim in sorted(claims, key=len, reverse=True):
        text = text.replace(claim, " ")
    text = re.sub(r"`[^`]*`", "", text)
    left = [text[max(0, match.start() - 40) : match.end() + 20] for match in NUMBER.finditer(text)]
    assert left == []  # numbers that nothing vouches for


@pytest.mark.slow
def test_how_far_the_hard_bases_search_comes():
    task, cold_start = load_recipe(ROOT / "recipes" / "tiny-cpu-hard.yaml").task, COLD_STARTS["tiny_base_hard"]
    assert cold_start.max_tries == 16
    found = []
    for puzzle in load_split(task).heldout[: task.num_eval_puzzles]:
        if not difficulty(puzzle.nums, puzzle.target).plus_minus_only:
            tries = islice(_tries([(number, str(number)) for number in puzzle.nums], puzzle.target, cold_start), 16)
            found.append(any(value == puzzle.target for _, value, _ in tries))
    assert percent(fmean(found), 0) == "39 %"


# ---- The Chinese translation ------------------------------------------------------------------------------------------------


def test_the_translation_has_the_same_commands_names_links_and_numbers():
    def facts(*documents):
        found = {"commands": [], "code": [], "links": [], "numbers": []}
        for document in documents:
            text = FENCE.sub("", text_of(document))
            found["commands"] += command_lines(document) + blocks(document, "python") + blocks(document, "")
            found["links"] += [link.removeprefix("../").replace(".zh-CN", "") for link in LINK.findall(text)]
            found["code"] += CODE.findall(text)
            found["numbers"] += NUMBER.findall(CODE.sub("", LINK.sub("]", text)))
        return {kind: values if kind == "commands" else sorted(values) for kind, values in found.items()}

    english, chinese = facts(README, NOTEBOOK), facts(CHINESE)
    for kind, values in english.items():
        assert chinese[kind] == values, kind
