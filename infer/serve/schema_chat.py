"""The body of POST /v1/chat/completions. No torch here.

The route parses it, then tells it what only the server knows: prepare() how the model writes tool calls and reasoning,
template_variables for the chat template, and rendered() the text that came out. sampling_params() needs both.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from infer.request import StructuredOutputs
from infer.serve.chat import RESERVED
from infer.serve.chat_format import ChatFormat, ChatOutput
from infer.serve.errors import bad_request, show
from infer.serve.messages import IGNORED_INSIDE, template_messages
from infer.serve.reasoning import ReasoningParser, constrain_answer
from infer.serve.schema import SamplingBody
from infer.serve.tools import NamedParser, RequiredParser, ToolParser, named_schema, required_schema

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 << 10  # of all tools' JSON together
MAX_DOCUMENTS = 1024
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")  # OpenAI's names, and those that gateways make with a prefix
# strict stands in the function; some clients put it beside that, where it changes nothing either: it always holds.
_TOOL_FIELDS = {"type", "function", "strict"}


class FunctionName(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool by its name."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """tool_choice, where it is one tool."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(SamplingBody, dict=True):
    """POST /v1/chat/completions. max_tokens is the older name of max_completion_tokens. messages and tools are as
    templates expect them once check() has run."""

    logprobs_field: ClassVar[str] = "top_logprobs"
    # No fields of the body, and without annotations so that msgspec takes them for none.
    format = ChatFormat()  # prepare() tells the server's
    prompt_text = ""  # rendered() tells it
    keeps_special_tokens = False  # the text has them, for the parsers, though the client wants none

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    echo: bool = False
    documents: list[dict[str, str]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def generation_prompt(self) -> bool:
        """Unless said otherwise, exactly one of a new assistant turn and continuing the last message."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def choice_of_tools(self) -> str | NamedTool:
        """tool_choice; where it is left out, the model decides if there are tools."""
        if not self.tools:
            return "none"
        return "auto" if self.tool_choice is None else self.tool_choice

    @property
    def is_forced(self) -> bool:
        """Whether the model must call a tool, by a grammar."""
        return self.choice_of_tools not in ("none", "auto")

    @property
    def names_tool(self) -> bool:
        """Whether it must call this one tool."""
        return isinstance(self.choice_of_tools, NamedTool)

    @property
    def may_call_or_answer(self) -> bool:
        """Whether the model either calls tools or answers as response_format says."""
        shape = self.response_format
        return self.choice_of_tools == "auto" and shape is not None and shape.type != "text"

    @property
    def hides_reasoning(self) -> bool:
        return self.counts_reasoning and not self.include_reasoning

    @property
    def counts_reasoning(self) -> bool:
        return self.format.reasoning_parser is not None

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template gets beside the messages: tools and documents, the request's own variables, and the
        effort as vLLM gives it, which templates that know neither name do not see."""
        effort = self.reasoning_effort
        thinking = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return {
            **thinking, **self.chat_template_kwargs, "tools": self.tools or None, "documents": self.documents,
            "continue_final_message": self.continue_final_message,
        }  # fmt: skip

    @property
    def echoed_text(self) -> str:
        """What goes before each choice's content: with echo, the message it continues or follows, if that is of the
        same role, as in vLLM."""
        last = self.messages[-1]
        return str(last["content"]) if self.echo and last["role"] == self.reply_role else ""

    @property
    def reply_role(self) -> str:
        """Of the choices' messages: a new message is the assistant's, a continued one has its own role."""
        return self.format.response_role if self.generation_prompt else str(self.messages[-1]["role"])

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad_request("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "add_generation_prompt and continue_final_message cannot both be true", "continue_final_message"
            )
        self._check_template_variables()
        if not self.messages:
            raise bad_request("messages is empty; give at least one message", "messages")
        self.messages = template_messages(self.messages)
        self._check_tools()
        self._check_tool_choice()

    def _check_template_variables(self) -> None:
        if self.chat_template_kwargs.get("add_generation_prompt") is self.generation_prompt:  # as vLLM's clients may
            del self.chat_template_kwargs["add_generation_prompt"]
        for name in self.chat_template_kwargs:
            if name in RESERVED:
                raise bad_request(f"chat_template_kwargs must not set {name[:40]}", "chat_template_kwargs")
        effort = self.chat_template_kwargs.get("reasoning_effort", self.reasoning_effort)
        if self.reasoning_effort is not None and effort != self.reasoning_effort:
            message = "reasoning_effort and chat_template_kwargs.reasoning_effort differ; give one of them"
            raise bad_request(message, "reasoning_effort")
        if self.documents is not None and len(self.documents) > MAX_DOCUMENTS:
            raise bad_request(f"documents may hold {MAX_DOCUMENTS} entries, not {len(self.documents)}", "documents")

    def _check_tools(self) -> None:
        if len(self.tools) > MAX_TOOLS:
            raise bad_request(f"tools may hold {MAX_TOOLS} entries, not {len(self.tools)}", "tools")
        self.tools = [_template_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)]
        num_bytes = len(msgspec.json.encode(self.tools))
        if num_bytes > MAX_TOOLS_BYTES:
            raise bad_request(f"tools may have {MAX_TOOLS_BYTES} bytes of JSON together, not {num_bytes}", "tools")
        names = [tool["function"]["name"] for tool in self.tools]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise bad_request(f"tools has two functions named {twice!r}; names must differ", "tools")

    def _check_tool_choice(self) -> None:
        choice = self.tool_choice
        if not self.tools and choice not in (None, "none", "auto"):
            raise bad_request("tool_choice asks for a call, but there are no tools", "tool_choice")
        if isinstance(choice, NamedTool):
            self._named_tool(choice)
        # Beside auto, response_format is what the text must be unless it calls a tool. structured_outputs may well
        # describe a text with calls in it; what the client means then is its own to say.
        if super().grammar() is not None and self.is_forced:
            raise bad_request(
                f"{self.text_field} says what the text must be, so that no tool can be called; leave it out, or set "
                'tool_choice to "auto" or "none"', self.text_field,
            )  # fmt: skip

    def _named_tool(self, choice: NamedTool) -> dict[str, Any]:
        for tool in self.tools:
            if tool["function"]["name"] == choice.function.name:
                return tool
        raise bad_request(f"tool_choice names {show(choice.function.name)}, which is not in tools", "tool_choice")

    def prepare(self, format: ChatFormat) -> None:
        """Tells how the server's model writes tool calls and reasoning. Raises ApiError for what it was not started
        for."""
        self.format = format
        if self.choice_of_tools == "auto" and format.tool_parser is None:
            raise bad_request(
                'tool_choice "auto" needs a server started with --enable-auto-tool-choice and --tool-call-parser; use '
                '"required", a named tool or "none"', "tool_choice",
            )  # fmt: skip
        if self.may_call_or_answer and not format.call_markers:
            raise bad_request(
                "response_format cannot stand beside tools here: in the format of this server's --tool-call-parser, no "
                'marker tells a call from an answer; leave one of them out, or set tool_choice to "none"',
                "response_format",
            )
        self.keeps_special_tokens = self.skip_special_tokens and format.needs_special_tokens(
            self.choice_of_tools == "auto"
        )
        if self.keeps_special_tokens:  # the markers among them are the parsers' to take out, the others output()'s
            self.skip_special_tokens = False

    def _reasoning(self) -> ReasoningParser | None:
        """For one choice; None where the server takes nothing for reasoning."""
        if self.format.reasoning_parser is None:
            return None
        continued = str(self.messages[-1]["content"]) if self.continue_final_message else ""
        calls = self.format.call_markers if self.choice_of_tools == "auto" else ()
        return self.format.reasoning_parser(self.prompt_text, continued, calls[0] if calls else None)

    def rendered(self, text: str) -> None:
        """Tells the prompt's text: templates may open or close the reasoning in it."""
        self.prompt_text = text

    @property
    def grammar_field(self) -> str:
        return "tools" if self.is_forced else self.text_field

    @property
    def text_field(self) -> str:
        """The field beside tool_choice that says what the text must be."""
        return super().grammar_field

    def asked_grammar(self) -> StructuredOutputs | None:
        """What the client says the text must be, with nothing of ours around it. Raises ApiError."""
        return self._tool_grammar() if self.is_forced else super().grammar()

    def grammar(self) -> StructuredOutputs | None:
        """What the text must be: where the model reasons first, after that; where it may call a tool instead, unless
        it does. Raises ApiError."""
        asked = self.asked_grammar()
        if asked is None:
            return None
        calls = self.format.call_markers if self.may_call_or_answer else ()
        try:
            return constrain_answer(asked, self._reasoning(), self.format.special_markers, calls)
        except ValueError as error:
            raise bad_request(str(error), self.grammar_field) from None

    def _tool_grammar(self) -> StructuredOutputs:
        choice = self.choice_of_tools
        try:
            if isinstance(choice, NamedTool):
                return StructuredOutputs(json=named_schema(self._named_tool(choice)))
            return StructuredOutputs(json=required_schema(self.tools, self.parallel_tool_calls))
        except ValueError as error:
            raise bad_request(f"tools: {error}", "tools") from None

    def output(self) -> ChatOutput:
        """What takes one choice's text apart."""
        format, choice = self.format, self.choice_of_tools
        calling: ToolParser | None = None
        if isinstance(choice, NamedTool):
            calling = NamedParser(choice.function.name, format.make_id)
        elif choice == "required":
            calling = RequiredParser(make_id=format.make_id)
        elif choice == "auto" and format.tool_parser is not None:
            calling = format.tool_parser(self.tools)
        return ChatOutput(
            format.other_special_texts() if self.keeps_special_tokens else None,
            self._reasoning(),
            calling,
            None if self.parallel_tool_calls else 1,
            format.call_markers[0] if self.may_call_or_answer and calling is not None else None,
        )

    def shows_token(self, token_id: int) -> bool:
        """Whether a token is part of the text that output() gets to see."""
        if token_id not in self.format.special_ids:
            return True
        return not self.skip_special_tokens and (
            not self.keeps_special_tokens or token_id in self.format.special_markers.values()
        )


