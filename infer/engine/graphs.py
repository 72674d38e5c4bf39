"""CUDA graphs for batches that only decode: one launch instead of the hundreds a stage has.

A graph replays the same kernels on the same addresses, so such batches are padded to one of a few sizes (buckets) and
copied into buffers that stay. A bucket's first batch runs op by op, which also loads and warms whatever its shapes
need; its second is captured, and it is replayed from then on. So nothing is captured before it is wanted, the server
serves at once, and the graphs appear in increasing order of use.

Which bucket a batch takes, and whether it captures, depends on the batches alone: all ranks of a stage, which see the
same ones, capture the same collectives at the same step without a word about it.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from infer import native
from infer.cache.pages import Pages
from infer.config import EngineConfig
from infer.engine.batch import COUNT, FLAGS, PROMPT_LOGPROBS, SAMPLE, Batch
from infer.engine.inputs import Inputs, Shape, forward_context, on_device
from infer.engine.tape import Forward
from infer.layers.moe import MoE
from infer.models.decoder import DecoderLayer, Stage

logger = logging.getLogger(__name__)

# Work without arguments or result: it reads and writes tensors that outlive it.
Work = Callable[[], None]


class Graph(Protocol):
    """Captured work: the part of torch.cuda.CUDAGraph that is used here."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


Capture = Callable[[Work], Graph]

FIRST_SIZES = (1, 2, 4)
SIZE_STEP = 8

# What the driver keeps of a graph, for each layer: about a dozen kernels with their arguments, on the safe side.
GRAPH_BYTES_PER_LAYER = 512 << 10

