"""The loops: rank 0's Engine, which decides, and the followers, which obey."""

import contextlib
import logging
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch

from infer.cache.blocks import BlockPool
from infer.config import EngineConfig
from infer.engine import batch as messages
from infer.engine.batch import Batch, Kind, StepResult
from infer.engine.scheduler import Scheduler
from infer.engine.startup import Built, Phases, StartupError, build, decode_config, encode_config
from infer.engine.stats import Clock, Heart, Heartbeats, PipelineTime, ThroughputLog
from infer.parallel.groups import World
from infer.parallel.topology import Topology
from infer.parallel.watchdog import Watchdog
from infer.request import Output, Request
from infer.serve.link import EngineStats
from infer.signals import Order, Orders, hear_signals

logger = logging.getLogger(__name__)

IDLE_SECONDS = 60.0  # rank 0 sends at least one message so often, so that no finite timeout ends an idle world
REPORT_SECONDS = 0.25  # how often the other ranks publish their beat and busy time while they run batches
BEAT_SECONDS = 1.0  # and while they are idle
STATS_SECONDS = 1.0  # how often a server's frontend hears how the engine is doing
MAX_STEPS_TOLD = 4096  # in one such message: more than a second has
RESULT_SECONDS = 1.0  # how long a step waits for a result before its caller may see to something else


class RankLost(RuntimeError):
    """Another rank is gone; this generation of ranks cannot go on."""


class Courier:
    """Sends rank 0's messages to every rank from a thread of its own, in order, and an IDLE one when there is none."""

    def __init__(self, world: World):
        self._world = world
        self._generation = world.generation
        self._outbox: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self.idle_seconds = IDLE_SECONDS
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        if world.size > 1:
            self._thread.start()

    def send_batch(self, batch: Batch) -> None:
        self._put(lambda: messages.encode_batch(batch, self._generation))

    def send(self, kind: Kind, payload: Any = None) -> None:
        self._put(lambda: messages.encode_control(kind, self._generation, payload))

    def _put(self, encode: Callable[[], np.ndarray]) -> None:
        if self._world.size == 1:
            return
        if self.error is not None:
            raise RankLost(f"a rank is gone: {self.error}")
        self._outbox.put(encode())

    def _run(self) -> None:
        try:
            while True:
                try:
                    words = self._outbox.get(timeout=self.idle_seconds)
                except queue.Empty:
                    words = messages.encode_control(Kind.IDLE, self._generation)
                if words is None:
                    return
                self._world.frames.send(torch.from_numpy(words))
        except RuntimeError as error:
            self.error = error

    def close(self) -> None:
        """Waits until everything is sent. Raises RankLost if it could not be."""
        if self._thread.is_alive():
            self._outbox.put(None)
            self._thread.join()
        if self.error is not None:
            raise RankLost(f"a rank is gone: {self.error}")


