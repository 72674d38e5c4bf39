"""What a model writes where tool_choice makes it call: JSON alone, as grammar.py constrains it. No torch here."""

from collections.abc import Callable

from infer.serve.tools.json_text import JsonCallParser
from infer.serve.tools.source import END, Markers, Reading

_NONE = Markers(())


class RequiredParser(JsonCallParser):
    """tool_choice required: an array of {"name": ..., "parameters": {...}}."""

    def _read(self) -> Reading[None]:
        self._source.mark()
        yield from self._source.space()
        if (yield from self._source.peek()) == "[":
            yield from self._call_list(_NONE)
        else:
            self._give_up()
        yield from self._until(_NONE)


class NamedParser(JsonCallParser):
    """tool_choice names a tool: the text is its arguments."""

    def __init__(self, name: str, make_id: Callable[[], str] | None = None) -> None:
        super().__init__(make_id=make_id)
        self._name = name

    def _read(self) -> Reading[None]:
        yield from self._source.space()
        while (text := (yield from self._source.some())) != END:
            if not self.num_calls:
                self._begin_call(self._name)
            self._arguments(text)
