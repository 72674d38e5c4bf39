"""The frontend process: the HTTP endpoint, and the socket the engine connects to. No torch here.

    python -m infer.serve.frontend --host 127.0.0.1 --port 8000 --socket DIR/engine.sock ...

Rank 0 starts it (link.start_frontend). It ends when its engine does, or by SIGTERM or SIGINT; open streams get an error
event first.
"""

import argparse
import asyncio
import contextlib
import errno
import functools
import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from infer.serve.api import Api
from infer.serve.app import ServerRoutes, error_response, make_app
from infer.serve.client import EngineClient
from infer.serve.errors import ApiError
from infer.serve.link import Ready, remove_socket
from infer.serve.text import Tokenizer

KEEPALIVE_S = 30.0  # also the longest wait for a request's headers
DRAIN_S = 3.0  # for open replies to get their error event out
PORT_POLL_S = 0.1
BACKLOG = 2048
_CONNECTION: dict[str, Any] = {"keepalive_timeout": KEEPALIVE_S, "access_log": None, "auto_decompress": False}

logger = logging.getLogger("infer.frontend")


class JsonErrors(web.RequestHandler):
    """aiohttp's connection, telling what is not HTTP in OpenAI's form as well."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the reply has begun; it cannot become an error")
        if status >= 500:
            logger.error("Failed to handle a request", exc_info=exc)
            error = ApiError(status, "internal error; the server's log has the details", type="server_error")
        else:
            lines = (message or "").strip().splitlines()
            error = ApiError(status, f"not a valid HTTP request: {lines[0][:200] if lines else 'malformed'}")
        response = error_response(error)
        response.force_close()
        return response


class PortTaken(ValueError):
    """Another process listens there."""


def listen(host: str, port: int) -> list[socket.socket]:
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


class Frontend:
    """The process: its listening sockets, its engine, and how it ends."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._socket_path = Path(args.socket)
        self._ending = asyncio.Event()
        self._reason = ""
        self._status = 0
        self._client = EngineClient(args.served_model_name)

    async def run(self) -> int:
        """Serves until the engine ends or a signal comes; returns the exit status. Raises ValueError at the start."""
        try:
            api, runner, servers, engine_server = await self._start()
        except OSError as error:
            raise ValueError(f"the frontend cannot start: {error}") from None
        address = servers[0].sockets[0].getsockname()
        report(self._args, Ready(port=address[1]))
        announcing = asyncio.create_task(self._announce(*address[:2]))
        lost = asyncio.create_task(self._client.lost.wait())
        lost.add_done_callback(lambda _: self._end(self._client.lost_reason, 1))
        await self._ending.wait()
        if self._status:
            logger.error("Ending: %s", self._reason)
        else:
            logger.info("Ending: %s", self._reason)
        for task in (announcing, lost):
            task.cancel()
        for server in servers:
            server.close()
        self._client.fail_all(self._reason)
        engine_server.close()
        await self._client.disconnect(self._reason)
        await self._drain(runner, api)
        return self._status

    async def _start(self) -> tuple[Api, web.AppRunner, list[asyncio.Server], asyncio.Server]:
        """The HTTP servers, one an address, and the engine's. Raises ValueError or OSError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, f"the server was told to end ({number.name})", 0)
        self._watch_engine(loop)
        sockets = await self._listen()
        # From here on a client may connect, and gets its answer once the process is ready.
        tokenizer = Tokenizer.load(self._args.tokenizer_path)
        engine_server = await asyncio.start_unix_server(self._client.serve, path=self._socket_path, limit=1 << 20)
        api = Api(self._client, tokenizer, self._args.max_logprobs)
        app = make_app(api, ServerRoutes(self._client, self._args.model_path))
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        web_server = runner.server
        assert web_server is not None  # since setup()
        connection = functools.partial(JsonErrors, web_server, loop=loop, **_CONNECTION)
        servers = [await loop.create_server(connection, sock=listener) for listener in sockets]
        return api, runner, servers, engine_server

    async def _listen(self) -> list[socket.socket]:
        """Listening sockets. A port that is taken may become free within --port-wait: after a restart, the frontend of
        the ranks before is about to end. Raises ValueError.
        """
        deadline = time.monotonic() + self._args.port_wait
        while True:
            try:
                return listen(self._args.host, self._args.port)
            except PortTaken:
                if self._ending.is_set() or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(PORT_POLL_S)

    def _end(self, reason: str, status: int) -> None:
        """The first reason counts."""
        if not self._ending.is_set():
            self._reason, self._status = reason, status
            self._ending.set()

    def _watch_engine(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends this process when the engine's does, connected or not."""
        pid = self._args.engine_pid
        gone = f"the engine's process ({pid}) has ended"
        if not hasattr(os, "pidfd_open"):  # not Linux: the parent's id changes when the parent ends
            self._poll_parent(loop, os.getppid(), gone)
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ValueError(gone) from None
        loop.add_reader(fd, self._engine_died, loop, fd, gone)

    def _poll_parent(self, loop: asyncio.AbstractEventLoop, parent: int, gone: str) -> None:
        if os.getppid() != parent:
            self._end(gone, 1)
        else:
            loop.call_later(1.0, self._poll_parent, loop, parent, gone)

    def _engine_died(self, loop: asyncio.AbstractEventLoop, fd: int, gone: str) -> None:
        loop.remove_reader(fd)
        os.close(fd)
        # Its socket ends at the same time, and what still waits there may hold last outputs and a better reason.
        loop.call_later(0.5, self._end, gone, 1)

    async def _announce(self, host: str, port: int) -> None:
        """One line when requests can come."""
        await self._client.connected.wait()
        shown = f"[{host}]" if ":" in host else host
        logger.info("Serving %s on http://%s:%d", self._client.model_name, shown, port)

    async def _drain(self, runner: web.AppRunner, api: Api) -> None:
        """Lets the handlers tell their clients, then closes every connection."""
        assert runner.server is not None
        try:
            async with asyncio.timeout(DRAIN_S):
                while api.num_open:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            logger.warning("%d replies could not be ended in time", api.num_open)
        await runner.server.shutdown(0.5)
        await runner.cleanup()


