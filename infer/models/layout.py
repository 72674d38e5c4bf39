"""What each rank of a layout would hold, found by building its stage on the meta device, where nothing is allocated."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from infer.layers.declare import declared
from infer.models.config import ModelConfig
from infer.models.decoder import Stage, balanced_layers
from infer.parallel.groups import Group
from infer.parallel.placement import Source, check_tensor_parallel, split, split_heads
from infer.parallel.topology import Topology

Box = tuple[range, ...]


@dataclass(frozen=True)
class RankShare:
    """What one rank holds: layers of the model, heads of each layer, bytes.

    num_kv_heads: 0 where a latent is kept instead, on every rank.
    num_experts: routed experts of each sparse layer that it holds at least a part of; 0: there are none.
    """

    rank: int
    pp: int
    tp: int
    layers: range
    is_first: bool
    is_last: bool
    num_heads: int
    num_kv_heads: int
    num_experts: int
    parameter_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Layout:
    """A model over the ranks of a topology.

    num_parameters: of the model; what several ranks hold a copy of is counted once.
    """

    ranks: tuple[RankShare, ...]
    num_parameters: int


def plan_layout(
    c: ModelConfig, topology: Topology, partition: tuple[int, ...] | None = None, expert_parallel: bool = False
) -> Layout:
    """Every rank's share. Raises ValueError, naming the largest size that works, where a rank would hold nothing.

    partition: layers of each stage, where the user chose them.
    """
    check_tensor_parallel(c, topology.tp_size, expert_parallel)
    stages = balanced_layers(c, topology.pp_size, partition)
    boxes: dict[str, set[Box]] = {}
    shares = []
    for rank in range(topology.world_size):
        pp, tp = topology.coordinates(rank)
        group = Group(list(range(topology.tp_size)), tp, None)  # no rank of it is asked anything
        is_first, is_last = pp == 0, pp == topology.pp_size - 1
        stage = Stage(
            c, stages[pp], group, is_first=is_first, is_last=is_last, dtype=getattr(torch, c.dtype),
            device=torch.device("meta"), expert_parallel=expert_parallel,
        )  # fmt: skip
        for source in _sources(stage):
            boxes.setdefault(source.name, set()).add(source.part)
        heads = split_heads(c.num_heads, c.num_kv_heads, topology.tp_size)[tp]
        shares.append(
            RankShare(
                rank=rank,
                pp=pp,
                tp=tp,
                layers=stages[pp],
                is_first=is_first,
                is_last=is_last,
                num_heads=len(heads.query),
                num_kv_heads=0 if c.mla is not None else len(heads.kv),
                num_experts=_experts_held(c, topology.tp_size, tp, expert_parallel),
                parameter_bytes=stage.parameter_bytes,
                kv_bytes_per_token=stage.kv_bytes_per_token,
            )
        )
    alike = Counter(map(frozenset, boxes.values()))  # thousands of experts are split in the same way
    return Layout(tuple(shares), sum(volume(list(parts)) * count for parts, count in alike.items()))


def _experts_held(c: ModelConfig, tp_size: int, tp: int, expert_parallel: bool) -> int:
    if c.moe is None:
        return 0
    return len(split(c.moe.num_experts, tp_size)[tp]) if expert_parallel else c.moe.num_experts


def _sources(stage: Stage) -> Iterator[Source]:
    for _, spec in declared(stage):
        yield from spec.sources


def volume(boxes: Sequence[Box]) -> int:
    """Elements that lie in at least one of the boxes, each a product of as many intervals."""
    if len(boxes) <= 1 or not boxes[0]:
        return sum(math.prod(map(len, box)) for box in boxes)
    cuts = sorted({edge for box in boxes for edge in (box[0].start, box[0].stop)})
    return sum(
        (b - a) * volume(list({box[1:] for box in boxes if box[0].start <= a < box[0].stop})) for a, b in pairwise(cuts)
    )
