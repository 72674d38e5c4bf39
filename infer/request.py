"""What a user asks for: SamplingParams, and the Request the engine works on. No torch here."""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

MAX_LOGPROBS = 1024  # largest `logprobs` / `prompt_logprobs` a request may ask for
MAX_STOP_STRINGS = 64
MAX_CHOICES = 1024
MAX_TOKEN_ID = MAX_COUNT = 2**31 - 1
SEED_RANGE = range(-(2**63), 2**63)


class FinishReason(StrEnum):
    """Why a choice ended. `stop`: end token, stop token or stop string; `length`: max_tokens or max_model_len."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """How tokens are drawn and when to stop, with vLLM's names and defaults.

    n: choices per prompt. temperature 0 is greedy. top_k 0 or -1, top_p 1 and min_p 0 are off. presence_penalty and
    frequency_penalty count generated tokens, repetition_penalty prompt and generated ones. seed: None draws a fresh
    one. stop: strings that end the text (not part of it unless include_stop_str_in_output). stop_token_ids end it too.
    min_tokens: no end or stop token before so many. logprobs: the k most likely tokens are reported with each token,
    the drawn one always among them; prompt_logprobs the same for the prompt. logit_bias: token id -> added to its
    logit. allowed_token_ids: nothing else can be drawn.

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
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

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
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        self._make_plain()
        self._check_stop()
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


class Request(msgspec.Struct, kw_only=True):
    """One prompt as the engine takes it. It yields `params.n` choices.

    seed is always set here (the caller draws one for requests without), so that a restart draws the same tokens.
    eos_token_ids: the model's end tokens; ignored with params.ignore_eos.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    eos_token_ids: list[int] = []


class TokenLogprobs(msgspec.Struct, array_like=True):
    """The log-probabilities of one position: `tokens[0]` is the token drawn (or given), the others the most likely
    ones in falling order. ranks count from 1. All three lists are equally long."""

    tokens: list[int]
    logprobs: list[float]
    ranks: list[int]


class Output(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step gave one choice of a request.

    token_ids: the new tokens. logprobs: one entry a new token where asked for. prompt_logprobs: all of the prompt's,
    once (choice 0, with its first token); entry 0 is None because the first token has no predecessor. finish_reason
    set: the choice is done; stop_reason is the stop token that ended it (None for an end-of-sequence token). error: a
    sentence, with finish_reason `error`.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None


def check_prompt(token_ids: list[int], params: SamplingParams, vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError unless the model can take this prompt with these parameters."""
    check_token_ids(token_ids, vocab_size, max_model_len)
    params.check_vocabulary(vocab_size)


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