def _template_tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool as templates get it, nulls left out. What a function has beyond OpenAI's fields is the template's too."""
    tool = {name: value for name, value in tool.items() if value is not None and name not in IGNORED_INSIDE}
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise bad_request(f'{where} must be {{"type": "function", "function": {{"name": ...}}}}', "tools")
    for name in tool:
        if name not in _TOOL_FIELDS:
            raise bad_request(f"{where}.{name[:40]} is not supported; known are function and type", "tools")
    if not isinstance(tool.get("strict", False), bool):
        raise bad_request(f"{where}.strict must be true or false, not {show(tool['strict'])}", "tools")
    function = {name: value for name, value in function.items() if value is not None and name not in IGNORED_INSIDE}
    named = function.get("name")
    if not isinstance(named, str) or not TOOL_NAME.fullmatch(named):
        raise bad_request(
            f"{where}.function.name must be 1 to 128 letters, digits or any of _ - . : /, not {show(named)}", "tools"
        )
    for field, kind, wanted in _FUNCTION_FIELDS:
        if not isinstance(function.get(field, kind()), kind):
            raise bad_request(f"{where}.function.{field} must be {wanted}, not {show(function[field])}", "tools")
    return {"type": "function", "function": function}


_FUNCTION_FIELDS: tuple[tuple[str, type, str], ...] = (
    ("description", str, "a string"), ("parameters", dict, "a JSON schema"), ("strict", bool, "true or false"),
)  # fmt: skip
