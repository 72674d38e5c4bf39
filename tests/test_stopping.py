"""Being told to end, with real ranks: servers finish what is under way, scripts end with a line, nothing is left."""

import asyncio
import json
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path

import aiohttp
import pytest
from serving import Server, interrupt, server, small
from worlds import ROOT, SCRIPTS, run_world

from infer.signals import SAME_SECONDS


def body(seed: int, max_tokens: int) -> dict:
    return {"model": "tiny", "prompt": [5, 6, 7 + seed], "max_tokens": max_tokens, "ignore_eos": True, "seed": seed,
            "stream": True}  # fmt: skip


async def read(session: aiohttp.ClientSession, url: str, fields: dict, begun: asyncio.Event) -> list[dict]:
    """The events of a stream; `begun` is set with the first."""
    events = []
    async with session.post(f"{url}/v1/completions", json=fields) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                events.append(json.loads(line[6:]))
                begun.set()
        return events


async def stop_under_load(running: Server, bodies: list[dict], *numbers: signal.Signals) -> list[list[dict]]:
    """All streams, to whose server the signals go once each has begun; a second signal when the first is known."""
    begun = [asyncio.Event() for _ in bodies]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        tasks = [
            asyncio.create_task(read(session, running.url, fields, event))
            for fields, event in zip(bodies, begun, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        for number in numbers:
            interrupt(running, number)
            await until_refused(session, running)
            await asyncio.sleep(2 * SAME_SECONDS)
        return await asyncio.gather(*tasks)


async def until_refused(session: aiohttp.ClientSession, running: Server) -> None:
    """Until new requests are refused, which is soon."""
    deadline = time.monotonic() + 3.0
    while True:
        try:
            async with session.post(f"{running.url}/v1/completions", json=body(0, 1)) as reply:
                if reply.status == 503:
                    error = (await reply.json())["error"]
                    assert (error["code"], reply.headers["Retry-After"]) == ("stopping", "1"), error
                    return
                await reply.read()
        except aiohttp.ClientConnectionError:  # it has ended already
            return
        assert time.monotonic() < deadline, f"requests are still taken\n{running.log}"


def is_whole(events: list[dict]) -> bool:
    return all("error" not in e for e in events) and events[-1]["choices"][0]["finish_reason"] == "length"


def check_gone(running: Server, descriptors: set[str]) -> None:
    """No process, no name in /dev/shm, the port is free."""
    running.wait_gone(10)
    assert set(os.listdir("/dev/shm")) <= descriptors
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", running.port))


def check_health_tells_of(running: Server, num_ranks: int) -> None:
    """/health says that every rank serves and was heard from lately; the frontend hears it once a second."""
    deadline = time.monotonic() + 10
    while True:
        with urllib.request.urlopen(f"{running.url}/health", timeout=5) as reply:
            ranks = json.load(reply)["ranks"]
        if [(rank["rank"], rank["phase"]) for rank in ranks] == [(i, "serving") for i in range(num_ranks)]:
            assert all(rank["seconds_since_heard"] < 5 for rank in ranks), ranks
            return
        assert time.monotonic() < deadline, ranks
        time.sleep(0.1)


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_sigterm_under_load_cuts_nothing(checkpoint_dirs: dict[str, Path]) -> None:
    """To torchrun, over two stages of two ranks: every stream ends whole, every rank by itself and with status 0."""
    before = shared_memory()
    with server(*small(checkpoint_dirs["llama"]), "-tp", 2, "-pp", 2, ranks=4, restarts=3) as running:
        check_health_tells_of(running, 4)
        streams = asyncio.run(stop_under_load(running, [body(i, 120) for i in range(8)], signal.SIGTERM))
        assert all(is_whole(events) for events in streams), running.log
        running.process.wait(15)
        check_gone(running, before)
        assert "All ranks have ended their work" in running.log
        for trouble in ("infer: rank", f"{ROOT}/infer/", "SIGKILL"):
            assert trouble not in running.log, running.log


def test_sigterm_to_a_server_of_one_process(checkpoint_dirs: dict[str, Path]) -> None:
    before = shared_memory()
    with server(*small(checkpoint_dirs["llama"]), ranks=None) as running:
        streams = asyncio.run(stop_under_load(running, [body(i, 400) for i in range(4)], signal.SIGTERM))
        assert all(is_whole(events) for events in streams), running.log
        assert running.process.wait(15) == 0
        check_gone(running, before)
        assert "Traceback" not in running.log


@pytest.mark.slow
def test_what_takes_longer_than_the_timeout_gets_an_error(checkpoint_dirs: dict[str, Path]) -> None:
    flags = ("-tp", 2, "--shutdown-timeout", 0.2)
    with server(*small(checkpoint_dirs["llama"]), *flags, ranks=2, restarts=3) as running:
        bodies = [body(i, 480) for i in range(32)]
        started = time.monotonic()
        streams = asyncio.run(stop_under_load(running, bodies, signal.SIGTERM))
        running.process.wait(15)
        print(f"ended after {time.monotonic() - started:.1f} s")
        cut = [events[-1]["error"] for events in streams if "error" in events[-1]]
        assert cut and all("--shutdown-timeout" in error["message"] for error in cut), running.log
        assert "All ranks have ended their work" in running.log
        running.wait_gone(10)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_at_once(checkpoint_dirs: dict[str, Path]) -> None:
    """torchrun passes the first one on as SIGINT, and answers the second one with SIGTERM."""
    with server(*small(checkpoint_dirs["llama"]), "-pp", 2, ranks=2, restarts=3) as running:
        bodies = [body(i, 480) for i in range(32)]
        started = time.monotonic()
        streams = asyncio.run(stop_under_load(running, bodies, signal.SIGINT, signal.SIGINT))
        running.wait_gone(5)
        assert any("error" in events[-1] for events in streams), running.log
        assert time.monotonic() - started < 15


@pytest.mark.slow
def test_sigterm_to_any_one_rank_stops_the_server(checkpoint_dirs: dict[str, Path]) -> None:
    """As a torchrun on another node gives it to its own ranks alone."""

    async def stop(running: Server) -> list[dict]:
        begun = asyncio.Event()
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(read(session, running.url, body(1, 400), begun))
            await begun.wait()
            os.kill(running.rank_pid(1), signal.SIGTERM)
            await until_refused(session, running)
            return await task

    with server(*small(checkpoint_dirs["llama"]), "-pp", 2, ranks=2, restarts=3) as running:
        assert is_whole(asyncio.run(stop(running)))
        assert running.process.wait(30) == 0, "every rank has ended well, and torchrun with them"
        running.wait_gone(10)
        assert "rank 1 was told to end" in running.log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "name", "how"),
    [(2, "SIGTERM", "with"), (2, "SIGINT", "plain"), (1, "SIGTERM", "plain"), (2, "SIGTERM", "building")],
)
def test_a_script_that_is_told_to_end(checkpoint_dirs: dict[str, Path], ranks: int, name: str, how: str) -> None:
    """Its `finally` blocks run, one line tells why, and no rank hangs or aborts."""
    result = run_world(
        SCRIPTS / "interrupted.py", checkpoint_dirs["llama"], name, how, ranks=ranks, timeout=60, torchrun=ranks > 1
    )
    assert result.returncode != 0 and result.seconds < 40, result.report()
    assert result.rank_stdout.count("tidied up") == 1, result.report()
    told = "infer: told to end (SIGTERM)" if name == "SIGTERM" else "KeyboardInterrupt"
    assert told in result.rank_stderr, result.report()
    for trouble in ("terminate called", "infer: rank", "RankLost"):
        assert trouble not in result.rank_stderr, result.report()
