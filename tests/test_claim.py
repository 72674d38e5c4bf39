"""One of each kind for a torchrun agent: who has the directory's lock."""

import os
import subprocess
import sys

import pytest

from infer import claim as claims
from infer import launch
from infer.claim import LOCK_NAME, SOCKET_NAME, agent_directory, claim, give_up


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(claims.tempfile, "tempdir", str(tmp_path))
    return agent_directory(os.getpid(), "frontend")


def test_one_owner_at_a_time(directory):
    fd = claim(directory)
    assert fd is not None and directory.stat().st_mode & 0o777 == 0o700
    assert not os.get_inheritable(fd)
    assert claim(directory) is None
    os.close(fd)
    again = claim(directory)
    assert again is not None
    os.close(again)


def test_a_child_keeps_the_lock_after_its_parent_let_go(directory):
    fd = claim(directory)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=(fd,)
    )
    os.close(fd)
    assert claim(directory) is None
    child.kill()
    child.wait()
    child.stdin.close()
    fd = claim(directory)
    assert fd is not None
    os.close(fd)


def test_a_lock_whose_file_was_removed_is_no_claim(directory):
    ending = claim(directory)
    late = os.open(directory / LOCK_NAME, os.O_RDWR)  # another has opened it, and not locked it yet
    (directory / SOCKET_NAME).touch()
    give_up(directory)
    os.close(ending)
    assert not directory.exists()
    fd = claim(directory)
    assert not os.path.samestat(os.fstat(fd), os.fstat(late)) and claim(directory) is None
    os.close(fd)
    os.close(late)


def test_what_frontends_of_dead_agents_left_is_removed(directory):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as agent:
        left = directory.with_name("frontend-" + launch.process_key(agent.pid))
        left.mkdir()
        (left / LOCK_NAME).touch()
        fd = claim(directory)
        assert left.exists(), "its agent lives"
        os.close(fd)
    fd = claim(directory)
    assert not left.exists()
    os.close(fd)


def test_a_long_tmpdir_leaves_room_for_the_socket(tmp_path, monkeypatch):
    monkeypatch.setattr(claims.tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    assert len(os.fsencode(agent_directory(os.getpid(), "frontend") / SOCKET_NAME)) <= claims.MAX_SOCKET_PATH_BYTES
