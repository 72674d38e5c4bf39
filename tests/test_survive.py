"""Any rank may be killed at any time: every client's stream goes on and ends as if nothing had happened."""

import asyncio
import json
import os
import random
import signal
import socket
import time
from dataclasses import dataclass, field

import aiohttp
import pytest
from serving import SMOLLM2, Server, interrupt, server
from worlds import named_process

MODEL = (
    "--model", SMOLLM2, "--dtype", "float32", "--max-model-len", 1024, "--kv-cache-memory-bytes", "256M",
    "--num-threads", 1,
)  # fmt: skip
NAME = "SmolLM2-135M-Instruct"
LOGPROB_TOLERANCE = 5e-4
STREAM_SECONDS = 200.0
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "city": {"enum": ["Rome"]}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@dataclass
class Stream:
    """What a client saw of its stream. gaps: the longest silence between two events of tokens."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    usage: dict | None = None
    error: dict | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    num_comments: int = 0
    longest_gap: float = 0.0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def outcome(self) -> tuple:
        """What must not depend on a crash; cached prompt tokens are a fact of the run."""
        counts = {name: self.usage[name] for name in ("prompt_tokens", "completion_tokens")} if self.usage else None
        return self.texts, self.token_ids, self.finish, counts, self.error

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids.values()))

    async def read(self, session: aiohttp.ClientSession, url: str, body: dict) -> "Stream":
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            self.status, self.headers = reply.status, dict(reply.headers)
            if reply.status != 200:
                self.error = (await reply.json())["error"]
                return self
            last = time.monotonic()
            async for line in reply.content:
                if line.startswith(b":"):
                    self.num_comments += 1
                elif line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))
                    now = time.monotonic()
                    self.longest_gap, last = max(self.longest_gap, now - last), now
                    self.begun.set()
        return self

    def _take(self, chunk: dict) -> None:
        self.error = chunk.get("error", self.error)
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            self.token_ids.setdefault(index, []).extend(choice["token_ids"])
            if choice["logprobs"] is not None:
                self.logprobs.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
            if choice["finish_reason"]:
                self.finish[index] = choice["finish_reason"]


def body(prompt: str | list[int], **fields: object) -> dict:
    common = {
        "model": NAME, "prompt": prompt, "stream": True, "return_token_ids": True, "max_tokens": 64,
        "stream_options": {"include_usage": True}, "temperature": 0.8,
    }  # fmt: skip
    return {**common, **fields}


BODIES = [
    body("Once upon a time", temperature=0.0, ignore_eos=True, max_tokens=96),
    body("The capital of France", seed=1, ignore_eos=True, logprobs=3),
    body("A list of colours: red, red, red,", seed=2, ignore_eos=True, presence_penalty=1.0, frequency_penalty=0.7),
    body("One two three", seed=3, repetition_penalty=1.3, min_tokens=30, top_k=50),
    body("A person as JSON: ", seed=4, structured_outputs={"json": SCHEMA}, max_tokens=80),
    body("Count: 1, 2, 3,", temperature=0.0, stop=["12", "\n\n"], max_tokens=90, logprobs=0),
    body("Write two endings.", seed=5, n=2, ignore_eos=True, top_p=0.9, logit_bias={"11": -5.0}),
    body("In the beginning", seed=6, max_tokens=70, min_p=0.05, bad_words=["the"]),
]


async def stream_all(url: str, bodies: list[dict], meanwhile=None) -> list[Stream]:
    """All streams side by side; `meanwhile` gets them when they are on their way."""
    timeout = aiohttp.ClientTimeout(total=STREAM_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
        streams = [Stream() for _ in bodies]
        for stream, fields in zip(streams, bodies, strict=True):
            group.create_task(stream.read(session, url, fields))
        if meanwhile is not None:
            group.create_task(meanwhile(streams))
    return streams


def check_same(undisturbed: list[Stream], streams: list[Stream]) -> None:
    for before, after in zip(undisturbed, streams, strict=True):
        assert after.outcome == before.outcome
        for index, values in before.logprobs.items():
            assert after.logprobs[index] == pytest.approx(values, abs=LOGPROB_TOLERANCE)


def kill_when_tokens_flow(running: Server, rank: int, num_tokens: int):
    async def kill(streams: list[Stream]) -> None:
        while sum(stream.num_tokens for stream in streams) < num_tokens:
            await asyncio.sleep(0.01)
        os.kill(running.rank_pid(rank), signal.SIGKILL)

    return kill


@pytest.mark.slow
@pytest.mark.parametrize("layout", [("-tp", 2), ("-pp", 2)])
def test_streams_go_on_when_a_rank_is_killed(layout) -> None:
    with server(*MODEL, *layout, ranks=2, restarts=3) as running:
        undisturbed = asyncio.run(stream_all(running.url, BODIES))
        assert all(stream.error is None and stream.finish for stream in undisturbed)
        (frontend,) = running.pids("infer.serve.frontend")
        for rank, num_tokens in ((0, 120), (1, 60)):
            streams = asyncio.run(
                stream_all(running.url, BODIES, kill_when_tokens_flow(running, rank, num_tokens))
            )
            check_same(undisturbed, streams)
            longest = max(stream.longest_gap for stream in streams)
            print(f"{layout}: rank {rank} killed, the longest gap of {len(streams)} streams: {longest:.1f} s")
        assert running.pids("infer.serve.frontend") == [frontend], "the same frontend throughout"
        interrupt(running, signal.SIGTERM)
        running.process.wait(35)
        running.wait_gone(10)


@pytest.mark.slow
def test_killed_while_requests_wait_and_come() -> None:
    """Two run, four wait, two more come while there is no engine; then no rank is left in the middle of a request."""
    bodies = [body(f"Question {i}:", seed=i, ignore_eos=True, max_tokens=24) for i in range(8)]
    with server(*MODEL, "-tp", 2, "--max-num-seqs", 2, ranks=2, restarts=3) as running:
        undisturbed = asyncio.run(stream_all(running.url, bodies))

        async def kill_and_ask(streams: list[Stream]) -> None:
            await kill_when_tokens_flow(running, 1, 20)(streams)
            async with aiohttp.ClientSession() as session:
                await until_restarting(session, running.url)
                late.extend(await asyncio.gather(*(Stream().read(session, running.url, b) for b in bodies[6:])))

        late: list[Stream] = []
        streams = asyncio.run(stream_all(running.url, bodies[:6], kill_and_ask))
        check_same(undisturbed, streams + late)
        print(f"the longest gap of {len(streams)} streams: {max(s.longest_gap for s in streams):.1f} s")


async def until_restarting(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        async with session.get(f"{url}/health") as reply:
            if reply.status == 503:
                assert (await reply.json())["error"]["code"] == "restarting"
                return
        await asyncio.sleep(0.02)


@pytest.mark.slow
def test_two_crashes_in_a_row_end_the_suspect_alone() -> None:
    """A long prompt is still computed when the engine dies, and again when the next does; another request goes on."""
    poison = body([7] * 1000, max_tokens=8)
    # So few tokens a batch that the prompt takes seconds.
    with server(*MODEL, "--max-num-batched-tokens", 16, "--no-enable-prefix-caching", ranks=1, restarts=3) as running:

        async def kill_twice(streams: list[Stream]) -> None:
            for times in (1, 2):
                while running.log.count("one by one") < times - 1 or not running.is_healthy():
                    await asyncio.sleep(0.02)
                await until_running(running.url)
                os.kill(running.rank_pid(0), signal.SIGKILL)
                if times == 1:
                    other.append(asyncio.create_task(ask_beside(running.url)))

        other: list[asyncio.Task] = []

        async def all_of_it() -> list[Stream]:
            streams = await stream_all(running.url, [poison], kill_twice)
            return streams + [await task for task in other]

        ended, went_on = asyncio.run(all_of_it())
        assert ended.status == 500 and ended.error["code"] == "engine_crashed"
        assert ended.headers["x-should-retry"] == "false"
        assert went_on.error is None and went_on.finish == {0: "length"} and went_on.num_tokens == 8


async def ask_beside(url: str) -> Stream:
    async with aiohttp.ClientSession() as session:
        return await Stream().read(session, url, body("Hello", seed=1, max_tokens=8, ignore_eos=True))


async def until_running(url: str) -> None:
    """Until the engine says that it computes something."""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}/metrics") as reply:
                lines = (await reply.text()).splitlines()
            (line,) = (line for line in lines if line.startswith("infer:num_requests_running{"))
            if float(line.rpartition(" ")[2]) > 0:
                return
            await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_torchrun(number) -> None:
    async def end_torchrun(streams: list[Stream]) -> None:
        await streams[0].begun.wait()
        interrupt(running, number)

    with server(*MODEL, "-pp", 2, "--shutdown-timeout", 1, ranks=2, restarts=3) as running:
        long = body("Once", max_tokens=900, ignore_eos=True)
        (stream,) = asyncio.run(stream_all(running.url, [long], end_torchrun))
        assert stream.error is not None and stream.error["type"] == "service_unavailable"
        running.wait_gone(10)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", running.port))


@pytest.mark.slow
def test_the_frontend_ends_once_the_restarts_are_used_up() -> None:
    async def kill(streams: list[Stream]) -> None:
        await streams[0].begun.wait()
        os.kill(running.rank_pid(0), signal.SIGKILL)

    with server(*MODEL, ranks=1, restarts=0) as running:
        long = body("Once", max_tokens=900, ignore_eos=True)
        (stream,) = asyncio.run(stream_all(running.url, [long], kill))
        assert stream.error is not None and "torchrun" in stream.error["message"]
        running.wait_gone(10)


@pytest.mark.slow
def test_killed_again_while_it_starts() -> None:
    """The second generation dies before it serves; that is no request's fault."""

    async def kill_twice(streams: list[Stream]) -> None:
        before = running.rank_pid(1)
        await kill_when_tokens_flow(running, 0, 60)(streams)
        while (found := named_process(running.mark, "infer-rank-1")) in (None, before):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)  # into joining or loading
        os.kill(found, signal.SIGKILL)

    with server(*MODEL, "-pp", 2, ranks=2, restarts=3) as running:
        undisturbed = asyncio.run(stream_all(running.url, BODIES[:4]))
        check_same(undisturbed, asyncio.run(stream_all(running.url, BODIES[:4], kill_twice)))


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    """Four ranks, 16 streams, one of the ranks killed at any time; INFER_TEST_KILLS of them, one after the other."""
    num_kills = int(os.environ.get("INFER_TEST_KILLS", "3"))
    seed = int(os.environ.get("INFER_TEST_SEED", "0")) or random.randrange(1 << 30)
    print(f"INFER_TEST_SEED={seed}")
    chance = random.Random(seed)
    bodies = [{**fields, "seed": i} for i, fields in enumerate(BODIES * 2)]

    def kill_soon(rank: int):
        async def kill(streams: list[Stream]) -> None:
            await asyncio.sleep(chance.uniform(0.0, 0.9 * seconds))
            print(f"rank {rank} killed after {sum(stream.num_tokens for stream in streams)} tokens", end=", ")
            os.kill(running.rank_pid(rank), signal.SIGKILL)

        return kill

    with server(*MODEL, "-tp", 2, "-pp", 2, ranks=4, restarts=num_kills) as running:
        started = time.monotonic()
        undisturbed = asyncio.run(stream_all(running.url, bodies))
        seconds = time.monotonic() - started
        for number in range(num_kills):
            streams = asyncio.run(stream_all(running.url, bodies, kill_soon(number % 4)))
            check_same(undisturbed, streams)
            print(f"the longest gap: {max(stream.longest_gap for stream in streams):.1f} s")
            while not running.is_healthy():
                time.sleep(0.1)
