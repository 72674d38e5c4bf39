"""The link between rank 0's engine and the frontend process, as the engine sees it. No torch here.

Messages and their frames, the engine's end (EngineLink), and what the frontend is told as it starts (FrontendConfig).
The frontend listens on a Unix socket, the engine connects. A frame is a 4-byte little-endian length and as many bytes
of MessagePack: one tagged struct.
"""

import collections
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from infer.config import ServerConfig
from infer.request import FinishReason, Output, Request

MAX_FRAME_BYTES = 256 << 20
MAX_OUTPUTS_PER_FRAME = 1024
HEADER = struct.Struct("<I")


class LinkError(ValueError):
    """What came over the link is not a frame or not a message."""


class _Message(msgspec.Struct, tag=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that travels over the link."""


class Submit(_Message):
    """Frontend to engine: a new request. alone: it may be what brought the last engine down; see Scheduler.add."""

    request: Request
    alone: bool = False


class Abort(_Message):
    """Frontend to engine: nobody waits for this choice any more, or, with index None, for any choice of the request.
    It ends without a reply."""

    request_id: str
    index: int | None = None


class Attach(_Message):
    """Engine to frontend, the first of a connection: whose engine this is going to be.

    generation counts the restarts of the ranks: a connection of a later one ends those before. identity: the model and
    the flags (identity.py), which are the frontend's own or the engine is refused.
    """

    generation: int
    identity: str


class Started(_Message):
    """Engine to frontend, before the first batch of these requests runs: if the engine dies, it may be theirs."""

    request_ids: list[str]


class Hello(_Message):
    """Engine to frontend, once the ranks are ready: requests may come. generation counts the engine's restarts.

    model_name: the first of the served names. num_kv_blocks of block_size tokens each: what the KV cache holds.
    """

    generation: int
    model_name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    scheduling_policy: str = "fcfs"
    num_ranks: int = 1
    num_stages: int = 1
    num_kv_blocks: int = 0
    block_size: int = 0


class EngineStats(_Message):
    """Engine to frontend, at least once a second while its loop turns: how the engine is doing.

    Counts and seconds are totals since this generation of the engine began. kv_cache_usage: share of the blocks in use,
    0 to 1. iteration_tokens: tokens of each batch since the message before. active_seconds: time with a batch in
    flight; stage_busy_seconds [num_stages]: what each stage computed of it. heartbeat_ages [num_ranks]: seconds since
    rank 0 last heard from each rank; empty where it does not know.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    iteration_tokens: list[int] = []
    active_seconds: float = 0.0
    stage_busy_seconds: list[float] = []
    heartbeat_ages: list[float] = []


class Outputs(_Message):
    """Engine to frontend: what one or several steps of this generation gave."""

    items: list[Output]
    generation: int = 0


class Progress(_Message):
    """Engine to frontend, before Hello: the start-up phase, such as "loading weights". Said again now and then."""

    phase: str


class RankState(msgspec.Struct, forbid_unknown_fields=True):
    """A rank as the watchdog knows it. step: of its main loop, -1 before the first. busy: it has a batch to run.
    phase_seconds: since that phase began. age_seconds: since that was heard."""

    rank: int
    phase: str
    step: int
    busy: bool
    phase_seconds: float
    age_seconds: float


class Ranks(_Message):
    """Engine to frontend, every second once the ranks have found one another: how each of them is, by rank."""

    items: list[RankState]


class Stop(_Message):
    """Engine to frontend: a signal has asked the server to stop. New requests are to be refused; those under way have
    timeout_s seconds. The frontend says Bye when they are done. May come again, with less time."""

    reason: str
    timeout_s: float


class Bye(_Message):
    """Either way: the sender is going to end, on purpose. final: and there will be no other engine after it."""

    reason: str
    final: bool = False


class Closed(msgspec.Struct):
    """Never travels: what EngineLink puts in the inbox, once and last, when the frontend is gone."""

    reason: str


FromFrontend = Submit | Abort | Bye
FromEngine = Attach | Hello | Started | Outputs | EngineStats | Progress | Ranks | Stop | Bye
Message = Submit | Abort | Bye | Attach | Hello | Started | Outputs | EngineStats | Progress | Ranks | Stop

_ENCODER = msgspec.msgpack.Encoder()


# Which messages may come in is part of the protocol: each end has a decoder of its own.
_AT_FRONTEND: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_AT_ENGINE: msgspec.msgpack.Decoder[FromFrontend] = msgspec.msgpack.Decoder(FromFrontend)
T = TypeVar("T")


def decode_from_engine(payload: bytes | bytearray) -> FromEngine:
    """A message as the frontend reads it. Raises LinkError."""
    return _decode(_AT_FRONTEND, payload)


def decode_from_frontend(payload: bytes | bytearray) -> FromFrontend:
    """A message as the engine reads it. Raises LinkError."""
    return _decode(_AT_ENGINE, payload)


def _decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes | bytearray) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise LinkError(f"a frame of {len(payload)} bytes holds no message: {error}") from None


