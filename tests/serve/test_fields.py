"""Fields of vLLM's protocol beside OpenAI's own, on the completions route and those that both routes share."""

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_engine import MODEL, FakeEngine, is_ready, wait_until

from infer.request import Output, Request, SamplingParams, TokenLogprobs
from infer.serve import prompting
from infer.serve.errors import ApiError
from infer.serve.link import FrontendConfig, Hello
from infer.serve.offload import Offload
from infer.serve.render import Choice, Prompt
from infer.serve.render_completion import CompletionReply
from infer.serve.schema import parse
from infer.serve.schema_completion import CompletionBody
from infer.serve.spawn import spawn_frontend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def calm(served):
    _, engine = served
    engine.delay, engine.tokens_per_step, engine.fail_with = 0.0, 1, None
    engine.requests.clear()


def exchange(served, path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(served[0]).netloc, timeout=20)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
        reply = connection.getresponse()
        data = reply.read().decode()
    finally:
        connection.close()
    if reply.headers["Content-Type"].startswith("text/event-stream"):
        events = [event.removeprefix("data: ") for event in data.split("\n\n")]
        assert events[-2:] == ["[DONE]", ""]
        return reply.status, [json.loads(event) for event in events[:-2]]
    return reply.status, json.loads(data)


def ok(served, path: str, body: dict[str, Any], **headers: str) -> Any:
    status, reply = exchange(served, path, body, **headers)
    assert status == 200, reply
    return reply


def refused(served, path: str, body: dict[str, Any], param: str | None, text: str) -> None:
    before = len(served[1].requests)
    status, reply = exchange(served, path, body)
    assert (status, reply["error"]["param"]) == (400, param), reply
    assert text in reply["error"]["message"], reply
    assert len(served[1].requests) == before, "the engine got it"


# --- best_of ---------------------------------------------------------------------------------------------------------


def test_best_of_generates_more_than_it_returns(served, tokenizer):
    body = {"prompt": ["hello", "the quick"], "max_tokens": 3, "n": 2, "best_of": 4}
    reply = ok(served, COMPLETIONS, body)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in reply["choices"])
    assert reply["usage"]["completion_tokens"] == 2 * 4 * 3
    assert [request.params.n for request in served[1].requests] == [4, 4]
    assert served[1].requests[0].params.logprobs == 0


def test_best_of_takes_the_likeliest_per_token(tokenizer):
    fields = {"prompt": [[65, 66], [67]], "n": 2, "best_of": 3, "logprobs": 1}
    body = parse(json.dumps(fields).encode(), CompletionBody)
    request = Request(request_id="r", prompt_token_ids=[65], params=SamplingParams(n=3), seed=1)
    # (tokens, log-probability of each): the second prompt's longest choice has the lowest sum and the best mean.
    found = [(1, -0.3), (2, -0.1), (1, -0.2), (2, -2.0), (9, -0.5), (1, float("nan"))]
    choices = []
    for index, (count, logprob) in enumerate(found):
        choice = Choice(index, Prompt([65]), request, tokenizer)
        entries = [TokenLogprobs([70 + index], [logprob], [1]) for _ in range(count)]
        choice.accept(Output(request_id="r", token_ids=[70 + index] * count, logprobs=entries))
        choices.append(choice)
    reply = CompletionReply("i", "m", tokenizer, body)
    shown = [reply.whole(choice) for choice in reply.returned(choices)]
    assert [choice["index"] for choice in shown] == [0, 1, 2, 3]
    drawn = [choice["logprobs"]["tokens"][0] for choice in shown]
    assert drawn == [tokenizer.token(70 + index) for index in (1, 2, 4, 3)]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"best_of": 0}, "best_of must be from n to 1024, not 0 with n 1"),
        ({"best_of": 1, "n": 2}, "not 1 with n 2"),
        ({"best_of": 2000}, "not 2000"),
        ({"best_of": 2, "stream": True}, "leave out stream"),
        ({"best_of": 2, "max_tokens": 0, "echo": True}, "best_of needs max_tokens"),
    ],
)
def test_bad_best_of(served, fields, text):
    refused(served, COMPLETIONS, {"prompt": "a", **fields}, "best_of", text)


