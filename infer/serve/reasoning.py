"""Reasoning: what a model thinks before it answers, taken out of its text. No torch here.

Models write <think>...</think> and then the answer. Many templates open the tag in the prompt, so that the text begins
inside it; some close it there as well, where the client wants no thinking. The newlines next to the tags are left out.
"""

import json
import re
from collections.abc import Collection
from typing import ClassVar

from infer.request import StructuredOutputs
from infer.serve.tools.source import END, Reading, Source

OPEN, CLOSE = "<think>", "</think>"
MARKERS = (OPEN, CLOSE)


class ReasoningParser:
    """Divides one choice's text into reasoning and content. How the text comes in pieces makes no difference.

    prompt: the text before it; continued: of which this much is the message that it goes on with. starts_inside:
    whether text that begins with no tag, after a prompt without any, is reasoning.
    """

    starts_inside: ClassVar[bool]

    def __init__(self, prompt: str = "", continued: str = "") -> None:
        self._source = Source()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._inside = _begins_inside(prompt, continued)
        self._reading = self._read()

    @property
    def inside(self) -> bool | None:
        """Whether the text begins inside the reasoning; None: only if it begins with the tag. False: the prompt closed
        it already."""
        return True if self._inside is None and self.starts_inside else self._inside

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that more text makes certain."""
        self._source.add(text)
        next(self._reading)
        return self._take()

    def finish(self) -> tuple[str, str]:
        """The text is over: what was held back."""
        self._source.end()
        for _ in self._reading:
            raise AssertionError("a parser waits for text after its end")
        return self._take()

    def _take(self) -> tuple[str, str]:
        taken = "".join(self._reasoning), "".join(self._content)
        self._reasoning.clear()
        self._content.clear()
        return taken

    def _read(self) -> Reading[None]:
        inside = self.inside
        self._source.mark()
        yield from self._source.space()
        if (yield from self._source.skip(OPEN)):
            inside = True
        else:
            self._source.back(len(self._source.marked()))
        self._source.unmark()
        if inside:
            yield from self._newlines()
            yield from self._until_close()
            yield from self._newlines()
        while (text := (yield from self._source.some())) != END:
            self._content.append(text)

    def _until_close(self) -> Reading[None]:
        """Reads the reasoning and the tag that closes it."""
        while True:
            self._reasoning.append(self._source.until("\n<"))
            self._source.mark()
            yield from self._newlines()
            if (yield from self._source.skip(CLOSE)):
                self._source.unmark()
                return
            held = self._source.marked()
            self._source.unmark()
            if not held:
                held = yield from self._source.next()
                if held == END:
                    return
            self._reasoning.append(held)

    def _newlines(self) -> Reading[None]:
        while (char := (yield from self._source.next())) == "\n":
            pass
        self._source.back(len(char))


class DeepSeekR1Parser(ReasoningParser):
    """DeepSeek R1 and its kind always think: text without a tag is reasoning until the tag that closes it."""

    starts_inside = True


class Qwen3Parser(ReasoningParser):
    """Qwen 3 thinks where it, or the prompt, opens the tag: text without one is the answer."""

    starts_inside = False


# --reasoning-parser -> its class
PARSERS: dict[str, type[ReasoningParser]] = {"deepseek_r1": DeepSeekR1Parser, "qwen3": Qwen3Parser}


def parser_class(name: str) -> type[ReasoningParser]:
    """Raises ValueError that names the parsers there are."""
    if name not in PARSERS:
        raise ValueError(f"there is no reasoning parser {name!r}; known are {', '.join(PARSERS)}")
    return PARSERS[name]


def _begins_inside(prompt: str, continued: str) -> bool | None:
    """Whether the text begins inside the reasoning; None where what is before it does not say."""
    opened, closed = continued.rfind(OPEN), continued.rfind(CLOSE)
    if opened != closed:
        return opened > closed
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return True
    return False if end.endswith(CLOSE) else None


def constrain_answer(
    asked: StructuredOutputs, parser: ReasoningParser, special_markers: Collection[str]
) -> StructuredOutputs:
    """What the text must be, where a constraint holds for the answer and the reasoning before it is free.

    special_markers: which of the tags are special tokens, which no pattern of characters matches. Raises ValueError
    where the constraint is too long to stand in a grammar.
    """
    if parser.inside is False:
        return asked
    opening, closing = (tag if tag in special_markers else json.dumps(tag) for tag in MARKERS)
    if CLOSE in special_markers:
        thought = f"thought: /(.|\\n)*/ {closing}"
    else:
        thought = f"thought[lazy]: /(.|\\n)*{re.escape(CLOSE).replace('/', chr(92) + '/')}/"
    opened = f"({opening} thought NEWLINES)?" if parser.inside is None else f"{opening}? thought NEWLINES"
    lines = [f"start: {opened} answer", thought, r"NEWLINES: /\n{0,2}/", f"answer: {_lark(asked)}", ""]
    try:
        return StructuredOutputs(grammar="\n".join(lines))
    except ValueError as error:
        raise ValueError(f"{asked.kind} after reasoning: {error}") from None


def _lark(asked: StructuredOutputs) -> str:
    """A constraint as the right side of a rule, in llguidance's Lark."""
    if asked.grammar is not None:
        return f"%lark {{\n{asked.grammar}\n}}"
    if asked.regex is not None:
        return "/" + re.sub(r"\\.|[/\n]", _escaped, asked.regex, flags=re.DOTALL) + "/"
    if asked.choice is not None:
        return " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(asked.choice))
    schema = json.loads(asked.json) if isinstance(asked.json, str) else {"type": "object"}
    guidance: dict[str, object] = {}
    if asked.disable_any_whitespace:
        guidance["whitespace_flexible"] = False
    if asked.whitespace_pattern is not None:
        guidance["whitespace_pattern"] = asked.whitespace_pattern
    if guidance and isinstance(schema, dict):
        schema["x-guidance"] = guidance
    return "%json " + json.dumps(schema)


def _escaped(match: re.Match[str]) -> str:
    """What would end a pattern, or its line, early."""
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(match[0], match[0])
