"""What the watchdog knows of each rank, how it travels, and who is to blame. Policy: no threads, no torch."""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import FrameType

import numpy as np

from infer import launch
from infer.signals import Order

MAGIC = 0x57415443  # "WATC"
_HEAD = 4  # magic, generation, farewell, number of rows
_PHASE_BYTES, _WHERE_BYTES = 32, 64
_NUMBERS = 7  # rank, step, flags, fault, three times in ms
_WHERE_AT = _NUMBERS + _PHASE_BYTES // 4
_ROW = _WHERE_AT + _WHERE_BYTES // 4
_MAX_INT32 = 2**31 - 1

_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep
_EXCHANGES = str(Path(__file__).resolve().parent) + os.sep  # code in this folder waits for other ranks


@dataclass(frozen=True)
class Limits:
    """How long what may take, in seconds. All ranks must have the same.

    beat: between two messages. silent, silent_slow: without a word of a rank, while all serve and while any rank is in
    a slow phase, where Python may hold its lock. stuck, stuck_slow: without a move of a main loop that has work.
    """

    beat: float = 1.0
    silent: float = 5.0
    silent_slow: float = 60.0
    stuck: float = 10.0
    stuck_slow: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 < self.beat < _MAX_INT32 / 1000:
            raise ValueError(f"beat ({self.beat:g} s) must be positive")
        for name in ("silent", "silent_slow", "stuck", "stuck_slow"):
            if not (seconds := getattr(self, name)) >= 3 * self.beat:
                raise ValueError(f"{name} ({seconds:g} s) must be at least three beats of {self.beat:g} s")


class Fault(IntEnum):
    """Why a rank is given up."""

    NONE = 0
    GONE = 1  # its connection closed
    SILENT = 2  # nothing has come from it
    STUCK = 3  # its main loop does not move
    GARBLED = 4  # it sent what this generation cannot read


@dataclass(frozen=True)
class Identity:
    """Who a rank is. machine: one boot of one kernel and one namespace of pids, 0 where that cannot be told."""

    rank: int
    host: str
    pid: int
    start_time: int
    machine: int


@dataclass(frozen=True)
class PeerState:
    """A rank as it was last heard of.

    step: of its main loop, -1 before the first. phase_seconds: since that phase began. still_seconds: since its main
    loop moved, or on a CPU computed. age_seconds: since that was heard. waits: its main loop waits for other ranks;
    where: the program's line it stands at, told once it is still. order: what a signal has asked this rank to do.
    """

    rank: int
    host: str
    pid: int
    step: int = -1
    phase: str = "joining"
    slow: bool = True
    work_out: bool = False
    waits: bool = False
    phase_seconds: float = 0.0
    still_seconds: float = 0.0
    age_seconds: float = 0.0
    where: str = ""
    fault: Fault = Fault.NONE
    order: Order = Order.NONE

    def describe(self) -> str:
        """Which rank, which host, which phase, since when; part of a log line."""
        phase = f"phase {self.phase} since {_clock_time(self.age_seconds + self.phase_seconds)}"
        step = f", step {self.step}" if self.step >= 0 else ""
        who = f"rank {self.rank} (host {self.host}, pid {self.pid}), {phase}{step}"
        heard, moved = _clock_time(self.age_seconds), _clock_time(self.age_seconds + self.still_seconds)
        match self.fault:
            case Fault.GONE:
                return f"{who}: gone, its connection closed at {_clock_time(0)}"
            case Fault.SILENT:
                return f"{who}: silent since {heard} ({self.age_seconds:.1f} s)"
            case Fault.STUCK:
                stands = f", stands at {self.where}" if self.where else ""
                return f"{who}: its main loop has not moved since {moved} ({self.still_seconds:.1f} s){stands}"
            case Fault.GARBLED:
                return f"{who}: what it sent at {heard} cannot be read"
            case _:
                return who


def _clock_time(seconds_ago: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() - seconds_ago))


