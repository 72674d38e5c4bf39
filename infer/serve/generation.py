"""One HTTP request at work: its choices as the engine's outputs come, and the writing of its reply. No torch here."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from aiohttp import web

from infer.request import FinishReason, Output, Request
from infer.serve.alarm import Alarm
from infer.serve.errors import ApiError, bad_request
from infer.serve.job import Job, num_logprobs
from infer.serve.offload import Offload
from infer.serve.render import Choice, Delta, Prompt, Reply, usage
from infer.serve.schema import MAX_LOGPROB_ENTRIES, SamplingBody
from infer.serve.text import Tokenizer

WRITE_TIMEOUT_S = 120.0  # a client that takes nothing for so long is gone
WRITE_BYTES = 1 << 18  # a client must take each so many bytes of a reply in that time
KEEPALIVE_S = 5.0  # a stream that is silent for so long gets a comment, which clients skip and proxies count
LATE_BEGIN_S = 20.0  # during a restart, a reply of which nothing is sent yet begins with one after so long
# In the units of Reply.work(), some 10 us.
BATCH_WORK = 500  # of what one step brings, so much is done before other requests get their turn
MAX_INLINE_WORK = 1000  # more at once is done off the event loop

JSON = msgspec.json.Encoder()

T = TypeVar("T")

logger = logging.getLogger("infer.frontend")


class EnginePort(Protocol):
    """What a generation asks of the engine: EngineClient over a socket, or the engine of this very process."""

    @property
    def is_restarting(self) -> bool:
        """Whether the engine is gone and another is awaited, which goes on with what was running."""

    def start(
        self, requests: Sequence[Request], on_overflow: Callable[[], None] | None = None, frames: bytes | None = None
    ) -> Job:
        """Hands requests to the engine. Raises ApiError."""

    def drop_choice(self, job: Job, request_id: str, index: int, finish_reason: str = ...) -> None:
        """The client has all it wants of this choice."""

    def close(self, job: Job) -> None:
        """Ends whatever of the job is still running."""


class Generation:
    """One HTTP request's choices while the engine works on them.

    A whole reply holds all its log-probabilities, so they are counted as they come: the number of tokens need not be
    known before. A stream holds none. timeout_s: how long all of it may take (--request-timeout); None: for ever.
    frames: as of EngineClient.start().
    """

    def __init__(
        self, client: EnginePort, body: SamplingBody, prompts: list[Prompt], requests: list[Request],
        tokenizer: Tokenizer, on_overflow: Callable[[], None] | None, timeout_s: float | None = None,
        frames: bytes | None = None,
    ) -> None:  # fmt: skip
        self._client = client
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._deadline = None if timeout_s is None else self._loop.time() + timeout_s
        self.prompts = prompts
        self._counts_reasoning = body.counts_reasoning
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
        self.job: Job = client.start(requests, on_overflow, frames)
        self._alarm = Alarm(self.job.nudge)

    @property
    def done(self) -> bool:
        return self._num_running == 0

    def usage(self, choice: Choice | None = None) -> dict[str, Any]:
        """Of all prompts and choices, or of one choice and its prompt. To be asked for after what it is about was
        rendered, which counts the reasoning."""
        if choice is not None:
            return usage([choice.prompt], [choice], self._counts_reasoning)
        return usage(self.prompts, self.choices, self._counts_reasoning)

    async def step(self) -> list[tuple[Choice, Delta]]:
        """Waits for outputs; returns what they add to each choice, once each. Raises ApiError where one failed."""
        deltas: dict[int, list[Delta]] = {}
        outputs = self._usable(await self._take())
        for i, (batch, _) in enumerate(_batches(outputs, _accept_work)):
            if i:
                await asyncio.sleep(0)
            for output in batch:
                choice = self._choice(output)
                if choice.finish_reason is None:  # else a stop string ended it, earlier in these outputs
                    deltas.setdefault(choice.index, []).append(self._accept(choice, output))
        # One a choice: when it is rendered, the choice stands where its last output has brought it.
        return [(self.choices[index], Delta.joined(parts)) for index, parts in deltas.items()]

    async def wait(self, seconds: float) -> bool:
        """Whether step() need not wait; waits for that at most so long."""
        if self.job.has_news:
            return True
        end = self._loop.time() + seconds
        if self._deadline is not None and self._deadline <= end:
            await self._wait_until(self._deadline)
            return True
        await self._wait_until(end)
        return self.job.has_news

    @property
    def is_held_up(self) -> bool:
        """Whether the engine is being restarted."""
        return self._client.is_restarting

    async def _wait_until(self, end: float | None) -> None:
        """Until there is news of the job, or the loop's time is `end`."""
        self._alarm.set(end)
        while not self.job.has_news and (end is None or self._loop.time() < end):
            await self.job.wait()

    async def _take(self) -> list[Output]:
        await self._wait_until(self._deadline)
        if not self.job.has_news:
            message = f"the request took longer than {self._timeout_s:g} s (--request-timeout of this server)"
            raise ApiError(408, message, type="timeout_error", code="timeout")
        return self.job.take()

    def _usable(self, outputs: list[Output]) -> list[Output]:
        """Outputs whose prompt's log-probabilities are there, where they were asked for."""
        if not self._awaits_prompt_logprobs:
            return outputs
        self._waiting += outputs
        for output in outputs:
            if output.prompt_logprobs is not None:
                prompt = self._choice(output).prompt
                prompt.logprobs, prompt.num_logprobs = output.prompt_logprobs, num_logprobs(output.prompt_logprobs)
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
            self._num_kept += delta.num_logprobs
            if self._num_kept > MAX_LOGPROB_ENTRIES:
                raise too_many_logprobs(self._num_kept)
        if choice.finish_reason is not None:
            self._num_running -= 1
            self._client.drop_choice(self.job, output.request_id, output.index, choice.finish_reason)
        return delta

    def close(self) -> None:
        """Ends in the engine whatever the client no longer waits for."""
        self._alarm.close()
        self._client.close(self.job)


