"""The link between rank 0's engine and the frontend process, as the engine sees it. No torch here.

Messages and their frames, the engine's end (EngineLink), and starting the frontend (start_frontend). The frontend
listens on a Unix socket, the engine connects. A frame is a 4-byte little-endian length and as many bytes of
MessagePack: one tagged struct.
"""

import collections
import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

import infer
from infer.config import ServerConfig
from infer.request import FinishReason, Output, Request

MAX_FRAME_BYTES = 256 << 20
MAX_OUTPUTS_PER_FRAME = 1024
HEADER = struct.Struct("<I")
SOCKET_NAME = "engine.sock"
DIRECTORY_PREFIX = "infer-"
MAX_SOCKET_PATH_BYTES = 103  # macOS; Linux takes 107


class LinkError(ValueError):
    """What came over the link is not a frame or not a message."""


class _Message(msgspec.Struct, tag=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that travels over the link."""


class Submit(_Message):
    """Frontend to engine: a new request."""

    request: Request


class Abort(_Message):
    """Frontend to engine: nobody waits for this choice any more, or, with index None, for any choice of the request.
    It ends without a reply."""

    request_id: str
    index: int | None = None


class Hello(_Message):
    """Engine to frontend, once the ranks are ready: requests may come. generation counts the engine's restarts."""

    generation: int
    model_name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]


class Outputs(_Message):
    """Engine to frontend: what one or several steps gave."""

    items: list[Output]


class Progress(_Message):
    """Engine to frontend, before Hello: the start-up phase, such as "loading weights"."""

    phase: str


class Bye(_Message):
    """Either way: the sender is going to end, on purpose."""

    reason: str


class Closed(msgspec.Struct):
    """Never travels: what EngineLink puts in the inbox, once and last, when the frontend is gone."""

    reason: str


FromFrontend = Submit | Abort | Bye
FromEngine = Hello | Outputs | Progress | Bye
Message = Submit | Abort | Bye | Hello | Outputs | Progress

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
        cls, path: str | Path, inbox_put: Callable[[Message | Closed], None], timeout_s: float = 10.0
    ) -> "EngineLink":
        """Connects to the frontend listening at `path`. Raises ConnectionError that names the path."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.settimeout(None)
        except OSError as error:
            connection.close()
            raise ConnectionError(f"cannot reach the frontend at {path}: {error}") from None
        return cls(connection, inbox_put)

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
                merged[-1] = Outputs(items=before + items)
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
            parts = (Outputs(items=message.items[:half]), Outputs(items=message.items[half:]))
            return b"".join(_frame_or_errors(part) for part in parts)
        item = message.items[0]
        failed = Output(
            request_id=item.request_id, index=item.index, finish_reason=FinishReason.ERROR,
            error=f"the result is too large to return ({error}); ask for fewer logprobs",
        )  # fmt: skip
        return encode_frame(Outputs(items=[failed]))


class Ready(msgspec.Struct, forbid_unknown_fields=True):
    """The one line the frontend writes on its report pipe: the port it listens on, or why it cannot start."""

    port: int = 0
    error: str | None = None


class FrontendHandle:
    """The frontend process as its parent sees it. socket_path: where EngineLink connects, once the process is ready.

    port: where HTTP listens; with port 0 known once it is ready.
    """

    def __init__(self, process: subprocess.Popen[bytes], socket_path: Path, port: int, report_fd: int) -> None:
        self._process = process
        self._report = os.fdopen(report_fd, "rb")
        self._was_ready = False
        self.socket_path = socket_path
        self.port = port

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Waits, once, until it has bound its port and read the tokenizer.

        Raises ValueError with its one-line reason when it cannot start, and has ended it then: port taken, no such
        address, tokenizer missing or corrupt.
        """
        try:
            with self._report as pipe:
                ready = _await_report(pipe.fileno(), self._process, timeout_s)
            if ready.error is not None:
                raise ValueError(ready.error)
        except BaseException:
            self.stop(timeout=2.0)
            raise
        self.port, self._was_ready = ready.port, True

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def stop(self, timeout: float = 10.0) -> int:
        """Asks it to end, kills it after `timeout` seconds, and returns its exit status. May be called twice.

        One that nobody has waited for has no clients yet, and nothing to say: it is killed at once.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM if self._was_ready else signal.SIGKILL)
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._report.close()
        remove_socket(self.socket_path)  # the process does this itself unless it was killed
        return status


def start_frontend(
    server: ServerConfig, model_path: Path, tokenizer_path: Path, served_name: str
) -> FrontendHandle:
    """Starts the frontend and waits until it is ready. Raises ValueError as spawn_frontend and wait_ready do."""
    handle = spawn_frontend(server, model_path, tokenizer_path, served_name)
    handle.wait_ready()
    return handle


def spawn_frontend(
    server: ServerConfig, model_path: Path, tokenizer_path: Path, served_name: str, port_wait_s: float = 0.0
) -> FrontendHandle:
    """Starts the frontend in a session of its own; `wait_ready` says how that went.

    port_wait_s: how long it waits for its port where another process still has it. The frontend ends by itself when the
    calling process does. Raises ValueError where no process can be started.
    """
    socket_path = _private_directory() / SOCKET_NAME
    report, report_for_child = os.pipe()
    command = [
        sys.executable, "-m", "infer.serve.frontend",
        "--host", server.host, "--port", str(server.port), "--socket", str(socket_path),
        "--model-path", str(model_path), "--tokenizer-path", str(tokenizer_path), "--served-model-name", served_name,
        "--max-logprobs", str(server.max_logprobs), "--port-wait", str(port_wait_s),
        "--engine-pid", str(os.getpid()), "--report-fd", str(report_for_child),
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, close_fds=True, pass_fds=(report_for_child,),
            env=_child_environment(),
        )  # fmt: skip
    except OSError as error:
        os.close(report)
        remove_socket(socket_path)
        raise ValueError(f"cannot start the frontend process: {error}") from None
    finally:
        os.close(report_for_child)
    return FrontendHandle(process, socket_path, server.port, report)


def _private_directory() -> Path:
    """A new directory that nobody else can enter (mode 0700), of a path short enough for a socket in it.

    Raises ValueError where none can be made.
    """
    longest = MAX_SOCKET_PATH_BYTES - len(f"/{DIRECTORY_PREFIX}12345678/{SOCKET_NAME}")  # mkdtemp adds 8 characters
    parents = [parent for parent in (tempfile.gettempdir(), "/tmp") if len(os.fsencode(parent)) <= longest]
    try:
        return Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=parents[0]))
    except OSError as error:
        raise ValueError(f"no directory for the engine's socket: {error}; set TMPDIR to one that takes files") from None


def remove_socket(path: Path) -> None:
    """Removes the socket and the directory made for it. Whatever else lies there stays, and the directory with it."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or gone
        path.parent.rmdir()


def _child_environment() -> dict[str, str]:
    """This environment, with the package importable from wherever the program was started."""
    root = str(Path(infer.__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _await_report(fd: int, process: subprocess.Popen[bytes], timeout_s: float) -> Ready:
    """Reads the report. Raises ValueError when the frontend ends, or timeout_s pass, without one."""
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ValueError(f"the frontend process did not start within {timeout_s:g} s")
        chunk = os.read(fd, 4096)
        if not chunk:
            status = process.wait()
            raise ValueError(f"the frontend process ended with status {status} before it was ready")
        line += chunk
    return msgspec.json.decode(line, type=Ready)
