"""What a rank must know and do before torch is imported: who it is, and how it ends on a user's error.

Standard library only, because a rank that has nothing to do must end at once: after a configuration error torchrun
starts every rank again, up to --max-restarts times, and each of those finds a marker here and leaves.

    env = RankEnv.from_environ()
    set_parent_death_signal(env)
    exit_if_failed_before(env)
    import torch
    ...
    fail("--tensor-parallel-size 3 ...", env)
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # <linux/prctl.h>
MARKER_PREFIX = "failed-"


@dataclass(frozen=True)
class RankEnv:
    """This process's place in torchrun's world, as its environment tells it.

    Invariants: 0 <= rank < world_size, 0 <= local_rank < local_world_size <= world_size, restart_count >= 0.
    agent_pid is torchrun's process on this host; 0 without torchrun. restart_count is that torchrun's own:
    another node's may differ.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restart_count: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    agent_pid: int = 0
    under_torchrun: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ, agent_pid: int | None = None) -> RankEnv:
        """Read torchrun's variables; rank 0 of 1 where there are none. ValueError names a malformed variable.

        agent_pid: torchrun's, for a process that is not its child.
        """
        under_torchrun = "TORCHELASTIC_RUN_ID" in environ
        if not under_torchrun and "RANK" not in environ and "WORLD_SIZE" not in environ:
            return cls()
        world_size = _integer(environ, "WORLD_SIZE", low=1)
        local_world_size = _integer(environ, "LOCAL_WORLD_SIZE", low=1, high=world_size, default=world_size)
        master_addr = environ.get("MASTER_ADDR", "")
        if not master_addr:
            raise ValueError("the environment has WORLD_SIZE but no MASTER_ADDR; start the ranks with torchrun")
        rank = _integer(environ, "RANK", low=0, high=world_size - 1)
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=_integer(environ, "LOCAL_RANK", low=0, high=local_world_size - 1, default=rank),
            local_world_size=local_world_size,
            restart_count=_integer(environ, "TORCHELASTIC_RESTART_COUNT", low=0, default=0),
            master_addr=master_addr,
            master_port=_integer(environ, "MASTER_PORT", low=1, high=65535),
            agent_pid=(agent_pid or os.getppid()) if under_torchrun else 0,
            under_torchrun=under_torchrun,
        )


def _integer(
    environ: Mapping[str, str], name: str, low: int, high: int | None = None, default: int | None = None
) -> int:
    """The variable as an integer in [low, high]; ValueError says which variable holds what."""
    text = environ.get(name)
    if text is None and default is None:
        raise ValueError(f"the environment has variables of torchrun but no {name}; start the ranks with torchrun")
    try:
        value = int(text) if text is not None else default
    except ValueError:
        value = None
    if value is None or value < low or (high is not None and value > high):
        valid = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"environment variable {name}={environ.get(name, default)!r} is not {valid}; torchrun sets it")
    return value


# ------------------------------------------------------------------------------------------ files shared by one's ranks


def private_directory(parent: Path | None = None) -> Path:
    """A directory on this host for files of this user's ranks only, mode 0700. parent: default the temporary directory.

    OSError where a directory of that name is not this user's alone: in a world-writable place somebody else may have
    made it first.
    """
    path = (parent or Path(tempfile.gettempdir())) / f"infer-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()  # not stat: a symbolic link is not to be followed
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{path} is not a directory that only this user can enter; remove it")
    return path


def process_key(pid: int) -> str:
    """`pid-starttime`: names one process for ever, where a pid alone is used again. Start time 0 without /proc."""
    return f"{pid}-{_start_time(pid)}"


