"""Tool calls as Qwen 3 Coder writes them. No torch here.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Values are plain text, typed by the tool's schema: what it wants as a string is taken as it stands, the newline after
the opening and before the closing tag aside; anything else is read as JSON or a Python literal, and stays a string
where it is neither.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from infer.serve.tools.base import ToolParser
from infer.serve.tools.json_text import NUMBER, is_json
from infer.serve.tools.literals import literal_json
from infer.serve.tools.source import Markers, Reading, or_cut

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MAX_NAME_CHARS = 256
_IN_NAME = re.compile(r"[^<>\n]*")
_THEN = {
    OPEN: rf"(?=\s*+{or_cut(FUNCTION)})",
    FUNCTION: rf"(?=[^<>\n]{{0,{MAX_NAME_CHARS}}}+(?:>|\Z))",
    PARAMETER: rf"(?=[^<>\n]{{0,{MAX_NAME_CHARS}}}+(?:>|\Z))",
}
_OPENING = Markers((OPEN, FUNCTION), then=_THEN)
_OPENING_OR_CLOSING = Markers((OPEN, FUNCTION, CLOSE), then=_THEN)
_IN_CALL = Markers((PARAMETER, END_FUNCTION, CLOSE), then=_THEN)
_IN_VALUE = Markers((END_PARAMETER, PARAMETER, END_FUNCTION))


class Qwen3CoderParser(ToolParser):
    """Strings come out as they are written, other values when they are complete."""

    markers = (OPEN, CLOSE, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)
    opening = OPEN

    def _read(self) -> Reading[None]:
        is_open = False  # a call was made whose closing tag is still to come
        while True:
            # Models forget the outer tag now and then.
            marker = yield from self._until(_OPENING_OR_CLOSING if is_open else _OPENING)
            if marker is None:
                return
            if marker == CLOSE:
                self._leave_out()
                is_open = False
                continue
            if marker == OPEN:
                yield from self._source.space()
                if not (yield from self._source.skip(FUNCTION)):
                    self._give_up()
                    continue
            name = yield from self._name()
            if name is None:
                self._give_up()
                continue
            self._begin_call(name)
            yield from self._parameters(self._properties(name))
            is_open = True

    def _name(self) -> Reading[str | None]:
        """The rest of a tag up to its bracket; None where it is no name."""
        name = yield from self._source.run(_IN_NAME, MAX_NAME_CHARS)
        if not (yield from self._source.skip(">")):
            return None
        return name.strip() or None

    def _properties(self, name: str) -> Mapping[str, Any]:
        for tool in self._tools:
            if tool["function"]["name"] == name:
                properties = tool["function"].get("parameters", {}).get("properties")
                return properties if isinstance(properties, Mapping) else {}
        return {}

    def _parameters(self, properties: Mapping[str, Any]) -> Reading[None]:
        """Gives out the arguments. A closing tag that was forgotten costs nothing: what can follow it ends a value
        too. Anything else between the tags is content."""
        self._arguments("{")
        separator = ""
        marker = yield from self._until(_IN_CALL)
        while marker == PARAMETER:
            name = yield from self._name()
            if name is None:
                self._give_up()
            else:
                self._leave_out()
                self._arguments(f"{separator}{_quoted(name)}: ")
                separator = ", "
                value = _Value(self._arguments, _types(properties.get(name)))
                marker = yield from self._until(_IN_VALUE, value.add)
                value.end(marker is None)
                if marker in (PARAMETER, END_FUNCTION):
                    continue
            marker = yield from self._until(_IN_CALL)
        if marker is None:
            return  # what is missing shows in the arguments
        self._arguments("}")
        self.is_whole = True
        if marker == CLOSE:
            self._source.back(len(CLOSE))
        self._leave_out()


class _Value:
    """One parameter on its way to JSON. types: what its schema allows; nothing: a string."""

    def __init__(self, emit: Callable[[str], None], types: frozenset[str]) -> None:
        self._emit = emit
        self._types = types
        self._is_text = types <= {"string"}
        self._begun = False
        self._newline = ""  # the string's, which may be its last
        self._held: list[str] = []  # of another value, all of it

    def add(self, text: str) -> None:
        if not self._is_text:
            self._held.append(text)
            return
        if not self._begun:
            self._begun = True
            self._emit('"')
            text = text.removeprefix("\n")
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        self._emit(_quoted(text.removesuffix("\n"))[1:-1])

    def end(self, is_cut: bool) -> None:
        """is_cut: the text is over before the value is; what there is of it stays as it is."""
        held = "".join(self._held)
        if is_cut:
            self._emit(held)
        elif self._is_text:
            self._emit('"' if self._begun else '""')
        else:
            self._emit(_typed(held.removeprefix("\n").removesuffix("\n"), self._types))


def _typed(text: str, types: frozenset[str]) -> str:
    """A value as JSON of one of the types; as a string where it is none of them."""
    word = text.strip()
    if word.lower() in ("null", "none") and "null" in types:
        return "null"
    if word.lower() in ("true", "false") and "boolean" in types:
        return word.lower()
    if types & {"integer", "number"} and NUMBER.fullmatch(word):
        return word
    for kind, bracket in (("object", "{"), ("array", "[")):
        if kind in types and word.startswith(bracket):
            if is_json(word):
                return word
            try:
                return literal_json(word)
            except ValueError:
                break
    return _quoted(text)


def _types(schema: Any) -> frozenset[str]:
    """The JSON types a property's schema names, alternatives included. Nobody checked that it is a schema."""
    types, left = set(), [schema]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            named = one.get("type")
            types |= {item for item in (named if isinstance(named, list) else [named]) if isinstance(item, str)}
            for key in ("anyOf", "oneOf"):
                left += one[key] if isinstance(one.get(key), list) else []
    return frozenset(types)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
