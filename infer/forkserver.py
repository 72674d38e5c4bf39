"""Ranks are forked from a process that has imported torch: none imports it, neither at a start nor at a restart.

The import takes seconds of CPU time, for each rank and again each time that torchrun starts them anew; and a rank's
requests wait for it. So there are three kinds of processes on a host:

- the stand-ins, which torchrun starts and watches: Python without torch (stand_in.py);
- the fork server, one for torchrun's whole life: it imports, and then forks a rank for each stand-in that asks;
- the ranks. Each has its stand-in's arguments, environment, standard streams, directory and CPUs.

A rank gets the signals that its stand-in gets, which ends as the rank does; when the stand-in is gone, the rank is
killed. The fork server ends with torchrun; when it is gone itself, the kernel kills its ranks, their stand-ins end, and
the next start makes another. Linux only.

A stand-in's connection carries, to the fork server, one Task with three descriptors, then signals, a byte each; back
come the lines "forked" and "ended STATUS", where a negative status is a signal.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from infer import launch
from infer.claim import give_up

HEADER = struct.Struct("<I")  # bytes of the task that follows
MAX_TASK_BYTES = 16 << 20  # an environment is smaller
RETRY_SECONDS = 0.1
DYING_SECONDS = 0.005  # between looks at what was killed, where a rank waits for its memory
TASK_SECONDS = 10.0  # a stand-in that stops in the middle of its task is given up
NUM_STREAMS = 3  # standard input, output and error
# A service manager tells all processes of a service to end, this one too, while requests still finish.
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Task:
    """What a rank takes over from its stand-in. started: time.monotonic() then, which all processes of a host share."""

    argv: list[str]
    environ: dict[str, str]
    directory: str
    umask: int
    cpus: list[int]
    agent_pid: int
    started: float

    @classmethod
    def of_this_process(cls, env: launch.RankEnv, started: float) -> "Task":
        os.umask(mask := os.umask(0o077))  # there is no other way to read it
        return cls(
            argv=sys.argv, environ=dict(os.environ), directory=os.getcwd(), umask=mask,
            cpus=sorted(os.sched_getaffinity(0)), agent_pid=env.agent_pid, started=started,
        )  # fmt: skip

    def send(self, connection: socket.socket) -> None:
        data = json.dumps(asdict(self)).encode()  # what is not UTF-8 stands as escapes
        streams = [stream if _is_open(stream) else os.open(os.devnull, os.O_RDWR) for stream in range(NUM_STREAMS)]
        socket.send_fds(connection, [HEADER.pack(len(data))], streams)
        connection.sendall(data)

    @classmethod
    def receive(cls, connection: socket.socket) -> "tuple[Task, list[int]] | None":
        """The task with its streams; None where the stand-in is gone, stops in the middle, or is none."""
        streams: list[int] = []
        try:
            header, streams, _, _ = socket.recv_fds(connection, HEADER.size, NUM_STREAMS)
            (num_bytes,) = HEADER.unpack(header)
            if num_bytes > MAX_TASK_BYTES:
                raise ValueError
            task = cls(**json.loads(_receive_exactly(connection, num_bytes)))
            if len(streams) == NUM_STREAMS:
                return task, streams
        except (OSError, EOFError, struct.error, ValueError, TypeError):
            pass
        for stream in streams:
            os.close(stream)
        return None

    def take_over(self, streams: list[int]) -> launch.RankEnv:
        """Makes this process, which has just been forked, the rank."""
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(self.environ)
        sys.argv[:] = self.argv
        os.chdir(self.directory)
        os.umask(self.umask)
        os.sched_setaffinity(0, self.cpus)
        return launch.RankEnv.from_environ(agent_pid=self.agent_pid)


class ForkServer:
    """The loop of the fork server. directory: its claim, which it gives up at the end.

    A rank that is killed for a lost stand-in is gone before the others get the SIGTERM that torchrun sends for it, and
    that means the user's wish where nobody is lost; and before another takes its place, and its memory.
    """

    def __init__(self, listener: socket.socket, agent_pid: int, directory: Path, lock_fd: int) -> None:
        self._listener, self._directory, self._lock_fd = listener, directory, lock_fd
        self._ranks: dict[int, socket.socket] = {}  # pid -> its stand-in, until the process has ended
        self._dying: set[int] = set()  # of those, what was killed for a lost stand-in
        self._held: list[tuple[int, bytes]] = []  # signals to others meanwhile
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wakeup_end = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_end.setblocking(False)
        self._agent = os.pidfd_open(agent_pid)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._selector.register(self._agent, selectors.EVENT_READ)

    def run(self) -> tuple[Task, list[int]]:
        """Forks ranks until torchrun has ended, and this process then too. Returns in each rank, with its task."""
        signal.set_wakeup_fd(self._wakeup_end.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the interpreter wakes the loop up only if there is a handler
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    if self._dying:
                        time.sleep(DYING_SECONDS)
                    elif (task := self._accept()) is not None:
                        return task
                elif key.fileobj is self._wakeup:
                    self._reap()
                elif key.fileobj == self._agent:
                    self._end()
                else:
                    self._hear(key.data)

    def _accept(self) -> tuple[Task, list[int]] | None:
        """Forks. Returns the task in the rank, None here."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # no descriptor is left, say; it waits for one
            print(f"infer: no rank can be forked: {error}", file=sys.stderr)
            time.sleep(RETRY_SECONDS)
            return None
        connection.settimeout(TASK_SECONDS)
        received = Task.receive(connection) if launch.is_same_user(connection) else None
        if received is None:
            connection.close()
            return None
        own_pid = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # those to the rank wait until it has its own handlers
        try:
            pid = os.fork()
        except OSError as error:
            print(f"infer: no rank can be forked: {error}", file=sys.stderr)
            pid = -1
        if pid == 0:
            os.setsid()
            launch.die_with_parent(own_pid)
            self._leave(connection)
            return received
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
        for stream in received[1]:
            os.close(stream)
        if pid < 0:
            connection.close()
            return None
        self._ranks[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        self._tell(connection, "forked")
        return None

    def _leave(self, connection: socket.socket) -> None:
        """In a rank: it keeps nothing of the fork server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (connection, *self._ranks.values(), self._listener, self._wakeup, self._wakeup_end):
            other.close()
        self._selector.close()
        os.close(self._agent)
        os.close(self._lock_fd)

    def _hear(self, pid: int) -> None:
        """Passes signals on to a rank, or kills it: its stand-in is gone."""
        if pid not in self._ranks:  # it was reaped in this round
            return
        connection = self._ranks[pid]
        try:
            numbers = connection.recv(64)
        except OSError:
            numbers = b""
        if not numbers:
            self._selector.unregister(connection)
            self._dying.add(pid)
            self._pass_on(pid, bytes([signal.SIGKILL]))
        elif self._dying:
            self._held.append((pid, numbers))
        else:
            self._pass_on(pid, numbers)

    def _pass_on(self, pid: int, numbers: bytes) -> None:
        """Signals to a rank and its children, as torchrun sends them to a group. Not reaped, it still has its pid."""
        for number in numbers:
            try:
                os.killpg(pid, number)
            except ProcessLookupError:  # it leads no group yet
                os.kill(pid, number)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)
        while self._ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            connection = self._ranks.pop(pid)  # it has no other children
            self._dying.discard(pid)
            with contextlib.suppress(KeyError):  # its stand-in had gone
                self._selector.unregister(connection)
            self._tell(connection, f"ended {os.waitstatus_to_exitcode(status)}")
            connection.close()
        if not self._dying:
            held, self._held = self._held, []
            for pid, numbers in held:
                if pid in self._ranks:
                    self._pass_on(pid, numbers)

    def _tell(self, connection: socket.socket, line: str) -> None:
        with contextlib.suppress(OSError):  # gone; that is found out by reading
            connection.sendall(f"{line}\n".encode())

    def _end(self) -> None:
        for pid in self._ranks:
            os.kill(pid, signal.SIGKILL)
        give_up(self._directory)
        os._exit(0)


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def import_server() -> None:
    """All that ranks of the server use, also what they import late."""
    with launch.lasting_imports():
        import infer.engine.startup
        import infer.process
        import infer.serve.attachment
        import infer.serve.identity
        import infer.serve.options
        import infer.serve.server  # noqa: F401


def run_server(env: launch.RankEnv, task: Task, imported: float) -> None:
    """A rank of the server. imported: time.monotonic() then, which the first ranks have waited for."""
    from infer.serve.server import run
    from infer.serve.timeline import Timeline

    run(env, Timeline("importing" if imported > task.started else "starting Python", task.started))


def main(
    prepare: Callable[[], None] = import_server, run: Callable[[launch.RankEnv, Task, float], None] = run_server
) -> None:
    """LISTENER_FD LOCK_FD AGENT_PID DIRECTORY, as stand_in.py has it. run: what a rank does, prepare: what it needs."""
    listener_fd, lock_fd, agent_pid = map(int, sys.argv[1:4])
    for fd in (listener_fd, lock_fd):
        os.set_inheritable(fd, False)  # a program that is started here must not keep them
    before = {number: signal.getsignal(number) for number in IGNORED}
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    launch.set_process_name("infer-fork")
    directory = Path(sys.argv[4])
    try:
        server = ForkServer(socket.socket(fileno=listener_fd), agent_pid, directory, lock_fd)
    except ProcessLookupError:  # torchrun has ended meanwhile
        give_up(directory)
        return
    prepare()
    imported = time.monotonic()
    task, streams = server.run()

    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    run(task.take_over(streams), task, imported)


if __name__ == "__main__":
    main()
