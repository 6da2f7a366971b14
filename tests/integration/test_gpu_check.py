"""The check for machines with a GPU, on one without: everything runs, on a tiny shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

ROOT = Path(__file__).parents[2]


def test_gpu_check_runs_through(tmp_path):
    output = tmp_path / "gpu-check.json"
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--output", str(output)],
        check=True,
        timeout=400,
    )
    result = json.loads(output.read_text())
    assert result["versions"]["trl"] == "1.16.0"
    assert "cpu_count" in result["hardware"]
    assert {run["generation"] for run in result["runs"]} >= {"transformers"}
    assert len({run["model"] for run in result["runs"]}) == 2
    for run in result["runs"]:
        assert run["seconds_per_step"] > 0
        assert run["mean_completion_tokens"] > 0
