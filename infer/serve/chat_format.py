"""What a chat model writes beside plain text, and how it is taken apart: reasoning, tool calls. No torch here."""

import re
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

from infer.serve import reasoning, tools
from infer.serve.reasoning import ReasoningParser
from infer.serve.text import Tokenizer
from infer.serve.tools import ContentDelta, ToolDelta, ToolParser

_INSIDE_CHARACTER = bytes(range(0x80, 0xC0))  # UTF-8's bytes that begin none


@dataclass
class ChatDelta:
    """What more text adds to a message."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolDelta] = field(default_factory=list)


class ChatFormat:
    """How this server's model writes tool calls and reasoning: the flags, checked against its tokenizer.

    tool_parser: None where tool_choice auto cannot be served (it needs --enable-auto-tool-choice and
    --tool-call-parser). reasoning_parser: None where nothing is taken for reasoning. Raises ValueError for an unknown
    parser's name, or --enable-auto-tool-choice without a parser.
    """

    def __init__(
        self, tokenizer: Tokenizer | None = None, *, enable_auto_tool_choice: bool = False,
        tool_call_parser: str | None = None, reasoning_parser: str | None = None, response_role: str = "assistant",
    ) -> None:  # fmt: skip
        if enable_auto_tool_choice and tool_call_parser is None:
            raise ValueError(f"--enable-auto-tool-choice needs --tool-call-parser, one of {', '.join(tools.PARSERS)}")
        parser = None if tool_call_parser is None else tools.parser_class(tool_call_parser)
        self.make_id = (parser or ToolParser).new_id  # of calls that a grammar forces as well: templates read them all
        self.tool_parser: type[ToolParser] | None = parser if enable_auto_tool_choice else None
        self.reasoning_parser: type[ReasoningParser] | None = (
            None if reasoning_parser is None else reasoning.parser_class(reasoning_parser)
        )
        self.response_role = response_role
        ids = () if tokenizer is None else tokenizer.special_ids
        special = {tokenizer.token(token_id): token_id for token_id in ids} if tokenizer is not None else {}
        markers = {*reasoning.MARKERS, *(parser.markers if parser else ())}
        self.special_markers = {text: token_id for text, token_id in special.items() if text in markers}
        self.special_ids = frozenset(ids)
        self._other_special = SpecialTexts(special.keys() - markers)

    def needs_special_tokens(self, with_tools: bool) -> bool:
        """Whether the text must still hold special tokens for the parsers to find their markers."""
        wanted = set(reasoning.MARKERS) if self.reasoning_parser else set()
        if with_tools and self.tool_parser:
            wanted |= set(self.tool_parser.markers)
        return not wanted.isdisjoint(self.special_markers)

    @property
    def call_markers(self) -> tuple[str, ...]:
        """The markers of calls that the model decides on, first the one that each begins with; none where calls may
        begin without."""
        parser = self.tool_parser
        if parser is None or parser.opening is None:
            return ()
        if parser.needs_special_opening and parser.opening not in self.special_markers:
            return ()
        return (parser.opening, *(marker for marker in parser.markers if marker != parser.opening))

    def other_special_texts(self) -> "SpecialTextFilter":
        """Leaves the other special tokens out of a text that holds them all."""
        return SpecialTextFilter(self._other_special)


class SpecialTexts:
    """Texts of special tokens, ready to be looked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        texts = {text for text in texts if text}
        self.pattern = re.compile(_longest_of(texts) if texts else r"(?!)")
        self.beginnings = frozenset(text[:end] for text in texts for end in range(1, len(text)))
        self.firsts = frozenset(text[0] for text in texts)
        self.longest = max(map(len, texts), default=0)


def _longest_of(texts: Collection[str]) -> str:
    """A pattern for the longest of the texts that comes next: what they begin with in common stands there once, so that
    a text is told from hundreds of them at its first characters."""
    first, last = min(texts), max(texts)
    common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    rests = sorted(text[common:] for text in texts)
    groups = [_longest_of(list(group)) for _, group in groupby(filter(None, rests), itemgetter(0))]
    return re.escape(first[:common]) + (f"(?:{'|'.join(groups)})" + ("" if rests[0] else "?") if groups else "")


class SpecialTextFilter:
    """Takes the texts of special tokens out of a text in pieces, holding back what may become one."""

    def __init__(self, texts: SpecialTexts) -> None:
        self._texts = texts
        self._held = ""

    def feed(self, text: str) -> str:
        kept, end = [], 0
        text = self._held + text
        for match in self._texts.pattern.finditer(text):
            kept.append(text[end : match.start()])
            end = match.end()
        rest = text[end:]
        most, cut = min(self._texts.longest - 1, len(rest)), len(rest)
        if not self._texts.firsts.isdisjoint(rest[len(rest) - most :]):
            cut = next((len(rest) - n for n in range(most, 0, -1) if rest[-n:] in self._texts.beginnings), cut)
        self._held = rest[cut:]
        return "".join(kept) + rest[:cut]

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


