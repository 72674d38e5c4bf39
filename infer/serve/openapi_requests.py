"""The schemas of request bodies for the OpenAPI document: the structs, and the bounds that are checked after them.

A body's rules (schema.py): null equals absent for every field, some fields are accepted without effect, some are
refused unless they ask for nothing, and any other must be null. No torch here.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from infer.request import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_COUNT,
    MAX_GRAMMAR_BYTES,
    MAX_GRAMMAR_CHOICES,
    MAX_LOGPROBS,
    MAX_SCHEMA_BYTES,
    MAX_STOP_STRINGS,
    MAX_TOKEN_ID,
    SEED_RANGE,
    StructuredOutputs,
)
from infer.serve.chat import RESERVED
from infer.serve.messages import IGNORED_INSIDE, ROLES
from infer.serve.schema import (
    MAX_ALL_STOP_CHARS,
    MAX_CACHE_SALT_CHARS,
    MAX_ENTRIES,
    MAX_PRIORITY,
    MAX_STOP_CHARS,
    MAX_TOP_K,
    REQUEST_ID,
    ResponseFormat,
    StreamOptions,
)
from infer.serve.schema_chat import MAX_DOCUMENTS, MAX_TOOLS, TOOL_NAME, ChatBody
from infer.serve.schema_completion import CompletionBody
from infer.serve.schema_tokenize import MAX_DETOKENIZED, DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from infer.serve.untaken import IGNORED, REFUSED

Schema = dict[str, Any]

BODIES: tuple[type[msgspec.Struct], ...] = (
    CompletionBody, ChatBody, TokenizeTextBody, TokenizeChatBody, DetokenizeBody
)  # fmt: skip
# Objects inside of bodies in which null equals absent too.
_NESTED: tuple[type[msgspec.Struct], ...] = (StreamOptions, StructuredOutputs, ResponseFormat)


def _range(low: float, high: float) -> Schema:
    return {"minimum": low, "maximum": high}


def _length(most: int) -> Schema:
    return {"minLength": 1, "maxLength": most}


def _items(most: int, item: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": item, "maxItems": most} | ({"minItems": least} if least else {})


_TOKEN: Schema = {"type": "integer", "minimum": 0}
_TOKENS: Schema = {"type": "array", "items": _TOKEN, "minItems": 1}
_STOP: Schema = {"type": "string", **_length(MAX_STOP_CHARS)}
_STRING: Schema = {"type": "string"}
_MAY_BE_TEXT: Schema = {"type": ["string", "null"]}
_NULL: Schema = {"type": "null"}


def _object(required: Sequence[str], others: Schema, **properties: Schema) -> Schema:
    """others: what properties without a schema may be."""
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": others
    }  # fmt: skip


def _content(*parts: Schema) -> Schema:
    return {"anyOf": [_STRING, {"type": "array", "items": parts[0] if len(parts) == 1 else {"anyOf": list(parts)}}]}


# As messages.py and schema_chat.py check them.
_WITHOUT_EFFECT: dict[str, Schema] = {name: {} for name in sorted(IGNORED_INSIDE)}
_IS_FUNCTION: Schema = {"enum": ["function", None]}


def _part(field: str, *kinds: str) -> Schema:
    return _object(["type", field], _NULL, **_WITHOUT_EFFECT | {"type": {"enum": list(kinds)}, field: _STRING})


_TEXT_PART = _part("text", "text", "input_text", "output_text")
_REFUSAL_PART = _part("refusal", "refusal")
_ARGUMENTS: Schema = {
    "type": ["string", "object", "null"],
    "description": "An object, or the JSON of one; a string that is none counts as an empty one.",
}
_CALLED = _object(["name"], _NULL, **_WITHOUT_EFFECT | {"name": _STRING, "arguments": _ARGUMENTS})
_CALL = _object(
    ["function"], _NULL,
    **_WITHOUT_EFFECT | {"id": _MAY_BE_TEXT, "type": _IS_FUNCTION, "function": _CALLED, "index": {}},
)  # fmt: skip
_MESSAGE: Schema = {
    "anyOf": [
        _object(
            ["role", "content"], _NULL, **_WITHOUT_EFFECT,
            role={"enum": [role for role in ROLES if role != "assistant"]}, content=_content(_TEXT_PART),
            name=_MAY_BE_TEXT, tool_call_id=_MAY_BE_TEXT, tool_calls={"enum": [[], None]},
        ),
        _object(
            ["role"], _NULL, **_WITHOUT_EFFECT, role={"const": "assistant"},
            content={"anyOf": [*_content(_TEXT_PART, _REFUSAL_PART)["anyOf"], _NULL]},
            tool_calls={"anyOf": [{"type": "array", "items": _CALL}, _NULL]},
            **dict.fromkeys(("name", "tool_call_id", "refusal", "reasoning_content", "reasoning"), _MAY_BE_TEXT),
        ),
    ]
}  # fmt: skip
_FUNCTION = _object(
    ["name"], {}, name={"type": "string", "pattern": f"^{TOOL_NAME.pattern}$"}, description=_MAY_BE_TEXT,
    parameters={"type": ["object", "null"]}, strict={"type": ["boolean", "null"]},
)  # fmt: skip
_TOOL = _object(
    ["function"], _NULL, **_WITHOUT_EFFECT, type=_IS_FUNCTION, function=_FUNCTION,
    strict={"type": ["boolean", "null"]},
)  # fmt: skip

# Laid over what the struct says, whichever body has the field. One with a type or alternatives replaces it.
_BOUNDS: dict[str, Schema] = {
    "n": _range(1, MAX_CHOICES),
    "best_of": _range(1, MAX_CHOICES),
    "temperature": _range(0, 100),
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": _range(-1, MAX_TOP_K),
    "min_p": _range(0, 1),
    "presence_penalty": _range(-2, 2),
    "frequency_penalty": _range(-2, 2),
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 100},
    "seed": _range(SEED_RANGE.start, SEED_RANGE.stop - 1) | {"description": "-1: none, as if it were left out."},
    "min_tokens": _range(0, MAX_COUNT),
    "max_tokens": _range(0, MAX_COUNT),
    "max_completion_tokens": _range(1, MAX_COUNT),
    "truncate_prompt_tokens": {"minimum": -1, "not": {"const": 0}},
    "priority": _range(-MAX_PRIORITY, MAX_PRIORITY),
    "cache_salt": _length(MAX_CACHE_SALT_CHARS),
    "request_id": {"pattern": f"^{REQUEST_ID.pattern}$"},
    "stop": {
        "anyOf": [_STOP, _items(MAX_STOP_STRINGS, _STOP)],
        "description": f"At most {MAX_ALL_STOP_CHARS} characters together.",
    },
    "stop_token_ids": _items(MAX_ENTRIES["stop_token_ids"], {"type": "integer", **_range(0, MAX_TOKEN_ID)}),
    "allowed_token_ids": {"type": "array", "items": {"type": "integer", **_range(0, MAX_TOKEN_ID)}, "minItems": 1},
    "bad_words": _items(MAX_BAD_WORDS, {"type": "string", "pattern": r"\S"}),
    "logit_bias": {
        "type": "object", "additionalProperties": {"type": "number", **_range(-100, 100)},
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"}, "maxProperties": MAX_ENTRIES["logit_bias"],
    },
    "prompt": {
        "anyOf": [
            _STRING, _items(MAX_CHOICES, _STRING, 1), _TOKENS, _items(MAX_CHOICES, _TOKENS, 1),
        ]
    },
    "messages": _items(MAX_ENTRIES["messages"], _MESSAGE, 1),
    "tools": _items(MAX_TOOLS, _TOOL),
    "documents": {"maxItems": MAX_DOCUMENTS},
    # add_generation_prompt as the body has it, or would have it by default: then it says nothing new.
    "chat_template_kwargs": {
        "properties": {"add_generation_prompt": {"type": "boolean"}},
        "propertyNames": {"not": {"enum": sorted(RESERVED - {"add_generation_prompt"})}},
    },
    "tokens": _items(MAX_DETOKENIZED, _TOKEN),
    "choice": _items(MAX_GRAMMAR_CHOICES, {"type": "string", "minLength": 1}, 1),
    "structural_tag": _NULL,
}  # fmt: skip
# Where a field means something else in one body.
_BODY_BOUNDS: dict[tuple[str, str], Schema] = {
    ("ChatBody", "max_tokens"): _range(1, MAX_COUNT),
    ("ChatBody", "logprobs"): {},  # a switch
    ("TokenizeTextBody", "prompt"): {},
    ("StructuredOutputs", "json"): _length(MAX_SCHEMA_BYTES),
} | {("StructuredOutputs", name): _length(MAX_GRAMMAR_BYTES) for name in ("regex", "grammar", "whitespace_pattern")}


def request_schemas(ref_template: str, model_names: Sequence[str], max_logprobs: int | None) -> dict[str, Schema]:
    """The schemas of all bodies and of what stands in them, by name.

    model_names: what `model` may be, besides "" for the first; any string where there are none. max_logprobs:
    --max-logprobs.
    """
    _, schemas = msgspec.json.schema_components(BODIES, ref_template=ref_template)
    most = MAX_LOGPROBS if max_logprobs is None else max_logprobs
    of_server = {name: _range(0, most) for name in ("logprobs", "top_logprobs", "prompt_logprobs")}
    if model_names:
        of_server["model"] = {"enum": [*model_names, ""]}
    for kind in (*BODIES, *_NESTED):
        schemas[kind.__name__] = _request_schema(kind, schemas[kind.__name__], of_server)
    return schemas


def _request_schema(kind: type[msgspec.Struct], schema: Schema, of_server: dict[str, Schema]) -> Schema:
    required = schema.get("required", [])
    properties: dict[str, Schema] = {}
    for name, said in schema["properties"].items():
        bounds = _BODY_BOUNDS.get((kind.__name__, name), _BOUNDS.get(name, {}) | of_server.get(name, {}))
        bounded = _bound(said, bounds)
        properties[name] = bounded if name in required else _or_null(bounded)
    if kind in BODIES:
        properties |= _untaken(kind)
    # An unknown field that is null is absent.
    return schema | {"properties": properties, "additionalProperties": _NULL}


def _untaken(kind: type[msgspec.Struct]) -> dict[str, Schema]:
    """Fields that the struct lacks: those without effect, and those that are refused unless they ask for nothing."""
    taken = kind.__struct_fields__
    ignored = {name: {"description": "Accepted, without effect."} for name in IGNORED if name not in taken}
    refused = {
        name: {"enum": [*neutral, None], "description": f"Refused: {sentence}"}
        for name, (neutral, sentence) in REFUSED.items() if name not in taken
    }  # fmt: skip
    return dict(sorted((ignored | refused).items()))


def _bound(schema: Schema, bounds: Schema) -> Schema:
    """A field's schema with its bounds on every alternative but null; bounds that are a whole schema replace it."""
    if "type" in bounds or "anyOf" in bounds:
        return {name: schema[name] for name in ("default", "description") if name in schema} | bounds
    if not bounds or "anyOf" not in schema:
        return schema | bounds
    parts = [part if part.get("type") == "null" else part | bounds for part in schema["anyOf"]]
    return schema | {"anyOf": parts}


def _or_null(schema: Schema) -> Schema:
    """What an optional field may be: null equals absent."""
    if "anyOf" in schema:
        if _NULL in schema["anyOf"]:
            return schema
        return schema | {"anyOf": [*schema["anyOf"], _NULL]}
    if not schema.keys() - {"default", "description"}:
        return schema  # anything at all
    if schema.get("type") == "null":
        return schema
    told = {name: schema[name] for name in ("default", "description") if name in schema}
    return told | {"anyOf": [{name: schema[name] for name in schema if name not in told}, _NULL]}
