"""The benchmarks: their arithmetic, the load over HTTP against good and bad servers, and each command for real."""

import asyncio
import contextlib
import json
import math
import re
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from aiohttp import web
from serve.fake_engine import FakeEngine, frontend, write_tokenizer
from worlds import ROOT, free_port, run_world

from infer.bench import client, report, serve, startup, suite
from infer.bench.__main__ import parse
from infer.bench.limits import Hardware, Model
from infer.config import EngineConfig, Parser, ServerConfig, add_flags, from_args
from infer.models.config import load_model_config
from infer.serve.text import Tokenizer
from infer.serve.timeline import Timeline, read_line

HARDWARE = Hardware("cpu", "cpu, 2 threads", "bfloat16", bandwidth=33e9, rate=400e9)

# ------------------------------------------------------------------------------------------------------ arithmetic


def test_limit_of_a_step_is_its_longer_half():
    model = Model(layers=1000, head=100, item_bytes=2, kv_bytes=10, windows=Counter({0: 2, 3: 1}))
    slow_memory = Hardware("", "", "bfloat16", bandwidth=1.0, rate=1e12)
    slow_products = Hardware("", "", "bfloat16", bandwidth=1e12, rate=1.0)
    # Decode steps see 6 and 7 tokens of each of 4 requests; the layer with a window sees 3.
    limit = model.run(slow_memory, count=4, input_len=5, output_len=3)
    assert limit.prefill == 2 * 1100
    assert limit.decode == sum(2 * 1100 + 4 * 10 * (2 * length + 3) for length in (6, 7))
    limit = model.run(slow_products, count=4, input_len=5, output_len=3)
    assert limit.prefill == 2 * (1000 * 20 + 100 * 4)
    assert limit.decode == 2 * (2 * 1100 * 4)


def test_limit_of_the_default_model(default_model_dir):
    model = Model.of(load_model_config(default_model_dir, EngineConfig(model=str(default_model_dir))))
    assert model.layers + model.head == pytest.approx(134.5e6, rel=0.001)
    assert model.kv_bytes * 30 == 2 * 3 * 64 * 2 * 30
    limit = model.run(HARDWARE, count=1, input_len=128, output_len=128)
    assert 128 / limit.total == pytest.approx(115, rel=0.03)  # weights once a token, and the prompt's products


def test_one_output_token_needs_no_decode_step():
    model = Model(layers=1000, head=100, item_bytes=2, kv_bytes=10, windows=Counter({0: 1}))
    assert model.run(HARDWARE, 2, 8, 1).decode == 0


def test_the_better_of_two_measurements_counts():
    other = Hardware("cpu", "cpu, 2 threads", "bfloat16", bandwidth=20e9, rate=500e9)
    best = HARDWARE.best(other)
    assert (best.bandwidth, best.rate) == (33e9, 500e9)
    assert HARDWARE.best(None) == HARDWARE


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 99.9, 100])
def test_percentile_is_numpys(percent):
    values = np.random.default_rng(0).random(37).tolist()
    assert report.percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert report.percentile([4.0], percent) == 4.0


def test_a_child_is_quoted(capsys):
    error = report.child_error("it failed", "INFO x\ninfer: error: no such model\nmore\n")
    assert str(error) == "it failed: no such model" and capsys.readouterr().err == ""
    error = report.child_error("it failed", "Traceback\nKeyError: 1\n")
    assert "stands above" in str(error) and capsys.readouterr().err == "Traceback\nKeyError: 1\n"


