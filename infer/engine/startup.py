"""From a config to a stage that can run: named phases that all ranks pass together."""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from infer import launch, ops_cuda, ops_gathered
from infer.cache import pages
from infer.config import EngineConfig
from infer.engine.grammar import Grammars, make_grammars
from infer.engine.graphs import CudaCapture, largest_batch, reserved_bytes, why_off
from infer.engine.runner import Runner
from infer.engine.sampler import Sampler
from infer.layers.attention import ForwardContext
from infer.models.config import ModelConfig
from infer.models.decoder import Stage, balanced_layers
from infer.models.source import read_model
from infer.parallel.groups import Groups, World, alone
from infer.parallel.placement import check_tensor_parallel
from infer.parallel.topology import Topology
from infer.weights import Checkpoint, check_tied, check_weights, init_dummy_weights, load_weights

logger = logging.getLogger(__name__)
T = TypeVar("T")

SLOW_PHASE_SECONDS = 30.0


class StartupError(ValueError):
    """A phase failed on some rank. The message is one line for the user."""


class Phases:
    """Runs named start-up phases. All ranks finish a phase, or all learn which rank failed and why.

    A rank reports through the store, so that one that fails never leaves the others in a collective.
    is_server: a rank other than 0 that fails ends its process at once, and torchrun then ends the server as a whole;
    in a script it reports, and rank 0 raises, which may go on.
    """

    def __init__(self, world: World, name: str, is_server: bool, progress: Callable[[str], None] | None = None):
        self._world, self._name, self.is_server = world, name, is_server
        self._progress = progress or (lambda phase: None)
        self.seconds: dict[str, float] = {}

    def run(self, phase: str, work: Callable[[], T], *, collective: bool = False) -> T:
        """Runs `work` on this rank and waits for the others. Raises StartupError on every rank if one failed.

        collective: the ranks exchange something within; one that fails ends its process, since others wait for it.
        """
        self._progress(phase)
        watchdog = self._world.watchdog
        watchdog.phase(phase, slow=True)
        watchdog.work_out(True)
        started = time.monotonic()
        error: str | None = None
        value = None
        try:
            value = work()
        except ValueError as problem:
            error = str(problem)
        except Exception as problem:
            logger.exception("rank %d failed while %s", self._world.rank, phase)
            error = f"{phase} failed: {type(problem).__name__}: {problem}"
            if collective and self._world.size > 1:
                launch.fail(f"rank {self._world.rank}: {error}", self._world.env, code=1)
        try:
            self._settle(phase, error)
        finally:
            watchdog.work_out(False)
        self.seconds[phase] = time.monotonic() - started
        return value  # type: ignore[return-value]

    def _settle(self, phase: str, error: str | None) -> None:
        world = self._world
        if world.store is None:
            if error is not None:
                raise StartupError(error)
            return
        if error is not None and self.is_server and world.rank != 0:
            launch.fail(f"rank {world.rank}: {error}", world.env)
        key = f"{self._name}/{phase}"
        world.store.set(f"{key}/{world.rank}", error or "")
        if world.rank == 0:
            world.store.set(f"{key}/verdict", self._verdict(key, phase))
        verdict = _wait(world, f"{key}/verdict")
        if verdict:
            raise StartupError(verdict)

    def _verdict(self, key: str, phase: str) -> str:
        """Rank 0 waits for every rank's word. The first error counts; equal errors are told once."""
        store = self._world.store
        assert store is not None
        missing, errors = set(range(self._world.size)), dict[int, str]()
        started = warned = failed = time.monotonic()
        while missing and not (errors and time.monotonic() - failed > 1.0):  # others may be about to say the same
            for rank in sorted(missing):
                if store.check([f"{key}/{rank}"]):
                    word = store.get(f"{key}/{rank}").decode()
                    missing.discard(rank)
                    if word:
                        failed = failed if errors else time.monotonic()
                        errors[rank] = word
            if missing:
                time.sleep(0.01)
            if missing and time.monotonic() - warned > SLOW_PHASE_SECONDS:
                warned = time.monotonic()
                late = ", ".join(map(str, sorted(missing)))
                logger.info("waiting for rank %s: %s (%.0f s so far)", late, phase, warned - started)
        if not errors:
            return ""
        rank, word = min(errors.items())
        return word if len(set(errors.values())) == 1 and len(errors) == self._world.size else f"rank {rank}: {word}"


