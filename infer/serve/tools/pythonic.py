"""Tool calls as Llama 3.2 and 4 and ToolACE write them. No torch here.

    [get_weather(city="Paris"), get_time()]

Llama 4 puts <|python_start|> and <|python_end|> around them. A list is taken for calls where a line begins, or after
the tag. Each call comes out when it is complete: before that, nothing tells a call from text in brackets.
"""

import re

from infer.serve.tools.base import ToolParser
from infer.serve.tools.literals import keywords_json
from infer.serve.tools.source import END, Markers, Reading

START, STOP = "<|python_start|>", "<|python_end|>"
MAX_NAME_CHARS = 256
MAX_DEPTH = 100  # of brackets in arguments
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_NAME = re.compile(r"[\w.]*")
_THEN = {START: r"(?!\s*+[^\s\[])", "[": r"(?!\s*+(?:[^\s\w.]|[\w.]++(?:\s++[^\s(]|[^\s\w.(])))"}
_OPENING = Markers((START,), at_line=("[",), then=_THEN)
# In arguments: what is neither bracket nor quote, and short strings that are whole.
_SIMPLE = re.compile(
    r"""(?:[^()\[\]{}"']++|'(?!')(?:[^'\\]++|\\.)*+'|"(?!")(?:[^"\\]++|\\.)*+")*+""", re.DOTALL
)
_IN_QUOTES = {quote: re.compile(rf"(?:[^{quote}\\]++|\\.)*+", re.DOTALL) for quote in "\"'"}


class PythonicParser(ToolParser):
    """A list of calls with keyword arguments that are Python literals."""

    markers = (START, STOP)

    def _read(self) -> Reading[None]:
        while (marker := (yield from self._until(_OPENING))) is not None:
            found = True
            if marker == START:
                yield from self._source.space()
                found = yield from self._source.skip("[")
            if not found or not (yield from self._calls()):
                self._give_up()
                continue
            yield from self._source.space()
            self._source.mark()
            yield from self._source.skip(STOP)
            self._source.unmark()

    def _calls(self) -> Reading[bool]:
        """Reads calls up to the list's end. Returns False where what comes after the mark is none."""
        while True:
            yield from self._source.space()
            call = yield from self._call()
            if call is None:
                return False
            self._begin_call(call[0])
            self._arguments(call[1])
            self.is_whole = True
            yield from self._source.space()
            self._source.mark()
            separator = yield from self._source.peek()
            if separator not in ("]", ","):
                return False
            yield from self._source.next()
            if separator == "]":
                self._source.unmark()
                return True

    def _call(self) -> Reading[tuple[str, str] | None]:
        """One call's name and arguments; None where it is none."""
        name = yield from self._source.run(_NAME, MAX_NAME_CHARS + 1)
        yield from self._source.space()
        if not name or name[0].isdigit() or len(name) > MAX_NAME_CHARS or not (yield from self._source.skip("(")):
            return None
        text = yield from self._bracketed()
        if text is None:
            return None
        try:
            return name, keywords_json(text)
        except ValueError:
            return None

    def _bracketed(self) -> Reading[str | None]:
        """What is before the bracket that closes the call, which is read too; None where there is none."""
        pieces: list[str] = []
        stack = [")"]
        while stack:
            simple = self._source.take(_SIMPLE)
            assert simple is not None  # it may take nothing
            pieces.append(simple[0])
            char = yield from self._source.next()
            if char == END:
                return None
            pieces.append(char)
            if char in _CLOSING:
                stack.append(_CLOSING[char])
            elif char in ")]}":
                if char != stack.pop():
                    return None
            elif char in "\"'":
                pieces.append((yield from self._quoted(char)))
            if len(stack) > MAX_DEPTH:
                return None
        return "".join(pieces)[:-1]

    def _quoted(self, quote: str) -> Reading[str]:
        """The rest of a string, whose opening quote was read; of three quotes, the other two are read here."""
        pieces: list[str] = []
        closing = quote
        if (yield from self._source.peek()) == quote:
            pieces.append((yield from self._source.next()))
            if (yield from self._source.peek()) != quote:
                return quote  # an empty string
            pieces.append((yield from self._source.next()))
            closing = quote * 3
        ends = 0
        while ends < len(closing):
            if text := (yield from self._source.run(_IN_QUOTES[quote])):
                pieces.append(text)
                ends = 0
            char = yield from self._source.next()
            if char == END:
                break
            pieces.append(char)
            if char == "\\":
                pieces.append((yield from self._source.next()))
            ends = ends + 1 if char == quote else 0
        return "".join(pieces)
