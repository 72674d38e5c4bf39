"""What every tool-call parser is: text in pieces goes in, content and calls in pieces come out. No torch here."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from infer.serve.tools.source import END, Reading, Source


@dataclass
class ContentDelta:
    """More text for the user."""

    text: str


@dataclass
class ToolDelta:
    """More of the call number `index`. id and name come once, first; arguments is JSON text in pieces."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class ToolParser:
    """Finds the tool calls in one choice's text.

    The calls and the content, joined, do not depend on how the text was divided: a subclass is one generator, _read(),
    that reads the text as if it were whole and yields where it has to wait for more. Nothing is held back but what may
    still become a marker, a call's head or a closing bracket.

    A call begins when its name is known and its arguments begin; before that, whatever turns out to be no call is
    content, markers included. From there on what the model writes is the call's: arguments that are not JSON come out
    as the model wrote them. White space around calls is left out; so is what a call's object holds beside name and
    arguments. A name that no tool has is passed on, as in vLLM: the client answers it with an error the model can read.

    tools: the request's, for formats whose arguments are typed by a schema. markers: texts that only steer parsing; a
    tokenizer may have them as special tokens, which the text must then still contain.
    """

    markers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        self.num_calls = 0
        self._tools = tools
        self._source = Source()
        self._deltas: list[ContentDelta | ToolDelta] = []
        self._space = ""  # read, and content only if content follows
        self._has_content = False
        self._line_is_blank = True  # no content on this line, or none since the last call
        self._reading = self._read()

    def feed(self, text: str) -> list[ContentDelta | ToolDelta]:
        """What more text makes certain, in order."""
        self._source.add(text)
        next(self._reading)
        return self._take()

    def finish(self) -> list[ContentDelta | ToolDelta]:
        """The text is over: what was held back."""
        self._source.end()
        for _ in self._reading:
            raise AssertionError("a parser waits for text after its end")
        if not self.num_calls:
            self._content("")
        return self._take()

    def _read(self) -> Reading[None]:
        """Reads all of the text."""
        raise NotImplementedError

    def _new_id(self) -> str:
        return "call_" + secrets.token_hex(12)

    def _take(self) -> list[ContentDelta | ToolDelta]:
        """What came since the last time; neighbours of the same kind are one."""
        merged: list[ContentDelta | ToolDelta] = []
        pieces: list[str] = []
        for delta in [*self._deltas, None]:
            last = merged[-1] if merged else None
            if isinstance(delta, ToolDelta) and isinstance(last, ToolDelta) and delta.index == last.index:
                pieces.append(delta.arguments)
                continue
            if isinstance(last, ToolDelta) and len(pieces) > 1:
                last.arguments = "".join(pieces)
            if delta is not None:
                merged.append(delta)
                pieces = [delta.arguments] if isinstance(delta, ToolDelta) else []
        self._deltas = []
        return merged

    def _content(self, text: str) -> None:
        text, self._space = self._space + text, ""
        if text:
            self._has_content = True
            *earlier, tail = text.rsplit("\n", 1)
            self._line_is_blank = (self._line_is_blank or bool(earlier)) and (not tail or tail.isspace())
            last = self._deltas[-1] if self._deltas else None
            if isinstance(last, ContentDelta):
                last.text += text
            else:
                self._deltas.append(ContentDelta(text))

    def _begin_call(self, name: str) -> None:
        self._space, self._line_is_blank = "", True
        self._source.unmark()  # nothing of it can be content any more
        self._deltas.append(ToolDelta(self.num_calls, id=self._new_id(), name=name))
        self.num_calls += 1

    def _arguments(self, text: str) -> None:
        if text:
            self._deltas.append(ToolDelta(self.num_calls - 1, text))

    def _until(
        self, markers: Sequence[str], emit: Callable[[str], None] | None = None, hold_space: bool = True
    ) -> Reading[str | None]:
        """Passes text on until one of the markers; returns it, read and marked, or None where the text ends.

        emit: takes the text; content by default. No marker may be the beginning of another.
        """
        if emit is None:
            emit = self._content
            if hold_space and (self.num_calls or not self._has_content):
                self._space += yield from self._source.space()
        firsts = "".join({marker[0] for marker in markers})
        while True:
            if text := self._source.until(firsts):
                emit(text)
            self._source.mark()
            held = yield from self._source.next()
            if held == END:
                self._source.unmark()
                return None
            while held not in markers and any(marker.startswith(held) for marker in markers):
                char = yield from self._source.next()
                held += char
                if char == END:
                    break
            if held in markers:
                return held
            self._source.back(len(held) - 1)
            self._source.unmark()
            emit(held[0])

    def _give_up(self) -> None:
        """What was read since the mark is no call but content."""
        held = self._source.marked()
        self._source.unmark()
        self._content(held)
