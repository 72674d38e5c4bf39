"""The body of POST /v1/completions. No torch here."""

from typing import Any, ClassVar

from infer.request import MAX_CHOICES
from infer.serve.errors import ApiError, bad_request
from infer.serve.schema import SamplingBody, with_whole_integers


class CompletionBody(SamplingBody):
    """POST /v1/completions. prompt: text, token ids, or a list of either; a list in any case once check() has run.
    max_tokens 0 with echo scores the prompt. best_of: so many choices are generated for each prompt, and the n with the
    highest mean log-probability returned."""

    logprobs_field: ClassVar[str] = "logprobs"

    prompt: Any
    echo: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    @property
    def max_new_tokens(self) -> int | None:
        return 1 if self.only_scores else self.max_tokens

    @property
    def echoes_prompt(self) -> bool:
        return self.echo

    @property
    def only_scores(self) -> bool:
        return self.max_tokens == 0 and self.echo

    @property
    def selects(self) -> bool:
        """Whether only the best choices are returned."""
        return self.best_of is not None and self.best_of > self.n

    @property
    def num_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and self.selects else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        if self.prompt_logprobs is None and self.echo:
            return self.logprobs  # an echoed prompt comes with log-probabilities of its own
        return self.prompt_logprobs

    @property
    def num_prompt_logprobs_shown(self) -> int:
        echoed = self.echo and self.logprobs is not None
        return max(self.n, 1) * (echoed + (self.prompt_logprobs is not None))

    @property
    def num_generated(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def num_choices(self) -> int:
        return len(self.prompt) * max(self.num_generated, 1)

    def check(self) -> None:
        self._check_best_of()
        self.prompt = self._prompt_list()
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens must be at least 1, not 0; with echo, 0 scores the prompt", "max_tokens")
        if self.only_scores and self.min_tokens > 0:
            raise bad_request(f"min_tokens must be at most max_tokens (0), not {self.min_tokens}", "min_tokens")

    def _check_best_of(self) -> None:
        if self.best_of is None:
            return
        if not 1 <= self.n <= self.best_of <= MAX_CHOICES:
            raise bad_request(f"best_of must be from n to {MAX_CHOICES}, not {self.best_of} with n {self.n}", "best_of")
        if self.selects and self.stream:
            raise bad_request("best_of is known only at the end; leave out stream, or set best_of to n", "best_of")
        if self.selects and self.only_scores:
            raise bad_request("best_of needs max_tokens of at least 1", "best_of")

    def _prompt_list(self) -> list[str] | list[list[int]]:
        """Raises ApiError unless `prompt` has one of its four forms, and for too many."""
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) in (int, float)):
            prompt = [prompt]
        if not isinstance(prompt, list):
            raise _bad_prompt()
        if not prompt:
            raise bad_request("prompt is an empty list; give at least one prompt or token id", "prompt")
        each, name = self.num_generated, "n" if self.best_of is None else "best_of"
        if len(prompt) * max(each, 1) > MAX_CHOICES:  # before anything looks at each
            raise bad_request(
                f"one request may ask for {MAX_CHOICES} choices (prompts times {name}), not {len(prompt)} x {each}; "
                "send several requests", "prompt",
            )  # fmt: skip
        prompt = [with_whole_integers(item) for item in prompt]
        if all(isinstance(item, str) for item in prompt) or all(map(_is_token_list, prompt)):
            return prompt
        raise _bad_prompt()


def _is_token_list(value: Any) -> bool:
    # A fresh request is all there is to trust: bool is an int to Python, but not to JSON.
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _bad_prompt() -> ApiError:
    return bad_request(
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids", "prompt"
    )
