"""Collectives of CPU ranks on one host, through memory that all of them have mapped (kernels/cpu/shm*).

gloo moves everything through sockets and threads: 350 us and more for an all-reduce whatever its size, at two of them a
layer. Here a rank writes its part into a shared segment, posts, waits for the others by spinning for a moment and then
sleeping on a futex, and adds up what they wrote.

The segment is an anonymous file (memfd), which the other ranks open through /proc/PID/fd of the rank that made it. It
has no name, so nothing can be left behind by a rank that is killed, and no limit of /dev/shm applies to it.
"""

import hashlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from infer import launch, native

logger = logging.getLogger(__name__)

SCHEMAS = {
    "shm_bytes": "(int size, int slot_bytes) -> int",
    "shm_open": (
        "(int fd, int index, int[] ranks, int[] pids, int[] start_times, int nonce, int slot_bytes, int spin_us, "
        "int timeout_ms) -> int"
    ),
    "shm_close": "(int group) -> ()",
    "shm_all_reduce": "(int group, Tensor(a!) x) -> ()",
    "shm_broadcast": "(int group, Tensor(a!) x) -> ()",
    "shm_gather": "(int group, Tensor x, int[] widths) -> Tensor",
}
PIPE_SCHEMAS = {  # shm_pipe.py's
    "shm_pipe_bytes": "(int num_slots, int slot_bytes) -> int",
    "shm_pipe_open": (
        "(int fd, int index, int[] ranks, int[] pids, int[] start_times, int nonce, int num_slots, int slot_bytes, "
        "int spin_us, int timeout_ms) -> int"
    ),
    "shm_pipe_close": "(int pipe) -> ()",
    "shm_send": "(int pipe, Tensor x, int step) -> ()",
    "shm_receive": "(int pipe, Tensor(a!) x, int step) -> ()",
}
SUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Two slots a rank. A larger tensor goes in several chunks, so this trades memory against barriers.
SLOT_BYTES = 1 << 20
# The longest time a rank spins before it sleeps: more than the ranks of a balanced layer differ by, far less than a
# step. Where ranks share cores, the one that spins keeps the other from coming.
SPIN_US, CROWDED_SPIN_US = 200, 2


@dataclass(frozen=True)
class Introduction:
    """What a rank tells the others about itself. Fields are int64, so that it travels as a tensor.

    host: ranks of one value see one another's /proc/PID. usable: 1 if this rank can use shared memory at all.
    cores: how many it may run on; core_set: a hash of which.
    """

    usable: int
    host: int
    pid: int
    start_time: int
    threads: int
    cores: int
    core_set: int


class SharedMemory:
    """The collectives of one group of ranks, all on this host and all on the CPU.

    Every rank makes the same calls in the same order. They raise RuntimeError, naming the rank, where another is gone,
    does not come within the timeout, or makes a different call; the group is of no use after that.
    """

    def __init__(self, handle: int, index: int):
        self._handle: int | None = handle
        self._index = index

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces a contiguous tensor of one of SUM_DTYPES by its sum over the ranks: in float32, in rank order.

        The sum has the same bits on every rank and in every run.
        """
        torch.ops.infer.shm_all_reduce.default(self._handle, tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Replaces a contiguous tensor by the first rank's."""
        torch.ops.infer.shm_broadcast.default(self._handle, tensor)

    def gather(self, tensor: Tensor, widths: Sequence[int]) -> Tensor | None:
        """The ranks' tensors [rows, widths[i]] of any dtype side by side on the first rank; None on the others."""
        whole = torch.ops.infer.shm_gather.default(self._handle, tensor.contiguous(), widths)
        return whole if self._index == 0 else None

    def close(self) -> None:
        """Gives the memory back. A rank that still waits for this one gets an error."""
        if self._handle is not None:
            torch.ops.infer.shm_close.default(self._handle)
            self._handle = None


def introduce(group: dist.ProcessGroup) -> list[Introduction]:
    """Tells every rank of a gloo group about this one; what they all say, by their place in the group."""
    problem = _problem()
    told = torch.tensor(astuple(_introduction(usable=not problem)), dtype=torch.int64)
    heard = [torch.empty_like(told) for _ in range(group.size())]
    dist.all_gather(heard, told, group=group)
    said = [Introduction(*values.tolist()) for values in heard]
    if problem and all(other.usable for other in said[: group.rank()]):  # one rank speaks for all
        logger.warning("rank %d cannot share memory, it uses gloo: %s", group.rank(), problem)
    return said


def _problem() -> str:
    """What keeps this process from sharing memory, or an empty string."""
    if not hasattr(os, "memfd_create"):
        return "the system has no anonymous files (memfd_create)"
    if problem := native.problem_with(SCHEMAS | PIPE_SCHEMAS):
        return problem
    try:
        _host()
    except OSError as error:
        return f"/proc cannot be read ({error})"
    return ""