def test_best_of_n_chooses_nothing(served):
    events = ok(served, COMPLETIONS, {"prompt": "hello", "max_tokens": 2, "best_of": 2, "n": 2, "stream": True})
    assert {event["choices"][0]["index"] for event in events} == {0, 1}
    refused(served, COMPLETIONS, {"prompt": ["a"] * 600, "best_of": 2}, "prompt", "prompts times best_of), not 600 x 2")


# --- what replies tell -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "prefix"), [(COMPLETIONS, "cmpl-"), (CHAT, "chatcmpl-")])
def test_request_id(served, path, prefix):
    body = {"prompt": "hello"} if path == COMPLETIONS else {"messages": USER, "max_tokens": 2}
    assert ok(served, path, {**body, "request_id": "my-1"})["id"] == prefix + "my-1"
    header = {"X-Request-Id": "from-a-proxy"}
    assert ok(served, path, body, **header)["id"] == prefix + "from-a-proxy"
    assert ok(served, path, {**body, "request_id": "my-1"}, **header)["id"] == prefix + "my-1"
    fresh = {ok(served, path, body, **{"X-Request-Id": "a b"})["id"], ok(served, path, body)["id"]}
    assert len(fresh) == 2 and all(len(reply_id) == len(prefix) + 32 for reply_id in fresh)
    for bad in ("", "a b", "é", "x" * 129, "a\nb"):
        refused(served, path, {**body, "request_id": bad}, "request_id", "printable ASCII")


@pytest.mark.parametrize("stream", [False, True])
def test_return_token_ids(served, tokenizer, stream):
    served[1].tokens_per_step = 2
    prompt = "naïve 你好 😀"
    ids = tokenizer.encode(prompt)
    body = {"prompt": prompt, "max_tokens": len(ids), "n": 2, "return_token_ids": True, "stream": stream}
    reply = ok(served, COMPLETIONS, body)
    found: dict[int, list[int]] = {0: [], 1: []}
    prompts: dict[int, list[list[int]]] = {0: [], 1: []}
    for choice in (choice for part in (reply if stream else [reply]) for choice in part["choices"]):
        found[choice["index"]] += choice["token_ids"]
        prompts[choice["index"]] += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
    assert found == {0: ids, 1: [*ids[1:], ids[0]]}
    assert prompts == {0: [ids], 1: [ids]}, "once a choice"


def test_return_token_ids_of_a_chat(served):
    body = {"messages": USER, "max_tokens": 4, "return_token_ids": True}
    whole = ok(served, CHAT, body)
    prompt = served[1].requests[-1].prompt_token_ids
    assert whole["prompt_token_ids"] == prompt and whole["choices"][0]["token_ids"] == prompt[:4]
    first, *others = ok(served, CHAT, {**body, "stream": True})
    assert first["prompt_token_ids"] == prompt and not any("prompt_token_ids" in chunk for chunk in others)
    streamed = [token for chunk in (first, *others) for token in chunk["choices"][0]["token_ids"]]
    assert streamed == prompt[:4]


def test_tokens_after_a_stop_string_are_not_returned(served, tokenizer):
    served[1].tokens_per_step, served[1].delay = 30, 0.05
    text = "abc XYZ def"
    body = {"prompt": text, "max_tokens": 200, "stop": "YZ", "return_token_ids": True, "logprobs": 0}
    choice = ok(served, COMPLETIONS, body)["choices"][0]
    assert choice["text"] == "abc X" and len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])
    spelled = "".join(map(tokenizer.token, choice["token_ids"]))
    assert "YZ" in spelled and not "".join(map(tokenizer.token, choice["token_ids"][:-1])).endswith("YZ")


def test_tokens_as_token_ids(served, tokenizer):
    ids = tokenizer.encode("hello world")
    asked = {"max_tokens": 2, "return_tokens_as_token_ids": True}
    body = {"prompt": "hello world", "echo": True, "logprobs": 1, **asked}
    plain = ok(served, COMPLETIONS, {**body, "return_tokens_as_token_ids": False})["choices"][0]["logprobs"]
    shown = ok(served, COMPLETIONS, body)["choices"][0]["logprobs"]
    assert shown["tokens"] == [f"token_id:{token}" for token in [*ids, *ids[:2]]]
    assert shown["text_offset"] == plain["text_offset"], "offsets are in the text"
    assert [*shown["top_logprobs"][-1]] == [f"token_id:{ids[1]}"]


