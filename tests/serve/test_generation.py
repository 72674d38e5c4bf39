"""One request's choices and its reply, in this process: no frontend, no engine."""

import asyncio
import json
import math
import socket

import aiohttp
import msgspec
import pytest
from aiohttp import web

from infer.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from infer.serve import generation, replies
from infer.serve import job as jobs
from infer.serve.chat_format import ChatFormat
from infer.serve.client import EngineClient
from infer.serve.errors import ApiError
from infer.serve.generation import Generation, reply_stream, reply_whole
from infer.serve.job import Job
from infer.serve.link import Hello, Outputs
from infer.serve.offload import Offload
from infer.serve.render import Choice, Delta, Prompt
from infer.serve.render_chat import ChatReply
from infer.serve.render_completion import CompletionReply
from infer.serve.schema import parse
from infer.serve.schema_chat import ChatBody
from infer.serve.schema_completion import CompletionBody

HELLO = Hello(generation=0, model_name="m", max_model_len=100, vocab_size=400, eos_token_ids=[2])


def body_of(kind, **fields):
    return parse(json.dumps(fields).encode(), kind)


def one_request(**params):
    return Request(request_id="r", prompt_token_ids=[65, 66], params=SamplingParams(**params), seed=1)


def more(index, count):
    return Output(request_id="r", token_ids=[5] * count, token_index=index)


def test_a_failure_without_words_or_prompt_logprobs_is_told(tokenizer):
    async def run():
        engine = EngineClient("m")
        engine.hello = HELLO
        body = body_of(CompletionBody, prompt=[65, 66], prompt_logprobs=1)
        work = Generation(engine, body, [Prompt([65, 66])], [one_request(prompt_logprobs=1)], tokenizer, None)
        engine._receive(Outputs(items=[Output(request_id="r", finish_reason=FinishReason.ERROR)]))
        async with asyncio.timeout(2):
            await work.step()

    with pytest.raises(ApiError, match="the engine ended this request"):
        asyncio.run(run())


def test_only_what_earlier_frames_left_makes_a_reader_slow(monkeypatch):
    async def run():
        monkeypatch.setattr(jobs, "MAX_PENDING_ENTRIES", 10)
        engine, ended = EngineClient("m"), []
        engine.hello = HELLO
        job = engine.start([one_request()], lambda: ended.append(1))
        for i in range(3):
            engine._receive(Outputs(items=[more(16 * i, 8), more(16 * i + 8, 8)]))
            assert not ended
            assert sum(len(output.token_ids) for output in job.take()) == 16
        engine._receive(Outputs(items=[more(48, 16)]))
        engine._receive(Outputs(items=[more(64, 1)]))
        assert not ended, "the frontend's own work is not the client's slowness"
        with job.writing():
            engine._receive(Outputs(items=[more(65, 11)]))
            assert not ended
            engine._receive(Outputs(items=[more(76, 1)]))
            assert ended

    asyncio.run(run())


def test_the_turns_of_others_make_no_reader_slow(monkeypatch, tokenizer):
    """A step of many choices is rendered and written in pieces; what the engine sends meanwhile is not the client's
    slowness."""

    class Response:
        prepared = True
        num_writes = 0

        async def write(self, data):
            self.num_writes += 1

    async def run():
        monkeypatch.setattr(jobs, "MAX_PENDING_ENTRIES", 10)
        engine, ended, response = EngineClient("m"), [], Response()
        engine.hello = HELLO
        body = body_of(CompletionBody, prompt=[65], n=300, stream=True)
        request = Request(request_id="r", prompt_token_ids=[65], params=SamplingParams(n=300), seed=1)
        work = Generation(engine, body, [Prompt([65])], [request], tokenizer, lambda: ended.append(1))
        engine._receive(Outputs(items=[Output(request_id="r", index=i, token_ids=[65]) for i in range(300)]))

        def send(index):
            engine._receive(Outputs(items=[Output(request_id="r", token_ids=[65] * 11, token_index=index)]))

        async def send_more():
            for i in range(4):
                send(1 + 11 * i)
                await asyncio.sleep(0)

        reply = CompletionReply("i", "m", tokenizer, body)
        more = asyncio.create_task(send_more())
        await generation._write_step(generation.ReplyWriter(None, response), body, work, reply, Offload())
        assert response.num_writes > 4 and more.done() and not ended
        with work.job.writing():
            send(45)
            assert not ended
            send(56)
            assert ended, "11 tokens were there when these came, all within one write"

    asyncio.run(run())


