"""From a checked body to what the engine takes: texts to token ids, sampling parameters, limits. No torch here."""

import secrets
import uuid
from pathlib import Path
from typing import Any

from infer.request import Request, SamplingParams, StructuredOutputs, check_token_ids
from infer.serve.client import submission
from infer.serve.errors import bad_request, too_long
from infer.serve.generation import too_many_logprobs
from infer.serve.link import Hello
from infer.serve.offload import Offload
from infer.serve.render import Prompt
from infer.serve.schema import MAX_LOGPROB_ENTRIES, SamplingBody, parameter_error
from infer.serve.schema_chat import ChatBody
from infer.serve.text import Tokenizer
from infer.structured import GrammarChecker

MAX_INLINE_BYTES = 20_000  # conversations from longer bodies are rendered off the event loop
# More than so many are checked, and handed on, off the event loop:
MAX_INLINE_PROMPTS = 64
MAX_INLINE_TOKENS = 100_000  # of all prompts
MAX_INLINE_DECODED = 10_000  # of all prompts, where their text is repeated
MAX_INLINE_LISTED = 10_000  # of allowed_token_ids and the like, for all prompts
MAX_CUT_CHARS = 1 << 20  # of a text that may be over the context, because it is cut
MAX_REPEATED = 1 << 24  # characters and token ids of prompts that a reply repeats, for each of its choices


