"""The pieces of the check for GPUs; tests/integration/test_gpu_check.py runs all of it."""

import json
import os
import time
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.launch.machine import Machine
from mini_r1.launch.plan import check_batch
from mini_r1.recipe import load_recipe
from mini_r1.run import SECTION_END
from mini_r1.scripts import gpu_check
from mini_r1.scripts.gpu_check import (
    MINUTES,
    RECIPES,
    ROOT,
    Step,
    all_steps,
    arguments,
    check,
    run_child,
    section,
    table,
    unlearned,
    write_figures,
)

TWO_H100 = Machine(2, 80.0)
BENCHMARKS, RECORD = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "records" / "gpu-check.json"
SEEN = {
    "name": "3B",
    "recipe": "grpo-qwen-2.5-3b-1gpu.yaml",
    "outcome": "ok",
    "seconds": {"wake and sync": 1.25, "generate": 11.0, "forward and backward": 20.0},
    "evaluation_seconds": [9.0, 12.5],
    "memory": {"training": 58.04, "generation": 60.5},
    "planned": {"training": 57.7, "generation": 61.5, "evaluation": 60.0},
    "hardware": {"gpus": ["NVIDIA H100 80GB HBM3"]},
    "success": [[0, 0.0], [4, 0.0]],
    "tokens": 1024.0,
}
LEARNED = {
    "name": "tiny, colocated",
    "outcome": "ok",
    "success": [[0, 0.24], [70, 0.8], [140, 0.91]],
    "logp_difference": 0.00021,
}
LEFT_OUT = {"name": "tiny, server", "outcome": "skipped", "why": "needs 2 GPUs"}
HUNG = {"name": "3B, QLoRA", "outcome": "timed out", "why": "after 300 s"}
RESULT = {
    "date": "2026-11-25",
    "machine": "1 GPU of 80 GiB",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "trl": "1.16.0"},
    "steps": [SEEN, LEARNED, LEFT_OUT, HUNG],
}


# ---- The steps ------------------------------------------------------------------------------


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_child_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    log = tmp_path / "log"
    assert run_child(["bash", "-c", "sleep 60 & echo $!; wait"], log, 0.7, os.environ) is None
    grandchild = int(log.read_text())
    deadline = time.monotonic() + 5
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(grandchild)


def test_one_that_ends_returns_its_exit_code_and_leaves_both_streams_in_its_log(tmp_path):
    log = tmp_path / "log"
    assert run_child(["bash", "-c", "echo a; echo b >&2; exit 3"], log, 10, os.environ) == 3
    assert log.read_text() == "a\nb\n"


def test_what_fails_hangs_or_cannot_run_stops_nothing_else(tmp_path):
    steps = [
        Step("broken, really", "no-such.yaml", 1, gpus=2),
        Step("hanging", "tiny-cpu.yaml", 0.01, gpus=2),
        Step("no curve", "tiny-cpu.yaml", 0.002, gpus=2, open_ended=True),
        Step("elsewhere", "tiny-cpu.yaml", 1, gpus=3),
        Step("without", "tiny-cpu.yaml", 1, needs="no_such_package"),
        Step("broken again", "no-such.yaml", 1, gpus=2),
    ]
    output = tmp_path / "figures.json"
    result = check(output, steps, TWO_H100)
    assert json.loads(output.read_text()) == result
    found = {step["name"]: step for step in result["steps"]}
    outcomes = ["failed", "timed out", "timed out", "skipped", "skipped", "failed"]
    assert [step["outcome"] for step in found.values()] == outcomes
    broken = found["broken, really"]
    assert broken["why"].startswith("exit code 2: error: ")
    assert "no-such.yaml" in (tmp_path / broken["log"]).read_text()
    assert found["hanging"]["why"] == "after 1 s"
    assert found["elsewhere"]["why"] == "needs 3 GPUs"
    assert found["without"]["why"] == "needs no_such_package, which is not installed"
    assert [path.suffix for path in (tmp_path / "figures-logs").iterdir()] == [".log"] * 4