def _introduction(usable: bool) -> Introduction:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    pid = os.getpid()
    return Introduction(
        usable=int(usable),
        host=_host() if usable else 0,
        pid=pid,
        start_time=int(launch.process_key(pid).partition("-")[2]),
        threads=torch.get_num_threads(),
        cores=len(cores),
        core_set=_hash(*map(str, cores)),
    )


def _host() -> int:
    """Names what can be reached through this process's /proc: one boot of one kernel, one namespace of pids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return _hash(boot, socket.gethostname(), os.readlink("/proc/self/ns/pid"))


def _hash(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest()[:7], "little")


def connect(
    group: dist.ProcessGroup,
    ranks: list[int],
    world: list[Introduction],
    index: int,
    timeout_seconds: float,
    slot_bytes: int = SLOT_BYTES,
) -> SharedMemory | None:
    """Gives the ranks of a gloo group, which all call this, a segment; None on all of them where that cannot be.

    world: the introductions of all ranks of the world, by rank. index: this rank's place in `ranks`.
    """
    members = [world[rank] for rank in ranks]
    if not all(member.usable for member in members):
        return None
    if len({member.host for member in members}) > 1:
        if index == 0:
            logger.info("ranks %s are on several hosts: their sums go through gloo", ", ".join(map(str, ranks)))
        return None
    settings = slot_bytes, spin_us(members[index], world), int(1000 * timeout_seconds)
    pids, start_times = [member.pid for member in members], [member.start_time for member in members]

    def open_segment(fd: int, nonce: int) -> int:
        return torch.ops.infer.shm_open.default(fd, index, ranks, pids, start_times, nonce, *settings)

    join = _make_segment if index == 0 else _join_segment
    handle, num_open = join(group, open_segment, slot_bytes)
    if num_open == len(ranks):
        assert handle is not None, "this rank has it open, too"
        return SharedMemory(handle, index)
    if handle is not None:
        torch.ops.infer.shm_close.default(handle)
    if index == 0:
        logger.warning("ranks %s share no memory: their sums go through gloo", ", ".join(map(str, ranks)))
    return None


def spin_us(mine: Introduction, world: list[Introduction]) -> int:
    """The longest time that this rank should spin before it sleeps."""
    return CROWDED_SPIN_US if _is_crowded(mine, world) else SPIN_US


def _is_crowded(mine: Introduction, world: list[Introduction]) -> bool:
    """Whether the ranks that may run on this rank's cores have more threads than these cores."""
    same = [other for other in world if (other.host, other.core_set) == (mine.host, mine.core_set)]
    return sum(other.threads for other in same) > mine.cores


def _make_segment(
    group: dist.ProcessGroup, open_segment: Callable[[int, int], int], slot_bytes: int
) -> tuple[int | None, int]:
    """On the first rank: makes the segment and lets the others have it. Its handle, and how many have it open."""
    size, nonce, handle = torch.ops.infer.shm_bytes.default(group.size(), slot_bytes), secrets.randbits(62), None
    fd = attempt("make", lambda: make_file(size, size))
    try:
        if fd is not None:
            handle = attempt("map", lambda: open_segment(fd, nonce))  # it is set up before the others look at it
        told = torch.tensor([os.getpid(), fd if handle is not None else -1, nonce])
        dist.broadcast(told, group=group, group_src=0)
        return handle, count(group, handle is not None)  # the others have come through our file by then
    finally:
        if fd is not None:
            os.close(fd)


def _join_segment(
    group: dist.ProcessGroup, open_segment: Callable[[int, int], int], slot_bytes: int
) -> tuple[int | None, int]:
    """On the other ranks: opens what the first rank has made. Its handle, and how many have it open."""
    told = torch.zeros(3, dtype=torch.int64)
    dist.broadcast(told, group=group, group_src=0)
    pid, number, nonce = told.tolist()
    handle = open_file_of(pid, number, lambda fd: open_segment(fd, nonce)) if number >= 0 else None
    return handle, count(group, handle is not None)


def open_file_of(pid: int, number: int, use: Callable[[int], int]) -> int | None:
    """use(the file that another process knows as `number`); None, as attempt, where that cannot be."""
    fd = attempt("open", lambda: os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC))
    if fd is None:
        return None
    try:
        return attempt("map", lambda: use(fd))
    finally:
        os.close(fd)


def count(group: dist.ProcessGroup, mine: bool) -> int:
    """On how many ranks this is so."""
    number = torch.tensor([int(mine)])
    dist.all_reduce(number, group=group)
    return int(number.item())


def make_file(size: int, reserved: int) -> int:
    """An anonymous file of `size` zeros; the memory of the first `reserved` is there already. Raises OSError."""
    import fcntl  # not on every system

    fd = os.memfd_create("infer-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Without memory behind it, or cut short by somebody, the first touch would be a SIGBUS.
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, min(size, reserved))  # which would make it longer, too
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(fd)
        raise
    return fd


def attempt(verb: str, what: Callable[[], int]) -> int | None:
    """what(); None, and a line in the log, where this process may not or cannot have the memory."""
    try:
        return what()
    except (OSError, RuntimeError) as error:
        logger.warning("cannot %s the memory that ranks share: %s", verb, error)
        return None
