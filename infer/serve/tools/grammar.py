"""The JSON schema that makes a model call a tool: its arguments then always parse. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

MAX_SCHEMA_DEPTH = 64
# Keys of a schema whose values are no schemas: a "$ref" in there is the value's own.
_VALUES = frozenset({"const", "enum", "default", "examples"})
# Keys whose values are schemas by name: no such name means anything here.
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_SHAPES = ("type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_OPEN_ENDED = ("additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "anyOf", "oneOf", "allOf")


def named_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one tool."""
    return _arguments(tool["function"].get("parameters"))


def required_schema(tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """An array of calls, {"name": ..., "parameters": {...}} each; parallel: of as many as the model likes.

    Each tool's schema is kept whole under $defs, and the references inside it are moved along: tools may use the same
    names for different definitions. Raises ValueError for a schema nested too deeply.
    """
    calls, definitions = [], {}
    for number, tool in enumerate(tools):
        place = f"tool_{number}"
        definitions[place] = _moved(named_schema(tool), f"#/$defs/{place}", 0)
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]}, "parameters": {"$ref": f"#/$defs/{place}"}
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )  # fmt: skip
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return schema if parallel else {**schema, "maxItems": 1}


def _arguments(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool's parameters as the schema of an object. What names its properties and says nothing of others has no
    others: a function takes the arguments it declares, and a model could add keys without end."""
    schema = dict(parameters or {"properties": {}})
    if not any(key in schema for key in _SHAPES):
        schema = {"type": "object", **schema}
    if "properties" in schema and not any(key in schema for key in _OPEN_ENDED):
        schema["additionalProperties"] = False
    return schema


def _moved(schema: Any, root: str, depth: int) -> Any:
    """The schema with its references to itself pointing below root."""
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    if isinstance(schema, list):
        return [_moved(item, root, depth + 1) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif key in ("$id", "$schema") and depth == 0:
            continue  # it would be the base that references start from
        elif key in _NAMED_SCHEMAS and isinstance(value, dict):
            moved[key] = {name: _moved(item, root, depth + 2) for name, item in value.items()}
        else:
            moved[key] = value if key in _VALUES else _moved(value, root, depth + 1)
    return moved
