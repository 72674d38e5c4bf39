"""What a user asks for: SamplingParams, and the Request the engine works on. No torch here."""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

MAX_LOGPROBS = 1024  # largest `logprobs` / `prompt_logprobs` a request may ask for
MAX_STOP_STRINGS = 64
MAX_CHOICES = 1024
MAX_BAD_WORDS = 1000
MAX_BAD_WORDS_CHARS = 64 << 10  # of all of them together
MAX_SCHEMA_BYTES = 256 << 10  # of a JSON schema's text, or of a list of choices
MAX_GRAMMAR_BYTES = 64 << 10  # of a regular expression's or a grammar's text
MAX_GRAMMAR_CHOICES = 1024
MAX_TOKEN_ID = MAX_COUNT = 2**31 - 1
SEED_RANGE = range(-(2**63), 2**63)


class FinishReason(StrEnum):
    """Why a choice ended. `stop`: end token, stop token or stop string; `length`: max_tokens or max_model_len."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """What the text of a choice must look like, with vLLM's names; exactly one of these is set.

    json: a JSON schema, an object or its text. regex: the whole text matches it (Rust's regex syntax, no look-around).
    choice: one of these texts. grammar: Lark as llguidance reads it. json_object: any JSON object.
    With json and json_object: disable_any_whitespace, compact JSON alone; whitespace_pattern, a regular expression
    of the white space allowed between JSON's tokens.

    Raises ValueError that names the field. What only a compiler sees, structured.GrammarChecker finds.
    """

    json: dict[str, Any] | str | None = None  # its text, once built
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    structural_tag: Any = None  # vLLM's; refused

    def __post_init__(self) -> None:
        if self.structural_tag is not None:
            raise ValueError("structural_tag is not supported; use json, regex, choice, grammar or json_object")
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"structured_outputs takes exactly one of {', '.join(_CONSTRAINTS)}; it has {found}")
        if isinstance(self.json, Mapping):
            msgspec.structs.force_setattr(self, "json", _json_text(self.json))
        _check_text("json", self.json, MAX_SCHEMA_BYTES)
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name), MAX_GRAMMAR_BYTES)
        if self.choice is not None:
            self._check_choice()
        if (self.disable_any_whitespace or self.whitespace_pattern is not None) and given[0] not in _JSON:
            raise ValueError(f"disable_any_whitespace and whitespace_pattern go with json, not with {given[0]}")

    def _check_choice(self) -> None:
        choice = _plain_list("choice", self.choice, "strings")
        msgspec.structs.force_setattr(self, "choice", choice)
        if not 1 <= len(choice) <= MAX_GRAMMAR_CHOICES:
            raise ValueError(f"choice must hold 1 to {MAX_GRAMMAR_CHOICES} strings, not {len(choice)}")
        for text in choice:
            if not isinstance(text, str) or not text:
                raise ValueError(f"choice must hold non-empty strings, not {text!r}")
        _check_text("choice", "".join(choice), MAX_SCHEMA_BYTES)

    @property
    def kind(self) -> str:
        """The name of the one that is set."""
        return next(name for name in _CONSTRAINTS if getattr(self, name) not in (None, False))


_JSON = ("json", "json_object")
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """How tokens are drawn and when to stop, with vLLM's names and defaults.

    n: choices per prompt. temperature 0 is greedy. top_k 0 or -1, top_p 1 and min_p 0 are off. presence_penalty and
    frequency_penalty count generated tokens, repetition_penalty prompt and generated ones. seed: None draws a fresh
    one. stop: strings that end the text (not part of it unless include_stop_str_in_output). stop_token_ids end it too.
    min_tokens: no end or stop token before so many. logprobs: the k most likely tokens are reported with each token,
    the drawn one always among them; prompt_logprobs the same for the prompt. logit_bias: token id -> added to its
    logit. allowed_token_ids: nothing else can be drawn. structured_outputs: what the text must look like; a choice
    whose text is complete ends with `stop`, whatever ignore_eos and min_tokens say. bad_words: texts that are never
    completed (word by word, as the tokenizer writes them, with and without a space before).

    Raises ValueError that names the field, its value and what would work.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None  # a list once built
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1, MAX_COUNT)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_int("min_tokens", self.min_tokens, 0, MAX_COUNT)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_COUNT)
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}")
        if self.seed is not None:
            _check_int("seed", self.seed, SEED_RANGE.start, SEED_RANGE.stop - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise ValueError(f"structured_outputs must be a StructuredOutputs, not {self.structured_outputs!r}")
        self._make_plain()
        self._check_stop()
        self._check_bad_words()
        self._check_token_lists()

    def _make_plain(self) -> None:
        """Turns what a script may well give (a NumPy number, a tuple, a range) into plain values, which can travel.

        Raises ValueError for what is no number, string or list of such.
        """
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            msgspec.structs.force_setattr(self, name, float(getattr(self, name)))
        for name in ("stop_token_ids", "allowed_token_ids"):
            if getattr(self, name) is not None:
                msgspec.structs.force_setattr(self, name, _plain_list(name, getattr(self, name), "token ids"))
        if self.stop is not None:
            stop = [self.stop] if isinstance(self.stop, str) else _plain_list("stop", self.stop, "strings")
            msgspec.structs.force_setattr(self, "stop", [str(t) if isinstance(t, str) else t for t in stop])
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must map token ids to numbers, not be {self.logit_bias!r}")
            for token, bias in self.logit_bias.items():
                _check_int("logit_bias keys", token, 0, MAX_TOKEN_ID)
                _check_number(f"logit_bias[{token}]", bias, -100.0, 100.0)
            plain = {token: float(bias) for token, bias in self.logit_bias.items()}
            msgspec.structs.force_setattr(self, "logit_bias", plain)

    def _check_stop(self) -> None:
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise ValueError(f"stop may hold {MAX_STOP_STRINGS} strings, not {len(self.stop_strings)}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold non-empty strings, not {text!r}")
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                raise ValueError(f"stop holds {text!r}, half a surrogate pair: no text can contain it")
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; use stop_token_ids without it")

    def _check_bad_words(self) -> None:
        if self.bad_words is None:
            return
        words = _plain_list("bad_words", self.bad_words, "strings")
        msgspec.structs.force_setattr(self, "bad_words", words)
        if len(words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words may hold {MAX_BAD_WORDS} strings, not {len(words)}")
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"bad_words must hold strings that are not blank, not {word!r}")
        _check_text("bad_words", "".join(words), MAX_BAD_WORDS_CHARS)

    def _check_token_lists(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids"):
            tokens = getattr(self, name) or ()
            if tokens and set(map(type, tokens)) == {int} and 0 <= min(tokens) <= max(tokens) <= MAX_TOKEN_ID:
                continue  # the list may be as long as the vocabulary
            for token in tokens:
                _check_int(f"{name} entries", token, 0, MAX_TOKEN_ID)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must name at least one token, not []")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return list(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken. Temperatures under 1e-5 count as 0, as in vLLM."""
        return self.temperature < 1e-5

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a token id is outside the model's vocabulary."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            highest = max(getattr(self, name) or (), default=-1)
            if highest >= vocab_size:
                raise ValueError(f"{name} holds {highest}; the vocabulary has ids 0 to {vocab_size - 1}")


_SWITCHES = (
    "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip


class Request(msgspec.Struct, kw_only=True):
    """One prompt as the engine takes it. It yields `params.n` choices.

    seed is always set here (the caller draws one for requests without), so that a restart draws the same tokens.
    eos_token_ids: the model's end tokens; ignored with params.ignore_eos. bad_words_token_ids: the token sequences of
    params.bad_words, from Tokenizer.bad_words_token_ids. priority: the lowest runs first, under the scheduling policy
    `priority`. cache_salt: cached prefixes are shared only between requests of the same salt.

    output_token_ids: set for a request that another engine has begun: the choices that are not done, with their tokens
    so far. They count as output in every way, and generation goes on behind them; other choices do not run.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    eos_token_ids: list[int] = []
    bad_words_token_ids: list[list[int]] = []
    priority: int = 0
    cache_salt: str | None = None
    output_token_ids: dict[int, list[int]] | None = None

    @property
    def choices(self) -> list[int]:
        """The choices that the engine is to run."""
        return list(range(self.params.n)) if self.output_token_ids is None else sorted(self.output_token_ids)


class TokenLogprobs(msgspec.Struct, array_like=True):
    """The log-probabilities of one position: `tokens[0]` is the token drawn (or given), the others the most likely
    ones in falling order. ranks count from 1. All three lists are equally long."""

    tokens: list[int]
    logprobs: list[float]
    ranks: list[int]


class Output(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step gave one choice of a request.

    token_ids: the new tokens. token_index: how many the choice had before, those another engine drew included, so that
    a receiver can tell a token it has from one it lacks. logprobs: one entry a new token where asked for.
    prompt_logprobs: all of the prompt's, once (choice 0, with its first token); entry 0 is None because the first token
    has no predecessor. finish_reason set: the choice is done; stop_reason is the stop token that ended it (None for an
    end-of-sequence token). error: a sentence, with finish_reason `error`. queue_seconds: with a choice's first output,
    how long it waited to be scheduled for the first time.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = []
    token_index: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    queue_seconds: float | None = None


def check_prompt(token_ids: list[int], params: SamplingParams, vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError unless the model can take this prompt with these parameters."""
    check_token_ids(token_ids, vocab_size, max_model_len)
    params.check_vocabulary(vocab_size)


def check_request(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError unless the model can take this request, and go on from where another engine left it."""
    params, num_prompt = request.params, len(request.prompt_token_ids)
    check_prompt(request.prompt_token_ids, params, vocab_size, max_model_len)
    if request.output_token_ids is None:
        return
    if not request.output_token_ids:
        raise ValueError("output_token_ids names no choice to go on with")
    limit = max_model_len - num_prompt
    limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
    for choice, tokens in request.output_token_ids.items():
        if not 0 <= choice < params.n:
            raise ValueError(f"output_token_ids holds choice {choice}; the request has choices 0 to {params.n - 1}")
        if len(tokens) >= limit:
            raise ValueError(f"choice {choice} has {len(tokens)} tokens already; it ends with {limit}")
        if tokens:
            check_token_ids(tokens, vocab_size, max_model_len)


def check_token_ids(token_ids: list[int], vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError unless the model can take this prompt."""
    if not token_ids:
        raise ValueError("the prompt is empty; it needs at least one token")
    if len(token_ids) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(token_ids)} tokens; this model takes at most {max_model_len - 1} "
            f"(max_model_len {max_model_len}, one of them generated)"
        )
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"the prompt holds token id {bad}; the vocabulary has ids 0 to {vocab_size - 1}")


def _plain_list(name: str, value: Any, of_what: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of {of_what}, not {value!r}")
    return list(value)


def _json_text(value: Any) -> str:
    """A JSON value as text, its keys in their order. Raises ValueError for what JSON cannot say."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json must be a JSON schema: {error}") from None


def _check_text(name: str, value: Any, max_bytes: int) -> None:
    """None, or a text that UTF-8 can say in so many bytes."""
    if value is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, not {type(value).__name__}")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds {value[error.start]!r}, half a surrogate pair") from None
    if not 0 < num_bytes <= max_bytes:
        raise ValueError(f"{name} must have 1 to {max_bytes} bytes, not {num_bytes}")


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    bounded = high is not None and (high < MAX_COUNT or (isinstance(value, int) and value > high))
    wanted = f"an integer from {low} to {high}" if bounded else f"an integer of at least {low}"
    fine = isinstance(value, int) and not isinstance(value, bool)
    if not fine or value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {wanted}, not {value!r}")


def _check_number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    wanted = f"{'over' if open_low else 'from'} {low:g} {'and at most' if open_low else 'to'} {high:g}"
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or not (low < value <= high if open_low else low <= value <= high):
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
