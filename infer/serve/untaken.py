"""Fields of request bodies that no struct takes: accepted without effect, or refused with a reason. No torch here.

docs/api.md lists them; a test compares the two.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from infer.serve.errors import bad_request

# What OpenAI defines and what changes nothing here, whatever its value.
IGNORED = frozenset(
    {"user", "metadata", "safety_identifier", "session_id", "prompt_cache_key", "prompt_cache_retention"}
)

# Field -> the values that ask for nothing, and a sentence for the others. A route that takes a field has it in its
# struct, and never looks here.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "nothing is stored here"),
    "service_tier": (("auto", "default"), "there is one tier; use auto"),
    "modalities": ((["text"],), "only text is supported"),
    "suffix": (("",), "the model completes at the end; it was not trained to fill in text between prompt and suffix"),
    "best_of": ((1,), "it belongs to /v1/completions; use n"),
    "tools": (([],), "tool calls belong to /v1/chat/completions"),
    "tool_choice": (("none", "auto"), "tool calls belong to /v1/chat/completions"),
    "functions": (([],), "it is the older name of tools"),
    "function_call": (("none", "auto"), "it is the older name of tool_choice"),
    "documents": (([],), "it belongs to /v1/chat/completions"),
    "use_beam_search": ((False,), "tokens are sampled; use n and best_of"),
    "length_penalty": ((1,), "it belongs to beam search, which is not supported"),
    "early_stopping": ((False,), "it belongs to beam search, which is not supported"),
    "return_prompt_text": ((False,), "use echo"),
    "prompt_embeds": ((), "prompts are text or token ids"),
    "chat_template": ((), "templates come from the checkpoint or --chat-template, never from a request"),
    "guided_json": ((), "use structured_outputs.json"),
    "guided_regex": ((), "use structured_outputs.regex"),
    "guided_choice": ((), "use structured_outputs.choice"),
    "guided_grammar": ((), "use structured_outputs.grammar"),
    "structural_tag": ((), "use structured_outputs.json, regex or grammar"),
    "verbosity": (("medium",), "no model here takes it; say it in the prompt"),
    "audio": ((), "only text is supported"),
    "prediction": ((), "predicted outputs are not supported"),
    "web_search_options": ((), "this server does not search the web"),
    "moderation": ((), "this server does not moderate"),
    "logits_processors": (([],), "requests carry no code; use logit_bias, bad_words or structured_outputs"),
    "mm_processor_kwargs": (({},), "only text is supported"),
    "mm_payload": ((), "only text is supported"),
    "media_io_kwargs": (({},), "only text is supported"),
    "return_mm_kwargs": ((False,), "only text is supported"),
    "extra_args": (({},), "there are no plugins to read it"),
    "vllm_xargs": (({},), "there are no plugins to read it"),
    "kv_transfer_params": (({},), "prefill and decode run in one engine"),
    "ec_transfer_params": (({},), "prompts are text, so that there is no encoder"),
    "truncation_side": (("left",), "truncate_prompt_tokens keeps the last tokens and cuts on the left"),
    "thinking_token_budget": ((), "reasoning has no limit of its own; use max_completion_tokens or reasoning_effort"),
    "repetition_detection": ((), "use repetition_penalty, frequency_penalty or presence_penalty"),
    "logprob_token_ids": (([],), "logprobs gives the likeliest tokens, not chosen ones"),
    "return_token_offsets": ((False,), "use logprobs of /v1/completions, whose text_offset says where tokens begin"),
    "routed_experts_prompt_start": ((), "replies do not tell which experts were used"),
    "stream_interval": ((1,), "chunks are sent as tokens come"),
    "watermarking": ((False,), "texts are not watermarked"),
    "guided_decoding_backend": (("auto", "guidance"), "there is one, llguidance"),
    "guided_whitespace_pattern": ((), "use structured_outputs.whitespace_pattern"),
}


def check_untaken(name: str, value: Any, taken: Iterable[str]) -> None:
    """Raises ApiError (400) that names the field unless it is without effect. taken: what the route does take."""
    if name in IGNORED:
        return
    if name in REFUSED:
        neutral, sentence = REFUSED[name]
        # 1.0 is 1; True is not, though it is to Python.
        if any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral):
            return
        raise bad_request(f"{name} is not supported by this server: {sentence}", name)
    near = difflib.get_close_matches(name[:64], list(taken), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise bad_request(f"unknown field {name[:64]!r}{hint}", name[:64])
