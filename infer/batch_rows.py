"""A batch's requests at work: taken in, handed to the engine of this process, and written as rows. No torch here.

All of it runs on one event loop, in a thread beside the engine's.
"""

import asyncio
import logging
import sys
import uuid
from collections.abc import Callable, Sequence

from tqdm import tqdm

from infer.batch_file import URLS, BatchInput, BatchRequest, encode_row
from infer.jsonl import JsonLines
from infer.request import FinishReason, Output, Request
from infer.serve.errors import ApiError, bad_request
from infer.serve.generation import JSON, Generation, whole_reply
from infer.serve.intake import Intake
from infer.serve.job import Job
from infer.serve.link import Abort, FrontendConfig, Hello, Submit
from infer.serve.offload import Offload
from infer.serve.schema import SamplingBody
from infer.serve.text import Tokenizer

# What the engine may find when it looks for work: some times what it runs at once, so that it never waits.
AHEAD = 4  # times max_num_seqs
MIN_AHEAD, MAX_AHEAD = 64, 4096

logger = logging.getLogger(__name__)


def rows_ahead(max_num_seqs: int) -> int:
    """Rows at work at once, and prompts that wait for the engine."""
    return min(max(AHEAD * max_num_seqs, MIN_AHEAD), MAX_AHEAD)


class LocalEngine:
    """The engine of this process as the event loop sees it; the engine's own thread takes what `send` is given, and
    has its outputs brought to deliver().

    max_waiting: prompts without a first token, from which on room() waits.
    """

    def __init__(self, send: Callable[[Submit | Abort], None], max_waiting: int) -> None:
        self._send = send
        self._max_waiting = max_waiting
        self._jobs: dict[str, Job] = {}
        self._waiting: set[str] = set()  # of these, requests without a token; a subset of _jobs
        self._fewer = asyncio.Event()
        self.num_tokens = 0  # generated so far

    @property
    def is_restarting(self) -> bool:
        return False  # this process ends with its engine

    async def room(self) -> None:
        """Waits while as many prompts wait as may. Those of one row go together, however many they are."""
        while len(self._waiting) >= self._max_waiting:
            self._fewer.clear()
            await self._fewer.wait()

    def start(
        self, requests: Sequence[Request], on_overflow: Callable[[], None] | None = None, frames: bytes | None = None
    ) -> Job:
        """frames: what a socket would take instead."""
        job = Job(requests, on_overflow)
        for request in requests:
            self._jobs[request.request_id] = job
            self._waiting.add(request.request_id)
            self._send(Submit(request=request))
        return job

    def deliver(self, outputs: Sequence[Output]) -> None:
        """Takes the outputs of one step."""
        for output in outputs:
            self._has_begun(output.request_id)
            if job := self._jobs.get(output.request_id):  # else it was ended while this was on its way
                self.num_tokens += len(output.token_ids)
                job.put(output)

    def drop_choice(self, job: Job, request_id: str, index: int, finish_reason: str = FinishReason.STOP) -> None:
        if index in job.open[request_id]:
            job.open[request_id].discard(index)
            self._send(Abort(request_id=request_id, index=index))

    def close(self, job: Job) -> None:
        for request_id in job.requests:
            self._has_begun(request_id)
            if self._jobs.pop(request_id, None) is not None and job.open[request_id]:
                self._send(Abort(request_id=request_id))

    def _has_begun(self, request_id: str) -> None:
        if request_id in self._waiting:
            self._waiting.discard(request_id)
            self._fewer.set()


class Progress:
    """The progress bar: rows, their rate and the time left, and tokens per second."""

    def __init__(self, total: int, num_done: int, engine: LocalEngine) -> None:
        self._engine = engine
        # A terminal's line is written over; a log gets one line after the other.
        interval = 0.5 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=total, initial=num_done, desc="Batch", unit="row", mininterval=interval, dynamic_ncols=True
        )

    def row_written(self) -> None:
        rate = self._engine.num_tokens / max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} output tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


class BatchRows:
    """Turns the requests of a batch into rows of its output, as many at once as keep the engine busy."""

    def __init__(
        self, source: BatchInput, output: JsonLines, engine: LocalEngine, settings: FrontendConfig,
        tokenizer: Tokenizer, hello: Hello, progress: Progress, max_rows: int,
    ) -> None:  # fmt: skip
        self._source, self._output, self._engine = source, output, engine
        self._hello, self._tokenizer, self._progress = hello, tokenizer, progress
        self._offload = Offload()
        self._intake = Intake(tokenizer, settings, self._offload)
        self._slots = asyncio.Semaphore(max_rows)

    async def run(self) -> None:
        """Returns once every row is on the disk. Raises OSError where one cannot be written, and ValueError where the
        input has changed."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for request in self._source.left():
                    await self._slots.acquire()
                    tasks.create_task(self._row(request))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others only follow from it
        finally:
            self._offload.close()
            self._intake.close()

    async def _row(self, request: BatchRequest) -> None:
        """Answers one request and writes the row. The slot is held until then: a slow disk holds all of it up."""
        request_id = uuid.uuid4().hex
        try:
            body = await self._answer(request, request_id)
            status = 200
        except ApiError as error:
            status, body = error.status, JSON.encode(error.body())
        except Exception:
            logger.exception("Failed to handle line %d", request.number)
            failure = ApiError(500, "internal error; the log has the details", type="server_error")
            status, body = failure.status, JSON.encode(failure.body())
        await asyncio.wrap_future(self._output.append(encode_row(request, status, request_id, body)))
        self._progress.row_written()
        self._slots.release()

    async def _answer(self, request: BatchRequest, request_id: str) -> bytes:
        """The JSON of the reply. Raises ApiError."""
        if request.error is not None:
            raise request.error
        take_in = self._intake.completion if request.url == URLS[0] else self._intake.chat

        def base_id(body: SamplingBody) -> str:
            return body.request_id or request_id

        taken = await take_in(request.body, self._hello, base_id)
        if taken.body.stream:
            raise bad_request("stream must be false in a batch: its results are written whole", "stream")
        await self._engine.room()
        generation = Generation(
            self._engine, taken.body, taken.prompts, taken.requests, self._tokenizer, on_overflow=None
        )
        try:
            return await whole_reply(generation, taken.reply, self._offload)
        finally:
            generation.close()
