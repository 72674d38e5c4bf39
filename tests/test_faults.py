"""Faults of a rank that is still there: stopped, short of memory, with a bad batch. And what restarts leave behind."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import aiohttp
import pytest
from serving import Server, interrupt, server, small
from test_survive import Stream, stream_all
from worlds import SCRIPTS, marked_processes

POISON = 777
FOUND_SECONDS = 6.0
PAUSE_SECONDS = 15.0  # from the fault on: found, ended, started anew, loaded
NUM_RESTARTS = int(os.environ.get("INFER_TEST_KILLS", "6"))


def body(seed: int, max_tokens: int = 300, **fields: object) -> dict:
    return {
        "model": "tiny", "prompt": [5, 6, 7 + seed], "max_tokens": max_tokens, "ignore_eos": True, "seed": seed,
        "stream": True, "return_token_ids": True, **fields,
    }  # fmt: skip


def outcomes(streams: list[Stream]) -> list[tuple]:
    assert all(stream.error is None and stream.finish for stream in streams), streams
    return [stream.outcome for stream in streams]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "rank"), [(("-tp", 2), 1), (("-pp", 2), 0)])
def test_a_stopped_rank_is_found_and_killed_and_the_streams_go_on(checkpoint_dirs, layout, rank) -> None:
    bodies = [body(i) for i in range(8)]

    async def stop(streams: list[Stream]) -> None:
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        pid, started = running.rank_pid(rank), time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        while "silent since" not in running.log:
            assert time.monotonic() - started < FOUND_SECONDS, running.log
            await asyncio.sleep(0.02)
        print(f"{layout}, rank {rank} stopped: found after {time.monotonic() - started:.1f} s", end=", ")
        while not is_gone(pid):
            assert time.monotonic() - started < FOUND_SECONDS + 2, "nobody has killed it"
            await asyncio.sleep(0.02)
        print(f"killed after {time.monotonic() - started:.1f} s", end=", ")

    with server(*small(checkpoint_dirs["llama"]), *layout, ranks=2, restarts=3) as running:
        undisturbed = asyncio.run(stream_all(running.url, bodies))
        streams = asyncio.run(stream_all(running.url, bodies, stop))
        assert outcomes(streams) == outcomes(undisturbed)
        longest = max(stream.longest_gap for stream in streams)
        print(f"the longest gap: {longest:.1f} s")
        assert longest < PAUSE_SECONDS
        assert f"infer: rank {1 - rank} ends: rank {rank} (host " in running.log


@pytest.mark.slow
def test_a_request_that_takes_all_memory_ends_alone(checkpoint_dirs) -> None:
    """Rank 1 fails at it, in two generations. The streams beside it go on both times."""
    bodies = [body(i, logit_bias={POISON: -100.0}) for i in range(4)]  # else they may draw it
    poison = body(0, prompt=[5, 6, POISON], stream=False, max_tokens=4)

    async def ask(streams: list[Stream]) -> None:
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        url = f"{running.url}/v1/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=poison) as reply:
            answers.append((reply.status, reply.headers.get("x-should-retry"), await reply.json()))

    answers: list[tuple] = []
    script = (SCRIPTS / "faulty_server.py", f"memory={POISON}")
    with server(*small(checkpoint_dirs["llama"]), "-tp", 2, ranks=2, restarts=4, script=script) as running:
        undisturbed = asyncio.run(stream_all(running.url, bodies))
        streams = asyncio.run(stream_all(running.url, bodies, ask))
        assert outcomes(streams) == outcomes(undisturbed)
        ((status, retry, reply),) = answers
        assert (status, retry, reply["error"]["code"]) == (500, "false", "engine_crashed"), reply
        assert running.log.count("OutOfMemoryError: CUDA out of memory") == 2, running.log
        assert running.is_healthy()


@pytest.mark.slow
def test_a_batch_that_cannot_be_ends_the_generation(checkpoint_dirs) -> None:
    """A follower that gets one ends, and with it all ranks; the stream goes on in the next generation, three times."""
    script = (SCRIPTS / "faulty_server.py", "batches")
    with server(*small(checkpoint_dirs["llama"]), "-pp", 2, ranks=2, restarts=4, script=script) as running:
        (stream,) = asyncio.run(stream_all(running.url, [body(1, 200)]))
        (undisturbed,) = asyncio.run(stream_all(running.url, [body(1, 200)]))
        assert outcomes([stream]) == outcomes([undisturbed])
        for told in (
            "ValueError: step 12 holds a token id outside 0..1008",
            "ValueError: step 13 came where step 12 was due",
            "ValueError: a message of generation 2 reached generation 3",
        ):
            assert running.log.count(told) == 1, running.log
        assert running.log.count("An engine is there again") == 3


def footprint(running: Server, frontend: int) -> dict[str, object]:
    """What a restart must not add to: processes, names in /dev/shm, the frontend's descriptors and memory (MiB)."""
    commands = []
    for pid in marked_processes(running.mark):
        commands.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
    status = Path(f"/proc/{frontend}/status").read_text()
    return {
        "processes": sorted(commands),
        "shared memory": sorted(os.listdir("/dev/shm")),
        "descriptors": len(os.listdir(f"/proc/{frontend}/fd")),
        "memory": int(status.partition("VmRSS:")[2].split()[0]) >> 10,
    }


