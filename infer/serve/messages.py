"""Chat messages: what is taken, and how templates get it. No torch here."""

import json
from typing import Any

from infer.serve.errors import bad_request, show

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {"role", "content", "name", "tool_call_id"}
# Clients send replies back as they got them: what the model said and did, and fields that are empty here.
_ASSISTANT_FIELDS = _FIELDS | {"tool_calls", "refusal", "reasoning_content", "reasoning"}
_EMPTY_IN_REPLIES = ("tool_calls", "annotations")
_PART_TEXTS = {"text": "text", "refusal": "refusal"}  # a part's type -> the field that holds its text


def template_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message as templates expect it: text parts joined, the arguments of tool calls as objects, reasoning under both
    of its names. Raises ApiError that names what is wrong.

    where: the message's place in the body, such as messages[3].
    """
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(f"{where}.role must be one of {', '.join(ROLES)}, not {show(role)}", "messages")
    if role == "assistant":
        for name in _EMPTY_IN_REPLIES:
            if message.get(name) == []:
                del message[name]
    known = _ASSISTANT_FIELDS if role == "assistant" else _FIELDS
    for name, value in message.items():
        if name not in known:
            place = f"{where}.{name[:40]}"
            names = ", ".join(sorted(known))
            raise bad_request(f"{place} is not supported in a message of role {role}; known are {names}", "messages")
        if name not in ("content", "tool_calls") and not isinstance(value, str):
            raise bad_request(f"{where}.{name} must be a string, not {show(value)}", "messages")
    if role == "assistant":
        message = _assistant_message(message, where)
    return {**message, "content": _content_text(message.get("content"), where + ".content", role)}


def _assistant_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    refusal = message.pop("refusal", None)
    message.setdefault("content", refusal or "")  # a refusal is what the model said instead
    reasoning = message.pop("reasoning", None)
    if reasoning is not None and message.setdefault("reasoning_content", reasoning) != reasoning:
        raise bad_request(f"{where}: reasoning and reasoning_content differ; give one of them", "messages")
    if "reasoning_content" in message:
        message["reasoning"] = message["reasoning_content"]
    if "tool_calls" in message:
        message["tool_calls"] = _template_calls(message["tool_calls"], where + ".tool_calls")
    return message


def _template_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise bad_request(f"{where} must be a list of tool calls, not {show(calls)}", "messages")
    return [_template_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _template_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise bad_request(
            f'{where} must be {{"id": ..., "type": "function", "function": {{"name": ..., "arguments": ...}}}}',
            "messages",
        )
    for place, value in ((".function.name", function.get("name")), (".id", call.get("id", ""))):
        if not isinstance(value, str):
            raise bad_request(f"{where}{place} must be a string, not {show(value)}", "messages")
    # index is a chunk's; clients that joined a stream by hand may still have it.
    _check_known(call, {"id", "type", "function", "index"}, where)
    _check_known(function, {"name", "arguments"}, where + ".function")
    arguments = _arguments(function.get("arguments"), where + ".function.arguments")
    named = {"id": call["id"]} if "id" in call else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """Templates write arguments out themselves, so they get the object; none at all are an empty one."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_refuse_constant) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
            raise bad_request(f"{where} must be the JSON of an object: {reason}", "messages") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise bad_request(f"{where} must be the JSON of an object, not of {show(arguments)}", "messages")
    return arguments


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_known(value: dict[str, Any], known: set[str], where: str) -> None:
    for name, item in value.items():
        if name not in known and item is not None:
            raise bad_request(f"{where}.{name[:40]} is not supported; known are {', '.join(sorted(known))}", "messages")


def _content_text(content: Any, where: str, role: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of text parts, not {show(content)}", "messages")
    return "\n".join(_part_text(part, f"{where}[{i}]", role) for i, part in enumerate(content))


def _part_text(part: Any, where: str, role: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    # Refusals are only ever sent back in the assistant's own messages.
    field = _PART_TEXTS.get(kind) if isinstance(kind, str) and (kind == "text" or role == "assistant") else None
    if field is None or not isinstance(part.get(field), str):
        raise bad_request(
            f'{where} must be {{"type": "text", "text": ...}}; this server takes text only'
            + (f", not {show(kind)}" if isinstance(kind, str) and kind != "text" else ""),
            "messages",
        )
    _check_known(part, {"type", field}, where)
    return str(part[field])
