"""The frontend process: the HTTP endpoint, and the socket the engine connects to. No torch here.

    python -m infer.serve.frontend < CONFIG     # a FrontendConfig as JSON: keys never stand in a command line

Rank 0 starts it (spawn.py). Under torchrun it outlives rank 0, keeps its clients, and hands their requests to the next
rank 0; it ends with torchrun. Without torchrun it ends when its engine does. What is open gets an error then. Where it
is told to end, by a signal or by rank 0, which had one, it first lets the requests under way finish.
"""

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec
from aiohttp import web

from infer.claim import give_up
from infer.launch import is_alive, process_key
from infer.serve.api import Api
from infer.serve.app import ServerRoutes, make_app
from infer.serve.client import EngineClient
from infer.serve.connections import TLS_HANDSHAKE_S, Connections, raise_descriptor_limit, tls_context
from infer.serve.link import FrontendConfig
from infer.serve.listening import describe, remove_unix_socket
from infer.serve.loop_lag import LoopLag
from infer.serve.metrics import Metrics
from infer.serve.spawn import Ready, remove_socket
from infer.serve.text import Tokenizer
from infer.signals import Order, Orders, stop_signals

ERRORS_S = 3.0  # for open replies to get their error event out
STOP_POLL_S = 0.02

logger = logging.getLogger("infer.frontend")


