"""Chat templates: messages to the text a model was trained on, always in Jinja's sandbox. No torch here."""

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, Any]]

# Variables a template gets from us, and what some clients would name a template or its use by; a request's
# chat_template_kwargs may not set them.
RESERVED = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
        "tokenize", "return_dict",
    }
)  # fmt: skip
MAX_SECONDS = 10.0  # of processor time, for one rendering
MAX_CHARS = 1 << 25  # of one rendering, and of what `*` makes
MAX_EXPONENT_BITS = 4096  # of what `**` makes
MAX_INDENT = 16
CHECK_EVERY = 64  # lookups and operations from one look at the clock to the next


class _TooMuch(Exception):
    """A template goes on for too long, or makes too much text."""


class _Budget(threading.local):
    """What the rendering under way in this thread may still take."""

    deadline = float("inf")
    num_steps = 0

    def begin(self) -> None:
        self.deadline = time.thread_time() + MAX_SECONDS
        self.num_steps = 0

    def step(self) -> None:
        self.num_steps += 1
        if self.num_steps % CHECK_EVERY == 0 and time.thread_time() > self.deadline:
            raise _TooMuch(f"it takes more than {MAX_SECONDS:g} s")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also bounds time and size: templates are the model's, but what they loop over is a
    request's. Every loop looks something up, calls something or writes text, and each of these looks at the budget."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.budget = _Budget()

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.step()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.step()
        return super().getitem(obj, argument)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.step()
        if isinstance(getattr(obj, "__self__", None), str):  # ljust, zfill, expandtabs
            _check_padding(obj.__self__, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if operator == "**":
            _check_power(left, right)
        else:
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)


def _check_product(left: Any, right: Any) -> None:
    for text, times in ((left, right), (right, left)):
        if isinstance(times, int) and hasattr(text, "__len__") and len(text) * times > MAX_CHARS:
            raise _TooMuch(f"it repeats a text {times} times")


