"""What OpenAI request bodies share: what is taken, what is refused, and the errors that say so. No torch here.

Every field is one of three: taken (a struct's field), without effect here (accepted, listed in _IGNORED), or lacking
(refused by name unless its value asks for nothing, listed in _LACKING). null equals absent everywhere.
"""

import difflib
import re
from typing import Any, ClassVar, TypeVar

import msgspec

from infer.request import MAX_STOP_STRINGS, SamplingParams
from infer.serve.errors import ApiError, bad_request, show

MAX_STOP_CHARS = 1024
MAX_LOGPROB_ENTRIES = 1 << 18  # held for one reply; each takes some 100 bytes here
# The engine holds stop_token_ids, allowed_token_ids and logit_bias once a choice.
MAX_TOKEN_LIST_ENTRIES = 1 << 20
MAX_TOP_K = 2**31 - 1
# Checked before anything looks at the entries.
MAX_ENTRIES = {"messages": 4096, "stop": MAX_STOP_STRINGS, "stop_token_ids": 1024, "logit_bias": 1024}


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in every chunk.
    include_obfuscation: padding against eavesdroppers, which this server does not add."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


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
    include_stop_str_in_output: bool = False
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def max_new_tokens(self) -> int | None:
        """What the client asked for; None: as many as fit."""
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
    def num_choices(self) -> int:
        """Of the whole reply."""
        return max(self.n, 1)

    @property
    def only_scores(self) -> bool:
        """Whether no token is wanted, just the prompt's log-probabilities. The engine generates one all the same."""
        return False

    def check(self) -> None:
        """Raises ApiError for what SamplingParams cannot know."""
        if self.stream_options is not None:
            self._check_stream_options(self.stream_options)
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs is not available with stream; leave one of them out", "prompt_logprobs")
        if self.top_k > MAX_TOP_K:
            raise bad_request(f"top_k must be at most {MAX_TOP_K}, not {self.top_k}", "top_k")
        num_entries = sum(len(x or ()) for x in (self.stop_token_ids, self.allowed_token_ids, self.logit_bias))
        if num_entries * self.num_choices > MAX_TOKEN_LIST_ENTRIES:
            raise bad_request(
                f"stop_token_ids, allowed_token_ids and logit_bias have {num_entries} entries for each of "
                f"{self.num_choices} choices; one request may have {MAX_TOKEN_LIST_ENTRIES}. Send several requests"
            )
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        longest = max(map(len, stops), default=0)
        if longest > MAX_STOP_CHARS:
            raise bad_request(f"a stop string may have {MAX_STOP_CHARS} characters, not {longest}", "stop")

    def _check_stream_options(self, options: StreamOptions) -> None:
        if not self.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")
        if options.include_obfuscation:
            raise bad_request(
                "stream_options.include_obfuscation is not supported by this server; set it to false", "stream_options"
            )

    def check_logprobs(self, most: int) -> None:
        """Raises ApiError where more alternatives are asked for than this server gives (--max-logprobs)."""
        for name, value in ((self.logprobs_field, self.num_logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None and not 0 <= value <= most:
                raise bad_request(f"{name} must be from 0 to {most} (--max-logprobs of this server), not {value}", name)

    def sampling_params(self, max_tokens: int) -> SamplingParams:
        """Raises ApiError that names the field."""
        try:
            return SamplingParams(
                max_tokens=max_tokens, logprobs=self.num_logprobs, prompt_logprobs=self.num_prompt_logprobs,
                **{name: getattr(self, name) for name in _SAMPLING_FIELDS},
            )  # fmt: skip
        except ValueError as error:
            name = str(error).split(" ", 1)[0].split("[", 1)[0]
            raise bad_request(str(error), name if name in SamplingParams.__struct_fields__ else None) from None


_NOT_SAMPLING = ("model", "stream", "stream_options", "prompt_logprobs")
_SAMPLING_FIELDS = tuple(name for name in SamplingBody.__struct_fields__ if name not in _NOT_SAMPLING)


_IGNORED = {
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls",
    "include_reasoning",
}  # fmt: skip

# Field -> the values that ask for nothing, and a sentence for the others ("" where the name says it all).
_LACKING: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "nothing is stored here"),
    "service_tier": (("auto", "default"), "there is one tier; use auto"),
    "response_format": (({"type": "text"},), 'only {"type": "text"} is supported'),
    "modalities": ((["text"],), "only text is supported"),
    "tools": (([],), "tool calls are not supported"),
    "tool_choice": (("none", "auto"), "tool calls are not supported"),
    "functions": (([],), "function calls are not supported"),
    "function_call": (("none", "auto"), "function calls are not supported"),
    "spaces_between_special_tokens": ((True,), "only true is supported"),
    "priority": ((0,), "requests are served first come, first served"),
    "best_of": ((1,), "use n"),
    "suffix": (("",), "insertion is not supported"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "length_penalty": ((1, 1.0), "beam search is not supported"),
    "early_stopping": ((False,), "beam search is not supported"),
    "bad_words": (([],), "use logit_bias with token ids"),
    "return_token_ids": ((False,), ""),
    "return_tokens_as_token_ids": ((False,), ""),
    "documents": (([],), ""),
    "return_prompt_text": ((False,), ""),
} | dict.fromkeys(
    (
        "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "request_id",
        "truncate_prompt_tokens", "cache_salt", "chat_template", "reasoning_effort", "verbosity", "audio", "prediction",
        "web_search_options", "prompt_embeds", "extra_args", "logits_processors", "vllm_xargs", "kv_transfer_params",
        "mm_processor_kwargs", "moderation",
    ),
    ((), ""),
)  # fmt: skip

Body = TypeVar("Body", bound=SamplingBody)


def parse(data: bytes, kind: type[Body]) -> Body:
    """A checked request body. Raises ApiError (400) that names the field, and never repeats much of the input."""
    raw = _decode(data)
    fields = {name: value for name, value in raw.items() if value is not None}
    for name in list(fields):
        if name not in kind.__struct_fields__:
            _check_untaken(name, fields.pop(name), kind)
    for name, most in MAX_ENTRIES.items():
        if isinstance(value := fields.get(name), (list, dict)) and len(value) > most:
            raise bad_request(f"{name} may hold {most} entries, not {len(value)}", name)
    try:
        body = msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from None
    body.check()
    return body


def _decode(data: bytes) -> dict[str, Any]:
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


def _check_untaken(name: str, value: Any, kind: type[SamplingBody]) -> None:
    """Raises ApiError unless the field is without effect."""
    if name in _IGNORED:
        return
    if name in _LACKING:
        neutral, sentence = _LACKING[name]
        # True == 1 to Python; a type that differs is never neutral.
        if any(type(value) is type(item) and value == item for item in neutral):
            return
        raise bad_request(f"{name} is not supported by this server" + (f": {sentence}" if sentence else ""), name)
    near = difflib.get_close_matches(name[:64], kind.__struct_fields__, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise bad_request(f"unknown field {name[:64]!r}{hint}", name[:64])


def _validation_error(text: str) -> ApiError:
    """msgspec says "Expected `int`, got `str` - at `$.n`"; clients read "n: expected int, got str"."""
    if missing := re.fullmatch(r"Object missing required field `(\w+)`(?: - at `(.*)`)?", text):
        return bad_request(f"{missing[1]} is missing", missing[1])
    reason, _, place = text.partition(" - at ")
    path = re.search(r"\$\.?([\w.\[\]]*)", place)
    name = path[1].rstrip(".") if path else ""
    reason = reason.replace("`", "")
    param = re.split(r"[.\[]", name)[0] or None
    return bad_request(f"{name}: {reason[:1].lower()}{reason[1:]}" if name else reason, param)