def test_whole_replies_have_no_reader_to_wait_for():
    job = Job([one_request()], None)
    job.put(Output(request_id="r", token_ids=[5] * (jobs.MAX_PENDING_ENTRIES + 1)))
    assert not job.overflowing


def entry(*logprobs: float) -> TokenLogprobs:
    return TokenLogprobs([65 + i for i in range(len(logprobs))], list(logprobs), list(range(1, len(logprobs) + 1)))


def test_what_json_lacks(tokenizer):
    choice = Choice(0, Prompt([65], logprobs=[None]), one_request(), tokenizer)
    found = [entry(math.nan, -math.inf), entry(-math.inf, -1.5), entry(-0.5, math.nan)]
    chat = ChatReply("i", "m", tokenizer, body_of(ChatBody, messages=[{"role": "user", "content": ""}], logprobs=True))
    shown = json.loads(msgspec.json.encode(chat.chunk(choice, Delta("", found))))
    assert [token["logprob"] for token in shown["choices"][0]["logprobs"]["content"]] == [-9999.0, -9999.0, -0.5]
    plain = CompletionReply("i", "m", tokenizer, body_of(CompletionBody, prompt="x", logprobs=1))
    shown = json.loads(msgspec.json.encode(plain.chunk(choice, Delta("", found))))["choices"][0]["logprobs"]
    assert shown["token_logprobs"] == [-9999.0, -9999.0, -0.5]
    assert [sorted(top.values()) for top in shown["top_logprobs"]] == [[-9999.0] * 2, [-9999.0, -1.5], [-9999.0, -0.5]]


def test_of_tokens_that_look_alike_the_likelier_one_is_shown(tokenizer):
    halves = [token for token in range(tokenizer.vocab_size) if tokenizer.token(token) == "\ufffd"][:3]
    choice = Choice(0, Prompt([65]), one_request(), tokenizer)
    plain = CompletionReply("i", "m", tokenizer, body_of(CompletionBody, prompt="x", logprobs=2))
    found = TokenLogprobs(halves, [-3.0, -0.5, -2.0], [3, 1, 2])
    shown = plain.chunk(choice, Delta("", [found]))["choices"][0]["logprobs"]
    assert shown["token_logprobs"] == [-3.0] and shown["top_logprobs"] == [{"\ufffd": -0.5}]


class ThinkingBody(CompletionBody):
    counts_reasoning = True


class ThinkingReply(CompletionReply):
    """Stands for a reply that finds, as it renders, that all tokens so far were reasoning."""

    def _choice(self, choice, delta):
        choice.num_reasoning_tokens = choice.stream.num_tokens
        return super()._choice(choice, delta)


def test_the_usage_counts_what_was_rendered(tokenizer):
    async def run(kind):
        engine = EngineClient("m")
        engine.hello = HELLO
        body = body_of(kind, prompt=[65, 66], stream=True, stream_options={"continuous_usage_stats": True})
        request = Request(request_id="r", prompt_token_ids=[65, 66], params=SamplingParams(n=2), seed=1)
        work = Generation(engine, body, [Prompt([65, 66])], [request], tokenizer, None)
        for index, count in ((0, 3), (1, 4)):
            engine._receive(Outputs(items=[Output(request_id="r", index=index, token_ids=[65] * count)]))
        reply = ThinkingReply("i", "m", tokenizer, body)
        data = await generation._render_events(body, work, reply, Offload(), await work.step())
        chunks = [json.loads(event.removeprefix("data: ")) for event in data.decode().split("\n\n")[:-1]]
        return [chunk["usage"].get("completion_tokens_details") for chunk in chunks], work.usage()

    of_chunks, used = asyncio.run(run(ThinkingBody))
    assert of_chunks == [{"reasoning_tokens": 3}, {"reasoning_tokens": 4}]
    assert used["completion_tokens_details"] == {"reasoning_tokens": 7} and used["completion_tokens"] == 7
    msgspec.convert(used, replies.Usage)
    of_chunks, used = asyncio.run(run(CompletionBody))
    assert of_chunks == [None, None] and "completion_tokens_details" not in used


