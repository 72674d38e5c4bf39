"""Finds ranks that are gone, silent or stuck, and then ends this one: torchrun starts all of them again.

    world.watchdog.start()                      # all ranks together
    watchdog.phase("loading", slow=True)        # the main loop tells where it is
    watchdog.work_out(True); watchdog.progress(step)
    watchdog.close()                            # all ranks, at a regular end

Rank 0 and each other rank tell one another how they are, once a beat: the other of itself, rank 0 of all. For every
connection there is a thread that sends and one that has a receive posted all the time. So a connection that closes
names its rank at once, and a verdict of rank 0, which judges, is with all others at once. They judge rank 0's silence.

No timeout of gloo's takes part. One that expires closes every connection of its group, and whom it was about cannot be
told; nor can it know that this process itself was asleep. Instead ages are taken on a clock of the time that this
process was awake (peers.AwakeClock).
"""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from infer import launch
from infer.parallel import peers
from infer.parallel.peers import AwakeClock, Fault, Identity, Limits, PeerState, Standing
from infer.signals import Order

if TYPE_CHECKING:
    from infer.parallel.groups import World

STATUS = 1  # a rank that exits with 0 is no failure to torchrun
TELL_SECONDS = 0.5  # how long rank 0 stays to tell the verdict to all who listen
LAST_SECONDS = 3.0  # how long the last words and what `before_end` is to do may take

# A rank that is lost shows here first. What NCCL's own watchdog does is a second net, and it must neither write dumps
# nor wait for its default of 8 to 10 minutes.
NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # end the process, do not clean up: that may hang
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "30",
    "TORCH_NCCL_PROPAGATE_ERROR": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


