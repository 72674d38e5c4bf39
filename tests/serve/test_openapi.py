"""The OpenAPI document: every route is in it, it says what bodies are taken, and replies are as it says."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fake_engine import MODEL, FakeEngine

from infer.serve import replies
from infer.serve.api import Api
from infer.serve.app import ServerRoutes, make_app
from infer.serve.chat_format import shown_call
from infer.serve.client import EngineClient
from infer.serve.link import FrontendConfig
from infer.serve.messages import IGNORED_INSIDE
from infer.serve.metrics import Metrics
from infer.serve.openapi import OPERATIONS, document
from infer.serve.openapi_requests import BODIES
from infer.serve.text import Tokenizer
from infer.serve.tools.base import ToolDelta
from infer.serve.untaken import IGNORED, REFUSED

SCHEMAS = "#/components/schemas/"


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """As it travels."""
    return json.loads(json.dumps(document(model_names=[MODEL], max_logprobs=20), allow_nan=False))


@pytest.fixture(scope="module")
def url(served: tuple[str, FakeEngine]) -> str:
    return served[0]


def send(url: str, body: Any = None) -> tuple[int, str, bytes]:
    """(status, content type, body)."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.headers.get_content_type(), reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "$ref":
                yield item
            else:
                yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


# ------------------------------------------------------------------ the document


def test_every_route_of_the_server_is_in_it(tokenizer: Tokenizer, tokenizer_path: str) -> None:
    settings = FrontendConfig(model_path=str(tokenizer_path), tokenizer_path=str(tokenizer_path))
    client, metrics = EngineClient(MODEL), Metrics(MODEL)
    api = Api(client, tokenizer, settings)
    app = make_app(api, ServerRoutes(client, settings, metrics), settings, metrics)
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes() if route.resource is not None and route.method not in ("HEAD", "OPTIONS")
    }  # fmt: skip
    api.close()
    assert routes == {(operation.method, operation.path) for operation in OPERATIONS}


