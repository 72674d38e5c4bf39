"""Process groups and what moves over them: the world, a tensor-parallel group, the pipeline's point-to-point links.

Every class here also works alone (one rank, no torch.distributed), so that callers never branch on it.
"""

import datetime
import os
import queue
import socket
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from infer.launch import RankEnv
from infer.parallel import hosts, interfaces, shm, shm_pipe
from infer.parallel.hosts import AcrossHosts
from infer.parallel.joining import Joining
from infer.parallel.peers import own_identity
from infer.parallel.shm import SharedMemory
from infer.parallel.shm_pipe import SharedPipe
from infer.parallel.topology import Topology
from infer.parallel.watchdog import Watchdog

# Idle followers sit in the world group's broadcast for as long as nobody asks anything; rank 0 sends an empty message
# now and then, so this bounds only how long a lost rank 0 host can go unnoticed.
WORLD_TIMEOUT = datetime.timedelta(hours=2)
_TAGS = 1 << 16


class Group:
    """The collectives of a few ranks. `index` is this rank's place among `ranks`."""

    def __init__(self, ranks: list[int], rank: int, group: dist.ProcessGroup | None, staged: bool = False,
                 shared: SharedMemory | AcrossHosts | None = None):  # fmt: skip
        self.ranks, self.size = ranks, len(ranks)
        self.index = ranks.index(rank)
        self._group = group
        self._staged = staged  # gloo moves host memory: CUDA tensors go through a copy
        self._shared = shared  # CPU ranks that share a host have a faster way than gloo
        self._one_host = shared if isinstance(shared, SharedMemory) else None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the group, in place where possible; use the returned tensor."""
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        if self._staged:
            host = tensor.cpu()
            dist.all_reduce(host, group=self._group)
            return tensor.copy_(host)
        tensor = tensor.contiguous()
        if self._shared is not None and tensor.dtype in shm.SUM_DTYPES:
            self._shared.all_reduce(tensor)
        else:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: torch.Tensor, widths: list[int] | None = None) -> torch.Tensor | None:
        """Concatenates [rows, width_i] tensors along the last dim on the group's first rank; None on the others.

        widths: each member's last dim where they differ (every member passes the same list).
        """
        if self.size == 1:
            return tensor
        widths = widths or [tensor.shape[-1]] * self.size
        if self._one_host is not None:
            return self._one_host.gather(tensor, widths)
        width = max(widths)
        part = tensor.cpu() if self._staged else tensor
        if part.shape[-1] < width:
            part = torch.nn.functional.pad(part, (0, width - part.shape[-1]))
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in self.ranks] if self.index == 0 else None
        dist.gather(part, parts, dst=self.ranks[0], group=self._group)
        if parts is None:
            return None
        whole = torch.cat([piece[..., :w] for piece, w in zip(parts, widths, strict=True)], dim=-1)
        return whole.to(tensor.device)

    def min(self, value: int) -> int:
        """The smallest of the members' integers, on every member."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._group)
        return int(tensor.item())

    def close(self) -> None:
        """Gives back what this group holds beside its process group."""
        if self._shared is not None:
            self._shared.close()


def alone() -> Group:
    """A group of one rank."""
    return Group([0], 0, None)