def _has_failed(output: Output) -> bool:
    return output.error is not None or output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)


def _accept_work(output: Output) -> int:
    return 3 + len(output.token_ids) // 4


def _batches(items: Iterable[T], work: Callable[[T], int]) -> Iterator[tuple[list[T], int]]:
    """Items in groups, each with its work: at least BATCH_WORK, but for the last. Only one that ends in a heavy item
    has much more."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += work(item)
        if total >= BATCH_WORK:
            yield batch, total
            batch, total = [], 0
    if batch:
        yield batch, total


def too_many_logprobs(num_entries: int) -> ApiError:
    return bad_request(
        f"this reply would have {num_entries} log-probabilities or more; one reply may have {MAX_LOGPROB_ENTRIES}. "
        "Lower logprobs, max_tokens, n or the number of prompts, or use stream", "logprobs",
    )  # fmt: skip


class ReplyWriter:
    """Writes a reply, piece by piece, to a client that must take each within WRITE_TIMEOUT_S. close() ends it."""

    def __init__(self, http: web.Request, response: web.StreamResponse) -> None:
        self._http, self.response = http, response
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(self._give_up)
        self._is_late = False

    async def write(self, data: bytes) -> None:
        """Waits while the client's buffers are full. Raises ConnectionError when it is gone or too slow."""
        if not data:
            return
        self._alarm.set(self._loop.time() + WRITE_TIMEOUT_S)
        try:
            if not self.response.prepared:
                await self.response.prepare(self._http)
            await self.response.write(data)
        except ConnectionError:
            if self._is_late:
                raise ConnectionError(f"the client took nothing for {WRITE_TIMEOUT_S:g} s") from None
            raise
        finally:
            self._alarm.set(None)

    async def end(self) -> None:
        """The reply is whole. As write()."""
        self._alarm.set(self._loop.time() + WRITE_TIMEOUT_S)
        try:
            await self.response.write_eof()
        finally:
            self._alarm.set(None)

    def _give_up(self) -> None:
        self._is_late = True
        if self._http.transport is not None:
            self._http.transport.abort()  # which ends the write that waits for it

    def close(self) -> None:
        self._alarm.close()


async def reply_whole(http: web.Request, generation: Generation, reply: Reply, offload: Offload) -> web.StreamResponse:
    """One JSON object, when every choice is done."""
    data = await whole_reply(generation, reply, offload)
    response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
    response.content_length = len(data)
    with contextlib.closing(ReplyWriter(http, response)) as out:
        for start in range(0, len(data), WRITE_BYTES):
            await out.write(data[start : start + WRITE_BYTES])
        await out.end()
    return response


