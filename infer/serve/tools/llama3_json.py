"""Tool calls as Llama 3.1 to 3.3 write them. No torch here.

    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": ...}

The tag is often missing: an object is taken for a call where a line begins, after the tag or after another call. An
object with other keys than a call has is content as soon as that shows.
"""

from infer.serve.tools.json_text import CallEnd, JsonCallParser
from infer.serve.tools.source import END, Reading

TAG = "<|python_tag|>"
_SEPARATORS = ";,"


class Llama3JsonParser(JsonCallParser):
    """Objects, parted by semicolons or nothing."""

    markers = (TAG,)
    needs_arguments = True  # {"name": "Paris"} may well be an answer
    other_keys = ("type", "id")

    def _read(self) -> Reading[None]:
        while (marker := (yield from self._until((TAG, "{")))) is not None:
            if marker == TAG:
                yield from self._source.space()
            elif self._line_is_blank:
                self._source.back(1)
            else:
                self._give_up()
                continue
            end = yield from self._call_object()
            if end is CallEnd.NO_CALL:
                self._give_up()
                continue
            if end is CallEnd.IN_ARGUMENTS:
                yield from self._rest_of_arguments(())
            yield from self._separators()

    def _separators(self) -> Reading[None]:
        """Held back like white space: they part calls, unless content follows."""
        while (char := (yield from self._source.next())) != END and (char in _SEPARATORS or char.isspace()):
            self._space += char
        self._source.back(len(char))