class Frontend:
    """The process: its listening sockets, its engine, and how it ends."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self._ending = asyncio.Event()
        self._reason = ""
        self._status = 0
        self._metrics = Metrics(config.model_names[0], config.metrics_prefix)
        self._client = EngineClient(
            *config.model_names, max_queued=config.max_num_queued_reqs, metrics=self._metrics,
            identity=config.identity, restart_deadline=config.restart_deadline if config.agent_pid else None,
        )  # fmt: skip
        self._client.when_stopped = self._stop
        self._orders = Orders()
        self._stop_at = math.inf  # when requests under way are cut off, once the server is told to end
        self._stopping: asyncio.Task[None] | None = None
        self._api: Api | None = None
        self._lag = LoopLag()
        self._sockets: list[socket.socket] = []

    async def run(self) -> int:
        """Serves until the engine ends or a signal comes; returns the exit status. Raises ValueError at the start."""
        try:
            self._api, runner, servers, engine_server = await self._start()
        except OSError as error:
            raise ValueError(f"the frontend cannot start: {error}") from None
        report(self._config, Ready(port=0 if self._config.uds else self._sockets[0].getsockname()[1]))
        announcing = asyncio.create_task(self._announce(describe(self._config, self._sockets[0])))
        lost = asyncio.create_task(self._client.lost.wait())
        lost.add_done_callback(lambda _: self._end(self._client.lost_reason, 1))
        await self._ending.wait()
        if self._status:
            logger.error("Ending: %s", self._reason)
        else:
            logger.info("Ending: %s", self._reason)
        for task in (announcing, lost):
            task.cancel()
        self._lag.stop()
        self._stop_listening(servers)
        self._client.fail_all(self._reason)
        engine_server.close()
        await self._client.disconnect(self._reason)
        await self._close(runner, self._api)
        return self._status

    def _stop_listening(self, servers: list[asyncio.Server]) -> None:
        if self._config.uds is not None:
            remove_unix_socket(Path(self._config.uds), self._sockets[0])
        for server in servers:
            server.close()

    async def _start(self) -> tuple[Api, web.AppRunner, list[asyncio.Server], asyncio.Server]:
        """The HTTP servers, one an address, and the engine's. Raises ValueError or OSError."""
        loop, config = asyncio.get_running_loop(), self._config
        for number in stop_signals():
            loop.add_signal_handler(number, self._take_signal, number)
        self._watch_parent(loop)
        tls = tls_context(config)
        connections = Connections(raise_descriptor_limit(config.max_connections))
        self._sockets = [socket.socket(fileno=fd) for fd in config.listener_fds]
        tokenizer = Tokenizer.load(config.tokenizer_path, chat_template=config.chat_template)
        engine_server = await asyncio.start_unix_server(self._client.serve, path=config.socket_path, limit=1 << 20)
        api = Api(self._client, tokenizer, config)
        self._client.await_engine()
        app = make_app(api, ServerRoutes(self._client, config, self._metrics), config, self._metrics)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        web_server = runner.server
        assert web_server is not None  # since setup()
        handshake = None if tls is None else TLS_HANDSHAKE_S
        servers = [
            await loop.create_server(
                connections.factory(web_server, loop), sock=listener, ssl=tls, ssl_handshake_timeout=handshake
            )
            for listener in self._sockets
        ]
        self._lag.start()
        self._metrics.watch_loop(self._lag)
        return api, runner, servers, engine_server

    def _take_signal(self, number: signal.Signals) -> None:
        order = self._orders.take(number)
        if order:
            timeout_s = self._config.shutdown_timeout if order is Order.STOP else 0.0
            self._stop(f"the server was told to end ({number.name})", timeout_s)

    def _stop(self, reason: str, timeout_s: float) -> None:
        """Refuses new requests from now on, and ends once those under way are done, in timeout_s seconds at the latest.
        Called again, it may shorten the time."""
        self._stop_at = min(self._stop_at, time.monotonic() + timeout_s)
        if self._stopping is None:
            self._client.stop_reason = reason
            num_open = 0 if self._api is None else self._api.num_open
            logger.info("%s; %d requests have %g s to finish", reason, num_open, timeout_s)
            self._stopping = asyncio.create_task(self._let_finish(reason))

    async def _let_finish(self, reason: str) -> None:
        begun = time.monotonic()
        while (num_open := self._api.num_open if self._api is not None else 0) and time.monotonic() < self._stop_at:
            await asyncio.sleep(STOP_POLL_S)
        if num_open:
            seconds = time.monotonic() - begun
            logger.warning("%d requests were not done within %.1f s; they are cut off", num_open, seconds)
            in_full = seconds >= self._config.shutdown_timeout
            limit = "--shutdown-timeout" if in_full else "then the server was told to end at once"
            reason += f", and this request was not done within {seconds:.1f} s ({limit})"
        self._end(reason, 0)

    def _end(self, reason: str, status: int) -> None:
        """The first reason counts."""
        if not self._ending.is_set():
            self._reason, self._status = reason, status
            self._ending.set()

    def _watch_parent(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends this process when torchrun does, or without it when the engine's process does, connected or not."""
        pid = self._config.agent_pid or self._config.engine_pid
        gone = f"torchrun ({pid}) has ended" if self._config.agent_pid else f"the engine's process ({pid}) has ended"
        key = process_key(pid)
        if not hasattr(os, "pidfd_open"):  # not Linux
            parent = 0 if self._config.agent_pid else os.getppid()
            self._poll_parent(loop, parent, key, gone)
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ValueError(gone) from None
        loop.add_reader(fd, self._parent_died, loop, fd, gone)

    def _poll_parent(self, loop: asyncio.AbstractEventLoop, parent: int, key: str, gone: str) -> None:
        """parent: this process's own, whose end changes that at once; 0 where another process is watched, by key."""
        if os.getppid() != parent if parent else not is_alive(key):
            self._end(gone, 1)
        else:
            loop.call_later(1.0, self._poll_parent, loop, parent, key, gone)

    def _parent_died(self, loop: asyncio.AbstractEventLoop, fd: int, gone: str) -> None:
        loop.remove_reader(fd)
        os.close(fd)
        # The engine's socket ends at the same time; what still waits there may hold last outputs and a better reason.
        loop.call_later(0.5 if self._client.has_engine else 0.0, self._end, gone, 1)

    async def _announce(self, where: str) -> None:
        """One line when requests can come."""
        await self._client.connected.wait()
        logger.info("Serving %s on %s", ", ".join(self._client.model_names), where)

    async def _close(self, runner: web.AppRunner, api: Api) -> None:
        """Lets the handlers tell their clients, then closes every connection."""
        assert runner.server is not None
        try:
            async with asyncio.timeout(ERRORS_S):
                while api.num_open or api.num_taking_in:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            logger.warning("%d replies could not be ended in time", api.num_open)
        await runner.server.shutdown(0.5)
        await runner.cleanup()


def report(config: FrontendConfig, ready: Ready) -> None:
    """Tells the parent, once, that the frontend is ready or cannot start."""
    if config.report_fd is None:
        return
    with contextlib.suppress(BrokenPipeError):  # the parent has gone; the watch on its process ends this one
        os.write(config.report_fd, msgspec.json.encode(ready) + b"\n")
    os.close(config.report_fd)


def read_config() -> FrontendConfig:
    """The configuration that the parent writes on standard input, whole. Raises ValueError."""
    try:
        return msgspec.json.decode(sys.stdin.buffer.read(), type=FrontendConfig)
    except msgspec.DecodeError as error:
        raise ValueError(f"standard input holds no configuration of a frontend: {error}") from None


def main() -> int:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(asctime)s [%(name)s] %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # what it calls errors are clients' malformed requests
    # The default thresholds make one large body of many small values four times slower, with every thread waiting.
    gc.set_threshold(50_000, 20, 50)
    os.umask(0o077)  # the socket is for this user alone
    try:
        config = read_config()
    except ValueError as error:
        print(f"infer: error: {error}", file=sys.stderr)
        return 2
    return serve(config)


def serve(config: FrontendConfig) -> int:
    """Runs the frontend to its end; returns the exit status. What is wrong at the start goes to the parent."""
    for fd in (config.lock_fd, *config.listener_fds):
        if fd is not None:
            os.set_inheritable(fd, False)  # a child of this process must not keep the lock, nor the port
    try:
        return asyncio.run(_run(config))
    except ValueError as error:
        if config.report_fd is None:
            print(f"infer: error: {error}", file=sys.stderr)
        report(config, Ready(error=str(error)))
        return 2
    finally:
        if config.lock_fd is not None:
            give_up(Path(config.socket_path).parent)
        else:
            remove_socket(Path(config.socket_path))


async def _run(config: FrontendConfig) -> int:
    return await Frontend(config).run()


if __name__ == "__main__":
    sys.exit(main())
