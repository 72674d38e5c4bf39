"""Text that is read while it is still coming. No torch here."""

from collections.abc import Generator
from typing import TypeVar

END = ""  # what Source.next gives when there is no more text

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields wherever it has to wait for more text


class Source:
    """A text in pieces, read as if it were whole: its readers are generators that yield until more of it is there.

    What is read does not depend on how the text was divided. [mark, at) is what was read since mark(), kept so that it
    can be taken back; [at, end) is still to be read. Without a mark, what was read is forgotten.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self._ended = False

    def add(self, text: str) -> None:
        """More text."""
        start = self._at if self._mark is None else self._mark
        self._text = self._text[start:] + text
        self._at -= start
        self._mark = None if self._mark is None else 0

    def end(self) -> None:
        """There is no more."""
        self._ended = True

    def next(self) -> Reading[str]:
        """One character, or END."""
        while self._at == len(self._text):
            if self._ended:
                return END
            yield
        self._at += 1
        return self._text[self._at - 1]

    def some(self) -> Reading[str]:
        """All that is here, at least one character; or END."""
        first = yield from self.next()
        if first == END:
            return END
        start, self._at = self._at - 1, len(self._text)
        return self._text[start:]

    def until(self, stops: str) -> str:
        """What is here before the first of these characters; may be nothing."""
        ends = [end for stop in stops if (end := self._text.find(stop, self._at)) >= 0]
        start, self._at = self._at, min(ends, default=len(self._text))
        return self._text[start : self._at]

    def back(self, num_chars: int) -> None:
        """Unreads characters: those since mark(), or of what was read last without a wait in between."""
        self._at -= num_chars
        assert self._at >= (self._mark or 0)

    def peek(self) -> Reading[str]:
        """The next character without reading it, or END."""
        char = yield from self.next()
        self.back(len(char))
        return char

    def space(self) -> Reading[str]:
        """White space, all there is."""
        read = []
        while (char := (yield from self.next())).isspace():
            read.append(char)
        self.back(len(char))
        return "".join(read)

    def skip(self, expected: str) -> Reading[bool]:
        """Reads this text if it comes next. Needs a mark: what only began like it is unread."""
        for count, char in enumerate(expected):
            found = yield from self.next()
            if found != char:
                self.back(count + len(found))
                return False
        return True

    def mark(self) -> None:
        """What is read from here on can be taken back."""
        self._mark = self._at

    def unmark(self) -> None:
        self._mark = None

    def marked(self) -> str:
        """What was read since mark()."""
        assert self._mark is not None
        return self._text[self._mark : self._at]
