"""The one frontend of a torchrun agent: a directory keyed by the agent, whose lock the frontend holds all its life.

Every generation of ranks has the same agent (pid and start time), so a new rank 0 finds the frontend of those before
it, or learns that there is none and starts one. Standard library only.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from infer.launch import is_alive, private_directory, process_key

SOCKET_NAME = "engine.sock"
LOCK_NAME = "lock"
PREFIX = "frontend-"
MAX_SOCKET_PATH_BYTES = 103  # macOS; Linux takes 107


def agent_directory(agent_pid: int) -> Path:
    """The directory of this agent's frontend; it need not exist. Raises OSError as private_directory does."""
    name = PREFIX + process_key(agent_pid)
    for parent in (tempfile.gettempdir(), "/tmp"):
        longest = f"{parent}/infer-{os.getuid()}/{name}/{SOCKET_NAME}"
        if len(os.fsencode(longest)) <= MAX_SOCKET_PATH_BYTES:
            break
    return private_directory(Path(parent)) / name


def claim(directory: Path) -> int | None:
    """Makes the directory this process's: an open file that holds its lock, also in a child that inherits it.

    None: a frontend has it, or one that is about to start or to end. Raises OSError.
    """
    _sweep(directory)
    while True:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        try:
            fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # a frontend that ended has just removed the directory
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        if _is_at(fd, directory / LOCK_NAME):
            return fd
        os.close(fd)  # the owner before removed this file between our open and our lock


def give_up(directory: Path) -> None:
    """Removes the directory; for the holder of its lock, at its end."""
    for name in (SOCKET_NAME, LOCK_NAME):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or gone
        directory.rmdir()


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _sweep(directory: Path) -> None:
    """Removes what frontends of agents that are gone have left: they were killed, or they would have done it."""
    for other in directory.parent.glob(f"{PREFIX}*"):
        key = other.name.removeprefix(PREFIX)
        if other == directory or not key.replace("-", "", 1).isdecimal() or is_alive(key):
            continue
        with contextlib.suppress(OSError), open(other / LOCK_NAME, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is still ending
            shutil.rmtree(other, ignore_errors=True)
