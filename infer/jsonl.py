"""A file of JSON lines that only grows, and that a kill at any moment leaves whole. No torch here."""

import contextlib
import fcntl
import json
import logging
import os
import queue
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

MAX_GROUP_BYTES = 16 << 20  # written at once; lines that come meanwhile wait for the next time
_TAIL_STEP = 1 << 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """A line of a file, without its end. number counts from 1; offset in bytes."""

    number: int
    offset: int
    data: bytes


class JsonLines:
    """Lines are appended by a thread of its own: as many as have come, in one write, then one fsync.

    A line counts once its future is done: from then on it is on the disk. What was being written when the process or
    the machine died is a torn last line at most, which the next to open the file takes away; one that lacks its end
    alone is completed. One process at a time may have the file open.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it. Raises ValueError where that cannot be, or another process has it open."""
        self.path = path
        try:
            self._fd = _open(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self._lock()
            self.num_bytes = self._repair()  # of what was there
        except BaseException:
            os.close(self._fd)
            raise
        self._queue: queue.SimpleQueue[tuple[bytes, Future[None]] | None] = queue.SimpleQueue()
        self._last: Future[None] | None = None
        self._error: OSError | None = None
        self._writer = threading.Thread(target=self._write_loop, name=f"writer of {path.name}", daemon=True)
        self._writer.start()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what is there

    def lines(self) -> Iterator[Line]:
        """The lines that were there when the file was opened."""
        with open(self.path, "rb") as file:
            offset = 0
            for number, data in enumerate(file, start=1):
                if offset >= self.num_bytes:
                    return
                yield Line(number, offset, data.removesuffix(b"\n"))
                offset += len(data)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of a line that lines() told of. Raises OSError."""
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise OSError(f"{self.path} has become shorter while it was in use")
        return data

    def _lock(self) -> None:
        """Held until the file is closed, or its process ends however it does. Raises ValueError."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is writing to it") from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): see to it that no other process writes it", self.path, error)

    def _repair(self) -> int:
        """Ends the file at the end of a line; returns its bytes."""
        size = os.fstat(self._fd).st_size
        end, tail = size, b""  # the file's bytes from `end` on
        while end > 0 and b"\n" not in tail:
            start = max(0, end - _TAIL_STEP)
            tail = os.pread(self._fd, end - start, start) + tail
            end = start
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return size
        if _is_object(torn):  # all of it was written but its end
            _write_all(self._fd, b"\n")
            size += 1
        else:
            size -= len(torn)
            os.ftruncate(self._fd, size)
            logger.warning("%s ended in the middle of a line; those %d bytes are taken away", self.path, len(torn))
        os.fsync(self._fd)
        return size

    # ------------------------------------------------------------------ what is added

    def append(self, data: bytes) -> Future[None]:
        """Adds a line, given without its end. The future is done once it is on the disk, and never cancelled; its
        exception is the OSError that kept the line from there. After one nothing more is written; the next call raises
        it."""
        assert b"\n" not in data, "a line has one end"
        if self._error is not None:
            raise self._error
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()
        self._last = written
        self._queue.put((data + b"\n", written))
        return written

    def flush(self) -> None:
        """Waits until every line is on the disk. Raises OSError."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Writes what is left and closes the file. May be called twice."""
        if self._writer.is_alive():
            self._queue.put(None)
            self._writer.join()
            os.close(self._fd)

    def _write_loop(self) -> None:
        going_on = True
        while going_on:
            lines, going_on = self._take()
            if lines:
                self._write([data for data, _ in lines], [written for _, written in lines])

    def _take(self) -> tuple[list[tuple[bytes, Future[None]]], bool]:
        """Waits for lines; all there are, and whether more may come."""
        lines, num_bytes = [], 0
        item = self._queue.get()
        with contextlib.suppress(queue.Empty):
            while item is not None:
                lines.append(item)
                num_bytes += len(item[0])
                if num_bytes >= MAX_GROUP_BYTES:
                    return lines, True
                item = self._queue.get_nowait()
        return lines, item is not None

    def _write(self, lines: list[bytes], written: list[Future[None]]) -> None:
        try:
            if self._error is not None:
                raise self._error
            _write_all(self._fd, b"".join(lines))
            os.fsync(self._fd)
        except OSError as error:
            # Part of a line may stand there now: another one behind it could never be told from it.
            self._error = error
            for future in written:
                future.set_exception(error)
        else:
            for future in written:
                future.set_result(None)


def _open(path: Path) -> int:
    """The file, made if need be, and on the disk with its name. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "it is not a regular file")
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # some file systems have no such thing; what can be done is done
            os.fsync(directory)
        os.close(directory)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False