def _start_time(pid: int) -> int:
    """Clock ticks from boot to the process's start; 0 where the process is gone or there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # Field 22; the second field, the command in parentheses, may itself hold blanks and parentheses.
    return int(status.rpartition(")")[2].split()[19])


def is_alive(key: str) -> bool:
    """Whether the process of a process_key still runs."""
    pid = int(key.partition("-")[0])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, and another user's
    return process_key(pid) == key


# ----------------------------------------------------------------------------------------------- a configuration error


def fail(message: str, env: RankEnv | None, code: int = 2) -> NoReturn:
    """End this rank because of what the user gave it: a wrong option, a missing file.

    The first rank of this host to come here prints `infer: error: MESSAGE` on one line; the others end silently, and so
    does every rank that torchrun starts again (exit_if_failed_before). No clean-up runs: collectives may be waiting in
    other threads. `env` is None where the environment itself could not be read.
    """
    if env is None or not env.under_torchrun or _create_marker(env, code):
        _tell("infer: error: " + " ".join(line.strip() for line in message.splitlines()) + "\n")
    _exit(code)


def exit_if_failed_before(env: RankEnv) -> None:
    """End silently, with the same exit status, if a rank of this torchrun has called `fail` on this host."""
    if not env.under_torchrun:
        return
    try:
        code = int(_marker(env).read_text())
    except (OSError, ValueError):
        # No marker, or one that cannot be read: then the worst is that the error is found and told again.
        return
    _exit(code)


def end(reason: str, env: RankEnv) -> NoReturn:
    """End this rank, with status 1, for what befell it: torchrun may start it again, and then all may be well.

    Prints `infer: rank R ends: REASON` on one line, but nothing where a rank of this host has ended on a user's error,
    which is the reason then. As with `fail`, no clean-up runs. May be called on any thread.
    """
    exit_if_failed_before(env)
    _tell(f"infer: rank {env.rank} ends: {reason.splitlines()[0]}\n")
    _exit(1)


def _marker(env: RankEnv) -> Path:
    return private_directory() / f"{MARKER_PREFIX}{process_key(env.agent_pid)}"


def _create_marker(env: RankEnv, code: int) -> bool:
    """Whether this rank is the first. The marker appears whole: a file of one's own is written, then linked."""
    try:
        marker = _marker(env)
        _sweep(marker.parent)
        with tempfile.NamedTemporaryFile("w", dir=marker.parent, prefix="draft-") as draft:
            draft.write(str(code))
            draft.flush()
            os.link(draft.name, marker)  # fails where there is a marker already: of several ranks one is the first
    except FileExistsError:
        return False
    except OSError:
        # Without a place for the marker (a full disk, say) an error told several times is better than none.
        return True
    return True


def _sweep(directory: Path) -> None:
    """Remove the markers of agents that are gone."""
    for path in directory.glob(f"{MARKER_PREFIX}*"):
        key = path.name.removeprefix(MARKER_PREFIX)
        if key.replace("-", "", 1).isdecimal() and not is_alive(key):
            path.unlink(missing_ok=True)


def _tell(line: str) -> None:
    """One write to standard error, so that lines of several processes do not mix; closed, there is nobody to tell."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), line.encode("utf-8", "backslashreplace"))


def _exit(code: int) -> NoReturn:
    """Flush and leave without clean-up, which in a torch process may abort or wait for peers."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# ----------------------------------------------------------------------------------------------------- importing torch


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Imports within it make objects that live as long as the process, so the garbage collector never looks at them.

    Torch makes hundreds of thousands. Full collections walk them all: several times during the import, and from then
    on in the middle of a step, which waits for it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


# ----------------------------------------------------------------------------------------------------- torchrun's death


def set_parent_death_signal(env: RankEnv) -> None:
    """Have the kernel kill this rank when torchrun dies; it would otherwise run on with nobody to stop it.

    Linux only; elsewhere, and without torchrun, nothing is done: a process that was started by hand may outlive its
    shell. OSError where the kernel refuses.
    """
    if not env.under_torchrun or not sys.platform.startswith("linux"):
        return
    die_with_parent(env.agent_pid)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, of this pid. Linux only; OSError where it refuses."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before, and then no signal comes.
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def set_process_name(name: str) -> None:
    """What `ps -o comm` and `top` show for this process, 15 bytes of it, on Linux; elsewhere nothing is done."""
    import ctypes

    if sys.platform.startswith("linux"):
        _prctl(PR_SET_NAME, ctypes.create_string_buffer(name.encode()))


def _prctl(option: int, argument: Any) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if isinstance(argument, int):
        argument = ctypes.c_ulong(argument)
    if libc.prctl(option, argument, *(ctypes.c_ulong(0) for _ in range(3))) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


# ------------------------------------------------------------------------------------------------- other processes here


def child_environment(without: Collection[str] = ()) -> dict[str, str]:
    """This environment, with the package importable from wherever the program was started."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    return {**inherited, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def is_same_user(connection: socket.socket) -> bool:
    """Whether this user is at the other end of a Unix socket. Its directory keeps others out; this holds without."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid == os.getuid()
