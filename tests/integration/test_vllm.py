"""Colocated vLLM and the vLLM server, with a CPU build in an environment of its own.

`make test-all` makes it. What cannot run without two GPUs, sending weights over NCCL, is cut out in
vllm_on_cpu.py and nowhere else.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import requests

from mini_r1.launch.guard import KEY, key_header
from mini_r1.launch.plan import server_command
from mini_r1.metrics import LOGP_DIFFERENCE
from mini_r1.recipe import load_recipe
from mini_r1.rollouts import ALL_FILE, read_samples
from mini_r1.run import (
    AFTER,
    BEFORE,
    COMPLETE_MARKER,
    SAMPLES_FOLDER,
    STATE_FILE,
    SUMMARY_FILE,
    load_evaluation,
)

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.minutes,
    pytest.mark.skipif(
        not (ROOT / ".venv-vllm" / "installed").exists(), reason="needs vLLM: run make test-all"
    ),
]
RECIPE = ROOT / "recipes" / "tiny-cpu.yaml"
TWO_PROCESSES = str(ROOT / "configs" / "accelerate_configs" / "cpu.yaml")
LAUNCHER = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", TWO_PROCESSES)
SHORT = {
    "max_steps": 4,
    "save_steps": 2,
    "steps_per_generation": 4,  # one optimizer step
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_completion_length": 40,
    "vllm_max_model_length": 72,
    "num_puzzles": 500,
    "num_eval_puzzles": 20,
    "num_eval_samples": 1,
    "use_vllm": True,
}
UNCORRECTED = {"vllm_importance_sampling_correction": False}
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}


def command(run_dir, *flags, launcher=(), **changes):
    options = {**SHORT, "output_dir": run_dir, **changes}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    script = str(ROOT / "tests" / "integration" / "vllm_on_cpu.py")
    return [str(PYTHON), *launcher, script, *flags, "--config", str(RECIPE), *arguments]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(*arguments, **options):
    """Run a training to its end; the arguments are those of `command`."""
    words = command(*arguments, **options)
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def logp_differences(run_dir):
    """Between vLLM's log-probabilities and the trainer's, step by step."""
    history = json.loads((run_dir / STATE_FILE).read_text())["log_history"]
    return [entry[LOGP_DIFFERENCE] for entry in history if LOGP_DIFFERENCE in entry]


@pytest.mark.parametrize("processes", [1, 2])
def test_colocated_vllm_follows_the_weights_and_evaluates(tmp_path, processes):
    done = train(tmp_path / "run", launcher=LAUNCHER if processes > 1 else (), **UNCORRECTED)
    assert "Traceback" not in done.stderr
    differences = logp_differences(tmp_path / "run")
    assert len(differences) == 4
    assert max(differences) < 0.01
    assert "vLLM samples from other weights" not in done.stdout
    assert (tmp_path / "run" / SUMMARY_FILE).exists()
    for name in (BEFORE, AFTER):
        result = load_evaluation(tmp_path / "run", name)
        assert re.fullmatch(r"vLLM \S+, colocated, bfloat16", result["generator"])
        assert result["num_puzzles"] == 20


def test_an_engine_that_is_left_to_itself_ends_with_a_traceback(tmp_path):
    """If not, `quirks.end_colocated_vllm` can go."""
    done = train(tmp_path / "run", "--keep-engine", max_steps=1)
    assert "Invalid process group specified" in done.stderr


def test_both_generators_agree_within_their_intervals(tmp_path):
    results = {}
    for flags in ((), ("--vllm",)):
        words = ["-m", "mini_r1", "eval", "tiny_base", "--num-puzzles", "400", "--num-samples", "2"]
        done = subprocess.run(
            [PYTHON, *words, "--json", *flags],
            capture_output=True,
            text=True,
            timeout=400,
            env={**environment(), **ON_CPU},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results[bool(flags)] = json.loads(done.stdout)
    plain, by_vllm = results[False], results[True]
    assert plain["generator"].startswith("transformers ")
    assert re.fullmatch(r"vLLM \S+, an engine of its own, bfloat16", by_vllm["generator"])
    assert plain.keys() == by_vllm.keys()
    assert plain["ci95"][0] <= by_vllm["ci95"][1]
    assert by_vllm["ci95"][0] <= plain["ci95"][1]
    for figure in ("mean_completion_tokens", "format"):
        assert by_vllm[figure] == pytest.approx(plain[figure], rel=0.05)
    assert by_vllm["truncated"] == pytest.approx(plain["truncated"], abs=0.02)


def test_a_resumed_run_generates_with_its_own_weights(tmp_path):
    for steps in (4, 6):
        done = train(tmp_path / "run", max_steps=steps)
    assert "resuming from" in done.stdout
    differences = logp_differences(tmp_path / "run")
    assert len(differences) == 6
    # With the base's weights it would be far above: see the next test.
    assert max(differences) < 0.01


@pytest.mark.parametrize("changes", [UNCORRECTED, {}], ids=["ours", "of TRL's correction"])
def test_the_alarm_for_stale_weights_works(tmp_path, changes):
    done = train(tmp_path / "run", "--stale-weights", **changes)
    first, *_, last = logp_differences(tmp_path / "run")
    assert first < 0.01
    assert last > 0.1
    assert done.stdout.count("vLLM samples from other weights than are trained") == 1


class Training:
    """A long run with a server of its own, started and past its second checkpoint."""

    def __init__(self, run_dir, processes):
        self.run_dir = run_dir
        launcher = LAUNCHER if processes > 1 else ()
        self.process = subprocess.Popen(
            command(run_dir, launcher=launcher, vllm_mode="server", max_steps=2000),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        wait_for(lambda: self.process.poll() is not None or len(self.checkpoints()) > 1, 300)
        assert self.process.poll() is None, self.process.stderr.read()[-3000:]

    def checkpoints(self):
        return list(self.run_dir.glob(f"checkpoint-*/{COMPLETE_MARKER}"))

    def servers(self):
        """The processes of the server: those in the group of the one that serves this run."""
        rows = [line.split(None, 3) for line in processes_with("pid,pgid,stat,args")]
        log = str(self.run_dir / "logs" / "vllm.log")
        keepers = {pid for pid, _, _, arguments in rows if log in arguments}
        if not hasattr(self, "group"):
            leaders = [
                pid
                for pid, pgid, _, arguments in rows
                if pid == pgid and "vllm.entrypoints" in arguments and pid not in keepers
            ]
            (self.group,) = leaders
        alive = [row for row in rows if not row[2].startswith("Z")]
        return [int(pid) for pid, pgid, _, _ in alive if pgid == self.group]


def processes_with(columns):
    """What ps says of every process, a line each."""
    done = subprocess.run(["ps", "-eo", columns], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[1:]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


@pytest.fixture
def training(tmp_path, request):
    training = Training(tmp_path / "run", processes=request.param)
    yield training
    if training.process.poll() is None:
        os.killpg(training.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("training", [1, 2], indirect=True)
def test_the_death_of_the_server_ends_the_run_at_once_with_its_last_words(training):
    servers = training.servers()
    assert len(servers) > 1  # the API and the engine
    os.kill(int(training.group), signal.SIGKILL)
    assert training.process.wait(30) == 1
    message = training.process.stderr.read()
    assert message.count("error: the vLLM server died; the last lines of") == 1
    assert training.checkpoints()
    wait_for(lambda: not training.servers(), 10)


@pytest.mark.parametrize("training", [1], indirect=True)
def test_kill_9_of_the_trainer_leaves_no_server(training):
    assert training.servers()
    training.process.kill()
    training.process.wait()
    wait_for(lambda: not training.servers(), 10)


def test_a_worker_that_fails_to_take_the_weights_ends_the_run(tmp_path):
    words = command(tmp_path / "run", "--failing-worker", vllm_mode="server")
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 1
    message = done.stderr[
        done.stderr.index("error: the vLLM server could not take the weights (") :
    ]
    assert "the last lines of" in message
    assert "NCCL weight transfer not initialized" in message
    assert not any(str(tmp_path) in arguments for arguments in processes_with("args"))


def test_a_finished_run_ends_its_server(tmp_path):
    done = train(tmp_path / "run", vllm_mode="server")
    assert "starting vLLM on the CPU; its log is" in done.stdout
    assert not any(str(tmp_path) in arguments for arguments in processes_with("args"))


def test_a_given_server_is_used_and_left_alone_and_knows_who_asks(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "known to both")
    memory = ["--vllm_max_model_length", "72", "--vllm_gpu_memory_utilization", "0.5"]
    recipe = load_recipe(RECIPE, memory)
    port = 18_123
    url = f"http://127.0.0.1:{port}"
    log = (tmp_path / "server.log").open("wb")
    variables = {**environment(), **ON_CPU, "VLLM_SERVER_DEV_MODE": "1"}
    server = subprocess.Popen(
        [str(PYTHON), *server_command(recipe, port)],
        stdout=log,
        stderr=log,
        env=variables,
        start_new_session=True,
    )
    try:
        given = {"vllm_server_base_url": url, "vllm_server_timeout": 120.0}
        done = train(tmp_path / "run", vllm_mode="server", **given)
        assert "starting vLLM" not in done.stdout
        assert server.poll() is None
        assert not (tmp_path / "run" / "logs").exists()
        result = load_evaluation(tmp_path / "run", AFTER)
        assert re.fullmatch(r"vLLM \S+, server", result["generator"])
        assert result["num_puzzles"] == 20
        # Without the key no route of it answers, those that replace the weights among them.
        description = f"{url}/openapi.json"
        routes = requests.get(description, headers=key_header()).json()["paths"]
        assert {"/health", "/v1/models", "/update_weights", "/server_info"} <= routes.keys()
        assert requests.get(description).status_code == 401
        for path, methods in routes.items():
            for method in methods:
                assert requests.request(method, url + path).status_code == 401, path
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not [path for path in files if b"known to both" in path.read_bytes()]
    finally:
        os.killpg(server.pid, signal.SIGKILL)


def first_completions(run_dir, seed, *flags):
    """Of the same prompts, whatever the seed."""
    once = {"max_steps": 1, "shuffle_dataset": False, "num_eval_puzzles": 2}
    train(run_dir, *flags, seed=seed, **once)
    return [sample.text for sample in read_samples(run_dir / SAMPLES_FOLDER / ALL_FILE)]


def test_the_seed_reaches_the_sampling(tmp_path):
    one, other = (first_completions(tmp_path / str(seed), seed) for seed in (1, 2))
    assert one != other


def test_vllm_samples_alike_whatever_the_seed(tmp_path):
    """If not, `quirks.seed_colocated_vllm` can go."""
    flag = "--keep-engines-seed"
    one, other = (first_completions(tmp_path / str(seed), seed, flag) for seed in (1, 2))
    assert one == other
