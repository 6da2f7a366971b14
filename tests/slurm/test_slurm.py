"""Jobs on a real two-node SLURM cluster on this machine, with fake GPUs: `make test-slurm`.

The trainer is the real one, on the embedded base, over gloo. Where a job has a node for vLLM, a
stub answers there, since the real server needs a GPU, and transformers generates.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from mini_r1.model import model_path
from mini_r1.run import COMPLETE_MARKER, MANIFEST_FILE, SUMMARY_FILE

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RECIPE = HERE / "short.yaml"
SCRIPT = "scripts/slurm/train.sbatch"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(name, path=PATH) for name in ("sbatch", "munged")),
        reason="run make test-slurm",
    ),
]
SERVED = ["--use_vllm", "true", "--vllm_mode", "server"]


class Cluster:
    """As many nodes as asked for, on ports from a number on.

    Args:
        apart: each in a network of its own; see minislurm.sh.
    """

    def __init__(self, folder, port, nodes=2, apart=False):
        self.env = {
            **os.environ,
            "PATH": PATH,
            "NS": "net" if apart else "1",
            "NODES": str(nodes),
            "PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "MINI_R1_PYTHON": sys.executable,
        }
        self.folder, self.enter = folder, [str(folder / "enter")] if apart else []
        self.manage("up")
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")

    def manage(self, what):
        done = subprocess.run(
            [HERE / "minislurm.sh", what, self.folder],
            env=self.env,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        if done.returncode == 3:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr

    def down(self):
        """End it, and see that nothing of it is left."""
        self.manage("down")
        left = [path.name for path in (self.folder / "run").glob("*.pid")]
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left

    def call(self, *command, env=()):
        env = {**self.env, **dict(env)}
        command = [*self.enter, *command]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
        ).stdout

    def submit(self, run_dir, *arguments, options=(), env=()):
        """Submit the wrapper script and return the job's id; its log lies beside the run folder."""
        script = [SCRIPT, str(RECIPE), "--output_dir", str(run_dir), *arguments]
        job = ["--parsable", "--nodes=2", "--time=10", f"--output={run_dir}.out", *options]
        return self.call("sbatch", *job, *script, env=env).strip()

    def submit_served(self, run_dir, *arguments, **kwargs):
        """The same with a node for vLLM."""
        stub = {"MINI_R1_PYTHON": str(HERE / "python_with_stub"), "REAL_PYTHON": sys.executable}
        stub["MINI_R1_SERVER_PYTHON"] = str(HERE / "stub_vllm")
        return self.submit(run_dir, *SERVED, *arguments, env=stub, **kwargs)

    def state(self, job):
        shown = self.call("scontrol", "show", "job", "-o", job)
        # A requeued job waits two minutes by itself.
        if "JobState=PENDING" in shown and "Reason=BeginTime" in shown:
            self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
        state, code, restarts = (
            re.search(pattern, shown)[1]
            for pattern in (r"JobState=(\w+)", r" ExitCode=(\d+)", r"Restarts=(\d+)")
        )
        return state, code, int(restarts)

    def wait(self, job, *states, seconds=150):
        deadline = time.monotonic() + seconds
        while (found := self.state(job))[0] not in states:
            assert time.monotonic() < deadline, found
            time.sleep(0.3)
        return found

    def finish(self, job, seconds=150):
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait(job, *ends, seconds=seconds)


# munge wants a path that everybody may cross.
@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(Path("/tmp") / f"minislurm-{os.getpid()}", 17_900)
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def apart():
    """Three nodes that reach each other by one network only, and nothing else."""
    if os.getuid() != 0 or not shutil.which("ip", path=PATH):
        pytest.skip("networks of their own for the nodes need root and the command ip")
    cluster = Cluster(Path("/tmp") / f"minislurm-apart-{os.getpid()}", 17_950, 3, apart=True)
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(cluster, runs):
    """An uninterrupted run on two nodes."""
    job = cluster.submit(runs / "straight")
    assert cluster.finish(job) == ("COMPLETED", "0", 0), (runs / "straight.out").read_text()
    return runs / "straight"


def wait_for_checkpoint(run_dir, seconds=100):
    wait_for(run_dir, f"checkpoint-*/{COMPLETE_MARKER}", seconds)


def wait_for(run_dir, pattern, seconds=100):
    deadline = time.monotonic() + seconds
    while not list(run_dir.glob(pattern)):
        assert time.monotonic() < deadline, log_of(run_dir)
        time.sleep(0.05)


def log_of(run_dir):
    path = run_dir.with_name(run_dir.name + ".out")
    return path.read_text() if path.exists() else ""


def assert_same_weights(run_dir, straight):
    one, other = (folder / "model.safetensors" for folder in (run_dir, straight))
    assert one.read_bytes() == other.read_bytes()


