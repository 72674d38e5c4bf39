"""One streamed request to an OpenAI endpoint, with the time of everything that comes back. No torch here."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MAX_EVENT_BYTES = 1 << 20
MAX_ERROR_BYTES = 1 << 16
MAX_REASON_CHARS = 300
CONNECT_SECONDS = 60.0
SILENCE_SECONDS = 3600.0  # a request may stand in the server's queue for long, but not for ever

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)


class StreamError(ValueError):
    """The reply is not a stream of completion chunks, or tells of an error."""


class EventParser:
    """Server-sent events out of bytes that come in pieces of any size (WHATWG HTML, 9.2.6)."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that this piece completes. Raises StreamError for one over MAX_EVENT_BYTES."""
        self._buffer += piece
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(bytes(line[5:].removeprefix(b" ")))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        if len(self._buffer) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise StreamError(f"an event of more than {MAX_EVENT_BYTES:,} bytes")
        return events


@dataclass
class Outcome:
    """How one request went. error: why it failed. Times are seconds from its sending.

    first: to the first chunk with text; gaps: between chunks; last: to the last one.
    prompt_tokens and output_tokens are the server's own count, where it gives one; else the prompt's length as it was
    made, and the number of chunks.
    """

    prompt_tokens: int
    output_tokens: int = 0
    error: str | None = None
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)

    @property
    def per_output_token(self) -> float | None:
        """Seconds a token took after the first; None for a single one."""
        return (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any], prompt_tokens: int) -> Outcome:
    """Sends a request with "stream": true and reads the reply to its end. A failure is told in the outcome."""
    outcome = Outcome(prompt_tokens)
    try:
        await _stream(session, url, body, outcome)
    except StreamError as error:
        outcome.error = str(error)
    except TimeoutError:  # of aiohttp's, some of which are ClientErrors as well
        outcome.error = f"no answer within {CONNECT_SECONDS:g} s of connecting or {SILENCE_SECONDS:g} s of silence"
    except (aiohttp.ClientError, OSError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    if outcome.error is not None:
        outcome.error = outcome.error[:MAX_REASON_CHARS]
    return outcome


async def _stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any], outcome: Outcome) -> None:
    started = time.perf_counter()
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise StreamError(f"HTTP {response.status}: {_reason(await response.content.read(MAX_ERROR_BYTES))}")
        if response.content_type != "text/event-stream":
            raise StreamError(f"the reply is {response.content_type}, not a stream of events (text/event-stream)")
        parser, num_chunks, usage, done = EventParser(), 0, None, False
        async for piece in response.content.iter_any():
            at = time.perf_counter() - started
            for data in parser.feed(piece):
                if data == b"[DONE]":
                    done = True
                    continue
                chunk = _chunk(data)
                usage = chunk.get("usage") or usage
                if _has_tokens(chunk):
                    if num_chunks == 0:
                        outcome.first = at
                    else:
                        outcome.gaps.append(at - outcome.last)
                    outcome.last = at
                    num_chunks += 1
    if not done:
        raise StreamError("the stream ended before data: [DONE]")
    if num_chunks == 0:
        raise StreamError("the stream held no token")
    usage = usage if isinstance(usage, dict) else {}
    outcome.prompt_tokens = usage.get("prompt_tokens") or outcome.prompt_tokens
    outcome.output_tokens = usage.get("completion_tokens") or num_chunks


def _chunk(data: bytes) -> dict[str, Any]:
    """A chunk of the stream. Raises StreamError, also for an error that the server put into it."""
    try:
        chunk = json.loads(data)
    except ValueError:
        raise StreamError(f"an event that is not JSON: {data[:100]!r}") from None
    if not isinstance(chunk, dict):
        raise StreamError(f"an event that is not an object: {data[:100]!r}")
    if chunk.get("error"):
        raise StreamError(f"error in the stream: {_reason(data)}")
    return chunk


def _has_tokens(chunk: dict[str, Any]) -> bool:
    """Whether a chunk stands for output. A chat's first one may hold the role alone, before any token."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta")
        if delta is None or choice.get("finish_reason"):  # a completion; or a last token without text
            return True
        if any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls")):
            return True
    return False


def _reason(body: bytes) -> str:
    """What an error's body says: OpenAI's error object, or the beginning of whatever it is, on one line."""
    try:
        error = json.loads(body)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace")
    return " ".join(str(message).split())[:MAX_REASON_CHARS] or "(no reason given)"


async def first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """The name of the first model an endpoint serves. Raises ValueError that says what to do."""
    url = f"{base_url}/v1/models"
    try:
        async with session.get(url) as response:
            body = await response.content.read(MAX_ERROR_BYTES)
            if response.status != 200:
                raise ValueError(f"{url} answers HTTP {response.status}: {_reason(body)}; name the model with --model")
            return str(json.loads(body)["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ValueError(f"cannot reach {url}: {error}; see --base-url, --host and --port") from None
    except (LookupError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{url} lists no model; name it with --model") from None
