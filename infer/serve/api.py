"""The HTTP routes: a body becomes engine requests, their outputs become a reply or a stream. No torch here."""

import logging
import secrets
import uuid

from aiohttp import web

from infer.request import Request, SamplingParams, check_token_ids
from infer.serve.client import EngineClient
from infer.serve.errors import bad_request, too_long
from infer.serve.generation import Generation, reply_stream, reply_whole, too_many_logprobs
from infer.serve.link import Hello
from infer.serve.offload import Offload
from infer.serve.render import Prompt, Reply
from infer.serve.render_chat import ChatReply
from infer.serve.render_completion import CompletionReply
from infer.serve.schema import MAX_LOGPROB_ENTRIES, Body, SamplingBody, parse
from infer.serve.schema_chat import ChatBody
from infer.serve.schema_completion import CompletionBody
from infer.serve.text import Tokenizer
from infer.serve.upload import SMALL_BODY_BYTES, BodyReader

MAX_INLINE_CHARS = 20_000  # longer texts are tokenized off the event loop
MAX_INLINE_TOKENS = 100_000  # more prompt tokens are checked off the event loop

logger = logging.getLogger("infer.frontend")


class Api:
    """The routes that generate, over one tokenizer and one engine.

    num_open: generations under way. max_logprobs: most alternatives a request may ask for.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, max_logprobs: int) -> None:
        self.num_open = 0
        self._max_logprobs = max_logprobs
        self._client = client
        self._tokenizer = tokenizer
        self._offload = Offload()
        self._bodies = BodyReader()

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_post("/v1/completions", self.completions)
        router.add_post("/v1/chat/completions", self.chat_completions)

    def close(self) -> None:
        """Ends the threads that heavy work was done in."""
        self._offload.close()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        hello = self._client.ready()
        body = await self._body(request, CompletionBody)
        texts = [text for text in body.prompt if isinstance(text, str)]
        if texts:
            encoded = await self._encode(texts, body.add_special_tokens, hello)
            prompts = [Prompt(ids, text) for ids, text in zip(encoded, texts, strict=True)]
        else:
            prompts = [Prompt(ids) for ids in body.prompt]
        requests = await self._requests(body, prompts, hello)
        for prompt in prompts:
            if body.echo and prompt.text is None:  # only after check_prompt: any integer might stand there
                prompt.text = self._tokenizer.decode(prompt.token_ids, skip_special_tokens=body.skip_special_tokens)
        reply_id = CompletionReply.id_prefix + uuid.uuid4().hex
        reply = CompletionReply(reply_id, self._client.model_name, self._tokenizer, body)
        return await self._generate(request, body, prompts, requests, reply)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        hello = self._client.ready()
        body = await self._body(request, ChatBody)
        text = await self._render(body, hello)
        [token_ids] = await self._encode([text], body.add_special_tokens, hello)
        prompts = [Prompt(token_ids, text)]
        requests = await self._requests(body, prompts, hello)
        reply_id = ChatReply.id_prefix + uuid.uuid4().hex
        reply = ChatReply(reply_id, self._client.model_name, self._tokenizer, body)
        return await self._generate(request, body, prompts, requests, reply)

    async def _body(self, request: web.Request, kind: type[Body]) -> Body:
        data = await self._bodies.read(request)
        body = await self._offload.run(len(data) > SMALL_BODY_BYTES, lambda: parse(data, kind))
        self._client.check_model(body.model)
        body.check_logprobs(self._max_logprobs)
        return body

    async def _render(self, body: ChatBody, hello: Hello) -> str:
        size = sum(len(message["content"]) for message in body.messages)
        self._check_chars(size, hello)

        def render() -> str:
            return self._tokenizer.apply_chat_template(
                body.messages, body.generation_prompt, continue_final_message=body.continue_final_message,
                **body.chat_template_kwargs,
            )  # fmt: skip

        try:
            heavy = size + 100 * len(body.messages) > MAX_INLINE_CHARS or bool(body.chat_template_kwargs)
            return await self._offload.run(heavy, render)
        except ValueError as error:
            raise bad_request(str(error), "messages") from None

    async def _encode(self, texts: list[str], add_special_tokens: bool, hello: Hello) -> list[list[int]]:
        """Token ids of each text. Long texts are done off the event loop, so that other streams go on."""
        for text in texts:
            self._check_chars(len(text), hello)

        def encode() -> list[list[int]]:
            return [self._tokenizer.encode(text, add_special_tokens) for text in texts]

        try:
            return await self._offload.run(sum(map(len, texts)) > MAX_INLINE_CHARS, encode)
        except ValueError as error:
            raise bad_request(str(error)) from None

    def _check_chars(self, num_chars: int, hello: Hello) -> None:
        """Some inputs are slow to tokenize: what cannot fit however it splits is refused before."""
        most = hello.max_model_len * self._tokenizer.max_token_chars
        if num_chars > most:
            raise bad_request(
                f"the prompt has {num_chars} characters; {hello.max_model_len} tokens hold at most {most}",
                code="context_length_exceeded",
            )

    async def _requests(self, body: SamplingBody, prompts: list[Prompt], hello: Hello) -> list[Request]:
        """One engine request a prompt, each checked whole: the engine never sees a bad one. Raises ApiError."""
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        num_entries = body.num_prompt_logprobs_shown * ((body.num_prompt_logprobs or 0) + 1) * num_tokens
        # What is not known before, because max_tokens is not, is counted as it comes; a stream holds none.
        if body.max_new_tokens is not None and body.num_logprobs is not None and not body.stream:
            num_entries += body.num_choices * (body.num_logprobs + 1) * body.max_new_tokens
        if num_entries > MAX_LOGPROB_ENTRIES:
            raise too_many_logprobs(num_entries)
        return await self._offload.run(num_tokens > MAX_INLINE_TOKENS, lambda: _engine_requests(body, prompts, hello))

    async def _generate(
        self, http: web.Request, body: SamplingBody, prompts: list[Prompt], requests: list[Request], reply: Reply
    ) -> web.StreamResponse:
        # The transport's buffer is what a slow client fills; aborting it ends a write that waits for it.
        abort = http.transport.abort if body.stream and http.transport is not None else None
        generation = Generation(self._client, body, prompts, requests, self._tokenizer, abort)
        self.num_open += 1
        try:
            if body.stream:
                return await reply_stream(http, body, generation, reply, self._offload)
            return await reply_whole(http, generation, reply, self._offload)
        finally:  # also where the client has gone, which cancels this task
            self.num_open -= 1
            generation.close()


def _engine_requests(body: SamplingBody, prompts: list[Prompt], hello: Hello) -> list[Request]:
    requests, job_id = [], uuid.uuid4().hex
    params_of: dict[int, SamplingParams] = {}  # checking them may take long: once for each max_tokens
    for i, prompt in enumerate(prompts):
        max_tokens = _max_tokens(body, len(prompt.token_ids), hello.max_model_len)
        try:
            if max_tokens not in params_of:
                params_of[max_tokens] = body.sampling_params(max_tokens)
                params_of[max_tokens].check_vocabulary(hello.vocab_size)
            check_token_ids(prompt.token_ids, hello.vocab_size, hello.max_model_len)
        except ValueError as error:
            raise bad_request(str(error)) from None
        seed = secrets.randbits(63) if body.seed is None else body.seed
        requests.append(
            Request(
                request_id=f"{job_id}-{i}", prompt_token_ids=prompt.token_ids, params=params_of[max_tokens], seed=seed,
                eos_token_ids=hello.eos_token_ids,
            )
        )  # fmt: skip
    return requests


def _max_tokens(body: SamplingBody, num_prompt: int, max_model_len: int) -> int:
    """Raises ApiError where prompt and new tokens together exceed the context."""
    wanted = body.max_new_tokens
    if num_prompt >= max_model_len:
        raise too_long(num_prompt, None, max_model_len)
    if wanted is None:
        return max_model_len - num_prompt
    if num_prompt + wanted > max_model_len:
        raise too_long(num_prompt, wanted, max_model_len)
    return wanted
