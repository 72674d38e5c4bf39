"""Chat messages: what is taken, and how templates get it. No torch here."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from infer.serve.errors import bad_request, show

logger = logging.getLogger("infer.frontend")

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {"role", "content", "name", "tool_call_id"}
# Clients send replies back as they got them: what the model said and did, and fields that are empty here.
_ASSISTANT_FIELDS = _FIELDS | {"tool_calls", "refusal", "reasoning_content", "reasoning"}
# What other servers and clients leave in messages, their parts and calls, and in tools, and what changes nothing here:
# accepted, and no template sees it.
IGNORED_INSIDE = frozenset({"annotations", "cache_control", "id", "provider_specific_fields", "reasoning_details"})
# A part's type -> the field that holds its text. The last two are what the Responses API calls text.
_PART_TEXTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}


def template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: text parts joined, the arguments of tool calls as objects, reasoning under
    both of its names. Raises ApiError that names what is wrong.

    Models write arguments that are no JSON, or are cut off in them, and clients send back what they got: such arguments
    are an empty object to the template, as in vLLM, and one line in the log.
    """
    unreadable: list[str] = []
    told = [_template_message(message, f"messages[{i}]", unreadable) for i, message in enumerate(messages)]
    if unreadable:
        others = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        logger.warning("%s%s: not the JSON of an object; the chat template gets {}", unreadable[0], others)
    return told


def _template_message(message: dict[str, Any], where: str, unreadable: list[str]) -> dict[str, Any]:
    """where: the message's place in the body, such as messages[3]. unreadable: gets the places of such arguments."""
    message = {name: value for name, value in message.items() if value is not None and name not in IGNORED_INSIDE}
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(f"{where}.role must be one of {', '.join(ROLES)}, not {show(role)}", "messages")
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    known = _ASSISTANT_FIELDS if role == "assistant" else _FIELDS
    for name, value in message.items():
        if name not in known:
            place = f"{where}.{name[:40]}"
            names = ", ".join(sorted(known))
            raise bad_request(f"{place} is not supported in a message of role {role}; known are {names}", "messages")
        if name not in ("content", "tool_calls") and not isinstance(value, str):
            raise bad_request(f"{where}.{name} must be a string, not {show(value)}", "messages")
    if role == "assistant":
        message = _assistant_message(message, where, unreadable)
    return {**message, "content": _content_text(message.get("content"), where + ".content", role)}


def _assistant_message(message: dict[str, Any], where: str, unreadable: list[str]) -> dict[str, Any]:
    refusal = message.pop("refusal", None)
    message.setdefault("content", refusal or "")  # a refusal is what the model said instead
    reasoning = message.get("reasoning", message.get("reasoning_content"))  # where they differ, the newer name counts
    if reasoning is not None:
        message["reasoning"] = message["reasoning_content"] = reasoning
    if "tool_calls" in message:
        message["tool_calls"] = _template_calls(message["tool_calls"], where + ".tool_calls", unreadable)
    return message


def _template_calls(calls: Any, where: str, unreadable: list[str]) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise bad_request(f"{where} must be a list of tool calls, not {show(calls)}", "messages")
    return [_template_call(call, f"{where}[{i}]", unreadable) for i, call in enumerate(calls)]


def _template_call(call: Any, where: str, unreadable: list[str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type") not in (None, "function"):
        raise bad_request(
            f'{where} must be {{"id": ..., "type": "function", "function": {{"name": ..., "arguments": ...}}}}',
            "messages",
        )
    name, call_id = function.get("name"), call.get("id")
    for place, value in ((".function.name", name), (".id", "" if call_id is None else call_id)):
        if not isinstance(value, str):
            raise bad_request(f"{where}{place} must be a string, not {show(value)}", "messages")
    # index is a chunk's; clients that joined a stream by hand may still have it.
    _check_known(call, {"id", "type", "function", "index"}, where)
    _check_known(function, {"name", "arguments"}, where + ".function")
    arguments = _arguments(function.get("arguments"), where + ".function.arguments", unreadable)
    named = {} if call_id is None else {"id": call_id}
    return {**named, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(arguments: Any, where: str, unreadable: list[str]) -> dict[str, Any]:
    """Templates write arguments out themselves, so they get the object; none at all are an empty one."""
    if arguments is None or isinstance(arguments, dict):
        return arguments or {}
    if not isinstance(arguments, str):
        raise bad_request(f"{where} must be the JSON of an object, not {show(arguments)}", "messages")
    if not arguments.strip():
        return {}
    try:
        found = json.loads(arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # the latter: nested too deeply
        found = None
    if isinstance(found, dict):
        return found
    unreadable.append(where)
    return {}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_known(value: dict[str, Any], known: set[str], where: str) -> None:
    for name, item in value.items():
        if name not in known and name not in IGNORED_INSIDE and item is not None:
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
    field = _PART_TEXTS.get(kind) if isinstance(kind, str) and (kind != "refusal" or role == "assistant") else None
    if field is None or not isinstance(part.get(field), str):
        raise bad_request(
            f'{where} must be {{"type": "text", "text": ...}}; this server takes text only'
            + (f", not {show(kind)}" if isinstance(kind, str) and field is None else ""),
            "messages",
        )
    _check_known(part, {"type", field}, where)
    return str(part[field])
