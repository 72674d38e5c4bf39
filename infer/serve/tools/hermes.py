"""Tool calls as Hermes 2 and 3, Qwen 2.5 and Qwen 3 write them. No torch here.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from infer.serve.tools.json_text import BEFORE_CALL, CallEnd, JsonCallParser
from infer.serve.tools.source import Markers, Reading

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OPENING = Markers((OPEN,), then={OPEN: BEFORE_CALL})
_OPENING_OR_CLOSING = Markers((OPEN, CLOSE), then={OPEN: BEFORE_CALL})
_CLOSING = Markers((CLOSE,))


class HermesParser(JsonCallParser):
    """One object between each pair of tags."""

    markers = (OPEN, CLOSE)
    opening = OPEN

    def _read(self) -> Reading[None]:
        is_open = False  # a call was made whose closing tag is still to come
        while True:
            marker = yield from self._until(_OPENING_OR_CLOSING if is_open else _OPENING)
            if marker is None:
                return
            if marker == CLOSE:
                self._leave_out()
                is_open = False
                continue
            yield from self._source.space()
            end = yield from self._call_object()
            if end is CallEnd.NO_CALL:
                self._give_up()
                continue
            is_open = True
            if end is CallEnd.IN_ARGUMENTS and (yield from self._rest_of_arguments(_CLOSING)) == CLOSE:
                self._leave_out()
                is_open = False
