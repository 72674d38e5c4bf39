"""The server as users of the official openai package see it: one real server, the SDK's calls, types and exceptions."""

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from serving import SMOLLM2, Server, server

NAME = "SmolLM2-135M-Instruct"
KEY = "sk-test-5d1f"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip

# What the model is made to say: characters of several tokens, joined characters, code, writing to the left.
CORPUS = [
    "Families 👨‍👩‍👧‍👦 and flags 🇫🇷🇯🇵 👍🏽!",
    "東京都の天気は晴れです。한국어도 됩니다. 你好，世界！",
    "café naïve Z͑ͦa̩l̚g̐o नमस्ते สวัสดี",
    "def f(x):\n    return {'a': [x ** 2, \"\\t\"]}  # → ok\n\n\nfor i in range(3): print(f(i))",
    "مرحبا שלום 1234567890   spaces\tand\ttabs ...",
]  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    flags = (
        "--model", SMOLLM2, "--dtype", "float32", "--max-model-len", 1024, "--kv-cache-memory-bytes", "128M",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--api-key", KEY,
    )  # fmt: skip
    with server(*flags, ranks=None) as started:
        yield started


@pytest.fixture
def client(running: Server) -> Iterator[openai.OpenAI]:
    """A client; after the test nothing runs and every block is free."""
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made
    _wait_for(running, num_running=0, blocks_in_use=False)


