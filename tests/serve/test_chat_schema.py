"""Chat bodies: messages, tools, tool_choice, what they ask of the engine, and how replies are taken apart."""

import json
import logging

import openai
import pytest
from fake_engine import FakeEngine, is_ready, wait_until

from infer.config import ServerConfig
from infer.request import FinishReason, Output, Request, StructuredOutputs
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
        ({"role": "user", "content": [{"type": "text", "text": "x", "detail": {}}]}, r"\[0\].detail"),
        ({"role": "user", "content": [{"type": "input_text"}]}, r'must be {"type": "text"'),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls is not supported in a message of role u"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "function.name must be a string"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, "object, not a list"),
        ({"role": "assistant", "content": "", "reasoning": 5, "reasoning_content": "b"}, "reasoning must be a string"),
    ],
)
def test_bad_messages(message, match):
    assert refused(match, messages=[message]) == "messages"


def test_arguments_that_are_no_object_do_not_end_a_conversation(caplog):
    """Our own parsers hand out what the model wrote: a reply that was cut off in a call comes back like this."""
    texts = ['{"a": "cut o', "[1]", '{"a": NaN}', "[" * 10**5, "5", " "]
    calls = [{"id": None, "function": {"name": "f", "arguments": text}} for text in texts]
    with caplog.at_level(logging.WARNING, "infer.frontend"):
        body = body_of(messages=[USER, {"role": "assistant", "tool_calls": calls}])
    assert [call["function"]["arguments"] for call in body.messages[1]["tool_calls"]] == [{}] * len(texts)
    [record] = caplog.records
    assert record.getMessage().startswith("messages[1].tool_calls[0].function.arguments and 4 more: not the JSON")


def test_what_other_servers_and_clients_add_is_left_out():
    extras = {
        "id": "msg_1", "cache_control": {"type": "ephemeral"}, "provider_specific_fields": {}, "annotations": [{}],
        "reasoning_details": [{"type": "x"}],
    }  # fmt: skip
    parts = [
        {"type": "input_text", "text": "a", **extras}, {"type": "output_text", "text": "b"},
        {"type": "text", "text": "c", "cache_control": {}},
    ]  # fmt: skip
    calling = {"role": "assistant", "tool_calls": [CALL | {"provider_specific_fields": {}}], **extras}
    tool = {"cache_control": {}, "strict": True, "function": {**TIME["function"], "cache_control": {}}}
    body = body_of(messages=[{"role": "user", "content": parts, "tool_calls": [], **extras}, calling], tools=[tool])
    assert body.messages[0] == {"role": "user", "content": "a\nb\nc"}
    assert body.messages[1]["tool_calls"][0].keys() == {"id", "type", "function"}
    assert body.messages[1].keys() == {"role", "content", "tool_calls"}
    assert body.tools == [{"type": "function", "function": {"name": "get_time"}}]


def test_two_names_for_reasoning_in_a_message():
    for given, expected in (
        ({"reasoning": "a", "reasoning_content": "b"}, "a"), ({"reasoning": None, "reasoning_content": "b"}, "b"),
        ({"reasoning": "a"}, "a"),
    ):  # fmt: skip
        [told] = body_of(messages=[{"role": "assistant", "content": "", **given}]).messages
        assert told["reasoning"] == told["reasoning_content"] == expected


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
        (
            "response_format", "no tool can be called",
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
        ),
        ("tools", "strict must be", {"tools": [TIME | {"strict": 1}]}),
        ("top_logprobs", "needs logprobs", {"top_logprobs": 1}),
        ("chat_template_kwargs", "must not set", {"chat_template_kwargs": {"add_generation_prompt": False}}),
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


def test_values_that_ask_for_nothing():
    assert body_of(top_logprobs=0).num_logprobs is None
    for fields in ({}, {"add_generation_prompt": False}):
        wanted = not fields
        body = body_of(chat_template_kwargs={"add_generation_prompt": wanted, "x": 1}, **fields)
        assert body.generation_prompt is wanted and "add_generation_prompt" not in body.template_variables


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


JSON_OBJECT = {"type": "json_object"}