def judge(peers: Sequence[PeerState], limits: Limits) -> list[PeerState]:
    """The ranks to give up, each with its fault; none while all is well.

    Silence comes first, for one who is silent may look stuck. Ranks that wait for others are stuck only when no rank
    with work moves: one of those others may have much to compute. Of several, the ones furthest behind are named.
    """
    slow = any(peer.slow for peer in peers)
    limit = limits.silent_slow if slow else limits.silent
    if any(peer.age_seconds > limit for peer in peers):  # then also those that went at the same time
        return [replace(p, fault=Fault.SILENT) for p in peers if p.age_seconds > limit - 2 * limits.beat]
    busy = [peer for peer in peers if peer.work_out]
    # One that compiles holds up those that wait for it on their devices, which cannot be told from computing.
    stuck = [p for p in busy if p.still_seconds > (limits.stuck_slow if slow else limits.stuck)]
    if all(peer.waits for peer in stuck) and len(stuck) < len(busy):
        return []
    guilty = [peer for peer in stuck if not peer.waits] or stuck
    behind = min((peer.step for peer in guilty), default=0)
    return [replace(peer, fault=Fault.STUCK) for peer in guilty if peer.step == behind]


class AwakeClock:
    """Seconds that this process has been awake.

    Someone ticks regularly; what passes between two ticks beyond `longest` is not counted. So after a pause of the
    machine, of the process, or of all its threads while one holds Python's lock, a message that could not be read
    meanwhile is not late: the pause adds at most `longest` to any age.
    """

    def __init__(self, longest: float, read: Callable[[], float] = time.monotonic):
        self._longest, self._read = longest, read
        self._at = (0.0, read())  # replaced whole, as other threads read it

    def now(self) -> float:
        awake, ticked = self._at
        return awake + min(self._read() - ticked, self._longest)

    def tick(self) -> None:
        """Only one thread may call this."""
        awake, ticked = self._at
        now = self._read()
        self._at = awake + min(now - ticked, self._longest), now


class Standing:
    """This rank's own state: its main loop writes, the watchdog's threads read.

    counts_computing: CPU time of the main loop's thread counts as moving, for a step on a CPU may well take minutes.
    On a GPU it does not: waiting for the device takes CPU time as well.
    """

    def __init__(self, identity: Identity, clock: AwakeClock, limits: Limits, counts_computing: bool):
        self._identity, self._clock, self._limits = identity, clock, limits
        self._counts_computing = counts_computing and hasattr(time, "pthread_getcpuclockid")
        self._phase, self._slow, self._phase_at = "joining", True, clock.now()
        self._work_out, self._waits, self._step = False, False, -1
        self._moved_at = self._computed_at = clock.now()
        self._where, self._stands_in_exchange = "", False
        self._thread, self._cpu_clock = threading.get_ident(), self._own_cpu_clock()
        self._cpu_seen = (0.0, clock.now())
        self.order = Order.NONE

    def _own_cpu_clock(self) -> int:
        return time.pthread_getcpuclockid(threading.get_ident()) if self._counts_computing else 0

    # ------------------------------------------------------------------ the main loop's

    @property
    def phase(self) -> tuple[str, bool]:
        """Its name, and whether it is slow."""
        return self._phase, self._slow

    def set_phase(self, phase: str, slow: bool) -> None:
        now = self._clock.now()
        self._phase, self._slow, self._phase_at, self._moved_at, self._waits = phase, slow, now, now, False

    def set_work_out(self, work_out: bool) -> None:
        if work_out and not self._work_out:
            self._moved_at = self._clock.now()  # before the flag, which a reader may see at once
        self._work_out = work_out

    def progress(self, step: int, waits: bool) -> None:
        thread = threading.get_ident()
        if thread != self._thread:  # the main loop may have moved to another thread of a script
            self._cpu_clock, self._thread = self._own_cpu_clock(), thread
        if step != self._step:
            self._step, self._moved_at = step, self._clock.now()
        self._waits = waits

    # ------------------------------------------------------------------ the watchdog's

    def observe(self) -> None:
        """Looks at the main loop's thread. Called regularly."""
        now = self._clock.now()
        if self._counts_computing:
            self._observe_cpu(now)
        self._where, self._stands_in_exchange = "", False
        if self._work_out and now - self._moved_at > 2 * self._limits.beat:
            self._where, self._stands_in_exchange = _stands_at(sys._current_frames().get(self._thread))

    def _observe_cpu(self, now: float) -> None:
        """A twentieth of one core is computing, even where many share it; a loop that only polls takes far less."""
        try:
            seconds = time.clock_gettime(self._cpu_clock)
        except OSError:  # that thread has ended
            return
        seen, at = self._cpu_seen
        if seconds - seen > 0.05 * (now - at):
            self._computed_at = now
        self._cpu_seen = (seconds, now)

    def state(self) -> PeerState:
        work_out = self._work_out  # read before _moved_at, see set_work_out
        now, slow = self._clock.now(), self._slow
        still = now - self._moved_at
        if not slow and still <= self._limits.stuck_slow:  # beyond that, computing is no excuse
            still = min(still, now - self._computed_at)
        return PeerState(
            rank=self._identity.rank, host=self._identity.host, pid=self._identity.pid, step=self._step,
            phase=self._phase, slow=slow, work_out=work_out, waits=self._waits or self._stands_in_exchange,
            phase_seconds=now - self._phase_at, still_seconds=still, where=self._where, order=self.order,
        )  # fmt: skip


