"""One HTTP request at work: its choices as the engine's outputs come, and the writing of its reply. No torch here."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from infer.request import FinishReason, Output, Request
from infer.serve.client import EngineClient, Job, num_logprobs
from infer.serve.errors import ApiError, bad_request
from infer.serve.offload import Offload
from infer.serve.render import Choice, Delta, Prompt, Reply, usage
from infer.serve.schema import MAX_LOGPROB_ENTRIES, SamplingBody
from infer.serve.text import Tokenizer

WRITE_TIMEOUT_S = 120.0  # a client that takes nothing for so long is gone
WRITE_BYTES = 1 << 18  # a client must take each so many bytes of a reply in that time
MAX_INLINE_ENTRIES = 10_000  # more log-probabilities at once are rendered off the event loop

JSON = msgspec.json.Encoder()


class Generation:
    """One HTTP request's choices while the engine works on them.

    A whole reply holds all its log-probabilities, so they are counted as they come: the number of tokens need not be
    known before. A stream holds none. timeout_s: how long all of it may take (--request-timeout); None: for ever.
    """

    def __init__(
        self, client: EngineClient, body: SamplingBody, prompts: list[Prompt], requests: list[Request],
        tokenizer: Tokenizer, on_overflow: Callable[[], None] | None, timeout_s: float | None = None,
    ) -> None:  # fmt: skip
        self._client = client
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        self.prompts = prompts
        self._first_choice = {request.request_id: i * request.params.n for i, request in enumerate(requests)}
        self.choices = [
            Choice(
                i * request.params.n + k, prompt, request, tokenizer, only_scores=body.only_scores,
                keep=not body.stream,
            )
            for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
            for k in range(request.params.n)
        ]  # fmt: skip
        self._num_running = len(self.choices)
        self._num_kept = 0  # log-probabilities that a whole reply will have
        self._waiting: list[Output] = []  # for prompt log-probabilities, which a choice's first chunk may need
        self._awaits_prompt_logprobs = requests[0].params.prompt_logprobs is not None
        self.job: Job = client.start(requests, on_overflow)

    @property
    def done(self) -> bool:
        return self._num_running == 0

    def usage(self) -> dict[str, Any]:
        return usage(self.prompts, self.choices)

    async def step(self) -> list[tuple[Choice, Delta]]:
        """Waits for outputs; returns what they add to each choice, once each. Raises ApiError where one failed."""
        deltas: dict[int, Delta] = {}
        for output in self._usable(await self._take()):
            choice = self._choice(output)
            if choice.finish_reason is None:  # else a stop string ended it, earlier in these outputs
                delta = self._accept(choice, output)
                # One a choice: when it is rendered, the choice stands where its last output has brought it.
                deltas[choice.index] = deltas[choice.index].plus(delta) if choice.index in deltas else delta
        return [(self.choices[index], delta) for index, delta in deltas.items()]

    async def _take(self) -> list[Output]:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self.job.take()
        except TimeoutError:
            message = f"the request took longer than {self._timeout_s:g} s (--request-timeout of this server)"
            raise ApiError(408, message, type="timeout_error", code="timeout") from None

    def _usable(self, outputs: list[Output]) -> list[Output]:
        """Outputs whose prompt's log-probabilities are there, where they were asked for."""
        if not self._awaits_prompt_logprobs:
            return outputs
        self._waiting += outputs
        for output in outputs:
            if output.prompt_logprobs is not None:
                self._choice(output).prompt.logprobs = output.prompt_logprobs
        usable = [o for o in self._waiting if _has_failed(o) or self._choice(o).prompt.logprobs is not None]
        self._waiting = [o for o in self._waiting if not _has_failed(o) and self._choice(o).prompt.logprobs is None]
        return usable

    def _choice(self, output: Output) -> Choice:
        return self.choices[self._first_choice[output.request_id] + output.index]

    def _accept(self, choice: Choice, output: Output) -> Delta:
        if _has_failed(output):
            message = output.error or "the engine ended this request"
            raise ApiError(500, message, type="server_error", code="engine_error")
        choice.prompt.num_cached_tokens = max(choice.prompt.num_cached_tokens, output.num_cached_tokens)
        delta = choice.accept(output)
        if choice.keep:
            self._num_kept += num_logprobs(delta.logprobs)
            if self._num_kept > MAX_LOGPROB_ENTRIES:
                raise too_many_logprobs(self._num_kept)
        if choice.finish_reason is not None:
            self._num_running -= 1
            self._client.drop_choice(self.job, output.request_id, output.index, choice.finish_reason)
        return delta

    def close(self) -> None:
        """Ends in the engine whatever the client no longer waits for."""
        self._client.close(self.job)


def _has_failed(output: Output) -> bool:
    return output.error is not None or output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)


def too_many_logprobs(num_entries: int) -> ApiError:
    return bad_request(
        f"this reply would have {num_entries} log-probabilities or more; one reply may have {MAX_LOGPROB_ENTRIES}. "
        "Lower logprobs, max_tokens, n or the number of prompts, or use stream", "logprobs",
    )  # fmt: skip


async def reply_whole(http: web.Request, generation: Generation, reply: Reply, offload: Offload) -> web.StreamResponse:
    """One JSON object, when every choice is done."""
    while not generation.done:
        await generation.step()

    def render() -> bytes:
        return JSON.encode(reply.whole(generation.choices, generation.usage()))

    num_entries = sum(reply.num_logprobs(choice, choice.logprobs) for choice in generation.choices)
    data = await offload.run(num_entries > MAX_INLINE_ENTRIES, render)
    response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
    response.content_length = len(data)
    for start in range(0, len(data), WRITE_BYTES):
        await _write(http, response, data[start : start + WRITE_BYTES])
    await response.write_eof()
    return response


async def reply_stream(
    http: web.Request, body: SamplingBody, generation: Generation, reply: Reply, offload: Offload
) -> web.StreamResponse:
    """Server-sent events. Nothing is sent before the first output, so that an early failure is a plain HTTP error."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    try:
        while not generation.done:
            steps = await generation.step()
            await _write(http, response, await _render_events(body, generation, reply, offload, steps))
        if body.include_usage:
            await _write(http, response, _event(reply.usage_chunk(generation.usage())))
    except ApiError as error:
        if not response.prepared:
            raise
        await _write(http, response, _event(error.body()))
    await _write(http, response, b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _render_events(
    body: SamplingBody, generation: Generation, reply: Reply, offload: Offload, steps: list[tuple[Choice, Delta]]
) -> bytes:
    def render() -> bytes:
        used = generation.usage() if body.continuous_usage else None
        with_usage = {"usage": used} if body.include_usage or body.continuous_usage else {}
        chunks = [reply.chunk(choice, delta) for choice, delta in steps]
        return b"".join(_event({**chunk, **with_usage}) for chunk in chunks if chunk is not None)

    num_entries = sum(reply.num_logprobs(choice, delta.logprobs) for choice, delta in steps)
    generation.job.is_rendering = True
    try:
        return await offload.run(num_entries > MAX_INLINE_ENTRIES, render)
    finally:
        generation.job.is_rendering = False


def _event(value: Any) -> bytes:
    return b"data: " + JSON.encode(value) + b"\n\n"


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
