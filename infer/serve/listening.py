"""Where the server listens: TCP and Unix sockets. No torch here, nor aiohttp: rank 0 does it for the frontend."""

import contextlib
import errno
import os
import socket
import stat
import time
from pathlib import Path

from infer.config import ServerConfig

BACKLOG = 2048
POLL_SECONDS = 0.1


class PortTaken(ValueError):
    """Another process listens there."""


def listen(server: ServerConfig, patience_s: float = 0.0) -> list[socket.socket]:
    """Listening sockets as --uds, or --host and --port, say. Raises ValueError as listen_tcp and listen_unix do.

    A port that is taken may become free within patience_s: after a restart, the frontend before is about to end.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return [listen_unix(Path(server.uds))] if server.uds is not None else listen_tcp(server.host, server.port)
        except PortTaken:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


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
    reason = str(error).rstrip(".")
    return ValueError(f"cannot listen on {host} port {port}: {reason}; choose others with --host and --port")


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
