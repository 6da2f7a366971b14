"""README's own task from its files to the page of a finished run, and from other folders."""

import json
import subprocess
import sys

import pytest

from mini_r1.model import model_path
from mini_r1.run import AFTER, load_evaluation, load_run
from tests.test_docs import README, write_code_blocks

pytestmark = pytest.mark.slow

RECIPE = """
model_name_or_path: tiny_base
dataset_id_or_path: words.jsonl
prompt_template: my_prompt.yaml
reward_funcs: [my_task.backwards]
max_prompt_length: 64
max_completion_length: 24
max_steps: 4
save_steps: 2
per_device_train_batch_size: 8
num_generations: 4
num_eval_puzzles: 8
num_eval_samples: 2
learning_rate: 1e-3
use_cpu: true
output_dir: run
"""


def mini_r1(folder, *arguments, code=0):
    command = [sys.executable, "-m", "mini_r1", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    write_code_blocks(README, folder)
    (folder / "own.yaml").write_text(RECIPE)
    rows = subprocess.run(
        [sys.executable, "my_task.py"], cwd=folder, capture_output=True, text=True, check=True
    )
    (folder / "words.jsonl").write_text("".join(rows.stdout.splitlines(True)[:600]))
    assert "verdict     it will run" in mini_r1(folder, "doctor", "own.yaml")
    mini_r1(folder, "train", "own.yaml")
    return folder


def test_a_run_reports_the_mean_of_the_reward(project):
    run = load_run(project / "run")
    after = load_evaluation(project / "run", AFTER)
    assert after["rule"] == "the mean of the reward backwards"
    assert 0 <= after["success"] <= 1
    assert after["examples"][0]["row"].keys() == {"words"}
    sampled = [entry["success"] for entry in run.history if "success" in entry]
    rewards = [entry["rewards/backwards/mean"] for entry in run.history if "success" in entry]
    assert len(sampled) == 4
    assert sampled == pytest.approx(rewards)
    assert not any(key.startswith("behaviors/") for entry in run.history for key in entry)
    assert {sample.judge for sample in run.samples} == {"backwards"}
    page = (project / "run" / "report.html").read_text()
    words = after["examples"][0]["row"]["words"]
    assert f"<h3>words {words}</h3>" in page
    assert "Success: sampled completions" in page
    assert "need only" not in page


def test_a_run_goes_on_from_its_checkpoint(project):
    printed = mini_r1(project, "train", "own.yaml", "--max_steps", "6")
    assert "resuming from run/checkpoint-4" in printed


def test_a_run_is_judged_from_any_folder(project, tmp_path):
    run = str(project / "run")
    printed = mini_r1(tmp_path, "eval", run, "--num-puzzles", "4", "--json")
    assert json.loads(printed)["rule"] == "the mean of the reward backwards"
    played = mini_r1(tmp_path, "play", run, "--seed", "1", "--compare")
    assert played.startswith("Say backwards: ")
    assert played.count("backwards: ") == 3  # the question's and both verdicts
    refused = mini_r1(tmp_path, "play", run, "--nums", "1", "2", "--target", "3", code=2)
    assert "this run was not trained on number puzzles" in refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--columns", "{wrods: words}"], "prompt_template: 'words' is undefined; the row has"),
        (["--prompt_template", "no.yaml"], "prompt_template: no.yaml cannot be read"),
        (["--reward_funcs", "format"], "the reward format wants a prompt that ends in <think>"),
        (["--eval_reward", "my_task.forwards"], "my_task.py has no 'forwards'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(project, changes, message):
    prompt = (project / "my_prompt.yaml").read_text()
    (project / "open.yaml").write_text(prompt.replace("<think>", "Well,"))
    if "format" in changes:
        changes = [*changes, "--prompt_template", "open.yaml"]
    told = mini_r1(project, "train", "own.yaml", *changes, "--output_dir", "other", code=2)
    assert told.startswith(("error: own.yaml", "error: --"))
    assert message in told
    assert told.count("\n") == 1
    assert not (project / "other").exists()


def test_the_base_model_may_be_asked_in_plain_text(project, tmp_path):
    (project / "plain.jinja").write_text("Backwards, {{ words }} is <think>\n")
    changes = ["--prompt_template", "plain.jinja", "--max_steps", "1", "--output_dir", "plain"]
    mini_r1(project, "train", "own.yaml", *changes, "--model_name_or_path", model_path("tiny_base"))
    assert load_evaluation(project / "plain", AFTER)["num_puzzles"] == 8