def test_no_step_begins_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "MINUTES", 0.0)
    step = Step("late", "tiny-cpu.yaml", 1)
    (found,) = check(tmp_path / "figures.json", [step], TWO_H100)["steps"]
    assert (found["outcome"], found["why"]) == ("skipped", "no time is left")


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_the_recipe_of_every_step_can_be_read_and_its_batch_be_cut(monkeypatch, gpus, vllm):
    """Even those that cannot run here."""
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: vllm or None)
    machine = Machine(gpus, 80.0 if gpus else 0.0)
    for step in all_steps(machine, Path("smollm2")):
        if step.obstacle(machine, 60) is None:
            check_batch(load_recipe(RECIPES / step.recipe, arguments(step.changes)), 1)


def test_the_steps_for_one_gpu_fit_their_half_hour_and_leave_time_for_the_last():
    steps = [step for step in all_steps(Machine(1, 80.0), None) if step.gpus < 2]
    assert sum(step.minutes for step in steps) < MINUTES


def test_a_recipe_for_a_small_card_gives_vllm_its_share_of_that(monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: True)
    (lora,) = (step for step in all_steps(Machine(1, 80.0), None) if "LoRA" in step.name[:8])
    given = load_recipe(RECIPES / lora.recipe).get("vllm_gpu_memory_utilization")
    assert lora.changes["vllm_gpu_memory_utilization"] == pytest.approx(given * 24 / 80, abs=1e-3)


def test_a_run_that_has_not_learned_or_not_through_vllm_has_failed():
    assert unlearned(LEARNED) == {}
    slow = unlearned({**LEARNED, "success": [[0, 0.24], [140, 0.3]]})
    assert slow == {"outcome": "failed", "why": "held-out success 30%, not 85%"}
    stale = unlearned({**LEARNED, "logp_difference": 0.05})
    assert stale["why"] == "log-probabilities 0.05 apart, not less than 0.01"
    assert unlearned({"success": LEARNED["success"]})["outcome"] == "failed"


# ---- The table ------------------------------------------------------------------------------

TABLE = """\
|                           | 3B          | tiny, colocated | tiny, server | 3B, QLoRA |
| --- | --- | --- | --- | --- |
| outcome                   | ok          | ok              | skipped      | timed out |
| seconds per step          | 32.2        |                 |              |           |
| - wake and sync           | 1.25        |                 |              |           |
| - generate                | 11          |                 |              |           |
| - forward and backward    | 20          |                 |              |           |
| seconds per evaluation    | 12.5        |                 |              |           |
| tokens per completion     | 1024        |                 |              |           |
| GiB to train (planned)    | 58.0 (57.7) |                 |              |           |
| GiB to generate (planned) | 60.5 (61.5) |                 |              |           |
| held-out success          |             | 24% to 91%      |              |           |
| log-prob difference       |             | 0.00021         |              |           |

- tiny, server: skipped: needs 2 GPUs
- 3B, QLoRA: timed out: after 300 s"""


def test_what_was_measured_stands_beside_what_was_planned():
    assert table(RESULT["steps"]) == TABLE


def test_the_section_says_where_it_was_measured():
    said = "Measured 2026-11-25 on NVIDIA H100 80GB HBM3, with torch 2.13.0, trl 1.16.0.\n\n"
    assert section(RESULT) == said + TABLE


def test_a_section_is_written_between_its_lines_and_nowhere_else(tmp_path):
    document, record = tmp_path / "doc.md", tmp_path / "record.json"
    record.write_text(json.dumps(RESULT))
    document.write_text(f"# Before\n\n{gpu_check.BEGIN}\nold\n{SECTION_END}\n\nafter\n")
    write_figures(document, record)
    lines = f"{gpu_check.BEGIN}\n\n{section(RESULT)}\n\n{SECTION_END}"
    assert document.read_text() == f"# Before\n\n{lines}\n\nafter\n"
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(InputError, match=r"other\.json: not written by"):
        write_figures(document, tmp_path / "other.json")
    document.write_text("# Before\n")
    with pytest.raises(InputError, match="it has no lines"):
        write_figures(document, record)
    assert document.read_text() == "# Before\n"


def test_the_document_is_in_step_with_its_generator(tmp_path):
    copy = tmp_path / "benchmarks.md"
    copy.write_text(BENCHMARKS.read_text(encoding="utf-8"), encoding="utf-8")
    write_figures(copy, RECORD if RECORD.exists() else None)
    assert copy.read_text(encoding="utf-8") == BENCHMARKS.read_text(encoding="utf-8")
