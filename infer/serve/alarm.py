"""Timeouts that are renewed many times a second. No torch here."""

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings once the time it is set to has come. Setting it costs an assignment: there is one timer of the loop, which
    is moved only when it fires too early. (asyncio.timeout makes a timer for every use, some 10 us.)
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, due: float | None) -> None:
        """due: when to ring, in the loop's time; None: not."""
        self._due = due
        if due is not None and (self._timer is None or self._timer.when() > due):
            self._start(due)

    def close(self) -> None:
        """It rings no more. May be called twice."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._loop.time() < self._due:
            self._start(self._due)
            return
        self._due = None
        self._ring()
