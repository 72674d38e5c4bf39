"""What the server answers, as structs: the OpenAPI document is made from them, and tests convert replies to them.

Replies themselves are written as plain dictionaries (render.py), which is faster. A field that may be absent is UNSET
by default; one that is always there may be null. No torch here.
"""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType


class _Reply(Struct, kw_only=True, forbid_unknown_fields=True):
    """Base: a field that no struct names is a field that the document does not tell."""


# ------------------------------------------------------------------ shared


class ErrorDetail(_Reply):
    """type: a class of errors such as invalid_request_error. param: the field it is about. code: for programs, such as
    context_length_exceeded."""

    message: str
    type: str
    param: str | None
    code: str | None


class RankStatus(_Reply):
    """A rank as it was last heard of. phase: what its main loop does, for seconds_in_phase. step: of its main loop,
    null before the first. busy: it has a batch to run."""

    rank: int
    phase: str
    step: int | None
    busy: bool
    seconds_in_phase: float
    seconds_since_heard: float


class Error(_Reply):
    """Every failure, also inside a stream. phase, ranks: those of /health alone."""

    error: ErrorDetail
    phase: str | UnsetType = UNSET
    ranks: list[RankStatus] | UnsetType = UNSET


class PromptTokensDetails(_Reply):
    """cached_tokens: prompt tokens found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(_Reply):
    """reasoning_tokens: those generated before the answer, as --reasoning-parser finds them."""

    reasoning_tokens: int


class Usage(_Reply):
    """Tokens of the whole request: each prompt once, and every token generated. In a chunk that has choices: of its
    choice so far, and of that choice's prompt. completion_tokens_details: of chats, with --reasoning-parser."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class PromptLogprob(_Reply):
    """rank counts from 1, the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # a prompt token: token id -> its figures; null for the first


# ------------------------------------------------------------------ /v1/completions


class CompletionLogprobs(_Reply):
    """One entry a token in each list. text_offset: where it begins in the choice's text, in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Reply):
    """stop_reason: the stop string or stop token that ended it; null for the model's own end token."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionChunkChoice(_Reply):
    """What is new of a choice. finish_reason comes with the last one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(_Reply):
    """The reply of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Reply):
    """One event of a stream of /v1/completions. usage comes as stream_options ask for it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChunkChoice]
    usage: Usage | UnsetType | None = UNSET


# ------------------------------------------------------------------ /v1/chat/completions


class FunctionCall(_Reply):
    """arguments: JSON."""

    name: str
    arguments: str


class ToolCall(_Reply):
    """A call that the model wants made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(_Reply):
    """The model's message. reasoning_content: what it thought before, with --reasoning-parser; reasoning: the same
    under its newer name."""

    role: str
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET


class TokenLogprob(_Reply):
    """bytes: the token's own, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TokenLogprob):
    """The token drawn, and the likeliest in falling order."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Reply):
    """One entry a token."""

    content: list[TokenLogprobs] | None
    refusal: list[TokenLogprobs] | None


class ChatChoice(_Reply):
    """stop_reason: the stop string or stop token that ended it; null for the model's own end token."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(_Reply):
    """The reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionCallDelta(_Reply):
    """name comes once; arguments are to be joined."""

    name: str | UnsetType | None = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(_Reply):
    """What is new of the tool call of this index; id and type come with its first."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallDelta | UnsetType = UNSET


class ChatDelta(_Reply):
    """What is new of a message; role comes with a choice's first chunk."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET


class ChatChunkChoice(_Reply):
    """What is new of a choice. finish_reason comes with the last one."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(_Reply):
    """One event of a stream of /v1/chat/completions. usage comes as stream_options ask for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


# ------------------------------------------------------------------ tokens, models, the server


class Tokenized(_Reply):
    """The reply of /tokenize. count: of tokens. token_strs: each as the vocabulary spells it ("Ġworld"), where
    return_token_strs asked for that."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Reply):
    """The reply of /detokenize."""

    prompt: str


class ModelCard(_Reply):
    """One name that requests may give. root: the model's directory."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Any] | UnsetType = UNSET


class ModelList(_Reply):
    """The reply of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(_Reply):
    """The reply of /ready when all is well."""

    status: str


class Health(_Reply):
    """The reply of /health when all is well. status: ok, or stopping once the server is told to end."""

    status: str
    phase: str
    ranks: list[RankStatus]


class Version(_Reply):
    """The reply of /version."""

    version: str


class Load(_Reply):
    """The reply of /load. server_load: generating requests under way."""

    server_load: int
