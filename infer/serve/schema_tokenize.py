"""The bodies of POST /tokenize and POST /detokenize, as vLLM has them. No torch here."""

from typing import Any

import msgspec

from infer.serve.errors import bad_request
from infer.serve.schema import convert, decode
from infer.serve.schema_chat import ChatBody

MAX_DETOKENIZED = 1 << 20  # tokens of one /detokenize


class TokenizeTextBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize for a text, taken as /v1/completions takes it."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize for a conversation, taken as /v1/chat/completions takes it."""

    messages: list[dict[str, Any]]
    model: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    return_token_strs: bool = False

    def chat(self) -> ChatBody:
        """The conversation as a body of the chat route, checked. Raises ApiError."""
        # What only generating could do with the tools is not asked for.
        fields = {name: getattr(self, name) for name in _CHAT_FIELDS} | ({"tool_choice": "none"} if self.tools else {})
        body = convert(fields, ChatBody, {})
        body.check()
        return body


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


_CHAT_FIELDS = tuple(
    name for name in TokenizeChatBody.__struct_fields__ if name not in ("return_token_strs", "model")
)  # fmt: skip


def parse_tokenize(data: bytes) -> TokenizeTextBody | TokenizeChatBody:
    """A body of /tokenize: the one or the other, by whether it has messages. Raises ApiError."""
    raw = decode(data)
    if raw.get("prompt") is not None and raw.get("messages") is not None:
        raise bad_request("give prompt or messages, not both", "messages")
    if raw.get("messages") is not None:
        return convert(raw, TokenizeChatBody, {})
    if raw.get("prompt") is None:
        raise bad_request("prompt is missing; give prompt (a text) or messages (a conversation)", "prompt")
    return convert(raw, TokenizeTextBody, {})


def parse_detokenize(data: bytes) -> DetokenizeBody:
    """A body of /detokenize. Raises ApiError."""
    body = convert(decode(data), DetokenizeBody, {})
    if len(body.tokens) > MAX_DETOKENIZED:
        raise bad_request(f"tokens may hold {MAX_DETOKENIZED} ids, not {len(body.tokens)}", "tokens")
    return body
