"""What others measure, as Prometheus metrics: the engine's figures, whose counters go on over its restarts, and the
event loop's lag. No torch here."""

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from infer.serve.link import EngineStats, Hello
from infer.serve.loop_lag import LoopLag

ENGINE = "0"  # one engine a server; the label is there for dashboards that have it
BUBBLE_SECONDS = 10.0  # the pipeline's bubble is told over about so long
LAG_PERCENTILES = (50.0, 99.0, 100.0)

_COUNTERS = {
    "num_preemptions": "Times a running request was put back into the queue.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
}


# vLLM's names. kv_cache_max_concurrency: how many requests of the longest context it holds.
_CACHE_LABELS = ["num_gpu_blocks", "block_size", "kv_cache_size_tokens", "kv_cache_max_concurrency"]


@dataclass(frozen=True)
class _Totals:
    """The counters of an engine, or of several one after the other."""

    counts: dict[str, float]  # the fields of EngineStats that _COUNTERS names
    active_seconds: float = 0.0
    stage_busy_seconds: tuple[float, ...] = ()

    @classmethod
    def of(cls, stats: EngineStats) -> "_Totals":
        counts = {name: float(getattr(stats, name)) for name in _COUNTERS}
        return cls(counts, stats.active_seconds, tuple(stats.stage_busy_seconds))

    def plus(self, other: "_Totals") -> "_Totals":
        """A stage that one of them lacks counts 0 there."""
        num_stages = max(len(self.stage_busy_seconds), len(other.stage_busy_seconds))
        ours, theirs = (
            [*totals.stage_busy_seconds, *[0.0] * (num_stages - len(totals.stage_busy_seconds))]
            for totals in (self, other)
        )
        return _Totals(
            {name: count + other.counts[name] for name, count in self.counts.items()},
            self.active_seconds + other.active_seconds,
            tuple(a + b for a, b in zip(ours, theirs, strict=True)),
        )


class EngineCollector(Collector):
    """Makes the metrics when Prometheus asks. They stand between messages, but for the heartbeats' ages, which grow."""

    def __init__(self, model_name: str, prefix: str) -> None:
        self._prefix = prefix
        self._label_names, self._labels = ["model_name", "engine"], [model_name, ENGINE]
        self._hello: Hello | None = None
        self._stats: EngineStats | None = None
        self._received = 0.0  # when the stats came
        self._before = _Totals(dict.fromkeys(_COUNTERS, 0.0))  # all that engines before this one counted
        self._recent: deque[tuple[float, EngineStats]] = deque()  # what came when, for the bubble

    def start(self, hello: Hello) -> None:
        """Another engine begins to count at 0."""
        self.stop()
        self._hello = hello

    def stop(self) -> None:
        """No engine is there; what it counted stays."""
        if self._stats is not None:
            self._before = self._before.plus(_Totals.of(self._stats))
        self._hello, self._stats = None, None
        self._recent.clear()

    def update(self, stats: EngineStats) -> None:
        self._stats, self._received = stats, time.monotonic()
        self._recent.append((self._received, stats))
        # The first stays until the second is old enough to measure from.
        while len(self._recent) > 2 and self._received - self._recent[1][0] >= BUBBLE_SECONDS:
            self._recent.popleft()

    @property
    def bubble(self) -> float:
        """Share of the stages' time, while there was work, that nothing ran in; 0 where there was none."""
        if not self._recent:
            return 0.0
        before, now = self._recent[0][1], self._recent[-1][1]
        seconds = (now.active_seconds - before.active_seconds) * len(now.stage_busy_seconds)
        if seconds <= 0:
            return 0.0
        busy = sum(now.stage_busy_seconds) - sum(before.stage_busy_seconds)
        return min(1.0, max(0.0, 1.0 - busy / seconds))

    def collect(self) -> Iterable[Metric]:
        yield from self._gauges()
        totals = self._before if self._stats is None else self._before.plus(_Totals.of(self._stats))
        for name, text in _COUNTERS.items():
            yield self._counter(name, text, [([], totals.counts[name])])
        yield self._counter("pipeline_active_seconds", "Seconds that any batch was in flight.",
                            [([], totals.active_seconds)])  # fmt: skip
        stages = [([str(stage)], busy) for stage, busy in enumerate(totals.stage_busy_seconds)]
        yield self._counter("stage_busy_seconds", "Seconds that a pipeline stage computed.", stages, ["stage"])

    def _gauges(self) -> Iterable[Metric]:
        stats = EngineStats() if self._stats is None else self._stats
        running, waiting, usage = stats.num_running, stats.num_waiting, stats.kv_cache_usage
        yield self._gauge("num_requests_running", "Choices in the model's batches.", [([], running)])
        yield self._gauge("num_requests_waiting", "Choices that wait to be scheduled.", [([], waiting)])
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache's blocks that is held; 1: all.", [([], usage)])
        text = f"Share of the stages' time without work over the last {BUBBLE_SECONDS:g} s."
        yield self._gauge("pipeline_bubble_ratio", text, [([], self.bubble)])
        since = time.monotonic() - self._received
        ages = [([str(rank)], age + since) for rank, age in enumerate(stats.heartbeat_ages)]
        yield self._gauge("heartbeat_age_seconds", "Seconds since a rank was last heard from.", ages, ["rank"])
        sizes = [] if self._hello is None else [(_cache_sizes(self._hello), 1.0)]
        yield self._gauge("cache_config_info", "Always 1: its labels tell the KV cache's size.", sizes, _CACHE_LABELS)

    def _gauge(
        self, name: str, text: str, samples: list[tuple[list[str], float]], labels: list[str] | None = None
    ) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=[*self._label_names, *(labels or ())])
        for values, value in samples:
            family.add_metric([*self._labels, *values], value)
        return family

    def _counter(
        self, name: str, text: str, samples: list[tuple[list[str], float]], labels: list[str] | None = None
    ) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=[*self._label_names, *(labels or ())])
        for values, value in samples:
            family.add_metric([*self._labels, *values], value)
        return family


class LagCollector(Collector):
    """How late the event loop ran what was due, over the last minute."""

    def __init__(self, lag: LoopLag, model_name: str, engine: str, prefix: str) -> None:
        self._lag, self._labels, self._name = lag, [model_name, engine], prefix + "event_loop_lag_seconds"

    def collect(self) -> Iterable[Metric]:
        text = "How late the frontend's event loop ran what was due: quantiles of the last minute."
        family = GaugeMetricFamily(self._name, text, labels=["model_name", "engine", "quantile"])
        for percent in LAG_PERCENTILES:
            family.add_metric([*self._labels, f"{percent / 100:g}"], self._lag.percentile(percent))
        yield family


def _cache_sizes(hello: Hello) -> list[str]:
    """The values of _CACHE_LABELS."""
    num_blocks, block_size = hello.num_kv_blocks, hello.block_size
    blocks_a_request = math.ceil(hello.max_model_len / max(1, block_size))
    return [
        str(num_blocks), str(block_size), str(num_blocks * block_size), f"{num_blocks / blocks_a_request:.2f}"
    ]  # fmt: skip
