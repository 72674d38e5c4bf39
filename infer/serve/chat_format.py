"""What a chat model writes beside plain text, and how it is taken apart: reasoning, tool calls. No torch here."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer.serve import reasoning, tools
from infer.serve.reasoning import ReasoningParser
from infer.serve.text import Tokenizer
from infer.serve.tools import ContentDelta, ToolDelta, ToolParser


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
        self.tool_parser: type[ToolParser] | None = parser if enable_auto_tool_choice else None
        self.reasoning_parser: type[ReasoningParser] | None = (
            None if reasoning_parser is None else reasoning.parser_class(reasoning_parser)
        )
        self.response_role = response_role
        special = set() if tokenizer is None else {tokenizer.token(token_id) for token_id in tokenizer.special_ids}
        self.special_markers = special & {*reasoning.MARKERS, *(parser.markers if parser else ())}
        self._other_special = SpecialTexts(special - self.special_markers)

    def needs_special_tokens(self, with_tools: bool) -> bool:
        """Whether the text must still hold special tokens for the parsers to find their markers."""
        wanted = set(reasoning.MARKERS) if self.reasoning_parser else set()
        if with_tools and self.tool_parser:
            wanted |= set(self.tool_parser.markers)
        return bool(wanted & self.special_markers)

    def other_special_texts(self) -> "SpecialTextFilter":
        """Leaves the other special tokens out of a text that holds them all."""
        return SpecialTextFilter(self._other_special)


class SpecialTexts:
    """Texts of special tokens, ready to be looked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.beginnings = frozenset(text[:end] for text in longest_first for end in range(1, len(text)))
        self.longest = max(map(len, longest_first), default=0)


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
        most = min(self._texts.longest - 1, len(rest))
        cut = next((len(rest) - n for n in range(most, 0, -1) if rest[-n:] in self._texts.beginnings), len(rest))
        self._held = rest[cut:]
        return "".join(kept) + rest[:cut]

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


class ChatOutput:
    """Takes one choice's text apart as it comes. Whether it comes in pieces or whole makes no difference.

    most_calls: calls beyond so many are left out (parallel_tool_calls false); None: all are given. num_chars: of text
    taken so far. is_over: no more is taken.
    """

    def __init__(
        self, special: SpecialTextFilter | None, thinking: ReasoningParser | None, calling: ToolParser | None,
        most_calls: int | None = None,
    ) -> None:  # fmt: skip
        self.num_chars = 0
        self.is_over = False
        self._special = special
        self._thinking = thinking
        self._calling = calling
        self._most_calls = most_calls

    @property
    def has_calls(self) -> bool:
        return self._calling is not None and self._calling.num_calls > 0

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
        if self._calling is not None:
            found = self._calling.feed(delta.content) + (self._calling.finish() if is_last else [])
            delta.content = "".join(item.text for item in found if isinstance(item, ContentDelta))
            delta.calls = self._shown_calls(found)
        return delta

    def _shown_calls(self, found: Sequence[ContentDelta | ToolDelta]) -> list[ToolDelta]:
        """One delta a call."""
        calls: dict[int, ToolDelta] = {}
        for item in found:
            if isinstance(item, ContentDelta) or (self._most_calls is not None and item.index >= self._most_calls):
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
