"""The server as its users start it: real ranks, real HTTP."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import aiohttp
import pytest
from serving import SMOLLM2, Server, interrupt, server
from worlds import ROOT, free_port

MODEL = ("--model", SMOLLM2, "--dtype", "float32", "--max-model-len", 1024, "--kv-cache-memory-bytes", "256M")


async def _stream(session: aiohttp.ClientSession, url: str, body: dict) -> tuple[str, str | None, int]:
    """(text, finish reason, number of completion tokens) of a streamed completion."""
    text, finish, count = "", None, 0
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text += choice["text"]
                finish = choice["finish_reason"] or finish
            if chunk.get("usage"):
                count = chunk["usage"]["completion_tokens"]
    return text, finish, count


async def _streams(url: str, bodies: list[dict]) -> list[tuple[str, str | None, int]]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=240)) as session:
        return await asyncio.gather(*(_stream(session, url, body) for body in bodies))


def _bodies(count: int) -> list[dict]:
    return [
        {
            "model": "SmolLM2-135M-Instruct",
            "prompt": f"Question {i}: what is {i} + {i}?",
            "max_tokens": 8 + i % 17,
            "temperature": 0.8,
            "seed": i,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(count)
    ]


def _check_basics(running: Server) -> None:
    """The routes of the README, stream and not, and a bad request in between that changes nothing."""
    status, reply = running.post(
        "/v1/completions",
        {"model": "SmolLM2-135M-Instruct", "prompt": "Explain distributed inference:", "max_tokens": 24},
    )
    assert status == 200, reply
    assert 0 < reply["usage"]["completion_tokens"] <= 24
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    question = {"messages": messages, "temperature": 0, "max_tokens": 16}
    status, reply = running.post("/v1/chat/completions", question)
    assert reply["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert reply["choices"][0]["finish_reason"] == "stop"

    too_long = {"model": "SmolLM2-135M-Instruct", "prompt": [7] * 1024, "max_tokens": 1}
    status, reply = running.post("/v1/completions", too_long)
    assert status == 400
    assert "1024" in reply["error"]["message"]
    status, reply = running.post("/v1/completions", {**too_long, "prompt": [49152]})
    assert status == 400
    assert running.is_healthy()


def test_32_streams_over_tp_2_pp_2() -> None:
    """32 concurrent streams, each to its end, over four ranks; SIGTERM to torchrun leaves nothing behind."""
    with server(*MODEL, "-tp", 2, "-pp", 2, ranks=4) as running:
        _check_basics(running)
        bodies = _bodies(32)
        results = asyncio.run(_streams(running.url, bodies))
        for body, (_, finish, count) in zip(bodies, results, strict=True):
            assert (finish, count) == ("length", body["max_tokens"])
        assert len(running.pids("infer.serve.frontend")) == 1
        interrupt(running, signal.SIGTERM)
        running.process.wait(35)
        running.wait_gone(10)
        assert f"{ROOT}/infer/" not in running.log, "a rank ended with a traceback"


def test_streams_with_the_standalone_rendezvous() -> None:
    with server(*MODEL, "-tp", 1, "-pp", 2, ranks=2, standalone=True) as running:
        results = asyncio.run(_streams(running.url, _bodies(8)))
        assert [finish for _, finish, _ in results] == ["length"] * 8


def test_one_rank_without_torchrun() -> None:
    """python -m infer.serve alone: a client that leaves frees its blocks; the frontend ends with the engine."""
    with server(*MODEL, ranks=None) as running:
        _check_basics(running)
        bodies = _bodies(6)
        together = asyncio.run(_streams(running.url, bodies))
        for body, (text, _, _) in zip(bodies, together, strict=True):
            _, alone = running.post("/v1/completions", {**body, "stream": False, "stream_options": None})
            assert alone["choices"][0]["text"] == text, "alone and beside others a request gives the same"

        asyncio.run(_leave_early(running.url))
        status, _ = running.post("/v1/completions", {**bodies[0], "stream": False, "stream_options": None})
        assert status == 200

        os.kill(running.process.pid, signal.SIGKILL)  # the frontend watches the engine's process
        running.wait_gone(10)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", running.port))


async def _leave_early(url: str) -> None:
    """Opens streams that would run long and goes away after their first words."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for seed in range(4):
            body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "seed": seed, "stream": True}
            async with session.post(f"{url}/v1/completions", json={"model": "SmolLM2-135M-Instruct", **body}) as reply:
                await reply.content.readline()
                reply.close()


def test_the_server_comes_back_after_a_rank_was_killed() -> None:
    """torchrun starts the ranks again; the new rank 0 finds the frontend of the old one."""
    with server(*MODEL, "-pp", 2, ranks=2, restarts=2) as running:
        _check_basics(running)
        frontend = running.pids("infer.serve.frontend")
        for generation, rank in enumerate((1, 0), start=1):
            os.kill(running.rank_pid(rank), signal.SIGKILL)
            deadline = time.monotonic() + 60
            while running.log.count("An engine is there again") < generation or not running.is_healthy():
                assert time.monotonic() < deadline, running.log
                time.sleep(0.1)
            _check_basics(running)
        assert running.pids("infer.serve.frontend") == frontend


@pytest.mark.parametrize("ranks", [None, 1])
def test_another_frontend_after_the_first_died(ranks: int | None) -> None:
    """Rank 0, without torchrun and with it, starts another frontend and says what was lost."""
    with server(*MODEL, ranks=ranks) as running:
        (frontend,) = running.pids("infer.serve.frontend")
        os.kill(frontend, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while frontend in running.pids("infer.serve.frontend") or not running.is_healthy():
            assert time.monotonic() < deadline, running.log
            time.sleep(0.1)
        _check_basics(running)
        assert "requests were lost; starting another frontend" in running.log


def test_a_taken_port_is_an_error_before_anything_is_loaded() -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "infer.serve", *map(str, MODEL), "--port", str(port)],
            capture_output=True, text=True, timeout=60, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"{port}" in done.stderr
    assert done.stderr.count("infer: error:") == 1
    assert "Traceback" not in done.stderr
    assert "Model loading" not in done.stderr
    assert time.monotonic() - started < 30
