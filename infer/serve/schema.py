"""What OpenAI request bodies share: what is taken, its bounds, and the errors that say so. No torch here.

Every field is one of three: taken (a struct's field), without effect here, or refused by name (both in untaken.py).
null equals absent everywhere.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from infer.request import MAX_BAD_WORDS, MAX_STOP_STRINGS, SamplingParams, StructuredOutputs
from infer.serve.errors import ApiError, bad_request, show
from infer.serve.untaken import check_untaken

MAX_STOP_CHARS = 1024  # of one
MAX_ALL_STOP_CHARS = 8192  # of all together
MAX_WHOLE_FLOAT = 2**53  # up to here every integer has a float of its own
MAX_LOGPROB_ENTRIES = 1 << 18  # held for one reply; each takes some 100 bytes here
# The engine holds stop_token_ids, allowed_token_ids and logit_bias once a choice.
MAX_TOKEN_LIST_ENTRIES = 1 << 20
MAX_TOP_K = 2**31 - 1
MAX_PRIORITY = 2**31 - 1
MAX_CACHE_SALT_CHARS = 256
REQUEST_ID = re.compile(r"[!-~]{1,128}")  # printable ASCII: it stands in headers, replies and log lines
# Checked before anything looks at the entries.
MAX_ENTRIES = {
    "messages": 4096, "stop": MAX_STOP_STRINGS, "stop_token_ids": 1024, "logit_bias": 1024, "bad_words": MAX_BAD_WORDS,
}  # fmt: skip
_NESTED = ("stream_options", "structured_outputs", "response_format")  # objects in which null equals absent as well


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in every chunk.
    include_obfuscation: padding against eavesdroppers, which this server does not add."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """response_format.json_schema. name, description and strict change nothing: the schema always holds strictly."""

    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structured(self) -> StructuredOutputs | None:
        """What the text must be; None: any text. Raises ApiError."""
        if self.type != "json_schema":
            if self.json_schema is not None:
                raise bad_request(
                    f"response_format.json_schema goes with type json_schema, not {self.type}", "response_format"
                )
            return StructuredOutputs(json_object=True) if self.type == "json_object" else None
        if self.json_schema is None or self.json_schema.schema is None:
            missing = "json_schema" if self.json_schema is None else "json_schema.schema"
            raise bad_request(f"response_format.{missing} is missing", "response_format")
        try:
            return StructuredOutputs(json=self.json_schema.schema)
        except ValueError as error:
            raise bad_request(f"response_format.json_schema.schema: {error}", "response_format") from None


class SamplingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields both routes share. SamplingParams checks their ranges."""

    logprobs_field: ClassVar[str]  # the one that num_logprobs comes from

    model: str | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def max_new_tokens(self) -> int | None:
        """What the client asked for; None: the server's default, at most as many as fit."""
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported with each token; None: no logprobs at all."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    @property
    def num_prompt_logprobs_shown(self) -> int:
        """How often the reply repeats the log-probabilities of one prompt."""
        return 0 if self.prompt_logprobs is None else 1

    @property
    def num_generated(self) -> int:
        """Choices the engine generates for each prompt: n, or more where only the best are returned."""
        return self.n

    @property
    def num_choices(self) -> int:
        """All that the engine generates for this body."""
        return max(self.num_generated, 1)

    @property
    def counts_reasoning(self) -> bool:
        """Whether the usage says how many of the tokens generated were reasoning."""
        return False

    @property
    def echoes_prompt(self) -> bool:
        """Whether the reply begins with the prompt's text."""
        return False

    @property
    def echoed_text(self) -> str:
        """What goes before each choice's text, if it is not the prompt's."""
        return ""

    @property
    def only_scores(self) -> bool:
        """Whether no token is wanted, just the prompt's log-probabilities. The engine generates one all the same."""
        return False

    @property
    def is_constrained(self) -> bool:
        """Whether one of these fields says what the text must be."""
        return self.structured_outputs is not None or self.response_format is not None

    @property
    def grammar_field(self) -> str:
        """The field that a constraint on the text came from, for errors."""
        return "structured_outputs" if self.structured_outputs is not None else "response_format"

    def grammar(self) -> StructuredOutputs | None:
        """What the text must be, from whichever field says so; None: any text. Raises ApiError."""
        asked = None if self.response_format is None else self.response_format.structured()
        if asked is not None and self.structured_outputs is not None:
            message = "structured_outputs and response_format both say what the text must be; give one of them"
            raise bad_request(message, "structured_outputs")
        return asked or self.structured_outputs

    def asked_grammar(self) -> StructuredOutputs | None:
        """The same as the client says it, where grammar() puts something around that. Raises ApiError."""
        return self.grammar()

    def check(self) -> None:
        """Raises ApiError for what SamplingParams cannot know."""
        if self.seed == -1:  # vLLM's way to give none
            self.seed = None
        if self.stream_options is not None:
            self._check_stream_options(self.stream_options)
        if self.top_k > MAX_TOP_K:
            raise bad_request(f"top_k must be at most {MAX_TOP_K}, not {self.top_k}", "top_k")
        num_entries = sum(len(x or ()) for x in (self.stop_token_ids, self.allowed_token_ids, self.logit_bias))
        if num_entries * self.num_choices > MAX_TOKEN_LIST_ENTRIES:
            raise bad_request(
                f"stop_token_ids, allowed_token_ids and logit_bias have {num_entries} entries for each of "
                f"{self.num_choices} choices; one request may have {MAX_TOKEN_LIST_ENTRIES}. Send several requests"
            )
        self._check_stop()
        self._check_extras()

    def _check_stop(self) -> None:
        lengths = [len(self.stop)] if isinstance(self.stop, str) else [len(stop) for stop in self.stop or ()]
        if max(lengths, default=0) > MAX_STOP_CHARS:
            raise bad_request(f"a stop string may have {MAX_STOP_CHARS} characters, not {max(lengths)}", "stop")
        if sum(lengths) > MAX_ALL_STOP_CHARS:
            raise bad_request(
                f"the stop strings may have {MAX_ALL_STOP_CHARS} characters together, not {sum(lengths)}", "stop"
            )

    def _check_stream_options(self, options: StreamOptions) -> None:
        asked = next((name for name in options.__struct_fields__ if getattr(options, name)), None)
        if asked is not None and not self.stream:
            raise bad_request(f"stream_options.{asked} needs stream to be true", "stream_options")
        if options.include_obfuscation:
            raise bad_request(
                "stream_options.include_obfuscation is not supported by this server; set it to false", "stream_options"
            )

    def _check_extras(self) -> None:
        keep = self.truncate_prompt_tokens
        if keep is not None and keep < 1 and keep != -1:
            raise bad_request(
                f"truncate_prompt_tokens must be at least 1, or -1 for what fits, not {keep}", "truncate_prompt_tokens"
            )
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            message = f"priority must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, not {self.priority}"
            raise bad_request(message, "priority")
        if self.cache_salt is not None and not 0 < len(self.cache_salt) <= MAX_CACHE_SALT_CHARS:
            raise bad_request(
                f"cache_salt must have 1 to {MAX_CACHE_SALT_CHARS} characters, not {len(self.cache_salt)}", "cache_salt"
            )
        if self.request_id is not None and not REQUEST_ID.fullmatch(self.request_id):
            raise bad_request(
                f"request_id must be 1 to 128 printable ASCII characters without spaces, not {show(self.request_id)}",
                "request_id",
            )

    def check_logprobs(self, most: int) -> None:
        """Raises ApiError where more alternatives are asked for than this server gives (--max-logprobs)."""
        for name, value in ((self.logprobs_field, self.num_logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None and not 0 <= value <= most:
                raise bad_request(f"{name} must be from 0 to {most} (--max-logprobs of this server), not {value}", name)

    def sampling_params(self, max_tokens: int) -> SamplingParams:
        """Raises ApiError that names the field."""
        grammar = self.grammar()
        try:
            return SamplingParams(
                n=self.num_generated, max_tokens=max_tokens, logprobs=self.num_logprobs,
                prompt_logprobs=self.num_prompt_logprobs, structured_outputs=grammar,
                **{name: getattr(self, name) for name in _SAMPLING_FIELDS},
            )  # fmt: skip
        except ValueError as error:
            raise parameter_error(error) from None


def parameter_error(error: ValueError) -> ApiError:
    """What SamplingParams and the like say begins with the parameter's name."""
    name = re.split(r"[ \[]", str(error), maxsplit=1)[0]
    return bad_request(str(error), name if name in SamplingParams.__struct_fields__ else None)


# Both have them under the same name and with the same meaning.
_SAMPLING_FIELDS = tuple(
    name for name in SamplingBody.__struct_fields__
    if name in SamplingParams.__struct_fields__ and name not in ("n", "prompt_logprobs", "structured_outputs")
)  # fmt: skip

Body = TypeVar("Body", bound=msgspec.Struct)
Checked = TypeVar("Checked", bound=SamplingBody)


def parse(data: bytes, kind: type[Checked], defaults: Mapping[str, Any] | None = None) -> Checked:
    """A checked request body. defaults: values for fields it leaves out, instead of the struct's own.

    Raises ApiError (400) that names the field, and never repeats much of the input.
    """
    body = convert(decode(data), kind, defaults or {})
    body.check()
    return body


def convert(raw: dict[str, Any], kind: type[Body], defaults: Mapping[str, Any]) -> Body:
    """A JSON object as a struct; null equals absent. Raises ApiError that names the field."""
    fields = {name: value for name, value in raw.items() if value is not None}
    for name in list(fields):
        if name not in kind.__struct_fields__:
            check_untaken(name, fields.pop(name), kind.__struct_fields__)
    for name, most in MAX_ENTRIES.items():
        if isinstance(value := fields.get(name), (list, dict)) and len(value) > most:
            raise bad_request(f"{name} may hold {most} entries, not {len(value)}", name)
    for name in _NESTED:
        if isinstance(value := fields.get(name), dict):
            fields[name] = {key: item for key, item in value.items() if item is not None}
    for name in integer_fields(kind) & fields.keys():
        fields[name] = with_whole_integers(fields[name])
    fields = {name: value for name, value in defaults.items() if name in kind.__struct_fields__} | fields
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from None


@functools.cache
def integer_fields(kind: type[msgspec.Struct]) -> frozenset[str]:
    """The names of a struct's fields that take an integer, or a list of them."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return frozenset(field.encode_name for field in info.fields if _takes_integers(field.type))


def _takes_integers(type_: msgspec.inspect.Type) -> bool:
    match type_:
        case msgspec.inspect.IntType():
            return True
        case msgspec.inspect.ListType(item_type=item):
            return _takes_integers(item)
        case msgspec.inspect.UnionType(types=types):
            return any(map(_takes_integers, types))
    return False


def with_whole_integers(value: Any) -> Any:
    """16.0 is an integer to JSON, and so to clients that know one kind of number: it becomes 16, alone or in a list."""
    if isinstance(value, list):
        return [_whole_integer(item) for item in value] if float in set(map(type, value)) else value
    return _whole_integer(value)


def _whole_integer(value: Any) -> Any:
    whole = isinstance(value, float) and abs(value) <= MAX_WHOLE_FLOAT and value.is_integer()
    return int(value) if whole else value


def decode(data: bytes) -> dict[str, Any]:
    """The JSON object a body holds. Raises ApiError."""
    try:
        raw = msgspec.json.decode(data)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise bad_request(f"the body must be a JSON object, not {show(raw)}")
    return raw


def _validation_error(text: str) -> ApiError:
    """msgspec says "Expected `int`, got `str` - at `$.n`"; clients read "n: expected int, got str"."""
    if missing := re.fullmatch(r"Object missing required field `(\w+)`(?: - at `\$?\.?(.*)`)?", text):
        name = f"{missing[2]}.{missing[1]}" if missing[2] else missing[1]
        return bad_request(f"{name} is missing", re.split(r"[.\[]", name)[0])
    reason, _, place = text.rpartition(" - at ") if " - at " in text else (text, "", "")
    path = re.search(r"\$\.?([\w.\[\]]*)", place)
    name = path[1].rstrip(".") if path else ""
    reason = reason.replace("`", "")
    param = re.split(r"[.\[]", name)[0] or None
    if not name or reason.startswith(name):  # a struct's own check names what it is about
        return bad_request(reason, param)
    return bad_request(f"{name}: {reason[:1].lower()}{reason[1:]}", param)