def test_an_answer_in_a_schema_or_a_call():
    body = body_of(tools=[TIME], response_format=JSON_OBJECT)
    assert "call: \"<tool_call>\"" in grammar_of(body).grammar
    call = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    answer = json.dumps({"a": call})
    for text, content, calls in ((call, "", 1), ("\n" + call, "", 1), (answer, answer, 0), ("<tool", "<tool", 0)):
        for pieces in ([text], list(text)):
            output = body.output()
            deltas = [output.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
            assert "".join(delta.content for delta in deltas) == content
            assert sum(call.name is not None for delta in deltas for call in delta.calls) == calls
    assert grammar_of(body_of(tools=[TIME], response_format={"type": "text"})) is None
    special = ChatFormat(SpecialTokenizer(), enable_auto_tool_choice=True, tool_call_parser="mistral")
    assert "call: <[0]> " in grammar_of(body_of(tools=[TIME], response_format=JSON_OBJECT), special).grammar


@pytest.mark.parametrize("name", ["pythonic", "llama3_json"])
def test_formats_without_a_marker_take_no_schema_beside_tools(name):
    format = ChatFormat(enable_auto_tool_choice=True, tool_call_parser=name)
    with pytest.raises(ApiError, match="no marker tells a call from an answer") as caught:
        body_of(tools=[TIME], response_format=JSON_OBJECT).prepare(format)
    assert caught.value.param == "response_format"
    body_of(tools=[TIME], response_format=JSON_OBJECT, tool_choice="none").prepare(format)


def test_forced_calls_have_the_ids_of_the_flags_parser():
    body = body_of(tools=[TIME], tool_choice=NAMED)
    body.prepare(ChatFormat(tool_call_parser="mistral"))
    [call] = body.output().feed("{}", is_last=True).calls
    assert len(call.id) == 9


def test_the_own_grammar_stands_apart_from_what_goes_around_it():
    body = body_of(structured_outputs={"regex": "a+"})
    assert grammar_of(body, ChatFormat(reasoning_parser="deepseek_r1")).kind == "grammar"
    assert body.asked_grammar() == StructuredOutputs(regex="a+")


REASONED = [  # reasoning parser, text, what of it is reasoning
    ("deepseek_r1", "the quick 😀é你</think>\n\nhello world", "the quick 😀é你"),
    ("qwen3", "<think>\nthe quick brown\n</think>\n\nhello", "\nthe quick brown\n"),
    ("qwen3", "hello world, this is", ""),
    ("deepseek_r1", "the quick brown fo", "the quick brown fo"),
]


@pytest.mark.parametrize("per_step", [1, 3, 1000])
@pytest.mark.parametrize("name,text,reasoning", REASONED)
def test_tokens_of_the_reasoning_are_counted(tokenizer, name, text, reasoning, per_step):
    ids = tokenizer.encode(text)
    starts = [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]
    begin = text.index(reasoning) if reasoning else 0
    expected = sum(begin <= start < begin + len(reasoning) for start in starts)
    for stream in (False, True):
        body = body_of(stream=stream)
        body.prepare(ChatFormat(tokenizer, reasoning_parser=name))
        request = Request(request_id="r", prompt_token_ids=[65], params=body.sampling_params(500), seed=1)
        choice = Choice(0, Prompt([65]), request, tokenizer, keep=not stream)
        reply = ChatReply("i", "m", tokenizer, body)
        parts = [ids[i : i + per_step] for i in range(0, len(ids), per_step)]
        for i, part in enumerate(parts):
            finish = FinishReason.LENGTH if i == len(parts) - 1 else None
            delta = choice.accept(Output(request_id="r", token_ids=part, finish_reason=finish))
            if stream:
                reply.chunk(choice, delta)
        if not stream:
            reply.whole_choice(choice)
        assert choice.num_reasoning_tokens == expected, stream
    assert body.counts_reasoning and expected <= len(ids)


CUT = '<tool_call>{"name": "get_time", "arguments": {"a": "STOP it"}}</tool_call>'
WHOLE = '<tool_call>{"name": "get_time", "arguments": {"a": 1}}</tool_call>'
STOPPED = [  # text, stop string, further fields, finish_reason, the last call's arguments
    (CUT, "STOP", {}, "stop", '{"a": "'),
    (CUT, "STOP", {"include_stop_str_in_output": True}, "stop", '{"a": "STOP'),
    (WHOLE, "</tool_call>", {}, "tool_calls", '{"a": 1}'),
    (WHOLE + "STOP", "STOP", {}, "tool_calls", '{"a": 1}'),
    (WHOLE + CUT, "STOP", {}, "stop", '{"a": "'),
    (WHOLE + CUT, "STOP", {"parallel_tool_calls": False}, "tool_calls", '{"a": 1}'),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text,stop,fields,reason,arguments", STOPPED)
def test_a_stop_string_inside_a_call_made_no_call(tokenizer, text, stop, fields, reason, arguments, stream):
    body = body_of(tools=[TIME], stop=[stop], stream=stream, **fields)
    body.prepare(AUTO)
    request = Request(request_id="r", prompt_token_ids=[65], params=body.sampling_params(500), seed=1)
    choice = Choice(0, Prompt([65]), request, tokenizer, keep=not stream)
    reply, chunks = ChatReply("i", "m", tokenizer, body), []
    for token in tokenizer.encode(text):
        if choice.finish_reason is None:
            delta = choice.accept(Output(request_id="r", token_ids=[token]))
            chunks.append(reply.chunk(choice, delta) if stream else None)
    shown = [chunk["choices"][0] for chunk in chunks if chunk] if stream else [reply.whole_choice(choice)]
    assert (shown[-1]["finish_reason"], shown[-1]["stop_reason"]) == (reason, stop)
    calls = [call for part in shown for call in part["delta" if stream else "message"].get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls).endswith(arguments)


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


def test_of_special_texts_the_longest_counts():
    texts = ["<|a|>", "<|a", "<|b_1|>", "<|b_10|>", "<s>", "</s>", "+"]
    found = SpecialTextFilter(SpecialTexts(texts))
    assert found.feed("x<|a|>y<|a<|b_10|>z<|b_1|><|b_<s></s>+</s") + found.finish() == "xyz<|b_</s"


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
    found = next(choice for choice in choices if choice.message.reasoning_content)
    assert any(choice.message.reasoning is choice.message.reasoning_content is None for choice in choices)
    assert found.message.reasoning_content == found.message.reasoning == "hm"
    assert found.message.content == "I look." and found.message.tool_calls
    chunks = [chunk for chunk in ask(client, stream=True, **asked) if chunk.choices[0].index == found.index]
    message, reason = joined(chunks)
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("hm", "hm", "I look.")
    assert reason == found.finish_reason == "tool_calls"
    extra = {"include_reasoning": False, "return_token_ids": True}
    hidden = ask(client, extra_body=extra, logprobs=True, **asked).choices
    assert not any(choice.message.reasoning_content or choice.message.reasoning for choice in hidden)
    assert hidden[found.index].message.content == "I look."
    # Nor does anything else spell it.
    assert not any(choice.logprobs or hasattr(choice, "token_ids") for choice in hidden)
    for chunk in ask(client, extra_body=extra, logprobs=True, stream=True, **asked):
        assert not any(choice.logprobs or hasattr(choice, "token_ids") for choice in chunk.choices)


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
    assert choice.finish_reason == "stop" and choice.message.content is None  # as with OpenAI
    assert choice.message.tool_calls[0].function.name == "get_time"
    assert engine.requests[0].params.structured_outputs.kind == "grammar"  # after the reasoning
    ask(client, tools=[TIME], response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    assert "(answer | call)" in engine.requests[1].params.structured_outputs.grammar
    with pytest.raises(openai.BadRequestError, match="tools"):
        broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
        ask(client, tools=[broken], tool_choice="required")


def test_errors_name_the_own_grammar_and_not_what_goes_around_it(calling):
    client, _ = calling
    shaped = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    for tools in ([], [TIME]):
        with pytest.raises(openai.BadRequestError, match=r"response_format: .*not") as caught:
            ask(client, tools=tools, response_format=shaped)
        assert "thought" not in caught.value.message and caught.value.param == "response_format"


def test_the_usage_counts_the_reasoning(calling):
    client, _ = calling
    asked = {"n": 8, "max_tokens": 110}
    whole = ask(client, **asked)
    *_, last = ask(client, stream=True, stream_options={"include_usage": True}, **asked)
    counts = [reply.usage.completion_tokens_details.reasoning_tokens for reply in (whole, last)]
    num_thinking = sum(choice.message.reasoning is not None for choice in whole.choices)
    assert counts[0] == counts[1] == 2 * num_thinking > 0  # "hm"


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
