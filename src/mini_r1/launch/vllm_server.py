"""Owns the vLLM server on the last GPU: start, readiness, liveness, end.

The trainer starts a small keeper (`python -m mini_r1.launch.vllm_server LOG COMMAND...`) and holds
its stdin open. The keeper starts vLLM in a process group of its own and ends the whole group as
soon as that pipe closes, which the kernel does for a trainer that dies in any way, kill -9
included.

Left out: sending the weights. That is TRL's, over NCCL, and needs two GPUs.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

from mini_r1 import InputError, RunFailed, hub, one_line
from mini_r1.launch.guard import KEY, draw_key, key_header
from mini_r1.launch.network import LOOPBACK, reserve_port
from mini_r1.launch.plan import server_command, to_download
from mini_r1.recipe import Recipe
from mini_r1.run import LOGS_FOLDER

READY_TIMEOUT = 600.0  # seconds; a 7B model from a slow disk, with CUDA graphs, takes minutes
HEALTH_INTERVAL = 5.0  # seconds between two looks at a server that was ready
# Looks without an answer until it counts as lost, each of up to 5 more seconds: a batch of long
# completions may keep it from answering for a while.
HEALTH_FAILURES = 24
STOP_TIMEOUT = 5.0  # seconds from SIGTERM to SIGKILL
POLL_INTERVAL = 0.5  # seconds
LOST, FAILED_TO_TAKE = "does not answer any more", "could not take the weights"
LOG_TAIL = 20  # lines to show of a server that died
# How the variables start that a launcher sets for the training processes; vLLM would take them
# for its own.
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
)


class ServerDied(RunFailed):
    """The server ended by itself. The message says how and holds the end of its log."""


class VLLMServer:
    """The vLLM server of a run, which lives no longer than this process.

    Args:
        recipe: says model, lengths and memory; the log goes to its run folder.
        gpu: its GPU as CUDA_VISIBLE_DEVICES names it; None runs vLLM's CPU build.
    """

    def __init__(self, recipe: Recipe, gpu: str | None):
        port = reserve_port()
        self.url, self.group_port = f"http://{LOOPBACK}:{port}", reserve_port()
        self._to_download = to_download(recipe)
        self.log = recipe.run_dir / LOGS_FOLDER / "vllm.log"
        # -P: modules of the current folder must not stand in for libraries.
        self._command = [sys.executable, "-P", *server_command(recipe, port)]
        self._env = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(LAUNCHER_VARIABLES)
        }
        self._env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": LOOPBACK, KEY: draw_key()}
        if gpu is not None:
            self._env["CUDA_VISIBLE_DEVICES"] = gpu
        self._keeper: subprocess.Popen | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the server and return once it answers.

        Raises:
            InputError: its model cannot be downloaded.
            ServerDied: it ended, or did not answer within READY_TIMEOUT.
        """
        if self._to_download:
            hub.fetch(*self._to_download)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        keeper = [sys.executable, "-P", "-m", "mini_r1.launch.vllm_server"]
        keeper += [str(self.log), *self._command]
        self._keeper = subprocess.Popen(
            keeper, stdin=subprocess.PIPE, env=self._env, start_new_session=True
        )
        deadline = time.monotonic() + READY_TIMEOUT
        while not answers(self.url):
            if self._keeper.poll() is not None:
                raise ServerDied(self._obituary("ended before it was ready"))
            if time.monotonic() > deadline:
                self.stop()
                raise ServerDied(self._obituary(f"did not answer within {READY_TIMEOUT:.0f} s"))
            time.sleep(POLL_INTERVAL)

    def watch(self) -> None:
        """From now on end this process, with exit code 1 and the log's tail, if the server is lost.

        It died, or hangs. Waiting for the next request to fail would take TRL's client a minute,
        and the other ranks' collectives half an hour.
        """
        threading.Thread(target=self._watch, args=(self._keeper,), daemon=True).start()

    def refused(self, error: Exception) -> None:
        """The same at once, since the server could not take weights that this process sends."""
        if not self._stopping.is_set():
            end_now(self._obituary(f"{FAILED_TO_TAKE} ({one_line(error, 300)})"))

    def stop(self) -> None:
        """End the server, and return when it is gone."""
        self._stopping.set()
        if self._keeper is not None and self._keeper.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._keeper.stdin.close()
            self._keeper.wait()

    def _watch(self, keeper: subprocess.Popen) -> None:
        pulse = Pulse(self.url)
        while keeper.poll() is None:
            if pulse.is_lost():
                break
            time.sleep(POLL_INTERVAL)
        if not self._stopping.is_set():
            end_now(self._obituary("died" if keeper.poll() is not None else LOST))

    def _obituary(self, what: str) -> str:
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            if self.log.exists()
            else []
        )
        return "\n".join(
            [
                f"the vLLM server {what}; the last lines of {self.log}:",
                *(f"  {line}" for line in lines[-LOG_TAIL:]),
            ]
        )


def end_now(problem: str) -> NoReturn:
    """End this process and say why, from any thread of it, also while it waits for NCCL."""
    print(f"error: {problem}", file=sys.stderr, flush=True)
    os._exit(1)


class Pulse:
    """Tells when a server that was ready has not answered for minutes."""

    def __init__(self, url: str):
        self._url, self._failures, self._next = url, 0, 0.0

    def is_lost(self) -> bool:
        """To be asked often; it looks now and then."""
        if time.monotonic() >= self._next:
            self._failures = 0 if answers(self._url) else self._failures + 1
            self._next = time.monotonic() + HEALTH_INTERVAL
        return self._failures >= HEALTH_FAILURES


def answers(url: str) -> bool:
    """Whether the server at an address says that it is ready."""
    return _health(url) == 200


def check_key(url: str) -> None:
    """Whether a server that was given lets this run in; TRL's client would ask it for ever.

    Raises:
        InputError: it wants another key.
    """
    if _health(url) == 401:
        raise InputError(
            f"the server refuses this run; set {KEY} to the key that it was started with",
            key="vllm_server_base_url",
        )


def _health(url: str) -> int | None:
    """The status that a server gives to its run; None if it does not answer."""
    request = urllib.request.Request(f"{url.rstrip('/')}/health", headers=key_header())
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return None


def keep(log: Path, command: list[str]) -> int:
    """Run a command until it ends or stdin closes, then end its whole process group.

    Returns:
        the command's exit code.
    """
    with log.open("ab") as output:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while server.poll() is None and not selector.select(POLL_INTERVAL):
            pass
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT)
    return server.returncode


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, lambda *_: None
        )  # it outlives the trainer by a moment; unlike SIG_IGN, vLLM does not inherit this
    sys.exit(keep(Path(sys.argv[1]), sys.argv[2:]))
