"""Which requests may have brought the engine down: one that does must not do so again and again.

No torch here, no I/O. Requests are named by their ids.
"""

from collections.abc import Iterable


class Replay:
    """What an engine has begun to compute, and who is guilty when it dies.

    A request that ran when the engine died is a suspect until a new token of it comes. The next engine runs suspects
    alone, one after the other, and begins nothing else meanwhile (Scheduler.add). So when it dies again, at most one
    suspect was running: that one is guilty. The others of that crash are then cleared, since it is explained.
    """

    def __init__(self) -> None:
        self.is_open = False  # an engine takes requests
        self.suspects: set[str] = set()
        self._running: set[str] = set()  # of those the engine has, what it began to compute

    def open(self, unfinished: Iterable[str]) -> None:
        """An engine takes requests, and gets all these."""
        self.is_open = True
        self.suspects.intersection_update(unfinished)

    def close(self) -> set[str]:
        """The engine is gone. Returns the guilty, which must not be handed over again."""
        self.is_open = False
        guilty = self._running & self.suspects
        self.suspects = set() if guilty else self.suspects | self._running
        self._running = set()
        return guilty

    def started(self, request_id: str) -> None:
        """The engine is about to compute it for the first time."""
        self._running.add(request_id)

    def advanced(self, request_id: str) -> None:
        """A new token of it has come."""
        self._running.add(request_id)
        self.suspects.discard(request_id)

    def ended(self, request_id: str) -> None:
        """It is done, or nobody waits for it any more."""
        self._running.discard(request_id)
        self.suspects.discard(request_id)
