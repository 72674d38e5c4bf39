"""Tool calls as Mistral's models write them. No torch here.

    [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, ...]     the older ones
    [TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]...                          from tokenizer version 11 on
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}                                   from version 13 on

Between the name and [ARGS] there may be [CALL_ID] and an id, which is left out: ids are made here.
"""

import re
import secrets
import string

from infer.serve.tools.json_text import CallEnd, JsonCallParser, NotJson
from infer.serve.tools.source import Markers, Reading

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
ID_CHARS = 9  # its chat templates take no other ids
MAX_NAME_CHARS = 256
_WORD = re.compile(r"[\w.:/-]*")  # names and ids
_NEXT = Markers((CALLS,))
_OPENING = Markers((CALLS,), then={CALLS: r"(?!\s*+[^\s\[{\w.:/-])"})


class MistralParser(JsonCallParser):
    """A list of objects, or name and arguments, after each marker."""

    markers = (CALLS, ARGS, CALL_ID)
    opening = CALLS

    @staticmethod
    def new_id() -> str:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_CHARS))

    def _read(self) -> Reading[None]:
        while (yield from self._until(_OPENING)) is not None:
            yield from self._source.space()
            char = yield from self._source.peek()
            if char == "[":
                yield from self._call_list(_NEXT)
            elif char == "{":
                end = yield from self._call_object()
                yield from self._end_call(end)
            else:
                yield from self._named_call()

    def _named_call(self) -> Reading[None]:
        name = yield from self._word(MAX_NAME_CHARS)
        if (yield from self._source.skip(CALL_ID)):
            yield from self._word(MAX_NAME_CHARS)
        yield from self._source.skip(ARGS)
        yield from self._source.space()
        if not name or (yield from self._source.peek()) != "{":
            self._give_up()
            return
        self._begin_call(name)
        try:
            yield from self._stream_arguments()
        except NotJson:
            yield from self._end_call(CallEnd.IN_ARGUMENTS)

    def _word(self, most: int) -> Reading[str]:
        """A name or an id."""
        word = yield from self._source.run(_WORD, most + 1)
        return word if len(word) <= most else ""

    def _end_call(self, end: CallEnd) -> Reading[None]:
        if end is CallEnd.NO_CALL:
            self._give_up()
        elif end is CallEnd.IN_ARGUMENTS:
            marker = yield from self._rest_of_arguments(_NEXT)
            self._source.back(len(marker or ""))
