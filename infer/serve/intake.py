"""From a route's JSON to all that answering it takes: the same for the server and for batch files. No torch here."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.request import Request
from infer.serve.chat_format import ChatFormat
from infer.serve.errors import check_model
from infer.serve.link import FrontendConfig, Hello
from infer.serve.offload import INLINE_BYTES, Offload
from infer.serve.prompting import Prompting
from infer.serve.render import Prompt, Reply
from infer.serve.render_chat import ChatReply
from infer.serve.render_completion import CompletionReply
from infer.serve.schema import Checked, SamplingBody, parse
from infer.serve.schema_chat import ChatBody
from infer.serve.schema_completion import CompletionBody
from infer.serve.text import Tokenizer

BaseId = Callable[[SamplingBody], str]  # what the reply's id ends in


@dataclass
class Taken:
    """A request as it was taken in. requests: one a prompt; frames: the same for a socket. reply: writes what becomes
    of them."""

    body: SamplingBody
    prompts: list[Prompt]
    requests: list[Request]
    frames: bytes
    reply: Reply


TakeIn = Callable[[bytes, Hello, BaseId], Awaitable[Taken]]


class Intake:
    """The bodies of /v1/completions and /v1/chat/completions, over one tokenizer. settings: what the flags say."""

    def __init__(self, tokenizer: Tokenizer, settings: FrontendConfig, offload: Offload) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._offload = offload
        self._defaults, default_max_tokens = _sampling_defaults(settings.default_sampling)
        self.prompting = Prompting(tokenizer, Path(settings.tokenizer_path), offload, default_max_tokens)
        self._format = ChatFormat(
            tokenizer, enable_auto_tool_choice=settings.enable_auto_tool_choice,
            tool_call_parser=settings.tool_call_parser, reasoning_parser=settings.reasoning_parser,
            response_role=settings.response_role,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the process that grammars are checked in."""
        self.prompting.close()

    async def completion(self, data: bytes, hello: Hello, base_id: BaseId) -> Taken:
        """A body of /v1/completions. Raises ApiError."""
        body = await self._body(data, CompletionBody)
        texts = [text for text in body.prompt if isinstance(text, str)]
        if texts:
            prompts = await self.prompting.text_prompts(texts, body.add_special_tokens, body, hello)
        else:
            prompts = self.prompting.token_prompts(body.prompt, body, hello)
        return await self._taken(body, prompts, hello, base_id, CompletionReply)

    async def chat(self, data: bytes, hello: Hello, base_id: BaseId) -> Taken:
        """A body of /v1/chat/completions. Raises ApiError."""
        body = await self._body(data, ChatBody)
        body.prepare(self._format)
        prompts = [await self.prompting.chat_prompt(body, len(data), hello)]
        return await self._taken(body, prompts, hello, base_id, ChatReply)

    async def _body(self, data: bytes, kind: type[Checked]) -> Checked:
        """A checked body. Raises ApiError."""
        body = await self._offload.run(len(data) > INLINE_BYTES, lambda: parse(data, kind, self._defaults))
        check_model(body.model, self._settings.model_names)
        body.check_logprobs(self._settings.max_logprobs)
        return body

    async def _taken(
        self, body: SamplingBody, prompts: list[Prompt], hello: Hello, base_id: BaseId, kind: type[Reply]
    ) -> Taken:
        requests, frames = await self.prompting.requests(body, prompts, hello)
        reply = kind(kind.id_prefix + base_id(body), self._settings.model_names[0], self._tokenizer, body)
        reply.system_fingerprint = self._settings.system_fingerprint or None
        return Taken(body, prompts, requests, frames, reply)


def _sampling_defaults(checkpoint: dict[str, float]) -> tuple[dict[str, Any], int | None]:
    """What the checkpoint recommends as defaults of bodies, and apart from them max_tokens: it limits what a body
    leaves open by the context, and does not replace OpenAI's 16 for completions."""
    defaults: dict[str, Any] = dict(checkpoint)
    max_tokens = defaults.pop("max_tokens", None)
    if "top_k" in defaults:
        defaults["top_k"] = int(defaults["top_k"])
    return defaults, None if max_tokens is None else int(max_tokens)
