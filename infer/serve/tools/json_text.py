"""JSON that is still coming: a scanner that checks it, and the call objects most formats write. No torch here."""

import enum
import json
import re
from typing import ClassVar

from infer.serve.tools.base import ToolParser
from infer.serve.tools.source import END, Markers, Reading

MAX_DEPTH = 200  # of brackets; what clients read JSON with gives up at some depth as well
_WORD = re.compile(r"[\w.+-]*")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+")
# What follows the marker of a call whose object may still come, and the bracket of one that may still have a name.
BEFORE_KEY = r'(?!\s*+[^\s"])'
BEFORE_CALL = r'(?!\s*+(?:[^\s{]|\{\s*+[^\s"]))'
_KEY = re.compile(r'\s*+"([^"\\\x00-\x1f]*+)"\s*+:\s*+(?=\S)')  # one that is plain
_STRING = re.compile(r'"([^"\\\x00-\x1f]*+)"')

# Whole pieces of JSON, each of them read by one regular expression. Nothing is given back once it matched: the time is
# linear, and what does not match is left for the scanner, which goes by single characters.
_SPACE = r"[ \t\n\r]*+"
_IN_STRING = r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+'
_KEY_COLON = rf'"{_IN_STRING}"{_SPACE}:{_SPACE}'
_FLAT = rf'(?:"{_IN_STRING}"|{NUMBER.pattern}|true|false|null|\[{_SPACE}\]|\{{{_SPACE}\}})'
_NESTED = 3  # levels of brackets in a value that one expression reads


def _value_pattern(levels: int) -> str:
    """A value of at most so many levels of brackets, but for empty ones inside."""
    if levels == 0:
        return _FLAT
    inner = _value_pattern(levels - 1)
    items, members = (
        rf"(?:{one}{_SPACE}(?:(?=[\]}}])|,{_SPACE}(?![\]}}])))++" for one in (inner, _KEY_COLON + inner)
    )
    return rf"(?:{_FLAT}|\[{_SPACE}{items}\]|\{{{_SPACE}{members}\}})"


class _Expect:
    """What comes next."""

    VALUE = 0
    VALUE_OR_END = 1  # after "["
    KEY = 2
    KEY_OR_END = 3  # after "{"
    COLON = 4
    COMMA_OR_END = 5
    IN_STRING = 6
    ESCAPED = 7
    HEX = 8
    IN_WORD = 9  # a number, true, false or null


_WHITE = re.compile(_SPACE)
_STRING_RUN = re.compile(_IN_STRING)
_ITEMS = re.compile(rf"(?:{_SPACE}{_value_pattern(_NESTED)}{_SPACE},)*+{_SPACE}")
_MEMBERS = re.compile(rf"(?:{_SPACE}{_KEY_COLON}{_value_pattern(_NESTED)}{_SPACE},)*+{_SPACE}")