class Prompting:
    """What stands between the bodies of all routes and the engine. Heavy work is done off the event loop.

    default_max_tokens: new tokens where a body leaves their number open and more would fit; None: as many as fit.
    """

    def __init__(
        self, tokenizer: Tokenizer, tokenizer_dir: Path, offload: Offload, default_max_tokens: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._grammars = GrammarChecker(tokenizer_dir)
        self._offload = offload
        self._default_max_tokens = default_max_tokens

    def close(self) -> None:
        """Ends the process that grammars are checked in. Waits for a check under way, a second at most."""
        self._grammars.close()

    async def text_prompts(
        self, texts: list[str], add_special_tokens: bool, body: SamplingBody, hello: Hello
    ) -> list[Prompt]:
        """Texts as prompts, cut to truncate_prompt_tokens. Raises ApiError."""
        for text in texts:
            self._check_chars(len(text), body, hello)
        encoded = await self.encode(texts, add_special_tokens)
        prompts = [Prompt(token_ids, text) for token_ids, text in zip(encoded, texts, strict=True)]
        return [_cut(prompt, body, hello) for prompt in prompts]

    async def chat_prompt(self, body: ChatBody, num_bytes: int, hello: Hello) -> Prompt:
        """A conversation as a prompt, cut to truncate_prompt_tokens. num_bytes: of the HTTP body. Raises ApiError."""
        self._check_chars(await self.chat_chars(body, num_bytes), body, hello)
        text = await self.render_chat(body, num_bytes)
        body.rendered(text)
        [prompt] = await self.text_prompts([text], body.add_special_tokens, body, hello)
        return prompt

    def token_prompts(self, lists: list[list[int]], body: SamplingBody, hello: Hello) -> list[Prompt]:
        """Token ids as prompts, cut to truncate_prompt_tokens."""
        return [_cut(Prompt(token_ids), body, hello) for token_ids in lists]

    async def chat_chars(self, body: ChatBody, num_bytes: int) -> int:
        """Characters of the conversation's texts. num_bytes: of the HTTP body, a measure of the work."""
        return await self._offload.run(num_bytes > MAX_INLINE_BYTES, lambda: num_chars(body.messages))

    async def render_chat(self, body: ChatBody, num_bytes: int) -> str:
        """The text that the chat template makes of a conversation. Raises ApiError."""

        def render() -> str:
            return self._tokenizer.apply_chat_template(body.messages, body.generation_prompt, **body.template_variables)

        try:
            # A template may do much with few bytes, if a request sets its variables.
            return await self._offload.run(num_bytes > MAX_INLINE_BYTES or bool(body.chat_template_kwargs), render)
        except ValueError as error:
            raise bad_request(str(error), "messages") from None

    async def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Raises ApiError."""

        def encode() -> list[list[int]]:
            return [self._tokenizer.encode(text, add_special_tokens) for text in texts]

        try:
            return await self._offload.run_text(sum(map(len, texts)), encode)
        except ValueError as error:
            raise bad_request(str(error)) from None

    def _check_chars(self, size: int, body: SamplingBody, hello: Hello) -> None:
        """Some inputs are slow to tokenize: what cannot fit however it splits is refused before."""
        most = hello.max_model_len * self._tokenizer.max_token_chars
        if body.truncate_prompt_tokens is not None:
            most = max(most, MAX_CUT_CHARS)
        if size > most:
            raise bad_request(
                f"the prompt has {size} characters; {hello.max_model_len} tokens, this model's context, have at most "
                f"{most}", code="context_length_exceeded",
            )  # fmt: skip

    async def requests(self, body: SamplingBody, prompts: list[Prompt], hello: Hello) -> tuple[list[Request], bytes]:
        """One engine request a prompt, each checked whole, and the frames that hand them over: the engine never sees a
        bad one. Raises ApiError."""
        _check_logprob_entries(body, prompts)
        _check_priority(body, hello)

        def work() -> tuple[list[Request], bytes, StructuredOutputs | None]:
            requests = self._build(body, prompts, hello)
            self._give_text(body, prompts)  # after the ids were checked: any integer might stand there
            return requests, submission(requests), body.asked_grammar()

        requests, frames, asked = await self._offload.run(_is_heavy(body, prompts), work)
        compiled = requests[0].params.structured_outputs
        if compiled is not None:
            # The client's own first: an error in it then reads as the client wrote it, not as what was put around it.
            if asked is not None and asked != compiled:
                await self._check_grammar(asked, body.grammar_field)
            await self._check_grammar(compiled, body.grammar_field)
        return requests, frames

    def _give_text(self, body: SamplingBody, prompts: list[Prompt]) -> None:
        """Text for those prompts that the reply repeats and that came as token ids, or were cut. Raises ApiError."""
        if body.echoes_prompt:
            for prompt in prompts:
                if prompt.text is None:
                    prompt.text = self._tokenizer.decode(prompt.token_ids, skip_special_tokens=body.skip_special_tokens)
        _check_repeated(body, prompts)

    async def _check_grammar(self, grammar: StructuredOutputs, field: str) -> None:
        try:
            await self._offload.run_grammar(lambda: self._grammars.check(grammar))
        except ValueError as error:
            message = str(error)
            if field != "structured_outputs":
                message = f"{field}: {message.removeprefix(f'structured_outputs.{grammar.kind}: ')}"
            raise bad_request(message, field) from None

    def _build(self, body: SamplingBody, prompts: list[Prompt], hello: Hello) -> list[Request]:
        requests, job_id = [], uuid.uuid4().hex
        params_of: dict[int, SamplingParams] = {}  # checking them may take long: once for each max_tokens
        bad_words: list[list[int]] = []
        for i, prompt in enumerate(prompts):
            max_tokens = self._max_tokens(body, len(prompt.token_ids), hello.max_model_len)
            try:
                if max_tokens not in params_of:
                    params_of[max_tokens] = body.sampling_params(max_tokens)
                    bad_words = self._tokenizer.bad_words_token_ids(body.bad_words or [])
                    params_of[max_tokens].check_vocabulary(hello.vocab_size)
                check_token_ids(prompt.token_ids, hello.vocab_size, hello.max_model_len)
            except ValueError as error:
                raise parameter_error(error) from None
            seed = secrets.randbits(63) if body.seed is None else body.seed
            requests.append(
                Request(
                    request_id=f"{job_id}-{i}", prompt_token_ids=prompt.token_ids, params=params_of[max_tokens],
                    seed=seed, eos_token_ids=hello.eos_token_ids, bad_words_token_ids=bad_words,
                    priority=body.priority, cache_salt=body.cache_salt,
                )
            )  # fmt: skip
        return requests

    def _max_tokens(self, body: SamplingBody, num_prompt: int, max_model_len: int) -> int:
        """Raises ApiError where prompt and new tokens together exceed the context."""
        wanted = body.max_new_tokens
        if num_prompt >= max_model_len:
            raise too_long(num_prompt, None, max_model_len)
        if wanted is None:
            fits = max_model_len - num_prompt
            return fits if self._default_max_tokens is None else min(fits, self._default_max_tokens)
        if num_prompt + wanted > max_model_len:
            raise too_long(num_prompt, wanted, max_model_len)
        return wanted


def num_chars(value: Any) -> int:
    """Characters of all the texts in a JSON value."""
    total, left = 0, [value]
    while left:
        match left.pop():
            case str() as text:
                total += len(text)
            case list() as items:
                left += items
            case dict() as fields:
                left += fields.values()
    return total


def _cut(prompt: Prompt, body: SamplingBody, hello: Hello) -> Prompt:
    """Keeps the last truncate_prompt_tokens tokens; with -1 as many as leave room for the new ones."""
    keep = body.truncate_prompt_tokens
    if keep == -1:
        keep = max(1, hello.max_model_len - (body.max_new_tokens or 1))
    if keep is None or len(prompt.token_ids) <= keep:
        return prompt
    return Prompt(prompt.token_ids[-keep:])  # without its text, which is another now


def _is_heavy(body: SamplingBody, prompts: list[Prompt]) -> bool:
    """Whether it may take more than some milliseconds to make requests of these."""
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    num_listed = sum(len(x or ()) for x in (body.stop_token_ids, body.allowed_token_ids, body.logit_bias))
    return (
        num_tokens > (MAX_INLINE_DECODED if body.echoes_prompt else MAX_INLINE_TOKENS)
        or num_listed * len(prompts) > MAX_INLINE_LISTED
        or len(prompts) > MAX_INLINE_PROMPTS
        or bool(body.bad_words)
        or body.is_constrained
        or (isinstance(body, ChatBody) and body.is_forced)
    )


def _check_logprob_entries(body: SamplingBody, prompts: list[Prompt]) -> None:
    """Raises ApiError for more log-probabilities than one reply may have, as far as that is known before."""
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    num_entries = body.num_prompt_logprobs_shown * ((body.num_prompt_logprobs or 0) + 1) * num_tokens
    # What is not known before, because max_tokens is not, is counted as it comes; a stream holds none.
    if body.max_new_tokens is not None and body.num_logprobs is not None and not body.stream:
        num_entries += body.num_choices * (body.num_logprobs + 1) * body.max_new_tokens
    if num_entries > MAX_LOGPROB_ENTRIES:
        raise too_many_logprobs(num_entries)


def _check_repeated(body: SamplingBody, prompts: list[Prompt]) -> None:
    """Raises ApiError where the choices together would repeat too much of the prompts."""
    num_chars = len(body.echoed_text)
    if body.echoes_prompt:
        num_chars += sum(len(prompt.text or "") for prompt in prompts)
    num_ids = sum(len(prompt.token_ids) for prompt in prompts) if body.return_token_ids else 0
    repeated = max(body.n, 1) * (num_chars + num_ids)
    if repeated > MAX_REPEATED:
        raise bad_request(
            f"the {body.n} choices would repeat {repeated} characters and token ids of the prompt; one reply may have "
            f"{MAX_REPEATED}. Lower n, or leave out echo and return_token_ids", "n",
        )  # fmt: skip


def _check_priority(body: SamplingBody, hello: Hello) -> None:
    if body.priority != 0 and hello.scheduling_policy != "priority":
        raise bad_request(
            f"priority must be 0 here, not {body.priority}: requests are served first come, first served; the server "
            "would have to be started with --scheduling-policy priority", "priority",
        )  # fmt: skip
