"""Chat bodies: messages, tools, tool_choice, what they ask of the engine, and how replies are taken apart."""

import json

import openai
import pytest
from fake_engine import FakeEngine, is_ready, wait_until

from infer.config import ServerConfig
from infer.request import FinishReason, Output, Request
from infer.serve.chat_format import ChatFormat, SpecialTextFilter, SpecialTexts
from infer.serve.errors import ApiError
from infer.serve.render import Choice, Prompt
from infer.serve.render_chat import ChatReply
from infer.serve.schema import parse
from infer.serve.schema_chat import ChatBody
from infer.serve.spawn import start_frontend

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": None, "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "get_time"}}
NAMED = {"type": "function", "function": {"name": "get_time"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
AUTO = ChatFormat(enable_auto_tool_choice=True, tool_call_parser="hermes")


def body_of(**fields):
    return parse(json.dumps({"messages": [USER], **fields}).encode(), ChatBody)


def refused(match, **fields):
    with pytest.raises(ApiError, match=match) as caught:
        body_of(**fields).prepare(ChatFormat())
    assert caught.value.status == 400
    return caught.value.param


def test_messages_reach_the_template_as_it_wants_them():
    parts = [{"type": "text", "text": "No."}, {"type": "refusal", "refusal": "Sorry."}]
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm", "refusal": None}
    body = body_of(
        messages=[
            USER, calling,
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
            {"role": "assistant", "content": parts, "annotations": [], "audio": None},
            {"role": "assistant", "refusal": "I won't."},
        ]
    )  # fmt: skip
    called = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    assert body.messages[1] == {
        "role": "assistant", "content": "", "tool_calls": [called], "reasoning_content": "hm", "reasoning": "hm",
    }  # fmt: skip
    assert [message["content"] for message in body.messages[2:]] == ["sunny", "No.\nSorry.", "I won't."]


@pytest.mark.parametrize(
    "message,match",
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "text only, not 'image_url'"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}, "text only, not 'refusal'"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}, r"\[0\].cache_control"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls is not supported in a message of role u"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "function.name must be a string"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}, "JSON of an object"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "not of a list"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": NaN}'}}]}, "NaN is not"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 10**5}}]}, "too deeply"),
        ({"role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "b"}, "differ"),
    ],
)
def test_bad_messages(message, match):
    assert refused(match, messages=[message]) == "messages"


@pytest.mark.parametrize(
    "param,match,fields",
    [
        ("tools", "must be", {"tools": [{"type": "retrieval"}]}),
        ("tools", "name must be", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools", "parameters must be", {"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]}),
        ("tools", "two functions named 'get_time'", {"tools": [TIME, TIME]}),
        ("tools", "at most|may hold 128", {"tools": [TIME] * 129}),
        ("tools", "bytes", {"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 300_000}}]}),
        ("tool_choice", "there are no tools", {"tool_choice": "required"}),
        ("tool_choice", "there are no tools", {"tool_choice": NAMED, "tools": []}),
        ("tool_choice", "not in tools", {"tool_choice": NAMED, "tools": [WEATHER]}),
        ("tool_choice", "enum value", {"tool_choice": "any", "tools": [WEATHER]}),
        ("tool_choice", "--enable-auto-tool-choice", {"tools": [WEATHER]}),
        ("response_format", "no tool can be called", {"tools": [WEATHER], "response_format": {"type": "json_object"}}),
        ("response_format", "no tool", {"tools": [TIME], "response_format": {"type": "json_object"}}),
        (
            "structured_outputs", "no tool",
            {"tools": [TIME], "tool_choice": "required", "structured_outputs": {"regex": "a"}},
        ),
        ("reasoning_effort", "enum value", {"reasoning_effort": "huge"}),
        (
            "reasoning_effort", "differ",
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
        ),
        ("chat_template", "never from a request", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs", "must not set tokenize", {"chat_template_kwargs": {"tokenize": True}}),
        ("documents", "expected str", {"documents": [{"title": 5}]}),
    ],
)  # fmt: skip
def test_bad_fields(param, match, fields):
    assert refused(match, **fields) == param


def test_template_variables():
    body = body_of(
        tools=[WEATHER], tool_choice="none", documents=[{"title": "t", "text": "x"}], reasoning_effort="none",
        chat_template_kwargs={"custom": 1},
    )  # fmt: skip
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    assert body.template_variables == {
        "tools": [tool], "documents": [{"title": "t", "text": "x"}], "continue_final_message": False,
        "reasoning_effort": "none", "enable_thinking": False, "custom": 1,
    }  # fmt: skip
    kept = body_of(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False}).template_variables
    assert kept["enable_thinking"] is False and kept["tools"] is None and kept["documents"] is None


