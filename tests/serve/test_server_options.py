"""The server's flags: what each of them makes the frontend do, and what is said where one is wrong."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import logging
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import MODEL, FakeEngine, is_ready, wait_until

from infer.config import EngineConfig, ServerConfig
from infer.request import Request, SamplingParams
from infer.serve import connections, listening
from infer.serve.client import MAX_SILENCE_S, EngineClient
from infer.serve.errors import ApiError
from infer.serve.link import EngineStats, FrontendConfig, Hello
from infer.serve.loop_lag import LoopLag
from infer.serve.options import default_sampling, fingerprint, frontend_config, read_api_keys, without_secrets
from infer.serve.request_log import log_request
from infer.serve.server import parse
from infer.serve.spawn import spawn_frontend, start_frontend

DOCS = Path(__file__).resolve().parents[2] / "docs" / "server.md"
JSON = {"Content-Type": "application/json"}
HELLO = Hello(generation=0, model_name=MODEL, max_model_len=256, vocab_size=400, eos_token_ids=[2])
COMPLETION = {"prompt": "hello", "max_tokens": 2}


@contextlib.contextmanager
def serving(tokenizer_path, tokenizer, **flags):
    """(handle, engine) of a frontend with these flags, ready."""
    handle = start_frontend(ServerConfig(**{"port": 0, **flags}), tokenizer_path, tokenizer_path, MODEL)
    engine = FakeEngine(handle, tokenizer)
    try:
        engine.hello((flags.get("served_model_name") or (MODEL,))[0])
        if "uds" not in flags and "ssl_certfile" not in flags:
            wait_until(lambda: is_ready(handle.port))
        yield handle, engine
    finally:
        engine.close()
        handle.stop(timeout=5)


def ask(connection, path, body=None, headers=None, method=None):
    """(status, headers, JSON or bytes); connection: a port of 127.0.0.1, or an http.client connection."""
    if isinstance(connection, int):
        connection = http.client.HTTPConnection("127.0.0.1", connection, timeout=20)
    data = None if body is None else json.dumps(body)
    connection.request(method or ("GET" if body is None else "POST"), path, data, {**JSON, **(headers or {})})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    is_json = content and reply.headers.get_content_type() == "application/json"
    return reply.status, reply.headers, json.loads(content) if is_json else content


# ------------------------------------------------------------------ flags, documentation, --config


def test_the_documentation_names_exactly_the_flags():
    told = re.findall(r"^\| ((?:`-[^`]+` ?)+)\| (.*?) \|", DOCS.read_text(), re.MULTILINE)
    rows = {names.split()[0].strip("`").replace("[no-]", ""): default.strip("` ") for names, default in told}
    fields = {
        "--" + f.name.replace("_", "-"): f
        for config in (ServerConfig, EngineConfig)
        for f in dataclasses.fields(config)
    }
    assert set(rows) == set(fields)
    for flag, field in fields.items():
        if isinstance(field.default, bool):
            wanted = "on" if field.default else "off"
        elif flag == "--max-body-bytes":
            wanted = "8M"
        elif flag == "--model":
            wanted = "(needed)"
        else:
            wanted = "" if field.default in (None, "") else str(field.default)
        assert rows[flag] == wanted, flag


def config_file(tmp_path, text):
    path = tmp_path / "server.yaml"
    path.write_text(text)
    return "--config", str(path)


def test_a_config_file_is_the_same_as_flags(tmp_path):
    file = config_file(
        tmp_path,
        "model: m\nmax_model_len: 128\nkv-cache-memory-bytes: 1.5G\nenable-prefix-caching: no\n"
        "served-model-name:\n  - a\n  - 010\napi_key: secret\npipeline-parallel-size: 3\n"
        "pipeline-layer-partition: [9, 11, 10]\nhf-overrides: {a: 1, b: [true]}\nrequest-timeout: 1e3\n"
        "allowed-origins: ['https://a.org', 'https://b.org/']\nrevision:\n",
    )
    flags = (
        "--model", "m", "--max-model-len", "128", "--kv-cache-memory-bytes", "1.5G", "--no-enable-prefix-caching",
        "--served-model-name", "a", "010", "--api-key", "secret", "-pp", "3", "--pipeline-layer-partition", "9,11,10",
        "--hf-overrides", '{"a": 1, "b": [true]}', "--request-timeout", "1e3",
        "--allowed-origins", '["https://a.org", "https://b.org/"]',
    )  # fmt: skip
    engine, server = parse(list(file))
    wanted_engine, wanted_server = parse(list(flags))
    assert engine == wanted_engine and engine.hf_overrides == {"a": 1, "b": [True]}
    assert dataclasses.replace(server, config=None) == wanted_server
    assert server.served_model_name == ("a", "010") and server.allowed_origins == ("https://a.org", "https://b.org")


def test_flags_win_over_the_file(tmp_path):
    file = config_file(tmp_path, "model: m\nport: 1\nserved-model-name: [a, b]\nenforce-eager: true\n")
    engine, server = parse([*file, "--served-model-name", "c", "--port", "2", "--no-enforce-eager", "--model", "n"])
    assert (engine.model, engine.enforce_eager, server.port, server.served_model_name) == ("n", False, 2, ("c",))
    assert parse(["--model", "m", "--api-key", "a", "b", "--api-key", "c"])[1].api_key == ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-modle-len: 5", "unknown key 'max-modle-len'; did you mean max-model-len"),
        ("help: true", "unknown key 'help'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("port: eighty", "port: 'eighty' is not a valid int"),
        ("port: [1, 2]", "port: '1,2' is not a valid int"),
        ("dtype: int8", "dtype: must be one of auto, bfloat16"),
        ("enforce-eager: 2", "enforce-eager: must be true or false, not '2'"),
        ("kv-cache-memory-bytes: 4X", "is not a size"),
        ("hf-overrides: [1]", "hf-overrides: '1' is not a JSON object"),
        ("served-model-name: []", "must hold at least one value"),
        ("served-model-name: [[a]]", "a list may hold texts and numbers"),
        ("port: 1\nport: 2", "'port' is there twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max-num-seqs is there twice"),
        ("- port", "must hold flags"),
        ("port: [", "not YAML"),
        ("allowed-origins: example.org", "must hold \\* or origins such as https://example.org"),
    ],
)
def test_a_wrong_config_file_names_file_and_key(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        parse(["--model", "m", *config_file(tmp_path, text)])


def test_a_config_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"config file /no/such\.yaml: cannot be read"):
        parse(["--model", "m", "--config=/no/such.yaml"])
    with pytest.raises(ValueError, match="unrecognized arguments: --conf"):
        parse(["--model", "m", "--conf", "x"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs must be a positive integer, not 0"),
        ({"max_connections": -1}, "max_connections must be"),
        ({"max_body_bytes": 0}, "max_body_bytes must be"),
        ({"request_timeout": 0.0}, "request_timeout must be a positive number of seconds, not 0"),
        ({"request_timeout": float("nan")}, "request_timeout must be"),
        ({"root_path": "llm"}, "root_path must be a path such as /llm"),
        ({"root_path": "/llm/"}, "root_path must be"),
        ({"root_path": "/{model}"}, "root_path must be"),
        ({"served_model_name": ("a", "")}, "served_model_name must hold names"),
        ({"ssl_keyfile": "k"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"metrics_prefix": "in fer"}, "metrics_prefix must be"),
        ({"allowed_origins": ("https://a.org/path",)}, "allowed_origins must hold"),
        ({"enable_auto_tool_choice": True}, "--enable-auto-tool-choice needs --tool-call-parser, one of hermes"),
        ({"tool_call_parser": "x"}, "tool_call_parser must be one of"),
        ({"response_role": ""}, "response_role must be"),
    ],
)
def test_wrong_server_flags(fields, words):
    with pytest.raises(ValueError, match=words):
        ServerConfig(**fields)


def test_sampling_defaults_of_a_checkpoint(tmp_path):
    assert default_sampling("auto", tmp_path) == {}
    with pytest.raises(ValueError, match=r"--generation-config \S+: \S+generation_config.json does not exist"):
        default_sampling(str(tmp_path), tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.6, "top_k": 20, "top_p": null, "do_sample": true, "max_new_tokens": 64}')
    assert default_sampling("auto", tmp_path) == {"temperature": 0.6, "top_k": 20, "max_tokens": 64}
    assert default_sampling(str(tmp_path), Path("/no/such")) == {"temperature": 0.6, "top_k": 20, "max_tokens": 64}
    assert default_sampling("vllm", tmp_path) == {}
    for text, words in (("{", "cannot be read"), ("[]", "a JSON object"), ('{"top_p": 2}', "top_p must be")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            default_sampling("auto", tmp_path)


def test_the_fingerprint_is_of_what_decides_the_numbers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    base = fingerprint(EngineConfig(model="m"), tmp_path)
    assert re.fullmatch("fp_[0-9a-f]{12}", base)
    assert base == fingerprint(EngineConfig(model="m", pipeline_parallel_size=2, max_num_seqs=3), tmp_path)
    assert base != fingerprint(EngineConfig(model="m", dtype="float32"), tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert base != fingerprint(EngineConfig(model="m"), tmp_path)


# ------------------------------------------------------------------ API keys


def test_keys_of_every_source(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n  two \n")
    server = ServerConfig(api_key=("zero", "one"), api_key_file=str(path))
    assert read_api_keys(server, {"INFER_API_KEY": "three"}) == ("zero", "one", "two", "three")
    assert read_api_keys(ServerConfig(), {"INFER_API_KEY": ""}) == ()
    assert "zero" not in repr(server)
    path.write_text("\n# none\n")
    for wrong, words in ((path, "holds no key"), (tmp_path / "x", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(ValueError, match=words):
            read_api_keys(ServerConfig(api_key_file=str(wrong)), {})
    path.write_text("se cret\n")
    for server, environ in ((ServerConfig(api_key_file=str(path)), {}), (ServerConfig(), {"INFER_API_KEY": "se cret"})):
        with pytest.raises(ValueError, match="holds a key that") as raised:
            read_api_keys(server, environ)
        assert "cret" not in str(raised.value)
    with pytest.raises(ValueError, match="api_key holds a key that is empty"):
        ServerConfig(api_key=("",))


def test_a_shown_command_line_has_no_keys():
    shown = without_secrets(["--model", "m", "--api-key", "one", "two", "--port", "1", "--api-key=three"])
    assert shown == ["--model", "m", "--api-key", "KEY", "KEY", "--port", "1", "--api-key=KEY"]


def test_api_keys_guard_every_route_but_three(tokenizer_path, tokenizer, tmp_path, capfd):
    keys = ("first-key", "second-key")
    with serving(tokenizer_path, tokenizer, api_key=keys, root_path="/llm", enable_log_requests=True) as (handle, _):
        for path in ("/health", "/ready", "/ping", "/llm/health"):
            assert ask(handle.port, path)[0] == 200
        for path in ("/metrics", "/v1/models", "/version", "/openapi.json", "/nowhere", "/health/", "/llm/load"):
            status, headers, reply = ask(handle.port, path)
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key"), path
            assert headers["WWW-Authenticate"] == "Bearer"
        for wrong in ("Bearer first-ke", "Bearer first-key2", "Bearer", "Basic first-key", "first-key", "Bearer \xff"):
            status, _, reply = ask(handle.port, "/v1/completions", COMPLETION, {"Authorization": wrong})
            assert status == 401 and "key" not in reply["error"]["message"].replace("API key", ""), wrong
        for key in keys:
            assert ask(handle.port, "/v1/completions", COMPLETION, {"Authorization": f"Bearer {key}"})[0] == 200
        with open(f"/proc/{handle.pid}/cmdline", "rb") as line, open(f"/proc/{handle.pid}/environ", "rb") as environ:
            assert b"-key" not in line.read() + environ.read()
    errors = capfd.readouterr().err
    assert "-key" not in errors


# ------------------------------------------------------------------ where it listens


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=20)
        self._path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def test_a_unix_socket(tokenizer_path, tokenizer, tmp_path, capfd):
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with serving(tokenizer_path, tokenizer, uds=str(path)) as (handle, _):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and handle.port == 0
        wait_until(lambda: ask(UnixConnection(path), "/health")[0] == 200)
        assert ask(UnixConnection(path), "/v1/completions", COMPLETION)[0] == 200
        with pytest.raises(ValueError, match="another server listens there"):
            start_frontend(ServerConfig(uds=str(path)), tokenizer_path, tokenizer_path, MODEL)
        assert path.exists()
    assert not path.exists()
    assert f"on unix:{path}" in capfd.readouterr().err


def test_wrong_unix_sockets(tmp_path):
    (tmp_path / "file").write_text("")
    wrong = {"file": "a file that is no socket", "x" * 200: "cannot listen there", "no/such": "cannot listen there"}
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=f"--uds .*{words}"):
            listening.listen_unix(tmp_path / name)
    assert (tmp_path / "file").exists()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) files for localhost."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return cert, key


def test_tls(tokenizer_path, tokenizer, certificate):
    cert, key = certificate
    context = ssl.create_default_context(cafile=str(cert))
    with serving(tokenizer_path, tokenizer, ssl_certfile=str(cert), ssl_keyfile=str(key), max_connections=1) as (h, _):

        def connect():
            return http.client.HTTPSConnection("127.0.0.1", h.port, timeout=20, context=context)

        wait_until(lambda: ask(connect(), "/health")[0] == 200)
        first = connect()
        first.request("POST", "/v1/completions", json.dumps({**COMPLETION, "stream": True}), JSON)
        assert first.getresponse().read().endswith(b"data: [DONE]\n\n")
        assert ask(connect(), "/health")[0] == 503  # the first connection is still open
        first.close()
        wait_until(lambda: ask(connect(), "/health")[0] == 200)
        with socket.create_connection(("127.0.0.1", h.port), timeout=20) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert not plain.recv(100).startswith(b"HTTP")


def test_wrong_certificates(certificate, tmp_path):
    cert, key = certificate
    locked = tmp_path / "locked.pem"
    lock = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", key, "-out", locked]
    subprocess.run(lock, check=True, capture_output=True, timeout=30)
    nothing = tmp_path / "nothing"
    nothing.write_text("nothing")
    for cert_name, key_name, words in (
        (tmp_path / "no", key, "--ssl-certfile .*no: cannot be read"),
        (cert, tmp_path / "no", "--ssl-keyfile .*no: cannot be read"),
        (nothing, key, "cannot use --ssl-certfile .*nothing and --ssl-keyfile"),
        (cert, nothing, "cannot use --ssl-certfile"),
        (cert, locked, "locked.pem has a password"),
        (cert, None, "which must hold the key too"),
    ):
        server = ServerConfig(ssl_certfile=str(cert_name), ssl_keyfile=None if key_name is None else str(key_name))
        with pytest.raises(ValueError, match=words):
            connections.tls_context(server)


# ------------------------------------------------------------------ names, prefix, CORS, ids


def test_several_names_and_a_root_path(tokenizer_path, tokenizer):
    flags = {"served_model_name": ("one", "org/two"), "root_path": "/llm/v2"}
    with serving(tokenizer_path, tokenizer, **flags) as (handle, _):
        for prefix in ("", "/llm/v2"):
            assert [card["id"] for card in ask(handle.port, prefix + "/v1/models")[2]["data"]] == ["one", "org/two"]
            assert ask(handle.port, prefix + "/v1/models/org/two")[2]["id"] == "org/two"
            status, _, reply = ask(handle.port, prefix + "/v1/models/three")
            assert (status, reply["error"]["code"]) == (404, "model_not_found")
            for name in ("one", "org/two", None):
                status, _, reply = ask(handle.port, prefix + "/v1/completions", {**COMPLETION, "model": name})
                assert (status, reply["model"]) == (200, "one")
            assert ask(handle.port, prefix + "/v1/completions", {**COMPLETION, "model": MODEL})[0] == 404
        status, _, reply = ask(handle.port, "/llm/v1/models")
        assert (status, reply["error"]["code"]) == (404, "not_found")


def test_cors(tokenizer_path, tokenizer):
    with serving(
        tokenizer_path, tokenizer, allowed_origins=("https://a.org",), api_key=("k",), enable_request_id_headers=True
    ) as (handle, _):
        asking = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST"}
        status, headers, _ = ask(handle.port, "/v1/completions", headers=asking, method="OPTIONS")
        assert status == 204 and headers["Access-Control-Allow-Origin"] == "https://a.org"
        assert "Authorization" in headers["Access-Control-Allow-Headers"]
        assert "POST" in headers["Access-Control-Allow-Methods"]
        other = {**asking, "Origin": "https://b.org"}
        status, headers, _ = ask(handle.port, "/v1/completions", headers=other, method="OPTIONS")
        assert headers["Access-Control-Allow-Origin"] is None is headers["Access-Control-Allow-Methods"]
        for body in (COMPLETION, {**COMPLETION, "stream": True}, {"prompt": []}):
            sent = {"Origin": "https://a.org", "Authorization": "Bearer k", "X-Request-Id": "mine"}
            _, headers, _ = ask(handle.port, "/v1/completions", body, sent)
            assert headers["Access-Control-Allow-Origin"] == "https://a.org" and headers["Vary"] == "Origin"
            assert headers["X-Request-Id"] == "mine"
        status, headers, _ = ask(handle.port, "/v1/completions", COMPLETION, {"Origin": "https://a.org"})
        assert status == 401 and headers["Access-Control-Allow-Origin"] == "https://a.org"
        _, headers, _ = ask(handle.port, "/v1/models", headers={"X-Request-Id": "a b"})
        assert re.fullmatch("[0-9a-f]{32}", headers["X-Request-Id"])


def test_head_options_and_the_routes_about_the_server(served):
    port, engine = int(served[0].rpartition(":")[2]), served[1]
    assert ask(port, "/health", headers={"Origin": "https://a.org"})[1]["Access-Control-Allow-Origin"] is None
    assert ask(port, "/health", method="HEAD")[2] == b""
    status, headers, _ = ask(port, "/v1/completions", method="OPTIONS")
    assert (status, headers["Allow"]) == (204, "OPTIONS, POST")
    status, headers, _ = ask(port, "/v1/models", {})
    assert (status, headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    assert ask(port, "/nowhere", method="OPTIONS")[0] == 404
    for method in ("GET", "POST"):
        assert ask(port, "/ping", method=method)[0] == 200
    assert ask(port, "/ready")[0] == 200
    assert ask(port, "/openapi.json")[2]["openapi"].startswith("3.1")
    assert ask(port, "/load")[2] == {"server_load": 0}
    engine.delay = 0.05
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "hello", "max_tokens": 100}), JSON)
    wait_until(lambda: ask(port, "/load")[2] == {"server_load": 1})
    connection.close()
    wait_until(lambda: ask(port, "/load")[2] == {"server_load": 0})
    engine.delay = 0.0
    status, headers, text = ask(port, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain") and b"infer:" in text


# ------------------------------------------------------------------ limits


def test_connections_over_the_limit_are_told_so(tokenizer_path, tokenizer):
    with serving(tokenizer_path, tokenizer, max_connections=3) as (handle, _):
        wait_until(lambda: ask(handle.port, "/health")[0] == 200)
        held = [socket.create_connection(("127.0.0.1", handle.port), timeout=20) for _ in range(3)]
        for connection in held:  # an answer shows that the server has it
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        for _ in range(3):
            status, headers, reply = ask(handle.port, "/v1/completions", COMPLETION)
            assert (status, reply["error"]["code"]) == (503, "too_many_connections")
            assert headers["Retry-After"] == "1" and "max-connections" in reply["error"]["message"]
        flood = [socket.create_connection(("127.0.0.1", handle.port), timeout=20) for _ in range(200)]
        for connection in flood:  # each is told why, or cut off: none is left to take the place that becomes free
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(12) in (b"HTTP/1.1 503", b"")
            connection.close()
        held.pop().close()

        def is_served() -> bool:
            with contextlib.suppress(ConnectionError):  # the flood has taken the places of those who are told why
                return ask(handle.port, "/v1/completions", COMPLETION)[0] == 200
            return False

        wait_until(is_served)
        for connection in held:
            connection.close()


def test_the_descriptor_limit_is_raised(monkeypatch, caplog):
    limits = {"now": (1024, 2000)}
    monkeypatch.setattr(connections.resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(connections.resource, "setrlimit", lambda which, wanted: limits.update(now=wanted))
    assert connections.raise_descriptor_limit(1000) == 1000 and limits["now"] == (1128, 2000)
    assert connections.raise_descriptor_limit(4096) == 2000 - 128 and limits["now"] == (2000, 2000)
    assert "At most 1872 connections instead of 4096" in caplog.text


def test_a_full_queue_and_a_large_body(tokenizer_path, tokenizer):
    server = ServerConfig(port=0, max_num_queued_reqs=2, max_body_bytes=2000)
    handle = start_frontend(server, tokenizer_path, tokenizer_path, MODEL)
    engine = FakeEngine(handle, tokenizer)
    waiting = [http.client.HTTPConnection("127.0.0.1", handle.port, timeout=20) for _ in range(2)]
    try:
        engine.link.send(HELLO)  # its thread is never started: no request gets a token
        wait_until(lambda: is_ready(handle.port))
        for connection in waiting:
            connection.request("POST", "/v1/completions", json.dumps(COMPLETION), JSON)
        wait_until(lambda: engine.inbox.qsize() == 2)
        status, headers, reply = ask(handle.port, "/v1/completions", COMPLETION)
        assert (status, reply["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "2")
        waiting[0].close()
        wait_until(lambda: engine.inbox.qsize() == 3)  # an abort, which makes room
        status, _, reply = ask(handle.port, "/v1/completions", {"prompt": "x" * 3000})
        assert (status, reply["error"]["code"]) == (413, "request_too_large")
        assert "2000 bytes (--max-body-bytes)" in reply["error"]["message"]
    finally:
        handle.stop()
        engine.close()


def silent_client(*names, **kwargs) -> EngineClient:
    """A client with an engine that never answers."""
    client = EngineClient(*(names or ("m",)), **kwargs)
    client._receive(Hello(generation=0, model_name="m", max_model_len=64, vocab_size=10, eos_token_ids=[]))
    return client


def request(name: str) -> Request:
    return Request(request_id=name, prompt_token_ids=[1, 2], params=SamplingParams(), seed=0)


def test_the_queue_counts_prompts_without_a_token():
    async def check() -> None:
        client = silent_client(max_queued=3)
        first = client.start([request("a"), request("b")])
        second = client.start([request("c"), request("d")])  # the queue was not full yet
        assert (client.num_queued, client.num_jobs) == (4, 2)
        with pytest.raises(ApiError) as raised:
            client.start([request("e")])
        error = raised.value
        assert (error.status, error.code, error.headers) == (429, "rate_limit_exceeded", {"Retry-After": "2"})
        assert "--max-num-queued-reqs 3" in error.message
        client.close(first)
        assert (client.num_queued, client.num_jobs) == (2, 1)
        client.start([request("e")])
        client.close(second)

    asyncio.run(check())


def test_health_names_the_silent_rank(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    async def check() -> None:
        nonlocal now
        client = silent_client()
        now += 100  # an idle engine that says nothing may live
        client.check_alive()
        job = client.start([request("a")])
        now += MAX_SILENCE_S
        client.check_alive()
        now += 1
        with pytest.raises(ApiError, match="rank 0 was last heard from 31 s ago") as raised:
            client.check_alive()
        assert raised.value.status == 503
        client.close(job)
        client.check_alive()
        client._receive(EngineStats(heartbeat_ages=[0.0, 2.0, 45.0]))
        with pytest.raises(ApiError, match="rank 2 was last heard from 45 s ago"):
            client.check_alive()

    asyncio.run(check())


# ------------------------------------------------------------------ the rest


def test_the_log_of_requests_tells_nothing_of_them(caplog):
    params = SamplingParams(
        stop=["secret"], temperature=0.5, logit_bias=dict.fromkeys(range(500), 1.0), allowed_token_ids=[*range(9)],
        stop_token_ids=[*range(8)],
    )  # fmt: skip
    requests = [
        Request(request_id=name, prompt_token_ids=[7, 8, 9], params=params, seed=0) for name in ("a", "b")
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, "infer.frontend"):
        log_request("/v1/completions", "cmpl-1", requests)
    [record] = caplog.records
    line = record.getMessage()
    assert line.startswith("Request cmpl-1: /v1/completions, prompt tokens: 6 (in 2 prompts), params: ")
    assert "temperature=0.5" in line and "stop=..." in line and "secret" not in line and len(line) < 600
    assert "top_p" not in line
    assert "logit_bias=(500 entries)" in line and "allowed_token_ids=(9 entries)" in line
    assert "stop_token_ids=[0, 1, 2, 3, 4, 5, 6, 7]" in line


def test_loop_lag_sees_what_holds_the_loop_up():
    async def run() -> LoopLag:
        lag = LoopLag()
        lag.start()
        while lag.num_samples < 3:
            await asyncio.sleep(0.01)
        time.sleep(0.2)  # what must not be done
        seen = lag.num_samples
        while lag.num_samples < seen + 2:
            await asyncio.sleep(0.01)
        lag.stop()
        return lag

    lag = asyncio.run(run())
    assert 0.1 < lag.maximum == lag.percentile(100) < 5.0
    assert lag.percentile(50) < lag.maximum
    lag.reset()
    assert (lag.maximum, lag.percentile(99), lag.num_samples) == (0.0, 0.0, 0)


def test_a_frontend_without_a_configuration():
    done = subprocess.run(
        [sys.executable, "-m", "infer.serve.frontend"], input=b"{}", capture_output=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(b"infer: error: standard input holds no configuration of a frontend")
    assert done.stderr.count(b"\n") == 1


def test_a_configuration_larger_than_a_pipe(tokenizer_path):
    template = "{# " + "x" * 300_000 + " #}{{ messages }}"
    config = FrontendConfig(
        port=0, chat_template=template, model_path=str(tokenizer_path), tokenizer_path=str(tokenizer_path)
    )  # fmt: skip
    handle = spawn_frontend(config)
    handle.wait_ready()
    handle.stop()


def test_what_the_frontend_is_told(tmp_path):
    server = ServerConfig(api_key=("k",), api_key_file="f", config="c", max_logprobs=3)
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.9}')
    config = frontend_config(EngineConfig(model="m"), server, ("a", "b"), tmp_path, tmp_path, 2.0)
    assert (config.api_key, config.api_key_file, config.config) == (("k",), None, None)
    assert config.model_names == ("a", "b") and config.default_sampling == {"top_p": 0.9}
    assert (config.max_logprobs, config.port_wait_s) == (3, 2.0) and config.system_fingerprint.startswith("fp_")
    assert "'k'" not in repr(config)
    assert os.getpid() != config.engine_pid
