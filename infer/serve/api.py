"""The routes that generate: a body becomes engine requests, their outputs become a reply or a stream. No torch here."""

import uuid
from pathlib import Path
from typing import Any

from aiohttp import web

from infer.serve.chat_format import ChatFormat
from infer.serve.client import EngineClient
from infer.serve.expect import AskingRouter
from infer.serve.generation import Generation, reply_stream, reply_whole
from infer.serve.link import FrontendConfig, Hello
from infer.serve.offload import INLINE_BYTES, Offload
from infer.serve.prompting import Prompting
from infer.serve.render import Prompt, Reply
from infer.serve.render_chat import ChatReply
from infer.serve.render_completion import CompletionReply
from infer.serve.request_log import log_request
from infer.serve.schema import REQUEST_ID, Checked, SamplingBody, parse
from infer.serve.schema_chat import ChatBody
from infer.serve.schema_completion import CompletionBody
from infer.serve.text import Tokenizer
from infer.serve.tokenize import TokenizeRoutes
from infer.serve.upload import BodyReader

REQUEST_ID_HEADER = "X-Request-Id"


class Api:
    """The routes that work with the model's text, over one tokenizer and one engine.

    num_open: generations under way. settings: what the server's flags say.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, settings: FrontendConfig) -> None:
        self.num_open = 0
        self._settings = settings
        self._client = client
        self._tokenizer = tokenizer
        self._offload = Offload()
        self._bodies = BodyReader(settings.max_body_bytes)
        self._defaults, default_max_tokens = _sampling_defaults(settings.default_sampling)
        self._prompting = Prompting(tokenizer, Path(settings.tokenizer_path), self._offload, default_max_tokens)
        self._format = ChatFormat(
            tokenizer, enable_auto_tool_choice=settings.enable_auto_tool_choice,
            tool_call_parser=settings.tool_call_parser, reasoning_parser=settings.reasoning_parser,
            response_role=settings.response_role,
        )  # fmt: skip
        self._tokenize = TokenizeRoutes(client, tokenizer, self._prompting, self._bodies, self._offload)

    def add_routes(self, router: AskingRouter) -> None:
        router.add_post("/v1/completions", self.completions)
        router.add_post("/v1/chat/completions", self.chat_completions)
        self._tokenize.add_routes(router)

    def close(self) -> None:
        """Ends the threads that heavy work was done in, and the process that checks grammars."""
        self._offload.close()
        self._prompting.close()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        hello = self._client.ready()
        body, _ = await self._body(request, CompletionBody)
        texts = [text for text in body.prompt if isinstance(text, str)]
        if texts:
            prompts = await self._prompting.text_prompts(texts, body.add_special_tokens, body, hello)
        else:
            prompts = self._prompting.token_prompts(body.prompt, body, hello)
        return await self._generate(request, body, prompts, hello, CompletionReply)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        hello = self._client.ready()
        body, num_bytes = await self._body(request, ChatBody)
        body.prepare(self._format)
        prompts = [await self._prompting.chat_prompt(body, num_bytes, hello)]
        return await self._generate(request, body, prompts, hello, ChatReply)

    async def _body(self, request: web.Request, kind: type[Checked]) -> tuple[Checked, int]:
        """A checked body and how many bytes it had. Raises ApiError."""
        data = await self._bodies.read(request)
        body = await self._offload.run(len(data) > INLINE_BYTES, lambda: parse(data, kind, self._defaults))
        self._client.check_model(body.model)
        body.check_logprobs(self._settings.max_logprobs)
        return body, len(data)

    async def _generate(
        self, http: web.Request, body: SamplingBody, prompts: list[Prompt], hello: Hello, kind: type[Reply]
    ) -> web.StreamResponse:
        requests, frames = await self._prompting.requests(body, prompts, hello)
        reply = kind(kind.id_prefix + _base_id(http, body), self._client.model_name, self._tokenizer, body)
        if self._settings.enable_log_requests:
            log_request(http.path, reply.id, requests)
        reply.system_fingerprint = self._settings.system_fingerprint or None
        # The transport's buffer is what a slow client fills; aborting it ends a write that waits for it.
        abort = http.transport.abort if body.stream and http.transport is not None else None
        timeout_s = self._settings.request_timeout
        generation = Generation(self._client, body, prompts, requests, self._tokenizer, abort, timeout_s, frames)
        del frames  # nobody needs them again, however long the reply takes
        self.num_open += 1
        try:
            if body.stream:
                return await reply_stream(http, body, generation, reply, self._offload)
            return await reply_whole(http, generation, reply, self._offload)
        finally:  # also where the client has gone, which cancels this task
            self.num_open -= 1
            generation.close()


def _base_id(http: web.Request, body: SamplingBody) -> str:
    """What the reply's id ends in: the body's request_id, the X-Request-Id header if it can stand in one, or a new one.

    It is left in http["request_id"], for the headers and the log.
    """
    header = http.headers.get(REQUEST_ID_HEADER, "")
    http["request_id"] = body.request_id or (header if REQUEST_ID.fullmatch(header) else uuid.uuid4().hex)
    return http["request_id"]


def _sampling_defaults(checkpoint: dict[str, float]) -> tuple[dict[str, Any], int | None]:
    """What the checkpoint recommends as defaults of bodies, and apart from them max_tokens: it limits what a body
    leaves open by the context, and does not replace OpenAI's 16 for completions."""
    defaults: dict[str, Any] = dict(checkpoint)
    max_tokens = defaults.pop("max_tokens", None)
    if "top_k" in defaults:
        defaults["top_k"] = int(defaults["top_k"])
    return defaults, None if max_tokens is None else int(max_tokens)
