"""The process: starting, not being ready, losing clients and engines, ending."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import msgspec
import pytest
from fake_engine import MODEL, FakeEngine, frontend, is_ready, wait_until

from infer.config import ServerConfig
from infer.serve.link import Bye, FrontendConfig, Progress
from infer.serve.spawn import start_frontend

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def ready(tokenizer_path, tokenizer):
    """(handle, engine) of this test alone."""
    with frontend(tokenizer_path, shutdown_timeout=0.0) as handle:
        engine = FakeEngine(handle, tokenizer)
        engine.hello()
        wait_until(lambda: is_ready(handle.port))
        yield handle, engine
        engine.close()


def post(port, body, path="/v1/completions"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, json.dumps(body), JSON)
    return connection.getresponse()


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def test_no_torch_and_no_transformers():
    code = (
        "import sys, infer.serve.frontend, infer.serve.server\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_not_ready_then_ready(tokenizer_path, tokenizer):
    with frontend(tokenizer_path) as handle:
        assert get(handle.port, "/health")[0] == 503
        engine = FakeEngine(handle, tokenizer)
        engine.link.send(Progress(phase="loading weights"))
        wait_until(lambda: "loading weights" in get(handle.port, "/health")[1]["error"]["message"])
        reply = post(handle.port, {"prompt": "hello"})
        assert reply.status == 503 and json.loads(reply.read())["error"]["code"] == "not_ready"
        assert get(handle.port, "/version")[0] == 200
        engine.hello()
        wait_until(lambda: is_ready(handle.port))
        assert post(handle.port, {"prompt": "hello"}).status == 200
        engine.close()


def test_it_has_a_session_and_a_private_socket(ready):
    handle, _ = ready
    assert os.getsid(handle.pid) == handle.pid != os.getsid(0)
    assert handle.socket_path.parent.stat().st_mode & 0o777 == 0o700
    with open(f"/proc/{handle.pid}/cmdline", "rb") as file:
        assert file.read().split(b"\0")[1:3] == [b"-m", b"infer.serve.frontend"]


def test_port_taken(tokenizer_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is taken; choose another with --port"):
            start_frontend(ServerConfig(port=port), tokenizer_path, tokenizer_path, MODEL)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (ServerConfig(host="no.such.host.invalid", port=0), "no address"),
        (ServerConfig(host="192.0.2.1", port=0), "no address of this machine"),
        (ServerConfig(port=70_000), "70000"),
    ],
)
def test_bad_address(tokenizer_path, server, message):
    with pytest.raises(ValueError, match=message):
        start_frontend(server, tokenizer_path, tokenizer_path, MODEL)


def test_bad_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        start_frontend(ServerConfig(port=0), tmp_path, tmp_path, MODEL)


def test_a_long_tmpdir(tokenizer_path, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with frontend(tokenizer_path) as handle:
        assert get(handle.port, "/health")[0] == 503
        assert handle.socket_path.parent.stat().st_mode & 0o777 == 0o700


def test_no_directory_for_the_socket(tokenizer_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/directory")
    with pytest.raises(ValueError, match=r"no directory for the engine's socket: .*set TMPDIR"):
        start_frontend(ServerConfig(port=0), tokenizer_path, tokenizer_path, MODEL)


def test_a_socket_that_cannot_be_made(tokenizer_path, tmp_path):
    config = FrontendConfig(
        port=0, socket_path=str(tmp_path / ("x" * 120)), model_path="m", tokenizer_path=str(tokenizer_path),
        engine_pid=os.getpid(),
    )  # fmt: skip
    command = [sys.executable, "-m", "infer.serve.frontend"]
    done = subprocess.run(
        command, input=msgspec.json.encode(config).decode(), capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("infer: error: the frontend cannot start: AF_UNIX path too long")


def test_max_logprobs(tokenizer_path, tokenizer):
    with pytest.raises(ValueError, match="max_logprobs must be from 0 to 1024, not -1"):
        ServerConfig(max_logprobs=-1)
    handle = start_frontend(ServerConfig(port=0, max_logprobs=3), tokenizer_path, tokenizer_path, MODEL)
    engine = FakeEngine(handle, tokenizer)
    try:
        engine.hello()
        wait_until(lambda: is_ready(handle.port))
        assert post(handle.port, {"prompt": "hello", "logprobs": 3}).status == 200
        reply = post(handle.port, {"prompt": "hello", "logprobs": 4})
        assert reply.status == 400 and "from 0 to 3 (--max-logprobs" in reply.read().decode()
    finally:
        engine.close()
        handle.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_client_gone(ready, stream):
    handle, engine = ready
    engine.delay = 0.02
    connection = socket.create_connection(("127.0.0.1", handle.port))
    body = json.dumps({"prompt": "hello", "max_tokens": 200, "n": 2, "stream": stream}).encode()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    wait_until(lambda: engine.num_running == 2)
    if stream:
        assert b"200 OK" in connection.recv(100)
    connection.close()
    wait_until(lambda: engine.num_running == 0, timeout=3.0)
    assert [abort.request_id for abort in engine.aborts] == [engine.requests[0].request_id]


def test_slow_reader_is_ended(ready):
    handle, engine = ready
    engine.tokens_per_step, engine.delay = 1, 0.01
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", handle.port))
    fields = {"prompt": "hello", "max_tokens": 240, "n": 70, "stream": True, "logprobs": 20}
    body = json.dumps(fields).encode()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    wait_until(lambda: engine.num_running > 0)
    wait_until(lambda: bool(engine.aborts) and engine.num_running == 0, timeout=30.0)
    connection.close()
    assert post(handle.port, {"prompt": "hello"}).status == 200


def open_stream(handle, engine):
    engine.delay = 0.02
    reply = post(handle.port, {"prompt": "hello", "max_tokens": 200, "stream": True})
    assert reply.status == 200 and reply.readline().startswith(b"data: {")
    return reply


def test_a_large_frame_is_not_a_slow_reader(ready):
    handle, engine = ready
    engine.tokens_per_step = 240  # one frame with 151,200 log-probabilities: more than may be left waiting
    reply = post(
        handle.port, {"prompt": "hello", "max_tokens": 240, "n": 30, "stream": True, "logprobs": 20, "ignore_eos": True}
    )
    events = reply.read().decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and len(events) == 31


@pytest.mark.parametrize("reason", [None, "out of memory"])
def test_engine_gone_mid_stream(ready, reason, capfd):
    handle, engine = ready
    reply = open_stream(handle, engine)
    waiting: list[int] = []
    whole = threading.Thread(
        target=lambda: waiting.append(post(handle.port, {"prompt": "hello", "max_tokens": 200}).status)
    )
    whole.start()
    wait_until(lambda: len(engine.requests) == 2)
    if reason is not None:
        engine.link.send(Bye(reason=reason))
    engine.close()
    events = reply.read().decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    error = json.loads(events[-2].removeprefix("data: "))["error"]
    assert error["code"] == "engine_gone" and (reason or "the engine has ended") in error["message"]
    whole.join(10)
    assert waiting == [503]
    wait_until(lambda: handle.poll() is not None)
    assert handle.poll() == 1
    assert "Traceback" not in capfd.readouterr().err
    assert not handle.socket_path.parent.exists()
    socket.create_server(("127.0.0.1", handle.port)).close()  # the port is free again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal(ready, number, capfd):
    handle, engine = ready
    reply = open_stream(handle, engine)
    os.kill(handle.pid, number)
    events = reply.read().decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and "told to end" in events[-2]
    wait_until(lambda: handle.poll() is not None)
    assert handle.poll() == 0 and not handle.socket_path.parent.exists()
    wait_until(lambda: engine.closed is not None)
    assert "Traceback" not in capfd.readouterr().err


def test_garbage_from_the_engine(ready):
    handle, engine = ready
    engine.link._socket.sendall(b"\xff\xff\xff\xff garbage")
    wait_until(lambda: handle.poll() is not None)
    assert handle.poll() == 1


def test_wrong_model_is_turned_away(tokenizer_path, tokenizer):
    with frontend(tokenizer_path) as handle:
        engine = FakeEngine(handle, tokenizer)
        engine.hello("another")
        wait_until(lambda: handle.poll() is not None)
        engine.close()


def test_it_ends_with_a_process_that_never_connected(tokenizer_path):
    code = (
        "import sys, time; from pathlib import Path; from infer.config import ServerConfig\n"
        "from infer.serve.spawn import start_frontend\n"
        f"path = Path({str(tokenizer_path)!r}); handle = start_frontend(ServerConfig(port=0), path, path, 'tiny')\n"
        "print(handle.pid, handle.port, handle.socket_path, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid, port, path = parent.stdout.readline().split()
    assert get(int(port), "/health")[0] == 503
    parent.kill()
    parent.wait()
    wait_until(lambda: not os.path.exists(os.path.dirname(path)))
    wait_until(lambda: not _alive(int(pid)))
    socket.create_server(("127.0.0.1", int(port))).close()


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_headers_that_never_end(ready):
    handle, _ = ready
    with socket.create_connection(("127.0.0.1", handle.port), timeout=45) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert connection.recv(10) == b""


def test_long_prompts_do_not_stop_other_streams(ready):
    handle, engine = ready
    reply = open_stream(handle, engine)
    long = {"prompt": ["x y z " * 800] * 200}  # all too long: tokenized, then refused
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(post(handle.port, long).status))
    thread.start()
    longest = last = 0.0
    while line := reply.readline():
        if line.startswith(b"data: {"):
            now = time.monotonic()
            longest, last = max(longest, now - last if last else 0.0), now
    thread.join(30)
    assert statuses == [400] and longest < 1.0