class ReasoningCount:
    """How many of a choice's tokens are reasoning: those that begin inside it, tags aside. How tokens and text come in
    pieces makes no difference; only that a text's tokens are here before it is parsed.

    num_tokens: as far as it is certain.
    """

    def __init__(self, parser: ReasoningParser) -> None:
        self.num_tokens = 0
        self._parser = parser
        self._num_chars = 0
        self._starts: deque[int] = deque()  # of the tokens that may be reasoning, in characters of the text

    def add(self, pieces: Iterable[bytes]) -> None:
        """What more tokens add to the text."""
        if self._parser.is_over:
            return
        for piece in pieces:
            inside_character = piece[:1] and piece[0] & 0xC0 == 0x80
            self._starts.append(self._num_chars - bool(inside_character))
            self._num_chars += len(piece.translate(None, _INSIDE_CHARACTER))

    def settle(self) -> None:
        """Counts what the parser has come to know."""
        while self._starts and self._starts[0] < self._parser.end:
            self.num_tokens += self._starts.popleft() >= self._parser.begin
        if self._parser.is_over:
            self._starts.clear()


class ChatOutput:
    """Takes one choice's text apart as it comes. Whether it comes in pieces or whole makes no difference.

    most_calls: calls beyond so many are left out (parallel_tool_calls false); None: all are given. opening: only a text
    that begins with it has calls, any other is content alone; None: calls may stand anywhere. num_chars: of text taken
    so far. is_over: no more is taken. reasoning_tokens: counts them; None where there is no reasoning.
    """

    def __init__(
        self, special: SpecialTextFilter | None, thinking: ReasoningParser | None, calling: ToolParser | None,
        most_calls: int | None = None, opening: str | None = None,
    ) -> None:  # fmt: skip
        self.num_chars = 0
        self.is_over = False
        self.reasoning_tokens = None if thinking is None else ReasoningCount(thinking)
        self._opening = opening  # while it is open whether the text begins with it
        self._held: list[str] = []  # meanwhile
        self._begun = ""  # of the opening
        self._special = special
        self._thinking = thinking
        self._calling = calling
        self._most_calls = most_calls

    @property
    def has_calls(self) -> bool:
        return self._calling is not None and self._calling.num_calls > 0

    @property
    def is_inside_call(self) -> bool:
        """Whether the text ends before the last call's arguments do, of those that are given."""
        if self._calling is None or self._calling.is_whole:
            return False
        return self._calling.num_calls > 0 and not self._leaves_out(self._calling.num_calls - 1)

    def _leaves_out(self, index: int) -> bool:
        return self._most_calls is not None and index >= self._most_calls

    def feed(self, text: str, is_last: bool) -> ChatDelta:
        """What more text makes certain; with the last, all that was held back."""
        assert not self.is_over
        self.num_chars += len(text)
        self.is_over = is_last
        if self._special is not None:
            text = self._special.feed(text) + (self._special.finish() if is_last else "")
        delta = ChatDelta(content=text)
        if self._thinking is not None:
            delta.reasoning, delta.content = self._thinking.feed(text)
            if is_last:
                more = self._thinking.finish()
                delta.reasoning, delta.content = delta.reasoning + more[0], delta.content + more[1]
        if self.reasoning_tokens is not None:
            self.reasoning_tokens.settle()
        if self._opening is not None:
            delta.content = self._begin(delta.content, self._opening, is_last)
        if self._calling is not None:
            found = self._calling.feed(delta.content) + (self._calling.finish() if is_last else [])
            delta.content = "".join(item.text for item in found if isinstance(item, ContentDelta))
            delta.calls = self._shown_calls(found)
        return delta

    def _begin(self, text: str, opening: str, is_last: bool) -> str:
        """Holds the content back until it is clear whether it begins with a call."""
        self._held.append(text)
        self._begun = (self._begun + text).lstrip()
        if not is_last and len(self._begun) < len(opening) and opening.startswith(self._begun):
            return ""
        if not self._begun.startswith(opening):
            self._calling = None
        self._opening, self._begun = None, ""
        return "".join(self._held)

    def _shown_calls(self, found: Sequence[ContentDelta | ToolDelta]) -> list[ToolDelta]:
        """One delta a call."""
        calls: dict[int, ToolDelta] = {}
        for item in found:
            if isinstance(item, ContentDelta) or self._leaves_out(item.index):
                continue
            if item.index in calls:
                calls[item.index].arguments += item.arguments
            else:
                calls[item.index] = item
        return list(calls.values())


def shown_call(delta: ToolDelta, whole: bool) -> dict[str, Any]:
    """A call as OpenAI's JSON has it. whole: of a message; else of a chunk, which says the call's index, and its id and
    name only once."""
    function: dict[str, Any] = {} if delta.name is None else {"name": delta.name}
    head: dict[str, Any] = {} if whole else {"index": delta.index}
    if delta.id is not None:
        head |= {"id": delta.id, "type": "function"}
    return {**head, "function": {**function, "arguments": delta.arguments}}