class JsonScanner:
    """Reads one JSON value in pieces and stops behind it, or before the first character that is not JSON.

    The stack of brackets is a list: deep nesting costs no recursion. done: the value is complete (a number only once
    something follows it). broken: it is not JSON.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._expect = _Expect.VALUE
        self._stack: list[str] = []
        self._is_key = False
        self._num_hex = 0
        self._word: list[str] = []

    def scan(self, text: str) -> int:
        """Takes more text; returns how many of its characters belong to the value."""
        at = 0
        while at < len(text) and not (self.done or self.broken):
            if self._expect == _Expect.IN_STRING:
                at = _match_end(_STRING_RUN, text, at)
                if at < len(text):
                    at += self._end_run(text[at])
            elif self._expect == _Expect.IN_WORD:
                end = _match_end(_WORD, text, at)
                self._word.append(text[at:end])
                at = end
                if at < len(text):
                    self._end_word()
            else:
                if self._expect < _Expect.COLON or (self._expect < _Expect.IN_STRING and text[at] in " \t\n\r"):
                    at = self._run(text, at)
                if at < len(text):
                    at += self._step(text[at])
        return at

    def _run(self, text: str, at: int) -> int:
        """Where the white space ends, and the next members of the innermost array or object that are whole."""
        expect, pattern = self._expect, _WHITE
        in_array = bool(self._stack) and self._stack[-1] == "]"
        if len(self._stack) + _NESTED < MAX_DEPTH:
            if expect in (_Expect.KEY, _Expect.KEY_OR_END):
                pattern = _MEMBERS
            elif expect == _Expect.VALUE_OR_END or (expect == _Expect.VALUE and in_array):
                pattern = _ITEMS
        end = _match_end(pattern, text, at)
        if pattern is not _WHITE and "," in text[at:end]:
            self._expect = _Expect.VALUE if in_array else _Expect.KEY
        return end

    def _end_run(self, char: str) -> bool:
        """A string's run of plain characters ends at this one. Returns whether it belongs to the value."""
        if char == '"':
            self._expect = _Expect.COLON if self._is_key else self._after_value()
        elif char == "\\":
            self._expect = _Expect.ESCAPED
        else:
            self.broken = True  # a control character
        return not self.broken

    def _end_word(self) -> None:
        word = "".join(self._word)
        if word not in ("true", "false", "null") and not NUMBER.fullmatch(word):
            self.broken = True
        self._expect = self._after_value()

    def _after_value(self) -> int:
        self.done = not self._stack and not self.broken
        return _Expect.COMMA_OR_END

    def _step(self, char: str) -> bool:
        """Takes a character outside of strings' runs, words and white space. Returns whether it is the value's."""
        expect = self._expect
        if expect == _Expect.ESCAPED:
            self._num_hex = 4 if char == "u" else 0
            self._expect = _Expect.HEX if char == "u" else _Expect.IN_STRING
            self.broken = char not in '"\\/bfnrtu'
        elif expect == _Expect.HEX:
            self._num_hex -= 1
            self._expect = _Expect.HEX if self._num_hex else _Expect.IN_STRING
            self.broken = char not in "0123456789abcdefABCDEF"
        elif expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self._begin_value(char)
        elif expect in (_Expect.KEY, _Expect.KEY_OR_END) and char == '"':
            self._is_key, self._expect = True, _Expect.IN_STRING
        elif expect == _Expect.COLON and char == ":":
            self._expect = _Expect.VALUE
        elif expect == _Expect.COMMA_OR_END and char == ",":
            self._expect = _Expect.KEY if self._stack[-1] == "}" else _Expect.VALUE
        elif expect in (_Expect.KEY_OR_END, _Expect.COMMA_OR_END):
            self._close(char)
        else:
            self.broken = True
        return not self.broken and self._expect != _Expect.IN_WORD

    def _begin_value(self, char: str) -> None:
        if char in "{[":
            self._stack.append("}" if char == "{" else "]")
            self._expect = _Expect.KEY_OR_END if char == "{" else _Expect.VALUE_OR_END
            self.broken = len(self._stack) > MAX_DEPTH
        elif char == '"':
            self._is_key, self._expect = False, _Expect.IN_STRING
        elif char == "]" and self._expect == _Expect.VALUE_OR_END:
            self._close(char)
        elif _WORD.match(char)[0]:  # type: ignore[index]
            self._word, self._expect = [], _Expect.IN_WORD  # which reads this character itself
        else:
            self.broken = True

    def _close(self, char: str) -> None:
        if char != self._stack[-1]:
            self.broken = True
            return
        self._stack.pop()
        self._expect = self._after_value()


def is_json(text: str) -> bool:
    """Whether a text is one JSON value (an object, an array or a string) and nothing else."""
    scanner = JsonScanner()
    return scanner.scan(text) == len(text) and scanner.done


def _match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None  # both may match nothing
    return found.end()


class CallEnd(enum.Enum):
    """How the reading of a call object ended."""

    NO_CALL = enum.auto()  # nothing was given out; the source's mark has all of it
    WHOLE = enum.auto()
    IN_ARGUMENTS = enum.auto()  # they are not JSON, or the text is over
    AFTER_ARGUMENTS = enum.auto()


class NotJson(Exception):
    """What comes next, not yet read, is not what JSON or a call would have."""