def grammar_of(body, format=AUTO, prompt=""):
    body.prepare(format)
    body.rendered(prompt)
    return body.sampling_params(10).structured_outputs


def test_what_is_asked_of_the_engine():
    assert grammar_of(body_of(tools=[TIME])) is None
    assert grammar_of(body_of(tools=[TIME], tool_choice="none")) is None
    choice = {"type": "function", "function": {"name": "get_weather"}}
    named = grammar_of(body_of(tools=[WEATHER, TIME], tool_choice=choice))
    assert json.loads(named.json) == SCHEMA | {"additionalProperties": False}
    required = body_of(tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False)
    assert json.loads(grammar_of(required, ChatFormat()).json)["maxItems"] == 1
    assert required.grammar_field == "tools"
    shaped = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    assert json.loads(grammar_of(body_of(response_format=shaped, tools=[TIME], tool_choice="none")).json) == SCHEMA
    thinking = ChatFormat(reasoning_parser="qwen3")
    assert "%json" in grammar_of(body_of(response_format=shaped), thinking).grammar
    assert json.loads(grammar_of(body_of(response_format=shaped), thinking, "<think>\n\n</think>\n\n").json) == SCHEMA


def test_formats_check_their_flags():
    with pytest.raises(ValueError, match="needs --tool-call-parser"):
        ChatFormat(enable_auto_tool_choice=True)
    with pytest.raises(ValueError, match="known are hermes"):
        ChatFormat(tool_call_parser="xml")
    with pytest.raises(ValueError, match="known are deepseek_r1"):
        ChatFormat(reasoning_parser="o1")


class SpecialTokenizer:
    """Stands for one whose markers are special tokens."""

    special_ids = (0, 1, 2)

    def token(self, token_id):
        return ("[TOOL_CALLS]", "<s>", "<|end|>")[token_id]


def test_markers_that_are_special_tokens():
    format = ChatFormat(SpecialTokenizer(), enable_auto_tool_choice=True, tool_call_parser="mistral")
    for fields, skips, filters in (
        ({"tools": [TIME]}, False, True), ({}, True, False), ({"tools": [TIME], "tool_choice": "none"}, True, False),
        ({"tools": [TIME], "skip_special_tokens": False}, False, False),
    ):  # fmt: skip
        body = body_of(**fields)
        body.prepare(format)
        assert body.sampling_params(5).skip_special_tokens is skips
        delta = body.output().feed("<s>a<|end|>b[TOOL_CALLS]get_time{}", is_last=True)
        content = "ab" if filters else "<s>a<|end|>b"
        calls = fields.get("tools") is not None and body.tool_choice is None
        assert delta.content == content + ("" if calls else "[TOOL_CALLS]get_time{}")
        assert [call.name for call in delta.calls] == (["get_time"] if calls else [])


def test_special_texts_in_pieces():
    texts = SpecialTexts(["<s>", "<|im_end|>", "<|im_x|>"])
    for text in ("a<s>b", "<|im_<|im_end|>end|>", "a<|im_", "<<s><|im_x|>|", "<|im_end|"):
        whole = SpecialTextFilter(texts)
        expected = whole.feed(text) + whole.finish()
        for cut in range(len(text) + 1):
            parted = SpecialTextFilter(texts)
            assert parted.feed(text[:cut]) + parted.feed(text[cut:]) + parted.finish() == expected


@pytest.fixture(scope="module")
def calling(tokenizer_path, tokenizer):
    """A server that parses tools and reasoning. Its engine repeats the prompt up to the first <|im_end|>."""
    config = ServerConfig(
        port=0, enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3", max_logprobs=20
    )
    handle = start_frontend(config, tokenizer_path, tokenizer_path, "tiny")
    engine = FakeEngine(handle, tokenizer)
    engine.hello()
    wait_until(lambda: is_ready(handle.port))
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{handle.port}/v1", api_key="x", max_retries=0, timeout=20), engine
    engine.close()
    handle.stop(timeout=5)


SAID = '<think>hm</think>I look.<tool_call>\n{"name": "get_time", "arguments": {"zone": "é"}}\n</tool_call>'


def ask(client, max_tokens=120, **fields):
    messages = [{"role": "user", "content": SAID}]
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=max_tokens, **fields)