def _wait(world: World, key: str) -> str:
    assert world.store is not None
    while not world.store.check([key]):
        try:
            world.store.wait([key], timedelta(seconds=60))
        except torch.distributed.DistStoreError:
            continue  # not there yet; a lost store raises another error
    return world.store.get(key).decode()


@dataclass
class Built:
    """What one rank holds once an engine is built."""

    model_config: ModelConfig
    max_model_len: int
    num_blocks: int
    groups: Groups
    runner: Runner

    def close(self) -> None:
        """Ends this rank's part of the engine and gives its memory back. Every rank calls it."""
        self.runner.close()  # first: NCCL does not end a group whose operations a graph holds
        self.groups.close()


@dataclass
class Room:
    """Bytes of a rank's device: for the KV cache, and for the memory pool of CUDA graphs, None where they are off."""

    cache: int
    graph_pool: int | None


def build(world: World, config: EngineConfig, phases: Phases) -> Built:
    """Builds this rank's part of the engine. All ranks call it with the same config.

    Raises StartupError on every rank if one of them failed.
    """
    set_threads(config, world.env)
    topology = Topology.resolve(world.size, config.tensor_parallel_size, config.pipeline_parallel_size)
    path, model_config = phases.run("reading the model's config", lambda: read_model(config))
    max_model_len = config.max_model_len or model_config.max_position
    model_config = dataclasses.replace(model_config, max_position=max_model_len)  # no larger rotary table than needed
    timeout, share_memory = config.distributed_timeout_seconds, not config.disable_custom_all_reduce
    groups = phases.run(
        "connecting ranks", lambda: Groups(world, topology, timeout, share_memory=share_memory).warm_up(),
        collective=True,
    )
    undo = contextlib.ExitStack()  # of what was made, last first
    undo.callback(groups.close)
    try:
        stage = phases.run("loading weights", lambda: _load_stage(world, config, path, model_config, groups))
        room = phases.run(
            "measuring memory", lambda: _measure(world, config, model_config, stage, groups), collective=True
        )
        num_blocks = _agree_on_blocks(config, groups, stage, room.cache, max_model_len)
        grammars = make_grammars(config, path, groups, model_config.vocab_size, torch.get_num_threads())
        runner = phases.run(
            "allocating the KV cache",
            lambda: _make_runner(world, config, model_config, groups, stage, num_blocks, grammars),
        )
        undo.callback(runner.close)
        phases.run(
            "recording the stage", lambda: _choose_forward(config, runner, max_model_len, room.graph_pool),
            collective=True,
        )  # fmt: skip
    except ValueError as error:
        undo.close()
        raise StartupError(str(error)) from None
    if phases.is_server and grammars is not None:
        grammars.warm()  # else the first grammar's batch, and so its neighbours, would wait for it
    if world.rank == 0:
        _log_capacity(num_blocks * config.block_size, max_model_len)
    return Built(model_config, max_model_len, num_blocks, groups, runner)


def _make_runner(
    world: World, config: EngineConfig, model_config: ModelConfig, groups: Groups, stage: Stage, num_blocks: int,
    grammars: Grammars | None,
) -> Runner:  # fmt: skip
    dtype = getattr(torch, model_config.dtype)
    memory = pages.allocate(num_blocks, config.block_size, stage.kv_layout, stage.num_layers, dtype, world.device)
    sampler = Sampler(groups.tp, stage.vocab_starts) if groups.is_last_stage else None
    return Runner(stage, memory, groups, sampler, num_blocks, config.block_size, world.device, grammars)


def _choose_forward(config: EngineConfig, runner: Runner, max_model_len: int, graph_pool: int | None) -> None:
    """How the runner runs its stage: recorded or compiled, and on a GPU as graphs where it can."""
    if config.compile:
        runner.compile()
    else:
        runner.record()
    if graph_pool is not None:
        runner.use_graphs(largest_batch(config), max_model_len, CudaCapture(runner.device, graph_pool))