def test_it_is_openapi_3_1(told: dict[str, Any]) -> None:
    assert told["openapi"] == "3.1.0" and told["info"].keys() >= {"title", "version"}
    names = [operation["operationId"] for path in told["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names) == len(OPERATIONS)
    used = set(references(told))
    assert {reference.removeprefix(SCHEMAS) for reference in used} <= told["components"]["schemas"].keys()
    assert told["components"]["schemas"].keys() == {reference.removeprefix(SCHEMAS) for reference in used}, "none extra"
    for path, item in told["paths"].items():
        for operation in item.values():
            parameters = {parameter["name"] for parameter in operation.get("parameters", ())}
            assert parameters == ({"model"} if "{model}" in path else set())
            assert "200" in operation["responses"] and {"400", "500", "503"} <= operation["responses"].keys()


def test_keys_and_paths_of_a_proxy(told: dict[str, Any]) -> None:
    assert "security" not in told and "securitySchemes" not in told["components"]
    assert "401" not in told["paths"]["/v1/models"]["get"]["responses"]
    secured = document(secured=True, root_path="/llm")
    assert secured["security"] == [{"bearer": []}] and secured["servers"] == [{"url": "/llm"}]
    for path, item in secured["paths"].items():
        for operation in item.values():
            public = path in ("/health", "/ready", "/ping")
            assert (operation.get("security") == []) == public
            assert ("401" in operation["responses"]) != public


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_every_field_of_a_body_is_in_it(told: dict[str, Any], kind: type[msgspec.Struct]) -> None:
    schema = told["components"]["schemas"][kind.__name__]
    fields = msgspec.structs.fields(kind)
    assert schema["properties"].keys() == {field.name for field in fields} | IGNORED | REFUSED.keys()
    required = {field.name for field in fields if field.required}
    assert set(schema.get("required", ())) == required
    assert schema["additionalProperties"] == {"type": "null"}, "null equals absent, whatever the name"
    for name, field in schema["properties"].items():
        takes_null = "anyOf" not in field or {"type": "null"} in field["anyOf"]
        if "anyOf" not in field and field.keys() & {"type", "enum"}:
            takes_null = field.get("type") == "null" or None in field.get("enum", ())
        assert takes_null or name in required, f"{name}: null equals absent"


def test_what_clients_read_from_it(told: dict[str, Any]) -> None:
    body = told["components"]["schemas"]["CompletionBody"]["properties"]
    assert body["model"]["anyOf"][0]["enum"] == [MODEL, ""]
    assert {"type": "integer", "minimum": 0, "maximum": 20} in body["logprobs"]["anyOf"]
    assert {"type": "number", "exclusiveMinimum": 0, "maximum": 1} in body["top_p"]["anyOf"]
    assert "-1: none" in json.dumps(body["seed"])
    assert body["stream_interval"]["enum"] == [1, None] and body["vllm_xargs"]["enum"] == [{}, None]
    assert body["store"]["enum"] == [False, None] and "nothing is stored" in body["store"]["description"]
    messages = told["components"]["schemas"]["ChatBody"]["properties"]["messages"]
    for message in messages["items"]["anyOf"]:
        assert message["properties"].keys() > IGNORED_INSIDE
    stream = told["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    end, chunk = stream["schema"]["properties"]["data"]["anyOf"]
    assert end["const"] == "[DONE]" and {"$ref": SCHEMAS + "CompletionChunk"} in chunk["contentSchema"]["anyOf"]


# ------------------------------------------------------------------ the replies

COMPLETION = {"model": MODEL, "prompt": "hello world", "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
ALL_USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    ("route", "kind", "body"),
    [
        ("completions", replies.Completion, COMPLETION),
        ("completions", replies.Completion, COMPLETION | {"logprobs": 2, "echo": True, "n": 2, "stop": "o w"}),
        ("completions", replies.Completion, COMPLETION | {"prompt_logprobs": 1, "return_token_ids": True}),
        ("completions", replies.Completion, COMPLETION | {"max_tokens": 0, "echo": True, "logprobs": 1}),
        ("completions", replies.Completion, COMPLETION | {"best_of": 3, "prompt": [[5, 6], [7]]}),
        ("chat/completions", replies.ChatCompletion, CHAT),
        ("chat/completions", replies.ChatCompletion, CHAT | {"logprobs": True, "top_logprobs": 2, "n": 2}),
        ("chat/completions", replies.ChatCompletion, CHAT | {"prompt_logprobs": 1, "return_token_ids": True}),
    ],
)
def test_generating_replies_are_as_it_says(url: str, route: str, kind: type, body: dict[str, Any]) -> None:
    status, content_type, data = send(f"{url}/v1/{route}", body)
    assert (status, content_type) == (200, "application/json"), data
    reply = msgspec.json.decode(data, type=kind)
    assert reply.choices


@pytest.mark.parametrize(
    ("route", "kind", "body"),
    [
        ("completions", replies.CompletionChunk, COMPLETION | {"logprobs": 2, "echo": True, "n": 2}),
        ("completions", replies.CompletionChunk, COMPLETION | {"return_token_ids": True} | ALL_USAGE),
        ("chat/completions", replies.ChatCompletionChunk, CHAT | {"logprobs": True, "top_logprobs": 2}),
        ("chat/completions", replies.ChatCompletionChunk, CHAT | {"return_token_ids": True, "n": 2} | ALL_USAGE),
    ],
)
def test_streams_are_as_it_says(url: str, route: str, kind: type, body: dict[str, Any]) -> None:
    status, content_type, data = send(f"{url}/v1/{route}", body | {"stream": True})
    assert (status, content_type) == (200, "text/event-stream"), data
    *events, end = [event for event in data.split(b"\n\n") if event]
    assert end == b"data: [DONE]" and events
    for event in events:
        msgspec.json.decode(event.removeprefix(b"data: "), type=kind)


def test_tool_calls_are_as_it_says() -> None:
    begun = ToolDelta(index=1, id="call_1", name="f", arguments='{"x": 1}')
    msgspec.convert(shown_call(begun, whole=True), replies.ToolCall)
    for delta in (begun, ToolDelta(index=1, id=None, name=None, arguments="}")):
        told = msgspec.convert(shown_call(delta, whole=False), replies.ToolCallDelta)
        assert (told.index, told.id) == (1, msgspec.UNSET if delta.id is None else delta.id)


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/models", replies.ModelList, None),
        (f"/v1/models/{MODEL}", replies.ModelCard, None),
        ("/health", replies.Health, None),
        ("/ready", replies.Status, None),
        ("/version", replies.Version, None),
        ("/load", replies.Load, None),
        ("/tokenize", replies.Tokenized, {"prompt": "hello"}),
        ("/tokenize", replies.Tokenized, {"messages": CHAT["messages"], "return_token_strs": True}),
        ("/detokenize", replies.Detokenized, {"tokens": [5, 6]}),
    ],
)
def test_other_replies_are_as_it_says(url: str, path: str, kind: type, body: dict[str, Any] | None) -> None:
    status, content_type, data = send(url + path, body)
    assert (status, content_type) == (200, "application/json"), data
    msgspec.json.decode(data, type=kind)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", {"prompt": 7}, 400),
        ("/v1/completions", COMPLETION | {"model": "other"}, 404),
        ("/v1/chat/completions", b"{", 400),
        ("/v1/models/other", None, 404),
        ("/tokenize", {}, 400),
        ("/nowhere", None, 404),
    ],
)
def test_errors_are_as_it_says(url: str, path: str, body: Any, expected: int) -> None:
    status, content_type, data = send(url + path, body)
    assert (status, content_type) == (expected, "application/json"), data
    assert msgspec.json.decode(data, type=replies.Error).error.message


def test_the_server_gives_it(url: str, told: dict[str, Any]) -> None:
    status, content_type, data = send(url + "/openapi.json")
    assert (status, content_type) == (200, "application/json")
    assert json.loads(data) == told


def test_metrics_and_ping_have_no_json(url: str) -> None:
    status, content_type, data = send(url + "/metrics")
    assert (status, content_type) == (200, "text/plain") and b"infer:num_requests_running" in data
    assert send(url + "/ping")[2] == send(url + "/ping", b"")[2] == b""
