"""Stop strings: found as text comes, holding back no more than what may become one. No torch here."""

import functools
from collections import deque
from collections.abc import Iterable, Sequence


class StopTable:
    """The automaton of Aho and Corasick (1975) for some stop strings: what their prefixes are, and how each goes on.

    A state is the longest prefix of any stop string that the text ends with; 0 is the empty one.

    first: what a stop string may begin with. depth: a state's characters.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.first = frozenset(stop[0] for stop in stops)
        self.depth = [0]
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]  # the longest proper suffix of a state that is a state too
        self._complete: list[str | None] = [None]  # the longest stop string that a state ends with
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self._shorter.append(0)
                self._complete.append(None)
            state = self._next[state][char]
        self._complete[state] = stop

    def _link(self) -> None:
        """Finds what states fall back to, the shorter ones first."""
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            self._complete[state] = self._complete[state] or self._complete[self._shorter[state]]
            for char, longer in self._next[state].items():
                self._shorter[longer] = self._follow(self._shorter[state], char)
                states.append(longer)

    def _follow(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(char, 0)

    def step(self, state: int, char: str) -> tuple[int, str | None]:
        """The state after one more character, and the longest stop string that it completes, if any."""
        state = self._follow(state, char)
        found = self._complete[state]
        while state and not self._next[state]:  # a whole stop string that is the beginning of no other
            state = self._shorter[state]
        return state, found


@functools.lru_cache(maxsize=64)
def stop_table(stops: tuple[str, ...]) -> StopTable:
    """One table for all choices of a request, and for the requests that come with the same strings."""
    return StopTable(dict.fromkeys(stops))


class StopMatcher:
    """Finds the stop string that is complete first, in linear time. Of two complete at once, the longer one counts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._table = stop_table(tuple(stops))
        self._state = 0

    @property
    def held(self) -> int:
        """How many of the text's last characters may be the beginning of a stop string."""
        return self._table.depth[self._state]

    def may_begin(self, text: str) -> bool:
        """False where this text, next, neither continues a stop string nor begins one; then it need not be fed."""
        return self._state != 0 or not self._table.first.isdisjoint(text)

    def feed(self, char: str) -> str | None:
        """The stop string this character completes, if it does."""
        self._state, found = self._table.step(self._state, char)
        return found
