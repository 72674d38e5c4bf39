"""Bad input: each is answered in OpenAI's form, the engine never sees it, and the server goes on."""

import asyncio
import contextlib
import http.client
import itertools
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import aiohttp
import pytest

JSON = {"Content-Type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def exchange(served, path, body, headers=JSON, method="POST"):
    """-> (status, parsed body); the engine must not have got a request."""
    url, engine = served
    before = len(engine.requests)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        data = reply.read()
    finally:
        connection.close()
    assert len(data) < 3000, "an error repeats its input"
    assert len(engine.requests) == before
    return reply.status, json.loads(data)


def check_error(status, reply, wanted, text=""):
    assert status == wanted, reply
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["message"] and text.lower() in reply["error"]["message"].lower()


RAW = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[]", "must be a JSON object, not a list"),
    (b"null", "not null"),
    (b'"x"', "not 'x'"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"prompt": "a", "user": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deeply"),
    (b'{"prompt": "a", "temperature": NaN}', "not JSON"),
    (b'{"prompt": "a", "temperature": Infinity}', "not JSON"),
    (b'{"prompt": "a", "temperature": 1e999}', "out of range"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "out of range"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
    (b'{"prompt": "\\ud800"}', "not JSON"),
    (b'{"prompt": "\\ud800 and so on"}', "not JSON"),
    (b"\xef\xbb\xbf{}", "not JSON"),
    (b'{"prompt": "a"} x', "not JSON"),
    (b"\x00", "not JSON"),
]


@pytest.mark.parametrize(("body", "text"), RAW, ids=range(len(RAW)))
def test_malformed_json(served, body, text):
    check_error(*exchange(served, COMPLETIONS, body), 400, text)
    check_error(*exchange(served, CHAT, body), 400)


FIELDS = [
    ({}, "prompt is missing"),
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": []}, "empty list"),
    ({"prompt": [[]]}, "the prompt is empty"),
    ({"prompt": 5}, "prompt must be"),
    ({"prompt": [True]}, "prompt must be"),
    ({"prompt": [1.5]}, "prompt must be"),
    ({"prompt": ["a", 1]}, "prompt must be"),
    ({"prompt": [[1], "a"]}, "prompt must be"),
    ({"prompt": [-1]}, "token id -1"),
    ({"prompt": [100_000]}, "token id 100000"),
    ({"prompt": [2**63]}, "token id"),
    ({"prompt": ["a"] * 100_000}, "1024 choices"),
    ({"prompt": ["a"] * 600, "n": 2}, "1024 choices"),
    ({"prompt": "a", "n": 0}, "n must be"),
    ({"prompt": "a", "n": 10**6}, "choices"),
    ({"prompt": "a", "n": True}, "n: expected int"),
    ({"prompt": "a", "n": "1"}, "n: expected int"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1"),
    ({"prompt": "a", "max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens must be at most max_tokens (0)"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens must be"),
    ({"prompt": "a", "max_tokens": 2**70}, "maximum context length"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens: expected int"),
    ({"prompt": "a", "temperature": -1}, "temperature must be"),
    ({"prompt": "a", "temperature": "hot"}, "temperature: expected float"),
    ({"prompt": "a", "top_p": 0}, "top_p must be"),
    ({"prompt": "a", "top_k": -2}, "top_k must be"),
    ({"prompt": "a", "top_k": 2**70}, "top_k must be"),
    ({"prompt": "a", "min_p": 2}, "min_p must be"),
    ({"prompt": "a", "seed": 2**64}, "seed must be"),
    ({"prompt": "a", "seed": 1.5}, "seed: expected int"),
    ({"prompt": "a", "stop": [""]}, "stop must hold"),
    ({"prompt": "a", "stop": ["x"] * 100_000}, "stop may hold"),
    ({"prompt": "a", "stop": "x" * 10**6}, "1024 characters"),
    ({"prompt": "a", "stop": ["x" * 1024] * 8 + ["y"]}, "8192 characters together, not 8193"),
    ({"prompt": "a", "stop": [None]}, "stop[0]: expected str"),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
    ({"prompt": "a", "stop_token_ids": [2**40]}, "stop_token_ids entries must be"),
    ({"prompt": "a", "stop_token_ids": [100_000]}, "stop_token_ids holds 100000"),
    ({"prompt": "a", "logprobs": -1}, "logprobs must be"),
    ({"prompt": "a", "logprobs": 10**6}, "logprobs must be"),
    ({"prompt": "a", "logprobs": True}, "logprobs: expected int"),
    ({"prompt": "a", "logprobs": 21}, "logprobs must be from 0 to 20 (--max-logprobs"),
    ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs must be from 0 to 20"),
    ({"prompt": "a", "logprobs": 20, "max_tokens": 100, "n": 1000}, "log-probabilities"),
    ({"prompt": [[65] * 200] * 100, "prompt_logprobs": 20, "max_tokens": 1}, "log-probabilities"),
    ({"prompt": [65] * 200, "n": 100, "echo": True, "logprobs": 20, "max_tokens": 0}, "log-probabilities"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"5": 1e6}}, "logit_bias[5] must be"),
    ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias holds 99999"),
    ({"prompt": "a", "logit_bias": []}, "logit_bias: expected object"),
    ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids must"),
    ({"prompt": [[65]] * 1024, "allowed_token_ids": [*range(256)] * 5}, "1280 entries for each of 1024 choices"),
    ({"prompt": "a", "n": 1024, "allowed_token_ids": [*range(256)] * 5}, "1280 entries for each of 1024 choices"),
    ({"prompt": "a", "stop_token_ids": [5] * 1025}, "stop_token_ids may hold 1024 entries, not 1025"),
    ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias may hold 1024 entries"),
    ({"prompt": "a", "min_tokens": 100, "max_tokens": 2}, "min_tokens must be"),
    ({"prompt": "a", "presence_penalty": 3}, "presence_penalty must be"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty must be"),
    ({"prompt": "a", "stream": 1}, "stream: expected bool"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "needs stream"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "unknown field x"),
    ({"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
    ({"prompt": "a", "temprature": 1}, "did you mean temperature?"),
    ({"prompt": "a", "x" * 10**6: 1}, "unknown field"),
    ({"prompt": "a", "suffix": "x"}, "suffix is not supported"),
    ({"prompt": "a", "best_of": 10**6}, "best_of must be from n to 1024"),
    ({"prompt": "a", "n": 1, "best_of": 500, "logprobs": 20, "max_tokens": 100}, "log-probabilities"),
    ({"prompt": "a", "structured_outputs": {"regex": "(" * 30_000}}, "structured_outputs.regex"),
    ({"prompt": "a", "structured_outputs": {"json": {"anyOf": [{}] * 100_000}}}, "262144 bytes"),
    ({"prompt": "a", "structured_outputs": []}, "structured_outputs: expected object"),
    ({"prompt": "a", "structured_outputs": {"choice": ["x"] * 10**5}}, "choice must hold 1 to 1024"),
    ({"prompt": "a", "bad_words": ["x" * 10**6]}, "bad_words must have"),
    ({"prompt": "a", "request_id": "x" * 10**6}, "request_id must be"),
    ({"prompt": "a", "cache_salt": "x" * 10**6}, "cache_salt must have"),
    ({"prompt": "a", "truncate_prompt_tokens": -(2**70)}, "truncate_prompt_tokens must be"),
    ({"prompt": "a", "priority": 1.5}, "priority: expected int"),
    ({"prompt": "a" * (2 << 20), "truncate_prompt_tokens": 1}, "characters"),
    ({"prompt": "a", "use_beam_search": True}, "use_beam_search is not supported"),
    ({"prompt": "a", "store": True}, "store is not supported"),
    ({"prompt": "a", "prompt_embeds": "x"}, "prompt_embeds is not supported"),
    ({"prompt": [5] * 256}, "maximum context length"),
    ({"prompt": [5] * 250, "max_tokens": 7}, "maximum context length"),
    ({"prompt": "hello " * 200}, "maximum context length"),
    ({"prompt": "a" * (7 << 20)}, "characters"),
]


@pytest.mark.parametrize(("body", "text"), FIELDS, ids=range(len(FIELDS)))
def test_completion_fields(served, body, text):
    check_error(*exchange(served, COMPLETIONS, json.dumps(body)), 400, text)


USER = [{"role": "user", "content": "hi"}]
CHATS = [
    ({}, "messages is missing"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "hi"}, "messages: expected array"),
    ({"messages": ["hi"]}, "messages[0]: expected object"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "not 'robot'"),
    ({"messages": [{"role": "r" * 10**6, "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "not null"),
    ({"messages": [{"role": "user", "content": 5}]}, "not 5"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text only"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
    ({"messages": [*USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[1].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": USER * 4097}, "messages may hold 4096 entries, not 4097"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "no tools"),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools[0] must be"),
    ({"messages": USER, "response_format": {"type": "json_array"}}, "response_format.type"),
    ({"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template is not supported"),
    ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "must not set messages"),
    ({"messages": USER, "chat_template_kwargs": {"add_generation_prompt": 1}}, "must not set"),
    ({"messages": USER, "chat_template_kwargs": {"eos_token": "x"}}, "must not set eos_token"),
    ({"messages": USER, "top_logprobs": 2}, "needs logprobs"),
    ({"messages": USER, "logprobs": True, "top_logprobs": -1}, "top_logprobs must be from 0 to 20"),
    ({"messages": USER, "logprobs": 5}, "logprobs: expected bool"),
    ({"messages": USER, "max_tokens": 5, "max_completion_tokens": 6}, "differ"),
    ({"messages": USER, "max_tokens": 1000}, "maximum context length"),
    ({"messages": USER, "add_generation_prompt": True, "continue_final_message": True}, "cannot both"),
    ({"messages": USER, "suffix": "x"}, "suffix is not supported"),
    ({"messages": USER, "best_of": 2}, "it belongs to /v1/completions"),
    ({"messages": [{"role": "user", "content": "hello " * 300}]}, "maximum context length"),
]


@pytest.mark.parametrize(("body", "text"), CHATS, ids=range(len(CHATS)))
def test_chat_fields(served, body, text):
    check_error(*exchange(served, CHAT, json.dumps(body)), 400, text)


def test_template_variables_of_any_name_are_harmless(served, tokenizer):
    url, _ = served
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    kwargs = {"self": 1, "context": 2, "chat": 3, "__class__": 4, "enable_thinking": False}
    body = {"messages": USER, "max_tokens": 1, "chat_template_kwargs": kwargs}
    connection.request("POST", CHAT, json.dumps(body), JSON)
    assert connection.getresponse().status == 200


def test_codes(served):
    status, reply = exchange(served, COMPLETIONS, json.dumps({"prompt": [5] * 300}))
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    status, reply = exchange(served, COMPLETIONS, json.dumps({"prompt": "a", "model": "m" * 5000}))
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (404, "model_not_found", "model")
    status, reply = exchange(served, COMPLETIONS, json.dumps({"prompt": "a", "top_p": 0}))
    assert (reply["error"]["type"], reply["error"]["param"]) == ("invalid_request_error", "top_p")


def test_routes_methods_and_types(served):
    check_error(*exchange(served, "/v2", None, method="GET"), 404, "no route /v2")
    check_error(*exchange(served, COMPLETIONS, None, method="GET"), 405, "use POST")
    check_error(*exchange(served, "/health", b"{}"), 405)
    check_error(*exchange(served, COMPLETIONS, b"{}", {"Content-Type": "text/plain"}), 415, "application/json")
    check_error(*exchange(served, COMPLETIONS, b"{}", JSON | {"Content-Encoding": "gzip"}), 415, "compressed")
    check_error(*exchange(served, COMPLETIONS, b" " * (9 << 20)), 413)


def raw(served, data: bytes, timeout: float = 10.0) -> bytes:
    address = urlsplit(served[0])
    with socket.create_connection((address.hostname, address.port), timeout=timeout) as connection:
        connection.sendall(data)
        reply = b""
        while chunk := connection.recv(65536):
            reply += chunk
    return reply


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost x\r\n\r\n", 400),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000 + b"\r\n", 431),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
    ],
    ids=range(8),
)
def test_what_is_not_http(served, data, status):
    head, _, body = raw(served, data).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == b"%d" % status
    check_error(status, json.loads(body), status)


def test_chunked_body_over_the_limit(served):
    async def send() -> int:
        async def chunks():
            for _ in range(40):
                yield b" " * (1 << 20)

        async with (
            aiohttp.ClientSession() as session,
            session.post(served[0] + COMPLETIONS, data=chunks(), headers=JSON) as reply,
        ):
            return reply.status

    # The server may close before the upload is through; the next test shows that it goes on.
    with contextlib.suppress(aiohttp.ClientError):
        assert asyncio.run(send()) == 413


def post_raw(served, body: bytes, length: int) -> socket.socket:
    address = urlsplit(served[0])
    connection = socket.create_connection((address.hostname, address.port), timeout=40)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(head + b"Content-Length: %d\r\n\r\n" % length + body)
    return connection


def test_uploads_that_stand_still_hold_nobody_up(served):
    idle = [post_raw(served, b"{", 2_000_000) for _ in range(40)]
    start = time.monotonic()
    for body in (iter([b'{"prompt": "hello",', b'"max_tokens": 1}']), b'{"prompt": "hello"' + b" " * (2 << 20) + b"}"):
        connection = http.client.HTTPConnection(urlsplit(served[0]).netloc, timeout=20)
        connection.request("POST", COMPLETIONS, body, JSON)
        assert connection.getresponse().status == 200
    assert time.monotonic() - start < 5
    for connection in idle:
        connection.close()


@pytest.mark.slow
def test_large_uploads_must_go_on(served):
    holding = [post_raw(served, b" " * 1_100_000, 3_000_000) for _ in range(17)]
    replies = sorted(connection.recv(12) for connection in holding)
    assert replies == [b"HTTP/1.1 408"] * 16 + [b"HTTP/1.1 503"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [[65],' + b"[]," * 2_500_000 + b"[65]]}",
        b'{"prompt": [' + b"1," * 3_900_000 + b"1]}",
        b'{"prompt": [[65]' + b",[65]" * 1023 + b'], "allowed_token_ids": [' + b"65," * 1_000_000 + b"65]}",
        b'{"messages": [{}' + b",{}" * 2_500_000 + b"]}",
    ],
    ids=["lists", "tokens", "allowed", "messages"],
)
def test_huge_but_valid_bodies_leave_the_server_awake(served, body):
    path = CHAT if b"messages" in body[:20] else COMPLETIONS
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(exchange(served, path, body)[0]))
    thread.start()
    longest = 0.0
    while thread.is_alive():
        start = time.monotonic()
        connection = http.client.HTTPConnection(urlsplit(served[0]).netloc, timeout=20)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        longest = max(longest, time.monotonic() - start)
        time.sleep(0.01)
    assert statuses == [400] and longest < 2.0, longest


def test_a_stream_beside_them_goes_on_undisturbed(served):
    url, engine = served
    asked = {"prompt": "hello world, hello", "max_tokens": 200, "ignore_eos": True}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("POST", COMPLETIONS, json.dumps(asked), JSON)
    expected = json.loads(connection.getresponse().read())["choices"][0]["text"]

    pieces, times, begun = [], [], threading.Event()

    def read() -> None:
        connection.request("POST", COMPLETIONS, json.dumps({**asked, "stream": True}), JSON)
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
                times.append(time.monotonic())
                begun.set()

    engine.delay = 0.02
    try:
        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(10)
        stops = b'{"prompt": "a", "stop": [' + b'"x",' * 1_000_000 + b'"x"]}'
        bodies = itertools.cycle([*(body for body, _ in RAW), stops])
        num_sent = 0
        while reader.is_alive():
            assert exchange(served, COMPLETIONS, next(bodies))[0] == 400
            num_sent += 1
        reader.join()
    finally:
        engine.delay = 0.0
    assert "".join(pieces) == expected and num_sent > len(RAW)
    assert max(b - a for a, b in itertools.pairwise(times)) < 1.5


def test_still_serving(served):
    connection = http.client.HTTPConnection(urlsplit(served[0]).netloc, timeout=20)
    connection.request("POST", COMPLETIONS, json.dumps({"prompt": "hello", "max_tokens": 3}), JSON)
    reply = connection.getresponse()
    assert reply.status == 200 and json.loads(reply.read())["usage"]["completion_tokens"] == 3
