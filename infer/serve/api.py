"""The HTTP routes: a body becomes engine requests, their outputs become a reply or a stream. No torch here."""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from aiohttp import web

import infer
from infer.request import FinishReason, Output, Request, SamplingParams, check_prompt
from infer.serve.client import EngineClient, Job
from infer.serve.link import Hello
from infer.serve.render import ChatReply, Choice, CompletionReply, Delta, Prompt, Reply, usage
from infer.serve.schema import (
    MAX_LOGPROB_ENTRIES,
    ApiError,
    ChatBody,
    CompletionBody,
    SamplingBody,
    bad_request,
    model_not_found,
    parse,
    too_long,
)
from infer.serve.text import Tokenizer

MAX_BODY_BYTES = 32 << 20
LARGE_BODY_BYTES = 1 << 20
MAX_LARGE_BODIES = 8  # read at the same time; together with MAX_BODY_BYTES this bounds the memory of uploads
BODY_TIMEOUT_S = 60.0
WRITE_TIMEOUT_S = 120.0  # a client that takes nothing for so long is gone
MAX_INLINE_CHARS = 20_000  # longer texts are tokenized off the event loop

logger = logging.getLogger("infer.frontend")
_JSON = msgspec.json.Encoder()


def error_response(error: ApiError) -> web.Response:
    """OpenAI's error object as a response."""
    return web.Response(
        status=error.status, body=_JSON.encode(error.body()), content_type="application/json", headers=error.headers
    )


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Whatever goes wrong before a reply has begun is told in OpenAI's form."""
    try:
        return await handler(request)
    except ApiError as error:
        return error_response(error)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.method[:20]} is not allowed for {request.path[:100]}; use {allowed}"
        return error_response(ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed}))
    except web.HTTPNotFound:
        return error_response(ApiError(404, f"there is no route {request.path[:100]}", code="not_found"))
    except web.HTTPException as error:
        return error_response(ApiError(error.status, error.reason))
    except ConnectionError:
        raise  # the client is gone; there is nobody to tell
    except Exception:
        logger.exception("Failed to handle %s %s", request.method, request.path[:100])
        return error_response(ApiError(500, "internal error; the server's log has the details", type="server_error"))


