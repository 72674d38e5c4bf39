"""The line that says how the engine is doing, and the figures behind it and behind the metrics."""

import logging
import time
from dataclasses import dataclass
from typing import Protocol

from infer.engine.scheduler import Scheduler, Stats
from infer.parallel.topology import Topology

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


class Store(Protocol):
    """What is used of torch.distributed's store."""

    def set(self, key: str, value: str) -> None: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class Heart:
    """Rank > 0: tells rank 0, through the store, that this rank's main loop goes round, and its busy seconds.

    Only the main loop may call beat(): a thread beside it would go on beating for a loop that hangs.
    """

    def __init__(self, store: Store, name: str, rank: int) -> None:
        self._store, self._key = store, _key(name, rank)
        self._count = 0

    def beat(self, busy_seconds: float) -> None:
        self._count += 1
        self._store.set(self._key, f"{self._count} {busy_seconds:.6f}")


class Heartbeats:
    """Rank 0: what the other ranks' hearts said last, and how long ago it was heard.

    To be built once every rank has beaten, since reading waits for the first beat. Ages are on rank 0's clock alone,
    from when a new beat was first read; so they are at most the interval between two reads too small.
    """

    def __init__(self, store: Store | None, name: str, topology: Topology) -> None:
        self._store = store
        self._keys = [_key(name, rank) for rank in range(1, topology.world_size)]
        self._stage_leaders = [topology.rank(pp, 0) for pp in range(topology.pp_size)]
        self._beats = [""] * topology.world_size
        self._heard = [time.monotonic()] * topology.world_size
        self._busy = [0.0] * topology.world_size

    def read(self, own_busy_seconds: float) -> None:
        """Asks the store, in one round trip. own_busy_seconds: rank 0's."""
        now = time.monotonic()
        self._heard[0], self._busy[0] = now, own_busy_seconds
        if self._store is None or not self._keys:
            return
        for rank, value in enumerate(self._store.multi_get(self._keys), 1):
            beat, busy = value.decode().split()
            if beat != self._beats[rank]:
                self._beats[rank], self._heard[rank], self._busy[rank] = beat, now, float(busy)

    @property
    def ages(self) -> list[float]:
        """Seconds since each rank was heard from, as of now."""
        now = time.monotonic()
        return [now - heard for heard in self._heard]

    @property
    def stage_busy(self) -> list[float]:
        """Busy seconds of each stage: of its tensor-parallel rank 0."""
        return [self._busy[rank] for rank in self._stage_leaders]


def _key(name: str, rank: int) -> str:
    return f"{name}/beat/{rank}"


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
