"""Ranks that are forked: what they take over from their stand-ins, and who ends with whom."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT, SCRIPTS, python_path

from infer import stand_in
from infer.claim import SOCKET_NAME, agent_directory
from infer.forkserver import Task
from infer.launch import RankEnv

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks are forked on Linux only")

SECONDS = 20.0
SAY_PID = "import os; print(os.getpid(), flush=True); "
SLEEP = SAY_PID + "import time; time.sleep(60)"
COMMAND = [sys.executable, "-u", str(SCRIPTS / "standing_in.py")]
Popen = subprocess.Popen[str]


class Start:
    """Starts stand-ins whose ranks run this code; this process is their torchrun."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[Popen] = []

    def environ(self, rank: int = 0) -> dict[str, str]:
        return {
            **os.environ, "PYTHONPATH": python_path(ROOT), "TMPDIR": str(self.directory), "RANK": str(rank),
            "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234",
        }  # fmt: skip

    def __call__(self, code: str, rank: int = 0, environ: dict[str, str] = {}, **options: Any) -> Popen:  # noqa: B006
        with open(self._errors(len(self.processes)), "w") as errors:
            process = subprocess.Popen(
                [*COMMAND, code], env={**self.environ(rank), **environ}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=errors, text=True, **options,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def _errors(self, number: int) -> Path:
        return self.directory / f"{number}.log"

    def errors(self, process: Popen) -> str:
        return self._errors(self.processes.index(process)).read_text()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    start = Start(tmp_path)
    yield start
    if (server := fork_server()) is not None:
        os.kill(server, signal.SIGKILL)
    for process in start.processes:
        process.kill()
        process.communicate()


def fork_server() -> int | None:
    """The fork server that belongs to this process."""
    directory = str(agent_directory(os.getpid(), stand_in.OWNER)).encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if directory in words and (path / "comm").read_text() == "infer-fork\n":
                return int(path.name)
    return None


def first_line(process: Popen) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, "the rank has said nothing"
    return line


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + SECONDS
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_rank_has_what_its_stand_in_has(start: Start, tmp_path: Path) -> None:
    code = """if True:
        import json, os, sys, signal
        os.umask(mask := os.umask(0))
        print(json.dumps({
            "code": len(sys.argv), "directory": os.getcwd(), "umask": mask, "cpus": sorted(os.sched_getaffinity(0)),
            "own": os.environ["OWN"], "other": os.environ.get("OTHER"), "rank": env.rank, "agent": env.agent_pid,
            "leads": os.getsid(0) == os.getpid(),
            "files": sorted(map(int, os.listdir("/proc/self/fd"))),
            "handlers": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
        }))
        print("to standard error", file=sys.stderr)
        sys.exit(7)"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cpu = min(os.sched_getaffinity(0))
    start("pass", environ={"OTHER": "of another rank"}).wait(SECONDS)  # the fork server is a child of this one
    process = start(
        code, rank=3, cwd=elsewhere, umask=0o027, environ={"OWN": "\udcff odd bytes"},
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )  # fmt: skip
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 7 and start.errors(process) == "to standard error\n", start.errors(process)
    assert json.loads(out) == {
        "code": 2, "directory": str(elsewhere), "umask": 0o027, "cpus": [cpu], "own": "\udcff odd bytes", "other": None,
        "rank": 3, "agent": os.getpid(), "leads": True,
        "files": [0, 1, 2, 3],  # the last is the list itself
        "handlers": [str(handler) for handler in (signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL)],
    }  # fmt: skip


@pytest.mark.parametrize("status", [0, 1, 255, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGSEGV])
def test_a_stand_in_ends_as_its_rank_does(start: Start, status: int) -> None:
    how = f"os._exit({status})" if status >= 0 else f"os.kill(os.getpid(), {-status})"
    assert start(f"import os; {how}").wait(SECONDS) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_rank_gets_its_stand_in_s_signals(start: Start, number: signal.Signals) -> None:
    process = start(
        f"import signal, sys; signal.signal({int(number)}, lambda *_: sys.exit(40)); print('up'); signal.pause()",
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup has SIGHUP ignored
    )
    assert first_line(process) == "up"
    process.send_signal(number)
    assert process.wait(SECONDS) == 40


def test_a_signal_before_there_is_a_rank_ends_the_stand_in(start: Start, tmp_path: Path) -> None:
    process = start("print('never')", environ={"WAIT_FOR": str(tmp_path / "ready")})
    while fork_server() is None:
        time.sleep(0.005)
    process.terminate()
    assert process.wait(SECONDS) == -signal.SIGTERM
    (tmp_path / "ready").touch()
    assert start("pass").wait(SECONDS) == 0, "the fork server goes on, though a stand-in left before its turn"


def test_a_rank_is_killed_when_its_stand_in_is(start: Start) -> None:
    first, second = start(SLEEP), start(SLEEP, rank=1)
    pids = int(first_line(first)), int(first_line(second))
    first.kill()
    wait_gone(pids[0])
    assert is_running(pids[1]) and second.poll() is None
    assert start("pass").wait(SECONDS) == 0


def test_no_rank_hears_a_signal_while_another_still_dies(start: Start) -> None:
    """torchrun's SIGTERM after a stand-in was killed; a rank would take it for the user's wish if all others lived."""
    large = start(SAY_PID + "x = b'x' * 600_000_000; print('up'); import time; time.sleep(60)")
    pid = int(first_line(large))
    assert first_line(large) == "up"
    look = f"import os, signal; print('up'); signal.sigwait([signal.SIGTERM]); print(os.path.exists('/proc/{pid}'))"
    other = start(f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); {look}", rank=1)
    assert first_line(other) == "up"
    large.kill()
    large.wait()
    other.terminate()
    assert first_line(other) == "False"


def test_a_signal_that_comes_with_the_fork_is_not_lost(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start("pass").wait(SECONDS) == 0
    monkeypatch.setattr(sys, "argv", ["standing_in.py", "import time; time.sleep(60)"])
    for name, value in start.environ().items():
        monkeypatch.setenv(name, value)
    env = RankEnv.from_environ(agent_pid=os.getpid())
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(agent_directory(os.getpid(), stand_in.OWNER) / SOCKET_NAME))
            connection.settimeout(SECONDS)
            Task.of_this_process(env, time.monotonic()).send(connection)
            assert connection.recv(100) == b"forked\n"
            connection.sendall(bytes([signal.SIGTERM]))
            assert connection.recv(100) == b"ended -15\n"


def test_all_ranks_end_with_the_fork_server_and_the_next_start_makes_another(start: Start) -> None:
    processes = [start(SLEEP, rank) for rank in range(3)]
    pids = [int(first_line(process)) for process in processes]
    server = fork_server()
    assert server is not None
    os.kill(server, signal.SIGKILL)
    for rank, (process, pid) in enumerate(zip(processes, pids, strict=True)):
        assert process.wait(SECONDS) == 1
        assert start.errors(process) == f"infer: rank {rank} ends: the process that forked it is gone\n"
        wait_gone(pid)
    assert start("pass").wait(SECONDS) == 0
    assert fork_server() not in (None, server)


def test_many_that_start_at_once_have_one_fork_server(start: Start) -> None:
    processes = [start("import os; print(os.getppid(), flush=True)", rank) for rank in range(8)]
    assert {first_line(process) for process in processes} == {str(fork_server())}


def test_everything_ends_with_torchrun(start: Start) -> None:
    agent_code = (
        "import subprocess, sys, time\n"
        "rank = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)\n"
        "print(rank.stdout.readline(), end='', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", agent_code, *COMMAND, SLEEP]
    with subprocess.Popen(command, env=start.environ(), stdout=subprocess.PIPE, text=True) as agent:
        pid = int(first_line(agent))
        directory = agent_directory(agent.pid, stand_in.OWNER)
        assert directory.is_dir()
        agent.kill()
    wait_gone(pid)
    deadline = time.monotonic() + SECONDS
    while directory.exists():
        assert time.monotonic() < deadline, "the fork server has left its directory"
        time.sleep(0.01)


def test_what_is_no_task_is_turned_away(start: Start) -> None:
    """And no rank is forked for it, nor does it keep the others waiting."""
    process = start(SLEEP)
    pid = first_line(process)
    path = str(agent_directory(os.getpid(), stand_in.OWNER) / SOCKET_NAME)
    for data in (b"", b"\xff", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b"\x05\x00\x00\x00hello"):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(SECONDS)
            with contextlib.suppress(ConnectionResetError):  # it had not read everything
                assert stranger.recv(1) == b""
    assert is_running(int(pid)) and start("pass").wait(SECONDS) == 0


@pytest.mark.parametrize(("value", "under_torchrun", "expected"), [
    (None, True, True), ("1", True, True), ("0", True, False), (None, False, False),
])  # fmt: skip
def test_the_switch(monkeypatch: pytest.MonkeyPatch, value: str | None, under_torchrun: bool, expected: bool) -> None:
    monkeypatch.delenv(stand_in.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(stand_in.SWITCH, value)
    assert stand_in.stands_in(RankEnv(under_torchrun=under_torchrun)) is expected


def test_a_wrong_value_of_the_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stand_in.SWITCH, "off")
    with pytest.raises(ValueError, match="INFER_FORKSERVER='off' must be 0 or 1"):
        stand_in.stands_in(RankEnv(under_torchrun=True))


def test_what_ranks_are_forked_from_can_be() -> None:
    """Nothing of CUDA was begun, no other process either, and no thread is there but those that stop for a fork."""
    code = """if True:
        import os, sys, torch
        calls = []
        for name in ("is_available", "device_count", "init"):
            setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
        from infer.forkserver import import_server
        import_server()
        assert not calls, calls
        assert not torch.cuda.is_initialized()
        print(len(os.listdir("/proc/self/task")), "torch._inductor.async_compile" in sys.modules)
        print(open("/proc/self/task/%d/children" % os.getpid()).read().split())"""
    environ = {**os.environ, "PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1 False\n[]\n", done