class Api:
    """The routes over one tokenizer and one engine. `app()` is the aiohttp application.

    num_open: generations under way. model_path: what /v1/models tells as the model's root.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, model_path: str) -> None:
        self.num_open = 0
        self._model_path = model_path
        self._client = client
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[errors_as_json], client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat_completions)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model:.+}", self.model)
        app.router.add_get("/health", self.health)
        app.router.add_get("/version", self.version)
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, app: web.Application) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def health(self, request: web.Request) -> web.Response:
        """200 once the engine is connected and ready, else 503 with the phase it is in."""
        self._client.ready()
        return web.json_response({"status": "ok"})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": infer.__version__})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_card(self._client.ready())]})

    async def model(self, request: web.Request) -> web.Response:
        hello = self._client.ready()
        self._check_model(request.match_info["model"])
        return web.json_response(self._model_card(hello))

    def _model_card(self, hello: Hello) -> dict[str, Any]:
        return {
            "id": self._client.model_name, "object": "model", "created": self._created, "owned_by": "infer",
            "root": self._model_path, "parent": None, "max_model_len": hello.max_model_len,
        }  # fmt: skip

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._client.model_name:
            raise model_not_found(name, self._client.model_name)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        hello = self._client.ready()
        body = parse(await self._read(request), CompletionBody)
        self._check_model(body.model)
        given = body.prompts()
        texts = [text for text in given if isinstance(text, str)]
        if texts:
            encoded = await self._encode(texts, body.add_special_tokens, hello)
            prompts = [Prompt(ids, text) for ids, text in zip(encoded, texts, strict=True)]
        else:
            prompts = [Prompt(ids) for ids in given if isinstance(ids, list)]
        requests = self._requests(body, prompts, hello)
        for prompt in prompts:
            if body.echo and prompt.text is None:  # only after check_prompt: any integer might stand there
                prompt.text = self._tokenizer.decode(prompt.token_ids, skip_special_tokens=body.skip_special_tokens)
        reply_id = CompletionReply.id_prefix + uuid.uuid4().hex
        reply = CompletionReply(reply_id, self._client.model_name, self._tokenizer, body)
        return await self._generate(request, body, prompts, requests, reply)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        hello = self._client.ready()
        body = parse(await self._read(request), ChatBody)
        self._check_model(body.model)
        text = await self._render(body, hello)
        [token_ids] = await self._encode([text], body.add_special_tokens, hello)
        prompts = [Prompt(token_ids, text)]
        requests = self._requests(body, prompts, hello)
        reply_id = ChatReply.id_prefix + uuid.uuid4().hex
        reply = ChatReply(reply_id, self._client.model_name, self._tokenizer, body)
        return await self._generate(request, body, prompts, requests, reply)

    async def _read(self, request: web.Request) -> bytes:
        """The body, of bounded size and in bounded time. Raises ApiError."""
        if request.content_type != "application/json":
            raise ApiError(415, f"send Content-Type: application/json, not {request.content_type[:60]!r}")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ApiError(415, "compressed bodies are not taken; send the JSON as it is")
        too_large = ApiError(413, f"the body is over {MAX_BODY_BYTES} bytes", code="request_too_large")
        if request.content_length is not None and request.content_length > MAX_BODY_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                if request.content_length is not None and request.content_length <= LARGE_BODY_BYTES:
                    return await request.read()
                async with self._large_bodies:
                    return await request.read()
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="timeout") from None
        except web.HTTPRequestEntityTooLarge:
            raise too_large from None
        except web.RequestPayloadError as error:
            raise bad_request(f"the body broke off: {error}") from None

    async def _render(self, body: ChatBody, hello: Hello) -> str:
        messages = body.template_messages()
        size = sum(len(message["content"]) for message in messages)
        self._check_chars(size, hello)

        def render() -> str:
            return self._tokenizer.apply_chat_template(
                messages, body.generation_prompt, continue_final_message=body.continue_final_message,
                **body.chat_template_kwargs,
            )  # fmt: skip

        try:
            if size + 100 * len(messages) <= MAX_INLINE_CHARS and not body.chat_template_kwargs:
                return render()
            return await asyncio.get_running_loop().run_in_executor(self._pool, render)
        except ValueError as error:
            raise bad_request(str(error), "messages") from None

    async def _encode(self, texts: list[str], add_special_tokens: bool, hello: Hello) -> list[list[int]]:
        """Token ids of each text. Long texts are done off the event loop, so that other streams go on."""
        for text in texts:
            self._check_chars(len(text), hello)

        def encode() -> list[list[int]]:
            return [self._tokenizer.encode(text, add_special_tokens) for text in texts]

        try:
            if sum(map(len, texts)) <= MAX_INLINE_CHARS:
                return encode()
            return await asyncio.get_running_loop().run_in_executor(self._pool, encode)
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

    def _requests(self, body: SamplingBody, prompts: list[Prompt], hello: Hello) -> list[Request]:
        """One engine request a prompt, each checked whole: the engine never sees a bad one. Raises ApiError."""
        requests, job_id = [], uuid.uuid4().hex
        num_logprobs = 0
        for i, prompt in enumerate(prompts):
            params = _params(body, prompt, hello)
            try:
                check_prompt(prompt.token_ids, params, hello.vocab_size, hello.max_model_len)
            except ValueError as error:
                raise bad_request(str(error)) from None
            assert params.max_tokens is not None
            num_logprobs += (
                0 if params.logprobs is None else (params.logprobs + 1) * params.max_tokens * params.n
            ) + (0 if params.prompt_logprobs is None else (params.prompt_logprobs + 1) * len(prompt.token_ids))
            seed = secrets.randbits(63) if body.seed is None else body.seed
            requests.append(
                Request(
                    request_id=f"{job_id}-{i}", prompt_token_ids=prompt.token_ids, params=params, seed=seed,
                    eos_token_ids=hello.eos_token_ids,
                )
            )  # fmt: skip
        if num_logprobs > MAX_LOGPROB_ENTRIES:
            raise bad_request(
                f"this asks for up to {num_logprobs} log-probabilities; one request may have {MAX_LOGPROB_ENTRIES}. "
                "Lower logprobs, max_tokens, n or the number of prompts", "logprobs",
            )  # fmt: skip
        return requests

    async def _generate(
        self, http: web.Request, body: SamplingBody, prompts: list[Prompt], requests: list[Request], reply: Reply
    ) -> web.StreamResponse:
        # The transport's buffer is what a slow client fills; aborting it ends a write that waits for it.
        abort = http.transport.abort if body.stream and http.transport is not None else None
        generation = Generation(self._client, prompts, requests, self._tokenizer, abort)
        self.num_open += 1
        try:
            if body.stream:
                return await _stream(http, body, generation, reply)
            while not generation.done:
                await generation.step()
            return web.Response(
                body=_JSON.encode(reply.whole(generation.choices, generation.usage())), content_type="application/json"
            )
        finally:  # also where the client has gone, which cancels this task
            self.num_open -= 1
            generation.close()


def _params(body: SamplingBody, prompt: Prompt, hello: Hello) -> SamplingParams:
    """Raises ApiError where prompt and new tokens together exceed the context."""
    num_prompt, wanted = len(prompt.token_ids), body.max_new_tokens
    if num_prompt >= hello.max_model_len:
        raise too_long(num_prompt, None, hello.max_model_len)
    if wanted is None:
        return body.sampling_params(hello.max_model_len - num_prompt)
    params = body.sampling_params(wanted)
    if num_prompt + wanted > hello.max_model_len:
        raise too_long(num_prompt, wanted, hello.max_model_len)
    return params


class Generation:
    """One HTTP request's choices while the engine works on them."""

    def __init__(
        self, client: EngineClient, prompts: list[Prompt], requests: list[Request], tokenizer: Tokenizer,
        on_overflow: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        self._client = client
        self.prompts = prompts
        self._first_choice = {request.request_id: i * request.params.n for i, request in enumerate(requests)}
        self.choices = [
            Choice(i * request.params.n + k, prompt, request, tokenizer)
            for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
            for k in range(request.params.n)
        ]
        self._num_running = len(self.choices)
        self._waiting: list[Output] = []  # for prompt log-probabilities, which a choice's first chunk may need
        self._awaits_prompt_logprobs = requests[0].params.prompt_logprobs is not None
        self._job: Job = client.start(requests, on_overflow)

    @property
    def done(self) -> bool:
        return self._num_running == 0

    def usage(self) -> dict[str, Any]:
        return usage(self.prompts, self.choices)

    async def step(self) -> list[tuple[Choice, Delta]]:
        """Waits for outputs; returns what they add to each choice, in order. Raises ApiError where one failed."""
        steps = []
        for output in self._usable(await self._job.take()):
            if self._choice(output).finish_reason is None:  # else a stop string ended it, earlier in these outputs
                steps.append(self._accept(output))
        return steps

    def _usable(self, outputs: list[Output]) -> list[Output]:
        """Outputs whose prompt's log-probabilities are there, where they were asked for."""
        if not self._awaits_prompt_logprobs:
            return outputs
        self._waiting += outputs
        for output in outputs:
            if output.prompt_logprobs is not None:
                self._choice(output).prompt.logprobs = output.prompt_logprobs
        usable = [o for o in self._waiting if o.error is not None or self._choice(o).prompt.logprobs is not None]
        self._waiting = [o for o in self._waiting if o.error is None and self._choice(o).prompt.logprobs is None]
        return usable

    def _choice(self, output: Output) -> Choice:
        return self.choices[self._first_choice[output.request_id] + output.index]

    def _accept(self, output: Output) -> tuple[Choice, Delta]:
        choice = self._choice(output)
        if output.error is not None or output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            message = output.error or "the engine ended this request"
            raise ApiError(500, message, type="server_error", code="engine_error")
        choice.prompt.num_cached_tokens = max(choice.prompt.num_cached_tokens, output.num_cached_tokens)
        delta = choice.accept(output)
        if choice.finish_reason is not None:
            self._num_running -= 1
            self._client.drop_choice(self._job, output.request_id, output.index)
        return choice, delta

    def close(self) -> None:
        """Ends in the engine whatever the client no longer waits for."""
        self._client.close(self._job)


def _event(value: Any) -> bytes:
    return b"data: " + _JSON.encode(value) + b"\n\n"


async def _stream(http: web.Request, body: SamplingBody, generation: Generation, reply: Reply) -> web.StreamResponse:
    """Server-sent events. Nothing is sent before the first output, so that an early failure is a plain HTTP error."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    try:
        while not generation.done:
            events = []
            for choice, delta in await generation.step():
                chunk = reply.chunk(choice, delta)
                if chunk is not None:
                    if body.include_usage or body.continuous_usage:
                        chunk["usage"] = generation.usage() if body.continuous_usage else None
                    events.append(_event(chunk))
            await _write(http, response, b"".join(events))
        if body.include_usage:
            await _write(http, response, _event(reply.usage_chunk(generation.usage())))
    except ApiError as error:
        if not response.prepared:
            raise
        await _write(http, response, _event(error.body()))
    await _write(http, response, b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _write(http: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Waits while the client's buffers are full. Raises ConnectionError when it is gone or takes nothing for long."""
    if not data:
        return
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            if not response.prepared:
                await response.prepare(http)
            await response.write(data)
    except TimeoutError:
        if http.transport is not None:
            http.transport.abort()
        raise ConnectionError(f"the client took nothing for {WRITE_TIMEOUT_S:g} s") from None
