"""Hidden states from one CPU rank to the next on one host, through memory that both have mapped.

A hand-over is a copy into a slot, a post, and a copy out of it (kernels/cpu/shm_channel*): no thread, no socket. The
memory is made as in shm.py, but with holes, so that slots may be large: it has pages only as far as batches reached.
"""

import logging
import os
import secrets
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from infer.parallel.shm import Introduction, attempt, make_file, open_file_of, spin_us

logger = logging.getLogger(__name__)

# A slot holds the hidden states of one batch; a larger batch takes several.
SLOT_BYTES = 64 << 20
HEAD_BYTES = 4096  # of the file, which have memory from the beginning: more than lies before the slots


class SharedPipe:
    """One end of a one-way queue of tensors between two CPU ranks of one host.

    Both ends name the same tensors in the same order. They raise RuntimeError, naming the rank, where the other is gone
    or has left, does not come within the timeout, or names another tensor; the pipe is of no use after that.
    """

    def __init__(self, handle: int):
        self._handle: int | None = handle

    def send(self, tensor: Tensor, step: int) -> None:
        """Copies a contiguous tensor into the pipe. Waits only while all slots hold what was not received yet."""
        torch.ops.infer.shm_send.default(self._handle, tensor, step)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, step: int) -> Tensor:
        """Waits for the next tensor."""
        tensor = torch.empty(shape, dtype=dtype)
        torch.ops.infer.shm_receive.default(self._handle, tensor, step)
        return tensor

    def close(self) -> None:
        """Gives the memory back. What was sent can still be received; more is an error at the other end."""
        if self._handle is not None:
            torch.ops.infer.shm_pipe_close.default(self._handle)
            self._handle = None


def connect(
    group: dist.ProcessGroup,
    ranks: list[int],
    world: list[Introduction],
    index: int,
    timeout_seconds: float,
    *,
    num_slots: int,
    slot_bytes: int = SLOT_BYTES,
) -> tuple[SharedPipe | None, SharedPipe | None]:
    """Joins each rank of a gloo group, which all call this, with the next one where both are on one host.

    Gives this rank's pipes from the previous rank and to the next; None where there is none. ranks, world, index: as
    shm.connect has them, ranks rising. num_slots: batches that may be on their way before a sender waits.
    """
    assert ranks == sorted(ranks), "a gloo group numbers its ranks so"

    def may_share(sender: int) -> bool:
        pair = [world[rank] for rank in ranks[sender : sender + 2]]
        return len(pair) == 2 and all(member.usable for member in pair) and pair[0].host == pair[1].host

    def open_end(sender: int, fd: int, nonce: int) -> int:
        pair = ranks[sender : sender + 2]
        pids, start_times = [world[rank].pid for rank in pair], [world[rank].start_time for rank in pair]
        spin = spin_us(world[ranks[index]], world)
        settings = num_slots, slot_bytes, spin, int(1000 * timeout_seconds)
        return torch.ops.infer.shm_pipe_open.default(fd, index - sender, pair, pids, start_times, nonce, *settings)

    size = torch.ops.infer.shm_pipe_bytes.default(num_slots, slot_bytes) if world[ranks[index]].usable else 0
    nonce, outlet, inlet = secrets.randbits(62), None, None
    fd = attempt("make", lambda: make_file(size, HEAD_BYTES)) if may_share(index) else None
    try:
        if fd is not None:
            outlet = attempt("map", lambda: open_end(index, fd, nonce))  # set up before the other looks at it
        offers = _exchange(group, [fd if fd is not None and outlet is not None else -1, nonce])
        if index > 0 and offers[index - 1][0] >= 0:
            number, other = offers[index - 1]
            inlet = open_file_of(world[ranks[index - 1]].pid, number, lambda file: open_end(index - 1, file, other))
        is_open = [bool(answer[0]) for answer in _exchange(group, [int(inlet is not None)])]
    finally:
        if fd is not None:
            os.close(fd)
    if outlet is not None and not is_open[index + 1]:
        torch.ops.infer.shm_pipe_close.default(outlet)
        outlet = None
    if may_share(index) and outlet is None:
        logger.warning("ranks %d and %d share no memory: hidden states go through gloo", *ranks[index : index + 2])
    return (SharedPipe(inlet) if inlet is not None else None, SharedPipe(outlet) if outlet is not None else None)


def _exchange(group: dist.ProcessGroup, mine: list[int]) -> list[list[int]]:
    """What every rank of the group says, in order."""
    told = torch.tensor(mine, dtype=torch.int64)
    heard = [torch.empty_like(told) for _ in range(group.size())]
    dist.all_gather(heard, told, group=group)
    return [answer.tolist() for answer in heard]