def test_what_one_frame_brings_comes_once_and_whole(tokenizer):
    """All outputs of all choices at once: each choice has one chunk, which ends it, and nothing comes after."""
    text = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>"
    token_ids = tokenizer.encode(text, add_special_tokens=False)

    async def run():
        engine = EngineClient("m")
        engine.hello = HELLO
        body = body_of(
            ChatBody, messages=[{"role": "user", "content": "x"}], n=16, stream=True,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip
        body.prepare(ChatFormat(tokenizer, enable_auto_tool_choice=True, tool_call_parser="hermes"))
        request = Request(request_id="r", prompt_token_ids=[65], params=SamplingParams(n=16), seed=1)
        work = Generation(engine, body, [Prompt([65])], [request], tokenizer, None)
        items = [
            Output(request_id="r", index=index, token_ids=[token_id], token_index=at)
            for at, token_id in enumerate(token_ids)
            for index in range(16)
        ]
        ends = [
            Output(
                request_id="r", index=i, token_ids=[2], token_index=len(token_ids), finish_reason=FinishReason.STOP
            )
            for i in range(16)
        ]  # fmt: skip
        engine._receive(Outputs(items=items + ends))
        reply = ChatReply("i", "m", tokenizer, body)
        data = await generation._render_events(body, work, reply, Offload(), await work.step())
        return [json.loads(event.removeprefix("data: ")) for event in data.decode().split("\n\n")[:-1]]

    choices = [chunk["choices"][0] for chunk in asyncio.run(run())]
    assert [choice["index"] for choice in choices] == [*range(16)]
    assert {choice["finish_reason"] for choice in choices} == {"tool_calls"}
    calls = [call["function"] for choice in choices for call in choice["delta"]["tool_calls"]]
    assert calls == [{"name": "f", "arguments": '{"a": 1}'}] * 16


class FailingReply(CompletionReply):
    """Has a defect that shows in the chunk number `fails_at`."""

    fails_at = 1

    def chunk_choice(self, choice, delta):
        if choice.num_chunks == self.fails_at:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        return super().chunk_choice(choice, delta)


class EndlessGeneration:
    """Stands for a Generation that has more to say at every step."""

    def __init__(self, tokenizer):
        self.done = False
        self.job = Job([one_request()], None)
        self._choice = Choice(0, Prompt([65]), one_request(), tokenizer)

    async def wait(self, seconds):
        return True

    async def step(self):
        return [(self._choice, Delta("a"))]


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_defect_inside_a_stream_is_told(tokenizer, caplog, fails_at):
    async def handle(request: web.Request) -> web.StreamResponse:
        body = body_of(CompletionBody, prompt="x", stream=True)
        reply = FailingReply("i", "m", tokenizer, body)
        reply.fails_at = fails_at
        return await reply_stream(request, body, EndlessGeneration(tokenizer), reply, Offload())

    async def run() -> tuple[int, str]:
        app = web.Application()
        app.router.add_get("/", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        async with (
            asyncio.timeout(10), aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/") as reply
        ):  # fmt: skip
            said = reply.status, await reply.text()
        await runner.cleanup()
        return said

    status, text = asyncio.run(run())
    if fails_at == 0:
        assert status == 500  # no stream yet: errors_as_json tells it
        return
    first, error, done = text.split("\n\n")[:-1]
    assert status == 200 and json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "a"
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"
    assert "surrogates not allowed" in caplog.text


class LargeReply(CompletionReply):
    """The JSON of its choices has 16 MB."""

    def whole_choice(self, choice):
        return {"text": "x" * (16 << 20)}


class DoneGeneration:
    done = True

    def __init__(self, tokenizer):
        self.choices = [Choice(0, Prompt([65]), one_request(), tokenizer)]

    def usage(self):
        return {}


@pytest.mark.parametrize("reads", [True, False])
def test_a_whole_reply_does_not_wait_for_ever(monkeypatch, tokenizer, reads):
    monkeypatch.setattr(generation, "WRITE_TIMEOUT_S", 0.5)
    ends: list[BaseException | None] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            reply = LargeReply("i", "m", tokenizer, body_of(CompletionBody, prompt="x"))
            response = await reply_whole(request, DoneGeneration(tokenizer), reply, Offload())
            ends.append(None)
            return response
        except ConnectionError as error:
            ends.append(error)
            raise

    async def run() -> int:
        app = web.Application()
        app.router.add_get("/", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address = runner.addresses[0]
        connection = socket.create_connection(address)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        if reads:
            received = len(await asyncio.to_thread(connection.makefile("rb").read))
        async with asyncio.timeout(10):
            while not ends:
                await asyncio.sleep(0.05)
        connection.close()
        await runner.cleanup()
        return received

    received = asyncio.run(run())
    if reads:
        assert ends == [None] and received > 16 << 20
    else:
        assert isinstance(ends[0], ConnectionError)
