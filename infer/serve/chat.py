"""Chat templates: messages to the text a model was trained on, always in Jinja's sandbox. No torch here."""

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Variables a template gets from us; a request's chat_template_kwargs may not replace them.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's part for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template. special_tokens: its variables such as bos_token.

    Raises ValueError, naming `origin`, when the source is not a template.
    """

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{origin}: the chat template is not valid Jinja: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. With continue_final_message it ends inside the last message, which the model goes on with.

        Raises ValueError when the template refuses the messages, or the options contradict each other.
        """
        for name in variables:
            if name in RESERVED or name in self._special_tokens:
                raise ValueError(f"chat_template_kwargs must not set {name}")
        if not continue_final_message:
            return self._render(messages, add_generation_prompt, variables)
        if add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message cannot both be true")
        if not messages or not isinstance(messages[-1].get("content"), str):
            raise ValueError("continue_final_message needs a last message with text content")
        # A mark no message can hold shows where the last message's text ends, whatever the template adds after it.
        # The space after it goes where the template trims messages: then the text's own last spaces go too.
        content, mark = messages[-1]["content"], uuid.uuid4().hex
        text = self._render([*messages[:-1], {**messages[-1], "content": f"{content}{mark} "}], False, variables)
        end = text.rfind(mark)
        if end < 0 or content.strip() not in text:
            raise ValueError("continue_final_message: the chat template leaves out text of the last message")
        return text[:end] if text.startswith(mark + " ", end) else text[:end].rstrip()

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        ours = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        context = {**variables, **self._special_tokens, **ours}
        try:
            return self._template.render(context)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            # Templates check their input with raise_exception, or by failing on it.
            raise ValueError(f"the chat template refuses these messages: {str(error)[:500]}") from None
