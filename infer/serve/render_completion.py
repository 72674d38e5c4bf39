"""Engine outputs to the JSON of /v1/completions. No torch here."""

from collections.abc import Sequence
from typing import Any

from infer.request import TokenLogprobs
from infer.serve.render import Choice, Delta, Reply, distinct, finite_logprob
from infer.serve.schema_completion import CompletionBody
from infer.serve.text import Tokenizer


class CompletionReply(Reply):
    """/v1/completions."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"
    prompt_in_choice = True

    def __init__(self, reply_id: str, model: str, tokenizer: Tokenizer, body: CompletionBody) -> None:
        super().__init__(reply_id, model, tokenizer, body)
        self._with_logprobs = body.logprobs is not None
        self._echo = body.echo
        self._num_generated, self._num_returned = body.num_generated, body.n
        self._skipped = tokenizer.special_ids if body.skip_special_tokens else frozenset()

    def returned(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """With best_of, of each prompt's the n likeliest per token, in falling order."""
        if self._num_returned == self._num_generated:
            return choices
        best: list[Choice] = []
        for start in range(0, len(choices), self._num_generated):
            group = choices[start : start + self._num_generated]
            best += sorted(group, key=lambda choice: -choice.mean_logprob)[: self._num_returned]
        for index, choice in enumerate(best):
            choice.index = index
        return best

    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        return self._choice(choice, Delta(choice.stream.text, choice.logprobs, echo=self._echo))

    def chunk_choice(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        delta.echo = self._echo and choice.num_chunks == 0
        told = delta.text or delta.logprobs or delta.echo or (self._with_token_ids and delta.token_ids)
        if not told and choice.finish_reason is None:
            return None
        return self._choice(choice, delta)

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": (choice.prompt.text or "") + delta.text if delta.echo else delta.text,
            "logprobs": self._logprobs(choice, delta) if self._with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        entries: list[tuple[int, TokenLogprobs | None]] = []
        offsets: list[int] = []
        if delta.echo:
            entries += zip(choice.prompt.token_ids, choice.prompt.logprobs or [], strict=True)
            offsets += self._prompt_offsets(choice)
        entries += ((entry.tokens[0], entry) for entry in delta.logprobs)
        offsets += [
            choice.offset if entry.tokens[0] in self._skipped else self._next_offset(choice, entry.tokens[0])
            for entry in delta.logprobs
        ]
        return {
            "tokens": [self.token_name(token_id) for token_id, _ in entries],
            "token_logprobs": [None if entry is None else finite_logprob(entry.logprobs[0]) for _, entry in entries],
            "top_logprobs": [None if entry is None else self._alternatives(entry) for _, entry in entries],
            "text_offset": offsets,
        }

    def _prompt_offsets(self, choice: Choice) -> list[int]:
        """Of the prompt's tokens, some of which (a BOS that was added) have no text in it."""
        text, offsets = choice.prompt.text or "", []
        for token_id in choice.prompt.token_ids:
            special = token_id in self._tokenizer.special_ids
            absent = special and not text.startswith(self._tokenizer.token(token_id), choice.offset)
            offsets.append(choice.offset if absent else min(self._next_offset(choice, token_id), len(text)))
        choice.offset = len(text)
        return offsets

    def _next_offset(self, choice: Choice, token_id: int) -> int:
        """Where the next token begins in the text, in characters; inside of a character, where that begins."""
        spelled = self._tokenizer.token_bytes(token_id)
        inside = choice.offset > 0 and spelled != b"" and _continues(spelled[0])
        start = choice.offset - inside
        choice.offset += sum(not _continues(byte) for byte in spelled)
        return start

    def _alternatives(self, entry: TokenLogprobs) -> dict[str, float]:
        shown: dict[str, float] = {}
        for token, logprob, _ in distinct(entry):
            name = self.token_name(token)
            shown[name] = max(logprob, shown.get(name, logprob))  # of tokens that look alike, the likelier one
        return shown


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 goes on with a character."""
    return byte & 0xC0 == 0x80
