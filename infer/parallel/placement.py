"""Which part of the model is mine: layers over pipeline stages, heads, rows and columns over tensor-parallel ranks.

Pure arithmetic, no torch. Nothing has to divide: every split is as even as it can be, and what a rank holds is data
(ranges), never `dim // tp`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from infer.models.config import ModelConfig
    from infer.models.moe_config import MoeConfig

HEAD_SHARE = 2 / 3  # of the head's parameters that count: a prompt needs it for its last token only
COLUMN_UNIT = 8  # columns of two bytes each whose rows GPUs' grouped products take: they begin at multiples of 16 bytes


def split(total: int, parts: int) -> list[range]:
    """[0, total) in `parts` successive ranges whose lengths differ by at most one, the longer ones first."""
    length, longer = divmod(total, parts)
    starts = [part * length + min(part, longer) for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def split_columns(total: int, parts: int) -> list[range]:
    """As split, but between multiples of COLUMN_UNIT where the total is one and there are enough."""
    unit = COLUMN_UNIT if total % COLUMN_UNIT == 0 and total // COLUMN_UNIT >= parts else 1
    return [range(unit * part.start, unit * part.stop) for part in split(total // unit, parts)]


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


def check_tensor_parallel(c: "ModelConfig", tp_size: int, expert_parallel: bool = False) -> None:
    """Raises ValueError, naming the largest size that works, where a rank would hold no part of a layer."""
    limits = {"attention heads": c.num_heads, "vocabulary rows": c.vocab_size}
    if c.moe is None or not all(c.moe.sparse):
        limits["MLP columns"] = c.intermediate_size
    if c.moe is not None:
        limits |= _expert_limits(c.moe, expert_parallel)
    elif expert_parallel:
        raise ValueError(f"enable_expert_parallel has no effect on {c.architecture}, which has no experts")
    for what, count in limits.items():
        if tp_size > count:
            raise ValueError(
                f"tensor_parallel_size {tp_size} is more than the model's {count} {what}; "
                f"the largest that works is {min(limits.values())}"
            )


def _expert_limits(moe: "MoeConfig", expert_parallel: bool) -> dict[str, int]:
    limits = {"columns of the shared expert": moe.shared_intermediate_size} if moe.shared_intermediate_size else {}
    if expert_parallel:
        return limits | {"experts, of which each rank needs one (enable_expert_parallel)": moe.num_experts}
    return limits | {"columns of an expert": moe.intermediate_size}


def balanced_layers(c: "ModelConfig", pp_size: int, partition: tuple[int, ...] | None = None) -> list[range]:
    """The layers of each pipeline stage.

    partition: layers of each stage, where the user chose them. Otherwise the slowest stage is made as fast as can be,
    then the next slowest, and so on: a layer costs the parameters that a token meets in it, and the head, on the last
    stage, HEAD_SHARE of its vocab_size * hidden_size. The embedding is a lookup and costs nothing to compute; but it
    takes memory, so stages after the first take the odd layers.
    Raises ValueError where a stage would have no layer, or the partition does not sum to the model's layers.
    """
    if pp_size > c.num_layers:
        raise ValueError(
            f"pipeline_parallel_size {pp_size} is more than the model's {c.num_layers} layers; "
            f"the largest that works is {c.num_layers}"
        )
    if partition is not None:
        return _explicit_layers(c, pp_size, partition)
    return _successive(_balanced_counts(c.active_parameters, int(HEAD_SHARE * c.vocab_size * c.hidden_size), pp_size))


def _balanced_counts(costs: tuple[int, ...], head: int, pp_size: int) -> list[int]:
    """Layers of each stage by dynamic programming, from the last stage back."""
    num_layers = len(costs)
    # best[first]: (loads, the slowest first; counts) of the stages so far, which hold the layers from `first` on. Of
    # equal loads, those with the fewest layers on early stages are the smallest.
    best = {first: ([sum(costs[first:]) + head], [num_layers - first]) for first in range(num_layers)}
    for stages in range(2, pp_size + 1):
        longer = {}
        for first in range(num_layers - stages + 1):
            load, options = 0, list[tuple[list[int], list[int]]]()
            for end in range(first + 1, num_layers - stages + 2):
                load += costs[end - 1]
                loads, counts = best[end]
                if options and load > options[-1][0][0]:  # and so with every later end, too
                    break
                options.append((sorted([load, *loads], reverse=True), [end - first, *counts]))
            longer[first] = min(options)
        best = longer
    return best[0][1]


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

    @cached_property  # of thousands of sources, where there are experts
    def local_shape(self) -> tuple[int, ...]:
        shapes = [source.local_shape for source in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def local_numel(self) -> int:
        return math.prod(self.local_shape)