def settled(running: Server, frontend: int, expected: int) -> dict[str, object]:
    """The footprint once what a restart leaves for a moment is gone: connections of clients, ended processes."""
    deadline = time.monotonic() + 10
    while True:
        found = footprint(running, frontend)
        if len(found["processes"]) <= expected or time.monotonic() > deadline:  # type: ignore[arg-type]
            return found
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["stand-in", "fork server"])
def test_what_ranks_are_started_by_is_killed(checkpoint_dirs, victim) -> None:
    """The process that torchrun knows of a rank goes, or the one that all ranks of the host were forked from."""
    bodies = [body(i) for i in range(4)]

    async def kill(streams: list[Stream]) -> None:
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        stand_ins = sorted(running.pids("-m infer.serve --port"))  # torchrun and its children
        os.kill(stand_ins[-1] if victim == "stand-in" else running.pid_of("infer-fork"), signal.SIGKILL)

    with server(*small(checkpoint_dirs["llama"]), "-tp", 2, ranks=2, restarts=2) as running:
        undisturbed = outcomes(asyncio.run(stream_all(running.url, bodies)))
        first = running.pid_of("infer-fork")
        assert outcomes(asyncio.run(stream_all(running.url, bodies, kill))) == undisturbed
        assert (running.pid_of("infer-fork") == first) == (victim == "stand-in")
        assert running.log.count("An engine is there again") == 1
        interrupt(running, signal.SIGTERM)
        running.process.wait(35)
        running.wait_gone(10)


@pytest.mark.slow
def test_restarts_leave_nothing_behind(checkpoint_dirs) -> None:
    """After INFER_TEST_KILLS restarts (6, or 20 of make soak) all is as after one; each rank is killed in its turn."""
    bodies = [body(i, 60) for i in range(4)]

    async def kill(streams: list[Stream]) -> None:
        await streams[0].begun.wait()
        os.kill(running.rank_pid(number % 2), signal.SIGKILL)

    with server(*small(checkpoint_dirs["llama"]), "-tp", 2, ranks=2, restarts=NUM_RESTARTS) as running:
        (frontend,) = running.pids("infer.serve.frontend")
        undisturbed = outcomes(asyncio.run(stream_all(running.url, bodies)))
        num_processes, after = len(marked_processes(running.mark)), []
        for number in range(NUM_RESTARTS):
            assert outcomes(asyncio.run(stream_all(running.url, bodies, kill))) == undisturbed
            deadline = time.monotonic() + 30
            while running.log.count("An engine is there again") <= number or not running.is_healthy():
                assert time.monotonic() < deadline, running.log
                time.sleep(0.05)
            after.append(settled(running, frontend, num_processes))
        print(json.dumps({name: [found[name] for found in after] for name in ("descriptors", "memory")}))
        first, last = after[0], after[-1]
        assert first["processes"] == last["processes"] and first["shared memory"] == last["shared memory"]
        assert last["descriptors"] <= first["descriptors"] + 2  # type: ignore[operator]
        assert last["memory"] <= first["memory"] + 8  # type: ignore[operator]
