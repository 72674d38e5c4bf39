"""What Prometheus reads at /metrics: vLLM's names, types, labels and buckets, and the pipeline's own. No torch here.

Requests are timed here, where their outputs arrive; the scheduler's figures come with EngineStats (engine_metrics.py).
vLLM counts each of a request's `n` choices as a request, and so does every metric here but request_params_n and
request_max_num_generation_tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import prometheus_client
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, Summary

from infer.request import FinishReason, Output, Request
from infer.serve.engine_metrics import ENGINE, EngineCollector, LagCollector
from infer.serve.link import EngineStats, Hello
from infer.serve.loop_lag import LoopLag

DEFAULT_PREFIX = "infer:"
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4

FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
PER_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
# 1, 2, 5, 10, ... 1,000,000. vLLM ends at max_model_len; these are there before the engine has said what that is.
TOKEN_BUCKETS = (*(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5)), 10**6)
N_BUCKETS = (1, 2, 5, 10, 20)
# Both of prometheus-fastapi-instrumentator, which vLLM serves the metrics of HTTP with.
HTTP_BUCKETS = (0.1, 0.5, 1.0)
FINE_HTTP_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0
)  # fmt: skip
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

REASONS = tuple(str(reason) for reason in FinishReason)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUEUE_FULL = 429
# What those who watch the server ask, again and again: no part of its HTTP metrics, as at vLLM.
UNCOUNTED = ("/health", "/load", "/metrics", "/openapi.json", "/ping", "/ready", "/version")
CLIENT_GONE = 499  # not sent to anybody: the client left before its reply was complete


@dataclass(slots=True)
class _Times:
    """One choice on its way. Times are of time.monotonic()."""

    first: float | None = None  # when its first token came
    last: float = 0.0  # and its latest
    queue_seconds: float | None = None
    num_cached: int = 0  # prompt tokens found in the prefix cache
    num_tokens: int = 0


@dataclass(slots=True)
class _Tracked:
    """A request that has not been closed."""

    num_prompt: int
    max_tokens: int | None
    n: int
    submitted: float
    open: dict[int, _Times]  # choices that nobody has called finished
    most_tokens: int = 0  # of any choice that has finished
    others_finish_as: str = field(default=str(FinishReason.ABORT))


class Metrics:
    """All metrics of one server. Every method is cheap and runs on the event loop's thread.

    model_name: the label of that name. prefix: goes before every name but those of HTTP and of the process; `vllm:`
    makes dashboards made for vLLM work.
    """

    def __init__(self, model_name: str, prefix: str = DEFAULT_PREFIX) -> None:
        # A second series for each counter and histogram, which no dashboard here or of vLLM's reads.
        prometheus_client.disable_created_metrics()
        self._registry = CollectorRegistry()
        self._labels = (model_name, ENGINE)
        self._prefix = prefix
        self._tracked: dict[str, _Tracked] = {}
        self._engine = EngineCollector(model_name, prefix)
        self._registry.register(self._engine)
        self._make_counters()
        self._make_request_histograms()
        self._make_http()
        ProcessCollector(registry=self._registry)

    def _make_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that got their first token.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Those of them found in the prefix cache.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens that came from the engine.")
        success = Counter(
            self._prefix + "request_success", "Requests that ended, by how.",
            ("model_name", "engine", "finished_reason"), registry=self._registry,
        )  # fmt: skip
        self._finished = {reason: success.labels(*self._labels, reason) for reason in REASONS}
        rejections = Counter(  # without the label engine, as vLLM has it: no engine saw them
            self._prefix + "admission_rejections", "Requests refused with 429, by the limit that did it.",
            ("model_name", "reason"), registry=self._registry,
        )  # fmt: skip
        self._queue_full = rejections.labels(self._labels[0], "max_num_queued_reqs")

    def _make_request_histograms(self) -> None:
        make = self._histogram
        self._first_token = make("time_to_first_token_seconds", "Submission to first token.", FIRST_TOKEN_BUCKETS)
        self._inter_token = make("inter_token_latency_seconds", "One token to the next.", PER_TOKEN_BUCKETS)
        self._per_token = make(
            "request_time_per_output_token_seconds", "A request's mean time per token after the first.",
            PER_TOKEN_BUCKETS,
        )  # fmt: skip
        self._e2e = make("e2e_request_latency_seconds", "Submission to last token.", REQUEST_BUCKETS)
        self._queue = make("request_queue_time_seconds", "Submission to first being scheduled.", REQUEST_BUCKETS)
        self._inference = make("request_inference_time_seconds", "Scheduling to last token.", REQUEST_BUCKETS)
        self._prefill = make("request_prefill_time_seconds", "Scheduling to first token.", REQUEST_BUCKETS)
        self._decode = make("request_decode_time_seconds", "First token to last token.", REQUEST_BUCKETS)
        self._num_prompt = make("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self._num_computed = make(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that were not in the prefix cache.",
            TOKEN_BUCKETS,
        )  # fmt: skip
        self._num_generated = make("request_generation_tokens", "Generated tokens of a request.", TOKEN_BUCKETS)
        self._most_generated = make(
            "request_max_num_generation_tokens", "Generated tokens of a request's longest choice.", TOKEN_BUCKETS
        )
        self._n = make("request_params_n", "The request parameter n.", N_BUCKETS)
        self._max_tokens = make("request_params_max_tokens", "The request parameter max_tokens.", TOKEN_BUCKETS)
        self._step_tokens = make("iteration_tokens_total", "Tokens of an engine step.", STEP_BUCKETS)

    def _make_http(self) -> None:
        """Without prefix and model_name, as vLLM has them; a status is its class there, such as 2xx."""
        self._http = Counter(
            "http_requests", "HTTP requests by method, class of status, and route.", ("method", "status", "handler"),
            registry=self._registry,
        )  # fmt: skip
        self._http_seconds = Histogram(
            "http_request_duration_seconds", "HTTP requests to the end of their reply, streams too.",
            ("method", "handler"), buckets=HTTP_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._http_fine_seconds = Histogram(
            "http_request_duration_highr_seconds", "The same of all routes together, in finer buckets.",
            buckets=FINE_HTTP_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._http_received = Summary(
            "http_request_size_bytes", "Bytes of requests' bodies, as far as they were read.", ("handler",),
            registry=self._registry,
        )  # fmt: skip
        self._http_sent = Summary(
            "http_response_size_bytes", "Bytes of replies' bodies; of streams, all that was sent.", ("handler",),
            registry=self._registry,
        )  # fmt: skip
        self._http_errors = Counter(
            self._prefix + "http_errors", "HTTP requests that got a status of 400 or more, by that status.",
            ("model_name", "engine", "status", "handler"), registry=self._registry,
        )  # fmt: skip

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(self._prefix + name, text, ("model_name", "engine"), registry=self._registry)
        return made.labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(self._prefix + name, text, ("model_name", "engine"), buckets=buckets, registry=self._registry)
        return made.labels(*self._labels)

    def render(self) -> bytes:
        """Everything in Prometheus's text format, of CONTENT_TYPE."""
        return prometheus_client.generate_latest(self._registry)

    # ------------------------------------------------------------------ requests

    def request_started(self, request: Request) -> None:
        """A request goes to the engine. request_closed() must follow, however it ends."""
        n, max_tokens = request.params.n, request.params.max_tokens
        choices = {index: _Times() for index in range(n)}
        self._tracked[request.request_id] = _Tracked(
            len(request.prompt_token_ids), max_tokens, n, time.monotonic(), choices
        )

    def output(self, output: Output) -> None:
        """An output came from the engine, wanted or not."""
        tracked = self._tracked.get(output.request_id)
        times = None if tracked is None else tracked.open.get(output.index)
        if tracked is None or times is None:
            return
        if output.queue_seconds is not None:
            times.queue_seconds = output.queue_seconds
        times.num_cached = max(times.num_cached, output.num_cached_tokens)  # an error says 0
        if output.token_ids:
            now = time.monotonic()
            self._count_tokens(tracked, times, len(output.token_ids), now)
            times.last = now
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.choice_finished(output.request_id, output.index, str(output.finish_reason))

    def _count_tokens(self, tracked: _Tracked, times: _Times, num_tokens: int, now: float) -> None:
        if times.first is None:
            times.first = now
            self._first_token.observe(now - tracked.submitted)
            self._prompt_tokens.inc(tracked.num_prompt)
            self._cached_tokens.inc(times.num_cached)
        else:
            self._inter_token.observe(now - times.last)
        times.num_tokens += num_tokens
        self._generation_tokens.inc(num_tokens)

    def choice_finished(self, request_id: str, index: int, reason: str) -> None:
        """A choice is over for its client. reason: its finish_reason; one that is none of FinishReason's (tool_calls)
        counts as stop, which is what the engine said. A second call for the same choice does nothing."""
        tracked = self._tracked.get(request_id)
        times = None if tracked is None else tracked.open.pop(index, None)
        if tracked is None or times is None:
            return
        self._finished[reason if reason in self._finished else str(FinishReason.STOP)].inc()
        if times.first is None or reason in (FinishReason.ERROR, FinishReason.ABORT):
            return  # how long it took to fail is not how long requests take
        tracked.most_tokens = max(tracked.most_tokens, times.num_tokens)
        self._observe_counts(tracked, times)
        self._observe_times(tracked.submitted, times, times.first)

    def _observe_counts(self, tracked: _Tracked, times: _Times) -> None:
        self._num_prompt.observe(tracked.num_prompt)
        self._num_computed.observe(tracked.num_prompt - times.num_cached)
        self._num_generated.observe(times.num_tokens)
        if tracked.max_tokens is not None:
            self._max_tokens.observe(tracked.max_tokens)

    def _observe_times(self, submitted: float, times: _Times, first: float) -> None:
        self._e2e.observe(times.last - submitted)
        self._decode.observe(times.last - first)
        if times.num_tokens > 1:
            self._per_token.observe((times.last - first) / (times.num_tokens - 1))
        if times.queue_seconds is not None:
            scheduled = submitted + times.queue_seconds
            self._queue.observe(times.queue_seconds)
            self._prefill.observe(max(0.0, first - scheduled))
            self._inference.observe(max(0.0, times.last - scheduled))

    def request_closed(self, request_id: str) -> None:
        """Nobody waits for the request any more: choices that have not finished were aborted. A second call does
        nothing."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        for index in list(tracked.open):
            self.choice_finished(request_id, index, str(FinishReason.ABORT))
        del self._tracked[request_id]
        if tracked.most_tokens:
            self._n.observe(tracked.n)
            self._most_generated.observe(tracked.most_tokens)

    # ------------------------------------------------------------------ the engine, the event loop, HTTP

    def engine_started(self, hello: Hello) -> None:
        """An engine said Hello; its counters begin at 0, and ours go on from where they are."""
        self._engine.start(hello)

    def engine_stats(self, stats: EngineStats) -> None:
        """The engine said how it is doing."""
        self._engine.update(stats)
        for num_tokens in stats.iteration_tokens:
            self._step_tokens.observe(num_tokens)

    def engine_lost(self) -> None:
        """The engine is gone: nothing runs, and no rank is heard from."""
        self._engine.stop()

    def watch_loop(self, lag: LoopLag) -> None:
        """From now on, tells what this monitor of the event loop has seen."""
        self._registry.register(LagCollector(lag, *self._labels, self._prefix))

    def observe_http(
        self, method: str, route: str, status: int, seconds: float, num_received: int, num_sent: int
    ) -> None:
        """A reply ended. route: the template, such as /v1/models/{model}, or `none`: raw paths have no bound.
        num_received, num_sent: bytes."""
        if route.endswith(UNCOUNTED):  # a root path may go before
            return
        method = method if method in METHODS else "other"
        self._http.labels(method, f"{status // 100}xx", route).inc()
        self._http_seconds.labels(method, route).observe(seconds)
        self._http_fine_seconds.observe(seconds)
        self._http_received.labels(route).observe(num_received)
        self._http_sent.labels(route).observe(num_sent)
        if status == QUEUE_FULL:  # nothing else is answered so
            self._queue_full.inc()
        if status >= 400:
            self._http_errors.labels(*self._labels, str(status), route).inc()


def http_metrics(metrics: Metrics) -> Middleware:
    """The middleware that counts every request. It goes first, outside of the one that makes errors into JSON."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        started, response = time.monotonic(), None  # it stays so where the handler is cancelled, or the client is gone
        try:
            response = await handler(request)
            return response
        finally:
            status, num_sent = (CLIENT_GONE, 0) if response is None else (response.status, _num_sent(response))
            seconds, num_received = time.monotonic() - started, request.content.total_bytes
            metrics.observe_http(request.method, _route(request), status, seconds, num_received, num_sent)

    return count


def _route(request: web.Request) -> str:
    resource: Any = request.match_info.route.resource
    return "none" if resource is None else resource.canonical


def _num_sent(response: web.StreamResponse) -> int:
    """Bytes: the length it announces; of a stream, which announces none, all that was written, framing included."""
    return response.body_length if response.content_length is None else response.content_length
