"""Chat messages: what is taken, and how templates get it. No torch here."""

from typing import Any

from infer.serve.errors import bad_request, show

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {"role", "content", "name", "tool_call_id"}
_EMPTY_IN_REPLIES = ("tool_calls", "annotations")  # clients send replies back as they got them


def template_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message as templates expect it, its text parts joined. Raises ApiError that names what is wrong.

    where: the message's place in the body, such as messages[3].
    """
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(f"{where}.role must be one of {', '.join(ROLES)}, not {show(role)}", "messages")
    if role == "assistant":
        message.setdefault("content", "")
        for name in _EMPTY_IN_REPLIES:
            if message.get(name) == []:
                del message[name]
    for name, value in message.items():
        if name not in _FIELDS:
            known = ", ".join(sorted(_FIELDS))
            raise bad_request(f"{where}.{name[:40]} is not supported; known are {known}", "messages")
        if name != "content" and not isinstance(value, str):
            raise bad_request(f"{where}.{name} must be a string, not {show(value)}", "messages")
    return {**message, "content": _content_text(message.get("content"), where + ".content")}


def _content_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of text parts, not {show(content)}", "messages")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise bad_request(
                f'{where}[{i}] must be {{"type": "text", "text": ...}}; this server takes text only'
                + (f", not {show(kind)}" if isinstance(kind, str) and kind != "text" else ""),
                "messages",
            )
        texts.append(part["text"])
    return "\n".join(texts)