def joined(chunks):
    """A stream as a message: (message, finish_reason)."""
    message, reason = {"content": "", "reasoning_content": "", "reasoning": "", "calls": []}, None
    for chunk in chunks:
        [choice] = chunk.choices
        delta = choice.delta
        message["content"] += delta.content or ""
        for name in ("reasoning_content", "reasoning"):
            message[name] += getattr(delta, name, None) or ""
        for call in delta.tool_calls or []:
            if call.id:
                assert call.index == len(message["calls"]) and call.type == "function"
                message["calls"].append([call.function.name, ""])
            message["calls"][call.index][1] += call.function.arguments
        reason = choice.finish_reason or reason
    return message, reason


def test_calls_and_reasoning_whole_and_streamed(calling):
    client, engine = calling
    choice = ask(client, tools=[TIME]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.name == "get_time"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"zone": "é"}
    # The role comes first, so that the tag is not at the beginning: plain text to this parser.
    assert choice.message.content == "user\n<think>hm</think>I look."
    for tokens_per_step in (1, 7):
        engine.tokens_per_step = tokens_per_step
        message, reason = joined(ask(client, tools=[TIME], stream=True))
        assert reason == "tool_calls" and message["content"] == choice.message.content
        assert message["calls"] == [["get_time", '{"zone": "é"}']]
    plain = ask(client, tools=[TIME], tool_choice="none").choices[0]
    assert plain.finish_reason == "stop" and plain.message.content == "user\n" + SAID and not plain.message.tool_calls
    cut = ask(client, max_tokens=80, tools=[TIME]).choices[0]  # ends in the arguments
    assert cut.finish_reason == "length" and cut.message.tool_calls[0].function.name == "get_time"


def test_reasoning_has_fields_of_its_own(calling):
    client, _ = calling
    asked = {"tools": [TIME], "n": 8, "max_tokens": 110}  # the fake engine begins choice k at the prompt's token k
    choices = ask(client, **asked).choices
    found = next(choice for choice in choices if hasattr(choice.message, "reasoning_content"))
    assert found.message.reasoning_content == found.message.reasoning == "hm"
    assert found.message.content == "I look." and found.message.tool_calls
    chunks = [chunk for chunk in ask(client, stream=True, **asked) if chunk.choices[0].index == found.index]
    message, reason = joined(chunks)
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("hm", "hm", "I look.")
    assert reason == found.finish_reason == "tool_calls"
    hidden = ask(client, extra_body={"include_reasoning": False}, **asked).choices
    assert not any(hasattr(choice.message, "reasoning_content") for choice in hidden)
    assert hidden[found.index].message.content == "I look."


def test_outputs_that_wait_when_the_choice_is_over(tokenizer):
    """They are taken in together and shown one by one; only the last of them ends the choice."""
    body = body_of(tools=[TIME])
    body.prepare(AUTO)
    request = Request(request_id="r", prompt_token_ids=[65], params=body.sampling_params(500), seed=1)
    choice, reply = Choice(0, Prompt([65]), request, tokenizer), ChatReply("i", "m", tokenizer, body)
    ids = [*tokenizer.encode('<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'), 2]
    outputs = [Output(request_id="r", token_ids=[token]) for token in ids[:-1]]
    last = Output(request_id="r", token_ids=[2], finish_reason=FinishReason.STOP)
    deltas = [choice.accept(output) for output in [*outputs, last]]
    chunks = [chunk["choices"][0] for delta in deltas if (chunk := reply.chunk(choice, delta)) is not None]
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == ["tool_calls"]
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "get_time"
    assert "".join(call["function"]["arguments"] for call in calls) == "{}"


def test_named_calls_and_grammars_reach_the_engine(calling):
    client, engine = calling
    engine.requests.clear()
    choice = ask(client, tools=[TIME], tool_choice=NAMED, extra_body={"include_reasoning": False}).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls[0].function.name == "get_time"
    assert engine.requests[0].params.structured_outputs.kind == "grammar"  # after the reasoning
    with pytest.raises(openai.BadRequestError, match="tools"):
        broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
        ask(client, tools=[broken], tool_choice="required")


def test_echo_and_roles(calling):
    client, _ = calling
    messages = [USER, {"role": "assistant", "content": "The answer"}]
    extra = {"continue_final_message": True, "echo": True}
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, extra_body=extra).choices[0]
    assert whole.message.content.startswith("The answer") and whole.message.role == "assistant"
    message, _ = joined(
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, stream=True, extra_body=extra)
    )
    assert message["content"] == whole.message.content