def _agree_on_graphs(world: World, config: EngineConfig, groups: Groups, stage: Stage) -> bool:
    """Whether batches that only decode run as CUDA graphs: on all ranks or on none, as they hold collectives."""
    reason = why_off(config, stage, groups.topology.tp_size, world.env.local_world_size)
    agreed = bool(groups.all.min(int(not reason)))
    if not agreed and world.device.type == "cuda":
        logger.info("CUDA graphs are off: %s", reason or "another rank cannot run them")
    return agreed


def check(config: EngineConfig, world_size: int, program: str) -> tuple[Path, ModelConfig]:
    """Finds what is wrong with a config, a layout or a checkpoint before any rank builds anything, on rank 0 alone.

    program: as Topology.resolve has it. Raises ValueError.
    """
    topology = Topology.resolve(world_size, config.tensor_parallel_size, config.pipeline_parallel_size, program)
    path, model_config = read_model(config)
    max_model_len = config.max_model_len or model_config.max_position
    if not config.enable_chunked_prefill and config.max_num_batched_tokens < max_model_len:
        raise ValueError(
            f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least max_model_len "
            f"({max_model_len}) when enable_chunked_prefill is off"
        )
    layers = balanced_layers(model_config, topology.pp_size, config.pipeline_layer_partition)
    check_tensor_parallel(model_config, topology.tp_size, config.enable_expert_parallel)
    if config.load_format != "dummy":
        checkpoint = Checkpoint(path)
        check_tied(model_config, checkpoint)
        for pp, mine in enumerate(layers):
            stage = Stage(
                model_config, mine, alone(), is_first=pp == 0, is_last=pp == topology.pp_size - 1,
                dtype=torch.float32, device=torch.device("meta"),
            )  # fmt: skip
            check_weights(stage, checkpoint)
    return path, model_config