def world_size(run_dir):
    return json.loads((run_dir / MANIFEST_FILE).read_text())["hardware"]["world_size"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_script_is_accepted(cluster, nodes):
    options = ["--test-only", f"--nodes={nodes}", "--gpus-per-node=4"]
    cluster.call("sbatch", *options, SCRIPT, str(RECIPE))


def test_a_job_from_elsewhere_is_told_where_to_submit(cluster, runs):
    options = ["--parsable", f"--chdir={runs}", f"--output={runs}/elsewhere.out"]
    command = ["sbatch", *options, str(ROOT / SCRIPT), str(RECIPE)]
    env = {key: value for key, value in cluster.env.items() if key != "MINI_R1_PYTHON"}
    job = subprocess.run(
        command, env=env, cwd=runs, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert cluster.finish(job)[:2] == ("FAILED", "2")
    assert "submit from the root of the checkout" in (runs / "elsewhere.out").read_text()


def test_two_nodes_train_together(straight):
    assert world_size(straight) == 2
    assert "training on node1, node2" in log_of(straight)
    logs = straight / "logs" / "latest"
    written = {path.name for path in logs.iterdir()}
    assert written == {"env.txt", "train-0.log", "train-1.log", "ranks"}
    assert {path.name for path in (logs / "ranks").iterdir()} == {"node0", "node1"}
    assert len(list(logs.glob("ranks/**/stderr.log"))) == 2


def outputs(run_dir, name):
    """What the steps of the last attempt with this name have printed, node by node."""
    files = sorted((run_dir / "logs" / "latest").glob(f"{name}-*.log"))
    return [path.read_text() for path in files]


def test_nodes_without_a_way_out_and_with_names_that_mislead_train_and_get_the_weights(apart, runs):
    run_dir = runs / "apart"
    ways = apart.call("srun", "--nodes=3", "ip", "route")
    assert "default" not in ways
    assert ways.count("10.213.0.0/24") == ways.count("172.17.0.0/16") == 3
    job = apart.submit_served(run_dir, "--max_steps", "4", options=["--nodes=3"])
    assert apart.finish(job)[:2] == ("COMPLETED", "0"), (log_of(run_dir), outputs(run_dir, "train"))
    assert "training on node1, node2, vLLM on node3" in log_of(run_dir)
    assert world_size(run_dir) == 2
    came = "the server came for the weights to {'master_address': '10.213.0.1',"
    assert came in outputs(run_dir, "train")[0]


def test_the_network_that_a_site_chooses_is_taken(apart, runs):
    run_dir = runs / "chosen"
    site = [("NCCL_SOCKET_IFNAME", "ib")]
    job = apart.submit(run_dir, env=site)
    assert apart.finish(job)[:2] == ("FAILED", "2")
    assert "NCCL_SOCKET_IFNAME: 'ib' names no interface of node1 with an" in log_of(run_dir)
    assert "it has lo, cable, docker0" in log_of(run_dir)


def test_one_node_does_what_train_does_there(cluster, runs):
    run_dir, secret = runs / "one", [("WANDB_API_KEY", "se-cret")]
    token, options = ["--hub_token", "se-cret"], ["--nodes=1", "--comment=se-cret"]
    options += ["--cpus-per-gpu=2", "--mem=1G"]  # srun refuses what is per GPU where there is none
    job = cluster.submit(run_dir, "--max_steps", "2", *token, options=options, env=secret)
    assert cluster.finish(job)[:2] == ("COMPLETED", "0"), log_of(run_dir)
    assert world_size(run_dir) == 1
    few = "warning: 1 GiB for 1 training process on a node, which may take 2 while the model is"
    assert few in log_of(run_dir)
    env = run_dir / "logs" / "latest" / "env.txt"
    assert env.stat().st_mode & 0o777 == 0o600
    lines = env.read_text().splitlines()
    assert {f"JobId={job}", f"SLURM_JOB_ID={job}", "SLURM_JOB_PARTITION=main"} <= {*lines}
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not [path for path in files if b"se-cret" in path.read_bytes()]
    assert "se-cret" not in log_of(run_dir)


def test_a_signal_to_the_steps_pauses_requeues_and_resumes_bit_for_bit(cluster, runs, straight):
    run_dir = runs / "signalled"
    job = cluster.submit(run_dir)
    wait_for_checkpoint(run_dir)
    cluster.call("scancel", "-s", "TERM", job)
    assert cluster.finish(job) == ("COMPLETED", "0", 1), log_of(run_dir)
    assert "requeueing" in log_of(run_dir)
    logs = {path.name for path in (run_dir / "logs").iterdir()}
    assert logs == {f"{job}.0", f"{job}.1", "latest"}
    assert_same_weights(run_dir, straight)


def test_a_signal_to_the_batch_process_amid_an_evaluation_pauses_there(cluster, runs, straight):
    run_dir = runs / "evaluating"
    job = cluster.submit(run_dir, "--num_eval_samples", "128")
    usr1 = ("scancel", "-b", "-s", "USR1", job)
    wait_for(run_dir, MANIFEST_FILE)  # the first evaluation begins
    cluster.call(*usr1)
    cluster.wait(job, "PENDING")
    assert "paused after step 0\n" in log_of(run_dir)
    assert not (run_dir / "eval" / "before.json").exists()
    wait_for(run_dir, f"checkpoint-40/{COMPLETE_MARKER}")  # the last one does
    cluster.call(*usr1)
    cluster.wait(job, "PENDING")
    assert "paused after step 40\n" in log_of(run_dir)
    assert not (run_dir / "eval" / "after.json").exists()
    assert cluster.finish(job) == ("COMPLETED", "0", 2), log_of(run_dir)
    assert_same_weights(run_dir, straight)


def test_a_preempted_job_saves_and_comes_back(cluster, runs, straight):
    run_dir = runs / "preempted"
    job = cluster.submit(run_dir, options=["--partition=low"])
    wait_for_checkpoint(run_dir)
    options = ["--parsable", "--partition=high", "--nodes=2", "--exclusive"]
    other = cluster.call("sbatch", *options, "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.finish(other.strip())[0] == "COMPLETED"
    state, _, restarts = cluster.finish(job)
    assert (state, restarts > 0) == ("COMPLETED", True), log_of(run_dir)
    assert "paused after step" in log_of(run_dir)
    assert_same_weights(run_dir, straight)


def test_a_cancelled_job_stays_cancelled(cluster, runs):
    run_dir = runs / "cancelled"
    job = cluster.submit(run_dir, options=["--cpus-per-task=4"])
    wait_for_checkpoint(run_dir)
    # Until then it had what was asked for, on both nodes.
    assert "CPUs=8 " in cluster.call("scontrol", "show", "step", f"{job}.0")
    cluster.call("scancel", job)
    assert cluster.finish(job)[0] == "CANCELLED"
    time.sleep(3)
    assert cluster.state(job)[0] == "CANCELLED"
    assert "requeueing" not in log_of(run_dir)


def test_a_failing_trainer_fails_the_job_and_ends_the_server(cluster, runs):
    job = cluster.submit_served(runs / "failing", "--num_eval_puzzles", "400")
    state, code, _ = cluster.finish(job)
    assert (state, code) == ("FAILED", "2"), log_of(runs / "failing")
    assert cluster.call("squeue", "-h", "-s", "-j", job) == ""


def test_the_server_of_a_job_answers_the_job_alone(cluster, runs):
    run_dir = runs / "guarded"
    job = cluster.submit_served(run_dir, "--max_steps", "2")
    server, answers = f"http://127.0.0.1:{20_000 + int(job) * 7 % 10_000}", set()
    while cluster.state(job)[0] in ("PENDING", "RUNNING"):
        for path in ("/health", "/v1/models", "/update_weights"):
            with contextlib.suppress(OSError):
                answers.add(requests.get(server + path, timeout=5).status_code)
        time.sleep(0.3)
    assert answers == {401}
    # Readiness and trainer were let in.
    assert cluster.state(job)[:2] == ("COMPLETED", "0"), log_of(run_dir)


def test_a_server_that_does_not_come_up_fails_the_job_at_once(cluster, runs):
    model, run_dir = runs / "broken-model", runs / "no-server"
    model.mkdir()
    shutil.copy(Path(model_path("tiny_base")) / "config.json", model)
    job = cluster.submit_served(run_dir, "--model_name_or_path", str(model))
    assert cluster.finish(job, seconds=30)[:2] == ("FAILED", "1")
    assert "the vLLM server on node2 did not come up" in log_of(run_dir)
    logs = (run_dir / "logs" / "latest").glob("server-*")
    assert "this model breaks me" in "".join(path.read_text() for path in logs)


def test_a_server_that_dies_lets_the_trainer_save_and_the_job_come_back(cluster, runs):
    run_dir = runs / "server-dies"
    job = cluster.submit_served(run_dir)
    wait_for_checkpoint(run_dir)
    assert "training on node1, vLLM on node2" in log_of(run_dir)
    cluster.call("scancel", "-s", "KILL", f"{job}.0")
    assert cluster.finish(job) == ("COMPLETED", "0", 1), log_of(run_dir)
    assert "the vLLM server ended" in log_of(run_dir)
    assert (run_dir / SUMMARY_FILE).exists()


def test_a_time_limit_pauses_in_time_and_the_run_ends_as_if_there_was_none(cluster, runs, straight):
    run_dir = runs / "limited"
    slowly = ["--reward_funcs", "format", "equation", "tests.slurm.slow.nothing"]
    job = cluster.submit(run_dir, *slowly, options=["--signal=B:USR1@60"])
    wait_for_checkpoint(run_dir)
    # Limits are whole minutes otherwise.
    cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+62")
    cluster.wait(job, "PENDING", seconds=100)
    # The update above has shortened it for good.
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.finish(job, seconds=200) == ("COMPLETED", "0", 1), log_of(run_dir)
    assert "SIGUSR1: asking the run to save and stop" in log_of(run_dir)
    assert_same_weights(run_dir, straight)