def test_timeline_is_read_back():
    timeline = Timeline("starting Python")
    timeline.begin("reading the model's config")
    timeline.begin("loading weights")
    phases = read_line(f"INFO x\nINFO 10:00:00 [infer.serve] {timeline.line()}\nmore\n")
    assert [name for name, _ in phases] == ["starting Python", "reading the model's config", "loading weights"]
    assert 0 < phases[0][1] < 3600 and phases[2][1] < 1
    assert read_line("no such line") == []


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(model="m"),
        EngineConfig(
            model="-odd name", tensor_parallel_size=2, pipeline_parallel_size=3, pipeline_layer_partition=(3, 4, 5),
            hf_overrides={"a b": [1, "x"]}, enable_prefix_caching=False, disable_log_stats=True,
            gpu_memory_utilization=0.5,
        ),
        ServerConfig(port=9, served_model_name=("x", "y")),
    ],
)  # fmt: skip
def test_flags_parse_to_the_config_they_came_from(config):
    parser = Parser()
    add_flags(parser, type(config))
    assert from_args(parser.parse_args(startup.to_flags(config)), type(config)) == config


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve", "--dataset-name", "sharegpt"], "'sharegpt' is not supported; random is the only"),
        (["serve", "--percentile-metrics", "ttft,goodput"], "'goodput' is none of ttft,tpot,itl,e2el"),
        (["serve", "--metric-percentiles", "101"], "'101' is not a percentage"),
        (["serve", "--request-rate", "0"], "'0' is not a rate over 0, or inf"),
        (["serve", "--request-rate", "nan"], "'nan' is not a rate"),
        (["serve", "--num-prompts", "0"], "'0' is not a positive number"),
        (["serve", "--goodput", "x"], "unrecognized arguments: --goodput x"),
        (["serve", "--output-json", "/no/such/directory/f"], "cannot be written: No such file or directory"),
        (["throughput", "--model", "m", "--concurrency", "8", "-1"], "'-1'"),
        (["throughput"], "--model"),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_bad_command_lines_are_named(argv, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(argv)


def test_compare_script_finds_its_flags():
    argv = ["throughput", "--model", "m", "--dtype", "bfloat16", "--input-len", "128", "--output-len", "128"]
    args = parse([*argv, "--concurrency", "1", "8", "32", "-tp", "2", "-pp", "1"])
    assert (args.concurrency, args.tensor_parallel_size, args.output_json) == ([1, 8, 32], 2, None)


def test_measuring_http_imports_no_torch():
    code = "import sys, infer.bench.__main__, infer.bench.limits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# ----------------------------------------------------------------------------------------------------- the stream


def test_events_come_whole_however_they_are_cut():
    text = b': hello\r\n\r\ndata: {"a": 1}\r\n\r\ndata:x\ndata: y\n\nevent: e\nid: 4\n\ndata: [DONE]\n\n'
    for size in range(1, len(text) + 1):
        parser = client.EventParser()
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        events = [event for piece in pieces for event in parser.feed(piece)]
        assert events == [b'{"a": 1}', b"x\ny", b"[DONE]"]


@pytest.mark.parametrize("line", [b"x" * 70_000, b"data: " + b"x" * 70_000 + b"\n"])
def test_an_endless_event_is_refused(line):
    parser = client.EventParser()
    with pytest.raises(client.StreamError, match="more than 1,048,576 bytes"):
        for _ in range(20):
            parser.feed(line)


class Endpoint:
    """An OpenAI endpoint that answers each request with the next of `replies` (the last one for ever)."""

    def __init__(self, *replies):
        self.replies, self.bodies, self.most_open, self.headers = list(replies), [], 0, []
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self.port = free_port()

    async def _answer(self, request):
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        try:
            return await reply(request)
        finally:
            self._open -= 1

    async def _models(self, request):
        return web.json_response({"data": [{"id": "some-model"}]})

    @contextlib.contextmanager
    def running(self):
        async def start():
            app = web.Application()
            app.router.add_get("/v1/models", self._models)
            app.router.add_post("/v1/completions", self._answer)
            app.router.add_post("/v1/chat/completions", self._answer)
            self._runner = web.AppRunner(app)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

        self._loop.run_until_complete(start())
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()


def streaming(*events, delay=0.0, usage=None, done=True):
    """A reply that streams these choices' texts (or whole chunks)."""

    async def reply(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            chunk = event if isinstance(event, dict) else {"choices": [{"text": event, "finish_reason": None}]}
            await asyncio.sleep(delay)
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        if usage is not None:
            await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        if done:
            await response.write(b"data: [DONE]\n\n")
        return response

    return reply


def failing(status, body):
    async def reply(request):
        return web.Response(status=status, text=body, content_type="application/json")

    return reply


def measure(endpoint, *flags, prompts=4):
    argv = ["serve", "--port", str(endpoint.port), "--num-prompts", str(prompts), "--disable-tqdm"]
    argv += ["--random-input-len", "8", "--random-output-len", "3", *flags]
    args = parse(argv)
    return asyncio.run(serve.Load(args).run()), args


def test_latencies_of_a_steady_server():
    steady = streaming("a", "b", "c", delay=0.03, usage={"prompt_tokens": 8, "completion_tokens": 5})
    with Endpoint(steady).running() as endpoint:
        found, args = measure(endpoint, "--ignore-eos", "--seed", "7")
    assert (found["completed"], found["failed"], found["model_id"]) == (4, 0, "some-model")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (32, 20)
    assert 30 <= found["median_ttft_ms"] < 90 and 25 <= found["median_itl_ms"] < 90
    assert found["mean_e2el_ms"] >= 90
    assert found["mean_tpot_ms"] == pytest.approx((found["mean_e2el_ms"] - found["mean_ttft_ms"]) / 4)
    assert found["p99_e2el_ms"] >= found["p50_e2el_ms"] == found["median_e2el_ms"]
    assert found["output_throughput"] == pytest.approx(20 / found["duration"])
    assert "inter-token latency" in serve.summary(found, args)
    warmup, *bodies = endpoint.bodies
    prompts = [body["prompt"] for body in bodies]
    assert all(len(prompt) == 8 and all(100 <= token < 1000 for token in prompt) for prompt in prompts)
    assert len({tuple(prompt) for prompt in [warmup["prompt"], *prompts]}) == 5
    assert bodies[0] | {"prompt": 0} == {
        "model": "some-model", "prompt": 0, "max_tokens": 3, "temperature": 0.0, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip


def test_failures_are_counted_by_their_reason():
    with Endpoint(
        streaming("warm"),
        streaming("good", "reply"),
        failing(429, '{"error": {"message": "too many requests"}}'),
        failing(429, '{"error": {"message": "too many requests"}}'),
        failing(500, "<html>oh\nno</html>"),
        failing(200, "{}"),
        streaming("half", done=False),
        streaming("then", {"error": {"message": "engine gone"}}),
        streaming(),
        streaming({"choices": [{"text": "x"}]}, {"choices": []}),
    ).running() as endpoint:
        found, args = measure(endpoint, "--max-concurrency", "1", prompts=9)
    assert found["completed"] == 2 and found["failed"] == 7
    assert found["total_output_tokens"] == 3  # no usage given: chunks are counted
    assert found["failures"] == {
        "HTTP 429: too many requests": 2,
        "HTTP 500: <html>oh no</html>": 1,
        "the reply is application/json, not a stream of events (text/event-stream)": 1,
        "the stream ended before data: [DONE]": 1,
        "error in the stream: engine gone": 1,
        "the stream held no token": 1,
    }
    assert "2 failed: HTTP 429: too many requests" in serve.summary(found, args)


def test_status_is_1_if_every_request_failed(tmp_path, capsys):
    with Endpoint(failing(503, '{"error": {"message": "not ready"}}')).running() as endpoint:
        argv = ["serve", "--port", str(endpoint.port), "--num-prompts", "2", "--num-warmups", "0", "--disable-tqdm"]
        path = tmp_path / "figures.json"
        assert serve.run(parse([*argv, "--output-json", str(path)])) == 1
        assert json.loads(path.read_text())["failures"] == {"HTTP 503: not ready": 2}
        assert json.loads(path.read_text())["median_ttft_ms"] is None
        assert "2 failed: HTTP 503: not ready" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"the first request to http.* failed: HTTP 503: not ready"):
            measure(endpoint)


def test_no_server_is_one_clear_error():
    with pytest.raises(ValueError, match=r"cannot reach http://127.0.0.1:\d+/v1/models: .*--base-url"):
        asyncio.run(serve.Load(parse(["serve", "--port", str(free_port())])).run())


def test_concurrency_is_bounded_and_reached():
    with Endpoint(streaming("a", delay=0.05)).running() as endpoint:
        measure(endpoint, "--max-concurrency", "3", prompts=9)
    assert endpoint.most_open == 3


def test_requests_come_at_their_rate():
    with Endpoint(streaming("a")).running() as endpoint:
        found, _ = measure(endpoint, "--request-rate", "40", "--burstiness", "100", prompts=13)
    assert 0.2 < found["duration"] < 0.9  # 12 gaps of about 25 ms


def test_lengths_vary_as_asked():
    with Endpoint(streaming("a")).running() as endpoint:
        measure(endpoint, "--random-range-ratio", "0.5", prompts=40)
    lengths = {len(body["prompt"]) for body in endpoint.bodies}
    assert min(lengths) >= 4 and max(lengths) <= 12 and len(lengths) > 3
    assert {body["max_tokens"] for body in endpoint.bodies} <= {1, 2, 3, 4, 5}


def test_api_key_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint(streaming("a")).running() as endpoint:
        measure(endpoint)
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer secret"}


def test_chat_counts_tokens_not_the_role(tmp_path):
    tokenizer_path = write_tokenizer(tmp_path / "tokenizer")
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    words = [{"choices": [{"delta": {"content": "x"}, "finish_reason": None}]}] * 2
    end = {"choices": [{"delta": {}, "finish_reason": "length"}]}
    with Endpoint(streaming(role, *words, end)).running() as endpoint:
        flags = ["--backend", "openai-chat", "--tokenizer", str(tokenizer_path), "--model", "m"]
        found, _ = measure(endpoint, *flags)
        with pytest.raises(ValueError, match="openai-chat needs --tokenizer"):
            measure(endpoint, "--backend", "openai-chat")
    assert found["total_output_tokens"] == 4 * 3
    tokenizer = Tokenizer.load(tokenizer_path)
    for body in endpoint.bodies:
        assert body["model"] == "m" and body["max_completion_tokens"] == 3
        assert abs(len(tokenizer.encode(body["messages"][0]["content"])) - 8) <= 2


def test_saved_results(tmp_path, capsys):
    with Endpoint(streaming("a", "b")).running() as endpoint:
        argv = ["serve", "--port", str(endpoint.port), "--num-prompts", "2", "--disable-tqdm", "--max-concurrency", "2"]
        assert serve.run(parse([*argv, "--save-result", "--result-dir", str(tmp_path)])) == 0
    (saved,) = tmp_path.iterdir()
    assert saved.name.startswith("openai-infqps-concurrency2-some-model-")
    assert json.loads(saved.read_text())["request_rate"] == "inf"
    with pytest.raises(ValueError, match="--result-filename need --save-result"):
        serve.run(parse(["serve", "--result-filename", "x"]))
    with pytest.raises(ValueError, match="is not a directory"):
        serve.run(parse(["serve", "--save-result", "--result-filename", "x", "--result-dir", str(tmp_path / "no")]))


def test_load_on_our_own_frontend(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer")
    with frontend(path) as handle:
        engine = FakeEngine(handle, Tokenizer.load(path))
        engine.hello()
        try:
            args = parse(
                f"serve --port {handle.port} --num-prompts 20 --max-concurrency 8 --random-input-len 16 "
                "--random-output-len 6 --random-vocab-size 300 --ignore-eos --disable-tqdm".split()
            )
            found = asyncio.run(serve.Load(args).run())
        finally:
            engine.close()
    assert (found["completed"], found["failures"]) == (20, {})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (320, 120)


# --------------------------------------------------------------------------------------------------- for real


def test_throughput_on_one_rank(checkpoint_dirs, tmp_path):
    path = tmp_path / "figures.json"
    done = run_world(
        "infer.bench", "throughput", "--model", checkpoint_dirs["llama"], "--input-len", 8, "--output-len", 4,
        "--concurrency", 1, 3, "--repeats", 1, "--num-threads", 1, "--output-json", path, ranks=1, torchrun=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.report()
    found = json.loads(path.read_text())
    assert [run["concurrency"] for run in found["runs"]] == [1, 3]
    for run in found["runs"]:
        assert run["output_tokens_per_second"] > 0 and run["limit_output_tokens_per_second"] > 0
        assert 0 < run["seconds_to_first_tokens"] <= run["seconds"]
    assert "1 thread:" in done.stdout and "GB/s memory reads" in done.stdout and "float32" in done.stdout


def test_requests_that_do_not_fit_the_model(checkpoint_dirs):
    done = run_world(
        "infer.bench", "latency", "--model", checkpoint_dirs["llama"], "--input-len", 500, "--output-len", 13,
        ranks=1, torchrun=False, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0 and "--input-len + --output-len is 513; the model takes 512" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_is_refused_under_torchrun():
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run_world("infer.bench", "serve", ranks=1, torchrun=False, timeout=30, env=environ)
    assert done.returncode != 0 and "without torchrun" in done.stderr


@pytest.mark.slow
def test_latency_over_two_stages(checkpoint_dirs, tmp_path):
    path = tmp_path / "figures.json"
    done = run_world(
        "infer.bench", "latency", "--model", checkpoint_dirs["llama"], "--input-len", 8, "--output-len", 4, "-pp", 2,
        "--batch-size", 4, "--num-iters", 2, "--output-json", path, ranks=2, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.report()
    found = json.loads(path.read_text())
    assert found["pipeline_parallel_size"] == 2
    assert 0 < found["first_token"]["median"] < found["total"]["median"]
    assert found["total"]["limit"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-pp", "2"]], ids=["one rank", "two stages"])
def test_startup(checkpoint_dirs, tmp_path, flags, capsys):
    path = tmp_path / "figures.json"
    argv = ["startup", "--model", str(checkpoint_dirs["llama"]), "--repeats", "1", *flags]
    assert startup.run(parse([*argv, "--output-json", str(path)])) == 0
    found = json.loads(path.read_text())
    assert {"importing", "loading weights", "connecting ranks", "first token"} <= set(found["phases"])
    assert 0 < found["frontend_bound"] <= found["ready"] < found["total"]
    assert math.isclose(sum(found["phases"].values()), found["total"], abs_tol=0.2)
    assert "Start to first token" in capsys.readouterr().out


def test_a_server_that_cannot_start_is_told(tmp_path):
    argv = ["startup", "--model", str(tmp_path), "--repeats", "1", "--timeout", "60"]
    with pytest.raises(ValueError, match=r"ended with status \d+ before it was ready: .*config\.json"):
        startup.run(parse(argv))


@pytest.mark.slow
def test_the_whole_suite(checkpoint_dirs, tmp_path, capsys):
    argv = ["suite", "--model", str(checkpoint_dirs["llama"]), "--input-len", "8", "--output-len", "4"]
    argv += ["--concurrency", "1", "2", "--starts", "1", "--output-dir", str(tmp_path)]
    assert suite.run(parse([*argv, "--output-json", str(tmp_path / "all.json")])) == 0
    (page,) = tmp_path.glob("*.md")
    out = capsys.readouterr().out
    for words in ("over HTTP, 2 requests", "TP=2, 1 request", "PP=2, 2 requests", "start to first token"):
        assert words in page.read_text() and words in out
    found = json.loads((tmp_path / "all.json").read_text())
    assert [len(found[part]) for part in ("http", "layouts")] == [2, 2]
