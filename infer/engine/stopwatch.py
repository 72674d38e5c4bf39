"""How long a device was busy with one stage's batches."""

import time
from collections import deque
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """`with watch:` around what is to be counted; seconds: the sum so far."""

    @property
    def seconds(self) -> float: ...

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> None: ...


def stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch of a kind of device."""
    return _StreamWatch() if device.type == "cuda" else _HostWatch()


class _HostWatch:
    """For devices that have done the work when the call returns."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._started


class _StreamWatch:
    """For a GPU, where a call only queues work: from event to event on its stream, counted once the stream is past."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        self._collect()
        return self._seconds

    def __enter__(self) -> None:
        self._collect()
        pair = self._free.pop() if self._free else (_timing_event(), _timing_event())
        pair[0].record()
        self._open.append(pair)

    def __exit__(self, *exception: object) -> None:
        self._open[-1][1].record()

    def _collect(self) -> None:
        # The newest may be under way, its end not recorded yet: an event that never was counts as past.
        while len(self._open) > 1 and self._open[0][1].query():
            start, end = pair = self._open.popleft()
            self._seconds += start.elapsed_time(end) / 1e3
            self._free.append(pair)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
