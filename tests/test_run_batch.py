"""Batch files: their formats and errors, and runs that are killed and go on."""

import asyncio
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serve.fake_engine import MAX_MODEL_LEN, MODEL, write_tokenizer
from worlds import MARK, ROOT, Result, kill_marked, marked_processes, one_at_a_time, python_path, rendezvous, run_world

from infer.batch_file import BatchInput, WrittenRows, encode_row, open_output
from infer.batch_rows import BatchRows, LocalEngine, Progress, rows_ahead
from infer.jsonl import JsonLines
from infer.request import FinishReason, Output, Request
from infer.run_batch import parse
from infer.serve.link import Abort, FrontendConfig, Hello, Submit
from infer.serve.replies import ChatCompletion, Completion, Error
from infer.serve.text import Tokenizer

MAX_LINE = 4096
FAILING = [5, 1]  # the prompt that the echoing engine cannot run
Row = dict[str, Any]


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> bytes:
    if url == "/v1/completions":
        body.setdefault("prompt", "hello")
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


def rows(path: Path) -> list[Row]:
    """The rows of an output file, every one of which must be whole."""
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(row) for row in data.splitlines()]


def answers(path: Path) -> dict[str, Any]:
    """What each request got, without what is new each time. Raises unless every custom_id is there once."""
    found: dict[str, Any] = {}
    for row in rows(path):
        assert row["custom_id"] not in found, f"{row['custom_id']} is there twice"
        body = row["response"]["body"]
        found[row["custom_id"]] = (row["id"], row["response"]["status_code"], body.get("choices"), body.get("error"))
    return found


# ------------------------------------------------------------------------------------------------------ the files


def scan(path: Path, output: Path, **kwargs: Any) -> tuple[BatchInput, tuple[int, int]]:
    source = BatchInput(str(path), MAX_LINE, **kwargs)
    with JsonLines(output) as file:
        return source, source.scan(WrittenRows(file))


def test_lines_are_read_with_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(
        line("a", max_tokens=3)
        + b"\r\n  \n{not json}\n[1]\n"
        + line("b", url="/v1/embeddings")
        + b'{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}\n'
        + b'{"custom_id": "c", "method": "GET", "url": "/v1/completions", "body": {}}\n'
        + b'{"custom_id": "d", "method": "POST", "url": "/v1/completions"}\n'
        + b'{"custom_id": "e", "method": "POST", "url": "/v1/completions", "body": {}, "priority": 3}\n'
        + b'{"custom_id": "\\ud800", "method": "POST", "url": "/v1/completions", "body": {}}\n'
        + line("f", prompt="x" * MAX_LINE)
        + b"[" * 100_000
        + b"\n{not json}\n"
        + line("g").rstrip(b"\n")
    )
    source, counts = scan(path, tmp_path / "out")
    requests = list(source.left())
    assert counts == (13, 0)
    told = [
        (r.number, r.custom_id, None if r.error is None else (r.error.status, r.error.param, r.error.message))
        for r in requests
    ]
    wrong = {number: (custom_id, error) for number, custom_id, error in told if error is not None}
    assert [number for number, _, _ in told] == [1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert sorted(wrong) == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert [wrong[n][0] for n in sorted(wrong)] == [None, None, "b", None, "c", "d", "e", None, None, None, None]
    assert [wrong[n][1][:2] for n in (4, 6, 7, 8, 9, 10, 12)] == [
        (400, None), (400, "url"), (400, "custom_id"), (400, "method"), (400, "body"), (400, "priority"), (413, None),
    ]  # fmt: skip
    assert "line 4 of the batch is not a JSON object" in wrong[4][1][2]
    assert f"over {MAX_LINE} bytes (--max-body-bytes)" in wrong[12][1][2]
    assert json.loads(requests[0].body) == {"max_tokens": 3, "prompt": "hello"}
    assert len({r.row_id for r in requests}) == len(requests), "equal bad lines have a row each"


def test_a_custom_id_that_is_there_twice_names_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(line("a") + b"\n" + line("b") + line("a", prompt="another"))
    with pytest.raises(ValueError, match="lines 1 and 4 have the same custom_id 'a'"):
        scan(path, tmp_path / "out")


def test_what_is_written_is_known_by_its_whole_request(tmp_path: Path) -> None:
    path, output = tmp_path / "in", tmp_path / "out"
    path.write_bytes(line("a") + b"nonsense\n" + line("b") + b"nonsense\n")
    source, _ = scan(path, output)
    with JsonLines(output) as file:
        for request in list(source.left())[:2]:
            file.append(encode_row(request, 200, "r", b'{"system_fingerprint": "fp_1"}'))
    source, counts = scan(path, output)
    assert counts == (4, 2)
    assert [(request.number, request.custom_id) for request in source.left()] == [(3, "b"), (4, None)]
    with JsonLines(output) as file:
        assert WrittenRows(file).fingerprints == {"fp_1"}
    path.write_bytes(line("a", seed=1))
    with pytest.raises(ValueError, match=r"line 1 \(custom_id 'a'\) has a row in .* made from another request"):
        scan(path, output)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id": "batch_req_1"}\n{"id": 1}\n', "line 1 is not a row of a batch's output"),
        (b'{"id": "1", "custom_id": "a", "response": null, "error": null}\nx\n{}\n', "line 2 is not a row"),
        (
            b'{"id": "1", "custom_id": "a", "response": null}\n{"id": "2", "custom_id": "a", "response": null}\n',
            "line 2 is another row of custom_id 'a'",
        ),
    ],
)
def test_an_output_file_of_something_else_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is there and not empty; --resume goes on with it"):
        open_output(path, resume=False)
    with open_output(path, resume=True) as file, pytest.raises(ValueError, match=words):
        WrittenRows(file)
    assert path.read_bytes() == content


