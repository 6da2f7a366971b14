"""What leaves the machine, and what never does: runs that push to a hub, a real server here."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mini_r1.run import MANIFEST_FILE, SUMMARY_FILE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "tiny-cpu.yaml")
BIN = Path(sys.executable).parent
TOKEN = "whatever-it.looks_like"
SHORT = {
    "max_steps": 3,
    "save_steps": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_generations": 4,
    "max_completion_length": 20,
    "num_puzzles": 300,
    "num_eval_puzzles": 4,
    "num_eval_samples": 1,
    "save_total_limit": 2,
}
PUBLIC = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("recipe.yaml", "manifest.json", "report.html", "eval/before.json", "eval/after.json"),
    *("samples/completion_samples.txt", "samples/success_completion_samples.txt"),
}
# `mini-r1 train` where two processes are planned, which it does on GPUs only.
TWO_BY_TRAIN = (
    "import sys; from dataclasses import replace; from mini_r1 import cli\n"
    "from mini_r1.launch import plan; make_plan = plan.make_plan\n"
    "plan.make_plan = lambda *by: replace(make_plan(*by), processes=2, launcher='cpu')\n"
    "sys.exit(cli.main(sys.argv[1:]))"
)
TWO = ["--num_processes", "2", "--config_file", str(ROOT / "configs/accelerate_configs/cpu.yaml")]
SCRIPT = [str(ROOT / "scripts" / "run_r1_grpo.py"), "--config", RECIPE]
COMMANDS = {
    "mini-r1": [BIN / "mini-r1", "train", RECIPE],
    "script": [sys.executable, *SCRIPT],
    "mini-r1, launched": [sys.executable, "-c", TWO_BY_TRAIN, "train", RECIPE],
    "accelerate launch": [BIN / "accelerate", "launch", *TWO, *SCRIPT],
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; keeps every file and every token that it is sent."""

    files: dict
    tokens: set

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer({})

    def do_GET(self):
        self.keep_token()
        self.answer({"name": "me", "id": "me/run", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        self.keep_token()
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for operation in map(json.loads, body.splitlines()):
                if operation["key"] == "file":
                    value = operation["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            self.answer({"commitUrl": f"{self.path}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            host = f"http://{self.headers['Host']}/me/run"
            self.answer({"url": host, "errors": [], "warnings": []})

    def keep_token(self):
        if "Authorization" in self.headers:
            self.tokens.add(self.headers["Authorization"])

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)


@pytest.fixture
def hub():
    class OneHub(Hub):
        files, tokens = {}, set()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        OneHub.address = f"http://127.0.0.1:{server.server_port}"
        yield OneHub
        server.shutdown()


def holders(folder, secret):
    """The files of a folder that hold a text."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "start",
    [
        "mini-r1",
        pytest.param("script", marks=pytest.mark.minutes),
        pytest.param("mini-r1, launched", marks=pytest.mark.minutes),
        pytest.param("accelerate launch", marks=pytest.mark.minutes),
    ],
)
def test_a_run_is_published_without_what_is_nobodys_business(tmp_path, hub, start):
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "logs" / "vllm.log").write_text("private")
    given = {**SHORT, "output_dir": run_dir, "hub_model_id": "me/run", "hub_token": TOKEN}
    words = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    env = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    env |= {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [*map(str, COMMANDS[start]), *words, "--push_to_hub"],
        env=env | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run_dir / SUMMARY_FILE).is_file()

    # The token got there, and nowhere else.
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert holders(tmp_path, TOKEN) == []
    assert TOKEN not in done.stdout + done.stderr
    command = json.loads((run_dir / MANIFEST_FILE).read_text())["command"]
    assert start.endswith("launched") or command[-2:] == ["--hub_token", "***"]

    # Exactly what is meant to be public got out, while the run went on and at its end.
    assert hub.files.keys() == PUBLIC
    assert hub.files["model.safetensors"] == (run_dir / "model.safetensors").read_bytes()
    assert {path.name for path in run_dir.iterdir()} > {"checkpoint-2", "training_args.bin"}
