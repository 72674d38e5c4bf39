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
from collections.abc import Callable, Mapping
from typing import Any

from infer.serve.tools.base import ToolParser
from infer.serve.tools.json_text import NUMBER, is_json
from infer.serve.tools.literals import literal_json
from infer.serve.tools.source import END, Reading

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MAX_NAME_CHARS = 256


class Qwen3CoderParser(ToolParser):
    """Strings come out as they are written, other values when they are complete."""

    markers = (OPEN, CLOSE, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)

    def _read(self) -> Reading[None]:
        is_open = False  # a call was made whose closing tag is still to come
        while True:
            # Models forget the outer tag now and then.
            marker = yield from self._until((OPEN, FUNCTION, CLOSE) if is_open else (OPEN, FUNCTION))
            if marker is None:
                return
            if marker == CLOSE:
                self._source.unmark()
                self._space, is_open = "", False
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
        name = ""
        while (char := (yield from self._source.next())) != ">":
            if char == END or char in "<\n" or len(name) == MAX_NAME_CHARS:
                self._source.back(len(char))
                return None
            name += char
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
        marker = yield from self._until((PARAMETER, END_FUNCTION, CLOSE))
        while marker == PARAMETER:
            name = yield from self._name()
            if name is None:
                self._give_up()
            else:
                self._source.unmark()
                self._space = ""
                self._arguments(f"{separator}{_quoted(name)}: ")
                separator = ", "
                value = _Value(self._arguments, _types(properties.get(name)))
                marker = yield from self._until((END_PARAMETER, PARAMETER, END_FUNCTION), value.add)
                value.end(marker is None)
                if marker in (PARAMETER, END_FUNCTION):
                    continue
            marker = yield from self._until((PARAMETER, END_FUNCTION, CLOSE))
        if marker is None:
            return  # what is missing shows in the arguments
        self._arguments("}")
        if marker == CLOSE:
            self._source.back(len(CLOSE))
        self._source.unmark()
        self._space = ""


class _Value:
    """One parameter on its way to JSON. types: what its schema allows; nothing: a string."""

    def __init__(self, emit: Callable[[str], None], types: frozenset[str]) -> None:
        self._emit = emit
        self._types = types
        self._is_text = types <= {"string"}
        self._begun = False
        self._held = ""  # of a string, a newline that may be its last; of another value, all of it

    def add(self, text: str) -> None:
        if not self._is_text:
            self._held += text
            return
        if not self._begun:
            self._begun = True
            self._emit('"')
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._emit(_quoted(text.removesuffix("\n"))[1:-1])

    def end(self, is_cut: bool) -> None:
        """is_cut: the text is over before the value is; what there is of it stays as it is."""
        if is_cut:
            self._emit("" if self._is_text else self._held)
        elif self._is_text:
            self._emit('"' if self._begun else '""')
        else:
            self._emit(_typed(self._held.removeprefix("\n").removesuffix("\n"), self._types))


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
    """The JSON types a property's schema names, alternatives included."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {item for item in named or () if isinstance(item, str)}
    for key in ("anyOf", "oneOf"):
        for alternative in schema.get(key) or ():
            types |= _types(alternative)
    return frozenset(types)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
