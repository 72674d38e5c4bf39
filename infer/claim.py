"""What a torchrun agent has once on its host, over all generations of ranks: the frontend, the fork server.

Each has a directory keyed by the agent (pid and start time), whose lock it holds all its life. So ranks of a new
generation find the one there is, or learn that there is none and start one. Standard library only.
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
MAX_SOCKET_PATH_BYTES = 103  # macOS; Linux takes 107


def agent_directory(agent_pid: int, owner: str) -> Path:
    """The directory of this agent's owner ("frontend", "forkserver"); it need not exist.

    Raises OSError as private_directory does.
    """
    name = f"{owner}-{process_key(agent_pid)}"
    for parent in (tempfile.gettempdir(), "/tmp"):
        longest = f"{parent}/infer-{os.getuid()}/{name}/{SOCKET_NAME}"
        if len(os.fsencode(longest)) <= MAX_SOCKET_PATH_BYTES:
            break
    return private_directory(Path(parent)) / name


def claim(directory: Path) -> int | None:
    """Makes the directory this process's: an open file that holds its lock, also in a child that inherits it.

    None: its owner has it, or one that is about to start or to end. Raises OSError.
    """
    _sweep(directory)
    while True:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        try:
            fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # an owner that ended has just removed the directory
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
    """Removes what owners of agents that are gone have left: they were killed, or they would have done it."""
    prefix = directory.name.partition("-")[0] + "-"
    for other in directory.parent.glob(f"{prefix}*"):
        key = other.name.removeprefix(prefix)
        if other == directory or not key.replace("-", "", 1).isdecimal() or is_alive(key):
            continue
        with contextlib.suppress(OSError), open(other / LOCK_NAME, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is still ending
            shutil.rmtree(other, ignore_errors=True)