def set_threads(config: EngineConfig, env: launch.RankEnv) -> None:
    """CPU threads of this rank. torchrun exports OMP_NUM_THREADS=1 by itself, so that alone is nobody's wish."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.num_threads or max(1, cores // env.local_world_size))


def _load_stage(
    world: World, config: EngineConfig, path: Path, model_config: ModelConfig, groups: Groups
) -> Stage:
    started = time.monotonic()
    layers = balanced_layers(model_config, groups.topology.pp_size, config.pipeline_layer_partition)
    stage = Stage(
        model_config,
        layers[groups.pp_rank],
        groups.tp,
        is_first=groups.is_first_stage,
        is_last=groups.is_last_stage,
        dtype=getattr(torch, model_config.dtype),
        device=world.device,
        expert_parallel=config.enable_expert_parallel,
    )
    source = "random"
    if config.load_format == "dummy":
        init_dummy_weights(stage, config.seed)
    else:
        checkpoint = Checkpoint(path)
        load_weights(stage, checkpoint)
        source = f"{checkpoint.bytes_read:,} bytes read"
    if not config.compile:  # which knows no packed weights, and has matrix products of its own
        stage.pack()
    layer_range = layers[groups.pp_rank]
    logger.info(
        "Model loading took %.2f GiB memory and %.2f seconds (rank %d: layers %d to %d, %s)",
        stage.parameter_bytes / 2**30, time.monotonic() - started, world.rank, layer_range.start, layer_range.stop - 1,
        source,
    )  # fmt: skip
    return stage


def _measure(world: World, config: EngineConfig, model_config: ModelConfig, stage: Stage, groups: Groups) -> Room:
    """What this rank has room for beside its weights, on a GPU by trying the largest batches."""
    pool, peak = None, 0
    has_graphs, max_model_len = _agree_on_graphs(world, config, groups, stage), model_config.max_position
    if world.device.type == "cuda":
        dtype = getattr(torch, model_config.dtype)
        page = pages.allocate(1, config.block_size, stage.kv_layout, stage.num_layers, dtype, world.device)
        if config.kv_cache_memory_bytes is None and not config.num_gpu_blocks_override:
            peak = _peak_bytes(config, stage, page, max_model_len)
        if has_graphs:  # what they use is theirs alone
            pool = _graph_pool_bytes(config, stage, page, max_model_len)
            peak += pool + reserved_bytes(config, stage, dtype, max_model_len)
        # Else what the trials left in the allocator's hands would count twice, that of ranks that share the GPU too.
        torch.cuda.empty_cache()
        groups.all.min(0)
    return Room(pages.available_bytes(config, world.device, world.env.local_world_size, peak), pool)


def _peak_bytes(config: EngineConfig, stage: Stage, page: pages.Pages, max_model_len: int) -> int:
    """What a forward pass takes at most beside weights and cache: of a prompt alone, or of one beside decoding ones."""
    rows, width = config.max_num_batched_tokens, -(-max_model_len // config.block_size)
    sampled = min(config.max_num_seqs, rows)
    mixed = [rows - sampled + 1] + [1] * (sampled - 1)
    contexts = (_trial_context(page, counts, width, max(rows, max_model_len)) for counts in ([rows], mixed))
    # Here every prompt's keys are in the batch; with cached ones, there may be more to gather.
    if stage.kv_layout.values_in_keys:
        room = ops_gathered.gathered_room(page.k[0], max_model_len)
    else:
        room = ops_cuda.gather_room(page.k[0], num_keys=mixed[0], max_model_len=max_model_len)
    return room + max(_trial_bytes(stage, context, sampled) for context in contexts)


def _graph_pool_bytes(config: EngineConfig, stage: Stage, page: pages.Pages, max_model_len: int) -> int:
    """What the largest batch that only decodes takes as a graph; tokens are drawn outside of it."""
    largest, width = largest_batch(config), -(-max_model_len // config.block_size)
    context = _trial_context(page, [1] * largest, width, max_model_len)
    return _trial_bytes(stage, context, largest, draws=False)


def _trial_context(page: pages.Pages, counts: list[int], table_width: int, max_seq_len: int) -> ForwardContext:
    """A batch of so many rows for each sequence, all of whose keys would lie in the one block there is."""
    device, rows = page.k[0].device, sum(counts)
    lengths = torch.tensor(counts, dtype=torch.int32)
    return ForwardContext(
        positions=torch.zeros(rows, dtype=torch.int64, device=device),
        slots=torch.full((rows,), -1, dtype=torch.int64, device=device),
        block_table=torch.zeros(len(counts), table_width, dtype=torch.int32, device=device),
        query_start=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)]).to(device),
        seq_lens=lengths.to(device),
        k_pages=page.k,
        v_pages=page.v,
        max_query_len=max(counts),
        max_seq_len=max_seq_len,
        prefill_keys=sum(count for count in counts if count > 1),
    )


@torch.inference_mode()
def _trial_bytes(stage: Stage, context: ForwardContext, num_sampled: int, *, draws: bool = True) -> int:
    """The most that a forward pass takes at once on the GPU, with the logits of so many rows, and with their draw."""
    device, rows = context.positions.device, len(context.positions)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if stage.is_first:
        x = torch.zeros(rows, dtype=torch.int64, device=device)
    else:
        x = torch.zeros(rows, stage.config.hidden_size, dtype=context.k_pages[0].dtype, device=device)
    hidden = stage(x, context)
    if stage.is_last:
        logits = stage.logits(hidden[:num_sampled])
        if draws:
            logits.float().softmax(-1)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _agree_on_blocks(config: EngineConfig, groups: Groups, stage: Stage, spare: int, max_model_len: int) -> int:
    """The number of blocks that every rank has room for, each by its own bytes per token. Raises ValueError."""
    num_blocks = config.num_gpu_blocks_override or spare // (stage.kv_bytes_per_token * config.block_size)
    if groups.world.rank == 0 and not config.num_gpu_blocks_override:
        logger.info("Available KV cache memory: %.2f GiB", spare / 2**30)
    num_blocks = groups.all.min(num_blocks)
    tightest = -groups.all.min(-stage.kv_bytes_per_token)
    pages.check_fits(
        num_blocks * config.block_size, max_model_len, config.block_size, tightest,
        num_blocks * config.block_size * tightest,
    )  # fmt: skip
    return num_blocks


def _log_capacity(num_tokens: int, max_model_len: int) -> None:
    logger.info("KV cache size: %s tokens", f"{num_tokens:,}")
    logger.info(
        "Maximum concurrency for %s tokens per request: %.2fx", f"{max_model_len:,}", num_tokens / max_model_len
    )


def encode_config(config: EngineConfig) -> dict[str, object]:
    """The config as plain values, for the BUILD message."""
    return dataclasses.asdict(config)


def decode_config(values: dict[str, object]) -> EngineConfig:
    """The inverse of encode_config."""
    return EngineConfig.from_kwargs(**values)
