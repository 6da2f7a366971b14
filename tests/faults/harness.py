"""Short trainings that are killed and started again, and what must be equal in the end."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from mini_r1.launch.machine import LAUNCH_VARIABLES
from mini_r1.run import (
    EVAL_FOLDER,
    REPORT_FILE,
    SAMPLES_FOLDER,
    STATE_FILE,
    SUMMARY_FILE,
    TENSORBOARD_FOLDER,
)

ROOT = Path(__file__).parents[2]
# Two steps to a generation, and in them everything that a run does: a scheduled evaluation, a
# checkpoint that is thrown away again, a last one.
SHORT = {
    "max_steps": 4,
    "save_steps": 2,
    "save_total_limit": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_generations": 4,
    "max_completion_length": 24,
    "num_puzzles": 200,
    "num_eval_puzzles": 8,
    "num_eval_samples": 1,
}
TIMES = {"seconds", "train_seconds", "step_time", "run_dir"}


def arguments(run_dir, **changes):
    """Of `mini-r1 train`, for a short run."""
    options = {**SHORT, "output_dir": run_dir, **changes}
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [str(ROOT / "recipes" / "tiny-cpu.yaml"), *given]


class Zygote:
    """Starts trainings: see zygote.py."""

    def __init__(self, process, processes=1):
        self._process, self.processes = process, processes
        self.said = {1: "one process", 2: "two processes"}[processes]

    def train(
        self,
        run_dir,
        kill_at=None,
        kill_by=signal.SIGKILL,
        kill_after=None,
        operations=None,
        **changes,
    ):
        """Run one attempt to its end, or until it is killed; returns the exit codes.

        Args:
            kill_at: the first process dies before this file operation.
            kill_by: the signal that it gets then.
            kill_after: seconds after which all get SIGKILL.
            operations: a file for the names of all file operations.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        request = {"ranks": []} | ({"kill_after": kill_after} if kill_after else {})
        for rank in range(self.processes):
            launched = (rank, rank, self.processes, "127.0.0.1", port)
            env = dict(zip(LAUNCH_VARIABLES, map(str, launched), strict=True))
            one = {
                "arguments": arguments(run_dir, **changes),
                "env": {**env, "ACCELERATE_USE_CPU": "true"} if self.processes > 1 else {},
                "folder": str(run_dir),
                "log": f"{run_dir}.{rank}.log",
            }
            if rank == 0:
                one |= {"kill_at": kill_at, "kill_by": kill_by}
                one |= {"operations": operations and str(operations)}
            request["ranks"].append(one)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())["codes"]


@contextmanager
def zygote():
    """A process of its own, until the end of the tests."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert json.loads(process.stdout.readline()) == "ready"
    yield process
    process.stdin.close()
    process.wait()


def outcome(run_dir):
    """All that a run leaves and that times do not touch, by name."""
    found = {"files": sorted(path.name for path in run_dir.iterdir())}
    found["files"] = [name for name in found["files"] if not name.startswith("manifest-from")]
    for path in (run_dir / "model.safetensors", *sorted((run_dir / SAMPLES_FOLDER).iterdir())):
        found[path.name] = path.read_bytes()
    found["log"] = [_timeless(entry) for entry in _json(run_dir / STATE_FILE)["log_history"]]
    for path in (*sorted((run_dir / EVAL_FOLDER).iterdir()), run_dir / SUMMARY_FILE):
        found[path.name] = _timeless(_json(path))
    found["tensorboard"] = sorted(events(run_dir / TENSORBOARD_FOLDER))
    found["report"] = (run_dir / REPORT_FILE).stat().st_size > 50_000
    return found


def events(folder):
    """Every value in the event files: (step, tag, value)."""
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not any(time in value.tag for time in TIMES) and "/" in value.tag:
                    yield event.step, value.tag, str(value.tensor)


def differences(one, other):
    """In what two outcomes differ, in words."""
    found = []
    for name in one.keys() | other.keys():
        if name not in one or name not in other:
            found.append(f"only one has {name}")
        elif one[name] != other[name]:
            a, b = one[name], other[name]
            if isinstance(a, list):
                a, b = [x for x in a if x not in b], [x for x in b if x not in a]
            found.append(f"{name}: {str(a)[:300]} ... {str(b)[:300]}")
    return found


def traces(codes, run_dir, left):
    """In what a run that should have finished differs from an uninterrupted one, in words."""
    return [f"exit codes {codes}"] if any(codes) else differences(outcome(run_dir), left)


def _timeless(record):
    return {name: value for name, value in record.items() if name not in TIMES}


def _json(path):
    return json.loads(path.read_text())


def log_of(run_dir, forget=False):
    """What the first process has printed in the last attempts."""
    log = run_dir.with_name(f"{run_dir.name}.0.log")
    if forget:
        log.unlink(missing_ok=True)
    return log.read_text() if log.exists() else ""


def clear(run_dir):
    """Forget a run of an earlier test."""
    shutil.rmtree(run_dir, ignore_errors=True)
    log_of(run_dir, forget=True)
