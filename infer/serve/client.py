"""The frontend's end of the link: the connection to the engine and the requests in flight on it. No torch here."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence

from infer.request import FinishReason, Output, Request
from infer.serve.engine_socket import read_attach, read_message
from infer.serve.errors import ApiError, check_model, unavailable
from infer.serve.job import Job
from infer.serve.link import (
    Abort,
    Attach,
    Bye,
    EngineStats,
    Hello,
    LinkError,
    Message,
    Outputs,
    Progress,
    Ranks,
    RankState,
    Started,
    Stop,
    Submit,
    encode_frame,
)
from infer.serve.metrics import Metrics
from infer.serve.replay import Replay

DISCONNECT_S = 1.0
# The engine sends something after every step and every second without one. The longest steps, large prompts on a CPU,
# take seconds.
MAX_SILENCE_S = 30.0
MAX_QUEUED_REQUESTS = 2048
QUEUE_RETRY_S = 2  # what a client that found the queue full is told to wait

logger = logging.getLogger("infer.frontend")


def submission(requests: Sequence[Request], suspects: Collection[str] = ()) -> bytes:
    """The frames that hand requests to the engine. suspects: ids of those that are to run alone."""
    return b"".join(
        encode_frame(Submit(request=request, alone=request.request_id in suspects)) for request in requests
    )


class EngineClient:
    """The engine as the HTTP routes see it: whether it is ready, and a way to start, end and drop requests.

    All methods run on the event loop's thread. model_names: what clients may call the model; the first is what Hello
    must say, so that a frontend never serves another model's engine. max_queued: prompts that may wait for their first
    token. identity: what an engine must say in Attach. restart_deadline: seconds without an engine, or a sign of one
    that starts, after which all is over; None where it is over as soon as the engine is. stats: the engine's latest
    figures, which came at stats_time (time.monotonic()). ranks, ranks_time: the same of the ranks' states, which stay
    as they were when the engine is gone, until there is news of the next one's. when_stopped: called where the engine
    says that the server is to end, with the reason and the seconds left; whoever ends it sets stop_reason.
    """

    def __init__(
        self, *model_names: str, max_queued: int = MAX_QUEUED_REQUESTS, metrics: Metrics | None = None,
        identity: str = "", restart_deadline: float | None = None,
    ) -> None:  # fmt: skip
        self.model_names = model_names
        self.metrics = metrics or Metrics(model_names[0])
        self.phase = "waiting for the engine"
        self.stop_reason = ""  # why the server is going to end, once it is
        self.when_stopped: Callable[[str, float], object] = lambda reason, timeout_s: None
        self.hello: Hello | None = None  # of the latest engine, which may be gone
        self.connected = asyncio.Event()  # set once, with the first Hello
        self.lost = asyncio.Event()  # set once, when the engine is gone and no other will be taken
        self.lost_reason = ""
        self.stats: EngineStats | None = None
        self.stats_time = 0.0
        self.ranks: list[RankState] = []
        self.ranks_time = 0.0
        self._max_queued = max_queued
        self._identity, self._restart_deadline = identity, restart_deadline
        self._deadline: asyncio.TimerHandle | None = None
        self._generation = 0  # of the latest engine that attached
        self._gone_at = 0.0  # when the latest was lost
        self._writer: asyncio.StreamWriter | None = None
        self._idle = asyncio.Event()  # set while no engine is connected
        self._idle.set()
        self._jobs: dict[str, Job] = {}
        self._queued: set[str] = set()  # of these, requests whose first token has not come; a subset of _jobs
        self._replay = Replay()  # which of them the engine has
        self._heard = 0.0  # when the engine last sent anything, or was given work after having none

    @property
    def model_name(self) -> str:
        """The name shown in replies."""
        return self.model_names[0]

    @property
    def has_engine(self) -> bool:
        """Whether one is connected, ready or not."""
        return self._writer is not None

    @property
    def num_queued(self) -> int:
        """Prompts that wait for their first token."""
        return len(self._queued)

    @property
    def num_jobs(self) -> int:
        """HTTP requests that the engine works on."""
        return len({id(job) for job in self._jobs.values()})

    def ready(self) -> Hello:
        """The engine's description. Raises ApiError (503) that names the start-up phase while there has been none.

        During a restart there is one: requests are taken, and wait for the next engine.
        """
        if self.hello is None:
            raise unavailable(f"the server is not ready: {self.phase}", "not_ready")
        return self.hello

    @property
    def is_restarting(self) -> bool:
        """Whether there was an engine, and another is awaited."""
        return self.hello is not None and not self._replay.is_open

    def check_up(self) -> None:
        """Raises ApiError (503) unless an engine is there that takes requests."""
        self.ready()
        if self.is_restarting:
            raise unavailable(f"the server is restarting: {self.phase}", "restarting")

    def check_open(self) -> None:
        """Raises ApiError (503) once the server is going to end: it takes no new requests then."""
        if self.stop_reason:
            raise unavailable(f"the server is shutting down and takes no new requests: {self.stop_reason}", "stopping")

    def check_alive(self) -> None:
        """Raises ApiError (503), which names the rank, unless every rank was heard from lately: rank 0 itself while it
        has work, the others always, as far as it says when it heard from them.
        """
        self.check_up()
        ages = [] if self.stats is None else self.stats.heartbeat_ages
        silence = dict(enumerate(ages)) | {0: time.monotonic() - self._heard if self._jobs else 0.0}
        rank, seconds = max(silence.items(), key=lambda item: item[1])
        if seconds > MAX_SILENCE_S:
            raise unavailable(f"rank {rank} was last heard from {seconds:.0f} s ago", "rank_silent", None)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) unless a request that names this model may be served here; None and "" name none."""
        check_model(name, self.model_names)

    def start(
        self, requests: Sequence[Request], on_overflow: Callable[[], None] | None = None, frames: bytes | None = None
    ) -> Job:
        """Hands requests to the engine, or during a restart to the next. on_overflow is called when their reader falls
        too far behind. frames: submission(requests), where a thread has made it.

        Raises ApiError: 503 before the first engine and once the server is going to end, 429 where as many prompts wait
        as may.
        """
        self.check_open()
        self.ready()
        self._check_queue()
        job = Job(requests, on_overflow)
        if not self._jobs:
            self._heard = time.monotonic()
        for request in requests:
            self._jobs[request.request_id] = job
            self._queued.add(request.request_id)
            self.metrics.request_started(request)
        if self._replay.is_open:  # else they go to the next engine
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
            self._end_if_done(job, request_id)

    def close(self, job: Job) -> None:
        """Ends whatever of the job is still running. To be called for every job, however it went."""
        for request_id in job.requests:
            self._end(job, request_id)

    def _end(self, job: Job, request_id: str) -> None:
        self._queued.discard(request_id)
        self.metrics.request_closed(request_id)
        if self._jobs.pop(request_id, None) is not None and job.open[request_id]:
            self._send(Abort(request_id=request_id))
        self._replay.ended(request_id)

    def _end_if_done(self, job: Job, request_id: str) -> None:
        """The engine has nothing more to do for a request whose choices are all over; the client may still read."""
        if not job.open[request_id]:
            self._replay.ended(request_id)

    def _send(self, message: Message) -> None:
        self._write(encode_frame(message))

    def _write(self, frames: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frames)

    # ------------------------------------------------------------------ engines, one after the other

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One engine's connection, from its beginning to its end. One of a later generation ends those before."""
        attach = await read_attach(reader, writer)
        if attach is None or self.lost.is_set() or not self._may_attach(attach, writer):
            logger.warning("Refused a connection to the engine's socket")
            writer.close()
            return
        if self._writer is not None:
            self._writer.close()
            self._engine_gone("another has taken its place")
        self._writer = writer
        self._idle.clear()
        reason, final = "the engine has ended", False
        try:
            while writer is self._writer:  # else another engine has taken its place
                message = await read_message(reader)
                if writer is not self._writer:
                    break
                self._heard = time.monotonic()
                if isinstance(message, Bye):
                    reason, final = f"the engine has ended: {message.reason}", message.final
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
            writer.close()
            if writer is self._writer:
                self._writer = None
                self._engine_gone(reason, final)
                self._idle.set()

    def _may_attach(self, message: Attach, writer: asyncio.StreamWriter) -> bool:
        """Whether this engine is to come next. One that may not is told why; where it is of another model, this server
        ends."""
        reason = None
        if message.identity != self._identity:
            reason = "the model's files or the server's flags are not those that this frontend was started with"
        elif message.generation < self._generation:
            reason = f"generation {message.generation} comes after generation {self._generation}"
        elif message.generation == self._generation and self._writer is not None:
            reason = f"an engine of generation {self._generation} is there already"
        if reason is not None:
            writer.write(encode_frame(Bye(reason=reason)))
            if message.identity != self._identity:
                self.fail_all(reason)
            return False
        self._generation = message.generation
        self._await_sign()
        return True

    def _engine_gone(self, reason: str, final: bool = False) -> None:
        """All that it had not told is to be done again, by the next engine. final: there will be none."""
        self.metrics.engine_lost()
        self.stats = None
        if self._restart_deadline is None or final or self.stop_reason or self.lost.is_set():
            self.fail_all(reason)
            return
        guilty = self._replay.close()
        self.phase, self._gone_at = reason, time.monotonic()
        logger.warning("%s; %d requests wait for the next", reason, len(self._jobs) - len(guilty))
        for request_id in guilty:
            self._blame(request_id)
        self._await_sign()

    def _blame(self, request_id: str) -> None:
        logger.error("Request %s was running when the engine ended, twice in a row; it is ended", request_id)
        job = self._jobs[request_id]
        job.fail(
            ApiError(
                500, "the engine ended twice in a row while it worked on this request; it is not tried again",
                type="server_error", code="engine_crashed", headers={"x-should-retry": "false"},
            )
        )  # fmt: skip
        self.close(job)

    def _await_sign(self) -> None:
        """Gives up unless an engine shows itself in time; each sign of one begins the time anew."""
        self._stop_deadline()
        if self._restart_deadline is not None and not self.lost.is_set():
            seconds = self._restart_deadline
            reason = f"no engine has come up within {seconds:g} s (--restart-deadline); the last word: {self.phase}"
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.fail_all, reason)

    def await_engine(self) -> None:
        """From now on engines may come; where they may restart, the first has as long as any."""
        self._await_sign()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _receive(self, message: Message) -> None:
        match message:
            case Outputs():
                if message.generation != self._generation:
                    raise LinkError(f"outputs of generation {message.generation} in generation {self._generation}")
                for job in {self._jobs[o.request_id] for o in message.items if o.request_id in self._jobs}:
                    self._end_if_overflowing(job)
                for output in message.items:
                    self._dispatch(output)
            case Started():
                for request_id in message.request_ids:
                    if request_id in self._jobs:
                        self._replay.started(request_id)
            case EngineStats():
                self.stats, self.stats_time = message, time.monotonic()
                self.metrics.engine_stats(message)
            case Progress():
                if not self._replay.is_open:  # else it was overtaken by Hello
                    self.phase = message.phase
                    self._await_sign()
            case Ranks():
                self.ranks, self.ranks_time = message.items, time.monotonic()
            case Stop():
                self.when_stopped(message.reason, message.timeout_s)
            case Hello():
                self._welcome(message)
            case Attach():
                raise LinkError("it attaches twice")

    def _welcome(self, hello: Hello) -> None:
        """The engine takes requests: it gets those that are not done."""
        if hello.model_name != self.model_name:
            raise LinkError(f"it serves {hello.model_name!r}, this frontend {self.model_name!r}")
        if self._replay.is_open:
            raise LinkError("it says Hello twice")
        if self.hello is not None:
            seconds = time.monotonic() - self._gone_at
            logger.info("An engine is there again after %.1f s; %d requests go on", seconds, len(self._jobs))
        self._stop_deadline()
        self.hello = hello
        self.metrics.engine_started(hello)
        self.phase = "ready"
        unfinished = {name: job.resumed(name) for name, job in self._jobs.items() if job.open[name]}
        self._replay.open(unfinished)
        suspects = self._replay.suspects
        if unfinished:
            self._write(submission(list(unfinished.values()), suspects))
        if suspects:
            logger.info("%d requests ran when the last one ended; they go on one by one", len(suspects))
        self.connected.set()

    def _dispatch(self, output: Output) -> None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return  # dropped while this was on its way
        if not 0 <= output.index < job.requests[output.request_id].params.n:
            raise LinkError(f"request {output.request_id} has no choice {output.index}")
        if output.index in job.open[output.request_id]:
            output = job.fresh(output)
        self._queued.discard(output.request_id)
        self.metrics.output(output)
        job.put(output)
        self._replay.advanced(output.request_id)
        self._end_if_done(job, output.request_id)

    def _end_if_overflowing(self, job: Job) -> None:
        if job.overflowing:
            logger.warning("A client reads too slowly; its request is ended")
            assert job.on_overflow is not None
            job.on_overflow()
            self.close(job)

    def fail_all(self, reason: str) -> None:
        """The engine is gone for good, or the server ends: every job fails with this reason, and no new one starts."""
        self._stop_deadline()
        self._replay.close()
        self.hello = None
        self.metrics.engine_lost()
        self.phase = reason
        for job in set(self._jobs.values()):
            job.fail(unavailable(reason, "engine_gone", None))
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
