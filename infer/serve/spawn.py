"""Starting the frontend process, and how its parent sees it. No torch here."""

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec

from infer.claim import MAX_SOCKET_PATH_BYTES, SOCKET_NAME, give_up
from infer.config import ServerConfig
from infer.launch import child_environment
from infer.serve.link import FrontendConfig
from infer.serve.listening import listen

DIRECTORY_PREFIX = "infer-"
SECRET_VARIABLES = ("INFER_API_KEY", "HF_TOKEN")  # the frontend gets its keys with its configuration


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
        """Waits, once, until it has read the tokenizer and answers.

        Raises ValueError with its one-line reason when it cannot start, and has ended it then: tokenizer missing or
        corrupt, no certificate.
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

    def stop(self, timeout: float = 10.0, *, ask: bool = True) -> int:
        """Asks it to end, kills it after `timeout` seconds, and returns its exit status. May be called twice.

        ask: False where it is ending already. One that nobody has waited for has no clients yet, and nothing to say: it
        is killed at once.
        """
        if self._process.poll() is None and (ask or not self._was_ready):
            self._process.send_signal(signal.SIGTERM if self._was_ready else signal.SIGKILL)
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._report.close()
        remove_socket(self.socket_path)  # the process does this itself unless it was killed
        return status


def start_frontend(server: ServerConfig, model_path: Path, tokenizer_path: Path, served_name: str) -> FrontendHandle:
    """Starts the frontend and waits until it is ready. Raises ValueError as spawn_frontend and wait_ready do."""
    names = server.served_model_name or (served_name,)
    shared = {**vars(server), "served_model_name": names}
    handle = spawn_frontend(FrontendConfig(**shared, model_path=str(model_path), tokenizer_path=str(tokenizer_path)))
    handle.wait_ready()
    return handle


def spawn_frontend(config: FrontendConfig, directory: Path | None = None, lock_fd: int | None = None) -> FrontendHandle:
    """Starts the frontend in a session of its own; `wait_ready` says how that went.

    It listens at once; clients that connect get their answer when it is ready. Its socket, this process's id and the
    pipe it reports on are filled in here. The frontend ends by itself when the calling process does, or that of
    config.agent_pid. directory and lock_fd: the agent's, as claim.claim() gave it; the lock goes over to the frontend.
    Raises ValueError where it cannot listen, or no process can be started.
    """
    socket_path = (directory or _private_directory()) / SOCKET_NAME
    with contextlib.ExitStack() as ours:  # what only the frontend keeps
        if lock_fd is not None:
            ours.callback(os.close, lock_fd)
        try:
            listeners = [ours.enter_context(listener) for listener in listen(config, config.port_wait_s)]
            report, report_for_child = os.pipe()
            ours.callback(os.close, report_for_child)
            config = dataclasses.replace(
                config, socket_path=str(socket_path), engine_pid=os.getpid(), report_fd=report_for_child,
                lock_fd=lock_fd, listener_fds=tuple(listener.fileno() for listener in listeners),
            )  # fmt: skip
            process = _start_process(config, report)
        except ValueError:
            if directory is not None:
                give_up(directory)
            remove_socket(socket_path)
            raise
    _tell_config(process, config)
    return FrontendHandle(process, socket_path, config.port, report)


def _start_process(config: FrontendConfig, report: int) -> subprocess.Popen[bytes]:
    """Raises ValueError, and closes our end of the report, where that is impossible."""
    fds = [fd for fd in (config.report_fd, config.lock_fd, *config.listener_fds) if fd is not None]
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "infer.serve.frontend"], stdin=subprocess.PIPE, start_new_session=True,
            close_fds=True, pass_fds=fds, env=child_environment(SECRET_VARIABLES),
        )  # fmt: skip
    except OSError as error:
        os.close(report)
        raise ValueError(f"cannot start the frontend process: {error}") from None


def _tell_config(process: subprocess.Popen[bytes], config: FrontendConfig) -> None:
    """Writes the configuration to the new process, in a thread: it may be more than a pipe holds before it is read."""
    pipe = process.stdin
    assert pipe is not None
    data = msgspec.json.encode(config)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), pipe:  # the process has ended; its report says why
            pipe.write(data)

    threading.Thread(target=write, name="frontend-config", daemon=True).start()


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
