"""Batch files in OpenAI's format: the requests of one, and the rows of results in another. No torch here.

    {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "batch_req_...", "custom_id": "1", "response": {"status_code": 200, "request_id": "...", "body": {...}},
     "error": null}

A row's id is a digest of its request's line. That is what a resumed run knows the finished ones by.
"""

import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from infer.jsonl import JsonLines
from infer.serve.errors import ApiError, bad_request, show

URLS = ("/v1/completions", "/v1/chat/completions")
MAX_CUSTOM_ID_CHARS = 512
_FIELDS = ("custom_id", "method", "url", "body")
_SPACE = b" \t\r\n"
_STEP = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchRequest:
    """One line of the input. number counts from 1. custom_id: None where the line has none that can be read.

    error: what is wrong with the line itself; else url is one of URLS and body a JSON value.
    """

    number: int
    row_id: str
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    error: ApiError | None = None


# ------------------------------------------------------------------------------------------------------ the input


class BatchInput:
    """The requests of a file, read as they are asked for; `-` is standard input. What is no regular file, a pipe say,
    can be read but once: it goes to a temporary file first.

    max_line_bytes: longer lines are requests with an error; no more of one is held. is_restart: whether a process that
    was killed has read from the same place before. Raises ValueError.
    """

    def __init__(self, path: str, max_line_bytes: int, is_restart: bool = False) -> None:
        self.name = "standard input" if path == "-" else path
        self._max_line_bytes = max_line_bytes
        try:
            self._file: IO[bytes] = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                if is_restart:
                    raise ValueError(f"{self.name}: cannot be read a second time after a restart; give a regular file")
                self._file = _spooled(self._file)
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be read: {error.strerror}") from None
        self._done = bytearray()  # since scan(): for each request whether its row is written
        self._state = self._stamp()

    def scan(self, written: "WrittenRows") -> tuple[int, int]:
        """Reads the whole file once: (requests, those of them whose row is written).

        Raises ValueError, which names the lines, for a custom_id that is there twice, and for one whose row was made
        from another request.
        """
        first_lines: dict[bytes, int] = {}  # by the digest of a custom_id
        self._done, num_done = bytearray(), 0
        for request in map(parse_line, self._lines()):
            if request.custom_id is not None:
                first = first_lines.setdefault(_digest(request.custom_id.encode()), request.number)
                if first != request.number:
                    raise ValueError(
                        f"{self.name}: lines {first} and {request.number} have the same custom_id "
                        f"{show(request.custom_id)}; it must tell one request from every other"
                    )
            is_done = written.has(request, self.name)
            self._done.append(is_done)
            num_done += is_done
        return len(self._done), num_done

    def left(self) -> Iterator[BatchRequest]:
        """The requests whose row is not written, once scan() has seen them. Raises ValueError if the file has changed
        since."""
        self._check_unchanged()
        for is_done, line in zip(self._done, self._lines(), strict=False):
            if not is_done:
                yield parse_line(line)
        self._check_unchanged()

    def close(self) -> None:
        self._file.close()

    def _lines(self) -> Iterator["_Line"]:
        """Every line but the blank ones."""
        self._file.seek(0)
        number = 0
        while data := self._file.readline(self._max_line_bytes + 2):
            number += 1
            if len(data.rstrip(b"\r\n")) > self._max_line_bytes:
                yield self._too_long(number, data)
            elif data := data.strip(_SPACE):
                yield _Line(number, data)

    def _too_long(self, number: int, beginning: bytes) -> "_Line":
        """Passes over the rest of the line."""
        digest, data = hashlib.sha256(f"{number}\n".encode()), beginning
        while data:
            digest.update(data)
            data = b"" if data.endswith(b"\n") else self._file.readline(_STEP)
        message = f"line {number} of the batch is over {self._max_line_bytes} bytes (--max-body-bytes)"
        return _Line(number, digest.digest(), ApiError(413, message, code="request_too_large"))

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._stamp() != self._state:
            raise ValueError(f"{self.name}: has changed since the run began")


@dataclass(frozen=True)
class _Line:
    """A line as it was read. error: why data is a digest of it instead."""

    number: int
    data: bytes
    error: ApiError | None = None


def parse_line(line: _Line) -> BatchRequest:
    """A line of the input, with what is wrong with it."""
    custom_id = None
    try:
        if line.error is not None:
            raise line.error
        fields = _fields(line)
        custom_id = _custom_id(line.number, fields)
        return _request(line.number, _row_id(line.data), custom_id, fields)
    except ApiError as error:
        # Without a custom_id, two lines may be the same, and have a row each.
        number = b"" if custom_id is not None else f"{line.number}\n".encode()
        return BatchRequest(line.number, _row_id(number + line.data), custom_id, error=error)


