"""How the ranks become one world, again after every loss: who takes part, and nobody waits for ever.

torchrun's store outlives the ranks, and restart counts differ between nodes, where one agent may be younger than
another. So no count names a generation of ranks: its members do, each by a nonce that its process has drawn for itself.

    rank 0 calls: it writes a fresh call over the one before;
    every rank answers a call, under the call's nonce, with its own nonce and identity;
    once all have, rank 0 writes the list of the answers: the members of this generation.

A rank is in the generation whose list names its own nonce. What earlier processes have left in the store names others.

A rank that is lost before the list is written is replaced by its successor's answer, a lost rank 0 by its successor's
call. One that is lost afterwards, while the members connect, shows by a successor's answer or call: then every member
ends, and their successors agree anew. One that has no successor shows by the time: what it takes is bounded.
"""

import datetime
import logging
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Protocol, TypeVar

import msgspec
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistNetworkError

from infer import launch
from infer.launch import RankEnv
from infer.parallel import peers
from infer.parallel.peers import Identity

logger = logging.getLogger(__name__)
T = TypeVar("T")

JOIN_SECONDS = 600.0  # for all ranks to be there; torchrun's own meeting of the nodes takes up to 900 s
REACH_SECONDS = 30.0  # for a store that torchrun reached before it started this rank
CONNECT_SECONDS = 120.0  # for all to connect, once they are
STUCK_SECONDS = 15.0  # a call of the store that has not come back so long after the time is over never will
LATE_SECONDS = (10.0, 60.0)  # who is missing is logged after the first, then every so often
POLL_SECONDS, POLL_SECONDS_PER_RANK = 0.02, 0.0005  # between two looks: one thread of the store answers to all ranks
WATCH_SECONDS = 0.25  # between two looks for a successor of a member

CALLS, CALL = "infer/calls", "infer/call"  # how many there were; the one that counts


class JoinError(RuntimeError):
    """The ranks have not come together. The message names who is missing, or the store that cannot be reached."""


class Store(Protocol):
    """What is asked of torch.distributed's stores."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def check(self, keys: list[str], /) -> bool: ...


class Call(msgspec.Struct, frozen=True):
    """Rank 0's. number: no other call in this store has it. nonce: that of its process. size: of the world.

    withdrawn: a member was lost before all were connected; nobody answers.
    """

    number: int
    nonce: str
    size: int
    withdrawn: bool = False


class Answer(msgspec.Struct, frozen=True):
    """Of one process to a call, or as one of the list's members."""

    nonce: str
    identity: Identity


@dataclass(frozen=True)
class Generation:
    """One life of the world. number: from 1, greater than that of any generation before it in this torchrun's life.

    nonce: rank 0's, which no other generation has. members: by rank.
    """

    number: int
    nonce: str
    members: tuple[Answer, ...]

    @property
    def prefix(self) -> str:
        """Of this generation's keys in the store. With a predecessor's, ranks would connect to dead addresses."""
        return f"infer/generation-{self.number}-{self.nonce}"

    @property
    def identities(self) -> list[Identity]:
        return [member.identity for member in self.members]


_call_decoder = msgspec.json.Decoder(Call)
_answer_decoder = msgspec.json.Decoder(Answer)
_list_decoder = msgspec.json.Decoder(tuple[Answer, ...])


def _write(store: Store, key: str, value: object) -> None:
    store.set(key, msgspec.json.encode(value).decode())


