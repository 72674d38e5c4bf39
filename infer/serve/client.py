"""The frontend's end of the link: the connection to the engine and the requests in flight on it. No torch here."""

import asyncio
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence

from infer.request import FinishReason, Output, Request, TokenLogprobs
from infer.serve.errors import ApiError, check_model
from infer.serve.link import (
    HEADER,
    Abort,
    Bye,
    EngineStats,
    Hello,
    LinkError,
    Message,
    Outputs,
    Progress,
    Submit,
    decode_from_engine,
    encode_frame,
    frame_length,
)
from infer.serve.metrics import Metrics

# What earlier frames may have left waiting for a client that reads too slowly when another comes: tokens and
# log-probabilities, some 100 bytes each.
MAX_PENDING_ENTRIES = 1 << 16
MAX_PENDING_WHILE_RENDERING = 1 << 18  # then it is the frontend that is slow
DISCONNECT_S = 1.0
# The engine sends something after every step and every second without one. The longest steps, large prompts on a CPU,
# take seconds.
MAX_SILENCE_S = 30.0
MAX_QUEUED_REQUESTS = 2048
QUEUE_RETRY_S = 2  # what a client that found the queue full is told to wait

logger = logging.getLogger("infer.frontend")


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
        self.is_rendering = False
        self._outputs: list[Output] = []
        self._num_pending = 0
        self._failure: ApiError | None = None
        self._wake = asyncio.Event()

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
        most = MAX_PENDING_WHILE_RENDERING if self.is_rendering else MAX_PENDING_ENTRIES
        return self.on_overflow is not None and self._num_pending > most

    def fail(self, error: ApiError) -> None:
        """Makes take() raise once the outputs that came before are taken."""
        self._failure = error
        self._wake.set()

    async def take(self) -> list[Output]:
        """Everything that has come since the last call; waits for at least one output. Raises ApiError."""
        while not self._outputs:
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            await self._wake.wait()
        outputs, self._outputs, self._num_pending = self._outputs, [], 0
        return outputs


def _num_entries(output: Output) -> int:
    return len(output.token_ids) + num_logprobs(output.logprobs) + num_logprobs(output.prompt_logprobs)


def num_logprobs(entries: Iterable[TokenLogprobs | None] | None) -> int:
    """Log-probabilities in all, alternatives included."""
    return sum(len(entry.tokens) for entry in entries or () if entry is not None)


def submission(requests: Sequence[Request]) -> bytes:
    """The frames that hand requests to the engine."""
    return b"".join(encode_frame(Submit(request=request)) for request in requests)