class Engine:
    """Rank 0's engine: takes requests, runs batches over all ranks, gives outputs.

    Only one exists at a time in a world. Raises StartupError where it cannot be built; the other ranks then wait for
    the next.
    """

    def __init__(self, world: World, courier: Courier, config: EngineConfig, *, number: int = 0,
                 is_server: bool = False, progress: Callable[[str], None] | None = None,
                 started: Callable[[list[str]], None] | None = None):  # fmt: skip
        """progress: told each phase of the start. started: told, before they first run, which requests do."""
        topology = Topology.resolve(world.size, config.tensor_parallel_size, config.pipeline_parallel_size)
        self._world, self._courier, self._topology = world, courier, topology
        courier.idle_seconds = min(IDLE_SECONDS, config.distributed_timeout_seconds / 4)
        self._name = f"engine{number}"
        world.watchdog.phase("building", slow=True)  # before the others are asked to: from here on they may be silent
        courier.send(Kind.BUILD, {"config": encode_config(config), "name": self._name, "is_server": is_server})
        phases = Phases(world, self._name, is_server, progress)
        self.built: Built = build(world, config, phases)
        phases.run("getting ready", lambda: None)
        world.watchdog.phase("serving")
        self.config, self.model_config = config, self.built.model_config
        self.max_model_len = self.built.max_model_len
        self.scheduler = Scheduler(
            BlockPool(self.built.num_blocks, config.block_size),
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            pp_size=topology.pp_size,
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._receiver = threading.Thread(target=self._receive_results, name="results", daemon=True)
        if self.built.groups.results is not None:
            self._receiver.start()
        self._clock = Clock()
        self._heartbeats = Heartbeats(world.store, self._name, topology)  # all have beaten: they are ready
        self._started = started
        self._step_tokens: deque[int] = deque(maxlen=MAX_STEPS_TOLD)  # of the steps that no stats_message() told of
        self._reported = 0.0
        self._last_step = 0
        self._stats_sent, self._stats_told_work = -math.inf, False
        # Set by an exception inside a step: the scheduler then counts on batches that never ran, so nothing may follow.
        # Its words, for the exception itself refers to frames, and so to the tensors of the step.
        self.broken: str | None = None
        self._closed = False
        self._log = ThroughputLog(self.scheduler)

    # ------------------------------------------------------------------ requests

    def submit(self, request: Request, alone: bool = False) -> None:
        """Queues a request that was checked (`check_request`). alone: as Scheduler.add has it."""
        self.scheduler.add(request, alone)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one choice of it; nothing more comes of it."""
        self.scheduler.abort(request_id, choice)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[Output]:
        """Fills the pipeline, then waits for its oldest batch. Call it while there is work.

        No outputs come where nothing was sampled, and where other ranks take longer than RESULT_SECONDS: call again.
        Raises RankLost when another rank is gone. After any exception the engine is broken: it can only be closed.
        """
        if self.broken is not None:
            raise RankLost(f"the engine stopped earlier ({self.broken}); close it and build another")
        try:
            return self._step()
        except BaseException as error:
            self.broken = repr(error)
            self._rest()
            raise

    def _step(self) -> list[Output]:
        self._clock.start()
        self._world.watchdog.work_out(True)
        while (batch := self.scheduler.next()) is not None:
            self._run(batch)
        if not self.scheduler.num_in_flight:  # everything was aborted meanwhile
            self._rest()
            return []
        self._world.watchdog.progress(self._last_step, waits=True)
        try:
            result = self._results.get(timeout=RESULT_SECONDS)
        except queue.Empty:
            return []
        if isinstance(result, BaseException):
            raise RankLost(f"the rank that samples is gone: {result}")
        outputs = self.scheduler.update(result)
        if not self.has_work:
            self._rest()
        self.log_stats()
        return outputs

    def _rest(self) -> None:
        """There is nothing to do: from here on nothing is late."""
        self._clock.stop()
        self._world.watchdog.work_out(False)

    def _run(self, batch: Batch) -> None:
        now = time.monotonic()
        if self._world.size > 1 and now - self._reported > REPORT_SECONDS:
            batch.report, self._reported = True, now
        self._step_tokens.append(batch.num_tokens)
        if (started := self.scheduler.take_started()) and self._started is not None:
            self._started(started)
        self._last_step = batch.step
        self._world.watchdog.progress(batch.step)
        self._courier.send_batch(batch)
        try:
            result = self.built.runner.run(batch)
        except RuntimeError as error:
            if self._world.size > 1 and _is_connection_loss(error):
                raise RankLost(f"a rank is gone: {error}") from error
            raise
        if result is not None:
            self._results.put(result)

    def _receive_results(self) -> None:
        frames, generation = self.built.groups.results, self._world.generation
        assert frames is not None
        try:
            while True:
                words = frames.receive().numpy()
                kind = messages.kind_of(words, generation)
                if kind == Kind.CLOSE:
                    return
                if kind == Kind.STEP:
                    self._results.put(messages.decode_result(words, generation))
        except (RuntimeError, ValueError) as error:
            self._results.put(error)

    # ------------------------------------------------------------------ figures

    def pipeline_time(self) -> PipelineTime:
        """Busy seconds of each stage, at most REPORT_SECONDS old."""
        self._heartbeats.read(self.built.runner.busy_seconds)
        return PipelineTime(self._clock.seconds, self._heartbeats.stage_busy)

    @property
    def stats_due(self) -> bool:
        """Whether the frontend should be told: once a second, and as soon as work begins or is done."""
        return self._stats_told_work != self.has_work or time.monotonic() - self._stats_sent >= STATS_SECONDS

    def stats_message(self) -> EngineStats:
        """How the engine is doing, for the frontend. Costs a round trip to the store where there are several ranks."""
        scheduler, stats, pipeline = self.scheduler, self.scheduler.stats, self.pipeline_time()
        self._stats_sent, self._stats_told_work = time.monotonic(), self.has_work
        step_tokens, self._step_tokens = list(self._step_tokens), deque(maxlen=MAX_STEPS_TOLD)
        return EngineStats(
            num_running=len(scheduler.running), num_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.kv_cache_usage, num_preemptions=stats.num_preemptions,
            prefix_cache_queries=stats.prefix_cache_queries, prefix_cache_hits=stats.prefix_cache_hits,
            iteration_tokens=step_tokens, active_seconds=pipeline.active, stage_busy_seconds=pipeline.busy,
            heartbeat_ages=self._heartbeats.ages,
        )  # fmt: skip

    def log_stats(self) -> None:
        """Logs the throughput line when one is due."""
        if not self.config.disable_log_stats and self._log.due():
            self._log.log(self.pipeline_time())

    # ------------------------------------------------------------------ end

    def close(self) -> None:
        """Ends the engine on every rank and gives its memory back; the followers wait for the next one.

        Raises RankLost for a broken engine over several ranks: they may be anywhere in the step that broke it.
        """
        if self._closed:
            return
        if self.broken is None:
            self._drain()
        elif self._world.size > 1:
            raise RankLost(f"the engine stopped ({self.broken}), and with it the other ranks")
        self.built.close()
        self._closed = True

    def _drain(self) -> None:
        """Waits for the batches in flight, whose requests end, and tells the other ranks that no more will come."""
        for request_id in list(self.scheduler.unfinished()):
            self.scheduler.abort(request_id)
        while self.scheduler.num_in_flight:
            self.step()
        self._courier.send(Kind.CLOSE)
        if self._receiver.is_alive():
            self._receiver.join()


class Follower:
    """Every rank but 0: builds what it is told to build, runs what it is told to run."""

    def __init__(self, world: World):
        self._world = world
        self._generation = world.generation
        self._inbox: queue.SimpleQueue[tuple[Kind, Any] | BaseException] = queue.SimpleQueue()
        self._built: Built | None = None
        self._heart: Heart | None = None
        self._receiver = threading.Thread(target=self._receive, name="batches", daemon=True)

    def run(self) -> None:
        """Serves rank 0 until it says EXIT. Raises RankLost when another rank is gone, ValueError for a message that is
        none of this generation's or that does not fit what this rank knows: its sender's fault, and no rank goes on."""
        self._receiver.start()
        while True:
            try:
                item = self._inbox.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                self._beat()
                continue
            if isinstance(item, ValueError):
                raise item
            if isinstance(item, BaseException):
                raise RankLost(f"rank 0 is gone: {item}")
            kind, payload = item
            if kind == Kind.EXIT:
                return
            if kind == Kind.STEP:
                self._step(payload)
            elif kind == Kind.IDLE:
                self._answer(Kind.IDLE)
            elif kind == Kind.BUILD:
                self._build(payload)
            elif kind == Kind.CLOSE:
                self._close()

    def _answer(self, kind: Kind) -> None:
        """Sends a message without a result to rank 0, which always waits for one from the sampling rank."""
        if self._built is not None and self._built.groups.results is not None:
            words = messages.encode_control(kind, self._generation)
            self._built.groups.results.send(torch.from_numpy(words))

    def _receive(self) -> None:
        """Always has a receive posted, so that rank 0 never waits for this rank's computing."""
        kind, last_step = None, 0
        try:
            while kind != Kind.EXIT:
                kind, payload = messages.decode(self._world.frames.receive().numpy(), self._generation)
                if kind == Kind.BUILD:
                    last_step = 0
                if kind == Kind.STEP:
                    last_step = messages.check_step(payload, last_step)
                    if self._built is not None:
                        self._built.runner.receive(payload)
                self._inbox.put((kind, payload))
        except (RuntimeError, ValueError) as error:
            self._inbox.put(error)

    def _build(self, payload: dict[str, Any]) -> None:
        name = payload["name"]
        phases = Phases(self._world, name, payload["is_server"])
        assert self._world.store is not None, "a world with followers has a store"
        self._heart = Heart(self._world.store, name, self._world.rank)
        # On failure rank 0 tells the user; this rank waits for what comes next.
        with contextlib.suppress(StartupError):
            self._built = build(self._world, decode_config(payload["config"]), phases)
            phases.run("getting ready", self._beat)  # rank 0 sends steps once every rank has its runner in place
            self._world.watchdog.phase("serving")

    def _beat(self) -> None:
        """Tells rank 0 that this loop goes round. Nobody listens while no engine is built."""
        if self._built is None or self._heart is None:
            return
        try:
            self._heart.beat(self._built.runner.busy_seconds)
        except RuntimeError as error:
            raise RankLost(f"the store is gone: {error}") from error

    def _step(self, batch: Batch) -> None:
        built = self._built
        assert built is not None, "a batch came before an engine was built"
        self._world.watchdog.work_out(True)
        self._world.watchdog.progress(batch.step)
        try:
            result = built.runner.run(batch)
            if result is not None:
                assert built.groups.results is not None
                built.groups.results.send(torch.from_numpy(messages.encode_result(result, self._generation)))
        except RuntimeError as error:
            if _is_connection_loss(error):
                raise RankLost(f"a rank is gone: {error}") from error
            raise
        self._world.watchdog.work_out(False)
        if batch.report:
            self._beat()

    def _close(self) -> None:
        self._answer(Kind.CLOSE)
        if self._built is not None:
            self._built.close()
            self._built = None


def _is_connection_loss(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("connection closed", "connection reset", "timed out", "gloo/transport"))


def follow(world: World) -> NoReturn:
    """Runs a follower to its end and ends the process: status 0 when rank 0 said so, 1 on a loss or an error."""
    if threading.current_thread() is threading.main_thread():
        orders = Orders()
        hear_signals(lambda number: _take_order(world.watchdog, orders.take(number)))
    status = 0
    try:
        Follower(world).run()
        leave(world)
    except RankLost as lost:
        world.watchdog.lost(str(lost))
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _take_order(watchdog: Watchdog, order: Order) -> None:
    """A signal has come to a follower. Rank 0 ends all ranks when it is time to, and a torchrun that waits no longer.

    One that comes because a rank was lost is no order: the sooner this process is gone, the sooner all are back.
    """
    if watchdog.is_any_lost():
        watchdog.lost("another rank has ended, and torchrun ends this one")
    if order:
        watchdog.pass_on(order)


def leave(world: World) -> None:
    """The last thing all ranks do together."""
    if world.size > 1:
        world.barrier()
        world.destroy()