def _stands_at(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of this program in a thread's stack, and whether it is one that waits for other ranks."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            line = f"{name.removeprefix(_PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}"
            return line, name.startswith(_EXCHANGES)
        frame = frame.f_back
    return "", False


# ------------------------------------------------------------------------------------------------ as int32


def _to_words(text: str, num_bytes: int) -> np.ndarray:
    """UTF-8, cut at num_bytes (a multiple of 4), filled up with zeros."""
    return np.frombuffer(text.encode()[:num_bytes].ljust(num_bytes, b"\0"), dtype=np.int32)


def _to_text(words: np.ndarray) -> str:
    return words.tobytes().rstrip(b"\0").decode(errors="ignore")  # a character cut in two is left out


def _milliseconds(seconds: float) -> int:
    return min(int(seconds * 1000), _MAX_INT32)


def num_words(num_rows: int) -> int:
    """The size of a message with so many rows."""
    return _HEAD + num_rows * _ROW


def encode(peers: Sequence[PeerState], generation: int, farewell: bool) -> np.ndarray:
    """A message, int32 [num_words(len(peers))]. farewell: nothing comes after it, by intent."""
    words = np.zeros(num_words(len(peers)), dtype=np.int32)
    words[:_HEAD] = MAGIC, generation, farewell, len(peers)
    for row, peer in zip(words[_HEAD:].reshape(-1, _ROW), peers, strict=True):
        flags = peer.slow | peer.work_out << 1 | peer.waits << 2 | peer.order << 3
        seconds = (peer.phase_seconds, peer.still_seconds, peer.age_seconds)
        step = peer.step & _MAX_INT32 if peer.step >= 0 else -1
        row[:_NUMBERS] = peer.rank, step, flags, peer.fault, *map(_milliseconds, seconds)
        row[_NUMBERS:_WHERE_AT] = _to_words(peer.phase, _PHASE_BYTES)
        row[_WHERE_AT:] = _to_words(peer.where, _WHERE_BYTES)
    return words


def decode(words: np.ndarray, generation: int, world: Sequence[Identity]) -> tuple[list[PeerState], bool]:
    """The inverse of encode. Raises ValueError for a message of another generation, or of no watchdog."""
    magic, its_generation, farewell, num_rows = words[:_HEAD].tolist()
    if magic != MAGIC or its_generation != generation or len(words) != num_words(num_rows):
        raise ValueError(
            f"a message of {len(words)} words with magic {magic:#x}, generation {its_generation} and {num_rows} rows; "
            f"expected magic {MAGIC:#x} and generation {generation}"
        )
    peers = []
    for row in words[_HEAD:].reshape(-1, _ROW):
        rank, step, flags, fault, *milliseconds = row[:_NUMBERS].tolist()
        if not 0 <= rank < len(world):
            raise ValueError(f"a message about rank {rank} in a world of {len(world)} ranks")
        phase_seconds, still_seconds, age_seconds = (value / 1000 for value in milliseconds)
        peers.append(
            PeerState(
                rank=rank, host=world[rank].host, pid=world[rank].pid, step=step, slow=bool(flags & 1),
                work_out=bool(flags & 2), waits=bool(flags & 4), order=Order(flags >> 3), phase_seconds=phase_seconds,
                still_seconds=still_seconds, age_seconds=age_seconds, fault=Fault(fault),
                phase=_to_text(row[_NUMBERS:_WHERE_AT]), where=_to_text(row[_WHERE_AT:]),
            )
        )  # fmt: skip
    return peers, bool(farewell)


def own_identity(rank: int, host: str) -> Identity:
    """This process. start_time is 0 where there is no /proc."""
    pid = os.getpid()
    return Identity(rank, host, pid, int(launch.process_key(pid).partition("-")[2]), _machine())


def _machine() -> int:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return 0
    return int.from_bytes(hashlib.sha256(f"{boot}\0{namespace}".encode()).digest()[:3], "little") + 1
