"""How long each phase of a process's start took, in one log line that programs can read back. No torch here."""

import os
import re
import time

_LINE = re.compile(r"Start-up took [\d.]+ s: (.+)$", re.MULTILINE)
_PHASE = re.compile(r"(.+) ([\d.]+) s")


class Timeline:
    """Named phases one after another, the first from `started` on (time.monotonic()), or the start of this process."""

    def __init__(self, first: str, started: float | None = None) -> None:
        self._now = time.monotonic
        self._names = [first]
        self._starts = [self._now() - _process_age() if started is None else started]

    def begin(self, phase: str) -> None:
        """Ends the phase before. A name holds no comma."""
        assert "," not in phase, f"{phase!r} would not be read back"
        self._names.append(phase)
        self._starts.append(self._now())

    def line(self) -> str:
        """Ends the last phase: "Start-up took 4.21 s: importing 1.20 s, ..."."""
        ends = [*self._starts[1:], self._now()]
        phases = [
            f"{name} {end - start:.2f} s" for name, start, end in zip(self._names, self._starts, ends, strict=True)
        ]
        return f"Start-up took {ends[-1] - self._starts[0]:.2f} s: {', '.join(phases)}"


def read_line(log: str) -> list[tuple[str, float]]:
    """The phases and their seconds in the first such line of a log; none if it has no such line."""
    found = _LINE.search(log)
    if found is None:
        return []
    phases = [_PHASE.fullmatch(part) for part in found[1].split(", ")]
    return [(phase[1], float(phase[2])) for phase in phases if phase is not None]


def _process_age() -> float:
    """Seconds since the kernel started this process, to a clock tick (10 ms); its CPU time where /proc is missing."""
    try:
        with open("/proc/self/stat") as stat:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # starttime, the 22nd field
    except OSError:
        return time.process_time()
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