def report(args: argparse.Namespace, ready: Ready) -> None:
    """Tells the parent, once, that the frontend is ready or cannot start."""
    if args.report_fd is None:
        return
    fd, args.report_fd = args.report_fd, None
    with contextlib.suppress(BrokenPipeError):  # the parent has gone; the watch on its process ends this one
        os.write(fd, msgspec.json.encode(ready) + b"\n")
    os.close(fd)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infer.serve.frontend", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", required=True, help="address to listen on")
    parser.add_argument("--port", required=True, type=int, help="port to listen on (0: any free one)")
    parser.add_argument("--socket", required=True, help="Unix socket for the engine, in a directory made for it alone")
    parser.add_argument("--model-path", required=True, help="the model's directory, told by /v1/models")
    parser.add_argument("--tokenizer-path", required=True, help="directory with tokenizer.json")
    parser.add_argument("--served-model-name", required=True, help="name clients use")
    parser.add_argument("--max-logprobs", required=True, type=int, help="largest logprobs a request may ask for")
    parser.add_argument("--port-wait", type=float, default=0.0, help="seconds to wait for a port that is taken")
    parser.add_argument("--engine-pid", required=True, type=int, help="process to end with")
    parser.add_argument("--report-fd", type=int, help="pipe for one line: ready, or why not")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(asctime)s [%(name)s] %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # what it calls errors are clients' malformed requests
    # The default thresholds make one large body of many small values four times slower, with every thread waiting.
    gc.set_threshold(50_000, 20, 50)
    os.umask(0o077)  # the socket is for this user alone
    try:
        return asyncio.run(_run(args))
    except ValueError as error:
        if args.report_fd is None:
            print(f"infer: error: {error}", file=sys.stderr)
        report(args, Ready(error=str(error)))
        return 2
    finally:
        remove_socket(Path(args.socket))


async def _run(args: argparse.Namespace) -> int:
    return await Frontend(args).run()


if __name__ == "__main__":
    sys.exit(main())
