"""A recipe as a SLURM job: which nodes train, which one serves, pausing in time, requeueing.

`scripts/slurm/train.sbatch` becomes this process, on the first node of the job. It starts the
steps with srun, watches them, and passes on the request to pause: SLURM's USR1 before the time
limit, or TERM, becomes a STOP file in the run folder, since a signal to a launcher would reach its
processes as their end. The trainer saves, leaves a PAUSED marker and ends; then the job is
requeued, and the same command resumes. Steps find each other by addresses, not by names; see
network.py.

    sbatch --nodes=3 --gpus-per-node=8 scripts/slurm/train.sbatch RECIPE [--key value ...]
    mini-r1 slurm RECIPE --nodes 3 --gpus-per-node 8 --gpu-memory 80 --dry-run   # without SLURM
"""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mini_r1 import InputError
from mini_r1.launch.guard import draw_key
from mini_r1.launch.machine import Machine
from mini_r1.launch.memory import has_16_bit_weights, model_shape
from mini_r1.launch.network import (
    LOOPBACK,
    address_towards,
    interface_of,
    listens,
    reserve_port,
    resolve,
)
from mini_r1.launch.plan import (
    LAUNCH_CONFIGS,
    TRAINING_SCRIPT,
    check_batch,
    describe_batch,
    gpus_to_use,
    launcher_for,
    make_plan,
    owns_server,
    server_command,
    to_download,
)
from mini_r1.launch.vllm_server import LOST, Pulse, answers
from mini_r1.recipe import ROOT, Recipe, load_recipe
from mini_r1.run import LOGS_FOLDER, paused_step, request_stop, withdraw_stop
from mini_r1.syntax import take_hub_token