class EngineClient:
    """The engine as the HTTP routes see it: whether it is ready, and a way to start, end and drop requests.

    All methods run on the event loop's thread. model_names: what clients may call the model; the first is what Hello
    must say, so that a frontend never serves another model's engine. max_queued: prompts that may wait for their first
    token. stats: the engine's latest figures, which came at stats_time (time.monotonic()).
    """

    def __init__(
        self, *model_names: str, max_queued: int = MAX_QUEUED_REQUESTS, metrics: Metrics | None = None
    ) -> None:
        self.model_names = model_names
        self.metrics = metrics or Metrics(model_names[0])
        self.phase = "waiting for the engine"
        self.hello: Hello | None = None
        self.connected = asyncio.Event()  # set once, with the first Hello
        self.lost = asyncio.Event()  # set once, when an engine that was connected is gone
        self.lost_reason = ""
        self.stats: EngineStats | None = None
        self.stats_time = 0.0
        self._max_queued = max_queued
        self._writer: asyncio.StreamWriter | None = None
        self._idle = asyncio.Event()  # set while no engine is connected
        self._idle.set()
        self._jobs: dict[str, Job] = {}
        self._queued: set[str] = set()  # of these, requests whose first token has not come; a subset of _jobs
        self._heard = 0.0  # when the engine last sent anything, or was given work after having none

    @property
    def model_name(self) -> str:
        """The name shown in replies."""
        return self.model_names[0]

    @property
    def num_queued(self) -> int:
        """Prompts that wait for their first token."""
        return len(self._queued)

    @property
    def num_jobs(self) -> int:
        """HTTP requests that the engine works on."""
        return len({id(job) for job in self._jobs.values()})

    def ready(self) -> Hello:
        """The engine's description. Raises ApiError (503) that names the start-up phase while there is none."""
        if self.hello is None:
            message = f"the server is not ready: {self.phase}"
            raise ApiError(503, message, type="service_unavailable", code="not_ready", headers={"Retry-After": "1"})
        return self.hello

    def check_alive(self) -> None:
        """Raises ApiError (503), which names the rank, unless every rank was heard from lately: rank 0 itself while it
        has work, the others always, as far as it says when it heard from them.
        """
        self.ready()
        ages = [] if self.stats is None else self.stats.heartbeat_ages
        silence = dict(enumerate(ages)) | {0: time.monotonic() - self._heard if self._jobs else 0.0}
        rank, seconds = max(silence.items(), key=lambda item: item[1])
        if seconds > MAX_SILENCE_S:
            message = f"rank {rank} was last heard from {seconds:.0f} s ago"
            raise ApiError(503, message, type="service_unavailable", code="rank_silent")

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) unless a request that names this model may be served here; None and "" name none."""
        check_model(name, self.model_names)

    def start(
        self, requests: Sequence[Request], on_overflow: Callable[[], None] | None = None, frames: bytes | None = None
    ) -> Job:
        """Hands requests to the engine. on_overflow is called when their reader falls too far behind. frames:
        submission(requests), where a thread has made it.

        Raises ApiError: 503 without an engine, 429 where as many prompts wait as may.
        """
        self.ready()
        self._check_queue()
        job = Job(requests, on_overflow)
        if not self._jobs:
            self._heard = time.monotonic()
        for request in requests:
            self._jobs[request.request_id] = job
            self._queued.add(request.request_id)
            self.metrics.request_started(request)
        self._write(submission(requests) if frames is None else frames)
        return job

    def _check_queue(self) -> None:
        """One HTTP request's prompts come in together: even a short queue takes a long list once it is empty."""
        if len(self._queued) >= self._max_queued:
            message = (
                f"{len(self._queued)} prompts wait already, the most this server queues (--max-num-queued-reqs "
                f"{self._max_queued}); try again later"
            )
            raise ApiError(
                429, message, type="rate_limit_error", code="rate_limit_exceeded",
                headers={"Retry-After": str(QUEUE_RETRY_S)},
            )  # fmt: skip

    def drop_choice(self, job: Job, request_id: str, index: int, finish_reason: str = FinishReason.STOP) -> None:
        """The client has all it wants of this choice; the engine stops working on it unless it has ended it already."""
        self.metrics.choice_finished(request_id, index, finish_reason)
        if index in job.open[request_id]:
            job.open[request_id].discard(index)
            self._send(Abort(request_id=request_id, index=index))

    def close(self, job: Job) -> None:
        """Ends whatever of the job is still running. To be called for every job, however it went."""
        for request_id in job.requests:
            self._end(job, request_id)

    def _end(self, job: Job, request_id: str) -> None:
        self._queued.discard(request_id)
        self.metrics.request_closed(request_id)
        if self._jobs.pop(request_id, None) is not None and job.open[request_id]:
            self._send(Abort(request_id=request_id))

    def _send(self, message: Message) -> None:
        self._write(encode_frame(message))

    def _write(self, frames: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frames)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One engine's connection, from its beginning to its end. A second engine at the same time is turned away."""
        if not _is_same_user(writer) or self._writer is not None or self.lost.is_set():
            logger.warning("Refused a second connection to the engine's socket")
            writer.close()
            return
        self._writer = writer
        self._idle.clear()
        reason = "the engine has ended"
        try:
            while True:
                header = await reader.readexactly(HEADER.size)
                message = decode_from_engine(await reader.readexactly(frame_length(header)))
                self._heard = time.monotonic()
                if isinstance(message, Bye):
                    reason = f"the engine has ended: {message.reason}"
                else:
                    self._receive(message)
                await asyncio.sleep(0)  # handlers take what has come before the next frame finds it waiting
        except asyncio.IncompleteReadError:
            pass  # the end of the connection is the engine's end
        except OSError as error:
            reason = f"the engine has ended: {error}"
        except LinkError as error:
            reason = f"the engine sent nonsense: {error}"
            logger.error("The engine sent nonsense: %s", error)
        finally:
            self._writer = None
            writer.close()
            self.fail_all(reason)
            self._idle.set()

    def _receive(self, message: Message) -> None:
        match message:
            case Outputs():
                for job in {self._jobs[o.request_id] for o in message.items if o.request_id in self._jobs}:
                    self._end_if_overflowing(job)
                for output in message.items:
                    self._dispatch(output)
            case EngineStats():
                self.stats, self.stats_time = message, time.monotonic()
                self.metrics.engine_stats(message)
            case Progress():
                self.phase = message.phase
            case Hello():
                if message.model_name != self.model_name:
                    raise LinkError(f"it serves {message.model_name!r}, this frontend {self.model_name!r}")
                self.hello = message
                self.metrics.engine_started(message)
                self.phase = "ready"
                self.connected.set()

    def _dispatch(self, output: Output) -> None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return  # dropped while this was on its way
        if not 0 <= output.index < job.requests[output.request_id].params.n:
            raise LinkError(f"request {output.request_id} has no choice {output.index}")
        self._queued.discard(output.request_id)
        self.metrics.output(output)
        job.put(output)

    def _end_if_overflowing(self, job: Job) -> None:
        if job.overflowing:
            logger.warning("A client reads too slowly; its request is ended")
            assert job.on_overflow is not None
            job.on_overflow()
            self.close(job)

    def fail_all(self, reason: str) -> None:
        """The engine is gone, or the server is ending: every job fails with this reason, and no new one starts."""
        self.hello = None
        self.metrics.engine_lost()
        self.phase = reason
        for job in set(self._jobs.values()):
            job.fail(ApiError(503, reason, type="service_unavailable", code="engine_gone"))
        if not self.lost.is_set():
            self.lost_reason = reason
            self.lost.set()

    async def disconnect(self, reason: str) -> None:
        """Tells the engine, if one is connected, that this process is going to end, and waits for serve() to return."""
        if self._writer is None:
            return
        self._send(Bye(reason=reason))
        self._writer.close()  # writes what is queued first
        try:
            async with asyncio.timeout(DISCONNECT_S):
                await self._idle.wait()
        except TimeoutError:  # the engine reads nothing any more
            self._writer.transport.abort()
            await self._idle.wait()


def _is_same_user(writer: asyncio.StreamWriter) -> bool:
    """The socket's directory keeps other users out already; this holds where it has been opened up."""
    connection = writer.get_extra_info("socket")
    if connection is None or not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid == os.getuid()