def set_nccl_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the user has not set himself. To be called before the first NCCL group is made."""
    for name, value in NCCL_ENVIRONMENT.items():
        environ.setdefault(name, value)


class Watchdog:
    """Watches the other ranks of a world and is watched by them. Alone, or not started, it does nothing.

    phase, work_out, progress and table may be called on any thread. limits: the same on all ranks.
    """

    def __init__(self, world: "World", limits: Limits | None = None):
        self._env, self._rank, self._size, self._group = world.env, world.rank, world.size, world.watch_group
        self._limits = limits or Limits()
        tick = self._limits.beat / 2
        self._tick, self._clock = tick, AwakeClock(longest=2 * tick)
        self._world, self._generation = world.members, world.generation
        counts_computing = world.device.type == "cpu"
        self._own = Standing(self._world[self._rank], self._clock, self._limits, counts_computing)
        self._before_end: list[Callable[[], object]] = []
        self._when_ordered: Callable[[PeerState], object] | None = None
        # What follows changes, or is read for a decision, under _changed.
        self._changed = threading.Condition()
        self._heard: dict[int, tuple[PeerState, float]] = {}  # of every other rank, and when, by _clock
        self._left: set[int] = set()  # said farewell
        self._told: set[int] = set()  # have the verdict
        self._verdict: list[PeerState] = []
        self._urgent = 0  # counts what the others must hear at once
        self._closing = self._closed = self._stood_down = False
        self._talks: list[threading.Thread] = []
        self._monitor = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # ------------------------------------------------------------------ the main loop's

    def start(self) -> None:
        """Begins to watch. All ranks call it together."""
        if self._size == 1:
            return
        now = self._clock.now()
        watched = range(1, self._size) if self._rank == 0 else [0]
        self._heard = {rank: (self._unheard(rank), now) for rank in watched}
        self._talks = [
            threading.Thread(target=talk, args=(rank,), name=f"watchdog-{rank}", daemon=True)
            for rank in watched
            for talk in (self._listen, self._speak)
        ]
        for thread in [*self._talks, self._monitor]:
            thread.start()

    def phase(self, name: str, *, slow: bool = False) -> None:
        """What the main loop does from now on. slow: Python's lock may be held for long, a step may take minutes.

        Rank 0 should say it before it asks the others for something slow: while one rank is in a slow phase, all are
        given that time to be silent.
        """
        self._own.set_phase(name, slow)
        with self._changed:
            self._urgent += 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A slow phase inside of another, which goes on after it."""
        before, was_slow = self._own.phase
        self.phase(name, slow=True)
        try:
            yield
        finally:
            self.phase(before, slow=was_slow)

    def work_out(self, work_out: bool) -> None:
        """Whether the main loop has something to do, and so has to move. A rank without work is never stuck."""
        self._own.set_work_out(work_out)

    def progress(self, step: int, *, waits: bool = False) -> None:
        """The main loop begins a step; it has moved if that is another than before. Costs about a microsecond.

        waits: until the next call it waits for other ranks, so that it is not to blame if nothing moves. Waiting within
        infer/parallel is seen without it.
        """
        self._own.progress(step, waits)

    def before_end(self, do: Callable[[], object]) -> None:
        """Has something done before this process ends for another's loss, within LAST_SECONDS, on another thread."""
        self._before_end.append(do)

    def pass_on(self, order: Order) -> None:
        """Tells the others that a signal has asked this rank to do something; rank 0 decides what becomes of it.

        From now on rank 0 may end at any time, and this rank with it, without a word.
        """
        with self._changed:
            self._own.order = max(self._own.order, order)
            self._urgent += 1
            self._changed.notify_all()

    def when_ordered(self, do: Callable[[PeerState], object]) -> None:
        """Calls `do`, on another thread, when a rank has passed on an order, or a more urgent one than before."""
        self._when_ordered = do

    def is_any_lost(self) -> bool:
        """Whether another rank is lost, as far as that can be told at once: for a signal's meaning.

        torchrun's SIGTERM comes to every rank when its user wants an end, and to the others when one of its ranks has
        failed, often before a closed connection shows. In the second case torchrun has waited for that rank before, or
        the fork server has (forkserver.py), so the process exists no more; in the first no process is gone, as ranks
        outlast the signal. Ranks of another torchrun need not be looked for: their end makes this rank's torchrun send
        nothing. (Where torchrun restarts ranks because a node joins, nobody is lost, and they stop as if told to.)
        """
        with self._changed:
            if self._verdict:
                return True
            left = set(self._left)
        machine = self._world[self._rank].machine
        neighbours = [who for who in self._world if machine and who.machine == machine and who.rank not in left]
        return any(not launch.is_alive(f"{who.pid}-{who.start_time}") for who in neighbours)

    def is_elsewhere(self, rank: int) -> bool:
        """Whether that rank is on another machine, and so under another torchrun."""
        return self._world[rank].machine != self._world[self._rank].machine or not self._world[self._rank].machine

    def table(self) -> list[PeerState]:
        """Every rank as last heard of, by rank. On rank 0 at first hand, elsewhere as rank 0 last told."""
        with self._changed:
            return self._table()

    def lost(self, reason: str) -> NoReturn:
        """Ends this process, whose main loop has met a broken connection, with the name of the rank that broke it.

        That is the watchdog's to find; if it finds nobody within a few beats, `reason` is told instead.
        """
        if self._monitor.is_alive():
            self._monitor.join(2 * self._limits.beat + TELL_SECONDS + LAST_SECONDS)
        self._end(reason)

    def stand_down(self) -> None:
        """This process is about to end by intent; that others end is no news any more. May be called by a handler."""
        self._stood_down = True

    def close(self) -> None:
        """Ends the watch once all ranks have called this; a rank that is lost meanwhile still ends this process."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._talks:
            thread.join()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._monitor.is_alive():
            self._monitor.join()
        self._talks.clear()

    # ------------------------------------------------------------------ the conversation

    def _unheard(self, rank: int) -> PeerState:
        return PeerState(rank=rank, host=self._world[rank].host, pid=self._world[rank].pid)

    def _listen(self, rank: int) -> None:
        """Hears a rank until it says farewell. A receive is posted all the time, so that its end is known at once."""
        num_rows = 1 if self._rank == 0 else self._size
        farewell = False
        with self._blaming(rank):
            while not farewell:
                table, farewell = self._receive(rank, num_rows)
                with self._changed:
                    now, orders = self._clock.now(), []
                    for peer in table:
                        if peer.rank != self._rank:
                            before = self._heard.get(peer.rank)
                            if before is not None and peer.order > before[0].order:
                                orders.append(peer)
                            self._heard[peer.rank] = (peer, now - peer.age_seconds)
                    if farewell:
                        self._left.add(rank)
                    self._rule([peer for peer in table if peer.fault])
                for peer in orders:
                    if self._when_ordered is not None:
                        self._when_ordered(peer)

    def _speak(self, rank: int) -> None:
        """Tells a rank of this one, and rank 0 of all, once a beat and when there is news, until the end."""
        urgent, ended = 0, False
        with self._blaming(rank):
            while not ended:
                with self._changed:
                    self._changed.wait_for(functools.partial(self._has_news, urgent), self._limits.beat)
                    urgent, verdict, farewell = self._urgent, bool(self._verdict), self._closing
                    table = self._table() if self._rank == 0 else [self._own.state()]
                ended = verdict or farewell
                self._send(rank, table, farewell=farewell and not verdict)
                if verdict:
                    with self._changed:
                        self._told.add(rank)
                        self._changed.notify_all()

    @contextlib.contextmanager
    def _blaming(self, rank: int) -> Iterator[None]:
        """What goes wrong within is that rank's loss, unless the verdict is given already."""
        fault = Fault.NONE
        try:
            yield
        except RuntimeError:  # gloo's, of a closed connection
            fault = Fault.GONE
        except ValueError:
            fault = Fault.GARBLED
        if fault:
            with self._changed:
                self._rule([replace(self._aged(rank), fault=fault)])

    def _send(self, rank: int, states: Sequence[PeerState], farewell: bool) -> None:
        words = peers.encode(states, self._generation, farewell)
        dist.send(torch.from_numpy(words), dst=rank, group=self._group)

    def _receive(self, rank: int, num_rows: int) -> tuple[list[PeerState], bool]:
        words = torch.from_numpy(np.empty(peers.num_words(num_rows), dtype=np.int32))
        dist.recv(words, src=rank, group=self._group)
        return peers.decode(words.numpy(), self._generation, self._world)

    # ------------------------------------------------------------------ judging; all with _changed held

    def _aged(self, rank: int) -> PeerState:
        state, at = self._heard[rank]
        return replace(state, age_seconds=self._clock.now() - at)

    def _table(self) -> list[PeerState]:
        blamed = {peer.rank: peer for peer in self._verdict}
        states = {rank: self._aged(rank) for rank in self._heard} | {self._rank: self._own.state()} | blamed
        return [states[rank] for rank in sorted(states)]

    def _rule(self, blamed: list[PeerState]) -> None:
        """The first verdict stands: what is seen after it are consequences."""
        if blamed and not self._verdict and not self._stood_down:
            self._verdict = blamed
            self._changed.notify_all()

    def _has_news(self, urgent: int) -> bool:
        """Whether the others must hear at once. urgent: the count at the time they heard last."""
        return bool(self._verdict) or self._closing or self._urgent != urgent

    def _judge(self) -> None:
        if self._rank == 0:
            watched = [peer for peer in self._table() if peer.rank not in self._left]
        elif 0 in self._left:
            watched = []
        else:  # of the others' faults, and of its own main loop's, rank 0 tells
            watched = [replace(self._aged(0), work_out=False, slow=any(peer.slow for peer in self._table()))]
        self._rule(peers.judge(watched, self._limits))

    # ------------------------------------------------------------------ the end

    def _watch(self) -> None:
        with self._changed:
            while not self._verdict and not self._closed:
                self._changed.wait(self._tick)
                self._clock.tick()
                self._own.observe()
                self._judge()
            if not self._verdict:
                return
            blamed = self._verdict
            if self._rank == 0:
                listening = set(self._heard) - self._left - {p.rank for p in blamed if p.fault != Fault.STUCK}
                self._changed.wait_for(lambda: listening <= self._told, TELL_SECONDS)
        self._end("; ".join(peer.describe() for peer in blamed), blamed)

    def _kill(self, who: Identity) -> None:
        """Ends a rank of this machine that may be stopped: torchrun would wait for it for 30 s."""
        own = self._world[self._rank]
        if who.rank == self._rank or not own.machine or who.machine != own.machine or not hasattr(os, "pidfd_open"):
            return
        with contextlib.suppress(OSError):  # it is gone, or not ours to kill
            pidfd = os.pidfd_open(who.pid)  # from here on the number means one process, so the check holds
            try:
                if launch.process_key(who.pid) == f"{who.pid}-{who.start_time}":
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def _end(self, reason: str, blamed: Sequence[PeerState] = ()) -> NoReturn:
        """The last words, on a thread of their own: this process ends even if nobody reads what it writes."""
        line = f"infer: rank {self._rank} ends: {reason}".splitlines()[0] + "\n"

        def last() -> None:
            launch.exit_if_failed_before(self._env)  # a user's error: the rank that is gone has told it
            is_expected = self._own.order and [(peer.rank, peer.fault) for peer in blamed] == [(0, Fault.GONE)]
            with contextlib.suppress(OSError, ValueError):
                if not is_expected:
                    os.write(sys.stderr.fileno(), line.encode(errors="backslashreplace"))
                sys.stdout.flush()
            for do in self._before_end:
                do()

        thread = threading.Thread(target=last, name="last-words", daemon=True)
        thread.start()
        thread.join(LAST_SECONDS)
        for peer in blamed:  # at the very end: of such a death torchrun hears at once, and has this process end itself
            if peer.fault == Fault.SILENT:  # the others end by themselves
                self._kill(self._world[peer.rank])
        os._exit(STATUS)
