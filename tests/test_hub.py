"""With a real server in the hub's place, on this machine: it answers, refuses, or hangs."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from mini_r1 import InputError, hub
from mini_r1.model import model_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(home, name, folder):
    """A model as `hf download` leaves it, made of a folder's files."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in Path(folder).iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    return snapshot


class Grumpy(http.server.BaseHTTPRequestHandler):
    """Says 501 to everything."""

    def log_message(self, *args):
        pass


FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "README.md")


class Small(Grumpy):
    """Has one model, whose files say their name."""

    def do_GET(self):
        path, answer = self.path.partition("?")[0], {}
        if path.startswith("/owner/model/resolve/"):
            name = path.partition(COMMIT)[2].lstrip("/")
            return self.send(name.encode(), {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        if path == "/api/models/owner/model/revision/main":
            answer = {"id": "owner/model", "sha": COMMIT}
        elif path.endswith(f"/tree/{COMMIT}"):
            answer = [{"type": "file", "path": n, "size": len(n), "oid": n} for n in FILES]
        return self.send(json.dumps(answer).encode())

    do_HEAD = do_GET

    def send(self, content, headers=()):
        self.send_response(200)
        for header in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def test_the_weights_are_fetched_and_nothing_that_is_not_read(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Small) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        elsewhere = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        env = {**os.environ, **elsewhere, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "mini_r1.hub", "owner/model", "main"]
        subprocess.run(command, env=env, check=True, timeout=30)
        server.shutdown()
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / COMMIT
    assert {path.name for path in snapshot.iterdir()} == {"config.json", "model.safetensors"}


def test_what_the_hub_does_not_give_is_told(online):
    with http.server.HTTPServer(("127.0.0.1", 0), Grumpy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(InputError, match="'owner/model' cannot be downloaded"):
            hub.fetch("owner/model", "main")
        server.shutdown()


def test_an_answer_is_an_answer_whatever_it_says(online):
    with http.server.HTTPServer(("127.0.0.1", 0), Grumpy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")
        assert hub.unreachable() is None
        hub.require("owner/model")
        assert constants.HF_HUB_OFFLINE is False
        server.shutdown()


def test_a_hub_that_hangs_is_asked_once_and_not_for_long(online, listening, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    online(listening)
    for _ in range(2):
        started = time.monotonic()
        assert hub.unreachable() in ("ReadTimeout", "no answer within 0 s")
    assert time.monotonic() - started < 0.1


def test_without_the_hub_the_cache_must_do(online, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = put_into_cache(tmp_path, "owner/model", model_path("tiny_base"))
    online("http://127.0.0.1:9")  # the port of nobody
    assert "owner/other" in str(hub.refusal("owner/other"))
    with pytest.raises(
        InputError, match=r"'owner/other' is not in the cache and the hub cannot be"
    ):
        hub.require("owner/other")
    assert hub.refusal("owner/model") is None
    assert hub.cached("owner/model") == snapshot
    assert hub.cached("owner/model", revision="v2") is None
    # From here on nobody asks the hub.
    assert constants.is_offline_mode()


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_to_write_instead(kind):
    problem = hub.refusal("owner/other", kind)
    assert problem.key == hub.KEYS[kind]
    assert "(HF_HUB_OFFLINE is set)" in str(problem)
    assert str(problem).endswith({"model": "or tiny_base", "dataset": "or generated"}[kind])


def test_names_that_no_hub_has():
    assert "owner/my model" in str(hub.refusal("owner/my model"))


def test_asking_imports_no_ml_library():
    code = (
        "import sys; from mini_r1 import hub; hub.refusal('owner/other')\n"
        "print(*sys.modules.keys() & {'torch', 'transformers', 'datasets'})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