async def whole_reply(generation: Generation, reply: Reply, offload: Offload) -> bytes:
    """The JSON of a reply that is not streamed, when every choice is done. Raises ApiError where one failed."""
    while not generation.done:
        await generation.step()
    return await _render_whole(generation, reply, offload)


async def _render_whole(generation: Generation, reply: Reply, offload: Offload) -> bytes:
    """The choices become JSON in batches: no call into the encoder, which lets no other thread run, is a long one."""
    num_logprobs = sum(choice.num_logprobs for choice in generation.choices)
    choices = await offload.run(num_logprobs > MAX_INLINE_WORK, lambda: reply.returned(generation.choices))
    shown: list[msgspec.Raw] = []

    def render(batch: Sequence[Choice]) -> None:
        shown.extend(msgspec.Raw(JSON.encode(reply.whole(choice))) for choice in batch)

    def work_of(choice: Choice) -> int:
        return reply.work(choice, len(choice.stream.text), choice.num_logprobs)

    for i, (batch, work) in enumerate(_batches(choices, work_of)):
        if i:
            await asyncio.sleep(0)
        await offload.run(work > MAX_INLINE_WORK, functools.partial(render, batch))

    def complete() -> bytes:
        return JSON.encode({**reply.whole_head(choices), "choices": shown, "usage": generation.usage()})

    return await offload.run(reply.prompt_work(choices[0].prompt) > MAX_INLINE_WORK, complete)


async def reply_stream(
    http: web.Request, body: SamplingBody, generation: Generation, reply: Reply, offload: Offload
) -> web.StreamResponse:
    """Server-sent events. Nothing is sent before the first output, so that an early failure is a plain HTTP error, but
    in a restart that takes long.
    """
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    with contextlib.closing(ReplyWriter(http, response)) as out:
        try:
            await _write_events(out, body, generation, reply, offload)
        except ApiError as error:
            if not response.prepared:
                raise
            await out.write(_event(error.body()))
        except ConnectionError:
            raise  # the client is gone; there is nobody to tell
        except Exception:
            if not response.prepared:
                raise
            logger.exception("Failed in the middle of a stream of %s", http.path[:100])
            told = ApiError(500, "internal error; the server's log has the details", type="server_error")
            await out.write(_event(told.body()))
        await out.write(b"data: [DONE]\n\n")
        await out.end()
    return response


async def _write_events(
    out: ReplyWriter, body: SamplingBody, generation: Generation, reply: Reply, offload: Offload
) -> None:
    """Everything but the end."""
    response = out.response
    while not generation.done:
        while not await generation.wait(KEEPALIVE_S if response.prepared else LATE_BEGIN_S):
            if response.prepared or generation.is_held_up:
                await out.write(b": keep-alive\n\n")
        await _write_step(out, body, generation, reply, offload)
    if body.include_usage:
        await out.write(_event(reply.usage_chunk(generation.usage())))


async def _write_step(
    out: ReplyWriter, body: SamplingBody, generation: Generation, reply: Reply, offload: Offload
) -> None:
    """Waits for outputs, and writes what they add to the choices."""

    def work_of(step: tuple[Choice, Delta]) -> int:
        choice, delta = step
        return reply.work(choice, len(delta.text), delta.num_logprobs)

    batches = [*_batches(await generation.step(), work_of)]
    for num_done, (steps, work) in enumerate(batches):
        if num_done:
            await asyncio.sleep(0)
        data = await _render_events(body, generation, reply, offload, steps, work > MAX_INLINE_WORK)
        with generation.job.writing():
            await out.write(data)


async def _render_events(
    body: SamplingBody, generation: Generation, reply: Reply, offload: Offload, steps: list[tuple[Choice, Delta]],
    heavy: bool = False,
) -> bytes:  # fmt: skip
    def render() -> bytes:
        events = []
        for choice, delta in steps:
            chunk = reply.chunk(choice, delta)
            if chunk is None:
                continue
            if body.include_usage or body.continuous_usage:
                chunk["usage"] = generation.usage(choice) if body.continuous_usage else None
            events.append(_event(chunk))
        return b"".join(events)

    return await offload.run(heavy, render)


def _event(value: Any) -> bytes:
    return b"data: " + JSON.encode(value) + b"\n\n"
