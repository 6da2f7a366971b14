import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mini_r1 import InputError
from mini_r1.launch.guard import KEY
from mini_r1.launch.vllm_server import ServerDied, VLLMServer
from mini_r1.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "tiny-cpu.yaml"
# Stands in for vLLM's process tree: a child of its own, and neither ends on SIGTERM.
STUBBORN = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); time.sleep(600)"
)


# A training whose server answers once and then no more, though it lives on.
HANGS = """
import http.server, sys, time
class Once(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
with http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Once) as server:
    server.handle_request()
print("last words", flush=True)
time.sleep(600)
"""
TRAINING = f"""
import sys, time
from mini_r1.launch import vllm_server
from mini_r1.recipe import load_recipe
vllm_server.HEALTH_INTERVAL, vllm_server.HEALTH_FAILURES = 0.1, 3
server = vllm_server.VLLMServer(load_recipe(sys.argv[1], ["--output_dir", sys.argv[2]]), None)
server._command = [sys.executable, "-c", {HANGS!r}, server.url.rpartition(":")[2]]
server.start()
server.watch()
time.sleep(600)  # as in a collective
"""


def start_keeper(tmp_path, *command):
    return subprocess.Popen(
        [sys.executable, "-m", "mini_r1.launch.vllm_server", str(tmp_path / "log"), *command],
        stdin=subprocess.PIPE,
    )


def wait_for(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_the_server_and_its_children_end_with_the_trainer(tmp_path):
    keeper = start_keeper(tmp_path, sys.executable, "-c", STUBBORN)
    log = tmp_path / "log"
    child = int(wait_for(lambda: log.exists() and log.read_text().strip()))
    assert alive(child)
    keeper.stdin.close()  # what the kernel does when the trainer dies
    keeper.wait(15)
    wait_for(lambda: not alive(child))


def test_signals_to_the_keeper_do_not_orphan_the_server(tmp_path):
    keeper = start_keeper(tmp_path, "sleep", "600")
    wait_for(lambda: (tmp_path / "log").exists())
    time.sleep(0.5)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(keeper.pid, number)
    time.sleep(0.5)
    assert keeper.poll() is None
    keeper.stdin.close()
    keeper.wait(15)


def test_the_end_of_the_server_ends_the_keeper_with_its_exit_code(tmp_path):
    keeper = start_keeper(tmp_path, "sh", "-c", "echo last words; exit 7")
    assert keeper.wait(15) == 7
    assert (tmp_path / "log").read_text() == "last words\n"


def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path):
    recipe = load_recipe(
        TINY, ["--model_name_or_path", "/no/such/model", "--output_dir", str(tmp_path)]
    )
    server = VLLMServer(recipe, None)
    obituary = r"ended before it was ready; the last lines of .*vllm.log:\n"
    with pytest.raises(ServerDied, match=obituary):
        server.start()


def test_a_model_that_cannot_be_had_is_told_before_the_server_starts(tmp_path):
    recipe = load_recipe(
        TINY, ["--model_name_or_path", "owner/none", "--output_dir", str(tmp_path)]
    )
    server = VLLMServer(recipe, None)
    with pytest.raises(InputError, match="'owner/none' is not in the cache and the hub cannot"):
        server.start()
    assert not server.log.exists()


@pytest.mark.slow
def test_a_server_that_hangs_ends_the_run_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", TRAINING, str(TINY), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    log = tmp_path / "logs" / "vllm.log"
    lost = "error: the vLLM server does not answer any more; the last lines of"
    assert done.stderr.startswith(f"{lost} {log}:\n")
    assert done.stderr.endswith("\n  last words\n")


def test_no_module_of_the_current_folder_stands_in_for_a_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("random", "yaml", "torch"):  # beside a reward of the user's
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken for the library')\n")
    arguments = ["--model_name_or_path", "/no/such/model", "--output_dir", str(tmp_path / "run")]
    server = VLLMServer(load_recipe(TINY, arguments), None)
    with pytest.raises(ServerDied) as caught:
        server.start()
    assert "vllm.log:\n  " in str(caught.value)  # the keeper has come as far as its server
    assert "taken for" not in str(caught.value)
    assert server._command[:2] == [sys.executable, "-P"]  # vLLM is not here to be asked


def test_the_server_sees_its_gpu_and_nothing_of_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    server = VLLMServer(load_recipe(RECIPES / "grpo-qwen-2.5-3b-deepseek-r1-countdown.yaml"), "3")
    assert server._env["CUDA_VISIBLE_DEVICES"] == "3"
    assert server._env["VLLM_SERVER_DEV_MODE"] == "1"
    assert not {"RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"} & server._env.keys()
    command = " ".join(server._command)
    assert "--revision aa8e72537993ba99e69dfaafa59ed015b17504d1 --host 127.0.0.1" in command
    port = server.url.rpartition(":")[2]
    assert f"--port {port} --max-model-len 1280 --dtype bfloat16" in command
    assert '--weight-transfer-config {"backend": "nccl"}' in command
    assert "--logprobs-mode processed_logprobs --max-logprobs -1" in command
    assert "--middleware mini_r1.launch.guard.OnlyTheRun" in command
    assert len(server._env[KEY]) > 40
    assert server._env[KEY] not in command
    assert str(server.group_port) not in server.url
