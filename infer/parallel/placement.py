"""Which part of the model is mine: layers over pipeline stages, heads, rows and columns over tensor-parallel ranks.

Pure arithmetic, no torch. Nothing has to divide: every split is as even as it can be, and what a rank holds is data
(ranges), never `dim // tp`.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from infer.models.config import ModelConfig


def split(total: int, parts: int) -> list[range]:
    """[0, total) in `parts` successive ranges whose lengths differ by at most one, the longer ones first."""
    length, longer = divmod(total, parts)
    starts = [part * length + min(part, longer) for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


@dataclass(frozen=True)
class HeadShard:
    """The attention heads of one rank, as intervals of the model's heads.

    kv_map: for each local query head, the local index of the KV head it reads.
    """

    query: range
    kv: range
    kv_map: tuple[int, ...]


def split_heads(num_heads: int, num_kv_heads: int, tp_size: int) -> list[HeadShard]:
    """Query heads as evenly as they go; each rank holds every KV head its query heads read.

    A KV head whose query heads lie on two ranks is held by both: 9 query and 3 KV heads over 2 ranks are 5 and 4, with
    KV head 1 on each.
    """
    group = num_heads // num_kv_heads
    shards = []
    for query in split(num_heads, tp_size):
        kv = range(query.start // group, (query.stop - 1) // group + 1)
        shards.append(HeadShard(query, kv, tuple(head // group - kv.start for head in query)))
    return shards


def check_tensor_parallel(c: "ModelConfig", tp_size: int) -> None:
    """Raises ValueError, naming the largest size that works, where a rank would hold no part of a layer."""
    limits = {"attention heads": c.num_heads, "MLP columns": c.intermediate_size, "vocabulary rows": c.vocab_size}
    for what, count in limits.items():
        if tp_size > count:
            raise ValueError(
                f"tensor_parallel_size {tp_size} is more than the model's {count} {what}; "
                f"the largest that works is {min(limits.values())}"
            )


def balanced_layers(c: "ModelConfig", pp_size: int, partition: tuple[int, ...] | None = None) -> list[range]:
    """The layers of each pipeline stage.

    partition: layers of each stage, where the user chose them. Otherwise the slowest stage is made as fast as can be,
    a layer costing its parameter count and the head, on the last stage, vocab_size * hidden_size. The embedding is a
    lookup and costs nothing to compute; but it takes memory, so stages after the first take the odd layers.
    Raises ValueError where a stage would have no layer, or the partition does not sum to the model's layers.
    """
    if pp_size > c.num_layers:
        raise ValueError(
            f"pipeline_parallel_size {pp_size} is more than the model's {c.num_layers} layers; "
            f"the largest that works is {c.num_layers}"
        )
    if partition is not None:
        return _explicit_layers(c, pp_size, partition)
    head = c.vocab_size * c.hidden_size / c.layer_parameters

    def counts(last: int) -> list[int]:
        others = [len(part) for part in split(c.num_layers - last, pp_size - 1)] if pp_size > 1 else []
        return [*reversed(others), last]

    def loads(candidate: list[int]) -> list[float]:
        # Sorted from the slowest stage down, so that ties go to the more even partition.
        return sorted([*candidate[:-1], candidate[-1] + head], reverse=True)

    last_stage = range(1, c.num_layers - pp_size + 2) if pp_size > 1 else [c.num_layers]
    return _successive(min(map(counts, last_stage), key=loads))


def _explicit_layers(c: "ModelConfig", pp_size: int, partition: tuple[int, ...]) -> list[range]:
    text = ",".join(map(str, partition))
    if len(partition) != pp_size or min(partition) < 1:
        raise ValueError(f"pipeline_layer_partition {text} must be {pp_size} positive layer counts, one a stage")
    if sum(partition) != c.num_layers:
        raise ValueError(
            f"pipeline_layer_partition {text} sums to {sum(partition)}, but the model has {c.num_layers} layers"
        )
    return _successive(list(partition))


def _successive(counts: list[int]) -> list[range]:
    starts = [sum(counts[:stage]) for stage in range(len(counts) + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor and the block of it that this rank holds.

    name        the tensor's name in the checkpoint
    shape       its global shape
    part        the interval held of each dimension, as the checkpoint has them
    transposed  the checkpoint has [in, out] where the parameter is [out, in] (GPT-2)
    order       the parameter's rows are these of the block, counted after transposing; None: all, as they come
    offset      is added to every value (Gemma's norms are stored less one)
    """

    name: str
    shape: tuple[int, ...]
    part: tuple[range, ...]
    transposed: bool = False
    order: tuple[int, ...] | None = None
    offset: float = 0.0

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Of the block, as the checkpoint has it."""
        return tuple(len(interval) for interval in self.part)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the block's place in the parameter."""
        return self.held_shape[::-1] if self.transposed else self.held_shape


@dataclass(frozen=True)
class WeightSpec:
    """The declaration of one parameter: the blocks of its sources, stacked along dim 0 in order.

    Allocation, loading, dummy weights and the memory planner all read this and nothing else.
    init: what dummy weights are made of: random values, or ones.
    """

    sources: tuple[Source, ...]
    init: Literal["random", "ones"] = "random"

    @property
    def local_shape(self) -> tuple[int, ...]:
        shapes = [source.local_shape for source in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def local_numel(self) -> int:
        return math.prod(self.local_shape)