@pytest.mark.parametrize("skip", [True, False])
def test_text_offsets_are_places_in_the_text(served, tokenizer, skip):
    ids = [*tokenizer.encode("naïve 你好 😀 x"), 1, *tokenizer.encode("end 👩‍👩‍👧")]
    body = {
        "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 3, "skip_special_tokens": skip, "ignore_eos": True,
    }  # fmt: skip
    choice = ok(served, COMPLETIONS, body)["choices"][0]
    text, shown = choice["text"], choice["logprobs"]
    assert sorted(shown["text_offset"]) == shown["text_offset"] and shown["text_offset"][-1] < len(text)
    whole = 0
    for token, offset in zip(shown["tokens"], shown["text_offset"], strict=True):
        if "\ufffd" not in token and not (skip and token == "<|im_start|>"):
            assert text[offset : offset + len(token)] == token
            whole += 1
    assert whole > 8


def test_stream_with_prompt_logprobs(served, tokenizer):
    ids = tokenizer.encode("hello world")
    body = {"prompt": "hello world", "max_tokens": 2, "n": 2, "prompt_logprobs": 1}
    whole = ok(served, COMPLETIONS, body)["choices"][0]["prompt_logprobs"]
    assert whole[0] is None and len(whole) == len(ids)
    chunks = [event["choices"][0] for event in ok(served, COMPLETIONS, {**body, "stream": True})]
    for index in (0, 1):
        first, *others = [chunk for chunk in chunks if chunk["index"] == index]
        assert first["prompt_logprobs"] == whole and not any("prompt_logprobs" in chunk for chunk in others)
    chat = {"messages": USER, "max_tokens": 3, "prompt_logprobs": 1}
    first, *others = ok(served, CHAT, {**chat, "stream": True})
    assert first["prompt_logprobs"] == ok(served, CHAT, chat)["prompt_logprobs"]
    assert others and not any("prompt_logprobs" in chunk for chunk in others)


def engine_requests(tokenizer_path, tokenizer, policy: str = "fcfs", **fields: Any) -> list[Request]:
    """What the engine would get, without a server."""
    hello = Hello(
        generation=0, model_name=MODEL, max_model_len=100, vocab_size=400, eos_token_ids=[2], scheduling_policy=policy
    )  # fmt: skip
    body = parse(json.dumps(fields).encode(), CompletionBody)
    work = prompting.Prompting(tokenizer, tokenizer_path, Offload())
    requests, _ = asyncio.run(work.requests(body, work.token_prompts(body.prompt, body, hello), hello))
    return requests


@pytest.mark.parametrize("field", ["echo", "return_token_ids"])
def test_a_reply_repeats_a_prompt_only_so_often(tokenizer_path, tokenizer, monkeypatch, field):
    monkeypatch.setattr(prompting, "MAX_REPEATED", 20)
    assert len(engine_requests(tokenizer_path, tokenizer, prompt=[65] * 5, n=4, **{field: True})) == 1
    with pytest.raises(ApiError, match="the 5 choices would repeat 25 characters and token ids"):
        engine_requests(tokenizer_path, tokenizer, prompt=[65] * 5, n=5, **{field: True})


# --- what is forgiven, as vLLM does -----------------------------------------------------------------------------------


def test_seed_minus_one_is_none(served):
    for _ in range(2):
        ok(served, COMPLETIONS, {"prompt": "hello", "seed": -1})
    seeds = {request.seed for request in served[1].requests}
    assert len(seeds) == 2 and -1 not in seeds
    assert all(request.params.seed is None for request in served[1].requests)


def test_whole_floats_are_integers(served):
    fields = {"max_tokens": 4.0, "top_k": 5.0, "seed": 7.0, "n": 2.0, "stop_token_ids": [5, 6.0], "logprobs": 1.0}
    reply = ok(served, COMPLETIONS, {"prompt": [65, 66.0], **fields})
    assert reply["usage"]["completion_tokens"] == 8
    request = served[1].requests[-1]
    assert request.prompt_token_ids == [65, 66] and request.seed == 7
    assert (request.params.max_tokens, request.params.top_k, request.params.stop_token_ids) == (4, 5, [5, 6])
    ok(served, COMPLETIONS, {"prompt": [[65.0], [66]]})
    assert [request.prompt_token_ids for request in served[1].requests[-2:]] == [[65], [66]]
    ok(served, CHAT, {"messages": USER, "max_completion_tokens": 3.0, "best_of": 1.0})
    assert served[1].requests[-1].params.max_tokens == 3


