"""Real torchrun worlds for tests: started, waited for, and ended with all their processes.

result = run_world(SCRIPTS / "run_jobs.py", "jobs.json", "results.json", ranks=4, timeout=120)
assert result.returncode == 0, result.report()
"""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from world_scripts.jobs import Job, JobResult, read_results, write_json

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(__file__).resolve().parent / "world_scripts"
MARK = "INFER_TEST_WORLD"  # in the environment of every process of a world, whatever its session or parent
LOCK_SECONDS = 900.0


@dataclass
class RankLog:
    """What one rank wrote in one generation (torchrun's attempt)."""

    attempt: int
    rank: int
    stdout: str
    stderr: str


@dataclass
class Result:
    """A world that has ended. stdout, stderr: torchrun's own (or the single process's); ranks: each rank's."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    ranks: list[RankLog] = field(default_factory=list)

    @property
    def rank_stderr(self) -> str:
        """Standard error of every rank and every attempt; of the process itself without torchrun."""
        return "".join(log.stderr for log in self.ranks) if self.ranks else self.stderr

    @property
    def rank_stdout(self) -> str:
        return "".join(log.stdout for log in self.ranks) if self.ranks else self.stdout

    def report(self) -> str:
        """Everything that was written, for an assertion's message."""
        parts = [
            f"status {self.returncode} after {self.seconds:.1f} s",
            "--- stdout",
            self.stdout,
            "--- stderr",
            self.stderr,
        ]
        for log in self.ranks:
            parts += [f"--- attempt {log.attempt} rank {log.rank} stdout", log.stdout]
            parts += [f"--- attempt {log.attempt} rank {log.rank} stderr", log.stderr]
        return "\n".join(parts)


class WorldTimeout(AssertionError):
    """A world did not end in time. It has been killed."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def python_path(*directories: Path) -> str:
    """PYTHONPATH with these first, then what this process was given."""
    return os.pathsep.join([*map(str, directories), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_world(
    program: Path | str,
    *args: object,
    ranks: int,
    timeout: float,
    env: Mapping[str, str] | None = None,
    restarts: int = 0,
    standalone: bool = False,
    torchrun: bool = True,
) -> Result:
    """Runs a script (a Path) or a module (a str) on so many ranks and waits for the end.

    torchrun=False runs one rank as a plain process. One world runs at a time on this machine. Raises WorldTimeout, with
    every rank's output, after `timeout` seconds; no process of the world is left in any case.
    """
    assert torchrun or ranks == 1, "several ranks need torchrun"
    what = [str(program)] if isinstance(program, Path) else ["-m", program]
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="infer-world-") as logs, one_at_a_time():
        command = [sys.executable]
        if torchrun:
            command += ["-m", "torch.distributed.run", *rendezvous(standalone), "--nproc-per-node", str(ranks)]
            command += [
                "--max-restarts",
                str(restarts),
                "--monitor-interval",
                "0.1",
                "--log-dir",
                logs,
                "--redirects",
                "3",
            ]
        command += [*what, *map(str, args)]
        environ = {**os.environ, "PYTHONPATH": python_path(ROOT, ROOT / "tests"), MARK: mark, **(env or {})}
        started = time.monotonic()
        with open(Path(logs, "stdout"), "w+b") as out, open(Path(logs, "stderr"), "w+b") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ, cwd=ROOT, start_new_session=True
            )
            in_time = True
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                in_time = False
            finally:
                kill_marked(mark)
                returncode = process.wait()
        result = Result(
            returncode,
            Path(logs, "stdout").read_text(errors="replace"),
            Path(logs, "stderr").read_text(errors="replace"),
            time.monotonic() - started,
            _rank_logs(Path(logs)),
        )
    if not in_time:
        raise WorldTimeout(f"{' '.join(command)} did not end within {timeout:g} s\n{result.report()}")
    return result


def run_jobs(
    jobs: list[Job], directory: Path, *, ranks: int, timeout: float, torchrun: bool = True
) -> dict[str, JobResult]:
    """Runs jobs in one world that must end well; their results by name."""
    asked, answered = str(directory / "jobs.json"), str(directory / "results.json")
    write_json(asked, jobs)
    result = run_world(SCRIPTS / "run_jobs.py", asked, answered, ranks=ranks, timeout=timeout, torchrun=torchrun)
    assert result.returncode == 0, result.report()
    return read_results(answered)


def rendezvous(standalone: bool) -> list[str]:
    if standalone:
        return ["--standalone"]
    return ["--nnodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]


def _rank_logs(logs: Path) -> list[RankLog]:
    """torchrun's LOG_DIR/RUN/attempt_N/RANK/{stdout,stderr}.log, in order."""
    found = []
    for out in logs.glob("*/attempt_*/*/stdout.log"):
        attempt = int(re.sub(r"\D", "", out.parent.parent.name))
        err = out.with_name("stderr.log")
        text = err.read_text(errors="replace") if err.exists() else ""
        found.append(RankLog(attempt, int(out.parent.name), out.read_text(errors="replace"), text))
    return sorted(found, key=lambda log: (log.attempt, log.rank))


def marked_processes(mark: str) -> list[int]:
    """The live processes that have inherited this world's mark, wherever they stand in the process tree."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if wanted in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return found


def named_process(mark: str, name: str) -> int | None:
    """The marked process of that name, as ps shows it; None where there is none."""
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == f"{name}\n":
                return pid
    return None


def kill_marked(mark: str) -> None:
    """Kills what is left of a world: children may have been started between two looks, so until none is found."""
    deadline = time.monotonic() + 10.0
    while pids := marked_processes(mark):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"processes {pids} of a test's world survive SIGKILL"
        time.sleep(0.02)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Holds this user's lock on worlds: two at once on a small machine would only time out together."""
    path = Path(tempfile.gettempdir()) / f"infer-test-worlds-{os.getuid()}.lock"
    with open(path, "w") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, f"another test holds {path} for over {LOCK_SECONDS:g} s"
                time.sleep(0.1)
        yield
