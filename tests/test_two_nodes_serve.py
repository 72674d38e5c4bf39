"""A server over two nodes: whatever is lost on either, or between them, every stream ends as if undisturbed."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from checkpoints import build_checkpoint
from nodes import Nodes, two_nodes
from test_survive import BODIES, Stream, check_same
from worlds import named_process

pytestmark = pytest.mark.slow

NAME = "tiny"
START_SECONDS = 90.0
STREAM_SECONDS = 150.0
DEADLINE_SECONDS = 20.0  # longer than a start here takes


@dataclass
class TwoNodes:
    """The server, which listens on a Unix socket: a path leads out of a network namespace, an address does not."""

    nodes: Nodes
    socket_path: Path
    arguments: list[object]
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, index: int) -> subprocess.Popen[bytes]:
        return self.nodes.start(index, "-m", "infer.serve", *self.arguments, restarts=10)

    def rank_pid(self, rank: int) -> int:
        """The process of a rank, as this process sees it from outside."""
        pid = named_process(self.nodes.mark, f"infer-rank-{rank}")
        assert pid is not None, f"rank {rank} is not running"
        return pid

    async def is_healthy(self) -> bool:
        async with self.session(2.0) as session:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get("http://server/health") as reply:
                    return reply.status == 200
        return False

    def session(self, seconds: float) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=seconds)
        return aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket_path)), timeout=timeout)

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not asyncio.run(self.is_healthy()):
            assert time.monotonic() < deadline, "the server is not ready"
            time.sleep(0.1)

    async def stream_all(self, meanwhile: Callable[[list[Stream]], Awaitable[None]] | None = None) -> list[Stream]:
        """All streams side by side; `meanwhile` gets them when they are on their way."""
        streams = [Stream() for _ in STREAMS]
        async with self.session(STREAM_SECONDS) as session, asyncio.TaskGroup() as group:
            for stream, body in zip(streams, STREAMS, strict=True):
                group.create_task(stream.read(session, "http://server", body))
            if meanwhile is not None:
                group.create_task(meanwhile(streams))
        return streams


STREAMS = [{**body, "model": NAME, "seed": i, "max_tokens": 400} for i, body in enumerate(BODIES)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    model = build_checkpoint("llama", tmp_path_factory.mktemp("tiny"))
    with two_nodes() as nodes:
        socket_path = nodes.directory / "http.sock"
        arguments = [
            "--uds", socket_path, "--model", model, "--served-model-name", NAME, "--dtype", "float32", "-tp", 2,
            "-pp", 2, "--kv-cache-memory-bytes", "64M", "--num-threads", 1, "--restart-deadline", DEADLINE_SECONDS,
        ]  # fmt: skip
        server = TwoNodes(nodes, socket_path, arguments)
        server.agents = [server.start(i) for i in range(2)]
        server.wait_healthy()
        yield server


@pytest.fixture(scope="module")
def undisturbed(running: TwoNodes) -> list[Stream]:
    streams = asyncio.run(running.stream_all())
    assert all(stream.error is None and stream.finish for stream in streams)
    return streams


@pytest.fixture(autouse=True)
def healthy(running: TwoNodes) -> None:
    running.wait_healthy()


def stream_disturbed(
    running: TwoNodes, undisturbed: list[Stream], disturb: Callable[[], Awaitable[None]]
) -> list[Stream]:
    """The streams, to which something happens when they have a share of their tokens."""
    share = sum(stream.num_tokens for stream in undisturbed) // 4

    async def meanwhile(streams: list[Stream]) -> None:
        while sum(stream.num_tokens for stream in streams) < share:
            await asyncio.sleep(0.005)
        await disturb()

    return asyncio.run(running.stream_all(meanwhile))


def check_disturbed(
    running: TwoNodes, undisturbed: list[Stream], disturb: Callable[[], Awaitable[None]], what: str
) -> None:
    streams = stream_disturbed(running, undisturbed, disturb)
    check_same(undisturbed, streams)
    print(f"{what}: the longest gap of {len(streams)} streams: {max(s.longest_gap for s in streams):.1f} s")


@pytest.mark.parametrize("rank", [1, 3, 0])
def test_a_rank_is_killed(running: TwoNodes, undisturbed: list[Stream], rank: int) -> None:
    """On node 0, on node 1, and rank 0. The ranks of the other node end by themselves."""
    before = [running.nodes.log(i).count("infer: rank") for i in range(2)]

    async def kill() -> None:
        os.kill(running.rank_pid(rank), signal.SIGKILL)

    check_disturbed(running, undisturbed, kill, f"rank {rank} killed")
    other = 1 - rank // 2
    ended = running.nodes.log(other).split("infer: rank")[before[other] + 1 :]
    assert ended and all(f" ends: rank {rank} (host node{rank // 2}, " in line for line in ended), ended


def test_the_link_is_cut_and_healed(running: TwoNodes, undisturbed: list[Stream]) -> None:
    """Each side sees the other silent and ends; they come together when the link is there again."""
    before = [running.nodes.log(i).count("silent since") for i in range(2)]

    def both_ended() -> bool:
        return all(running.nodes.log(i).count("silent since") > before[i] for i in range(2))

    async def cut() -> None:
        started = time.monotonic()
        running.nodes.cut()
        while not both_ended():
            await asyncio.sleep(0.05)
        print(f"both sides ended {time.monotonic() - started:.1f} s after the cut", end=", ")
        await asyncio.sleep(2.0)  # into the next generation's start
        running.nodes.heal()

    check_disturbed(running, undisturbed, cut, "link cut and healed")


def test_torchrun_of_node_1_is_killed_and_started_again(running: TwoNodes, undisturbed: list[Stream]) -> None:
    """By its operator. Its restart count begins anew, while that of node 0 goes on."""

    async def replace() -> None:
        os.kill(running.agents[1].pid, signal.SIGKILL)
        await asyncio.sleep(1.0)
        running.agents[1] = running.start(1)

    check_disturbed(running, undisturbed, replace, "torchrun of node 1 killed and started again")


def test_a_node_that_does_not_come_back_in_time(running: TwoNodes, undisturbed: list[Stream]) -> None:
    """The streams end with an error; and there is service again once it comes after all."""

    async def kill() -> None:
        os.kill(running.agents[1].pid, signal.SIGKILL)

    streams = stream_disturbed(running, undisturbed, kill)
    errors = [stream.error["message"] for stream in streams if stream.error is not None]
    assert errors and all(f"no engine has come up within {DEADLINE_SECONDS:g} s" in error for error in errors), errors
    assert all(stream.error or stream.finish for stream in streams)
    missing = "nothing has come from rank 2 (last on host node1), rank 3 (last on host node1) of 4 ranks"
    assert f"joining the world: {missing}" in running.nodes.log(0)
    running.agents[1] = running.start(1)
    running.wait_healthy()
    check_same(undisturbed, asyncio.run(running.stream_all()))


def test_torchrun_of_node_0_is_killed_and_both_are_started_again(running: TwoNodes, undisturbed: list[Stream]) -> None:
    """With it go the store, rank 0 and the frontend, and so node 1 ends too: nothing lingers there."""
    os.kill(running.agents[0].pid, signal.SIGKILL)
    assert running.agents[1].wait(60) == 1
    running.agents = [running.start(i) for i in range(2)]
    running.wait_healthy()
    check_same(undisturbed, asyncio.run(running.stream_all()))
