"""A real server for tests: torchrun (or one plain process), its ranks and its frontend, ended whatever happens."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from worlds import (
    MARK,
    ROOT,
    free_port,
    kill_marked,
    marked_processes,
    named_process,
    one_at_a_time,
    python_path,
    rendezvous,
)  # fmt: skip

SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"


def small(model: Path) -> tuple[object, ...]:
    """Flags for one of the small checkpoints, which goes by the name of tiny."""
    return (
        "--model", model, "--dtype", "float32", "--max-model-len", 512, "--num-gpu-blocks-override", 1024,
        "--num-threads", 1, "--served-model-name", "tiny",
    )  # fmt: skip


@dataclass
class Server:
    """A server that answers. mark: what every process of it carries in its environment."""

    process: subprocess.Popen[bytes]
    port: int
    mark: str
    log_path: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def post(self, route: str, body: object, timeout: float = 60.0) -> tuple[int, dict]:
        """(status, JSON) of a request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=2.0) as reply:
                return reply.status == 200
        except OSError:
            return False

    def pids(self, words: str) -> list[int]:
        """The server's processes whose command line holds these words."""
        found = []
        for pid in marked_processes(self.mark):
            with contextlib.suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(pid)
        return found

    def rank_pid(self, rank: int) -> int:
        """The process of one rank of the present generation."""
        return self.pid_of(f"infer-rank-{rank}")

    def pid_of(self, name: str) -> int:
        """The process of this name, as ps shows it."""
        pid = named_process(self.mark, name)
        assert pid is not None, f"{name} is not running\n{self.log}"
        return pid

    def wait_gone(self, timeout: float) -> None:
        """Waits until no process of the server is left."""
        deadline = time.monotonic() + timeout
        while left := marked_processes(self.mark):
            assert time.monotonic() < deadline, f"processes {left} are left after {timeout:g} s\n{self.log}"
            time.sleep(0.05)


@contextlib.contextmanager
def server(
    *args: object, ranks: int | None, standalone: bool = False, timeout: float = 120.0, restarts: int = 0,
    wait: bool = True, script: tuple[object, ...] = (),
) -> Iterator[Server]:  # fmt: skip
    """`-m infer.serve ARGS` on a free port, ready. ranks None: without torchrun. One world runs at a time.

    script: a file that runs in its place, with its own arguments; ARGS come after them.
    """
    mark, port = uuid.uuid4().hex, free_port()
    command = [sys.executable]
    if ranks is not None:
        command += ["-m", "torch.distributed.run", *rendezvous(standalone), "--nproc-per-node", str(ranks)]
        command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    command += [*(map(str, script) if script else ("-m", "infer.serve")), "--port", str(port), *map(str, args)]
    environ = {**os.environ, "PYTHONPATH": python_path(ROOT, ROOT / "tests"), MARK: mark}
    with tempfile.TemporaryDirectory(prefix="infer-serve-") as directory, one_at_a_time():
        log_path = Path(directory, "log")
        with open(log_path, "wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, cwd=ROOT, start_new_session=True
            )
        running = Server(process, port, mark, log_path)
        try:
            if wait:
                _wait_ready(running, timeout)
            yield running
        except BaseException:
            print(running.log)
            raise
        finally:
            kill_marked(mark)
            process.wait()


def _wait_ready(running: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not running.is_healthy():
        assert running.process.poll() is None, f"the server ended:\n{running.log}"
        assert time.monotonic() < deadline, f"not ready after {timeout:g} s:\n{running.log}"
        time.sleep(0.1)


def interrupt(running: Server, number: signal.Signals) -> None:
    """Sends a signal to the process that was started: torchrun, or the rank itself."""
    os.kill(running.process.pid, number)
