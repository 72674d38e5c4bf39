"""Text that is read while it is still coming. No torch here."""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

END = ""  # what Source.next gives when there is no more text
_SPACE = re.compile(r"\s*")

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields wherever it has to wait for more text


def or_cut(text: str) -> str:
    """A pattern for this text, or for the beginning of it that the text looked at ends with."""
    pattern = ""
    for char in reversed(text):
        pattern = rf"(?:\Z|{re.escape(char)}{pattern})"
    return pattern


class Markers:
    """Texts to look for; none may stand inside another.

    at_line: these count only where nothing but white space is before them on their line; one character each. then: a
    pattern for what follows a text, which must hold as well where the text ends before that shows: it spares reading
    what cannot be meant, at the speed of a regular expression.
    """

    def __init__(
        self, texts: Sequence[str], at_line: Sequence[str] = (), then: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        def patterns(texts: Sequence[str]) -> str:
            return "|".join(re.escape(text) + then.get(text, "") for text in texts) or "(?!)"

        indented = rf"[^\S\n]*+({patterns(at_line)})"
        self._found = re.compile(f"({patterns(texts)})" + (rf"|\n{indented}" if at_line else ""))
        self._found_at_line = re.compile(indented if at_line else "(?!)")
        self._beginnings = tuple({text[:end] for text in texts for end in range(1, len(text))})
        self._longest = max(map(len, self._beginnings), default=0)

    def find(self, text: str, start: int, line_is_blank: bool) -> tuple[int, str] | None:
        """Where the first one is from start on, and which. line_is_blank: no content is on the line of start."""
        found = self._found_at_line.match(text, start) if line_is_blank else None
        found = found or self._found.search(text, start)
        if found is None or found.lastindex is None:
            return None
        return found.start(found.lastindex), found[found.lastindex]

    def beginning(self, text: str, start: int) -> int:
        """How long the beginning of one is that the text ends with; the longest."""
        if not text.endswith(self._beginnings, start):
            return 0
        sizes = range(min(self._longest, len(text) - start), 0, -1)
        return next(size for size in sizes if text[-size:] in self._beginnings)


class Source:
    """A text in pieces, read as if it were whole: its readers are generators that yield until more of it is there.

    What is read does not depend on how the text was divided, and costs no more than its length: what was marked is kept
    in pieces. [mark, at) is what was read since mark(), which can be taken back: the pieces kept and [0, at) of the
    text, where there are any; [at, end) is still to be read. Without a mark, what was read is forgotten.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._num_before = 0  # characters before the text
        self._mark: int | None = None
        self._kept: list[str] = []  # since the mark, and before the text
        self.ended = False

    def add(self, text: str) -> None:
        """More text."""
        if self._mark is not None:
            self._kept.append(self._text[self._mark : self._at])
            self._mark = 0
        self._text = self._text[self._at :] + text
        self._num_before += self._at
        self._at = 0

    @property
    def position(self) -> int:
        """Characters read so far."""
        return self._num_before + self._at

    def end(self) -> None:
        """There is no more."""
        self.ended = True

    def next(self) -> Reading[str]:
        """One character, or END."""
        char = yield from self.peek()
        self._at += len(char)
        return char

    def peek(self) -> Reading[str]:
        """The next character without reading it, or END."""
        while self._at == len(self._text):
            if self.ended:
                return END
            yield
        return self._text[self._at]

    def some(self) -> Reading[str]:
        """All that is here, at least one character; or END."""
        if (yield from self.peek()) == END:
            return END
        start, self._at = self._at, len(self._text)
        return self._text[start:]

    def until(
        self, markers: Markers, emit: Callable[[str], None], line_is_blank: Callable[[], bool] = lambda: False
    ) -> Reading[str | None]:
        """Hands text on up to the first of the markers, which is read next; None: there is none, and no more text.
        Of a text that is not over, what may become a marker waits."""
        while True:
            start, found = self._at, markers.find(self._text, self._at, line_is_blank())
            held = 0 if self.ended or found else markers.beginning(self._text, start)
            self._at = found[0] if found else len(self._text) - held
            if self._at > start:
                emit(self._text[start : self._at])
            if found:
                return found[1]
            if self.ended:
                return None
            yield

    def back(self, num_chars: int) -> None:
        """Unreads characters: those since mark(), or of what was read last without a wait in between."""
        if num_chars > self._at and self._kept:
            kept, self._kept = "".join(self._kept), []
            self._text = kept + self._text
            self._at += len(kept)
            self._num_before -= len(kept)
        self._at -= num_chars
        assert self._at >= (self._mark or 0)

    def run(self, pattern: re.Pattern[str], most: int | None = None) -> Reading[str]:
        """As many characters as the pattern takes, however the text is divided; at most so many. May be none."""
        read, left = [], most
        while True:
            found = pattern.match(self._text, self._at)
            assert found is not None  # it may take nothing
            end = found.end() if left is None else min(found.end(), self._at + left)
            read.append(self._text[self._at : end])
            left = None if left is None else left - (end - self._at)
            self._at = end
            if self._at < len(self._text) or left == 0 or self.ended:
                return "".join(read)
            yield

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Reads what the pattern finds next in what is here. It must be none that more text would change."""
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def space(self) -> Reading[str]:
        """White space, all there is."""
        return (yield from self.run(_SPACE))

    def skip(self, expected: str) -> Reading[bool]:
        """Reads this text if it comes next."""
        while True:
            here = self._text[self._at : self._at + len(expected)]
            if here == expected:
                self._at += len(here)
                return True
            if self.ended or not expected.startswith(here):
                return False
            yield

    def read(self, num_chars: int) -> None:
        """Reads characters that are here."""
        self._at += num_chars
        assert self._at <= len(self._text)

    def mark(self) -> None:
        """What is read from here on can be taken back."""
        self._mark, self._kept = self._at, []

    def unmark(self) -> None:
        self._mark, self._kept = None, []

    def marked(self) -> str:
        """What was read since mark()."""
        assert self._mark is not None
        return "".join(self._kept) + self._text[self._mark : self._at]
