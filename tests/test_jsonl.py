"""A file of JSON lines that only grows."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infer.jsonl import JsonLines


def rows(path: Path) -> list[object]:
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def test_a_line_is_in_the_file_once_its_future_is_done(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with JsonLines(path) as file:
        written = [file.append(json.dumps({"n": i}).encode()) for i in range(100)]
        written[41].result(timeout=10)
        assert {"n": 41} in rows(path)
        file.flush()
        assert rows(path) == [{"n": i} for i in range(100)]
        assert list(file.lines()) == [], "what was there when it was opened"
    with JsonLines(path) as again:
        lines = list(again.lines())
        assert [json.loads(line.data)["n"] for line in lines] == list(range(100))
        assert [line.number for line in lines] == list(range(1, 101))
        assert again.read(lines[7].offset, len(lines[7].data)) == b'{"n": 7}'


@pytest.mark.parametrize(
    ("tail", "left"),
    [
        (b"", [{"n": 1}]),
        (b'{"n": 2', [{"n": 1}]),
        (b'{"n": 2}', [{"n": 1}, {"n": 2}]),  # all but its end was written
        (b"2", [{"n": 1}]),
        (b"\0\0\0", [{"n": 1}]),
        (b'{"text": "' + b"x" * 300_000, [{"n": 1}]),
    ],
)
def test_a_torn_last_line_is_repaired_before_anything_is_added(tmp_path: Path, tail: bytes, left: list[object]) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'{"n": 1}\n' + tail)
    with JsonLines(path) as file:
        assert [json.loads(line.data) for line in file.lines()] == left
        file.append(b'{"n": 3}')
    assert rows(path) == [*left, {"n": 3}]


def test_a_file_of_one_torn_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'{"n": ')
    with JsonLines(path) as file:
        assert list(file.lines()) == []
    assert path.read_bytes() == b""


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    code = (
        "import os, signal, sys; from pathlib import Path; from infer.jsonl import JsonLines\n"
        "file = JsonLines(Path(sys.argv[1])); file.append(b'{}'); file.flush(); print('open', flush=True)\n"
        "sys.stdin.read(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="another process is writing to it"):
            JsonLines(path)
        other.communicate(timeout=30)
    finally:
        other.kill()
        other.wait()
    with JsonLines(path) as file:
        assert len(list(file.lines())) == 1


def test_after_a_failed_write_nothing_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line may stand there, and another must not be joined to it."""
    path = tmp_path / "rows"
    whole_write, room = os.write, [30]

    def write(fd: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = whole_write(fd, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr("infer.jsonl.os.write", write)
    file = JsonLines(path)
    file.append(b'{"text": "short"}').result(timeout=10)
    with pytest.raises(OSError, match="No space left"):
        file.append(b'{"text": "longer than what is left"}').result(timeout=10)
    room[0] = 1000
    with pytest.raises(OSError, match="No space left"):
        file.append(b"{}")
    with pytest.raises(OSError, match="No space left"):
        file.flush()
    file.close()
    assert path.read_bytes().startswith(b'{"text": "short"}\n{"text": "lo')
    with JsonLines(path) as again:
        assert [line.data for line in again.lines()] == [b'{"text": "short"}']


@pytest.mark.parametrize("name", ["", "missing/rows"])
def test_what_cannot_be_opened_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be opened"):
        JsonLines(tmp_path / name)
    with pytest.raises(ValueError, match="not a regular file"):
        JsonLines(Path("/dev/null"))
