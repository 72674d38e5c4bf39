"""The HTTP routes: the real frontend process, a fake engine, the openai package and raw bodies as clients."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from fake_engine import wait_until

MODEL = "tiny"


@pytest.fixture
def client(served):
    url, engine = served
    engine.delay, engine.tokens_per_step, engine.fail_with = 0.0, 1, None
    engine.requests.clear()
    engine.aborts.clear()
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=20)


def test_completion(client, served, tokenizer):
    prompt = "hello world, this is"
    ids = tokenizer.encode(prompt)
    reply = client.completions.create(model=MODEL, prompt=prompt, max_tokens=len(ids), seed=7)
    assert reply.id.startswith("cmpl-") and reply.object == "text_completion" and reply.model == MODEL
    assert reply.choices[0].text == prompt
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(ids))
    assert reply.usage.total_tokens == 2 * len(ids)
    assert reply.usage.prompt_tokens_details.cached_tokens == 1
    assert served[1].requests[0].seed == 7 and served[1].requests[0].eos_token_ids == [2]


def test_unseeded_requests_get_seeds_of_their_own(client, served):
    for _ in range(3):
        client.completions.create(model=MODEL, prompt="hello", max_tokens=1)
    seeds = [request.seed for request in served[1].requests]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_completion_stream_equals_whole(client, served, tokens_per_step):
    served[1].tokens_per_step = tokens_per_step
    asked: dict[str, Any] = {"model": MODEL, "prompt": "naïve 你好 😀 café", "max_tokens": 30, "n": 2}
    whole = client.completions.create(**asked)
    texts, reasons, used = ["", ""], [None, None], None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert "\ufffd" not in choice.text
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        used = chunk.usage or used
    assert texts == [choice.text for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == ["length", "length"]
    assert used == whole.usage and used.completion_tokens == 60


def test_many_prompts_of_every_form(client, tokenizer):
    ids = [tokenizer.encode("hello"), tokenizer.encode("the quick")]
    reply = client.completions.create(model=MODEL, prompt=["hello", "the quick"], max_tokens=2, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    same = client.completions.create(model=MODEL, prompt=ids, max_tokens=2, n=2)
    assert [choice.text for choice in same.choices] == [choice.text for choice in reply.choices]
    one = client.completions.create(model=MODEL, prompt=ids[1], max_tokens=2)
    assert one.choices[0].text == reply.choices[2].text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(client, served, stream, include):
    served[1].tokens_per_step, served[1].delay = 4, 0.05  # slow enough to be stopped before it ends by itself
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": "abc XYZ def", "max_tokens": 100, "stop": ["nope", "YZ d"], "n": 2,
        "extra_body": {"include_stop_str_in_output": include},
    }  # fmt: skip
    if stream:
        text = reason = ""
        for chunk in client.completions.create(**asked, stream=True):
            if chunk.choices[0].index == 0:
                text += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason or reason
                stop = chunk.choices[0].stop_reason
    else:
        choice = client.completions.create(**asked).choices[0]
        text, reason, stop = choice.text, choice.finish_reason, choice.stop_reason
    assert text == ("abc XYZ d" if include else "abc X")
    assert reason == "stop" and stop == "YZ d"
    wait_until(lambda: served[1].num_running == 0)
    assert served[1].aborts, "the engine was not told that nobody waits any more"


def test_end_token_is_not_text(client, tokenizer):
    ids = [*tokenizer.encode("hello"), 2]
    choice = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=50, extra_body={"skip_special_tokens": False}
    ).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("hello", "stop", None)
    on = client.completions.create(model=MODEL, prompt=ids, max_tokens=20, extra_body={"ignore_eos": True})
    assert on.choices[0].text.startswith("hellohello") and on.usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_and_echo(client, tokenizer, stream):
    prompt = "hello world, test"
    ids = tokenizer.encode(prompt)
    assert len(ids) > 3
    asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "logprobs": 2, "echo": True, "n": 2}
    text, tokens, numbers, tops, offsets = "", [], [], [], []
    replies = client.completions.create(**asked, stream=True) if stream else [client.completions.create(**asked)]
    for reply in replies:
        for choice in (c for c in reply.choices if c.index == 0):
            text += choice.text
            tokens += choice.logprobs.tokens
            numbers += choice.logprobs.token_logprobs
            tops += choice.logprobs.top_logprobs
            offsets += choice.logprobs.text_offset
    assert text == prompt + tokenizer.decode(ids[:3])
    assert tokens == [tokenizer.token(i) for i in [*ids, *ids[:3]]]
    assert numbers == [None] + [-0.5] * (len(ids) + 2)
    assert tops[0] is None and all(len(top) == 2 for top in tops[1:])
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_prompt_logprobs(client, tokenizer):
    reply = client.completions.create(
        model=MODEL, prompt="hello world", max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    ids = tokenizer.encode("hello world")
    shown = reply.choices[0].prompt_logprobs
    assert shown[0] is None and len(shown) == len(ids)
    assert shown[1][str(ids[1])] == {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token(ids[1])}


def test_chat(client, served, tokenizer):
    parts = [{"type": "text", "text": "hi"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    reply = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=4)
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert served[1].requests[-1].prompt_token_ids == tokenizer.encode(text, add_special_tokens=False)
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant" and reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 4


def test_chat_runs_to_the_context_by_default(client, served):
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    request = served[1].requests[-1]
    assert request.params.max_tokens == 256 - len(request.prompt_token_ids)


def test_chat_stream_with_logprobs(client, served):
    served[1].tokens_per_step = 2
    messages = [{"role": "user", "content": "你好"}]
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=20, stream=True, logprobs=True, top_logprobs=2, seed=1,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )  # fmt: skip
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant" and all(delta.delta.role is None for delta in deltas[1:])
    entries = [entry for delta in deltas for entry in delta.logprobs.content]
    assert len(entries) == 20 and all(len(entry.top_logprobs) == 2 for entry in entries)
    text = "".join(delta.delta.content or "" for delta in deltas)
    spelled = bytes(byte for entry in entries for byte in entry.bytes)
    for special in (b"<|im_start|>", b"<|im_end|>"):  # spelled in the log-probabilities, left out of the text
        spelled = spelled.replace(special, b"")
    assert text.encode() == spelled
    assert deltas[-1].finish_reason == "length"
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 20 and chunks[-1].choices == []


def test_continue_final_message(client, served, tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=1, extra_body={"continue_final_message": True}
    )
    assert tokenizer.decode(served[1].requests[-1].prompt_token_ids, skip_special_tokens=False).endswith("The answer")


def test_models_health_version(client, served):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert client.get("/../version", cast_to=object)["version"]


@pytest.mark.parametrize("stream", [False, True])
def test_score_a_prompt(client, served, tokenizer, stream):
    ids = tokenizer.encode("hello world, test")
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": "hello world, test", "max_tokens": 0, "echo": True, "logprobs": 1, "n": 2,
    }  # fmt: skip
    if stream:
        *replies, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        choices, used = [choice for reply in replies for choice in reply.choices], last.usage
    else:
        reply = client.completions.create(**asked)
        choices, used = reply.choices, reply.usage
    assert sorted(choice.index for choice in choices) == [0, 1]
    for choice in choices:
        assert (choice.text, choice.finish_reason) == ("hello world, test", "length")
        assert choice.logprobs.tokens == [tokenizer.token(token) for token in ids]
        assert choice.logprobs.token_logprobs == [None] + [-0.5] * (len(ids) - 1)
    assert (used.prompt_tokens, used.completion_tokens) == (len(ids), 0)
    assert served[1].requests[-1].params.max_tokens == 1


def test_replies_may_be_sent_back(client, served, tokenizer):
    user = {"role": "user", "content": "hi"}
    reply = client.chat.completions.create(model=MODEL, messages=[user], max_tokens=3).choices[0].message
    empty = {"tool_calls": [], "annotations": [], "refusal": None, "function_call": None, "audio": None}
    messages = [user, reply.model_dump(), user, {"role": "assistant", "content": None, **empty}, user]
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    shown = tokenizer.decode(served[1].requests[-1].prompt_token_ids, skip_special_tokens=False)
    turns = f"user\nhi<|im_end|>\n<|im_start|>assistant\n{reply.content}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert turns in shown and "<|im_start|>assistant\n<|im_end|>\n" in shown and "None" not in shown


def test_a_stream_without_obfuscation(client):
    options = {"include_usage": True, "include_obfuscation": False}
    chunks = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=4, stream=True, stream_options=options
    )  # fmt: skip
    assert [*chunks][-1].usage.completion_tokens == 4


def test_logprobs_of_a_chat_to_the_end_of_the_context(client, served):
    """What max_tokens does not bound is counted as it comes; 60 choices to the end have over 2^18 entries."""
    served[1].tokens_per_step = 100
    asked = {
        "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20, "ignore_eos": True,
    }  # fmt: skip
    status, reply = post(served, "/v1/chat/completions", {**asked, "n": 10})
    assert status == 200 and b'"finish_reason":"length"' in reply
    status, reply = post(served, "/v1/chat/completions", {**asked, "n": 60})
    assert status == 400 and b"one reply may have 262144" in reply
    wait_until(lambda: served[1].num_running == 0)
    # A stream is not bounded, but its reader has to keep up: a fifth of what may wait for it comes at a time.
    served[1].tokens_per_step, served[1].delay = 10, 0.1
    status, reply = post(served, "/v1/chat/completions", {**asked, "n": 60, "stream": True})
    assert status == 200 and reply.endswith(b"data: [DONE]\n\n") and b'"error"' not in reply
    assert reply.count(b'"top_logprobs"') > 60 * 220
    served[1].tokens_per_step, served[1].delay = 1, 0.0


def test_engine_error(client, served):
    served[1].fail_with = "the logits were not finite"
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client.completions.create(model=MODEL, prompt="hello")
    with pytest.raises(openai.InternalServerError, match="not finite"):
        list(client.completions.create(model=MODEL, prompt="hello", stream=True))


def test_neutral_fields_are_accepted(client):
    client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi", "name": "me"}], max_tokens=1, user="u", store=False,
        metadata={"a": "b"}, service_tier="auto", response_format={"type": "text"}, tool_choice="none", n=1,
        logit_bias={"5": 1}, parallel_tool_calls=True, extra_body={"stop": None, "tools": None},
    )  # fmt: skip


def post(served, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(served[0]).netloc, timeout=20)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_stream_is_sse(served):
    connection = http.client.HTTPConnection(urlsplit(served[0]).netloc, timeout=10)
    body = json.dumps({"prompt": "hello", "max_tokens": 2, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    events = reply.read().decode().split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-2])
