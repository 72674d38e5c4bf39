"""What LLM.generate returns, with vLLM's names. No torch here."""

from dataclasses import dataclass, field


@dataclass
class Logprob:
    """logprob: natural logarithm. rank: 1 for the most likely token. decoded_token: its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One choice. logprobs: one dict per token, token id -> Logprob, the drawn token first. error: why it failed, with
    finish_reason "error"."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the drawn tokens' log-probabilities, where logprobs were asked for."""
        if self.logprobs is None:
            return None
        return sum(entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=True))


@dataclass
class RequestOutput:
    """A prompt and its choices. prompt_logprobs: one entry per prompt token, None for the first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False
