"""One HTTP request's engine requests: what has come of them, and what is left to do. No torch here."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from infer.request import Output, Request, TokenLogprobs
from infer.serve.errors import ApiError
from infer.serve.link import LinkError

# Tokens and log-probabilities, some 100 bytes each, that may come while a client takes one write; one that is slower
# than that is ended. More may come while the frontend itself renders: that is not the client's slowness.
MAX_PENDING_ENTRIES = 1 << 16
MAX_PENDING_IN_ALL = 1 << 18


class Job:
    """One HTTP request's engine requests, and the outputs that its handler has not taken yet.

    requests and token_ids hold everything an engine needs to go on with the job from where it is: each prompt, and the
    tokens of each (request id, choice) so far.
    """

    def __init__(self, requests: Sequence[Request], on_overflow: Callable[[], None] | None) -> None:
        self.requests = {request.request_id: request for request in requests}
        self.token_ids: dict[tuple[str, int], list[int]] = {}
        # Choices that the client awaits and the engine works on: they leave when either is done with them.
        self.open = {request.request_id: set(range(request.params.n)) for request in requests}
        self.on_overflow = on_overflow
        self._outputs: list[Output] = []
        self._num_pending = 0
        self._num_before_write: int | None = None  # pending when the write began that the client is taking
        self._failure: ApiError | None = None
        self._wake = asyncio.Event()

    def resumed(self, request_id: str) -> Request:
        """What an engine is to be given: the request, or what is left of it."""
        request, choices = self.requests[request_id], sorted(self.open[request_id])
        done = {choice: list(self.token_ids.get((request_id, choice), ())) for choice in choices}
        if len(choices) == request.params.n and not any(done.values()):
            return request
        return msgspec.structs.replace(request, output_token_ids=done)

    def fresh(self, output: Output) -> Output:
        """The output without the tokens that have come before. Raises LinkError where tokens are missing."""
        known = len(self.token_ids.get((output.request_id, output.index), ()))
        if not output.token_ids or output.token_index == known:
            return output
        if output.token_index > known:
            raise LinkError(
                f"choice {output.index} of request {output.request_id} goes on at token {output.token_index}; it has "
                f"{known}"
            )
        count = min(known - output.token_index, len(output.token_ids))
        return msgspec.structs.replace(
            output, token_ids=output.token_ids[count:], token_index=output.token_index + count,
            logprobs=None if output.logprobs is None else output.logprobs[count:],
        )  # fmt: skip

    def put(self, output: Output) -> None:
        """Takes an output from the engine; those of choices nobody awaits are dropped."""
        choices = self.open[output.request_id]
        if output.index not in choices:
            return
        if output.finish_reason is not None:
            choices.discard(output.index)
        self.token_ids.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        self._outputs.append(output)
        self._num_pending += _num_entries(output)
        self._wake.set()

    @property
    def overflowing(self) -> bool:
        """Whether the client is so slow that the job must end. Only streams can fall behind."""
        if self.on_overflow is None:
            return False
        come = 0 if self._num_before_write is None else self._num_pending - self._num_before_write
        return come > MAX_PENDING_ENTRIES or self._num_pending > MAX_PENDING_IN_ALL

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While this lasts, it is the client that is waited for."""
        self._num_before_write = self._num_pending
        try:
            yield
        finally:
            self._num_before_write = None

    def fail(self, error: ApiError) -> None:
        """Makes take() raise once the outputs that came before are taken."""
        self._failure = error
        self._wake.set()

    @property
    def has_news(self) -> bool:
        """Whether take() has something to return or to raise."""
        return bool(self._outputs) or self._failure is not None

    async def wait(self) -> None:
        """Until there is news, or a nudge."""
        if not self.has_news:
            self._wake.clear()
            await self._wake.wait()

    def nudge(self) -> None:
        """Ends a wait() that is under way."""
        self._wake.set()

    def take(self) -> list[Output]:
        """Everything that has come since the last call. Raises ApiError where the job failed and nothing is left."""
        if self._failure is not None and not self._outputs:
            raise self._failure
        outputs, self._outputs, self._num_pending = self._outputs, [], 0
        return outputs


def _num_entries(output: Output) -> int:
    return len(output.token_ids) + num_logprobs(output.logprobs) + num_logprobs(output.prompt_logprobs)


def num_logprobs(entries: Iterable[TokenLogprobs | None] | None) -> int:
    """Log-probabilities in all, alternatives included."""
    return sum(len(entry.tokens) for entry in entries or () if entry is not None)
