"""The process that torchrun starts in a rank's place: it has a rank forked, and passes on what that needs to know.

No torch here; forkserver.py tells how they work together.
"""

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from infer import launch
from infer.claim import SOCKET_NAME, agent_directory, claim
from infer.forkserver import Task
from infer.signals import stop_signals

OWNER = "forkserver"
PROGRAM = ("-m", "infer.forkserver")
SWITCH = "INFER_FORKSERVER"  # 0: torchrun's processes are the ranks themselves
POLL_SECONDS = 0.02
REACH_SECONDS = 30.0  # for another rank of this host to start the fork server: a matter of milliseconds


def stands_in(env: launch.RankEnv) -> bool:
    """Whether this process is to have its rank forked. Raises ValueError for a wrong value of the switch."""
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"environment variable {SWITCH}={wanted!r} must be 0 or 1")
    return wanted == "1" and env.under_torchrun and sys.platform.startswith("linux") and hasattr(os, "pidfd_open")


def run_rank(env: launch.RankEnv) -> NoReturn:
    """Has this rank forked, and ends as it does."""
    started = time.monotonic()
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    for number in (*stop_signals(), signal.SIGQUIT):
        signal.signal(number, lambda *_: None)  # the interpreter writes to the pipe only for those with a handler
    connection = _reach(env)
    try:
        Task.of_this_process(env, started).send(connection)
    except OSError as error:
        launch.end(f"its fork server does not take it: {error}", env)
    is_forked, text = False, b""
    while True:
        ready, _, _ = select.select([connection.fileno(), told], [], [])
        if connection.fileno() in ready:
            data = _receive(connection)
            if not data:
                launch.end("the process that forked it is gone", env)
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                is_forked = True
                if line.startswith(b"ended"):
                    _end_like(int(line.split()[1]))
        elif told in ready:
            numbers = os.read(told, 64)
            if not is_forked:
                _end_like(-numbers[0])
            with contextlib.suppress(OSError):  # the next reading tells
                connection.sendall(numbers)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:
        return b""


def _reach(env: launch.RankEnv) -> socket.socket:
    """A connection to this host's fork server, which is started if there is none."""
    deadline = time.monotonic() + REACH_SECONDS
    try:
        directory = agent_directory(env.agent_pid, OWNER)
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(directory / SOCKET_NAME))
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
            if (lock_fd := claim(directory)) is not None:
                _start(directory, lock_fd, env)
            elif time.monotonic() > deadline:
                launch.end(f"{directory} is locked, but nobody answers there; end what holds its lock", env)
            else:
                time.sleep(POLL_SECONDS)
    except OSError as error:
        raise ValueError(f"no fork server: {error}; set TMPDIR to a directory that takes sockets") from None


def _start(directory: Path, lock_fd: int, env: launch.RankEnv) -> None:
    """Starts the fork server in a session of its own. Connections wait until it has imported. -u: as torchrun does."""
    path = directory / SOCKET_NAME
    path.unlink(missing_ok=True)  # of one that was killed
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1024)
            fds = (listener.fileno(), lock_fd)
            try:
                subprocess.Popen(
                    [sys.executable, "-u", *PROGRAM, *map(str, (*fds, env.agent_pid, directory))],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=fds,
                    env=launch.child_environment(),
                )  # fmt: skip
            except OSError as error:  # no memory or no process left, say: another time there may be
                launch.end(f"its fork server cannot be started: {error}", env)
    finally:
        os.close(lock_fd)


def _end_like(status: int) -> NoReturn:
    """Ends this process as its rank ended: with this exit status, or by that signal, without another core file."""
    if status >= 0:
        os._exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    os._exit(128 - status)  # a signal that does not end a process