MAX_REQUEUES = 100  # a job that always pauses at once would go on for ever
SERVER_READY_TIMEOUT = 900.0  # seconds
STOP_GRACE = 240.0  # seconds from a dead server to the end of a trainer that has not saved by then
POLL_INTERVAL = 0.5  # seconds
FIRST_PORT, PORTS = 20_000, 10_000  # below those that systems give to outgoing connections
CPUS_PER_GPU = 4  # to ask for: a process, what loads and sends for it, and vLLM's front end
CPUS_PER_PROCESS = 2  # with fewer there is a warning
MEMORY_PER_PROCESS = 2.0  # GiB beside the weights: the libraries
# What srun takes for options. Without these a step has all that the job has on its nodes; with
# what was given to sbatch per GPU, one without GPUs is refused.
SIZES_OF_STEPS = ("SLURM_CPUS_PER_GPU", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK")
# What is kept of an attempt's environment: what a job is laid out by, and what its libraries are
# set up by. No free text, which anything may stand in.
KEPT_VARIABLES = re.compile(
    r"SLURM_(ARRAY_(JOB|TASK)_ID|CLUSTER_NAME|CPUS?_\w+|GPUS?_\w+|JOB_GPUS|JOB_ID|JOB_NODELIST"
    r"|JOB_NUM_NODES|JOB_PARTITION|LOCALID|MEM_\w+|NNODES|NODEID|NTASKS\w*|PROCID|RESTART_COUNT"
    r"|TASKS_PER_NODE|THREADS_PER_CORE)"
    r"|(CUDA|NCCL|TORCH_NCCL|OMP|GLOO)_[A-Z0-9_]+|(NVIDIA|ROCR|HIP)_VISIBLE_DEVICES"
    r"|VLLM_(ATTENTION_BACKEND|CACHE_ROOT|HOST_IP|LOGGING_LEVEL|WORKER_MULTIPROC_METHOD)"
    r"|HF_(DATASETS_CACHE|DATASETS_OFFLINE|ENDPOINT|HOME|HUB_CACHE|HUB_OFFLINE)"
    r"|TRANSFORMERS_OFFLINE|WANDB_MODE|PYTORCH_(CUDA_)?ALLOC_CONF|TOKENIZERS_PARALLELISM"
    r"|TRITON_CACHE_DIR|MINI_R1_(PYTHON|SERVER_PYTHON|SITE)|CONDA_PREFIX|VIRTUAL_ENV"
    r"|HOSTNAME|LANG|LC_ALL|LD_LIBRARY_PATH|LOADEDMODULES|PATH|PYTHONPATH|TMPDIR"
)
KEPT_FIELDS = (  # of scontrol
    *("JobId", "Partition", "NodeList", "NumNodes", "NumCPUs", "NumTasks", "TRES", "ReqTRES"),
    *("AllocTRES", "TresPerNode", "TimeLimit", "StartTime", "EndTime", "Requeue", "Restarts"),
)


@dataclass(frozen=True)
class JobPlan:
    """How a recipe is laid out over nodes.

    Attributes:
        training_nodes: the first so many nodes train.
        served: whether the last node holds a vLLM server of the job's own.
        processes_per_node: training processes on each training node.
        launcher: the accelerate config, None for a single process.
    """

    recipe: Recipe
    training_nodes: int
    served: bool
    processes_per_node: int
    launcher: str | None

    @property
    def processes(self) -> int:
        return self.training_nodes * self.processes_per_node

    def __str__(self) -> str:
        overrides = list(self.recipe.overrides)
        lines = {
            "nodes": f"{self.training_nodes} to train, {self.processes_per_node} processes on each"
            + (", 1 more for vLLM, the last" if self.served else ""),
            "batch": describe_batch(self.recipe, self.processes),
            "training": self.train_command("FIRST", FIRST_PORT, overrides, Path("LOGS")),
        }
        if self.served:
            server = server_command(self.recipe, "PORT", "LAST", self.processes_per_node)
            lines["server"] = shlex.join(["python", *server])
        return "\n".join(f"{name:<11} {text}" for name, text in lines.items())

    def train_command(self, address: str, port: int, overrides: list[str], log_dir: Path) -> str:
        """A line for bash on every training node, where SLURM_PROCID is the node's rank.

        Args:
            address: of the first one, as the others reach it.
        """
        script = [str(ROOT / TRAINING_SCRIPT), "--config", str(self.recipe.path), *overrides]
        if self.launcher is None:
            return f"exec {shlex.join([sys.executable, *script])}"
        options = {
            "config_file": ROOT / LAUNCH_CONFIGS / f"{self.launcher}.yaml",
            "num_machines": self.training_nodes,
            "num_processes": self.processes,
            "main_process_ip": address,
            "main_process_port": port,
            "rdzv_backend": "static",
            "tee": 3,
        }
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        for name, value in options.items():
            launch += [f"--{name}", str(value)]
        # Expanded on each node: in the batch shell it would be 0 everywhere.
        rank = '"$SLURM_PROCID"'
        of_node = f"--log_dir {shlex.quote(str(log_dir))}/node{rank} --machine_rank {rank}"
        return f"exec {shlex.join(launch)} {of_node} {shlex.join(script)}"


def plan_job(recipe: Recipe, nodes: int, machine: Machine) -> JobPlan:
    """Lay a recipe out over nodes that are all like `machine`.

    Raises:
        InputError: it cannot work; the message says which change would make it work.
    """
    if nodes == 1:
        plan = make_plan(recipe, machine)
        # What a GPU holds is not known in the job, and it must launch what was planned.
        launcher = launcher_for(recipe, plan.processes)
        return JobPlan(recipe, 1, False, plan.processes, launcher)
    served = owns_server(recipe)
    training_nodes = nodes - served
    per_node = 1 if recipe.get("use_cpu") else gpus_to_use(recipe, machine.gpus)
    if per_node < 1:
        raise recipe.error(
            "no GPUs on the nodes; give --gpus-per-node, or train a recipe with use_cpu: true",
            "use_cpu",
        )
    processes = training_nodes * per_node
    check_batch(recipe, processes)
    return JobPlan(recipe, training_nodes, served, per_node, launcher_for(recipe, processes))


def submit_command(
    recipe: Recipe, nodes: int, gpus_per_node: int, time_limit: str | None
) -> list[str]:
    """The sbatch line for the wrapper script, in the root of the checkout.

    Raises:
        InputError: this is no checkout; the script finds its environment there.
    """
    if not (ROOT / "scripts" / "slurm").is_dir():
        raise InputError(
            "not here; run from a clone of the repository, installed with 'make setup'",
            where="scripts/slurm/train.sbatch",
        )
    options = [f"--nodes={nodes}"]
    if gpus_per_node:
        options += [f"--gpus-per-node={gpus_per_node}", f"--cpus-per-gpu={CPUS_PER_GPU}"]
        options += [f"--mem={math.ceil(host_memory(recipe, gpus_per_node))}G"]
    options += [f"--time={time_limit}"] if time_limit else []
    script = ["scripts/slurm/train.sbatch", os.path.relpath(recipe.path, ROOT), *recipe.overrides]
    return ["sbatch", *options, *script]


def host_memory(recipe: Recipe, processes: int) -> float:
    """GiB of a node's own memory that so many processes may take while they load their model."""
    shape = model_shape(recipe.model["model_name_or_path"])
    weights = shape.parameters * (2 if has_16_bit_weights(recipe) else 4) if shape else 0
    return processes * (MEMORY_PER_PROCESS + weights / 2**30)


# ---- In the job -----------------------------------------------------------------------------


class Job:
    """This job, as the environment that SLURM sets describes it."""

    def __init__(self, recipe: Recipe, env: Mapping[str, str] = os.environ):
        self.recipe, self.run_dir, self._env = recipe, recipe.run_dir.absolute(), env
        self.id, self.attempt = env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT", 0))
        array = env.get("SLURM_ARRAY_JOB_ID")
        # The id to requeue: that of an array alone would requeue all its elements.
        self.requeue_id = f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else self.id
        self.nodes = _output("scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]).split()
        self.gpus_per_node = int(env.get("SLURM_GPUS_ON_NODE", 0))
        self.logs = self.run_dir / LOGS_FOLDER / f"{self.id}.{self.attempt}"
        # Where jobs and attempts side by side on a node begin to look for ports.
        self.first_port = FIRST_PORT + (int(self.id) * 7 + self.attempt) % PORTS
        self.why: str | None = None
        self.step_before = paused_step(self.run_dir)  # where the last attempt paused

    def run(self) -> int:
        """Run the recipe in this allocation and return the exit code.

        After a pause the job is requeued, and this does not return.
        """
        # Lay the run out over the nodes. What a GPU holds is not known here; it was checked before.
        memory = float("inf") if self.gpus_per_node else 0.0
        plan = plan_job(self.recipe, len(self.nodes), Machine(self.gpus_per_node, memory))
        training = self.nodes[: plan.training_nodes]
        server_node = self.nodes[-1] if plan.served else None
        self.logs.mkdir(parents=True, exist_ok=True)
        self._capture()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        withdraw_stop(self.run_dir)
        beside = f", vLLM on {server_node}" if server_node else ""
        self.say(f"training on {', '.join(training)}{beside}")
        for warning in self.shortages(plan):
            self.say(f"warning: {warning}")
        last = address_of(self.nodes[-1]) if len(self.nodes) > 1 else LOOPBACK
        here = address_towards(last) if len(self.nodes) > 1 else LOOPBACK

        # Start the server first, if there is one, then the training.
        overrides = [*self.recipe.overrides, "--output_dir", str(self.run_dir)]
        server, variables = None, {}
        if server_node:
            url, server = self._start_server(server_node, last, plan.processes_per_node)
            group_port = reserve_port(self.first_port)
            overrides += ["--vllm_server_base_url", url, "--vllm_group_port", str(group_port)]
            # Where the server is told to fetch the weights; by itself TRL would ask for the way to
            # the internet, and without one say 0.0.0.0.
            variables["VLLM_HOST_IP"] = os.environ.get("VLLM_HOST_IP", here)
        if len(training) > 1 and (interface := interface_of(here)):
            # By itself gloo takes what the name of its machine means.
            variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
        port = reserve_port(self.first_port)
        command = plan.train_command(here, port, overrides, self.logs / "ranks")
        trainer = self._srun(training, "train", ["bash", "-c", command], variables)

        # Wait for it, whatever happens meanwhile, and clean up.
        code = self._watch(trainer, server, Pulse(url) if server else None)
        if server and server.poll() is None:
            server.terminate()
            server.wait()
        return self._requeue_or(code)

    def shortages(self, plan: JobPlan) -> Iterator[str]:
        """What a node has too little of, as this one shows: CPUs and memory, by SLURM's limits."""
        env, processes = self._env, plan.processes_per_node
        there = f"for {processes} training process{'es' if processes > 1 else ''} on a node"
        cpus = len(os.sched_getaffinity(0))
        if cpus < CPUS_PER_PROCESS * processes:
            few = f"{cpus} CPU{'s' if cpus > 1 else ''}"
            option = f"gpu={CPUS_PER_GPU}" if self.gpus_per_node else f"task={CPUS_PER_GPU}"
            yield f"{few} {there}; give sbatch --cpus-per-{option}, or --exclusive"
        megabytes = (
            int(env.get("SLURM_MEM_PER_NODE", 0))
            or int(env.get("SLURM_MEM_PER_CPU", 0)) * int(env.get("SLURM_CPUS_ON_NODE", 0))
            or int(env.get("SLURM_MEM_PER_GPU", 0)) * self.gpus_per_node
        )
        wanted = host_memory(self.recipe, processes)
        if 0 < megabytes < wanted * 1024:
            yield (
                f"{megabytes / 1024:.0f} GiB {there}, which may take {wanted:.0f} while the model "
                f"is loaded; give sbatch --mem={wanted:.0f}G or more; --mem=0 is all there is"
            )

    def say(self, text: str) -> None:
        now = time.strftime("%H:%M:%S")
        print(f"[{now} job {self.id} attempt {self.attempt}] {text}", flush=True)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, why: str) -> None:
        self.why = self.why or why
        self.say(f"{why}: asking the run to save and stop")
        request_stop(self.run_dir)

    def _srun(
        self, nodes: list[str], name: str, command: list[str], variables: Mapping[str, str] = {}
    ) -> subprocess.Popen:
        """A step with one task per node, which has all its CPUs, the output in a file per node."""
        options = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}"]
        options += [f"--nodelist={','.join(nodes)}", "--kill-on-bad-exit=1", "--wait=60"]
        options += ["--export=ALL", "--cpu-bind=none", f"--output={self.logs}/{name}-%n.log"]
        environment = {k: v for k, v in os.environ.items() if k not in SIZES_OF_STEPS}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **variables}
        # A session of its own: a signal to this process is not meant for srun.
        command = ["srun", *options, *command]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def _start_server(self, node: str, address: str, gpus: int) -> tuple[str, subprocess.Popen]:
        """Start vLLM on its node, on all the node's GPUs; its URL and step, once it answers.

        Raises:
            SystemExit: it did not come up.
        """
        draw_key()  # srun hands it on to server and trainer
        python = os.environ.get("MINI_R1_SERVER_PYTHON", sys.executable)
        # The download first, which may take longer than any deadline.
        wanted = to_download(self.recipe)
        fetch = [python, "-m", "mini_r1.hub", *wanted]
        if wanted and self._srun([node], "download", fetch).wait():
            self.say(f"no model for vLLM on {node}; read {self.logs}/download-*.log")
            sys.exit(1)
        port = self.first_port
        while listens(address, port):
            port += 1
        url = f"http://{address}:{port}"
        command = server_command(self.recipe, port, address, gpus)
        # An address of the user's is the trainer's.
        own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": ""}
        server = self._srun([node], "server", [python, *command], own)
        deadline = time.monotonic() + SERVER_READY_TIMEOUT
        while not answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                server.terminate()
                log = f"{self.logs}/server-*.log"
                self.say(f"the vLLM server on {node} did not come up; read {log}")
                sys.exit(1)
            time.sleep(POLL_INTERVAL)
        return url, server

    def _watch(
        self, trainer: subprocess.Popen, server: subprocess.Popen | None, pulse: Pulse | None
    ) -> int:
        """Wait for the trainer and return its exit code.

        A server that ends before it, or hangs, makes it save and stop.
        """
        deadline = None
        while trainer.poll() is None:
            gone = server and server.poll() is not None
            if deadline is None and (gone or (pulse and pulse.is_lost())):
                # Also what a TERM to all steps looks like: the trainer may be saving already.
                what = f"ended with {server.returncode}" if server and gone else LOST
                self._stop(f"the vLLM server {what}")
                deadline = time.monotonic() + STOP_GRACE
            if deadline and time.monotonic() > deadline:
                trainer.terminate()
            if self.why and paused_step(self.run_dir) in (None, self.step_before):
                # Again: a trainer that was just starting took it for an old one.
                request_stop(self.run_dir)
            time.sleep(POLL_INTERVAL)
        return trainer.returncode or (1 if deadline else 0)

    def _requeue_or(self, code: int) -> int:
        """Requeue a run that has paused.

        Whatever its exit code, since launchers make a failure of a TERM.
        """
        paused = paused_step(self.run_dir)
        state = re.search(r"JobState=(\w+)", _output("scontrol", "show", "job", "-o", self.id))
        where = f", paused after step {paused}" if paused is not None else ""
        self.say(f"the training ended with {code}{where}")
        if paused is None:
            return code
        if state is None or state[1] != "RUNNING":
            return code  # cancelled by its user: a requeue would bring it back
        if self.step_before is not None and paused <= self.step_before:
            before = f"the last pause after step {self.step_before}"
            self.say(f"not requeued: no step was done since {before}")
            return code or 1
        if self.attempt >= MAX_REQUEUES:
            self.say(f"not requeued: {MAX_REQUEUES} times are enough; sbatch it again to go on")
            return 1
        self.say("requeueing")
        _output("scontrol", "requeue", self.requeue_id)
        time.sleep(60)  # SLURM ends this process
        return 0

    def _capture(self) -> None:
        """What this attempt ran in, for its owner's eyes."""
        job = _output("scontrol", "show", "job", "-o", self.id)
        fields = dict(reversed(re.findall(r"(\S+?)=(\S*)", job)))  # the first of a name is SLURM's
        shown = [(name, fields[name]) for name in KEPT_FIELDS if name in fields]
        shown += [(k, v) for k, v in sorted(os.environ.items()) if KEPT_VARIABLES.fullmatch(k)]
        lines = [f"{name}={harmless(value)}\n" for name, value in shown]
        file = os.open(self.logs / "env.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(file, "w", encoding="utf-8", errors="replace") as kept:
            kept.writelines(lines)
        latest = self.logs.with_name("latest")
        latest.unlink(missing_ok=True)
        latest.symlink_to(self.logs.name)


def harmless(value: str) -> str:
    """What of a variable's value may be kept: its first line, with nothing that could be a secret.

    That is the user and password and the query of an address, and what is too long for a word.
    """
    line = value.splitlines()[0] if value else ""
    line = re.sub(r"(?<=://)[^/\s]*@", "***@", line)
    line = re.sub(r"(://[^\s?#]*)[?#]\S*", r"\1?***", line)
    return re.sub(r"[A-Za-z0-9]{20,}", "***", line)


def address_of(node: str) -> str:
    """The address at which SLURM itself reaches a node, from here.

    Raises:
        InputError: it is not known here.
    """
    known = re.search(r"NodeAddr=(\S+)", _output("scontrol", "show", "node", "-o", node))
    return resolve(known[1] if known else node)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def main(arguments: list[str]) -> int:
    """The batch process: RECIPE [--key value ...]."""
    try:
        if "SLURM_JOB_ID" not in os.environ or not arguments:
            raise InputError(
                "not in a SLURM job; use sbatch scripts/slurm/train.sbatch RECIPE, or "
                "mini-r1 slurm RECIPE --dry-run"
            )
        return Job(load_recipe(arguments[0], take_hub_token(arguments[1:]))).run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
