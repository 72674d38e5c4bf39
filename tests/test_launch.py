"""Who a rank is, and how it ends on a user's error: told once, at once, with the same status everywhere."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from infer import launch
from infer.launch import RankEnv

ROOT = Path(__file__).parent.parent
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "4",
}


@pytest.fixture
def private_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def run(code, tmp_path, **environ):
    """A Python process whose parent, this one, stands for torchrun's agent."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), **environ}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_alone_without_torchrun():
    assert RankEnv.from_environ({}) == RankEnv(
        rank=0, world_size=1, local_rank=0, local_world_size=1, restart_count=0, agent_pid=0, under_torchrun=False
    )


def test_torchrun_variables():
    env = RankEnv.from_environ(TORCHRUN)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 8, 1, 2)
    assert (env.master_addr, env.master_port, env.restart_count) == ("10.0.0.1", 29500, 4)
    assert env.under_torchrun and env.agent_pid == os.getppid()


def test_variables_without_torchrun():
    env = RankEnv.from_environ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"})
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (1, 2, 1, 2)
    assert not env.under_torchrun and env.agent_pid == 0


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("RANK", "three", "RANK='three' is not an integer from 0 to 7"),
        ("RANK", "8", "RANK='8' is not an integer from 0 to 7"),
        ("RANK", "-1", "RANK='-1'"),
        ("RANK", None, "no RANK"),
        ("WORLD_SIZE", "0", "WORLD_SIZE='0' is not an integer of at least 1"),
        ("WORLD_SIZE", None, "no WORLD_SIZE"),
        ("LOCAL_WORLD_SIZE", "9", "LOCAL_WORLD_SIZE='9' is not an integer from 1 to 8"),
        ("LOCAL_RANK", "2", "LOCAL_RANK='2' is not an integer from 0 to 1"),
        ("LOCAL_RANK", "", "LOCAL_RANK=''"),
        ("MASTER_PORT", "65536", "MASTER_PORT='65536'"),
        ("MASTER_PORT", None, "no MASTER_PORT"),
        ("MASTER_ADDR", None, "no MASTER_ADDR"),
        ("TORCHELASTIC_RESTART_COUNT", "1.5", "TORCHELASTIC_RESTART_COUNT='1.5'"),
    ],
)
def test_malformed_variables_are_named(name, value, told):
    environ = {key: text for key, text in {**TORCHRUN, name: value}.items() if text is not None}
    with pytest.raises(ValueError) as error:
        RankEnv.from_environ(environ)
    assert told in str(error.value)


def test_no_torch_is_imported(tmp_path):
    code = "import sys, infer, infer.launch, infer.hub; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert run(code, tmp_path).returncode == 0


FAIL = """
from infer.launch import RankEnv, exit_if_failed_before, fail
env = RankEnv.from_environ()
{before}
print("got here")
fail("--port 80 is\\n  taken", env, {code})
"""


def test_without_torchrun_every_error_is_told(tmp_path):
    for _ in range(2):
        result = run(FAIL.format(before="exit_if_failed_before(env)", code=3), tmp_path)
        assert (result.returncode, result.stdout) == (3, "got here\n")
        assert result.stderr == "infer: error: --port 80 is taken\n"
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_an_error_is_told_once(tmp_path):
    first = run(FAIL.format(before="", code=3), tmp_path, **TORCHRUN)
    assert (first.returncode, first.stdout, first.stderr) == (3, "got here\n", "infer: error: --port 80 is taken\n")
    peer = run(FAIL.format(before="", code=3), tmp_path, **TORCHRUN)
    assert (peer.returncode, peer.stdout, peer.stderr) == (3, "got here\n", "")
    later = run(FAIL.format(before="exit_if_failed_before(env)", code=1), tmp_path, **TORCHRUN)
    assert (later.returncode, later.stdout, later.stderr) == (3, "", "")
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in directory.iterdir()] == [f"failed-{launch.process_key(os.getpid())}"]


def test_of_many_ranks_one_tells(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), **TORCHRUN}
    command = [sys.executable, "-c", FAIL.format(before="", code=2)]
    ranks = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    told = "".join(rank.communicate(timeout=60)[1] for rank in ranks)
    assert told == "infer: error: --port 80 is taken\n"
    assert [rank.returncode for rank in ranks] == [2] * 6


def test_an_unwritable_place_for_the_marker_hides_no_error(tmp_path):
    (tmp_path / f"infer-{os.getuid()}").write_text("a file where the directory should be")
    for _ in range(2):
        result = run(FAIL.format(before="exit_if_failed_before(env)", code=2), tmp_path, **TORCHRUN)
        assert (result.returncode, result.stderr) == (2, "infer: error: --port 80 is taken\n")


def test_markers_of_dead_agents_are_swept(private_tmp):
    directory = launch.private_directory()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = [f"failed-{dead.pid}-1234", f"failed-{os.getpid()}-1"]  # the second: a pid used again
    kept = [f"failed-{launch.process_key(os.getpid())}", "download-1.lock", "failed-not-ours"]
    for name in stale + kept:
        (directory / name).write_text("2")
    launch._sweep(directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted(kept)


def test_private_directory_of_somebody_else_is_refused(private_tmp):
    path = launch.private_directory()
    assert launch.private_directory() == path
    path.chmod(0o755)
    with pytest.raises(PermissionError, match="only this user"):
        launch.private_directory()
    path.rmdir()
    path.symlink_to(private_tmp)
    with pytest.raises(PermissionError, match="only this user"):
        launch.private_directory()


def test_process_key_of_a_strange_name(tmp_path):
    """The command in /proc/PID/stat may hold blanks and parentheses."""
    sleeper = tmp_path / "a ) b ("
    sleeper.symlink_to("/bin/sleep")
    with subprocess.Popen([str(sleeper), "60"]) as process:
        try:
            key = launch.process_key(process.pid)
            assert key == launch.process_key(process.pid) and launch.is_alive(key)
            assert not key.endswith("-0") or not sys.platform.startswith("linux")
        finally:
            process.kill()
    assert not launch.is_alive(key)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_rank_dies_with_its_agent(tmp_path):
    rank = (
        "import os, time; from infer.launch import RankEnv, set_parent_death_signal;"
        "set_parent_death_signal(RankEnv.from_environ()); print(os.getpid(), flush=True); time.sleep(60)"
    )
    agent_code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **TORCHRUN}
    with subprocess.Popen([sys.executable, "-c", agent_code], env=environment, stdout=subprocess.PIPE) as agent:
        pid = int(agent.stdout.readline())
        key = launch.process_key(pid)
        agent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while launch.is_alive(key) and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the rank outlived its agent"
        time.sleep(0.02)


def test_torchrun_does_not_repeat_an_error(tmp_path):
    """Two ranks, five restarts allowed: one line, and the restarted ranks never get past the marker."""
    script = tmp_path / "script.py"
    script.write_text(FAIL.format(before="exit_if_failed_before(env)", code=2))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--node-rank", "0"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--nproc-per-node", "2"]
    command += ["--max-restarts", "5", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert result.stderr.count("infer: error: --port 80 is taken") == 1
    assert 1 <= result.stdout.count("got here") <= 2
