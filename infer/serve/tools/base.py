"""What every tool-call parser is: text in pieces goes in, content and calls in pieces come out. No torch here."""

import abc
import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from infer.serve.tools.source import Markers, Reading, Source


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


class ToolParser(abc.ABC):
    """Finds the tool calls in one choice's text.

    The calls and the content, joined, do not depend on how the text was divided: a subclass is one generator, _read(),
    that reads the text as if it were whole and yields where it has to wait for more. Nothing is held back but what may
    still become a marker, a call's head or a closing bracket.

    A call begins when its name is known and its arguments begin; before that, whatever turns out to be no call is
    content, markers included. From there on what the model writes is the call's: arguments that are not JSON come out
    as the model wrote them. White space around calls is left out; so is what a call's object holds beside name and
    arguments. A name that no tool has is passed on, as in vLLM: the client answers it with an error the model can read.

    tools: the request's, for formats whose arguments are typed by a schema. make_id: of each call; the format's own
    unless given. markers: texts that only steer parsing; a tokenizer may have them as special tokens, which the text
    must then still contain. opening: the marker that every call, or the first of several, begins with; None: calls may
    come without any. needs_special_opening: models leave it out, unless it is one token to them.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    opening: ClassVar[str | None] = None
    needs_special_opening: ClassVar[bool] = False

    def __init__(self, tools: Sequence[dict[str, Any]] = (), make_id: Callable[[], str] | None = None) -> None:
        self.num_calls = 0
        self.is_whole = False  # the last call; what the model still writes is not its
        self._tools = tools
        self._make_id = make_id or self.new_id
        self._source = Source()
        self._deltas: list[ContentDelta | ToolDelta] = []
        self._space = ""  # read, and content only if content follows
        self._is_fresh = True  # no content came yet, or none since the last call
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

    @abc.abstractmethod
    def _read(self) -> Reading[None]:
        """Reads all of the text."""

    @staticmethod
    def new_id() -> str:
        """An id as this format's chat templates take it."""
        return "call_" + secrets.token_hex(12)

    def _take(self) -> list[ContentDelta | ToolDelta]:
        """What came since the last time; neighbours of the same kind are one."""
        taken, self._deltas = self._deltas, []
        if len(taken) < 2:
            return taken
        merged: list[ContentDelta | ToolDelta] = []
        for _, deltas in itertools.groupby(taken, lambda delta: getattr(delta, "index", None)):
            first, *more = deltas
            if isinstance(first, ContentDelta):
                first.text += "".join(delta.text for delta in more if isinstance(delta, ContentDelta))
            else:
                first.arguments += "".join(delta.arguments for delta in more if isinstance(delta, ToolDelta))
            merged.append(first)
        return merged

    def _content(self, text: str) -> None:
        text, self._space = self._space + text, ""
        if text:
            self._is_fresh = False
            *earlier, tail = text.rsplit("\n", 1)
            self._line_is_blank = (self._line_is_blank or bool(earlier)) and (not tail or tail.isspace())
            self._deltas.append(ContentDelta(text))

    def _leave_out(self) -> None:
        """What was read since the mark, and white space before it, is a call's and not content."""
        self._source.unmark()
        self._space, self._is_fresh = "", True

    def _begin_call(self, name: str) -> None:
        self._leave_out()
        self._line_is_blank, self.is_whole = True, False
        self._deltas.append(ToolDelta(self.num_calls, id=self._make_id(), name=name))
        self.num_calls += 1

    def _arguments(self, text: str) -> None:
        if text:
            self._deltas.append(ToolDelta(self.num_calls - 1, text))

    def _until(self, markers: Markers, emit: Callable[[str], None] | None = None) -> Reading[str | None]:
        """Passes text on until one of the markers; returns it, read and marked, or None where the text ends.

        emit: takes the text; content by default.
        """
        if emit is None and self._is_fresh:
            self._space += yield from self._source.space()
        marker = yield from self._source.until(markers, emit or self._content, lambda: self._line_is_blank)
        if marker is not None:
            self._source.mark()
            self._source.read(len(marker))
        return marker

    def _give_up(self) -> None:
        """What was read since the mark is no call but content."""
        held = self._source.marked()
        self._source.unmark()
        self._content(held)
