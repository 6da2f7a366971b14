"""The guard in front of a real application, over real sockets."""

import socket
import subprocess
import sys
import threading
import time

import pytest
import requests
import uvicorn

from mini_r1 import InputError, quirks
from mini_r1.launch import guard
from mini_r1.launch.guard import KEY, OnlyTheRun, draw_key, key_header
from mini_r1.launch.vllm_server import answers, check_key


async def everything(scope, receive, send):
    """Says 200 to whatever it is asked, as what is behind the guard."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def server(monkeypatch):
    """The address of a guarded server; this process has its key."""
    monkeypatch.setenv(KEY, "")
    draw_key()
    config = uvicorn.Config(OnlyTheRun(everything), lifespan="off", log_level="critical")
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.should_exit = True
        thread.join()


PATHS = ["/health", "/v1/models", "/update_weights", "/openapi.json", "//", "/v1/../health"]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_stranger_is_refused_everywhere(server, method):
    for path in PATHS:
        for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer "}):
            assert requests.request(method, server + path, headers=header).status_code == 401
        assert requests.request(method, server + path, headers=key_header()).status_code == 200


def test_a_run_knows_its_server_and_the_key_of_another_is_none(server):
    assert answers(server)
    check_key(server)
    draw_key()
    assert not answers(server)
    with pytest.raises(InputError, match=f"vllm_server_base_url: the server refuses.*set {KEY} to"):
        check_key(server)
    check_key("http://127.0.0.1:9")  # of nobody: TRL waits for it


def test_without_a_key_nobody_could_be_let_in(monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv(KEY, raising=False) if value is None else monkeypatch.setenv(KEY, value)
        assert key_header() == {}
        with pytest.raises(RuntimeError, match=f"set {KEY}"):
            OnlyTheRun(everything)


def test_a_websocket_is_closed(monkeypatch):
    monkeypatch.setenv(KEY, "x")
    sent = []

    async def send(message):
        sent.append(message)

    with pytest.raises(StopIteration):
        OnlyTheRun(everything)({"type": "websocket", "headers": []}, None, send).send(None)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_requests_bring_the_key_to_the_server_and_nowhere_else(server, monkeypatch):
    monkeypatch.setattr("requests.adapters.HTTPAdapter.add_headers", lambda *args, **kwargs: None)
    assert requests.get(f"{server}/health").status_code == 401
    quirks.show_key(f"{server}/", key_header())
    assert requests.Session().post(f"{server}/v1/models").status_code == 200
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"http://127.0.0.1:{other.getsockname()[1]}"
        asking = threading.Thread(target=pytest.raises, args=(OSError, requests.get, address))
        asking.start()
        connection, _ = other.accept()
        assert b"Authorization" not in connection.recv(10_000)
        connection.close()
        asking.join()


def test_it_loads_without_any_library():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import mini_r1.launch.guard"
    source = str(guard.__file__).removesuffix("mini_r1/launch/guard.py")
    subprocess.run([sys.executable, "-I", "-S", "-c", code, source], check=True)
