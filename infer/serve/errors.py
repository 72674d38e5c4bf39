"""Errors as clients get them: an HTTP status and OpenAI's error object. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

MAX_MESSAGE_CHARS = 1000  # of an error's text


class ApiError(Exception):
    """An error as the client gets it: an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, type: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[:MAX_MESSAGE_CHARS] + "..."
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object clients know."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unavailable(message: str, code: str, retry_s: int | None = 1) -> ApiError:
    """503. retry_s: when it is worth another try, where that can be said."""
    headers = {} if retry_s is None else {"Retry-After": str(retry_s)}
    return ApiError(503, message, type="service_unavailable", code=code, headers=headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def show(value: Any) -> str:
    """A value of unknown size, for an error's text."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    if isinstance(value, (bool, int, float)):
        return str(value).lower()[:40]
    return "an object" if isinstance(value, dict) else "a list"


def model_not_found(name: str, served: str) -> ApiError:
    message = f"the model {show(name)} does not exist; this server has {served!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def check_model(name: str | None, served: Sequence[str]) -> None:
    """Raises ApiError (404) unless a request that names this model may be served here; None and "" name none. served:
    at least one name."""
    if name and name not in served:
        raise model_not_found(name, served[0])


def too_long(num_prompt: int, max_new_tokens: int | None, max_model_len: int) -> ApiError:
    """The prompt, alone or with the tokens asked for, is over the context."""
    asked = "" if max_new_tokens is None else f" and asks for {max_new_tokens} more"
    return bad_request(
        f"this model's maximum context length is {max_model_len} tokens; the prompt has {num_prompt} tokens{asked}. "
        "Shorten the prompt or ask for fewer tokens",
        param=None if max_new_tokens is None else "max_tokens", code="context_length_exceeded",
    )  # fmt: skip
