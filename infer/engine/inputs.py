"""A batch's arrays side by side in one buffer, so that one copy brings them all to the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from infer.cache.pages import Pages
from infer.layers.attention import ForwardContext

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class Shape:
    """Of a batch: rows T, sequences S, the width W of their block tables, and N rows that a token is drawn after."""

    rows: int
    seqs: int
    width: int
    sampled: int

    @property
    def head_bytes(self) -> int:
        """Of everything before the block table."""
        return 8 * (3 * self.rows + self.sampled) + 4 * (2 * self.seqs + 1)

    @property
    def num_bytes(self) -> int:
        return self.head_bytes + 4 * self.seqs * self.width


@dataclass
class Inputs(Generic[Array]):
    """What a stage reads of a batch, as views of one buffer: numpy arrays to be filled, or tensors to be read.

    head         [head_bytes] uint8: everything but the block table
    tokens       [T] int64
    sampled      [N] int64: rows of the hidden states that a token is drawn after
    positions [T], slots [T], query_start [S + 1], seq_lens [S], block_table [S, W]: as in ForwardContext
    """

    head: Array
    tokens: Array
    positions: Array
    slots: Array
    sampled: Array
    query_start: Array
    seq_lens: Array
    block_table: Array


def on_host(buffer: np.ndarray, shape: Shape) -> Inputs[np.ndarray]:
    """A buffer of host memory, uint8 [shape.num_bytes] or more, to be filled."""
    return _carve(buffer, shape, np.int64, np.int32)


def on_device(buffer: Tensor, shape: Shape) -> Inputs[Tensor]:
    """A buffer that was filled so, wherever it lies."""
    return _carve(buffer, shape, torch.int64, torch.int32)


def forward_context(
    inputs: Inputs[Tensor], pages: Pages, max_query_len: int, max_seq_len: int, prefill_keys: int | None = None
) -> ForwardContext:
    """Where the batch stands in the cache. The lengths: what the host knows of it, as in ForwardContext."""
    return ForwardContext(
        positions=inputs.positions,
        slots=inputs.slots,
        block_table=inputs.block_table,
        query_start=inputs.query_start,
        seq_lens=inputs.seq_lens,
        k_pages=pages.k,
        v_pages=pages.v,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        prefill_keys=prefill_keys,
    )


def _carve(buffer: Any, shape: Shape, int64: Any, int32: Any) -> Inputs:
    """Arrays and tensors are sliced and viewed alike. The 8-byte integers come first, so that all are aligned."""
    rows, seqs, wide_bytes = shape.rows, shape.seqs, 8 * (3 * shape.rows + shape.sampled)
    wide, narrow = buffer[:wide_bytes].view(int64), buffer[wide_bytes : shape.num_bytes].view(int32)
    return Inputs(
        head=buffer[: shape.head_bytes],
        tokens=wide[:rows],
        positions=wide[rows : 2 * rows],
        slots=wide[2 * rows : 3 * rows],
        sampled=wide[3 * rows :],
        query_start=narrow[: seqs + 1],
        seq_lens=narrow[seqs + 1 : 2 * seqs + 1],
        block_table=narrow[2 * seqs + 1 :].reshape(seqs, shape.width),
    )


def pad(host: Inputs[np.ndarray], rows: int, seqs: int) -> None:
    """Fills what lies behind the first `rows` rows and `seqs` sequences.

    The other rows belong to no sequence and are not written to the cache; the other sequences have no rows and no keys.
    """
    host.tokens[rows:], host.positions[rows:], host.slots[rows:] = 0, 0, -1
    host.query_start[seqs + 1 :], host.seq_lens[seqs:], host.block_table[seqs:] = rows, 0, 0


class Event(Protocol):
    """The part of torch.cuda.Event that a ring needs."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class PinnedRing:
    """Host memory that a device reads from while the host goes on: `depth` buffers take turns.

    A buffer is handed out again only once the copy that was started from it has ended, whatever the host is ahead by.
    """

    def __init__(self, depth: int, allocate: Callable[[int], Tensor], make_event: Callable[[], Event]):
        """allocate: number of bytes -> uint8 in pinned memory. make_event: an event of the device, not yet recorded."""
        self._allocate = allocate
        self._buffers = [allocate(0) for _ in range(depth)]
        self._events = [make_event() for _ in range(depth)]
        self._turn = 0

    def take(self, num_bytes: int) -> Tensor:
        """The next buffer, uint8 [num_bytes]; waits for the copy that read it last."""
        self._turn = (self._turn + 1) % len(self._buffers)
        self._events[self._turn].synchronize()
        if len(self._buffers[self._turn]) < num_bytes:
            # By half more at once: batches grow, and pinning memory waits for the device.
            self._buffers[self._turn] = self._allocate(num_bytes + num_bytes // 2)
        return self.last(num_bytes)

    def last(self, num_bytes: int) -> Tensor:
        """The buffer taken last."""
        return self._buffers[self._turn][:num_bytes]

    def copy_started(self) -> None:
        """The copy from the buffer taken last stands on the device's stream."""
        self._events[self._turn].record()


class Upload:
    """The way of a batch's arrays to the device. On a CPU there is none: what was filled is what is read."""

    def __init__(self, device: torch.device, depth: int):
        """depth: batches that may be on their way at once."""
        self._device = device
        self._ring: PinnedRing | None = None
        if device.type == "cuda":
            self._ring = PinnedRing(
                depth, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event
            )

    def take(self, shape: Shape) -> Inputs[np.ndarray]:
        """Host memory to be filled, of undefined content; good until `depth` more are taken."""
        if self._ring is None:
            return on_host(np.empty(shape.num_bytes, dtype=np.uint8), shape)
        return on_host(self._ring.take(shape.num_bytes).numpy(), shape)

    def send(self, shape: Shape, host: Inputs[np.ndarray]) -> Inputs[Tensor]:
        """What was taken last, on the device; the host does not wait."""
        if self._ring is None:
            return Inputs(*map(torch.from_numpy, vars(host).values()))
        there = self._ring.last(shape.num_bytes).to(self._device, non_blocking=True)
        self._ring.copy_started()
        return on_device(there, shape)
