"""How late the event loop is: what every stream of the server waits while one callback runs. No torch here."""

import asyncio
import collections
import logging

INTERVAL_S = 0.05
WINDOW = 1200  # samples that percentiles are taken over: the last minute
LOGGED_S = 0.1  # a delay of more is worth a line for those who look for its cause

logger = logging.getLogger("infer.frontend")


class LoopLag:
    """Sets a timer again and again, and notes how much later than due it fires, in seconds.

    A callback that runs for t seconds is seen with up to t, and surely where t is over INTERVAL_S.
    """

    def __init__(self) -> None:
        self.maximum = 0.0  # since the start, or the last reset()
        self.num_samples = 0
        self._recent: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins, on the running event loop."""
        loop = asyncio.get_running_loop()
        due = loop.time() + INTERVAL_S
        self._timer = loop.call_at(due, self._tick, loop, due)

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        lag = max(0.0, loop.time() - due)
        self.maximum = max(self.maximum, lag)
        self.num_samples += 1
        self._recent.append(lag)
        if lag > LOGGED_S:
            logger.debug("The event loop was held up for %.0f ms", 1000 * lag)
        self.start()

    def percentile(self, percent: float) -> float:
        """The delay that `percent` of the last minute's samples do not exceed (nearest rank); 0 without samples."""
        if not self._recent:
            return 0.0
        ordered = sorted(self._recent)
        rank = -(-len(ordered) * percent // 100)  # rounded up
        return ordered[min(len(ordered), max(1, int(rank))) - 1]

    def reset(self) -> None:
        """Forgets what was seen."""
        self.maximum, self.num_samples = 0.0, 0
        self._recent.clear()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
