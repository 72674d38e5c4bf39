"""What the engine is given and when, over its crashes: one that a request brings about must not happen again and again.

No torch here, no I/O. Requests are named by their ids; every method that may let some go to the engine returns them, in
the order in which they came.
"""


class Replay:
    """Which requests an engine has, which wait for one, and which may have brought it down.

    A request that ran when the engine died is a suspect until a new token of it comes. Suspects go to the next engine
    one at a time, beside those that are cleared already, and before any that never ran. So when the engine dies again,
    at most one suspect was running: it is guilty. The others of that crash are then cleared, since it is explained.
    """

    def __init__(self) -> None:
        self.is_open = False  # an engine takes requests
        self._held: dict[str, None] = {}  # wait to be handed over, in order
        self._running: set[str] = set()  # of those the engine has, what it began to compute
        self._suspects: set[str] = set()
        self._probed: str | None = None  # the one suspect that the engine has

    @property
    def num_suspects(self) -> int:
        return len(self._suspects)

    def open(self, unfinished: list[str]) -> list[str]:
        """An engine takes requests. unfinished: all there are, in order."""
        self.is_open, self._probed = True, None
        self._held = dict.fromkeys(unfinished)
        self._suspects.intersection_update(self._held)
        return self._next()

    def close(self) -> set[str]:
        """The engine is gone. Returns the guilty, which must not be handed over again."""
        self.is_open, self._probed = False, None
        guilty = self._running & self._suspects
        self._suspects = set() if guilty else self._suspects | self._running
        self._running = set()
        return guilty

    def add(self, request_id: str) -> list[str]:
        """A new request has come."""
        self._held[request_id] = None
        return self._next()

    def started(self, request_id: str) -> None:
        """The engine is about to compute it for the first time."""
        self._running.add(request_id)

    def advanced(self, request_id: str) -> list[str]:
        """A new token of it has come."""
        self._running.add(request_id)
        return self._clear(request_id)

    def ended(self, request_id: str) -> list[str]:
        """It is done, or nobody waits for it any more."""
        self._held.pop(request_id, None)
        self._running.discard(request_id)
        return self._clear(request_id)

    def _clear(self, request_id: str) -> list[str]:
        if request_id not in self._suspects:
            return []
        self._suspects.discard(request_id)
        if self._probed == request_id:
            self._probed = None
        return self._next()

    def _next(self) -> list[str]:
        if not self.is_open or self._probed is not None:
            return []
        if self._suspects:
            self._probed = next(request_id for request_id in self._held if request_id in self._suspects)
            del self._held[self._probed]
            return [self._probed]
        released, self._held = list(self._held), {}
        return released
