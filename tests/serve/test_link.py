"""Frames and messages, and the engine's end of the link over a socket pair."""

import queue
import socket

import msgspec
import pytest

from infer.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from infer.serve import link
from infer.serve.link import (
    HEADER,
    Abort,
    Bye,
    Closed,
    EngineLink,
    Hello,
    LinkError,
    Outputs,
    Progress,
    Ranks,
    RankState,
    Stop,
    Submit,
    coalesce,
    decode_from_engine,
    decode_from_frontend,
    encode_frame,
    frame_length,
)

PARAMS = SamplingParams(n=3, stop=["a", "b"], logit_bias={5: -1.5}, seed=-(2**63), max_tokens=9, logprobs=2)
REQUEST = Request(request_id="r", prompt_token_ids=[1, 2, 3], params=PARAMS, seed=2**63 - 1, eos_token_ids=[2])
OUTPUT = Output(
    request_id="r", index=2, token_ids=[7], logprobs=[TokenLogprobs([7, 8], [-0.5, float("-inf")], [1, 2])],
    prompt_logprobs=[None, TokenLogprobs([1], [-2.0], [3])], finish_reason=FinishReason.STOP, stop_reason=7,
)  # fmt: skip
HELLO = Hello(generation=1, model_name="m", max_model_len=9, vocab_size=10, eos_token_ids=[2])
STOP = Stop(reason="x", timeout_s=2.5)
RANKS = Ranks(items=[RankState(rank=0, phase="serving", step=-1, busy=True, phase_seconds=1.5, age_seconds=0.0)])


@pytest.mark.parametrize("message", [Submit(request=REQUEST), Abort(request_id="r", index=1), Bye(reason="x")])
def test_from_the_frontend(message):
    frame = encode_frame(message)
    assert frame_length(frame[:4]) == len(frame) - 4
    assert decode_from_frontend(frame[4:]) == message


@pytest.mark.parametrize("message", [HELLO, Outputs(items=[OUTPUT]), Progress(phase="p"), RANKS, STOP, Bye(reason="x")])
def test_from_the_engine(message):
    assert decode_from_engine(encode_frame(message)[4:]) == message


def test_a_message_of_the_wrong_direction():
    with pytest.raises(LinkError):
        decode_from_engine(encode_frame(Submit(request=REQUEST))[4:])
    with pytest.raises(LinkError):
        decode_from_frontend(encode_frame(HELLO)[4:])


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", b"\x91" * 100_000, encode_frame(HELLO)[4:-1], b"\xa1\xff"])
def test_garbage(payload):
    with pytest.raises(LinkError, match="holds no message"):
        decode_from_engine(payload)


def test_parameters_are_checked_again_on_arrival():
    bad = msgspec.to_builtins(Submit(request=REQUEST))
    bad["request"]["params"]["top_p"] = 7.0
    with pytest.raises(LinkError, match="top_p"):
        decode_from_frontend(msgspec.msgpack.encode(bad))


@pytest.mark.parametrize("length", [0, link.MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_impossible_lengths(length):
    with pytest.raises(LinkError, match=str(length)):
        frame_length(HEADER.pack(length))


def test_coalescing_keeps_the_order():
    one, two = Outputs(items=[OUTPUT]), Outputs(items=[OUTPUT, OUTPUT])
    merged = coalesce([one, two, Progress(phase="p"), one, one])
    assert [len(m.items) if isinstance(m, Outputs) else "p" for m in merged] == [3, "p", 2]
    assert len(coalesce([one] * 5000)) == -(-5000 // link.MAX_OUTPUTS_PER_FRAME)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    end = EngineLink(ours, inbox.put)
    yield end, theirs, inbox
    end.close()
    theirs.close()


def receive(sock):
    def exactly(size):
        data = b""
        while len(data) < size:
            chunk = sock.recv(size - len(data))
            assert chunk
            data += chunk
        return data

    return decode_from_engine(exactly(frame_length(exactly(4))))


def test_both_ways_and_pieces(pair):
    end, theirs, inbox = pair
    for byte in encode_frame(Submit(request=REQUEST)) + encode_frame(Abort(request_id="r")):
        theirs.sendall(bytes([byte]))
    assert inbox.get(timeout=5) == Submit(request=REQUEST)
    assert inbox.get(timeout=5) == Abort(request_id="r")
    end.send(HELLO)
    assert receive(theirs) == HELLO


def test_sending_never_waits_for_the_peer(pair):
    end, theirs, _ = pair
    big = Outputs(items=[msgspec.structs.replace(OUTPUT, token_ids=list(range(100_000)))])
    for _ in range(50):  # far more than the socket holds, and nobody reads
        end.send(big)
    count = 0
    while count < 50:
        count += len(receive(theirs).items)
    assert count == 50


def test_peer_gone(pair):
    end, theirs, inbox = pair
    theirs.close()
    assert isinstance(inbox.get(timeout=5), Closed)
    end.send(HELLO)  # dropped
    end.close()
    assert inbox.empty()


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", b"\x09\x00\x00\x00ab"])
def test_peer_sends_garbage(pair, data):
    _, theirs, inbox = pair
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    closed = inbox.get(timeout=5)
    assert isinstance(closed, Closed) and closed.reason


def test_close_flushes_and_says_nothing(pair):
    end, theirs, inbox = pair
    for _ in range(100):
        end.send(Progress(phase="p"))
    end.close()
    assert all(receive(theirs) == Progress(phase="p") for _ in range(100))
    assert theirs.recv(1) == b"" and inbox.empty()


def test_results_too_large_for_a_frame(pair, monkeypatch):
    end, theirs, _ = pair
    monkeypatch.setattr(link, "MAX_FRAME_BYTES", 300)
    small = Output(request_id="s", token_ids=[1])
    end.send(Outputs(items=[small] * 20 + [Output(request_id="big", index=3, token_ids=list(range(500)))]))
    items = []
    while len(items) < 21:
        items += receive(theirs).items
    assert items[:20] == [small] * 20
    assert (items[20].index, items[20].finish_reason) == (3, FinishReason.ERROR) and "too large" in items[20].error


def test_no_frontend_there(tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot reach the frontend at .*nothing\.sock"):
        EngineLink.connect(tmp_path / "nothing.sock", print)
