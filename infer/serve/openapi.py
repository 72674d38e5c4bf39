"""The OpenAPI 3.1 document at /openapi.json, from the structs of request bodies and of replies. No torch here.

What the structs do not say stands in tables: the routes here, the bounds of fields in openapi_requests.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

import infer
from infer.serve import replies
from infer.serve.openapi_requests import request_schemas
from infer.serve.schema_chat import ChatBody
from infer.serve.schema_completion import CompletionBody
from infer.serve.schema_tokenize import DetokenizeBody, TokenizeChatBody, TokenizeTextBody

_REF = "#/components/schemas/{name}"

# What any route may answer besides its own: the request is no HTTP or not UTF-8, something broke, too many connections.
_ANYWHERE = (400, 500, 503)
_BODY = (408, 413, 415)  # a route that reads a body: it came too slowly, is too large, is not JSON

_STATUS = {
    400: "The request is not valid; param names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body came too slowly, or the reply took longer than --request-timeout.",
    413: "The body is too large.",
    415: "The body is not application/json, or is compressed.",
    429: "Too many requests wait.",
    500: "The server failed.",
    503: "The server is not ready, is ending, or is full.",
}
_RETRY_AFTER = {"description": "Seconds to wait.", "schema": {"type": "string"}}
_QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
# Path -> bodies, by name. None names a model: then the one that is served answers.
_EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/completions": {
        "text": {"prompt": "The capital of France is", "max_tokens": 8},
        "stream": {"prompt": "The capital of France is", "max_tokens": 8, "stream": True},
        "score": {"prompt": "Paris is in France", "max_tokens": 0, "echo": True, "logprobs": 0},
    },
    "/v1/chat/completions": {
        "question": _QUESTION | {"max_completion_tokens": 8},
        "stream": _QUESTION | {"max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
    },
    "/tokenize": {"text": {"prompt": "Hello"}, "conversation": _QUESTION | {"return_token_strs": True}},
    "/detokenize": {"tokens": {"tokens": [1, 2, 3]}},
}


@dataclass(frozen=True)
class Operation:
    """One method of one route. bodies: the structs of which its body is one. reply: a struct, str for text, dict for
    any JSON object, None for an empty body. chunk: an event of its stream. errors: besides those of every route.
    public: it needs no API key."""

    method: str
    path: str
    id: str
    summary: str
    tag: str
    reply: type | None
    bodies: tuple[type[msgspec.Struct], ...] = ()
    chunk: type[msgspec.Struct] | None = None
    errors: tuple[int, ...] = ()
    public: bool = False


OPERATIONS = (
    Operation(
        "post", "/v1/completions", "createCompletion", "Complete a prompt", "Generation", replies.Completion,
        (CompletionBody,), replies.CompletionChunk, errors=(*_BODY, 404, 429),
    ),
    Operation(
        "post", "/v1/chat/completions", "createChatCompletion", "Answer a conversation", "Generation",
        replies.ChatCompletion, (ChatBody,), replies.ChatCompletionChunk, errors=(*_BODY, 404, 429),
    ),
    Operation(
        "post", "/tokenize", "tokenize", "Tokens of a text or a conversation", "Tokens", replies.Tokenized,
        (TokenizeTextBody, TokenizeChatBody), errors=(*_BODY, 404),
    ),
    Operation(
        "post", "/detokenize", "detokenize", "Text of tokens", "Tokens", replies.Detokenized, (DetokenizeBody,),
        errors=(*_BODY, 404),
    ),
    Operation("get", "/v1/models", "listModels", "The names that the model goes by", "Models", replies.ModelList),
    Operation(
        "get", "/v1/models/{model}", "retrieveModel", "One of these names", "Models", replies.ModelCard, errors=(404,)
    ),
    Operation("get", "/health", "health", "Whether every rank works", "Server", replies.Health, public=True),
    Operation("get", "/ready", "ready", "Whether requests are taken", "Server", replies.Status, public=True),
    Operation("get", "/ping", "ping", "Whether the server answers", "Server", None, public=True),
    Operation("post", "/ping", "postPing", "Whether the server answers", "Server", None, public=True),
    Operation("get", "/version", "version", "The program's version", "Server", replies.Version),
    Operation("get", "/load", "load", "Generating requests under way", "Server", replies.Load),
    Operation("get", "/metrics", "metrics", "Metrics in Prometheus's text format", "Server", str),
    Operation("get", "/openapi.json", "openapi", "This document", "Server", dict),
)  # fmt: skip


def document(
    *, model_names: Sequence[str] = (), max_logprobs: int | None = None, root_path: str = "", secured: bool = False
) -> dict[str, Any]:
    """The document, as JSON values.

    model_names: what `model` may be; any string where there are none. max_logprobs: --max-logprobs. root_path: goes
    before every path, behind a proxy. secured: whether API keys are asked for.
    """
    schemas = request_schemas(_REF, model_names, max_logprobs)
    schemas |= _reply_schemas()
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, secured)
    components: dict[str, Any] = {"schemas": dict(sorted(schemas.items()))}
    if secured:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "infer", "version": infer.__version__, "summary": "OpenAI-compatible inference server",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": components,
        **({"security": [{"bearer": []}]} if secured else {}),
    }  # fmt: skip


def _reply_schemas() -> dict[str, Any]:
    told = {kind for operation in OPERATIONS for kind in (operation.reply, operation.chunk) if _is_struct(kind)}
    _, schemas = msgspec.json.schema_components([*told, replies.Error], ref_template=_REF)
    for schema in schemas.values():
        schema.pop("additionalProperties", None)  # replies may gain fields
    return schemas


def _is_struct(kind: type | None) -> bool:
    return kind is not None and issubclass(kind, msgspec.Struct)


def _operation(operation: Operation, secured: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "operationId": operation.id, "summary": operation.summary, "tags": [operation.tag],
        "responses": _responses(operation, secured),
    }  # fmt: skip
    if "{model}" in operation.path:
        told["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.bodies:
        refs = [_reference(kind) for kind in operation.bodies]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        examples = {name: {"value": value} for name, value in _EXAMPLES[operation.path].items()}
        content = {"application/json": {"schema": schema, "examples": examples}}
        told["requestBody"] = {"required": True, "content": content}
    if operation.public and secured:
        told["security"] = []
    return told


def _responses(operation: Operation, secured: bool) -> dict[str, Any]:
    errors = {*_ANYWHERE, *operation.errors} | ({401} if secured and not operation.public else set())
    return {"200": {"description": "Done.", **_content(operation)}} | {
        str(status): _error(status) for status in sorted(errors)
    }


def _content(operation: Operation) -> dict[str, Any]:
    if operation.reply is None:
        return {}
    if operation.reply is str:
        return {"content": {"text/plain": {"schema": {"type": "string"}}}}
    schema = _reference(operation.reply) if _is_struct(operation.reply) else {"type": "object"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if operation.chunk is not None:
        content["text/event-stream"] = _events(operation.chunk)
    return {"content": content}


def _events(chunk: type) -> dict[str, Any]:
    """The schema of one event, as OpenAPI 3.2 has it under itemSchema and tools for 3.1 read it here."""
    payload = {"anyOf": [_reference(chunk), _reference(replies.Error)]}
    data = {
        "anyOf": [
            {"const": "[DONE]", "description": "The last event."},
            {"type": "string", "contentMediaType": "application/json", "contentSchema": payload},
        ]
    }
    text = f"With stream: events, each with a {chunk.__name__}, or an Error where the reply breaks off."
    schema = {"type": "object", "description": text, "properties": {"data": data}, "required": ["data"]}
    return {"schema": schema}


def _error(status: int) -> dict[str, Any]:
    told = {"description": _STATUS[status], "content": {"application/json": {"schema": _reference(replies.Error)}}}
    return told | ({"headers": {"Retry-After": _RETRY_AFTER}} if status in (429, 503) else {})


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}
