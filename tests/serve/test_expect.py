"""`Expect`: the head of a request decides before its body is asked for."""

import json
import socket
from pathlib import Path

import pytest
from fake_engine import frontend


@pytest.mark.parametrize(
    ("key", "expect", "status"),
    [("", "100-continue", 401), ("right", "100-continue", 100), ("right", "201-created", 417), ("wrong", "x", 417)],
)
def test_expect(tokenizer_path: Path, key: str, expect: str, status: int) -> None:
    with (
        frontend(tokenizer_path, api_key=("right",), root_path="/llm") as handle,
        socket.create_connection(("127.0.0.1", handle.port), timeout=10) as client,
    ):
        for path in ("/v1/completions", "/llm/v1/completions"):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
            client.sendall((head + f"Authorization: Bearer {key}\r\nExpect: {expect}\r\n\r\n").encode())
            reply = client.recv(65536).decode()
            assert reply.startswith(f"HTTP/1.1 {status} "), reply
            if status != 100:
                assert json.loads(reply.split("\r\n\r\n", 1)[1])["error"]["message"]
                return  # the connection is closed: the body was not read
            client.sendall(b"{}")
            while "HTTP/1.1 503 " not in reply:  # no engine is connected; it may have come with the 100
                more = client.recv(65536).decode()
                assert more, reply
                reply += more
