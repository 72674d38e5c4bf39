"""Tool calls as Llama 3.1 to 3.3 write them. No torch here.

    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": ...}

The tag is often missing: an object is taken for a call where a line begins, after the tag or after another call. An
object with other keys than a call has is content as soon as that shows.
"""

import re

from infer.serve.tools.json_text import BEFORE_CALL, BEFORE_KEY, CallEnd, JsonCallParser
from infer.serve.tools.source import Markers, Reading

TAG = "<|python_tag|>"
_OPENING = Markers((TAG,), at_line=("{",), then={TAG: BEFORE_CALL, "{": BEFORE_KEY})
_NONE = Markers(())
_SEPARATORS = re.compile(r"[;,\s]*")


class Llama3JsonParser(JsonCallParser):
    """Objects, parted by semicolons or nothing."""

    markers = (TAG,)
    opening = TAG
    needs_special_opening = True
    needs_arguments = True  # {"name": "Paris"} may well be an answer
    other_keys = ("type", "id")

    def _read(self) -> Reading[None]:
        while (marker := (yield from self._until(_OPENING))) is not None:
            if marker == TAG:
                yield from self._source.space()
            else:
                self._source.back(1)
            end = yield from self._call_object()
            if end is CallEnd.NO_CALL:
                self._give_up()
                continue
            if end is CallEnd.IN_ARGUMENTS:
                yield from self._rest_of_arguments(_NONE)
            # Held back like white space: they part calls, unless content follows.
            self._space += yield from self._source.run(_SEPARATORS)
