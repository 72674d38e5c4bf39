"""Engine outputs to the JSON of /v1/chat/completions. No torch here."""

from collections.abc import Sequence
from typing import Any

from infer.request import TokenLogprobs
from infer.serve.chat_format import ChatDelta, ChatOutput, shown_call
from infer.serve.render import Choice, Delta, Reply, distinct
from infer.serve.schema_chat import ChatBody
from infer.serve.text import Tokenizer


class ChatReply(Reply):
    """/v1/chat/completions. Each choice's text is taken apart as it comes: reasoning, content, tool calls.

    What stands under reasoning_content stands under reasoning as well, the name newer clients read. Where the reasoning
    is to be left out, so are log-probabilities and token ids, which spell it.
    """

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, reply_id: str, model: str, tokenizer: Tokenizer, body: ChatBody) -> None:
        super().__init__(reply_id, model, tokenizer, body)
        self._body = body
        self._with_logprobs = body.logprobs and not body.hides_reasoning
        self._num_top = body.top_logprobs or 0
        self._outputs: dict[int, ChatOutput] = {}  # by choice

    def _output(self, choice: Choice) -> ChatOutput:
        if choice.index not in self._outputs:
            self._outputs[choice.index] = self._body.output()
        return self._outputs[choice.index]

    def _feed(self, choice: Choice, text: str, tokens: Sequence[int]) -> ChatDelta:
        """tokens: what the text was made from. A choice may be over while more than one of its outputs is still to be
        shown: the last is the one that its text ends with."""
        output = self._output(choice)
        if output.is_over:
            return ChatDelta()
        counted = output.reasoning_tokens
        if counted is not None:
            counted.add(self._tokenizer.token_bytes(token) for token in tokens if self._body.shows_token(token))
        is_last = choice.finish_reason is not None and output.num_chars + len(text) == len(choice.stream.text)
        delta = output.feed(text, is_last)
        if counted is not None:
            choice.num_reasoning_tokens = counted.num_tokens
        if not self._body.include_reasoning:
            delta.reasoning = ""
        return delta

    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        found = self._feed(choice, choice.stream.text, choice.token_ids)
        content = self._body.echoed_text + found.content
        message: dict[str, Any] = {
            "role": self._body.reply_role,
            "content": content if content or not (found.calls or found.reasoning) else None,
            "refusal": None,
        }
        if self._body.counts_reasoning:  # null where there is none: clients read the field without looking for it
            message |= dict.fromkeys(("reasoning_content", "reasoning"), found.reasoning or None)
        if found.calls:
            message["tool_calls"] = [shown_call(call, whole=True) for call in found.calls]
        return self._choice(choice, "message", message, choice.logprobs, ends=True)

    def chunk_choice(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        was_over = self._output(choice).is_over
        found = self._feed(choice, delta.text, delta.token_ids)
        ends = self._output(choice).is_over and not was_over
        first = choice.num_chunks == 0
        shown: dict[str, Any] = {"role": self._body.reply_role} if first else {}
        content = self._body.echoed_text + found.content if first else found.content
        if content or (first and not (found.calls or found.reasoning)):
            shown["content"] = content
        if found.reasoning:
            shown |= {"reasoning_content": found.reasoning, "reasoning": found.reasoning}
        if found.calls:
            shown["tool_calls"] = [shown_call(call, whole=False) for call in found.calls]
        if not shown and not (delta.logprobs and self._with_logprobs) and not ends:
            return None
        return self._choice(choice, "delta", shown, delta.logprobs, ends)

    def _choice(
        self, choice: Choice, name: str, said: dict[str, Any], logprobs: Sequence[TokenLogprobs], ends: bool
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            name: said,
            "logprobs": self._logprobs(logprobs) if self._with_logprobs else None,
            "finish_reason": self._finish_reason(choice) if ends else None,
            "stop_reason": choice.stop_reason if ends else None,
        }

    def _finish_reason(self, choice: Choice) -> str | None:
        """A choice that stopped after calling tools says so; one that was cut off does not, whatever it began, be it by
        a stop string inside a call; nor, as with OpenAI, one that had to call the tool that tool_choice names."""
        output = self._output(choice)
        is_cut = isinstance(choice.stop_reason, str) and output.is_inside_call
        if choice.finish_reason == "stop" and output.has_calls and not is_cut and not self._body.names_tool:
            return "tool_calls"
        return choice.finish_reason

    def _extras(self, choice: Choice) -> dict[str, Any]:
        extras = super()._extras(choice)
        if self._body.hides_reasoning:
            extras.pop("token_ids", None)
        return extras

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {"content": [self._token(entry) for entry in entries], "refusal": None}

    def _token(self, entry: TokenLogprobs) -> dict[str, Any]:
        rows = list(distinct(entry))
        likeliest = sorted(rows, key=lambda row: row[2])[: self._num_top]  # by rank; stable
        return {**self._spelled(rows[0]), "top_logprobs": [self._spelled(row) for row in likeliest]}

    def _spelled(self, row: tuple[int, float, int]) -> dict[str, Any]:
        token, logprob, _ = row
        spelled = self._tokenizer.token_bytes(token)
        name = self.token_name(token) if self._tokens_as_ids else spelled.decode("utf-8", "replace")
        return {"token": name, "logprob": logprob, "bytes": list(spelled)}