class JsonCallParser(ToolParser):
    """What formats with JSON calls share: {"name": ..., "arguments": {...}}, with the keys in any order.

    argument_keys: what the arguments may be called. needs_arguments: an object without any is no call; else its
    arguments are {}. other_keys: what else a call's object may have; None: anything.
    """

    argument_keys: ClassVar[tuple[str, ...]] = ("arguments", "parameters")
    needs_arguments: ClassVar[bool] = False
    other_keys: ClassVar[tuple[str, ...] | None] = None

    def _call_object(self) -> Reading[CallEnd]:
        """Reads one call's object, giving out its arguments as they come. The source has a mark, which goes when the
        call begins."""
        num_before = self.num_calls
        try:
            name, arguments = yield from self._members()
        except NotJson:
            if self.num_calls == num_before:
                return CallEnd.NO_CALL
            return CallEnd.AFTER_ARGUMENTS if self.is_whole else CallEnd.IN_ARGUMENTS
        if self.num_calls == num_before:
            if not name or (arguments is None and self.needs_arguments):
                return CallEnd.NO_CALL
            self._begin_call(name)
            self._arguments(arguments or "{}")
            self.is_whole = True
        return CallEnd.WHOLE

    def _members(self) -> Reading[tuple[str | None, str | None]]:
        """Reads an object; returns name and arguments as far as they were not given out."""
        name: str | None = None
        arguments: str | None = None
        begun = False
        yield from self._expect("{")
        while True:
            key = yield from self._key()
            if begun or key not in ("name", *self.argument_keys):
                if not begun and self.other_keys is not None and key not in self.other_keys:
                    raise NotJson
                yield from self._value()
            elif key == "name":
                name = yield from self._string()
            elif name and (yield from self._source.peek()) == "{":
                self._begin_call(name)
                begun = True
                yield from self._stream_arguments()
            else:
                arguments = _object_text((yield from self._value()))
            yield from self._source.space()
            if (yield from self._source.peek()) == "}":
                yield from self._source.next()
                return name, arguments
            yield from self._expect(",")

    def _key(self) -> Reading[str]:
        if (plain := self._source.take(_KEY)) is not None:
            return plain[1]
        yield from self._source.space()
        key = yield from self._string()
        yield from self._source.space()
        yield from self._expect(":")
        yield from self._source.space()
        return key

    def _expect(self, char: str) -> Reading[None]:
        if (yield from self._source.peek()) != char:
            raise NotJson
        yield from self._source.next()

    def _string(self) -> Reading[str]:
        if (plain := self._source.take(_STRING)) is not None:
            return plain[1]
        if (yield from self._source.peek()) != '"':
            raise NotJson
        return _string_text((yield from self._value()))

    def _value(self) -> Reading[str]:
        """The text of one whole JSON value."""
        scanner, pieces = JsonScanner(), []
        while not scanner.done:
            text = yield from self._source.some()
            used = scanner.scan(text)
            self._source.back(len(text) - used)
            if text == END or scanner.broken:
                raise NotJson
            pieces.append(text[:used])
        return "".join(pieces)

    def _stream_arguments(self) -> Reading[None]:
        """Gives out a JSON object as it comes."""
        scanner = JsonScanner()
        while not scanner.done:
            text = yield from self._source.some()
            used = scanner.scan(text)
            self._arguments(text[:used])
            self._source.back(len(text) - used)
            if text == END or scanner.broken:
                raise NotJson
        self.is_whole = True

    def _call_list(self, stops: Markers) -> Reading[None]:
        """Reads an array of calls' objects. The source has a mark. stops: where arguments that are no JSON end."""
        yield from self._source.next()  # "["
        while True:
            yield from self._source.space()
            end = yield from self._call_object()
            if end is CallEnd.NO_CALL:
                self._give_up()
                return
            if end is CallEnd.IN_ARGUMENTS:
                marker = yield from self._rest_of_arguments(stops)
                self._source.back(len(marker or ""))
                return
            yield from self._source.space()
            self._source.mark()
            char = yield from self._source.peek()
            if char in ("]", ","):
                yield from self._source.next()
            if char != ",":
                self._source.unmark()
                return

    def _rest_of_arguments(self, markers: Markers) -> Reading[str | None]:
        """Arguments that are no JSON go on to one of the markers, or to the end of the text. The bracket that closes
        the call's object before the marker is left out."""
        held: list[str] = []  # white space with at most one closing bracket in it

        def emit(text: str) -> None:
            nonlocal held
            held.append(text)
            if not text.isspace():
                text = "".join(held)
                cut = len(text.rstrip().removesuffix("}").rstrip())
                self._arguments(text[:cut])
                held = [text[cut:]]

        marker = yield from self._until(markers, emit)
        if marker is None:
            self._arguments("".join(held))
        self.is_whole = marker is not None
        return marker


def _object_text(value: str) -> str:
    """The arguments that came before the name, or not as an object: null is {}, a string may hold an object's text."""
    if value == "null":
        return "{}"
    if value.startswith('"'):
        value = _string_text(value).strip()
    if not value.startswith("{") or not is_json(value):
        raise NotJson
    return value


def _string_text(value: str) -> str:
    """What a JSON string says. Raises NotJson where that is no text: an escaped half of a surrogate pair."""
    text = str(json.loads(value))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotJson from None
    return text
