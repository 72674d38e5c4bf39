"""The body of POST /v1/chat/completions. No torch here."""

from typing import Any, ClassVar

import msgspec

from infer.serve.chat import RESERVED
from infer.serve.errors import bad_request
from infer.serve.messages import template_message
from infer.serve.schema import SamplingBody


class ChatBody(SamplingBody):
    """POST /v1/chat/completions. max_tokens is the older name of max_completion_tokens. messages: as templates expect
    them once check() has run."""

    logprobs_field: ClassVar[str] = "top_logprobs"

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def generation_prompt(self) -> bool:
        """Unless said otherwise, exactly one of a new assistant turn and continuing the last message."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad_request("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "add_generation_prompt and continue_final_message cannot both be true", "continue_final_message"
            )
        for name in self.chat_template_kwargs:
            if name in RESERVED:
                raise bad_request(f"chat_template_kwargs must not set {name[:40]}", "chat_template_kwargs")
        if not self.messages:
            raise bad_request("messages is empty; give at least one message", "messages")
        self.messages = [template_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)]
