"""Tool calls as Hermes 2 and 3, Qwen 2.5 and Qwen 3 write them. No torch here.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from infer.serve.tools.json_text import CallEnd, JsonCallParser
from infer.serve.tools.source import Reading

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(JsonCallParser):
    """One object between each pair of tags."""

    markers = (OPEN, CLOSE)

    def _read(self) -> Reading[None]:
        is_open = False  # a call was made whose closing tag is still to come
        while True:
            marker = yield from self._until((OPEN, CLOSE) if is_open else (OPEN,))
            if marker is None:
                return
            if marker == CLOSE:
                self._close()
                is_open = False
                continue
            yield from self._source.space()
            end = yield from self._call_object()
            if end is CallEnd.NO_CALL:
                self._give_up()
                continue
            is_open = True
            if end is CallEnd.IN_ARGUMENTS and (yield from self._rest_of_arguments((CLOSE,))) == CLOSE:
                self._close()
                is_open = False

    def _close(self) -> None:
        self._source.unmark()
        self._space = ""
