"""Where the frontend listens, and how many may connect: sockets, TLS, the HTTP connection itself. No torch here."""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import resource
import socket
import ssl
import stat
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
BACKLOG = 2048
MAX_LINE_BYTES = 8190  # of the request line
MAX_HEADER_BYTES = 16380  # of one header; 128 of them at most
MAX_HEADERS = 128
_CONNECTION: dict[str, Any] = {
    "keepalive_timeout": KEEPALIVE_S, "access_log": None, "auto_decompress": False, "max_line_size": MAX_LINE_BYTES,
    "max_field_size": MAX_HEADER_BYTES, "max_headers": MAX_HEADERS,
}  # fmt: skip

logger = logging.getLogger("infer.frontend")


class PortTaken(ValueError):
    """Another process listens there."""


# ------------------------------------------------------------------------------------------------- listening


def listen(server: ServerConfig) -> list[socket.socket]:
    """Listening sockets as --uds, or --host and --port, say. Raises ValueError as listen_tcp and listen_unix do."""
    return [listen_unix(Path(server.uds))] if server.uds is not None else listen_tcp(server.host, server.port)


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host` (port 0: any free one, the same on all).

    Raises ValueError that names the address and what would work; PortTaken where only the port is in the way.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} is no address: {error}; 127.0.0.1 and 0.0.0.0 work everywhere") from None
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            listener = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a run before may linger
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            listener.listen(BACKLOG)
            listener.setblocking(False)
            port = listener.getsockname()[1]
    except (OSError, OverflowError) as error:
        for listener in sockets:
            listener.close()
        raise _bind_error(error, host, port) from None
    return sockets


def _bind_error(error: Exception, host: str, port: int) -> ValueError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return PortTaken(f"port {port} on {host} is taken; choose another with --port")
    if number == errno.EACCES:
        return ValueError(f"port {port} on {host} needs privileges; choose one from 1024 with --port")
    if number == errno.EADDRNOTAVAIL:
        return ValueError(f"{host} is no address of this machine; choose another with --host")
    return ValueError(f"cannot listen on {host} port {port}: {error}; choose others with --host and --port")


def listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket that only this user can connect to (mode 0600). One that nobody listens on is replaced.

    Raises ValueError that names the path; PortTaken where another process listens there.
    """
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # not chmod afterwards: nobody else may slip in between
    try:
        listener.bind(os.fspath(path))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:  # another process was faster
            raise PortTaken(f"--uds {path}: another server listens there") from None
        raise ValueError(f"--uds {path}: cannot listen there: {error}") from None
    finally:
        os.umask(before)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"--uds {path}: {error}") from None
    if not stat.S_ISSOCK(mode):
        raise ValueError(f"--uds {path}: a file that is no socket is in the way; remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"--uds {path}: a socket is there that does not answer: {error}") from None
        else:
            raise PortTaken(f"--uds {path}: another server listens there")


def remove_unix_socket(path: Path, listener: socket.socket) -> None:
    """Removes the socket's file, to be called while it still listens: whoever came after finds it in use."""
    with contextlib.suppress(OSError):
        if listener.getsockname() == os.fspath(path):
            path.unlink()


def describe(server: ServerConfig, listener: socket.socket) -> str:
    """Where clients find the server: a URL, or unix:PATH."""
    scheme = "https" if server.ssl_certfile is not None else "http"
    if server.uds is not None:
        return f"unix:{server.uds}" + (" (TLS)" if scheme == "https" else "")
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


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
