"""Stop strings: found as text comes, holding back no more than what may become one. No torch here."""

from collections.abc import Sequence


class StopMatcher:
    """Finds the stop string that is complete first, in linear time (Knuth, Morris and Pratt's search, a state each).

    Of two that are complete at the same character, the longer one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string the text now ends with
        self._first = frozenset(stop[0] for stop in self._stops)

    @property
    def held(self) -> int:
        """How many of the text's last characters may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def may_begin(self, text: str) -> bool:
        """False where this text, next, neither continues a stop string nor begins one; then it need not be fed."""
        return any(self._matched) or not self._first.isdisjoint(text)

    def feed(self, char: str) -> str | None:
        """The stop string this character completes, if it does."""
        found = None
        for i, stop in enumerate(self._stops):
            borders, length = self._borders[i], self._matched[i]
            while length and stop[length] != char:
                length = borders[length - 1]
            length += stop[length] == char
            if length == len(stop):
                found = found or stop
                length = borders[length - 1]
            self._matched[i] = length
        return found


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        length += text[i] == text[length]
        borders[i] = length
    return borders
