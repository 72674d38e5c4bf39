"""One request's choices and its reply, in this process: no frontend, no engine."""

import asyncio
import json
import math
import socket

import msgspec
import pytest
from aiohttp import web

from infer.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from infer.serve import client, generation
from infer.serve.client import EngineClient, Job
from infer.serve.errors import ApiError
from infer.serve.generation import Generation, reply_whole
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
        monkeypatch.setattr(client, "MAX_PENDING_ENTRIES", 10)
        engine, ended = EngineClient("m"), []
        engine.hello = HELLO
        job = engine.start([one_request()], lambda: ended.append(1))
        for _ in range(3):
            engine._receive(Outputs(items=[Output(request_id="r", token_ids=[5] * 8)] * 2))
            assert not ended
            assert sum(len(output.token_ids) for output in await job.take()) == 16
        engine._receive(Outputs(items=[Output(request_id="r", token_ids=[5] * 16)]))
        job.is_rendering = True
        engine._receive(Outputs(items=[Output(request_id="r", token_ids=[5])]))
        assert not ended, "the frontend's own work is not the client's slowness"
        job.is_rendering = False
        engine._receive(Outputs(items=[Output(request_id="r", token_ids=[5])]))
        assert ended

    asyncio.run(run())


def test_whole_replies_have_no_reader_to_wait_for():
    job = Job([one_request()], None)
    job.put(Output(request_id="r", token_ids=[5] * (client.MAX_PENDING_ENTRIES + 1)))
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


class LargeReply:
    """Stands for a Reply whose JSON has 16 MB."""

    def num_logprobs(self, choice, logprobs):
        return 0

    def whole(self, choices, used):
        return {"text": "x" * (16 << 20)}


class DoneGeneration:
    done = True
    choices = ()

    def usage(self):
        return {}


@pytest.mark.parametrize("reads", [True, False])
def test_a_whole_reply_does_not_wait_for_ever(monkeypatch, reads):
    monkeypatch.setattr(generation, "WRITE_TIMEOUT_S", 0.5)
    ends: list[BaseException | None] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            response = await reply_whole(request, DoneGeneration(), LargeReply(), Offload())
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