@pytest.mark.parametrize("value", [16.5, "16", True, 2.0**60, [16.0]])
def test_what_is_no_integer(served, value):
    refused(served, COMPLETIONS, {"prompt": "a", "max_tokens": value}, "max_tokens", "max_tokens: expected int")
    for prompt in ([value], [65, value], [[65], [66, value]]):
        if value not in ("16", [16.0]):
            refused(served, COMPLETIONS, {"prompt": prompt}, "prompt", "prompt must be a string")


@pytest.mark.parametrize("options", [{}, {"include_usage": False, "continuous_usage_stats": None}])
def test_stream_options_that_ask_for_nothing(served, options):
    assert ok(served, COMPLETIONS, {"prompt": "hello", "stream_options": options})["object"] == "text_completion"
    fields = {"prompt": "hello", "stream_options": {**options, "continuous_usage_stats": True}}
    refused(served, COMPLETIONS, fields, "stream_options", "stream_options.continuous_usage_stats needs stream")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_an_empty_model_is_the_one_that_is_served(served, path):
    body = {"messages": USER, "model": ""} if path == CHAT else {"prompt": "hello", "model": ""}
    assert ok(served, path, body).get("model", MODEL) == MODEL


NEUTRAL: dict[str, Any] = {
    "vllm_xargs": {}, "mm_processor_kwargs": {}, "kv_transfer_params": {}, "watermarking": False,
    "return_token_offsets": False, "stream_interval": 1, "truncation_side": "left", "guided_decoding_backend": "auto",
    "session_id": "conversation 5",
}  # fmt: skip
ASKING: dict[str, Any] = {
    "vllm_xargs": {"a": 1}, "mm_processor_kwargs": {"a": 1}, "kv_transfer_params": {"a": 1}, "watermarking": True,
    "return_token_offsets": True, "stream_interval": 2, "truncation_side": "right", "guided_decoding_backend": "x",
    "thinking_token_budget": 5, "logprob_token_ids": [5], "repetition_detection": {"a": 1}, "media_io_kwargs": {"a": 1},
    "mm_payload": {"a": 1}, "return_mm_kwargs": True, "ec_transfer_params": {"a": 1}, "routed_experts_prompt_start": 0,
    "guided_whitespace_pattern": " ",
}  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_extras_of_vllm_that_ask_for_nothing(served, path):
    ok(served, path, {**({"prompt": "hello"} if path == COMPLETIONS else {"messages": USER}), "n": 1, **NEUTRAL})


