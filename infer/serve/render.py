"""Engine outputs to what OpenAI's JSON shares: choices, log-probabilities, usage, a reply's frame. No torch here."""

import abc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer.request import FinishReason, Output, Request, TokenLogprobs
from infer.serve.schema import SamplingBody
from infer.serve.text import TextStream, Tokenizer

MIN_LOGPROB = -9999.0  # for what JSON lacks, -inf and NaN, as in vLLM
# What rendering costs, in units of some 10 us: 1 a log-probability, and
CHUNK_WORK = 10
CHARS_A_UNIT = 8  # of text, which parsers may read character by character
REPEATED_A_UNIT = 300  # characters and token ids of a prompt, which are only copied


@dataclass
class Prompt:
    """One prompt of an HTTP request. text is None where token ids were given and nobody asked for their text."""

    token_ids: list[int]
    text: str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs | None] | None = None  # come with choice 0's first token
    num_logprobs: int = 0  # alternatives included


@dataclass
class Delta:
    """What one output adds to a choice: text, the tokens it was made from, and their log-probabilities where asked
    for. Text may be held back, so tokens and text of one delta need not belong together."""

    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    echo: bool = False  # the prompt's text and log-probabilities go before
    token_ids: list[int] = field(default_factory=list)
    num_logprobs: int = 0  # alternatives included

    @classmethod
    def joined(cls, parts: Sequence["Delta"]) -> "Delta":
        """Several as one, in their order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            "".join(part.text for part in parts), [entry for part in parts for entry in part.logprobs], False,
            [token_id for part in parts for token_id in part.token_ids], sum(part.num_logprobs for part in parts),
        )  # fmt: skip


class Choice:
    """One choice on its way: its text, why it ended, and what a whole reply needs of it.

    only_scores: the tokens generated are nobody's wish, and left out. keep: for a whole reply, the tokens and their
    log-probabilities stay; of a stream, just the tokens that no chunk has had yet.
    """

    def __init__(
        self, index: int, prompt: Prompt, request: Request, tokenizer: Tokenizer, only_scores: bool = False,
        keep: bool = True,
    ) -> None:  # fmt: skip
        self.index = index
        self.prompt = prompt
        self.keep = keep
        self._only_scores = only_scores
        self.stream = TextStream(tokenizer, request.params, request.prompt_token_ids)
        self.token_ids: list[int] = []  # not yet reported
        self.logprobs: list[TokenLogprobs] = []
        self.num_logprobs = 0  # of the tokens kept, alternatives included
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.num_chunks = 0
        self.num_reasoning_tokens = 0  # of those generated; the reply counts them as it is rendered
        self.offset = 0  # characters of the tokens reported so far, for text_offset

    def accept(self, output: Output) -> Delta:
        """Adds an output. finish_reason is set afterwards if the choice is over for the client."""
        if self._only_scores:
            self.finish_reason = None if output.finish_reason is None else "length"
            return Delta("")
        before = self.stream.num_tokens
        text = self.stream.append(output.token_ids, stopped=output.finish_reason is FinishReason.STOP)
        if output.finish_reason is not None:
            text += self.stream.finish()
        count = self.stream.num_tokens - before  # those after a stop string are nobody's
        delta = Delta(text, (output.logprobs or [])[:count], token_ids=output.token_ids[:count])
        delta.num_logprobs = sum(len(entry.tokens) for entry in delta.logprobs)
        self.token_ids += delta.token_ids
        if self.keep:
            self.logprobs += delta.logprobs
            self.num_logprobs += delta.num_logprobs
        if self.stream.stop_reason is not None:
            self.finish_reason, self.stop_reason = "stop", self.stream.stop_reason
        elif output.finish_reason is not None:
            self.finish_reason, self.stop_reason = str(output.finish_reason), output.stop_reason
        return delta

    @property
    def mean_logprob(self) -> float:
        """Of the tokens generated, whose log-probabilities were asked for. What has none, or none that is a number,
        is the worst."""
        if not self.logprobs:
            return -math.inf
        return sum(finite_logprob(entry.logprobs[0]) for entry in self.logprobs) / len(self.logprobs)


def usage(prompts: Sequence[Prompt], choices: Sequence[Choice], counts_reasoning: bool = False) -> dict[str, Any]:
    """Every prompt counts once, whatever n is; every token generated counts, returned or not. counts_reasoning: says
    how many of those were reasoning, of what has been rendered."""
    num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
    num_completion = sum(choice.stream.num_tokens for choice in choices)
    used: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(prompt.num_cached_tokens for prompt in prompts)},
    }
    if counts_reasoning:
        num_reasoning = sum(choice.num_reasoning_tokens for choice in choices)
        used["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
    return used


def distinct(entry: TokenLogprobs) -> Iterator[tuple[int, float, int]]:
    """(token, logprob, rank), the drawn token first; it may stand among the most likely ones again."""
    seen: set[int] = set()
    for token, logprob, rank in zip(entry.tokens, entry.logprobs, entry.ranks, strict=True):
        if token not in seen:
            seen.add(token)
            yield token, finite_logprob(logprob), rank


def finite_logprob(logprob: float) -> float:
    return logprob if MIN_LOGPROB < logprob < math.inf else MIN_LOGPROB  # NaN compares false


class Reply(abc.ABC):
    """What the two routes share. Subclasses say how a choice looks, whole and as a chunk; what return_token_ids and
    prompt_logprobs add is the same for all and added here.

    prompt_in_choice: whether the prompt's token ids and log-probabilities stand in each choice (and its first chunk),
    or once in the reply (and its first chunk), as vLLM has it. system_fingerprint: set by the route.
    """

    id_prefix: str
    object_name: str
    chunk_object_name: str
    prompt_in_choice = False
    system_fingerprint: str | None = None

    def __init__(self, reply_id: str, model: str, tokenizer: Tokenizer, body: SamplingBody) -> None:
        self.id = reply_id
        self._model = model
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._with_token_ids = body.return_token_ids
        self._repeats_text = body.echoes_prompt
        self._with_prompt_logprobs = body.prompt_logprobs is not None
        self._tokens_as_ids = body.return_tokens_as_token_ids
        self._told_prompt = False  # once a reply

    def returned(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """Of all that were generated, those that a whole reply shows."""
        return choices

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice in a reply that is not streamed."""
        return self.whole_choice(choice) | self._extras(choice)

    def whole_head(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of such a reply, but for its choices and usage."""
        return self._head(self.object_name) | self._reply_extras(choices[0])

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """One event of a stream, but for its usage; None where there is nothing to say yet."""
        shown = self.chunk_choice(choice, delta)
        if shown is None:
            if not self._with_token_ids:
                choice.token_ids.clear()
            return None
        shown |= self._extras(choice)
        choice.num_chunks += 1
        return {**self._head(self.chunk_object_name), **self._reply_extras(choice), "choices": [shown]}

    def work(self, choice: Choice, num_chars: int, num_logprobs: int) -> int:
        """About what it costs to render so much more of a choice, in units of some 10 us; the first time, what is said
        of the prompt comes with it."""
        work = CHUNK_WORK + num_chars // CHARS_A_UNIT + num_logprobs
        return work if choice.num_chunks else work + self.prompt_work(choice.prompt)

    def prompt_work(self, prompt: Prompt) -> int:
        num_ids = len(prompt.token_ids) if self._with_token_ids else 0
        num_chars = len(prompt.text or "") if self._repeats_text else 0
        return prompt.num_logprobs + (num_ids + num_chars) // REPEATED_A_UNIT

    def usage_chunk(self, used: dict[str, Any]) -> dict[str, Any]:
        """The last event of a stream with include_usage."""
        return {**self._head(self.chunk_object_name), "choices": [], "usage": used}

    def _head(self, object_name: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": object_name, "created": self._created, "model": self._model,
            "system_fingerprint": self.system_fingerprint,
        }  # fmt: skip

    def _extras(self, choice: Choice) -> dict[str, Any]:
        """What goes into a choice: its tokens since the last chunk, and what its prompt has, the first time."""
        extras = self._prompt_extras(choice.prompt) if self.prompt_in_choice and choice.num_chunks == 0 else {}
        token_ids, choice.token_ids = choice.token_ids, []
        return extras | ({"token_ids": token_ids} if self._with_token_ids else {})

    def _reply_extras(self, choice: Choice) -> dict[str, Any]:
        if self.prompt_in_choice or self._told_prompt:
            return {}
        self._told_prompt = True
        return self._prompt_extras(choice.prompt)

    def _prompt_extras(self, prompt: Prompt) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self._with_token_ids:
            extras["prompt_token_ids"] = prompt.token_ids
        if self._with_prompt_logprobs:
            extras["prompt_logprobs"] = self.prompt_logprobs(prompt)
        return extras

    @abc.abstractmethod
    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        """A finished choice in a reply that is not streamed."""

    @abc.abstractmethod
    def chunk_choice(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """What a delta adds to a choice, in one event; None where there is nothing to say yet."""

    def token_name(self, token_id: int) -> str:
        """A token as log-probabilities name it: its text, or its id where return_tokens_as_token_ids asks for that."""
        return f"token_id:{token_id}" if self._tokens_as_ids else self._tokenizer.token(token_id)

    def prompt_logprobs(self, prompt: Prompt) -> list[dict[str, Any] | None]:
        """One entry a prompt token: token id -> its log-probability, rank and text; None for the first token."""
        return [
            None if entry is None else {
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": self._tokenizer.token(token)}
                for token, logprob, rank in distinct(entry)
            }
            for entry in prompt.logprobs or []
        ]  # fmt: skip
