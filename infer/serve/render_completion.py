"""Engine outputs to the JSON of /v1/completions. No torch here."""

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

    def __init__(self, reply_id: str, model: str, tokenizer: Tokenizer, body: CompletionBody) -> None:
        super().__init__(reply_id, model, tokenizer)
        self._with_logprobs = body.logprobs is not None
        self._with_prompt_logprobs = body.prompt_logprobs is not None
        self._echo = body.echo

    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        shown = self._choice(choice, Delta(choice.stream.text, choice.logprobs, echo=self._echo))
        if self._with_prompt_logprobs:
            shown["prompt_logprobs"] = self.prompt_logprobs(choice.prompt)
        return shown

    def chunk_choice(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        delta.echo = self._echo and choice.num_chunks == 0
        if not delta.text and not delta.logprobs and not delta.echo and choice.finish_reason is None:
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
        if delta.echo:
            entries += zip(choice.prompt.token_ids, choice.prompt.logprobs or [], strict=True)
        entries += ((entry.tokens[0], entry) for entry in delta.logprobs)
        tokens, offsets = [], []
        for token_id, _ in entries:
            tokens.append(self._tokenizer.token(token_id))
            offsets.append(choice.offset)
            choice.offset += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else finite_logprob(entry.logprobs[0]) for _, entry in entries],
            "top_logprobs": [None if entry is None else self._alternatives(entry) for _, entry in entries],
            "text_offset": offsets,
        }

    def _alternatives(self, entry: TokenLogprobs) -> dict[str, float]:
        shown: dict[str, float] = {}
        for token, logprob, _ in distinct(entry):
            text = self._tokenizer.token(token)
            shown[text] = max(logprob, shown.get(text, logprob))  # of tokens that look alike, the likelier one
        return shown