class Pipe:
    """Hidden states to the next stage and from the previous one, [num_tokens, hidden], in batch order.

    With gloo a receive can be posted as soon as its batch is known, and a send returns at once: a thread waits for the
    receiver, because gloo completes a send only when the other side has posted its receive. With NCCL both are queued
    on the device's stream by the calling thread: a posted NCCL receive would occupy the device. Through shared memory
    a send is a copy, and nothing needs to be posted; one side may have it and the other not.
    """

    def __init__(self, previous: int | None, following: int | None, group: dist.ProcessGroup | None, backend: str,
                 device: torch.device, inlet: SharedPipe | None = None, outlet: SharedPipe | None = None):  # fmt: skip
        self.previous, self.following = previous, following
        self._inlet, self._outlet = inlet, outlet
        self._group, self._device, self._nccl = group, device, backend == "nccl"
        self._where = device if self._nccl else torch.device("cpu")
        self._outbox: queue.SimpleQueue[tuple[torch.Tensor, int] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._sender = threading.Thread(target=self._send_all, name="pipe-sender", daemon=True)
        if following is not None and outlet is None and not self._nccl:
            self._sender.start()

    def post_receive(self, shape: tuple[int, ...], dtype: torch.dtype, step: int) -> Callable[[], torch.Tensor]:
        """Posts the receive of one batch; the returned function waits for it and gives the tensor."""
        if self._nccl:
            return lambda: self._receive_now(shape, dtype)
        if self._inlet is not None:
            inlet = self._inlet  # for the type checker: not None
            return lambda: inlet.receive(shape, dtype, step)
        tensor = torch.empty(shape, dtype=dtype)
        work = dist.irecv(tensor, src=self.previous, group=self._group, tag=step % _TAGS)
        assert work is not None, "this rank belongs to the group"

        def wait() -> torch.Tensor:
            work.wait()
            return tensor.to(self._device)

        return wait

    def _receive_now(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(tensor, src=self.previous, group=self._group)
        return tensor

    def send(self, tensor: torch.Tensor, step: int) -> None:
        """Hands a tensor to the next stage. Raises what an earlier send failed with."""
        if self._error is not None:
            raise self._error
        tensor = tensor.to(self._where).contiguous()
        if self._nccl:
            dist.send(tensor, dst=self.following, group=self._group)
        elif self._outlet is not None:
            self._outlet.send(tensor, step)
        else:
            self._outbox.put((tensor, step % _TAGS))

    def _send_all(self) -> None:
        try:
            while (item := self._outbox.get()) is not None:
                dist.send(item[0], dst=self.following, group=self._group, tag=item[1])
        except RuntimeError as error:  # the peer is gone; the main thread raises it at its next send
            self._error = error

    def close(self) -> None:
        """Waits until everything handed over is sent."""
        if self._sender.is_alive():
            self._outbox.put(None)
            self._sender.join()
        for end in (self._inlet, self._outlet):
            if end is not None:
                end.close()


class Frames:
    """Messages of any length over fixed-size int32 frames, so that a receive can be posted before the length is known.

    A frame is {magic, message number, words in the message, first word of this frame, payload...}. move: sends or
    receives one frame in place.
    """

    MAGIC = 0x1F3A57
    HEAD = 4
    WORDS = 4096  # 16 KiB: a decode step of some hundred requests in one frame

    def __init__(self, move: Callable[[torch.Tensor], None]):
        self._move = move
        self._number = 0

    def send(self, words: torch.Tensor) -> None:
        """words: int32, 1-d."""
        self._number = (self._number + 1) % (1 << 30)
        room = self.WORDS - self.HEAD
        for first in range(0, max(len(words), 1), room):
            frame = torch.zeros(self.WORDS, dtype=torch.int32)
            part = words[first : first + room]
            frame[: self.HEAD] = torch.tensor([self.MAGIC, self._number, len(words), first], dtype=torch.int32)
            frame[self.HEAD : self.HEAD + len(part)] = part
            self._move(frame)

    def receive(self) -> torch.Tensor:
        """The next message. Raises RuntimeError if the frames do not belong together."""
        self._number = (self._number + 1) % (1 << 30)
        parts: list[torch.Tensor] = []
        got, total = 0, 1
        while got < total:
            frame = torch.empty(self.WORDS, dtype=torch.int32)
            self._move(frame)
            magic, number, total, first = frame[: self.HEAD].tolist()
            if magic != self.MAGIC or number != self._number or first != got or total < 0:
                raise RuntimeError(
                    f"a frame out of order: magic {magic:#x}, message {number} at word {first} of {total}; "
                    f"expected message {self._number} at word {got}"
                )
            part = frame[self.HEAD : self.HEAD + min(total - got, self.WORDS - self.HEAD)]
            parts.append(part)
            got += len(part)
            if total == 0:
                break
        return torch.cat(parts)


class World:
    """All ranks that torchrun started, joined for the life of the process.

    generation: counts the worlds of this torchrun, 0 without others. members: who the ranks are, by rank. watchdog:
    does nothing until it is started, on all ranks. Where the ranks cannot be joined, the process ends (joining.py).
    """

    def __init__(self, env: RankEnv, device: torch.device):
        self.env, self.rank, self.size, self.device = env, env.rank, env.world_size, device
        self.generation, self.members = 0, [own_identity(env.rank, socket.gethostname())]
        self.store: PrefixStore | None = None
        self.watch_group: dist.ProcessGroup | None = None  # the watchdog's own
        self._group: dist.ProcessGroup | None = None
        if env.world_size > 1:
            self._join()
        self.frames = Frames(self._broadcast)
        self.watchdog = Watchdog(self)

    def _join(self) -> None:
        env = self.env
        interfaces.choose(env)
        with Joining(env, has_agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True") as joining:
            generation, self.store = joining.agree()
            self.generation, self.members = generation.number, generation.identities
            dist.init_process_group(
                "gloo", store=self.store, rank=env.rank, world_size=env.world_size, timeout=WORLD_TIMEOUT
            )
            self._group = dist.new_group(backend="gloo", timeout=WORLD_TIMEOUT)
            self.watch_group = dist.new_group(backend="gloo", timeout=WORLD_TIMEOUT)

    def _broadcast(self, frame: torch.Tensor) -> None:
        if self._group is not None:
            dist.broadcast(frame, src=0, group=self._group)

    def barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=dist.group.WORLD)

    def destroy(self) -> None:
        """Ends the world; all ranks call it. One that is lost before all have ends this process, by the watchdog."""
        self.watchdog.close()
        if dist.is_initialized():
            dist.destroy_process_group()


class Groups:
    """The groups of one engine. Built by all ranks together, in the same order.

    share_memory: CPU ranks of one host exchange tensors through shared memory rather than gloo.
    """

    def __init__(self, world: World, topology: Topology, timeout_seconds: int, *, share_memory: bool = True):
        self.world, self.topology = world, topology
        self.pp_rank, self.tp_rank = topology.coordinates(world.rank)
        self.is_first_stage, self.is_last_stage = self.pp_rank == 0, self.pp_rank == topology.pp_size - 1
        self.is_sampler = world.rank == topology.sampler_rank
        timeout = datetime.timedelta(seconds=timeout_seconds)
        backend = "nccl" if _one_gpu_each(world) else "gloo"
        staged = world.device.type == "cuda" and backend == "gloo"
        self._made: list[dist.ProcessGroup] = []

        def make(ranks: list[int], backend: str = backend) -> dist.ProcessGroup | None:
            if len(ranks) < 2:
                return None
            group = dist.new_group(ranks, timeout=timeout, backend=backend)
            if world.rank in ranks:
                self._made.append(group)
            return group

        tp_groups = [make(topology.tp_ranks(pp)) for pp in range(topology.pp_size)]
        pp_groups = [make([topology.rank(pp, tp) for pp in range(topology.pp_size)]) for tp in range(topology.tp_size)]
        tokens = make([0, topology.sampler_rank] if topology.sampler_rank else [0], "gloo")
        everyone = list(range(topology.world_size))

        all_group, tp_group, pp_group = make(everyone, "gloo"), tp_groups[self.pp_rank], pp_groups[self.tp_rank]
        tp_ranks = topology.tp_ranks(self.pp_rank)
        pp_ranks = [topology.rank(pp, self.tp_rank) for pp in range(topology.pp_size)]
        shared, inlet, outlet = None, None, None
        if share_memory and world.device.type == "cpu" and all_group is not None:
            said = shm.introduce(all_group)
            shared = self._share_sums(tp_group, said, timeout_seconds, make)
            if pp_group is not None:
                # At most pp_size batches are in flight; one slot more, so that a sender never comes close to waiting.
                inlet, outlet = shm_pipe.connect(
                    pp_group, pp_ranks, said, self.pp_rank, timeout_seconds, num_slots=topology.pp_size + 1
                )

        self.tp = Group(tp_ranks, world.rank, tp_group, staged, shared)
        self.all = Group(everyone, world.rank, all_group)
        self.pipe = Pipe(
            None if self.is_first_stage else pp_ranks[self.pp_rank - 1],
            None if self.is_last_stage else pp_ranks[self.pp_rank + 1],
            pp_group,
            backend,
            world.device,
            inlet,
            outlet,
        )
        self.results: Frames | None = None
        if tokens is not None and self.is_sampler:
            self.results = Frames(lambda frame: dist.send(frame, dst=0, group=tokens))
        elif tokens is not None and world.rank == 0:
            self.results = Frames(lambda frame: _receive(frame, topology.sampler_rank, tokens))

    def _share_sums(
        self, tp_group: dist.ProcessGroup | None, said: list[shm.Introduction], timeout_seconds: int,
        make: Callable[[list[int]], dist.ProcessGroup | None],
    ) -> SharedMemory | AcrossHosts | None:  # fmt: skip
        """How this rank's tensor-parallel group sums through shared memory; None if it does not."""
        stages = [self.topology.tp_ranks(pp) for pp in range(self.topology.pp_size)]
        plans = [hosts.plan(ranks, said, self.world.rank, make) for ranks in stages]  # every rank plans every stage
        if tp_group is None:
            return None
        ranks, levels = stages[self.pp_rank], plans[self.pp_rank]
        if levels is None:
            return shm.connect(tp_group, ranks, said, self.tp_rank, timeout_seconds)
        return hosts.connect(levels, tp_group, ranks, said, self.tp_rank, timeout_seconds)

    def warm_up(self) -> "Groups":
        """One small exchange over every group, so that a connection that cannot be made shows here, by name."""
        self.tp.all_reduce(torch.zeros(1, device=self.world.device))
        arrival = None if self.is_first_stage else self.pipe.post_receive((1,), torch.float32, 0)
        if not self.is_last_stage:
            self.pipe.send(torch.zeros(1), 0)
        if arrival is not None:
            arrival()
        self.all.min(0)
        return self

    def close(self) -> None:
        """Ends the groups. Every rank has received all that was sent to it."""
        self.pipe.close()
        self.tp.close()
        for group in self._made:
            dist.destroy_process_group(group)
        self._made.clear()


def _receive(frame: torch.Tensor, source: int, group: dist.ProcessGroup) -> None:
    dist.recv(frame, src=source, group=group)


def _one_gpu_each(world: World) -> bool:
    """Whether every rank of this host has a GPU of its own; NCCL refuses two ranks on one."""
    return world.device.type == "cuda" and torch.cuda.device_count() >= world.env.local_world_size
