"""The line that says how the engine is doing, and the figures behind it."""

import logging
import time
from dataclasses import dataclass

from infer.engine.scheduler import Scheduler, Stats

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 10.0


@dataclass
class PipelineTime:
    """Seconds since the engine was built: while any batch was in flight, and what each stage computed of them."""

    active: float
    busy: list[float]

    def since(self, earlier: "PipelineTime") -> "PipelineTime":
        return PipelineTime(
            self.active - earlier.active, [b - e for b, e in zip(self.busy, earlier.busy, strict=True)]
        )

    @property
    def bubble(self) -> float:
        """Share of the stages' time that nothing ran in, while there was work."""
        if self.active <= 0:
            return 0.0
        return min(1.0, max(0.0, 1.0 - sum(self.busy) / (len(self.busy) * self.active)))


class Clock:
    """How long batches have been in flight."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        self._total, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._total + (0.0 if self._since is None else time.perf_counter() - self._since)


class ThroughputLog:
    """Logs throughput every ten seconds while there is work, and once more when it has ended."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._time = time.monotonic()
        self._counts = Stats()
        self._pipeline: PipelineTime | None = None
        self._quiet = True

    def due(self) -> bool:
        return time.monotonic() - self._time >= LOG_INTERVAL_SECONDS

    def log(self, pipeline: PipelineTime) -> None:
        """One line with vLLM's words. pipeline: the figures so far."""
        now, stats, scheduler = time.monotonic(), self._scheduler.stats, self._scheduler
        seconds, before = now - self._time, self._counts
        prompt = (stats.num_prompt_tokens - before.num_prompt_tokens) / seconds
        generation = (stats.num_generation_tokens - before.num_generation_tokens) / seconds
        interval = pipeline if self._pipeline is None else pipeline.since(self._pipeline)
        hit_rate = stats.prefix_cache_hits / max(1, stats.prefix_cache_queries)
        if not (self._quiet and prompt == generation == 0):
            logger.info(
                "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
                "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%%s",
                prompt, generation, len(scheduler.running), len(scheduler.waiting), 100 * scheduler.kv_cache_usage,
                100 * hit_rate, _pipeline_words(interval),
            )  # fmt: skip
        self._quiet = prompt == generation == 0
        self._time, self._counts, self._pipeline = now, Stats(**vars(stats)), pipeline


def _pipeline_words(interval: PipelineTime) -> str:
    if len(interval.busy) == 1 or interval.active <= 0:
        return ""
    busy = " / ".join(f"{100 * seconds / interval.active:.0f}%" for seconds in interval.busy)
    return f", pipeline bubble: {100 * interval.bubble:.1f}% (stages busy {busy})"