def _metric(running: Server, name: str) -> float:
    request = urllib.request.Request(f"{running.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        text = reply.read().decode()
    found = re.search(rf"^infer:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"{name} is not in\n{text}"
    return float(found[1])


def _wait_for(running: Server, *, num_running: int, blocks_in_use: bool) -> None:
    """The engine tells its figures as soon as it begins and ends to work."""
    deadline = time.monotonic() + 20
    while True:
        found = _metric(running, "num_requests_running"), _metric(running, "kv_cache_usage_perc") > 0
        if found == (num_running, blocks_in_use):
            return
        assert time.monotonic() < deadline, f"{found[0]:g} requests run, blocks are held: {found[1]}"
        time.sleep(0.05)


def _chat(client: openai.OpenAI, **body: Any) -> Any:
    return client.chat.completions.create(**{"model": NAME, "messages": QUESTION, "temperature": 0, **body})


def _exactly(text: str, **more: Any) -> dict[str, Any]:
    """Makes the model say this."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}, **more}, "max_tokens": 300}


# ---------------------------------------------------------------------------------------------------- completions


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=NAME, prompt=["The capital of France is", "1, 2, 3, 4,"], max_tokens=6, n=2, temperature=0, logprobs=3
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == reply.choices[1].text  # greedy
    assert reply.choices[0].text.startswith(" Paris")
    assert reply.choices[2].text.startswith(" 5, 6")
    assert reply.usage is not None and reply.usage.completion_tokens == 24
    for choice in reply.choices:
        found = choice.logprobs
        assert choice.finish_reason == "length"
        assert "".join(found.tokens) == choice.text
        assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(6)]
        for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
            assert logprob <= 0 and top[token] == pytest.approx(max(top.values()))
            assert 3 <= len(top) <= 4


def test_completions_echo_and_best_of(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=NAME, prompt="The capital of France is", echo=True, max_tokens=2, temperature=0
    )
    assert reply.choices[0].text.startswith("The capital of France is Paris")
    best = client.completions.create(model=NAME, prompt="Once", best_of=4, n=2, max_tokens=8, temperature=1.5, seed=3)
    assert len(best.choices) == 2
    alone = client.completions.create(
        model=NAME, prompt="Once", n=4, max_tokens=8, temperature=1.5, seed=3, logprobs=0
    )
    means = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in alone.choices}
    assert [c.text for c in best.choices] == sorted(means, key=means.__getitem__, reverse=True)[:2]


def test_completions_stream(client: openai.OpenAI) -> None:
    body = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.8, "seed": 7, "n": 2}
    whole = client.completions.create(**body)
    texts, finished, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finished[choice.index] = choice.finish_reason or finished[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert finished == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


# ----------------------------------------------------------------------------------------------------------- chat


def test_chat(client: openai.OpenAI) -> None:
    reply = _chat(client, max_completion_tokens=32, logprobs=True, top_logprobs=2)
    [choice] = reply.choices
    assert choice.message.content == "The capital of France is Paris."
    assert choice.finish_reason == "stop"
    assert reply.usage.prompt_tokens > 10
    for entry in choice.logprobs.content:
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
    said = "".join(entry.token for entry in choice.logprobs.content)
    assert said.removesuffix("<|im_end|>") == choice.message.content


def test_chat_stop(client: openai.OpenAI) -> None:
    [choice] = _chat(client, stop=[" is"], max_tokens=32).choices
    assert (choice.message.content, choice.finish_reason) == ("The capital of France", "stop")
    assert choice.stop_reason == " is"


def test_chat_stream(client: openai.OpenAI) -> None:
    text, roles, usage = "", [], None
    for chunk in _chat(client, stream=True, max_tokens=32, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    assert text == "The capital of France is Paris."
    assert roles == ["assistant"]
    assert usage.completion_tokens == _chat(client, max_tokens=32).usage.completion_tokens


def test_the_cache_shows_in_usage(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "Count these: " + "one two three four " * 20}]
    first = _chat(client, messages=long, max_tokens=1)
    again = _chat(client, messages=long, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens // 2
    salted = _chat(client, messages=long, max_tokens=1, extra_body={"cache_salt": "another user"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("text", CORPUS)
def test_streamed_text_is_the_unstreamed_text(client: openai.OpenAI, text: str) -> None:
    [choice] = _chat(client, **_exactly(text)).choices
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in _chat(client, **_exactly(text), stream=True) if chunk.choices
    ]
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)
    # A stop string that begins and ends inside tokens.
    stop = text[len(text) // 2 - 2 : len(text) // 2 + 2]
    expected = text[: text.index(stop)]
    [choice] = _chat(client, **_exactly(text), stop=stop).choices
    assert (choice.message.content, choice.stop_reason) == (expected, stop)
    chunks = list(_chat(client, **_exactly(text), stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


# -------------------------------------------------------------------------------------------------- tools, schemas


def _calls_of_stream(stream: Any) -> tuple[list[tuple[str, Any]], str, str]:
    """(name and arguments of each call, content, finish reason)."""
    calls: dict[int, list[str]] = {}
    ids, content, finish = {}, "", None
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    ids[call.index] = call.id
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""
    assert len(set(ids.values())) == len(calls)
    return [(name, json.loads(arguments)) for name, arguments in calls.values()], content, finish


def _calls(choice: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]


def test_auto_tool_choice(client: openai.OpenAI) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>'
    body = {"tools": [WEATHER], **_exactly(f"I look.\n{call}")}
    [choice] = _chat(client, **body).choices
    expected = [("get_weather", {"city": "Paris", "unit": "celsius"})]
    assert _calls(choice) == expected
    assert (choice.message.content.strip(), choice.finish_reason) == ("I look.", "tool_calls")
    calls, content, finish = _calls_of_stream(_chat(client, **body, stream=True))
    assert (calls, content.strip(), finish) == (expected, "I look.", "tool_calls")
    # A conversation goes on with the reply as it came.
    answer = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "21 degrees"}
    messages = [*QUESTION, choice.message.model_dump(), answer]
    assert _chat(client, messages=messages, tools=[WEATHER], max_tokens=4).choices[0].message.content
    # And without a call it is an answer.
    [choice] = _chat(client, tools=[WEATHER], **_exactly("Paris.")).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("Paris.", None, "stop")


@pytest.mark.parametrize("parallel", [True, False])
def test_required_tool_choice(client: openai.OpenAI, parallel: bool) -> None:
    body = {
        "tools": [WEATHER, TIME], "tool_choice": "required", "parallel_tool_calls": parallel, "temperature": 1.0,
        "seed": 11, "max_tokens": 400,
    }  # fmt: skip
    [choice] = _chat(client, **body).choices
    calls = _calls(choice)
    assert calls and (parallel or len(calls) == 1)
    for name, arguments in calls:
        assert set(arguments) == ({"city", "unit"} if name == "get_weather" else {"zone"})
    assert not choice.message.content
    streamed, content, finish = _calls_of_stream(_chat(client, **body, stream=True))
    assert (streamed, content, finish) == (calls, "", choice.finish_reason)


def test_named_tool_choice(client: openai.OpenAI) -> None:
    body = {"tools": [WEATHER, TIME], "tool_choice": {"type": "function", "function": {"name": "get_time"}}}
    [choice] = _chat(client, **body, max_tokens=100).choices
    [(name, arguments)] = _calls(choice)
    assert name == "get_time" and arguments["zone"] in ("UTC", "CET")
    streamed, _, _ = _calls_of_stream(_chat(client, **body, max_tokens=100, stream=True))
    assert streamed == [(name, arguments)]


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    population: Annotated[int, Field(ge=0, le=9999)]
    tags: Annotated[list[Literal["old", "large"]], Field(max_length=2)]


def test_json_schema_output_is_parsed(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=NAME, messages=QUESTION, response_format=City, temperature=0.7, seed=5, max_tokens=300
    )
    city = parsed.choices[0].message.parsed
    assert isinstance(city, City)
    with client.chat.completions.stream(
        model=NAME, messages=QUESTION, response_format=City, temperature=0.7, seed=5, max_tokens=300
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == city


def test_json_object_and_regex(client: openai.OpenAI) -> None:
    [choice] = _chat(client, response_format={"type": "json_object"}, max_tokens=200, temperature=1, seed=2).choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.lstrip().startswith("{")
    reply = client.completions.create(
        model=NAME, prompt="A date:", max_tokens=40, temperature=1, seed=1,
        extra_body={"structured_outputs": {"regex": r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d"}},
    )  # fmt: skip
    assert re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d", reply.choices[0].text)


# --------------------------------------------------------------------------------------------------------- errors


def test_errors_are_the_sdks_exceptions(client: openai.OpenAI, running: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        _chat(client, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=NAME, prompt=[5] * 1020, max_tokens=50)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no_such_field"):
        _chat(client, extra_body={"no_such_field": 1})
    with pytest.raises(openai.BadRequestError, match=r"structured_outputs|regex"):
        _chat(client, extra_body={"structured_outputs": {"regex": "(("}})
    with pytest.raises(openai.NotFoundError) as unknown:
        _chat(client, model="gpt-99")
    assert unknown.value.code == "model_not_found"
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="x")
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_leaving_a_stream_frees_its_blocks(client: openai.OpenAI, running: Server) -> None:
    stream = _chat(client, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    for i, _ in enumerate(stream):
        if i == 3:
            break
    _wait_for(running, num_running=1, blocks_in_use=True)
    stream.close()
    _wait_for(running, num_running=0, blocks_in_use=False)
    assert _metric(running, "generation_tokens_total") < 5000


# ---------------------------------------------------------------------------------------------------------- async


def test_async_clients(client: openai.OpenAI, running: Server) -> None:
    async def one(many: openai.AsyncOpenAI, seed: int) -> tuple[str, str]:
        body: dict[str, Any] = {
            "model": NAME, "messages": QUESTION, "temperature": 1.0, "seed": seed, "max_completion_tokens": 12
        }  # fmt: skip
        whole = await many.chat.completions.create(**body)
        text = ""
        async for chunk in await many.chat.completions.create(**body, stream=True):
            text += chunk.choices[0].delta.content or ""
        return whole.choices[0].message.content or "", text

    async def all_of_them() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=120) as many:
            return await asyncio.gather(*(one(many, seed) for seed in range(8)))

    replies = asyncio.run(all_of_them())
    assert all(whole == streamed for whole, streamed in replies)
    assert len({whole for whole, _ in replies}) > 1


# ------------------------------------------------------------------------------------------------ one generation


def test_the_three_ways_in_give_the_same(client: openai.OpenAI) -> None:
    """/v1/completions, /v1/chat/completions and LLM.generate: the same tokens and log-probabilities."""
    from infer import LLM, SamplingParams

    common: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "seed": 21}
    extra = {"top_k": 40, "return_token_ids": True, "repetition_penalty": 1.1}
    chat = _chat(client, **common, logprobs=True, top_logprobs=2, extra_body=extra)
    prompt_ids = chat.prompt_token_ids
    completion = client.completions.create(model=NAME, prompt=prompt_ids, **common, logprobs=2, extra_body=extra)
    with LLM(SMOLLM2, dtype="float32", max_model_len=1024, kv_cache_memory_bytes="64M") as llm:
        [output] = llm.generate(
            {"prompt_token_ids": prompt_ids},
            SamplingParams(**common, top_k=40, repetition_penalty=1.1, logprobs=2), use_tqdm=False,
        )  # fmt: skip
    [choice] = output.outputs
    assert completion.choices[0].token_ids == choice.token_ids == chat.choices[0].token_ids
    assert completion.choices[0].text == choice.text == chat.choices[0].message.content
    ours = [entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids, strict=True)]
    assert completion.choices[0].logprobs.token_logprobs == pytest.approx(ours, abs=5e-4)
    assert [entry.logprob for entry in chat.choices[0].logprobs.content] == pytest.approx(ours, abs=5e-4)
