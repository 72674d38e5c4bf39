"""--enable-log-requests: one line a request, with nothing of what it says. No torch here."""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from infer.request import Request, SamplingParams

MAX_PARAMS_CHARS = 400
MAX_SHOWN_ENTRIES = 8  # of a list or mapping; of longer ones only their length is told

# Parameters that hold a user's words: only that they are there is told.
_TEXTS = ("stop", "bad_words", "structured_outputs")

logger = logging.getLogger("infer.frontend")


def log_request(route: str, reply_id: str, requests: Sequence[Request]) -> None:
    """Says what a client asked for: the reply's id, the route, tokens of each prompt, and the first one's parameters,
    which are all the same but for max_tokens and seed."""
    lengths = [len(request.prompt_token_ids) for request in requests]
    tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{sum(lengths)} (in {len(lengths)} prompts)"
    logger.info("Request %s: %s, prompt tokens: %s, params: %s", reply_id, route, tokens, _show(requests[0].params))


def _show(params: SamplingParams) -> str:
    """The parameters that are not at their defaults."""
    values, defaults = msgspec.structs.asdict(params), msgspec.structs.asdict(SamplingParams())
    given = {name: value for name, value in values.items() if value != defaults[name]}
    text = ", ".join(f"{name}={_show_value(name, value)}" for name, value in given.items()) or "defaults"
    return text if len(text) <= MAX_PARAMS_CHARS else text[:MAX_PARAMS_CHARS] + "..."


def _show_value(name: str, value: Any) -> str:
    if name in _TEXTS:
        return "..."
    if isinstance(value, (list, dict)) and len(value) > MAX_SHOWN_ENTRIES:
        return f"({len(value)} entries)"
    return str(value)
