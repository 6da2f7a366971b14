"""Runs the commands of README.md and docs/guide.md as they stand there.

In a checkout whose recipe is shortened.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from mini_r1.model import model_path
from mini_r1.run import STATE_FILE
from tests.test_docs import (
    DOCUMENTS,
    GUIDE,
    OF_A_RUN,
    PATH,
    README,
    command_lines,
    inline,
    write_code_blocks,
)

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

ROOT = Path(__file__).parents[2]
# As many steps as the real one, so that the documented files appear, but tiny ones.
SHORT = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_generations": 4,
    "max_completion_length": 20,
    "num_eval_puzzles": 20,
}
NOT_RUN = {
    r".venv/bin/pip |make ": "it would change the installation; CI does it first",
    r".venv/bin/mini-r1 base build": "it takes most of an hour; tests/bases builds a small one",
    r".venv/bin/mini-r1 (model convert|base sft)": "tests/integration/test_smollm2.py does",
    r".venv/bin/mini-r1 sweep": "it takes hours; tests/test_sweep.py sweeps over small runs",
    r"accelerate launch": "it needs GPUs; tests/integration/test_distributed.py launches on CPUs",
    r"sbatch |tail -f|export |.*pause runs/grpo": "it needs a cluster; tests/slurm has one",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the root of a checkout after `make train`."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "docs", "scripts", "src", "constraints.txt", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    (root / ".venv").symlink_to(sys.prefix)
    shutil.copytree(ROOT / "recipes", root / "recipes")
    recipe = root / "recipes" / "tiny-cpu.yaml"
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **SHORT}))
    shutil.copytree(model_path("tiny_base"), root / "my_model")  # a model of the reader's
    write_code_blocks(README, root)
    # What `make train` does once .venv is there.
    run(root, ".venv/bin/mini-r1 train recipes/tiny-cpu.yaml")
    return root


def run(root, command):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def run_document(root, document):
    """Run the commands of a document in their order.

    Returns what each printed, and which were not run.
    """
    variables, printed, skipped = "", {}, []
    for line in filter(None, command_lines(document)):
        if re.match(r"\w=", line):
            variables = f"{line}; "
        elif any(re.match(pattern, line) for pattern in NOT_RUN):
            skipped.append(line)
        else:
            printed[line] = run(root, variables + line)
    return printed, skipped


def test_the_commands_run(checkout, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two at a time
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda document: run_document(checkout, document), (README, GUIDE)))
    ran, skipped = {**results[0][0], **results[1][0]}, results[0][1] + results[1][1]
    assert len(ran) >= 20
    assert len(skipped) == 14
    output = {line.removeprefix(".venv/bin/"): text for line, text in ran.items()}
    assert "arithmetic claims are true" in output["mini-r1 play runs/tiny-cpu"]
    assert re.match(r"Say backwards: \d+ \d+ \d+\n", output["mini-r1 play runs/words"])
    assert json.loads((checkout / "eval.json").read_text())["num_puzzles"] == 1000
    for name in ("both.html", "with-3b.html", "puzzles.parquet"):
        assert (checkout / name).exists(), name
    for name in ("my-model/report.html", "seed-2/summary.json"):
        assert (checkout / "runs" / name).exists(), name
    state = json.loads((checkout / "runs" / "words" / STATE_FILE).read_text())
    assert any("rewards/backwards/mean" in entry for entry in state["log_history"])


def test_a_run_leaves_the_documented_files(checkout):
    run_dir = checkout / "runs" / "tiny-cpu"
    documented = {
        path
        for document in DOCUMENTS
        for path in inline(document)
        if PATH.fullmatch(path) and OF_A_RUN.match(path)
    }
    # test_vllm.py reads the one, test_train.py the other.
    documented -= {"logs/vllm.log", "failed-batch.json"}
    assert len(documented) > 12
    for path in documented:
        assert (checkout / path).exists() or (run_dir / path).exists(), path


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="README.md speaks of PyTorch's CPU build"
)
def test_the_installation_is_as_large_as_said():
    size = sum(path.lstat().st_size for path in Path(sys.prefix).rglob("*"))
    assert size < 3e9
