"""Heavy work beside the event loop: where it runs, what it delays, what counts as heavy, and that others go on."""

import asyncio
import json
import threading
import time

import pytest

from infer.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from infer.serve import generation
from infer.serve.chat_format import ChatFormat
from infer.serve.client import EngineClient, submission
from infer.serve.generation import Generation
from infer.serve.intake import Intake
from infer.serve.link import FrontendConfig, Hello, Outputs
from infer.serve.offload import INLINE_BYTES, INLINE_CHARS, LONG_CHARS, Offload
from infer.serve.prompting import Prompting
from infer.serve.render import Prompt
from infer.serve.render_chat import ChatReply
from infer.serve.render_completion import CompletionReply
from infer.serve.schema import parse
from infer.serve.schema_chat import ChatBody
from infer.serve.schema_completion import CompletionBody

HELLO = Hello(generation=0, model_name="m", max_model_len=20_000, vocab_size=400, eos_token_ids=[2])


def run(scenario):
    async def main():
        offload = Offload()
        try:
            return await asyncio.wait_for(scenario(offload), 60)
        finally:
            offload.close()

    return asyncio.run(main())


def test_where_work_runs():
    async def scenario(offload):
        here = threading.current_thread().name
        assert await offload.run(False, lambda: threading.current_thread().name) == here
        assert await offload.run_text(INLINE_CHARS, lambda: threading.current_thread().name) == here
        for name in (
            await offload.run(True, lambda: threading.current_thread().name),
            await offload.run_text(LONG_CHARS, lambda: threading.current_thread().name),
        ):
            assert name.startswith("offload_")
        name = await offload.run_text(LONG_CHARS + 1, lambda: threading.current_thread().name)
        assert name.startswith("offload-long")
        name = await offload.run_grammar(lambda: threading.current_thread().name)
        assert name.startswith("offload-grammars")
        with pytest.raises(ZeroDivisionError):
            await offload.run(True, lambda: 1 // 0)

    run(scenario)


def test_long_texts_delay_only_each_other():
    async def scenario(offload):
        release, done = threading.Event(), []
        long = [asyncio.create_task(offload.run_text(LONG_CHARS + 1, release.wait)) for _ in range(5)]
        waiting = asyncio.create_task(offload.run_text(LONG_CHARS + 1, lambda: done.append("cancelled work")))
        await asyncio.sleep(0)
        for size in (10, LONG_CHARS):
            await offload.run_text(size, lambda: done.append("short"))
        await offload.run(True, lambda: done.append("heavy"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting  # it leaves the queue now, before the thread is free
        release.set()
        assert all(await asyncio.gather(*long))
        assert done == ["short", "short", "heavy"]

    run(scenario)


def test_grammars_delay_only_each_other():
    async def scenario(offload):
        release, done = threading.Event(), []
        checks = [asyncio.create_task(offload.run_grammar(release.wait)) for _ in range(20)]
        await asyncio.sleep(0)
        await offload.run(True, lambda: done.append("heavy"))
        for size in (LONG_CHARS, LONG_CHARS + 1):
            await offload.run_text(size, lambda: done.append("text"))
        release.set()
        assert all(await asyncio.gather(*checks))
        assert done == ["heavy", "text", "text"]

    run(scenario)


class WatchedOffload(Offload):
    """Notes whether work was called heavy."""

    def __init__(self):
        super().__init__()
        self.heavy: list[bool] = []

    async def run(self, heavy, work):
        self.heavy.append(heavy)
        return await super().run(heavy, work)


def watched(scenario):
    async def main():
        offload = WatchedOffload()
        try:
            return await asyncio.wait_for(scenario(offload), 60)
        finally:
            offload.close()

    return asyncio.run(main())


def tool(**parameters):
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}


USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("kind", "fields", "heavy"),
    [
        (CompletionBody, {"prompt": [65]}, False),
        (CompletionBody, {"prompt": [65], "allowed_token_ids": [65] * 10_000}, False),
        (CompletionBody, {"prompt": [65], "allowed_token_ids": [65] * 10_001}, True),
        (CompletionBody, {"prompt": [[65]] * 20, "allowed_token_ids": [65] * 501}, True),
        (CompletionBody, {"prompt": [[65]] * 65}, True),
        (CompletionBody, {"prompt": [65], "structured_outputs": {"regex": "a"}}, True),
        (ChatBody, {"messages": USER, "tools": [tool()], "tool_choice": "none"}, False),
        (ChatBody, {"messages": USER, "tools": [tool()], "tool_choice": "required"}, True),
        (ChatBody, {"messages": USER, "response_format": {"type": "json_object"}}, True),
    ],
)
def test_making_requests(tokenizer, tokenizer_path, kind, fields, heavy):
    async def scenario(offload):
        body = parse(json.dumps(fields).encode(), kind)
        prompting = Prompting(tokenizer, tokenizer_path, offload)
        prompting._grammars.check = lambda grammar: None
        prompts = [Prompt([65]) for _ in range(len(fields.get("prompt", [1])))]
        if isinstance(fields.get("prompt", [[]])[0], int):
            prompts = prompts[:1]
        requests, frames = await prompting.requests(body, prompts, HELLO)
        assert offload.heavy == [heavy]
        assert len(requests) == len(prompts) and frames == submission(requests)

    watched(scenario)


@pytest.mark.parametrize(("num_bytes", "heavy"), [(INLINE_BYTES, False), (INLINE_BYTES + 1, True)])
def test_reading_bodies(tokenizer, tokenizer_path, num_bytes, heavy):
    async def scenario(offload):
        config = FrontendConfig(model_path=str(tokenizer_path), tokenizer_path=str(tokenizer_path))
        intake = Intake(tokenizer, config, offload)
        await intake._body(b'{"prompt": "x"}'.ljust(num_bytes), CompletionBody)
        assert offload.heavy == [heavy]
        intake.close()

    watched(scenario)


async def count_turns(turns):
    while True:
        turns[0] += 1
        await asyncio.sleep(0)


class Response:
    """Takes what is written to a client."""

    prepared = True

    def __init__(self):
        self.written: list[bytes] = []

    async def write(self, data):
        self.written.append(data)


async def rendered(offload, tokenizer, kind, reply_kind, outputs, **fields):
    """A reply to what the engine gave at once -> (its bytes as they are written, turns that others had meanwhile)."""
    prompt = fields["prompt"] if isinstance(fields.get("prompt"), list) else [65]
    body = parse(json.dumps(fields).encode(), kind)
    if kind is ChatBody:
        body.prepare(ChatFormat(tokenizer, enable_auto_tool_choice=True, tool_call_parser="hermes"))
    engine = EngineClient("m")
    engine.hello = HELLO
    params = SamplingParams(n=body.n, max_tokens=20_000)
    request = Request(request_id="r", prompt_token_ids=prompt, params=params, seed=1)
    work = Generation(engine, body, [Prompt(prompt)], [request], tokenizer, None)
    engine._receive(Outputs(items=outputs))
    turns = [0]
    other = asyncio.create_task(count_turns(turns))
    await asyncio.sleep(0)
    reply, response = reply_kind("i", "m", tokenizer, body), Response()
    if body.stream:
        await generation._write_step(generation.ReplyWriter(None, response), body, work, reply, offload)
    else:
        await work.step()
        await response.write(await generation._render_whole(work, reply, offload))
    other.cancel()
    return response.written, turns[0]


def outputs_of(n, count=1, logprobs=0):
    entry = TokenLogprobs([65] * logprobs, [-1.0] * logprobs, [1] * logprobs)
    return [
        Output(
            request_id="r", index=index, token_ids=[65] * count, finish_reason=FinishReason.LENGTH,
            logprobs=[entry] * count if logprobs else None,
        ) for index in range(n)
    ]  # fmt: skip


def test_many_choices_leave_turns_to_others(tokenizer):
    async def scenario(offload):
        written, turns = await rendered(
            offload, tokenizer, CompletionBody, CompletionReply, outputs_of(1024), prompt="x", n=1024, stream=True
        )
        chunks = [json.loads(event[6:]) for data in written for event in data.split(b"\n\n")[:-1]]
        assert [chunk["choices"][0]["index"] for chunk in chunks] == [*range(1024)]
        assert not any(offload.heavy) and len(written) > 10 and turns > 10
        written, turns = await rendered(
            offload, tokenizer, CompletionBody, CompletionReply, outputs_of(1024), prompt="x", n=1024
        )
        assert [choice["index"] for choice in json.loads(written[0])["choices"]] == [*range(1024)]
        assert not any(offload.heavy) and turns > 10

    watched(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_long_texts_are_rendered_in_threads(tokenizer, stream):
    async def scenario(offload):
        fields = {"messages": USER, "tools": [tool()], "n": 2, "stream": stream}
        await rendered(offload, tokenizer, ChatBody, ChatReply, outputs_of(2, count=10_000), **fields)
        assert offload.heavy.count(True) == 2
        offload.heavy.clear()
        await rendered(offload, tokenizer, ChatBody, ChatReply, outputs_of(2, count=100), **fields)
        assert not any(offload.heavy)

    watched(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_repeated_a_few_at_a_time(tokenizer, stream):
    async def scenario(offload):
        written, turns = await rendered(
            offload, tokenizer, CompletionBody, CompletionReply, outputs_of(100), prompt=[65] * 15_000,
            n=100, return_token_ids=True, stream=stream,
        )  # fmt: skip
        assert sum(map(len, written)) > 100 * 15_000 * 3 and turns >= 10
        if stream:
            assert max(map(len, written)) < 1 << 20

    watched(scenario)


def test_log_probabilities_of_many_choices(tokenizer):
    async def scenario(offload):
        fields = {"prompt": "x", "n": 500, "logprobs": 18, "stream": True}
        written, turns = await rendered(
            offload, tokenizer, CompletionBody, CompletionReply, outputs_of(500, logprobs=19), **fields
        )
        assert len(written) > 20 and turns > 20
        await rendered(
            offload, tokenizer, CompletionBody, CompletionReply, outputs_of(1, count=2000, logprobs=1),
            **fields | {"n": 1},
        )  # fmt: skip
        assert offload.heavy[-1]

    watched(scenario)


@pytest.mark.parametrize(
    "text", ["\u4f60\u597d" * 200_000, "a" * 400_000, " " * 400_000], ids=["cjk", "word", "spaces"]
)
def test_the_loop_goes_on_while_a_long_text_is_tokenized(tokenizer, text):
    async def scenario(offload):
        gaps, began = [], time.perf_counter()
        work = asyncio.create_task(offload.run_text(len(text), lambda: tokenizer.encode(text)))
        while not work.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)
        assert tokenizer.decode(await work) == text
        # Were the interpreter's lock held meanwhile, one gap would be about as long as the work.
        total = time.perf_counter() - began
        assert max(gaps) < max(total / 2, 0.05), (max(gaps), total)

    run(scenario)
