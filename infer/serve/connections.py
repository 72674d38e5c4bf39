"""How many clients may connect, and how: TLS, the HTTP connection itself. No torch here."""

import asyncio
import contextlib
import functools
import logging
import resource
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from infer.config import ServerConfig
from infer.serve.app import error_response
from infer.serve.errors import ApiError

KEEPALIVE_S = 30.0  # the longest wait for a request's headers, and for the next request of a connection
TLS_HANDSHAKE_S = 10.0
REFUSED_LINGER_S = 1.0  # a client that is turned away has so long to read why
MAX_REFUSED = 64  # turned away at the same time; others are cut off without a word
SPARE_DESCRIPTORS = 128  # beside the clients' connections: listening sockets, logs, files, those turned away
MAX_LINE_BYTES = 8190  # of the request line
MAX_HEADER_BYTES = 16380  # of one header; 128 of them at most
MAX_HEADERS = 128
_CONNECTION: dict[str, Any] = {
    "keepalive_timeout": KEEPALIVE_S, "access_log": None, "auto_decompress": False, "max_line_size": MAX_LINE_BYTES,
    "max_field_size": MAX_HEADER_BYTES, "max_headers": MAX_HEADERS,
}  # fmt: skip

logger = logging.getLogger("infer.frontend")


def tls_context(server: ServerConfig) -> ssl.SSLContext | None:
    """The server's certificate and key, read; None for plain HTTP. Raises ValueError that names flag and file."""
    if server.ssl_certfile is None:
        return None
    for flag, name in (("--ssl-certfile", server.ssl_certfile), ("--ssl-keyfile", server.ssl_keyfile)):
        try:
            if name is not None:
                Path(name).read_bytes()
        except OSError as error:
            raise ValueError(f"{flag} {name}: cannot be read: {error.strerror}") from None

    def password() -> str:
        raise ValueError(f"the key of --ssl-keyfile {server.ssl_keyfile or server.ssl_certfile} has a password")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, password)
    except ssl.SSLError as error:
        files = f"--ssl-certfile {server.ssl_certfile}"
        files += f" and --ssl-keyfile {server.ssl_keyfile}" if server.ssl_keyfile else ", which must hold the key too"
        reason = (error.reason or "neither holds what it should, in PEM form").lower().replace("_", " ")
        raise ValueError(f"cannot use {files}: {reason}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


# ------------------------------------------------------------------------------------------------- connections


def raise_descriptor_limit(max_connections: int) -> int:
    """Lets this process hold so many connections; returns how many it can hold. Says so where that is fewer."""
    wanted = max_connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    possible = max(1, soft - SPARE_DESCRIPTORS)
    logger.warning(
        "At most %d connections instead of %d (--max-connections): the system's limit of open files is %d (ulimit -n)",
        possible, max_connections, hard,
    )  # fmt: skip
    return possible


class Connections:
    """All connections of one server, and how many there may be."""

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.num_open = 0
        self.num_refused = 0  # being turned away right now

    def factory(self, server: web.Server, loop: asyncio.AbstractEventLoop) -> Callable[[], asyncio.Protocol]:
        """What asyncio calls for every new connection."""
        return functools.partial(HttpConnection, server, loop=loop, connections=self, **_CONNECTION)


class HttpConnection(web.RequestHandler):
    """aiohttp's connection, counted, and telling what is not HTTP in OpenAI's form as well."""

    __slots__ = ("_connections", "_is_counted")

    def __init__(self, *args: Any, connections: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connections = connections
        self._is_counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._connections.num_open >= self._connections.max_open:
            assert isinstance(transport, asyncio.Transport)
            refusal = Refusal(self._connections)
            transport.set_protocol(refusal)
            refusal.connection_made(transport)
            return
        self._connections.num_open += 1
        self._is_counted = True
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._is_counted:
            self._connections.num_open -= 1
            self._is_counted = False
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the reply has begun; it cannot become an error")
        if status >= 500:
            logger.error("Failed to handle a request", exc_info=exc)
            error = ApiError(status, "internal error; the server's log has the details", type="server_error")
        else:
            error = _malformed(exc, message)
        response = error_response(error)
        response.force_close()
        return response


def _malformed(error: BaseException | None, message: str | None) -> ApiError:
    """What is not an HTTP request, or too large a one."""
    if isinstance(error, LineTooLong):
        if error.args[1:2] == (MAX_LINE_BYTES,):
            return ApiError(414, f"the request line is over {MAX_LINE_BYTES} bytes", code="uri_too_long")
        return ApiError(431, f"a header is over {MAX_HEADER_BYTES} bytes", code="headers_too_large")
    lines = (message or "").strip().splitlines()
    if lines and lines[0] == "Too many headers received":
        return ApiError(431, f"the request has more than {MAX_HEADERS} headers", code="headers_too_large")
    return ApiError(400, f"not a valid HTTP request: {lines[0][:200] if lines else 'malformed'}")


class Refusal(asyncio.Protocol):
    """A connection over the limit: it is told so, and closed soon whatever it sends."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._connections.num_refused += 1
        if self._connections.num_refused > MAX_REFUSED:
            transport.abort()
            return
        # Closing at once, with the request unread, would make the client's kernel drop this reply.
        self._timer = asyncio.get_running_loop().call_later(REFUSED_LINGER_S, transport.abort)
        transport.write(_refusal(self._connections.max_open))
        if transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has gone already
                transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.num_refused -= 1
        if self._timer is not None:
            self._timer.cancel()


def _refusal(max_open: int) -> bytes:
    error = ApiError(
        503, f"the server has its {max_open} connections open (--max-connections); try again soon",
        type="service_unavailable", code="too_many_connections",
    )  # fmt: skip
    body = msgspec.json.encode(error.body())
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