def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(line("a") + line("b"))
    source, _ = scan(path, tmp_path / "out")
    left = source.left()
    assert next(left).custom_id == "a"
    with open(path, "ab") as file:
        file.write(line("c"))
    assert next(left).custom_id == "b"
    with pytest.raises(ValueError, match="has changed since the run began"):
        next(left)


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(line("a") + line("b")))
    writer.start()
    source, counts = scan(fifo, tmp_path / "out")
    writer.join()
    with JsonLines(tmp_path / "out") as file:
        assert counts == source.scan(WrittenRows(file)) == (2, 0)
    assert [request.custom_id for request in source.left()] == ["a", "b"]
    both_ends = os.open(fifo, os.O_RDWR)  # so that opening it waits for nobody
    with pytest.raises(ValueError, match="cannot be read a second time after a restart"):
        BatchInput(str(fifo), MAX_LINE, is_restart=True)
    os.close(both_ends)
    with pytest.raises(ValueError, match="No such file"):
        BatchInput(str(tmp_path / "missing"), MAX_LINE)


def test_the_flags_are_the_engines_and_those_of_bodies() -> None:
    args = parse(["-i", "in", "-o", "out", "--model", "m", "--max-logprobs", "5", "-tp", "2"])
    assert (args.input_file, args.output_file, args.resume) == ("in", Path("out"), False)
    assert (args.max_logprobs, args.tensor_parallel_size) == (5, 2)
    with pytest.raises(ValueError, match="-o must be a file"):
        parse(["-i", "in", "-o", "-", "--model", "m"])
    for flags in (["--port", "8001"], ["--api-key", "k"], []):
        with pytest.raises(ValueError, match=r"--port|--api-key|-o/--output-file"):
            parse(["-i", "in", "--model", "m", *flags] + (["-o", "out"] if flags else []))


# ------------------------------------------------------------------------------------- the rows, an engine that echoes


