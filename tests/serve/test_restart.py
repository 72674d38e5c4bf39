"""A frontend over several engines, one after the other: its clients lose nothing and get nothing twice."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from fake_engine import FakeEngine, is_ready, wait_until

from infer.request import Output, Request, SamplingParams
from infer.serve.job import Job
from infer.serve.link import Bye, LinkError, Outputs
from infer.serve.spawn import FrontendConfig, spawn_frontend

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def start(tokenizer_path):
    """Starts a frontend that outlives its engines, as under torchrun; this process is the agent unless told."""
    handles = []

    def started(**fields):
        path = str(tokenizer_path)
        settings = {"port": 0, "agent_pid": os.getpid(), "served_model_name": ("tiny",), **fields}
        handles.append(spawn_frontend(FrontendConfig(model_path=path, tokenizer_path=path, **settings)))
        handles[-1].wait_ready()
        return handles[-1]

    yield started
    for handle in handles:
        handle.stop(timeout=5)


def engine_for(handle, tokenizer, generation=0, **fields):
    engine = FakeEngine(handle, tokenizer, generation)
    for name, value in fields.items():
        setattr(engine, name, value)
    engine.hello()
    wait_until(lambda: is_ready(handle.port))
    return engine


def post(port, **body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    return connection.getresponse()


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


class Call(threading.Thread):
    """A request on its way, and what came of it."""

    def __init__(self, port, **body):
        super().__init__(daemon=True)
        self.port, self.body = port, body
        self.status, self.headers, self.text = 0, {}, ""
        self.start()

    def run(self):
        reply = post(self.port, **self.body)
        self.headers, self.text = dict(reply.headers), reply.read().decode()
        self.status = reply.status

    def result(self):
        self.join(20)
        assert self.status, "it got no reply"
        return json.loads(self.text)


def events(reply):
    return [json.loads(line[6:]) for line in reply.read().decode().splitlines() if line.startswith("data: {")]


def test_requests_go_on_with_the_next_engine(start, tokenizer):
    handle = start()
    first = engine_for(handle, tokenizer, delay=0.02)
    fields = {"prompt": "hello world", "max_tokens": 150, "n": 2, "ignore_eos": True, "logprobs": 1}
    calls = [Call(handle.port, **fields) for _ in range(3)]
    reply = post(handle.port, **fields, stream=True, stream_options={"include_usage": True})
    wait_until(lambda: first.num_running == 8)
    reply.readline()
    first.close()
    status, health = get(handle.port, "/health")
    assert status == 503 and health["error"]["code"] == "restarting"
    assert get(handle.port, "/ready")[0] == 503
    assert get(handle.port, "/v1/models")[0] == 200
    late = Call(handle.port, prompt="hello", max_tokens=5)

    second = engine_for(handle, tokenizer, generation=1)
    results = [call.result() for call in calls]
    assert all(choice["finish_reason"] == "length" for result in results for choice in result["choices"])
    assert [result["usage"]["completion_tokens"] for result in results] == [300] * 3
    (undisturbed,) = {json.dumps(result["choices"]) for result in results}
    assert json.dumps(Call(handle.port, **fields).result()["choices"]) == undisturbed
    streamed = events(reply)
    assert streamed[-1]["usage"]["completion_tokens"] == 300
    assert late.result()["usage"]["completion_tokens"] == 5
    resumed = [request for request in second.requests if request.output_token_ids is not None]
    assert len(resumed) == 4 and all(min(map(len, r.output_token_ids.values())) > 0 for r in resumed)
    second.close()


def test_choices_that_are_done_stay_done(start, tokenizer):
    handle = start()
    first = engine_for(handle, tokenizer, delay=0.02)
    # Choice 0 meets the end token at once, choice 1 begins behind it.
    end = tokenizer.encode("<|im_end|>", False)
    call = Call(handle.port, prompt=[*end, 70, 71, 72, 73, 74, 75, 76, 77, 78], n=2, max_tokens=9)
    wait_until(lambda: first.num_running == 1)
    first.close()
    second = engine_for(handle, tokenizer, generation=1)
    choices = call.result()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]
    assert list(second.requests[0].output_token_ids) == [1]
    second.close()


def test_a_request_that_ran_at_two_crashes_in_a_row_ends_and_the_others_go_on(start, tokenizer):
    handle = start()
    first = engine_for(handle, tokenizer, is_stuck=True)
    guilty = Call(handle.port, prompt="poison", max_tokens=5)
    wait_until(lambda: len(first.requests) == 1)
    stream = Call(handle.port, prompt="hello", max_tokens=5, stream=True)
    wait_until(lambda: len(first.requests) == 2)
    first.close()
    second = engine_for(handle, tokenizer, generation=1, is_stuck=True)
    waiting = Call(handle.port, prompt="hello", max_tokens=5)
    wait_until(lambda: len(second.requests) == 3 and second.num_running > 0)
    assert second.num_running == 1, "one suspect alone"
    second.close()
    error = guilty.result()["error"]
    assert guilty.status == 500 and error["code"] == "engine_crashed" and error["type"] == "server_error"
    assert guilty.headers["x-should-retry"] == "false"
    third = engine_for(handle, tokenizer, generation=2)
    assert waiting.result()["usage"]["completion_tokens"] == 5
    stream.join(20)
    assert stream.status == 200 and stream.text.endswith("data: [DONE]\n\n") and "error" not in stream.text
    third.close()


def test_a_later_generation_takes_the_place_of_one_that_hangs(start, tokenizer):
    handle = start()
    first = engine_for(handle, tokenizer, delay=0.02)
    call = Call(handle.port, prompt="hello", max_tokens=100)
    wait_until(lambda: first.num_running == 1)
    second = engine_for(handle, tokenizer, generation=2)
    wait_until(lambda: first.closed is not None)
    assert call.result()["usage"]["completion_tokens"] == 100
    stale = FakeEngine(handle, tokenizer, generation=1)  # nobody takes from its inbox before it says Hello
    refusal = stale.inbox.get(timeout=5)
    assert isinstance(refusal, Bye) and "generation 1 comes after generation 2" in refusal.reason
    assert Call(handle.port, prompt="hello", max_tokens=2).result()["usage"]["completion_tokens"] == 2
    for engine in (first, second, stale):
        engine.close()


def test_an_engine_of_another_model_ends_it(start, tokenizer, capfd):
    handle = start(identity="this")
    first = FakeEngine(handle, tokenizer, 0, "this")
    first.hello()
    first.is_stuck = True
    wait_until(lambda: is_ready(handle.port))
    call = Call(handle.port, prompt="hello", max_tokens=100)
    wait_until(lambda: len(first.requests) == 1)
    first.close()
    other = FakeEngine(handle, tokenizer, 1, "that")
    assert "are not those" in other.inbox.get(timeout=5).reason
    assert "are not those" in call.result()["error"]["message"] and call.status == 503
    wait_until(lambda: handle.poll() == 1)
    other.close()
    assert "Traceback" not in capfd.readouterr().err


def test_stale_frames_are_refused(start, tokenizer):
    handle = start()
    engine = engine_for(handle, tokenizer, generation=3)
    engine.link.send(Outputs(items=[], generation=2))
    wait_until(lambda: engine.closed is not None)
    assert not is_ready(handle.port)
    engine.close()


def test_no_engine_within_the_deadline_ends_it(start, tokenizer):
    handle = start(restart_deadline=1.0)
    engine = engine_for(handle, tokenizer, is_stuck=True)
    call = Call(handle.port, prompt="hello")
    wait_until(lambda: len(engine.requests) == 1)
    time.sleep(1.2)
    assert handle.poll() is None, "the deadline does not count while an engine is there"
    engine.close()
    error = call.result()["error"]
    assert call.status == 503 and "within 1 s (--restart-deadline)" in error["message"]
    wait_until(lambda: handle.poll() == 1)


def test_a_final_word_ends_it(start, tokenizer):
    handle = start()
    engine = engine_for(handle, tokenizer, is_stuck=True)
    call = Call(handle.port, prompt="hello")
    wait_until(lambda: len(engine.requests) == 1)
    engine.link.send(Bye(reason="no such model", final=True))
    engine.close()
    assert "no such model" in call.result()["error"]["message"]
    wait_until(lambda: handle.poll() == 1)


def test_it_ends_with_torchrun(start, tokenizer):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as agent:
        handle = start(agent_pid=agent.pid)
        engine = engine_for(handle, tokenizer, is_stuck=True)
        call = Call(handle.port, prompt="hello")
        wait_until(lambda: len(engine.requests) == 1)
        agent.kill()
        assert "torchrun" in call.result()["error"]["message"] and call.status == 503
        wait_until(lambda: handle.poll() == 1)
        engine.close()


def test_twenty_restarts_leave_nothing_behind(start, tokenizer):
    handle = start()
    before = []
    for generation in range(20):
        engine = engine_for(handle, tokenizer, generation)
        assert Call(handle.port, prompt="hello", max_tokens=2).result()["usage"]["completion_tokens"] == 2
        before.append(len(os.listdir(f"/proc/{handle.pid}/fd")))
        engine.close()
        wait_until(lambda: not is_ready(handle.port))
    # Connections of clients may take a moment to go; one descriptor lost with each engine would make 15.
    assert min(before[15:]) <= min(before[:5]) + 3, before


def test_comments_keep_a_silent_stream_alive(start, tokenizer):
    handle = start()
    engine = engine_for(handle, tokenizer, delay=0.02)
    reply = post(handle.port, prompt="hello", max_tokens=100, stream=True)
    reply.readline()
    engine.close()
    while not (line := reply.readline()).startswith(b":"):
        assert line, "the stream ended"
    second = engine_for(handle, tokenizer, generation=1)
    assert reply.read().endswith(b"data: [DONE]\n\n")
    second.close()


def job_with_tokens(*token_ids):
    request = Request(request_id="r", prompt_token_ids=[1], params=SamplingParams(max_tokens=9), seed=1)
    job = Job([request], None)
    job.put(Output(request_id="r", token_ids=list(token_ids)))
    return job


@pytest.mark.parametrize(("index", "left"), [(3, [7, 8]), (2, [8]), (1, []), (0, [])])
def test_tokens_that_came_before_are_dropped(index, left):
    output = job_with_tokens(4, 5, 6).fresh(Output(request_id="r", token_ids=[7, 8], token_index=index))
    assert output.token_ids == left


def test_a_missing_token_is_an_error():
    with pytest.raises(LinkError, match="goes on at token 4; it has 3"):
        job_with_tokens(4, 5, 6).fresh(Output(request_id="r", token_ids=[7], token_index=4))
