"""Reasoning: what a model thinks before it answers, taken out of its text. No torch here.

Models write <think>...</think> and then the answer. Many templates open the tag in the prompt, so that the text begins
inside it; some close it there as well, where the client wants no thinking. The newlines next to the tags are left out.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import ClassVar

from infer.request import StructuredOutputs
from infer.serve.tools.source import END, Markers, Reading, Source
from infer.structured import without_unknown_formats

OPEN, CLOSE = "<think>", "</think>"
MARKERS = (OPEN, CLOSE)
_TAGS = Markers(MARKERS)
_NEWLINES = re.compile(r"\n*")


class ReasoningParser:
    """Divides one choice's text into reasoning and content. How the text comes in pieces makes no difference.

    prompt: the text before it; continued: of which this much is the message that it goes on with. opening: the marker
    that a tool call begins with; None: there are no calls. starts_inside: whether text that begins with no tag, after a
    prompt without any, is reasoning. calls_inside: whether the model may forget the closing tag before a call, which
    then ends the reasoning. drops_close: whether a closing tag that nothing opened is left out of the content.

    [begin, end): the characters of the text that are reasoning for certain, tags aside. is_over: there is no more.
    """

    starts_inside: ClassVar[bool]
    calls_inside: ClassVar[bool] = False
    drops_close: ClassVar[bool] = False

    def __init__(self, prompt: str = "", continued: str = "", opening: str | None = None) -> None:
        self.begin = self.end = 0
        self.is_over = False
        self._opening = opening if self.calls_inside else None
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
            self.begin = self._source.position
            yield from self._source.run(_NEWLINES)
            yield from self._until_close()
            self.is_over = True
            yield from self._source.run(_NEWLINES)
        self.is_over = True
        if inside is None and self.drops_close:
            yield from self._without_close()
        while (text := (yield from self._source.some())) != END:
            self._content.append(text)

    def _until_close(self) -> Reading[None]:
        """Reads the reasoning and the tag that closes it; up to a call, where that closes it."""
        num_newlines = 0  # read, and reasoning only if more of it follows

        def emit(text: str) -> None:
            nonlocal num_newlines
            if thought := text.rstrip("\n"):
                self._reasoning += ["\n" * num_newlines, thought]
                num_newlines = 0
            num_newlines += len(text) - len(thought)
            self.end = self._source.position - num_newlines

        marker = yield from self._source.until(Markers([CLOSE, *filter(None, [self._opening])]), emit)
        self.end = self._source.position
        if marker == CLOSE:
            self._source.read(len(CLOSE))
        elif marker is None:
            self._reasoning.append("\n" * num_newlines)

    def _without_close(self) -> Reading[None]:
        """Reads content up to the first tag, and leaves that out where it is the closing one."""
        if (yield from self._source.until(_TAGS, self._content.append)) == CLOSE:
            self._source.read(len(CLOSE))


class DeepSeekR1Parser(ReasoningParser):
    """DeepSeek R1 and its kind always think: text without a tag is reasoning until the tag that closes it."""

    starts_inside = True


class Qwen3Parser(ReasoningParser):
    """Qwen 3 thinks where it, or the prompt, opens the tag: text without one is the answer. Its tags may be one short:
    a call in the middle of the thinking, or a closing tag alone."""

    starts_inside = False
    calls_inside = True
    drops_close = True


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
    asked: StructuredOutputs, parser: ReasoningParser | None, special_markers: Mapping[str, int],
    call_markers: Collection[str] = (),
) -> StructuredOutputs:  # fmt: skip
    """What the text must be, where a constraint holds for the answer alone: the reasoning before it is free, and so is
    a tool call in its place.

    parser: None where the model does not reason. special_markers: the ids of those markers that are special tokens,
    which no pattern of characters matches. call_markers: those of tool calls, the one they begin with first; none:
    there is no call. Raises ValueError where the constraint is too long to stand in a grammar.
    """

    def written(marker: str) -> str:
        return f"<[{special_markers[marker]}]>" if marker in special_markers else json.dumps(marker)

    if (parser is None or parser.inside is False) and not call_markers:
        return asked
    said = "(answer | call)" if call_markers else "answer"
    lines = [f"answer: {_lark(asked)}"]
    if call_markers:
        tokens = "".join(f" | {written(marker)}" for marker in call_markers if marker in special_markers)
        lines.append(f"call: {written(next(iter(call_markers)))} (/(.|\\n)+/{tokens})*")
    if parser is None or parser.inside is False:
        lines.append(f"start: {said}")
    else:
        thinking = "thought NEWLINES"
        opened = f"({written(OPEN)} {thinking})?" if parser.inside is None else f"{written(OPEN)}? {thinking}"
        if CLOSE in special_markers:
            thought = f"thought: /(.|\\n)*/ {written(CLOSE)}"
        else:
            thought = f"thought[lazy]: /(.|\\n)*{re.escape(CLOSE).replace('/', chr(92) + '/')}/"
        lines += [f"start: {opened} {said}", thought, r"NEWLINES: /\n{0,2}/"]
    try:
        return StructuredOutputs(grammar="\n".join([*lines, ""]))
    except ValueError as error:
        place = "beside tools" if parser is None else "after reasoning"
        raise ValueError(f"{asked.kind} {place}: {error}") from None


def _lark(asked: StructuredOutputs) -> str:
    """A constraint as the right side of a rule, in llguidance's Lark."""
    if asked.grammar is not None:
        return f"%lark {{\n{asked.grammar}\n}}"
    if asked.regex is not None:
        return "/" + re.sub(r"\\.|[/\n]", _escaped, asked.regex, flags=re.DOTALL) + "/"
    if asked.choice is not None:
        return " | ".join(_lark_string(text) for text in dict.fromkeys(asked.choice))
    schema: dict[str, object] = _schema(asked.json) if isinstance(asked.json, str) else {"type": "object"}
    guidance: dict[str, object] = {}
    if asked.disable_any_whitespace:
        guidance["whitespace_flexible"] = False
    if asked.whitespace_pattern is not None:
        guidance["whitespace_pattern"] = asked.whitespace_pattern
    own = schema.get("x-guidance")  # as grammar_text() has it: what a schema itself says of this is kept
    schema["x-guidance"] = {**(own if isinstance(own, dict) else {}), **guidance}
    return "%json " + json.dumps(schema)


def _lark_string(text: str) -> str:
    """A string as Lark has it: as JSON, but for the one control character that JSON lets stand."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _schema(text: str) -> dict[str, object]:
    """A schema's text read. Raises ValueError, also for `true` and the like, which the compiler refuses by itself."""
    try:
        schema = without_unknown_formats(json.loads(text))
    except RecursionError:
        raise ValueError("json is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"json is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"json must be a schema that is an object, not {text[:40]}")
    return schema


def _escaped(match: re.Match[str]) -> str:
    """What would end a pattern, or its line, early."""
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(match[0], match[0])