class Echo:
    """An engine's thread that answers each prompt with itself, a token a step, for a few requests at a time."""

    def __init__(self, deliver: Callable[[list[Output]], object]) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.most_waiting = 0
        self.requests: list[Request] = []
        self._deliver = deliver
        self._at_work: dict[tuple[str, int], tuple[Request, int]] = {}
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.inbox.put(None)
        self._thread.join(10)
        assert not self._at_work, "every choice has ended, or was ended"

    def _loop(self) -> None:
        while True:
            while not self._at_work or not self.inbox.empty():
                message = self.inbox.get()
                if message is None:
                    return
                self._take(message)
            self.most_waiting = max(self.most_waiting, len({request_id for request_id, _ in self._at_work}))
            self._deliver([self._step(*key) for key in list(self._at_work)[:8]])

    def _take(self, message: Submit | Abort) -> None:
        match message:
            case Submit(request=request):
                self.requests.append(request)
                self._at_work |= {(request.request_id, k): (request, 0) for k in range(request.params.n)}
            case Abort(request_id=request_id, index=index):
                for key in [key for key in self._at_work if key[0] == request_id and index in (None, key[1])]:
                    del self._at_work[key]

    def _step(self, request_id: str, index: int) -> Output:
        """The first of those at work stay the first until they are done."""
        request, count = self._at_work[request_id, index]
        prompt = request.prompt_token_ids
        is_last = count + 1 == request.params.max_tokens or prompt == FAILING
        if is_last:
            del self._at_work[request_id, index]
        else:
            self._at_work[request_id, index] = (request, count + 1)
        if prompt == FAILING:
            return Output(request_id=request_id, index=index, finish_reason=FinishReason.ERROR, error="NaN")
        return Output(
            request_id=request_id, index=index, token_ids=[prompt[(index + count) % len(prompt)]],
            finish_reason=FinishReason.LENGTH if is_last else None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def answer(
    content: bytes, tmp_path: Path, tokenizer_dir: Path, max_rows: int = 64, max_waiting: int = 64
) -> tuple[list[Row], Echo]:
    """The rows of a batch in this process, without a model."""
    path, output = tmp_path / "in", tmp_path / "out"
    path.write_bytes(content)
    settings = FrontendConfig(
        model_path=str(tokenizer_dir), tokenizer_path=str(tokenizer_dir), served_model_name=(MODEL,),
        system_fingerprint="fp_test",
    )  # fmt: skip
    tokenizer = Tokenizer.load(tokenizer_dir)
    hello = Hello(
        generation=0, model_name=MODEL, max_model_len=MAX_MODEL_LEN, vocab_size=tokenizer.vocab_size, eos_token_ids=[2]
    )

    async def run(file: JsonLines) -> Echo:
        loop = asyncio.get_running_loop()
        echo = Echo(lambda outputs: loop.call_soon_threadsafe(engine.deliver, outputs))
        engine = LocalEngine(echo.inbox.put, max_waiting)
        source = BatchInput(str(path), MAX_LINE)
        source.scan(WrittenRows(file))
        progress = Progress(10, 0, engine)
        try:
            await asyncio.wait_for(
                BatchRows(source, file, engine, settings, tokenizer, hello, progress, max_rows).run(), 60
            )
        finally:
            progress.close()
            echo.close()
        return echo

    with open_output(output, resume=False) as file:
        echo = asyncio.run(run(file))
    return rows(output), echo


def test_rows_hold_what_the_server_answers(tmp_path: Path, tokenizer_dir: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    content = [
        line("text", max_tokens=4, n=2),
        line("ids", prompt=[[10, 11], [12]], max_tokens=2, return_token_ids=True),
        line("chat", url="/v1/chat/completions", messages=messages, max_tokens=5, request_id="mine"),
        line("stop", prompt="abcabc", stop="c", max_tokens=200),
        line("bad", n=0),
        line("stream", stream=True),
        line("model", model="gpt-4"),
        line("unknown", no_such_field=1),
        line("fails", prompt=FAILING),
        b"{\n",
    ]
    found, echo = answer(b"".join(content), tmp_path, tokenizer_dir)
    by_id = {row["custom_id"]: row["response"] for row in found}
    assert all(set(row) == {"id", "custom_id", "response", "error"} and row["error"] is None for row in found)
    assert all(set(response) == {"status_code", "request_id", "body"} for response in by_id.values())
    text = msgspec.convert(by_id["text"]["body"], Completion)
    assert (len(text.choices), text.usage.completion_tokens, text.system_fingerprint) == (2, 8, "fp_test")
    assert [choice.token_ids for choice in msgspec.convert(by_id["ids"]["body"], Completion).choices] == [
        [10, 11], [12, 12],
    ]  # fmt: skip
    chat = msgspec.convert(by_id["chat"]["body"], ChatCompletion)
    assert (chat.id, chat.choices[0].message.role, chat.choices[0].finish_reason) == (
        "chatcmpl-mine", "assistant", "length",
    )  # fmt: skip
    assert by_id["stop"]["body"]["choices"][0]["text"] == "ab"
    assert by_id["stop"]["body"]["choices"][0]["stop_reason"] == "c"
    failed = {name: (by_id[name]["status_code"], msgspec.convert(by_id[name]["body"], Error).error) for name in (
        "bad", "stream", "model", "unknown", "fails", None,
    )}  # fmt: skip
    assert {name: (status, error.param, error.code) for name, (status, error) in failed.items()} == {
        "bad": (400, "n", None), "stream": (400, "stream", None), "model": (404, "model", "model_not_found"),
        "unknown": (400, "no_such_field", None), "fails": (500, None, "engine_error"), None: (400, None, None),
    }  # fmt: skip
    assert failed["fails"][1].message == "NaN"
    assert len(echo.requests) == 6, "of those that were refused, the engine sees nothing"


def test_no_more_is_handed_ahead_than_was_said(tmp_path: Path, tokenizer_dir: Path) -> None:
    content = b"".join(line(str(i), max_tokens=3) for i in range(200))
    found, echo = answer(content, tmp_path, tokenizer_dir, max_rows=20)
    assert sorted(int(row["custom_id"]) for row in found) == list(range(200))
    assert 8 <= echo.most_waiting <= 20
    lists = b"".join(line(f"list {i}", prompt=["hello"] * 10, max_tokens=3) for i in range(30))
    directory = tmp_path / "lists"
    directory.mkdir()
    found, echo = answer(lists, directory, tokenizer_dir, max_waiting=25)
    assert len(found) == 30
    assert echo.most_waiting <= 25 + 10 + 8, "prompts that wait, a last row of ten, and those at work"
    assert [rows_ahead(count) for count in (1, 256, 100_000)] == [64, 1024, 4096]


def test_a_row_that_cannot_be_written_ends_the_run(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infer.jsonl.os.fsync", fail)
    content = b"".join(line(str(i), max_tokens=3) for i in range(20))
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="No space left on device"):
        answer(content, tmp_path, tokenizer_dir)


# ------------------------------------------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An input of many requests, greedy and seeded, some of them bad."""
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    content = [
        line(f"r{i}", prompt=f"the quick fox {i}", max_tokens=30 + i % 20, temperature=i % 2, seed=i, n=1 + i % 2)
        for i in range(120)
    ]
    content[17:17] = [line("bad", max_tokens=-1), line("stream", stream=True), b"nonsense\n"]
    path.write_bytes(b"".join(content))
    return path


NUM_ROWS = 123


def flags(batch: Path, output: Path, model: Path, *more: object) -> list[str]:
    # Few sequences at a time: rows come one after the other.
    sizes = ("--max-num-seqs", 4, "--kv-cache-memory-bytes", "16M", "--num-threads", 1)
    return [str(part) for part in ("-i", batch, "-o", output, "--model", model, *sizes, *more)]


@pytest.fixture(scope="module")
def undisturbed(batch: Path, checkpoint_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing cut off."""
    output = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    result = run(batch, output, checkpoint_dirs["llama"])
    assert result.returncode == 0, result.report()
    assert f"all {NUM_ROWS} requests have their rows" in result.stderr
    assert "output tokens/s" in result.stderr, "the progress bar"
    return output


def run(batch: Path, output: Path, model: Path, *more: object) -> Result:
    return run_world(
        "infer.run_batch", *flags(batch, output, model, *more), ranks=1, timeout=120, torchrun=False
    )


class Running:
    """A run that is under way."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.mark, self._log = uuid.uuid4().hex, log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, "PYTHONPATH": python_path(ROOT), MARK: self.mark}, cwd=ROOT,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_rows(self, output: Path, count: int) -> None:
        deadline = time.monotonic() + 90
        while not output.exists() or output.read_bytes().count(b"\n") < count:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"no {count} rows came:\n{self.log}"
            time.sleep(0.005)

    def rank_pid(self, rank: int) -> int:
        for pid in marked_processes(self.mark):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environ:
                return pid
        raise AssertionError(f"rank {rank} is not running\n{self.log}")


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts runs, one at a time on this machine, and ends what is left of them."""
    with tempfile.TemporaryDirectory(prefix="infer-batch-") as logs, one_at_a_time():
        started: list[Running] = []

        def begin(*args: str, torchrun: tuple[str, ...] = ()) -> Running:
            started.append(Running([*torchrun, "-m", "infer.run_batch", *args], Path(logs, f"log{len(started)}")))
            return started[-1]

        try:
            yield begin
        except BaseException:
            for running in started:
                print(running.log)
            raise
        finally:
            for running in started:
                kill_marked(running.mark)
                running.process.wait()


def test_killed_in_the_middle_and_resumed(batch, undisturbed: Path, checkpoint_dirs, tmp_path: Path, start) -> None:
    output, model = tmp_path / "out.jsonl", checkpoint_dirs["llama"]
    running = start(*flags(batch, output, model))
    running.wait_for_rows(output, 5)
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    before = output.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 5 <= whole.count(b"\n") < NUM_ROWS
    output.write_bytes(whole + b'{"id":"batch_req_')  # as a machine that lost its power may leave it
    resumed = start(*flags(batch, output, model, "--resume"))
    assert resumed.process.wait(90) == 0, resumed.log
    assert "ended in the middle of a line" in resumed.log
    assert output.read_bytes().startswith(whole), "no finished row is lost or written again"
    assert answers(output) == answers(undisturbed)
    again = start(*flags(batch, output, model, "--resume"))
    assert again.process.wait(90) == 0, again.log
    assert "Model loading" not in again.log, "there is nothing left to do"
    assert len(rows(output)) == NUM_ROWS


def test_a_resumed_run_must_be_of_the_same_model(batch, undisturbed: Path, checkpoint_dirs, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(b"".join(undisturbed.read_bytes().splitlines(keepends=True)[:60]))
    before = output.read_bytes()
    result = run(batch, output, checkpoint_dirs["qwen2"], "--resume")
    assert result.returncode == 2
    assert "holds rows of another model or other settings (system_fingerprint fp_" in result.stderr
    assert output.read_bytes() == before


def test_what_is_wrong_is_told_before_anything_is_loaded(batch, undisturbed: Path, checkpoint_dirs, tmp_path) -> None:
    model = checkpoint_dirs["llama"]
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(line("a") + line("a"))
    for source, output, words in [
        (batch, undisturbed, "is there and not empty; --resume goes on with it"),
        (twice, tmp_path / "out", "lines 1 and 2 have the same custom_id 'a'"),
        (tmp_path / "missing", tmp_path / "out", "missing: cannot be read: No such file or directory"),
        (batch, tmp_path / "no" / "out", "out: cannot be opened: No such file or directory"),
    ]:
        result = run(source, output, model)
        assert result.returncode == 2, result.report()
        assert words in result.stderr
        assert result.stderr.count("infer: error:") == 1
        assert result.stderr.count("\n") == 1, "one line, and no model loaded"


def test_a_signal_ends_it_with_what_to_do_next(batch, checkpoint_dirs, tmp_path: Path, start) -> None:
    output = tmp_path / "out.jsonl"
    running = start(*flags(batch, output, checkpoint_dirs["llama"]))
    running.wait_for_rows(output, 5)
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.process.wait(30) == 128 + signal.SIGTERM
    assert "the batch was cut off: SIGTERM came" in running.log
    assert "run again with --resume" in running.log
    assert 5 <= len(rows(output)) < NUM_ROWS


def test_an_engine_that_breaks_ends_it_with_status_1(batch, undisturbed, checkpoint_dirs, tmp_path: Path) -> None:
    """What had its row keeps it, and nothing else gets one: the rest is for --resume."""
    output = tmp_path / "out.jsonl"
    code = (
        "from infer.engine import loop; from infer import run_batch; whole, steps = loop.Engine._step, []\n"
        "def step(self):\n"
        "    steps.append(1)\n"
        "    if len(steps) > 150: raise RuntimeError('CUDA error: out of luck')\n"
        "    return whole(self)\n"
        "loop.Engine._step = step; run_batch.main()\n"
    )
    arguments = flags(batch, output, checkpoint_dirs["llama"])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: CUDA error: out of luck" in done.stderr
    assert "the batch was cut off: CUDA error: out of luck." in done.stderr
    found, wanted = answers(output), answers(undisturbed)
    assert 3 < len(found) < NUM_ROWS
    assert found == {name: wanted[name] for name in found}


@pytest.mark.slow
def test_torchruns_restart_goes_on(batch, undisturbed: Path, checkpoint_dirs, tmp_path: Path, start) -> None:
    """Each rank in turn is killed; the next generation keeps the rows without being told to."""
    output = tmp_path / "out.jsonl"
    torchrun = (
        "-m", "torch.distributed.run", *rendezvous(False), "--nproc-per-node", "2", "--max-restarts", "3",
        "--monitor-interval", "0.1",
    )  # fmt: skip
    running = start(*flags(batch, output, checkpoint_dirs["llama"], "-pp", 2), torchrun=torchrun)
    for rank, count in ((1, 10), (0, 40)):
        running.wait_for_rows(output, count)
        os.kill(running.rank_pid(rank), signal.SIGKILL)
    assert running.process.wait(90) == 0, running.log
    assert running.log.count("the batch was cut off: ") == 1, "rank 0 said so when rank 1 was lost"
    assert running.log.count("requests have their rows already") == 2
    assert answers(output) == answers(undisturbed)


@pytest.mark.slow
def test_killed_at_ten_random_moments(batch, undisturbed: Path, checkpoint_dirs, tmp_path: Path, start) -> None:
    """Also during the start and between two rows: the output holds each request once in the end."""
    output, rng = tmp_path / "out.jsonl", random.Random(5)
    for attempt in range(10):
        running = start(*flags(batch, output, checkpoint_dirs["llama"], *(["--resume"] if output.exists() else [])))
        if attempt % 3:
            running.wait_for_rows(output, min(NUM_ROWS - 3, 12 * attempt))
        time.sleep(rng.uniform(0.0, 0.05) if attempt % 3 else rng.uniform(0.0, 2.0))
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
    last = start(*flags(batch, output, checkpoint_dirs["llama"], "--resume"))
    assert last.process.wait(90) == 0, last.log
    assert answers(output) == answers(undisturbed)