def _read(key: str, value: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(value)
    except msgspec.DecodeError as error:
        raise JoinError(f"torchrun's store holds {value[:80]!r} at {key}: {error}") from None


def _current_call(store: Store) -> Call | None:
    return _read(CALL, store.get(CALL), _call_decoder) if store.check([CALL]) else None


def _answer_key(call: Call, rank: int) -> str:
    return f"infer/answer/{call.nonce}/{rank}"


def _list_key(call: Call) -> str:
    return f"infer/members/{call.nonce}"


def _host_key(rank: int) -> str:
    return f"infer/host/{rank}"


# ------------------------------------------------------------------------------------------------ agreeing


class Agreement:
    """One process's part in agreeing on a generation."""

    def __init__(
        self, store: Store, identity: Identity, size: int, seconds: float = JOIN_SECONDS, tells: bool = True
    ):
        """size: of the world. seconds: how long it may take. tells: log who is late."""
        self._store, self._rank, self._size, self._seconds, self._tells = store, identity.rank, size, seconds, tells
        self._me = Answer(secrets.token_hex(8), identity)
        self._open: Call | None = None  # what this process has called or answered, and has no list yet
        self._began, self._tell_at = time.monotonic(), time.monotonic() + LATE_SECONDS[0]

    def reach(self) -> Generation:
        """The generation that this process is a member of. Raises JoinError after the time."""
        self._store.set(_host_key(self._rank), self._me.identity.host)
        return self._lead() if self._rank == 0 else self._follow()

    def _lead(self) -> Generation:
        call = self._open = Call(self._store.add(CALLS, 1), self._me.nonce, self._size)
        _write(self._store, CALL, call)
        keys = [_answer_key(call, rank) for rank in range(1, self._size)]
        while not self._store.check(keys):
            self._pause()
        return self._write_list(call, (self._me, *_answers(self._store, keys)))

    def _write_list(self, call: Call, members: tuple[Answer, ...]) -> Generation:
        _write(self._store, _list_key(call), members)
        return Generation(call.number, call.nonce, members)

    def _follow(self) -> Generation:
        answered = None
        while True:
            self._open, call = None, _current_call(self._store)
            if call is not None and call.size == self._size and not call.withdrawn:
                if call != answered:
                    _write(self._store, _answer_key(call, self._rank), self._me)
                    answered = call
                members = self._list_of(call)
                if members is None:
                    self._open = call
                elif members and members[self._rank] == self._me:
                    return Generation(call.number, call.nonce, members)
                # Else it is the list of a generation before this process: rank 0 will call again.
            self._pause()

    def _list_of(self, call: Call) -> tuple[Answer, ...] | None:
        """None while there is none. Empty for that of a world of another size."""
        key = _list_key(call)
        if not self._store.check([key]):
            return None
        members = _read(key, self._store.get(key), _list_decoder)
        return members if len(members) == self._size else ()

    def _pause(self) -> None:
        """Until the next look. A look, not a wait: torch logs every wait whose time is over as a fault."""
        time.sleep(max(POLL_SECONDS, POLL_SECONDS_PER_RANK * self._size))
        now = time.monotonic()
        if now - self._began > self._seconds:
            raise JoinError(f"{self.describe_missing()} after {self._seconds:g} s")
        if self._tells and now > self._tell_at:
            self._tell_at = now + LATE_SECONDS[1]
            logger.info("joining the world: %s (%.0f s so far)", self.describe_missing(), now - self._began)

    def describe_missing(self) -> str:
        """Who is waited for, as far as the store tells, and on which host that rank was last."""
        store, call = self._store, self._open
        missing = [] if call is None else [r for r in range(1, self._size) if not store.check([_answer_key(call, r)])]
        names = []
        for rank in missing or [0]:
            key = _host_key(rank)
            host = f" (last on host {store.get(key).decode()})" if store.check([key]) else ""
            names.append(f"rank {rank}{host}")
        return f"nothing has come from {', '.join(names)} of {self._size} ranks"


def _answers(store: Store, keys: list[str]) -> list[Answer]:
    values = store.multi_get(keys) if keys else []
    return [_read(key, value, _answer_decoder) for key, value in zip(keys, values, strict=True)]


# ------------------------------------------------------------------------------------------------ connecting


def find_successor(store: Store, generation: Generation, rank: int) -> str | None:
    """Why this generation cannot come to be any more: a member's successor has shown itself. None while it can.

    Rank 0 looks for all, and withdraws its call for the others to see.
    """
    call = _current_call(store)
    if call is None or call.nonce != generation.nonce:
        return "rank 0 was started anew while the ranks connected"
    if call.withdrawn:
        return "a rank was started anew while the ranks connected, as rank 0 tells"
    if rank != 0:
        return None
    keys = [_answer_key(call, other) for other in range(1, call.size)]
    for member, answer in zip(generation.members[1:], _answers(store, keys), strict=True):
        if answer != member:
            _write(store, CALL, msgspec.structs.replace(call, withdrawn=True))
            who = member.identity
            return f"rank {who.rank} (host {who.host}, pid {who.pid}) was started anew while the ranks connected"
    return None


class Joining:
    """A process's way into the world, from the first look at the store until all ranks are connected.

        with Joining(env) as joining:
            generation, store = joining.agree()
            dist.init_process_group(...)  # and whatever else waits for all ranks

    What goes wrong within ends the process, with one line that says who is missing, and status 1: torchrun starts it
    again. Not by an exception alone, for the main thread may be in a call that cannot be interrupted: a group waits for
    a lost rank as long as groups may idle, a store's client for a network that is down until the kernel gives up.
    """

    def __init__(self, env: RankEnv, has_agent: bool = True):
        """has_agent: torchrun has made the store; else rank 0 does."""
        self._env, self._has_agent = env, has_agent
        self._where = f"{'torchrun' if has_agent else 'rank 0'}'s store at {env.master_addr}:{env.master_port}"
        self._store: PrefixStore | None = None
        self._joined = threading.Event()
        self._watcher: threading.Thread | None = None
        self._deadline = threading.Timer(0, self._end)

    def __enter__(self) -> "Joining":
        self._end_after(JOIN_SECONDS + STUCK_SECONDS)
        return self

    def agree(self) -> tuple[Generation, PrefixStore]:
        """The generation, and its part of the store. From here on a member's loss ends this process."""
        env = self._env
        base = self._connect(makes=env.rank == 0 and not self._has_agent)
        identity = peers.own_identity(env.rank, socket.gethostname())
        generation = Agreement(base, identity, env.world_size, tells=env.local_rank == 0).reach()
        self._store = PrefixStore(generation.prefix, base)
        self._end_after(CONNECT_SECONDS + STUCK_SECONDS)
        self._watcher = threading.Thread(target=self._watch, args=(generation,), name="joining", daemon=True)
        self._watcher.start()
        return generation, self._store

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            error = self._say_connected()
        if isinstance(error, RuntimeError):  # the store's, a group's, or a JoinError
            if self._watcher is not None:  # it may name the rank that is behind this, and then it ends this process
                time.sleep(4 * WATCH_SECONDS)
            self._end(self._describe(error))
        self._joined.set()
        self._deadline.cancel()
        if self._watcher is not None:
            self._watcher.join(STUCK_SECONDS)

    def _say_connected(self) -> RuntimeError | None:
        assert self._store is not None, "agree() was called"
        try:
            self._store.set(_connected_key(self._env.rank), "")
        except RuntimeError as error:
            return error
        return None

    # ------------------------------------------------------------------ other threads'

    def _watch(self, generation: Generation) -> None:
        try:
            store = self._connect(makes=False)  # of its own: a client does one thing at a time
            until = time.monotonic() + CONNECT_SECONDS
            while not self._joined.wait(WATCH_SECONDS):
                if (reason := find_successor(store, generation, self._env.rank)) is not None:
                    self._end(reason)
                if time.monotonic() > until:
                    self._end(_describe_unconnected(store, generation))
        except RuntimeError as error:
            if not self._joined.is_set():  # else it is the main thread's, or the watchdog's, to find
                self._end(self._describe(error))

    def _connect(self, makes: bool) -> TCPStore:
        """The store. Raises DistNetworkError."""
        env, reach = self._env, REACH_SECONDS if self._has_agent else JOIN_SECONDS
        timeout = datetime.timedelta(seconds=reach)
        store = TCPStore(env.master_addr, env.master_port, is_master=makes, timeout=timeout)
        store.set_timeout(datetime.timedelta(seconds=JOIN_SECONDS))
        return store

    def _end_after(self, seconds: float) -> None:
        self._deadline.cancel()
        self._deadline = threading.Timer(seconds, self._end, (f"{self._where} does not answer",))
        self._deadline.daemon = True
        self._deadline.start()

    def _describe(self, error: RuntimeError) -> str:
        """One line: torch's messages go on with a trace of C++."""
        first = str(error).partition("\n")[0]
        return f"{self._where} is lost: {first}" if isinstance(error, DistNetworkError) else first

    def _end(self, reason: str) -> NoReturn:
        launch.end(f"joining the world: {reason}", self._env)


def _connected_key(rank: int) -> str:
    return f"connected/{rank}"


def _describe_unconnected(store: Store, generation: Generation) -> str:
    late = [
        f"rank {who.rank} (host {who.host}, pid {who.pid})"
        for who in generation.identities
        if not store.check([f"{generation.prefix}/{_connected_key(who.rank)}"])
    ]
    return f"{', '.join(late) or 'no rank'} has not connected to the others within {CONNECT_SECONDS:g} s"
