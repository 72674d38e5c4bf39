"""Metrics: names and types as vLLM has them, what is observed when, counters over restarts, list and dashboard."""

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fake_engine import FakeEngine, wait_until
from prometheus_client.parser import text_string_to_metric_families
from worlds import ROOT

from infer.request import FinishReason, Output, Request, SamplingParams
from infer.serve.app import errors_as_json
from infer.serve.errors import ApiError, bad_request
from infer.serve.link import EngineStats, Hello
from infer.serve.loop_lag import LoopLag
from infer.serve.metrics import Metrics, http_metrics
from infer.serve.text import Tokenizer

DASHBOARD = ROOT / "configs" / "grafana-dashboard.json"
DOCUMENT = ROOT / "docs" / "server.md"
HELLO = Hello(
    generation=0, model_name="tiny", max_model_len=64, vocab_size=9, eos_token_ids=[2], num_kv_blocks=40, block_size=16
)
# name -> type and labels besides model_name and engine.
VLLM = {
    "num_requests_running": ("gauge", ()),
    "num_requests_waiting": ("gauge", ()),
    "kv_cache_usage_perc": ("gauge", ()),
    "cache_config_info": (
        "gauge", ("num_gpu_blocks", "block_size", "kv_cache_size_tokens", "kv_cache_max_concurrency"),
    ),
    "prompt_tokens_total": ("counter", ()),
    "prompt_tokens_cached_total": ("counter", ()),
    "generation_tokens_total": ("counter", ()),
    "request_success_total": ("counter", ("finished_reason",)),
    "num_preemptions_total": ("counter", ()),
    "prefix_cache_queries_total": ("counter", ()),
    "prefix_cache_hits_total": ("counter", ()),
} | dict.fromkeys(
    (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
        "request_generation_tokens", "request_max_num_generation_tokens", "request_params_n",
        "request_params_max_tokens", "request_prefill_kv_computed_tokens", "iteration_tokens_total",
    ),
    ("histogram", ()),
)  # fmt: skip
# name -> type and labels, whatever the prefix.
HTTP = {
    "http_requests_total": ("counter", ("method", "status", "handler")),
    "http_request_duration_seconds": ("histogram", ("method", "handler")),
    "http_request_duration_highr_seconds": ("histogram", ()),
    "http_request_size_bytes": ("summary", ("handler",)),
    "http_response_size_bytes": ("summary", ("handler",)),
    "process_cpu_seconds_total": ("counter", ()),
    "process_resident_memory_bytes": ("gauge", ()),
    "process_open_fds": ("gauge", ()),
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the time that metrics are taken at."""
    clock = Clock()
    monkeypatch.setattr("infer.serve.metrics.time", clock)
    monkeypatch.setattr("infer.serve.engine_metrics.time", clock)
    return clock


def request(name: str = "a", num_prompt: int = 5, **params: object) -> Request:
    return Request(
        request_id=name, prompt_token_ids=[7] * num_prompt, params=SamplingParams(max_tokens=9, **params), seed=1
    )


def stats(**fields: object) -> EngineStats:
    return EngineStats(**{"stage_busy_seconds": [0.0, 0.0], "heartbeat_ages": [0.0, 0.5], **fields})


def samples(metrics: Metrics) -> dict[str, float]:
    """Sample name and the labels that not all have -> value."""
    return parsed(metrics.render().decode())


def parsed(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + ("" if not own else str(sorted(own.items())))] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)["infer:" + name + ("" if not labels else str(sorted(labels.items())))]


def exported(metrics: Metrics) -> dict[str, str]:
    """Metric name -> type."""
    return dict(re.findall(r"^# TYPE (\S+) (\w+)$", metrics.render().decode(), re.MULTILINE))


def used(metrics: Metrics) -> Metrics:
    """With a value for every label there is."""
    metrics.engine_started(HELLO)
    metrics.engine_stats(stats(iteration_tokens=[3]))
    metrics.watch_loop(LoopLag())
    metrics.observe_http("POST", "/v1/completions", 500, 1.0, 20, 30)
    return metrics


def labels_of(metrics: Metrics) -> dict[str, set[str]]:
    """Metric name -> its labels."""
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            name = re.sub(r"_(bucket|sum|count)$", "", sample.name)
            labels.setdefault(name, set()).update(sample.labels.keys() - {"le"})
    return labels


def test_names_types_and_labels_are_vllms() -> None:
    metrics = used(Metrics("tiny", "vllm:"))
    types = exported(metrics)
    assert {"vllm:" + name: kind for name, (kind, _) in VLLM.items()}.items() <= types.items()
    assert {name: kind for name, (kind, _) in HTTP.items()}.items() <= types.items()
    assert not [name for name in types if name.endswith("_created")]
    labels = labels_of(metrics)
    for name, (_, own) in VLLM.items():
        assert labels["vllm:" + name] == {"model_name", "engine", *own}, name
    for name, (_, own) in HTTP.items():
        assert labels[name] == set(own), name
    assert types["vllm:admission_rejections_total"] == "counter"
    assert labels["vllm:admission_rejections_total"] == {"model_name", "reason"}, "no engine saw them"
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert sample.labels.get("model_name", "tiny") == "tiny" and sample.labels.get("engine", "0") == "0", sample


def test_the_times_of_a_request(clock: Clock) -> None:
    metrics = Metrics("tiny")
    metrics.request_started(request())
    clock.now += 2.0
    metrics.output(Output(request_id="a", token_ids=[1], queue_seconds=0.5, num_cached_tokens=4))
    assert value(metrics, "prompt_tokens_total") == 5 and value(metrics, "generation_tokens_total") == 1
    assert value(metrics, "prompt_tokens_cached_total") == 4
    for wait in (0.25, 0.75):
        clock.now += wait
        metrics.output(Output(request_id="a", token_ids=[1]))
    clock.now += 100.0  # a client that reads slowly is no part of it
    metrics.choice_finished("a", 0, "stop")
    metrics.request_closed("a")
    expected = {
        "time_to_first_token_seconds": 2.0, "inter_token_latency_seconds": 1.0, "e2e_request_latency_seconds": 3.0,
        "request_queue_time_seconds": 0.5, "request_prefill_time_seconds": 1.5, "request_decode_time_seconds": 1.0,
        "request_inference_time_seconds": 2.5, "request_time_per_output_token_seconds": 0.5,
        "request_prompt_tokens": 5, "request_prefill_kv_computed_tokens": 1, "request_generation_tokens": 3,
        "request_max_num_generation_tokens": 3, "request_params_n": 1, "request_params_max_tokens": 9,
    }  # fmt: skip
    found = samples(metrics)
    for name, total in expected.items():
        assert found[f"infer:{name}_sum"] == pytest.approx(total), name
        assert found[f"infer:{name}_count"] == (2 if name == "inter_token_latency_seconds" else 1), name
    assert value(metrics, "request_success_total", finished_reason="stop") == 1


def test_how_choices_end() -> None:
    metrics = Metrics("tiny")
    metrics.request_started(request(n=4))
    for index in (0, 0, 0, 1):
        metrics.output(Output(request_id="a", index=index, token_ids=[1]))
    metrics.choice_finished("a", 0, "tool_calls")  # a chat's word for a stop
    metrics.choice_finished("a", 0, "length")  # too late
    metrics.output(Output(request_id="a", index=0, token_ids=[1]))  # and so is this
    metrics.output(Output(request_id="a", index=1, finish_reason=FinishReason.ERROR, error="no"))
    metrics.choice_finished("a", 2, "length")  # scored only: no token came
    metrics.request_closed("a")  # index 3 was still under way
    metrics.request_closed("a")
    reasons = {
        reason: value(metrics, "request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert reasons == {"stop": 1, "length": 1, "abort": 1, "error": 1}
    found = samples(metrics)
    assert found["infer:e2e_request_latency_seconds_count"] == 1, "failures have no latency"
    assert found["infer:generation_tokens_total"] == 4
    assert (found["infer:request_params_n_sum"], found["infer:request_params_n_count"]) == (4, 1)
    assert found["infer:request_max_num_generation_tokens_sum"] == 3


def test_unknown_requests_are_nobodys() -> None:
    metrics = Metrics("tiny")
    metrics.output(Output(request_id="x", token_ids=[1]))
    metrics.choice_finished("x", 0, "stop")
    metrics.request_closed("x")
    assert value(metrics, "generation_tokens_total") == 0
    assert value(metrics, "request_success_total", finished_reason="stop") == 0


def test_the_engine_s_figures(clock: Clock) -> None:
    metrics = Metrics("tiny")
    assert value(metrics, "num_requests_running") == 0, "before there is an engine"
    metrics.engine_started(HELLO)
    metrics.engine_stats(stats(num_running=3, num_waiting=2, kv_cache_usage=0.25, iteration_tokens=[8, 9, 300]))
    clock.now += 2.0
    assert value(metrics, "num_requests_running") == 3 and value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_perc") == 0.25
    sizes = {"num_gpu_blocks": "40", "block_size": "16", "kv_cache_size_tokens": "640"}
    assert value(metrics, "cache_config_info", **sizes, kv_cache_max_concurrency="10.00") == 1
    ages = [value(metrics, "heartbeat_age_seconds", rank=rank) for rank in "01"]
    assert ages == [pytest.approx(2.0), pytest.approx(2.5)], "they grow while nothing is heard"
    steps = {bound: value(metrics, "iteration_tokens_total_bucket", le=bound) for bound in ("8.0", "16.0", "+Inf")}
    assert steps == {"8.0": 1, "16.0": 2, "+Inf": 3}


def test_counters_go_on_over_restarts() -> None:
    metrics = Metrics("tiny")
    metrics.engine_started(HELLO)
    counts = {"num_preemptions": 4, "prefix_cache_queries": 100, "prefix_cache_hits": 60, "active_seconds": 5.0}
    metrics.engine_stats(stats(**counts, num_running=2, stage_busy_seconds=[4.0, 3.0]))
    metrics.engine_lost()
    assert value(metrics, "num_requests_running") == 0, "no engine runs anything"
    assert "infer:heartbeat_age_seconds" not in "".join(samples(metrics)), "no rank is heard from"
    assert value(metrics, "num_preemptions_total") == 4
    metrics.engine_started(HELLO)
    assert value(metrics, "num_preemptions_total") == 4
    # More stages than before, and more preemptions already: counts of the two engines add up.
    metrics.engine_stats(stats(num_preemptions=7, prefix_cache_queries=1, stage_busy_seconds=[1.0, 1.0, 0.5]))
    assert value(metrics, "num_preemptions_total") == 11
    assert value(metrics, "prefix_cache_queries_total") == 101 and value(metrics, "prefix_cache_hits_total") == 60
    assert value(metrics, "pipeline_active_seconds_total") == 5.0
    assert [value(metrics, "stage_busy_seconds_total", stage=stage) for stage in "012"] == [5.0, 4.0, 0.5]


def test_the_bubble_is_of_the_last_seconds(clock: Clock) -> None:
    metrics = Metrics("tiny")
    metrics.engine_started(HELLO)
    metrics.engine_stats(stats())
    assert value(metrics, "pipeline_bubble_ratio") == 0
    clock.now += 4.0
    metrics.engine_stats(stats(active_seconds=4.0, stage_busy_seconds=[3.0, 1.0]))
    assert value(metrics, "pipeline_bubble_ratio") == pytest.approx(0.5)
    for second in range(1, 31):
        clock.now += 1.0
        metrics.engine_stats(stats(active_seconds=4.0 + second, stage_busy_seconds=[3.0 + second, 1.0 + second / 2]))
    assert value(metrics, "pipeline_bubble_ratio") == pytest.approx(0.25), "the first four seconds are forgotten"


def test_http_labels_are_bounded() -> None:
    async def run() -> Metrics:
        metrics = Metrics("tiny")

        async def refuse(request: web.Request) -> web.Response:
            raise bad_request("no")

        async def fail(request: web.Request) -> web.Response:
            raise RuntimeError("broken")

        async def gone(request: web.Request) -> web.Response:
            raise ConnectionError("the client left")

        async def answer(request: web.Request) -> web.Response:
            return web.Response(text="fine")

        app = web.Application(middlewares=[http_metrics(metrics), errors_as_json])
        app.router.add_get("/v1/models/{model:.+}", answer)
        app.router.add_post("/refuse", refuse)
        app.router.add_post("/fail", fail)
        app.router.add_post("/gone", gone)
        async with TestClient(TestServer(app)) as client:
            for path in ("/v1/models/a", "/v1/models/b/c"):
                assert (await client.get(path)).status == 200
            for path in ("/one", "/two", "/three"):
                await client.get(path)
            await client.request("PROPFIND", "/refuse")
            await client.post("/refuse")
            await client.post("/fail")
            await client.post("/gone")
        return metrics

    metrics = asyncio.run(run())
    found = {name: count for name, count in samples(metrics).items() if name.startswith("http_requests_total")}
    assert found == {
        f"http_requests_total[('handler', '{handler}'), ('method', '{method}'), ('status', '{status}')]": count
        for handler, method, status, count in (
            ("/v1/models/{model}", "GET", "2xx", 2), ("none", "GET", "4xx", 3), ("none", "other", "4xx", 1),
            ("/refuse", "POST", "4xx", 1), ("/fail", "POST", "5xx", 1), ("/gone", "POST", "4xx", 1),
        )
    }  # fmt: skip
    assert value(metrics, "http_errors_total", status="499", handler="/gone") == 1
    assert value(metrics, "http_errors_total", status="405", handler="none") == 1


def test_who_watches_the_server_is_not_counted() -> None:
    metrics, quiet = Metrics("tiny"), ("health", "load", "metrics", "openapi.json", "ping", "ready", "version")
    for path in quiet:
        metrics.observe_http("GET", f"/{path}", 503, 1.0, 0, 9)
        metrics.observe_http("GET", f"/under/root/{path}", 200, 1.0, 0, 9)
    found = samples(metrics)
    assert not [name for name in found if "handler" in name], "neither as a request nor as an error"
    assert found["http_request_duration_highr_seconds_count"] == 0


def test_sizes_and_refusals_of_http() -> None:
    async def run() -> Metrics:
        metrics = Metrics("tiny")

        async def echo(request: web.Request) -> web.Response:
            return web.Response(body=await request.read())

        async def stream(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(3):
                await response.write(b"x" * 1000)
            await response.write_eof()
            return response

        async def full(request: web.Request) -> web.Response:
            raise ApiError(429, "the queue is full")

        app = web.Application(middlewares=[http_metrics(metrics), errors_as_json])
        for path, handler in (("/echo", echo), ("/stream", stream), ("/full", full)):
            app.router.add_post(path, handler)
        async with TestClient(TestServer(app)) as client:
            await client.post("/echo", data=b"y" * 5000)
            await client.post("/echo", data=b"y" * 2000)
            await (await client.post("/stream")).read()
            await client.post("/full")
        return metrics

    found = samples(asyncio.run(run()))
    assert found["infer:admission_rejections_total[('reason', 'max_num_queued_reqs')]"] == 1
    assert found["http_request_duration_highr_seconds_count"] == 4
    for name in ("request", "response"):
        assert found[f"http_{name}_size_bytes_sum[('handler', '/echo')]"] == 7000, name
        assert found[f"http_{name}_size_bytes_count[('handler', '/echo')]"] == 2, name
    assert found["http_request_size_bytes_sum[('handler', '/stream')]"] == 0
    assert 3000 <= found["http_response_size_bytes_sum[('handler', '/stream')]"] < 4000


def test_lag_of_the_event_loop() -> None:
    async def run() -> Metrics:
        metrics, lag = Metrics("tiny"), LoopLag()
        metrics.watch_loop(lag)
        lag.start()
        while lag.num_samples < 2:
            await asyncio.sleep(0.01)
        lag.stop()
        return metrics

    metrics = asyncio.run(run())
    assert value(metrics, "event_loop_lag_seconds", quantile="1") >= value(
        metrics, "event_loop_lag_seconds", quantile="0.5"
    ) >= 0  # fmt: skip


def test_a_server_counts_what_it_does(served: tuple[str, FakeEngine], tokenizer: Tokenizer) -> None:
    url, engine = served
    engine.delay, engine.tokens_per_step = 0.0, 1
    engine.link.send(stats(num_running=2, num_preemptions=3, heartbeat_ages=[0.0, 0.25]))

    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(url + "/metrics", timeout=20) as reply:
            assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return parsed(reply.read().decode())

    wait_until(lambda: scrape()["infer:num_requests_running"] == 2)
    before = scrape()
    assert before["infer:num_preemptions_total"] == 3
    assert 0.25 <= before["infer:heartbeat_age_seconds[('rank', '1')]"] < 5
    prompt = tokenizer.encode("hello world")
    body = {"prompt": prompt, "max_tokens": 3, "n": 2, "stop": "no such text"}
    for path, more, status in (("/v1/completions", {}, 200), ("/v1/completions", {"n": -1}, 400)):
        data = json.dumps(body | more).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        try:
            assert urllib.request.urlopen(request, timeout=20).status == status
        except urllib.error.HTTPError as error:
            assert error.code == status, error.read()
    after = scrape()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    handler = "('handler', '/v1/completions'), "
    expected = {
        "infer:prompt_tokens_total": 2 * len(prompt), "infer:prompt_tokens_cached_total": 2,
        "infer:generation_tokens_total": 6,
        "infer:request_success_total[('finished_reason', 'length')]": 2,
        "infer:request_success_total[('finished_reason', 'abort')]": 0, "infer:request_params_n_sum": 2,
        "infer:time_to_first_token_seconds_count": 2, "infer:inter_token_latency_seconds_count": 4,
        f"http_requests_total[{handler}('method', 'POST'), ('status', '2xx')]": 1,
        f"http_requests_total[{handler}('method', 'POST'), ('status', '4xx')]": 1,
        f"infer:http_errors_total[{handler}('status', '400')]": 1,
    }  # fmt: skip
    assert {name: grown[name] for name in expected} == expected
    assert after["process_resident_memory_bytes"] > 1 << 20
    assert not [name for name in after if "'/metrics'" in name], "a scrape does not count itself"


def listed(section: str) -> Iterator[tuple[str, str, set[str]]]:
    """Name, type and labels of each row of a table about metrics."""
    for names, kind, labels in re.findall(r"^\| (`.+?) \| (\w+) \| (.*?) ?\|", section, re.MULTILINE):
        for name in re.findall(r"`(.+?)`", names):
            yield name, kind, set(re.findall(r"`(.+?)`", labels))


def test_the_document_lists_exactly_what_is_exported() -> None:
    _, _, section = DOCUMENT.read_text().partition("\n## Metrics\n")
    section = section.partition("\n## ")[0]
    of_the_model, _, others = section.partition("\n### HTTP and the process\n")
    found = {name: (kind, labels | {"model_name", "engine"}) for name, kind, labels in listed(of_the_model)}
    found |= {name: (kind, labels) for name, kind, labels in listed(others)}
    metrics = used(Metrics("tiny"))
    labels = labels_of(metrics)
    assert found == {name: (kind, labels[name]) for name, kind in exported(metrics).items()}


def expressions(panels: list[dict]) -> Iterator[str]:
    for panel in panels:
        yield from expressions(panel.get("panels", []))
        yield from (target["expr"] for target in panel.get("targets", []))


def test_every_metric_of_the_dashboard_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    types = exported(used(Metrics("tiny")))
    named = set()
    for expression in expressions(dashboard["panels"]):
        metrics = re.findall(r"\b(?:infer:\w+|http_request\w+)", expression)
        assert metrics, expression
        for name in metrics:
            histogram = re.sub(r"_(bucket|sum|count)$", "", name)
            kinds = ("gauge", "counter") if histogram == name else ("histogram",)
            assert types.get(histogram) in kinds, f"{name} is not exported"
            named.add(histogram)
        assert "rate(" in expression or types[metrics[0]] == "gauge", f"a counter wants rate(): {expression}"
    assert len(named) >= 20


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables.keys() == {"datasource", "model_name"}
    assert variables["datasource"]["query"] == "prometheus" and dashboard["schemaVersion"] >= 38  # Grafana 10
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] >= 0 and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count("(") == target["expr"].count(")")
            assert "infer:" not in target["expr"] or 'model_name=~"$model_name"' in target["expr"]