def encode_frame(message: Message) -> bytes:
    """Length and payload. Raises LinkError when the payload is over MAX_FRAME_BYTES."""
    payload = _ENCODER.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise LinkError(f"{type(message).__name__} takes {len(payload)} bytes; a frame holds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(payload)) + payload


def frame_length(header: bytes | bytearray) -> int:
    """The payload's bytes. Raises LinkError for a length that no frame has."""
    (length,) = HEADER.unpack(header)
    if not 0 < length <= MAX_FRAME_BYTES:
        raise LinkError(f"a frame announces {length} bytes; frames have 1 to {MAX_FRAME_BYTES}")
    return length


class EngineLink:
    """The engine's end, for a main loop made of plain threads: one reads, one writes, no call here waits for the peer.

    Messages from the frontend go to `inbox_put` in order, from the reader's thread; `Closed` comes last, once, unless
    close() was called first. What is sent after the frontend is gone is dropped: `Closed` has said so.
    """

    def __init__(self, connection: socket.socket, inbox_put: Callable[[Message | Closed], None]) -> None:
        self._socket = connection
        self._inbox_put = inbox_put
        self._outbox: collections.deque[Message] = collections.deque()
        self._wake = threading.Condition()
        self._closing = False  # no more sends; the writer ends when the outbox is empty
        self._lost = False  # the frontend is gone; the writer ends at once
        self._reader = threading.Thread(target=self._read_loop, name="frontend-reader", daemon=True)
        self._writer = threading.Thread(target=self._write_loop, name="frontend-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    @classmethod
    def connect(
        cls, path: str | Path, inbox_put: Callable[[Message | Closed], None], *, generation: int = 0,
        identity: str = "", timeout_s: float = 10.0,
    ) -> "EngineLink":  # fmt: skip
        """Connects to the frontend listening at `path` and attaches. Raises ConnectionError that names the path.

        A frontend that refuses says so with Bye.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.settimeout(None)
        except OSError as error:
            connection.close()
            raise ConnectionError(f"cannot reach the frontend at {path}: {error}") from None
        link = cls(connection, inbox_put)
        link.send(Attach(generation=generation, identity=identity))
        return link

    def send(self, message: FromEngine) -> None:
        """Queues a message; never waits."""
        with self._wake:
            if not self._lost and not self._closing:
                self._outbox.append(message)
                self._wake.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes what is queued (for at most timeout_s), then closes. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        deadline = time.monotonic() + timeout_s
        self._writer.join(timeout_s)
        with contextlib.suppress(OSError):  # the peer may have closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._reader is not threading.current_thread():
            self._reader.join(max(0.1, deadline - time.monotonic()))
        self._socket.close()

    def _read_loop(self) -> None:
        reason = "the frontend closed the link"
        try:
            while (header := self._read_exactly(HEADER.size)) is not None:
                payload = self._read_exactly(frame_length(header))
                if payload is None:
                    reason = "the frontend ended in the middle of a message"
                    break
                self._inbox_put(decode_from_frontend(payload))
        except (OSError, LinkError) as error:
            reason = f"the link to the frontend broke: {error}"
        with self._wake:
            expected = self._closing
            self._lost = True
            self._wake.notify()
        if not expected:
            self._inbox_put(Closed(reason))

    def _read_exactly(self, size: int) -> bytearray | None:
        """`size` bytes, or None where the stream ends."""
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            count = self._socket.recv_into(view[done:])
            if count == 0:
                return None
            done += count
        return data

    def _write_loop(self) -> None:
        while (messages := self._take()) is not None:
            for message in messages:
                try:
                    self._socket.sendall(_frame_or_errors(message))
                except OSError:
                    return  # the reader sees the same end and reports it

    def _take(self) -> list[Message] | None:
        """Waits for messages; None at the end."""
        with self._wake:
            while not self._outbox and not self._closing and not self._lost:
                self._wake.wait()
            if self._lost or not self._outbox:
                return None
            messages = list(self._outbox)
            self._outbox.clear()
        return coalesce(messages)


def coalesce(messages: list[Message]) -> list[Message]:
    """Merges neighbouring Outputs, so that a slow frontend gets fewer and larger frames. The order is kept."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        match last, message:
            case Outputs(items=before), Outputs(items=items) if len(before) + len(items) <= MAX_OUTPUTS_PER_FRAME:
                merged[-1] = Outputs(items=before + items, generation=last.generation)
            case _:
                merged.append(message)
    return merged


def _frame_or_errors(message: Message) -> bytes:
    """The frame; Outputs that do not fit one are split, and a single Output that does not fit ends its choice."""
    try:
        return encode_frame(message)
    except LinkError as error:
        if not isinstance(message, Outputs):
            raise
        if len(message.items) > 1:
            half = len(message.items) // 2
            parts = (message.items[:half], message.items[half:])
            return b"".join(_frame_or_errors(Outputs(items=p, generation=message.generation)) for p in parts)
        item = message.items[0]
        failed = Output(
            request_id=item.request_id, index=item.index, finish_reason=FinishReason.ERROR,
            error=f"the result is too large to return ({error}); ask for fewer logprobs",
        )  # fmt: skip
        return encode_frame(Outputs(items=[failed], generation=message.generation))


@dataclass(frozen=True, kw_only=True)
class FrontendConfig(ServerConfig):
    """What the frontend process is told on its standard input, as JSON: the server's flags, and what rank 0 worked out.

    api_key holds the keys of every source, and served_model_name at least one name. default_sampling: parameters that
    the checkpoint recommends, by SamplingParams' names, for requests that leave them out. system_fingerprint: the same
    for the same model and settings. engine_pid: the process to end with. agent_pid: torchrun's, to end with in its
    place, so that engines may come and go. identity: what an engine must say in Attach. report_fd: the pipe for one
    line, ready or why not. lock_fd: the lock of the directory that holds the socket, to be kept for life (claim.py).
    listener_fds: where clients connect, listening already. port_wait_s: how long rank 0 waits for a port that is taken.
    """

    model_path: str
    tokenizer_path: str
    socket_path: str = ""
    engine_pid: int = 0
    agent_pid: int = 0
    identity: str = ""
    report_fd: int | None = None
    lock_fd: int | None = None
    listener_fds: tuple[int, ...] = ()
    port_wait_s: float = 0.0
    default_sampling: dict[str, int | float] = field(default_factory=dict)
    system_fingerprint: str = ""

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names clients may use; the first is the one shown."""
        return self.served_model_name or (Path(self.model_path).name,)