@pytest.mark.parametrize("field", ASKING)
def test_extras_of_vllm_that_are_not_here(served, field):
    body = {"prompt": "a", field: ASKING[field]}
    refused(served, COMPLETIONS, body, field, f"{field} is not supported by this server: ")


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_the_usage_of_a_chunk_is_its_choices(served, tokenizer, last):
    served[1].tokens_per_step = 2
    options = {"continuous_usage_stats": True, "include_usage": last}
    body = {"prompt": ["hello", "the quick brown fox"], "n": 2, "max_tokens": 6, "stream": True}
    num_prompt = [len(tokenizer.encode(text)) for text in body["prompt"]]
    events = ok(served, COMPLETIONS, {**body, "stream_options": options})
    if last:
        used = events.pop()["usage"]
        assert (used["completion_tokens"], used["prompt_tokens"]) == (24, sum(num_prompt))
    found: dict[int, list[dict[str, Any]]] = {index: [] for index in range(4)}
    for event in events:
        [choice] = event["choices"]
        found[choice["index"]].append(event["usage"])
    for index, usages in found.items():
        counts = [used["completion_tokens"] for used in usages]
        assert counts == sorted(set(counts)) and counts[-1] == 6
        assert {used["prompt_tokens"] for used in usages} == {num_prompt[index // 2]}
        assert [used["total_tokens"] for used in usages] == [num_prompt[index // 2] + count for count in counts]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_truncate_prompt_tokens(served, tokenizer):
    text = "the quick brown fox jumps over the lazy dog " * 100
    ids = tokenizer.encode(text)
    asked = {"max_tokens": 6, "truncate_prompt_tokens": 10}
    reply = ok(served, COMPLETIONS, {"prompt": text, "echo": True, **asked})
    assert served[1].requests[-1].prompt_token_ids == ids[-10:] and reply["usage"]["prompt_tokens"] == 10
    assert reply["choices"][0]["text"].startswith(tokenizer.decode(ids[-10:])), "the prompt as it was used"
    ok(served, COMPLETIONS, {"prompt": ids, **asked})
    assert served[1].requests[-1].prompt_token_ids == ids[-10:]
    ok(served, COMPLETIONS, {"prompt": text, **asked, "truncate_prompt_tokens": -1})
    assert served[1].requests[-1].prompt_token_ids == ids[-250:], "250 and 6 are the context"
    ok(served, COMPLETIONS, {"prompt": "hello", **asked, "truncate_prompt_tokens": 1000})
    assert served[1].requests[-1].prompt_token_ids == tokenizer.encode("hello")
    ok(served, CHAT, {"messages": [{"role": "user", "content": text}], **asked})
    assert len(served[1].requests[-1].prompt_token_ids) == 10
    ok(served, CHAT, {"messages": [{"role": "user", "content": text}], "truncate_prompt_tokens": -1})
    assert len(served[1].requests[-1].prompt_token_ids) == 255
    for bad in (0, -2):
        refused(served, COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": bad}, "truncate_prompt_tokens", "-1")


def test_priority_and_cache_salt(served, tokenizer_path, tokenizer):
    [request] = engine_requests(tokenizer_path, tokenizer, "priority", prompt=[65], priority=-5)
    assert request.priority == -5
    ok(served, COMPLETIONS, {"prompt": "hello", "priority": 0, "cache_salt": "team a"})
    assert served[1].requests[-1].cache_salt == "team a"
    refused(served, COMPLETIONS, {"prompt": "a", "priority": 5}, "priority", "--scheduling-policy priority")
    refused(served, COMPLETIONS, {"prompt": "a", "priority": 2**40}, "priority", "priority must be from")
    for salt in ("", "x" * 300):
        refused(served, COMPLETIONS, {"prompt": "a", "cache_salt": salt}, "cache_salt", "1 to 256 characters")


# --- what the text must be -------------------------------------------------------------------------------------------

NAMED = {"name": "a", "strict": True}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"structured_outputs": {"regex": "[0-9]+", "json": None}}, "regex", "[0-9]+"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", ["yes", "no"]),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "grammar", 'start: "a" | "b"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_object", True),
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "schema": SCHEMA}}},
            "json", SCHEMA,
        ),
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, "regex", "a"),
    ],
)  # fmt: skip
def test_structured_outputs_reach_the_engine(served, path, fields, kind, value):
    body = {"prompt": "hello"} if path == COMPLETIONS else {"messages": USER}
    ok(served, path, {**body, "max_tokens": 1, **fields})
    found = served[1].requests[-1].params.structured_outputs
    if kind is None:
        assert found is None
        return
    shown = getattr(found, kind)
    assert found.kind == kind and (json.loads(shown) if kind == "json" else shown) == value


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag is not supported"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "unknown field regexp"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "structured_outputs.regex: "),
        ({"structured_outputs": {"grammar": "no grammar"}}, "structured_outputs", "structured_outputs.grammar: "),
        ({"structured_outputs": {"json": {"type": "nonsense"}}}, "structured_outputs", "structured_outputs.json: "),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "1 to 1024"),
        ({"structured_outputs": {"regex": "a" * (65 << 10)}}, "structured_outputs", "65536 bytes"),
        ({"response_format": {"type": "xml"}}, "response_format", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "response_format.json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format", "name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format", "response_format.json_schema.schema is missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}},
            "response_format", "response_format: ",
        ),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format", "goes with type json_schema, not text",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs", "both say",
        ),
        ({"guided_regex": "a"}, "guided_regex", "use structured_outputs.regex"),
    ],
)  # fmt: skip
def test_bad_structured_outputs(served, fields, param, text):
    refused(served, COMPLETIONS, {"prompt": "hello", **fields}, param, text)