def _check_padding(text: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    widths = [width for width in (*args, *kwargs.values()) if isinstance(width, int)]
    if isinstance(text, str) and max(widths, default=0) * max(len(text), 1) > MAX_CHARS:
        raise _TooMuch(f"it makes a text {max(widths)} characters wide")


def _padding(pad: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters that pad text, with a bound."""

    def bounded(text: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_padding(text, args, kwargs)
        return pad(text, *args, **kwargs)

    return bounded


def _check_power(left: Any, right: Any) -> None:
    both = isinstance(left, int) and isinstance(right, int)
    if both and abs(left) > 1 and right * left.bit_length() > MAX_EXPONENT_BITS:
        raise _TooMuch("it raises a number to too high a power")


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
    if isinstance(indent, int) and indent > MAX_INDENT:
        raise _TooMuch(f"it indents by {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template. special_tokens: its variables such as bos_token.

    variables: what it reads beyond those that are always there. A template that never names the role "developer" gets
    such messages as system messages. Raises ValueError, naming `origin`, when the source is not a template.
    """

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str]) -> None:
        self._environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        filters = self._environment.filters
        filters |= {"tojson": _tojson, "center": _padding(filters["center"]), "indent": _padding(filters["indent"])}
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = self._environment.from_string(source)
            read = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise ValueError(f"{origin}: the chat template is not valid Jinja: {error}") from None
        self._fixed = RESERVED.union(self._special_tokens, self._environment.globals)
        self.variables = frozenset(read) - self._fixed
        self._knows_developer = any(f"{quote}developer{quote}" in source for quote in "\"'")
        self._wants_parts = self._shows_only_parts()

    def _shows_only_parts(self) -> bool:
        """Whether messages' text must come as a list of parts, as templates of some multimodal models have it."""
        mark = uuid.uuid4().hex

        def shows(content: Any) -> bool:
            try:
                return mark in self._run([{"role": "user", "content": content}], True, None, None, {})
            except ValueError:  # it wants more than this message, and says so once it gets a real one
                return False

        return not shows(mark) and shows([{"type": "text", "text": mark}])

    def render(
        self,
        messages: Messages,
        /,
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. With continue_final_message it ends inside the last message, which the model goes on with.

        Raises ValueError when the template refuses the messages, takes too long over them, or the options contradict
        each other.
        """
        for name in variables:
            if name in self._fixed:
                raise ValueError(f"chat_template_kwargs must not set {name}")

        def run(messages: Messages, add_generation_prompt: bool) -> str:
            if not self._knows_developer:
                messages = _without_developer(messages, keep_last=continue_final_message)
            if self._wants_parts:
                messages = [_with_parts(message) for message in messages]
            return self._run(messages, add_generation_prompt, tools, documents, variables)

        if not continue_final_message:
            return run(messages, add_generation_prompt)
        if add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message cannot both be true")
        return _continued(messages, lambda marked: run(marked, False))

    def _run(
        self, messages: Messages, add_generation_prompt: bool, tools: Any, documents: Any, variables: Mapping[str, Any]
    ) -> str:
        ours = {
            "messages": messages, "tools": tools, "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        budget, pieces, num_chars = self._environment.budget, [], 0
        budget.begin()
        try:
            for piece in self._template.generate({**variables, **self._special_tokens, **ours}):
                budget.step()
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_CHARS:
                    raise _TooMuch(f"it makes more than {MAX_CHARS} characters")
        except _TooMuch as error:
            raise ValueError(f"the chat template is too much work with these messages and variables: {error}") from None
        except (
            jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
        ) as error:  # fmt: skip
            # Templates check their input with raise_exception, or by failing on it.
            raise ValueError(f"the chat template refuses these messages: {str(error)[:500]}") from None
        return "".join(pieces)


def _without_developer(messages: Messages, keep_last: bool) -> Messages:
    """Where there are messages of the role developer: these and the system's as one system message, the first, since
    templates look for one there alone. keep_last: the last stays where it is, to be gone on with."""
    if not any(message.get("role") == "developer" for message in messages):
        return messages
    head, last = (messages[:-1], [messages[-1]]) if keep_last else (messages, [])
    told = [message for message in head if message.get("role") in ("developer", "system")]
    others = [message for message in head if message.get("role") not in ("developer", "system")]
    last = [{**message, "role": "system"} if message.get("role") == "developer" else message for message in last]
    if not told:
        return [*others, *last]
    return [{**told[0], "role": "system", "content": _joined([message.get("content") for message in told])},
            *others, *last]  # fmt: skip


def _joined(contents: Sequence[Any]) -> Any:
    """Contents as one: a text where all are, else a list of parts."""
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    parts: list[Any] = []
    for content in contents:
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    return parts


def _with_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _continued(messages: Messages, render: Callable[[Messages], str]) -> str:
    """The rendering up to the end of the last message's text, whatever the template adds after it.

    A mark no message can hold shows where that is. The space after it goes where the template trims messages: then the
    text's own last spaces go too.
    """
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise ValueError("continue_final_message needs a last message with text content")
    content, mark = messages[-1]["content"], uuid.uuid4().hex
    text = render([*messages[:-1], {**messages[-1], "content": f"{content}{mark} "}])
    end = text.rfind(mark)
    if end < 0 or content.strip() not in text:
        raise ValueError("continue_final_message: the chat template leaves out text of the last message")
    return text[:end] if text.startswith(mark + " ", end) else text[:end].rstrip()


class ChatTemplates:
    """The templates of one model by name: "default", and "tool_use" for conversations with tools where there is one."""

    def __init__(self, by_name: Mapping[str, ChatTemplate]) -> None:
        self._default = by_name["default"]
        self._tool_use = by_name.get("tool_use", self._default)

    def pick(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        """As transformers picks it: an empty list of tools counts as tools."""
        return self._default if tools is None else self._tool_use

    @property
    def variables(self) -> frozenset[str]:
        """What the templates read beyond what is always there: a request's chat_template_kwargs can set these."""
        return self._default.variables | self._tool_use.variables