# What cuBLAS keeps for the stream of captures, on the safe side: torch gives it 32 MiB on the largest GPUs.
WORKSPACE_BYTES = 64 << 20


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ..., and the largest batch itself."""
    sizes = [*FIRST_SIZES, *range(SIZE_STEP, max_num_seqs, SIZE_STEP)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def largest_batch(config: EngineConfig) -> int:
    """Sequences of the largest batch that only decodes."""
    return min(config.max_num_seqs, config.max_num_batched_tokens)


def is_decode_only(batch: Batch) -> bool:
    """Whether every sequence has one row, after which a token is drawn, and nothing else is asked for."""
    flags = batch.rows[:, FLAGS] & (SAMPLE | PROMPT_LOGPROBS)
    return bool(np.all(batch.rows[:, COUNT] == 1) and np.all(flags == SAMPLE))


def why_off(config: EngineConfig, stage: Stage, tp_size: int, local_world_size: int) -> str:
    """What stands against graphs, for the log; empty where they can be used."""
    attention, weight = cast(DecoderLayer, stage.layers[0]).attention, next(stage.parameters())
    device, dtype = weight.device, weight.dtype
    if device.type != "cuda":
        return f"this is a {device.type}"
    if config.enforce_eager:
        return "--enforce-eager"
    if stage.config.mla is not None:
        return "multi-head latent attention has no CUDA kernel, and its PyTorch form reads lengths back"
    if not native.decode_runs_on_device(attention.num_q, stage.kv_layout, dtype, device):
        return "some op has no CUDA kernel here, and its PyTorch reference reads lengths back"
    if any(isinstance(module, MoE) and not module.runs_on_device() for module in stage.modules()):
        return "the experts' products read back how many rows each has, which only bfloat16 on newer GPUs need not do"
    if tp_size > 1 and local_world_size > torch.cuda.device_count():
        return "ranks share a GPU, so that a layer's sums go through the host, which no graph can hold"
    return ""


def reserved_bytes(config: EngineConfig, stage: Stage, dtype: torch.dtype, max_model_len: int) -> int:
    """Device memory that DecodeGraphs takes in all, beside the pool, which one pass of the largest batch needs."""
    largest, hidden_size = largest_batch(config), stage.config.hidden_size
    graphs = len(bucket_sizes(largest)) * stage.num_layers * GRAPH_BYTES_PER_LAYER
    table_width = -(-max_model_len // config.block_size)
    row = 0 if stage.is_first else hidden_size
    row += _output_size(stage) if stage.is_last else hidden_size * (config.pipeline_parallel_size + 2)
    return WORKSPACE_BYTES + graphs + largest * (row * dtype.itemsize + 4 * table_width)


def _output_size(stage: Stage) -> int:
    """Elements of a row of what DecodeGraphs.run returns."""
    return stage.vocab_range[1] - stage.vocab_range[0] if stage.is_last else stage.config.hidden_size


class CudaCapture:
    """Captures work into CUDA graphs that share one pool of memory.

    A pool grows by what a capture does not find free in it, in pieces that later captures use only where they fit.
    Small batches are captured before larger ones, whose tensors fit none of the pieces, and the pool would grow to the
    sum of all. So the first capture takes as much as the largest work needs in one piece, which the others divide.
    """

    def __init__(self, device: torch.device, pool_bytes: int):
        """pool_bytes: what the largest work takes at once."""
        self._device, self._pool_bytes = device, pool_bytes
        self._pool = torch.cuda.graph_pool_handle()
        self._whole: Graph | None = None  # keeps the piece in the pool

    def __call__(self, work: Work) -> Graph:
        """Raises torch.OutOfMemoryError."""
        if self._whole is None:
            self._prepare_stream()
            self._whole = self._capture(self._take_pool)
        return self._capture(work)

    def _prepare_stream(self) -> None:
        """Lets cuBLAS have its workspace outside of the pool, whose memory it would keep when all graphs are gone."""
        with torch.cuda.stream(_capture_stream(self._device)):
            x = torch.ones(16, 16, device=self._device)
            torch.mm(x, x)

    def _capture(self, work: Work) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of this process, NCCL's watchdog among them, may call CUDA meanwhile.
        stream = _capture_stream(self._device)
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph

    def _take_pool(self) -> None:
        piece = torch.empty(self._pool_bytes, dtype=torch.uint8, device=self._device)
        piece[:1].zero_()  # torch warns of a graph that does nothing


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the life of the process, as cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Bucket:
    """The graph of one batch size: from static inputs to static outputs."""

    def __init__(self, size: int, inputs: Inputs[Tensor], work: Work):
        self.size, self.inputs, self.work = size, inputs, work
        self.is_warm = False  # its ops have run one by one
        self.found_no_memory = False  # for a graph, so that its ops go on so
        self.graph: Graph | None = None


class DecodeGraphs:
    """Runs a stage on batches that only decode, through one graph a bucket.

    A sequence that pads a bucket has no rows and no keys (query_start is the end of the rows, seq_lens 0), and the rows
    that pad it have no sequence and write nothing (slot -1). Every row of a result depends on its own row alone, so
    what the padding computes does not matter.
    """

    # The buffers are made as a batch's tensors are, since torch.compile compiles again for tensors of the other kind.
    @torch.inference_mode()
    def __init__(
        self,
        stage: Stage,
        forward: Forward,
        pages: Pages,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        depth: int,
        tp_size: int,
        capture: Capture,
    ):
        """forward: the stage's. depth: batches in flight, at most. capture: work to its graph; see CudaCapture.

        max_model_len decides the width of the block table that kernels see, and with it how they split their work:
        nothing that is captured may depend on the lengths of the moment.
        """
        device, dtype = pages.k[0].device, pages.k[0].dtype
        self._stage, self._forward, self._pages, self._capture = stage, forward, pages, capture
        self._max_model_len, self._tp_size = max_model_len, tp_size
        self._sizes, self._buckets = bucket_sizes(max_num_seqs), dict[int, Bucket]()

        # The buckets share their buffers: batches run one after another.
        hidden_size = stage.config.hidden_size
        self._head = torch.zeros(Shape(max_num_seqs, max_num_seqs, 0, 0).num_bytes, dtype=torch.uint8, device=device)
        width = -(-max_model_len // block_size)
        self._block_table = torch.zeros(max_num_seqs, width, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(0 if stage.is_first else max_num_seqs, hidden_size, dtype=dtype, device=device)
        self._output = torch.zeros(max_num_seqs, _output_size(stage), dtype=dtype, device=device)
        # What goes to the next stage is copied out. A copy is sent by the time that `depth` later ones have been made,
        # since the result of its batch is back before so many follow.
        self._sent = [] if stage.is_last else [torch.empty_like(self._output) for _ in range(depth + 1)]
        self._turn = 0

    def size_for(self, batch: Batch) -> int:
        """The bucket of a batch; 0 for one that is not for graphs."""
        num_seqs = len(batch.rows)
        if not 0 < num_seqs <= self._sizes[-1] or not is_decode_only(batch):
            return 0
        return next(size for size in self._sizes if size >= num_seqs)

    def run(self, inputs: Inputs[Tensor], x: Tensor, num_seqs: int) -> Tensor:
        """One step of a batch that `size_for` gave a bucket.

        inputs: the batch on the device, padded to its bucket, without sampled rows. x [num_seqs, hidden]: the previous
        stage's output; the first stage reads inputs.tokens. Returns the stage's output [num_seqs, hidden], or on the
        last stage the logits [num_seqs, local vocabulary], valid until the next call. Raises RuntimeError where there
        is no memory for a graph that holds collectives.
        """
        size = len(inputs.seq_lens)
        bucket = self._buckets.get(size) or self._make(size)
        bucket.inputs.head.copy_(inputs.head)
        # Blocks beyond this width stay from earlier batches; no sequence has so many keys now.
        bucket.inputs.block_table[:, : inputs.block_table.shape[1]].copy_(inputs.block_table)
        if not self._stage.is_first:
            self._hidden[:num_seqs].copy_(x)

        if bucket.graph is None and bucket.is_warm and not bucket.found_no_memory:
            self._capture_bucket(bucket)
        if bucket.graph is not None:
            bucket.graph.replay()
        else:
            bucket.work()
            bucket.is_warm = True
        return self._result(num_seqs)

    def close(self) -> None:
        """Ends the graphs, none of which may be running. NCCL does not end a group whose operations a graph holds."""
        for bucket in self._buckets.values():
            if bucket.graph is not None:
                bucket.graph.reset()
        self._buckets.clear()

    def _result(self, num_seqs: int) -> Tensor:
        if self._stage.is_last:
            return self._output[:num_seqs]
        self._turn = (self._turn + 1) % len(self._sent)
        return self._sent[self._turn][:num_seqs].copy_(self._output[:num_seqs])

    def _make(self, size: int) -> Bucket:
        """A bucket on the shared buffers, not captured yet."""
        inputs = on_device(self._head, Shape(size, size, 0, 0))
        inputs = dataclasses.replace(inputs, block_table=self._block_table[:size])
        context = forward_context(inputs, self._pages, 1, self._max_model_len)
        x = inputs.tokens if self._stage.is_first else self._hidden[:size]
        output = self._output[:size]

        def work() -> None:
            hidden = self._forward(x, context)
            output.copy_(self._stage.logits(hidden) if self._stage.is_last else hidden)

        self._buckets[size] = Bucket(size, inputs, work)
        return self._buckets[size]

    def _capture_bucket(self, bucket: Bucket) -> None:
        """Gives the bucket its graph. Without memory for it: an error, or none where no other rank has a part in it."""
        started = time.perf_counter()
        try:
            bucket.graph = self._capture(bucket.work)
        except torch.OutOfMemoryError as error:
            problem = f"no memory to capture the CUDA graph of {bucket.size} sequences"
            if self._tp_size > 1:  # NCCL wants an operation captured by all of its ranks, or by none
                raise RuntimeError(
                    f"{problem}: a smaller --gpu-memory-utilization leaves more, --enforce-eager needs none"
                ) from error
            logger.warning(
                "%s, such batches run op by op (a smaller --gpu-memory-utilization leaves more): %s",
                problem, str(error).splitlines()[0],
            )  # fmt: skip
            bucket.found_no_memory = True
            return
        seconds = time.perf_counter() - started
        logger.info("captured the CUDA graph of %d sequences in %.2f s", bucket.size, seconds)