def test_bad_words(served, tokenizer):
    ok(served, COMPLETIONS, {"prompt": "hello", "bad_words": ["fox", "lazy dog"]})
    request = served[1].requests[-1]
    assert request.params.bad_words == ["fox", "lazy dog"]
    assert request.bad_words_token_ids == tokenizer.bad_words_token_ids(["fox", "lazy dog"])
    refused(served, COMPLETIONS, {"prompt": "a", "bad_words": [" "]}, "bad_words", "not blank")
    refused(served, COMPLETIONS, {"prompt": "a", "bad_words": ["x"] * 1001}, "bad_words", "1000 entries")


def test_suffix_is_refused_with_a_reason(served):
    refused(served, COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "not trained to fill in")


# --- the server's settings -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tokenizer_path: Path, tokenizer) -> Iterator[tuple[str, FakeEngine]]:
    """A server with sampling defaults of the checkpoint's, a time limit, and a name for what it runs."""
    handle = spawn_frontend(
        FrontendConfig(
            port=0, model_path=str(tokenizer_path), tokenizer_path=str(tokenizer_path), served_model_name=(MODEL,),
            request_timeout=1.0, system_fingerprint="fp_1234", enable_request_id_headers=True,
            default_sampling={"temperature": 0.25, "top_k": 7, "max_tokens": 20},
        )
    )  # fmt: skip
    try:
        handle.wait_ready()
        engine = FakeEngine(handle, tokenizer)
        engine.hello()
        wait_until(lambda: is_ready(handle.port))
        yield f"http://127.0.0.1:{handle.port}", engine
        engine.close()
    finally:
        handle.stop(timeout=5)


def test_sampling_defaults(tuned):
    ok(tuned, COMPLETIONS, {"prompt": "hello"})
    params = tuned[1].requests[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.25, 7, 1.0, 16)
    ok(tuned, COMPLETIONS, {"prompt": "hello", "temperature": 0.5, "top_k": None, "max_tokens": 30})
    params = tuned[1].requests[-1].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 30)
    ok(tuned, CHAT, {"messages": USER})
    assert tuned[1].requests[-1].params.max_tokens == 20
    ok(tuned, CHAT, {"messages": USER, "max_completion_tokens": 30})
    assert tuned[1].requests[-1].params.max_tokens == 30


@pytest.mark.parametrize("stream", [False, True])
def test_the_request_id_is_the_header_too(tuned, stream):
    def headers(fields: dict[str, Any], **sent: str) -> tuple[str, str]:
        connection = http.client.HTTPConnection(urlsplit(tuned[0]).netloc, timeout=20)
        body = json.dumps({"prompt": "hello", "stream": stream, **fields})
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json", **sent})
        reply = connection.getresponse()
        data = reply.read().decode().removeprefix("data: ").split("\n\n")[0]
        connection.close()
        return reply.headers["X-Request-Id"], json.loads(data)["id"]

    assert headers({"request_id": "mine"}) == ("mine", "cmpl-mine")
    assert headers({}, **{"X-Request-Id": "proxy"}) == ("proxy", "cmpl-proxy")
    header, reply_id = headers({})
    assert reply_id == "cmpl-" + header


def test_system_fingerprint(tuned):
    assert ok(tuned, COMPLETIONS, {"prompt": "hello"})["system_fingerprint"] == "fp_1234"
    events = ok(tuned, CHAT, {"messages": USER, "max_tokens": 2, "stream": True})
    assert {event["system_fingerprint"] for event in events} == {"fp_1234"}


@pytest.mark.parametrize("stream", [False, True])
def test_request_timeout(tuned, stream):
    _, engine = tuned
    engine.delay = 0.05
    try:
        status, reply = exchange(tuned, COMPLETIONS, {"prompt": "hello", "max_tokens": 200, "stream": stream})
    finally:
        engine.delay = 0.0
    error = (reply[-1] if stream else reply)["error"]
    assert status == (200 if stream else 408)
    assert error["code"] == "timeout" and "longer than 1 s (--request-timeout" in error["message"]
    wait_until(lambda: engine.num_running == 0)
