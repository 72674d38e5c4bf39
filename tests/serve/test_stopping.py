"""A frontend that is told to end: what is under way finishes, nothing new begins, and nothing takes for ever."""

import http.client
import json
import os
import signal
import threading
import time

import pytest
from fake_engine import FakeEngine, is_ready, wait_until

from infer.serve.link import FrontendConfig, Ranks, RankState, Stop
from infer.serve.spawn import spawn_frontend
from infer.signals import SAME_SECONDS

JSON = {"Content-Type": "application/json"}
LONG = {"prompt": "hello", "max_tokens": 60, "stream": True}


@pytest.fixture
def served(tokenizer_path, tokenizer):
    """Starts a frontend as under torchrun (this process is the agent) and its engine, which takes 60 steps a second."""
    made = []

    def start(**fields):
        path = str(tokenizer_path)
        settings = {"port": 0, "agent_pid": os.getpid(), "served_model_name": ("tiny",), **fields}
        handle = spawn_frontend(FrontendConfig(model_path=path, tokenizer_path=path, **settings))
        handle.wait_ready()
        engine = FakeEngine(handle, tokenizer)
        engine.delay = 1 / 60
        engine.hello()
        made.append((handle, engine))
        wait_until(lambda: is_ready(handle.port))
        return handle, engine

    yield start
    for handle, engine in made:
        engine.close()
        handle.stop(timeout=5)


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, None if body is None else json.dumps(body), JSON)
    return connection.getresponse()


def get(port, path):
    reply = ask(port, "GET", path)
    return reply.status, json.loads(reply.read())


class Streams:
    """Streams that have begun, and what came of them."""

    def __init__(self, port, count):
        self.texts = [""] * count
        self._begun = [threading.Event() for _ in range(count)]
        self._threads = [threading.Thread(target=self._read, args=(port, i), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()
        for begun in self._begun:
            assert begun.wait(10)

    def _read(self, port, index):
        reply = ask(port, "POST", "/v1/completions", LONG)
        for line in reply:
            self.texts[index] += line.decode()
            self._begun[index].set()

    def ends(self):
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a stream does not end"
        return self.texts


def is_whole(text):
    return "error" not in text and '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")


def test_what_is_under_way_finishes_and_nothing_new_begins(served):
    handle, engine = served()
    streams = Streams(handle.port, 3)
    os.kill(handle.pid, signal.SIGTERM)
    wait_until(lambda: get(handle.port, "/ready")[0] == 503)
    assert get(handle.port, "/ready")[1]["error"]["code"] == "stopping"
    status, health = get(handle.port, "/health")
    assert (status, health["status"]) == (200, "stopping"), "whoever restarts what is not healthy has to wait"
    refused = ask(handle.port, "POST", "/v1/completions", {"prompt": "late"})
    error = json.loads(refused.read())["error"]
    assert (refused.status, refused.headers["Retry-After"], error["code"]) == (503, "1", "stopping")
    assert "shutting down" in error["message"] and "SIGTERM" in error["message"]
    assert all(map(is_whole, streams.ends()))
    wait_until(lambda: handle.poll() == 0)
    assert engine.bye is not None and "SIGTERM" in engine.bye.reason
    assert not handle.socket_path.exists()


def test_the_engine_tells_it_to_stop_as_well(served):
    handle, engine = served()
    streams = Streams(handle.port, 1)
    engine.link.send(Stop(reason="rank 3 was told to end", timeout_s=20.0))
    wait_until(lambda: get(handle.port, "/ready")[0] == 503)
    assert "rank 3 was told to end" in get(handle.port, "/ready")[1]["error"]["message"]
    assert all(map(is_whole, streams.ends()))
    wait_until(lambda: handle.poll() == 0 and engine.bye is not None)


def test_what_is_not_done_in_time_gets_an_error(served):
    handle, engine = served(shutdown_timeout=0.5)
    engine.delay = 1.0
    streams = Streams(handle.port, 2)
    started = time.monotonic()
    os.kill(handle.pid, signal.SIGTERM)
    for text in streams.ends():
        *_, error, done = text.strip().split("\n\n")
        told = json.loads(error.removeprefix("data: "))["error"]
        assert (told["type"], done) == ("service_unavailable", "data: [DONE]")
        assert "not done within 0.5 s (--shutdown-timeout)" in told["message"]
    assert 0.5 <= time.monotonic() - started < 4
    wait_until(lambda: handle.poll() == 0)


def test_a_second_ctrl_c_means_now(served):
    handle, engine = served()
    engine.is_stuck = True
    with_reply = threading.Thread(target=lambda: replies.append(ask(handle.port, "POST", "/v1/completions", LONG)))
    replies = []
    with_reply.start()
    wait_until(lambda: len(engine.requests) == 1)
    os.kill(handle.pid, signal.SIGINT)
    wait_until(lambda: get(handle.port, "/ready")[0] == 503)
    time.sleep(2 * SAME_SECONDS)
    assert handle.poll() is None
    os.kill(handle.pid, signal.SIGINT)
    wait_until(lambda: handle.poll() == 0)
    with_reply.join(5)
    assert replies[0].status == 503 and "SIGINT" in json.loads(replies[0].read())["error"]["message"]


def test_less_time_may_be_given_later(served):
    handle, engine = served()
    engine.is_stuck = True
    thread = threading.Thread(target=ask, args=(handle.port, "POST", "/v1/completions", LONG), daemon=True)
    thread.start()
    wait_until(lambda: len(engine.requests) == 1)
    for timeout_s in (60.0, 0.0, 60.0):
        engine.link.send(Stop(reason="enough", timeout_s=timeout_s))
    wait_until(lambda: handle.poll() == 0)


def test_an_engine_that_is_lost_meanwhile_is_not_waited_for(served):
    handle, engine = served()
    engine.delay = 1.0
    streams = Streams(handle.port, 1)
    os.kill(handle.pid, signal.SIGTERM)
    wait_until(lambda: get(handle.port, "/ready")[0] == 503)
    engine.close()
    (text,) = streams.ends()
    assert "the engine has ended" in text
    wait_until(lambda: handle.poll() == 1)


def test_health_tells_of_every_rank_also_when_they_are_gone(served):
    handle, engine = served()
    assert get(handle.port, "/health")[1]["ranks"] == []
    states = [
        RankState(rank=0, phase="serving", step=12, busy=True, phase_seconds=3.0, age_seconds=0.0),
        RankState(rank=1, phase="building", step=-1, busy=False, phase_seconds=1.0, age_seconds=0.5),
    ]
    engine.link.send(Ranks(items=states))
    wait_until(lambda: len(get(handle.port, "/health")[1]["ranks"]) == 2)
    first, second = get(handle.port, "/health")[1]["ranks"]
    assert (first["rank"], first["phase"], first["step"], first["busy"]) == (0, "serving", 12, True)
    assert 3.0 <= first["seconds_in_phase"] < 8
    assert (second["step"], second["busy"]) == (None, False) and 0.5 <= second["seconds_since_heard"] < 5
    engine.close()
    wait_until(lambda: get(handle.port, "/health")[0] == 503)
    _, health = get(handle.port, "/health")
    assert health["error"]["code"] == "restarting" and health["phase"].startswith("the engine has ended")
    assert [rank["phase"] for rank in health["ranks"]] == ["serving", "building"]
    assert health["ranks"][0]["seconds_since_heard"] >= first["seconds_since_heard"]
