"""Sums over CPU ranks of several hosts in two levels: shared memory inside each host, gloo between the hosts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from infer.parallel import shm
from infer.parallel.shm import Introduction, SharedMemory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Levels:
    """The two levels of a group, as one of its ranks sees them.

    members: the ranks of its host, in order. local: their gloo group; None if it is the only one. leaders: a gloo group
    of every host's first rank; None on the others. num_hosts: more than one.
    """

    members: list[int]
    local: dist.ProcessGroup | None
    leaders: dist.ProcessGroup | None
    num_hosts: int


class AcrossHosts:
    """The sums of a group whose ranks are on several hosts: inside each host, then between the hosts' first ranks.

    local: what this rank shares with the others of its host; None where it is alone there. leaders: a gloo group of the
    hosts' first ranks; None on all others. Errors are those of SharedMemory and of gloo.
    """

    def __init__(self, local: SharedMemory | None, leaders: dist.ProcessGroup | None):
        self._local, self._leaders = local, leaders
        self._handle = _across_hosts.add(self)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces a contiguous tensor of one of SUM_DTYPES by its sum over the ranks, the same bits on all of them.

        It is rounded to the dtype inside each host and by every addition between hosts.
        """
        # One op: a tape (infer/engine/tape.py) records the same on a host's first rank, which uses gloo, and on others.
        torch.ops.infer.sum_across_hosts.default(self._handle, tensor)

    def sum(self, tensor: Tensor) -> None:
        """What the op does."""
        if self._local is not None:
            self._local.all_reduce(tensor)
        if self._leaders is not None:
            dist.all_reduce(tensor, group=self._leaders)
        if self._local is not None:
            self._local.broadcast(tensor)

    def close(self) -> None:
        """As SharedMemory's."""
        _across_hosts.remove(self)
        if self._local is not None:
            self._local.close()


class _OpenGroups:
    """Ops take tensors and numbers alone: each open AcrossHosts has a number."""

    def __init__(self) -> None:
        self._groups: dict[int, AcrossHosts] = {}
        self._last = 0

    def add(self, group: AcrossHosts) -> int:
        self._last += 1
        self._groups[self._last] = group
        return self._last

    def remove(self, group: AcrossHosts) -> None:
        self._groups.pop(group._handle, None)

    def sum(self, handle: int, tensor: Tensor) -> None:
        if handle not in self._groups:
            raise ValueError(f"sum_across_hosts: there is no group {handle}, or it is closed")
        self._groups[handle].sum(tensor)


_across_hosts = _OpenGroups()
_library = torch.library.Library("infer", "FRAGMENT")
_library.define("sum_across_hosts(int group, Tensor(a!) x) -> ()")
_library.impl("sum_across_hosts", _across_hosts.sum, "CPU")


def plan(
    ranks: list[int], world: list[Introduction], rank: int, make: Callable[[list[int]], dist.ProcessGroup | None]
) -> Levels | None:
    """The levels of a group of ranks; None where one level does, or this rank (`rank`) is not among them.

    Every rank of the world calls this for the same groups in the same order. world: the introductions, by rank. make:
    makes a gloo group on all ranks of the world; None for a single rank.
    """
    if not all(world[member].usable for member in ranks):
        return None
    by_host: dict[int, list[int]] = {}
    for member in ranks:
        by_host.setdefault(world[member].host, []).append(member)
    hosts = list(by_host.values())
    if len(hosts) == 1 or len(hosts) == len(ranks):
        return None
    locals_ = [make(members) for members in hosts]
    leaders = make([members[0] for members in hosts])
    for members, local in zip(hosts, locals_, strict=True):
        if rank in members:
            return Levels(members, local, leaders if rank == members[0] else None, len(hosts))
    return None


def connect(
    levels: Levels, group: dist.ProcessGroup, ranks: list[int], world: list[Introduction], index: int,
    timeout_seconds: float, slot_bytes: int = shm.SLOT_BYTES,
) -> AcrossHosts | None:  # fmt: skip
    """Joins the ranks of a gloo group, which all call this, each with its levels; None on all where that cannot be.

    index: this rank's place in `ranks`. The other arguments are shm.connect's.
    """
    local, is_alone = None, levels.local is None
    if levels.local is not None:
        place = levels.members.index(ranks[index])
        local = shm.connect(levels.local, levels.members, world, place, timeout_seconds, slot_bytes)
    names = ", ".join(map(str, ranks))
    if shm.count(group, is_alone or local is not None) == len(ranks):
        if index == 0:
            logger.info(
                "ranks %s are on %d hosts: sums go through shared memory inside each, through gloo between them",
                names, levels.num_hosts,
            )  # fmt: skip
        return AcrossHosts(local, levels.leaders)
    if local is not None:
        local.close()
    if index == 0:
        logger.warning("on one host of ranks %s memory cannot be shared: their sums go through gloo", names)
    return None
