"""Engine outputs to the JSON of /v1/chat/completions. No torch here."""

from collections.abc import Sequence
from typing import Any

from infer.request import TokenLogprobs
from infer.serve.render import Choice, Delta, Reply, distinct
from infer.serve.schema_chat import ChatBody
from infer.serve.text import Tokenizer


class ChatReply(Reply):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, reply_id: str, model: str, tokenizer: Tokenizer, body: ChatBody) -> None:
        super().__init__(reply_id, model, tokenizer)
        self._with_logprobs = body.logprobs
        self._num_top = body.top_logprobs or 0
        self._with_prompt_logprobs = body.prompt_logprobs is not None

    def whole(self, choices: Sequence[Choice], used: dict[str, Any]) -> dict[str, Any]:
        reply = super().whole(choices, used)
        if self._with_prompt_logprobs:
            reply["prompt_logprobs"] = self.prompt_logprobs(choices[0].prompt)
        return reply

    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.stream.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs) if self._with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def chunk_choice(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        first = choice.num_chunks == 0
        if not delta.text and not delta.logprobs and not first and choice.finish_reason is None:
            return None
        role = {"role": "assistant"} if first else {}
        return {
            "index": choice.index,
            "delta": {**role, "content": delta.text} if delta.text or first else role,
            "logprobs": self._logprobs(delta.logprobs) if self._with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {"content": [self._token(entry) for entry in entries], "refusal": None}

    def _token(self, entry: TokenLogprobs) -> dict[str, Any]:
        rows = list(distinct(entry))
        likeliest = sorted(rows, key=lambda row: row[2])[: self._num_top]  # by rank; stable
        return {**self._spelled(rows[0]), "top_logprobs": [self._spelled(row) for row in likeliest]}

    def _spelled(self, row: tuple[int, float, int]) -> dict[str, Any]:
        token, logprob, _ = row
        spelled = self._tokenizer.token_bytes(token)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}