def _fields(line: _Line) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(line.data, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise bad_request(f"line {line.number} of the batch is not a JSON object: {reason}") from None


def _custom_id(number: int, fields: dict[str, msgspec.Raw]) -> str:
    custom_id = _text(fields, "custom_id")
    if custom_id is None or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"line {number} of the batch needs a custom_id, a string of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        raise bad_request(message, "custom_id")
    return custom_id


def _request(number: int, row_id: str, custom_id: str, fields: dict[str, msgspec.Raw]) -> BatchRequest:
    for name in fields:
        if name not in _FIELDS:
            message = f"{name[:40]} is not supported in a batch's line; known are {', '.join(_FIELDS)}"
            raise bad_request(message, name[:40])
    if _text(fields, "method") != "POST":
        raise bad_request('method must be "POST"', "method")
    url = _text(fields, "url")
    if url not in URLS:
        raise bad_request(f"url must be one of {', '.join(URLS)}, not {show(url)}", "url")
    if "body" not in fields:
        raise bad_request("body is missing", "body")
    return BatchRequest(number, row_id, custom_id, url, bytes(fields["body"]))


def _text(fields: dict[str, msgspec.Raw], name: str) -> str | None:
    """None where it is missing or no string."""
    try:
        return msgspec.json.decode(fields.get(name, msgspec.Raw(b"null")), type=str)
    except ValueError:
        return None


def _spooled(source: IO[bytes]) -> IO[bytes]:
    """Everything up to the end, in a file that ends with this process."""
    spool = tempfile.TemporaryFile(prefix="infer-batch-")  # noqa: SIM115 - BatchInput closes it
    shutil.copyfileobj(source, spool, _STEP)
    spool.flush()
    return spool


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _row_id(data: bytes) -> str:
    return f"batch_req_{_digest(data).hex()}"


# ----------------------------------------------------------------------------------------------------- the output


class _Body(msgspec.Struct):
    system_fingerprint: str | None = None


class _Response(msgspec.Struct):
    body: _Body


class _Row(msgspec.Struct):
    """What is read of a row; the rest may be anything."""

    id: str
    custom_id: str | None
    response: _Response | None


class WrittenRows:
    """What an output file holds already: which rows, and by which models. Raises ValueError for a file that is no
    batch's output."""

    def __init__(self, file: JsonLines) -> None:
        self._path = file.path
        self._row_ids: dict[bytes, bytes] = {}  # digest of a custom_id -> its row's id
        self._nameless: set[bytes] = set()  # ids of rows without a custom_id
        self.fingerprints: set[str] = set()
        for line in file.lines():
            try:
                row = msgspec.json.decode(line.data, type=_Row)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self._path}: line {line.number} is not a row of a batch's output: {error}"
                ) from None
            self._add(line.number, row)

    def __len__(self) -> int:
        return len(self._row_ids) + len(self._nameless)

    def _add(self, number: int, row: _Row) -> None:
        row_id = row.id.encode()
        if row.custom_id is None:
            self._nameless.add(row_id)
        elif self._row_ids.setdefault(_digest(row.custom_id.encode()), row_id) != row_id:
            raise ValueError(f"{self._path}: line {number} is another row of custom_id {show(row.custom_id)}")
        if row.response is not None and row.response.body.system_fingerprint is not None:
            self.fingerprints.add(row.response.body.system_fingerprint)

    def has(self, request: BatchRequest, where: str) -> bool:
        """Whether the request's row is there. Raises ValueError where its custom_id has the row of another request."""
        row_id = request.row_id.encode()
        if request.custom_id is None:
            return row_id in self._nameless
        found = self._row_ids.get(_digest(request.custom_id.encode()))
        if found is not None and found != row_id:
            raise ValueError(
                f"{where}: line {request.number} (custom_id {show(request.custom_id)}) has a row in {self._path} that "
                "was made from another request; give another output file, or remove that row"
            )
        return found is not None


class _ResultResponse(msgspec.Struct, kw_only=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Result(msgspec.Struct, kw_only=True):
    id: str
    custom_id: str | None
    response: _ResultResponse
    error: None = None  # OpenAI's place for what has no HTTP status; here everything has one


_ENCODER = msgspec.json.Encoder()


def encode_row(request: BatchRequest, status_code: int, request_id: str, body: bytes) -> bytes:
    """A row of the output. body: JSON."""
    response = _ResultResponse(status_code=status_code, request_id=request_id, body=msgspec.Raw(body))
    return _ENCODER.encode(_Result(id=request.row_id, custom_id=request.custom_id, response=response))


def open_output(path: Path, resume: bool) -> JsonLines:
    """The output file, locked, and repaired where its last line is torn. Raises ValueError, also where there are rows
    in it and they are not to be kept."""
    if not resume and path.is_file() and path.stat().st_size > 0:
        raise ValueError(f"{path}: is there and not empty; --resume goes on with it, or give another file")
    return JsonLines(path)
