"""Ranks agree on who is in a generation, whatever earlier processes left in the store; and none waits for ever."""

import datetime
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore
from worlds import ROOT, SCRIPTS, python_path

from infer import launch
from infer.launch import RankEnv
from infer.parallel import joining
from infer.parallel.joining import CALL, Agreement, Call, Generation, JoinError, Joining, find_successor
from infer.parallel.peers import Identity

SECONDS = 20.0  # for what takes some milliseconds

# Of the threads that stand for processes here, some end by SystemExit.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def server() -> TCPStore:
    """The store of a torchrun, which its ranks reach at this port."""
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=SECONDS))


class Rank(threading.Thread):
    """One process's way to an agreement, with a connection of its own."""

    def __init__(self, server: TCPStore, rank: int, size: int, seconds: float = SECONDS, pid: int = 0):
        super().__init__(daemon=True)
        self.store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=datetime.timedelta(seconds=SECONDS))
        identity = Identity(rank, f"host-{rank}", pid or 100 + rank, 7, 0)
        self.agreement = Agreement(self.store, identity, size, seconds)
        self.generation: Generation | None = None
        self.error: JoinError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.generation = self.agreement.reach()
        except JoinError as error:
            self.error = error

    def result(self) -> Generation:
        self.join(SECONDS)
        assert self.generation is not None, self.error or self.agreement.describe_missing()
        return self.generation


def agree(server: TCPStore, size: int) -> Generation:
    """A generation of processes that all come at once and stay."""
    ranks = [Rank(server, rank, size) for rank in range(size)]
    first, *others = [rank.result() for rank in ranks]
    assert all(other == first for other in others)
    return first


class Lost(Exception):
    """What a process does that is killed here."""


def lose(server: TCPStore, rank: int, size: int) -> None:
    """A process that is lost once it has called, or answered: before there is a list, or before it has read it."""
    store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=datetime.timedelta(seconds=SECONDS))
    agreement = Agreement(store, Identity(rank, "gone", 1, 1, 0), size)

    def be_lost(*_: object) -> None:
        raise Lost

    agreement._list_of = agreement._pause = agreement._write_list = be_lost
    with pytest.raises(Lost):
        agreement.reach()


# ------------------------------------------------------------------------------------------------ agreeing


def test_all_are_in_the_list_and_each_generation_has_its_own_keys(server):
    first = agree(server, 4)
    assert [identity.rank for identity in first.identities] == [0, 1, 2, 3]
    assert [identity.host for identity in first.identities] == [f"host-{rank}" for rank in range(4)]
    second = agree(server, 4)
    assert (first.number, second.number) == (1, 2) and first.prefix != second.prefix
    assert not {m.nonce for m in first.members} & {m.nonce for m in second.members}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_order_in_which_they_come_does_not_matter(server, order):
    """The keys of a generation before lie in the store, its list too: nobody takes it for this one's."""
    before = agree(server, 3)
    ranks = {}
    for rank in order:
        ranks[rank] = Rank(server, rank, 3)
        time.sleep(3 * joining.POLL_SECONDS)
        assert len(ranks) == 3 or not any(other.generation for other in ranks.values())
    generations = [rank.result() for rank in ranks.values()]
    assert all(generation == generations[0] != before for generation in generations)


def test_a_rank_that_is_started_twice_while_others_wait_is_in_with_its_last_process(server):
    first = Rank(server, 0, 3)
    while not server.check([CALL]):
        time.sleep(0.01)
    lose(server, 2, 3)
    lose(server, 2, 3)
    last = Rank(server, 2, 3, pid=77)
    until_answered(server, 2, pid=77)
    assert first.generation is None
    generations = [rank.result() for rank in (Rank(server, 1, 3), first, last)]
    assert generations[0] == generations[1] == generations[2] and generations[0].identities[2].pid == 77


def until_answered(server: TCPStore, rank: int, pid: int) -> None:
    key = joining._answer_key(joining._current_call(server), rank)
    while joining._answers(server, [key])[0].identity.pid != pid:
        time.sleep(0.01)


def test_rank_0_that_is_lost_before_the_list_calls_again(server):
    """Once before the answers, once after them; its successor comes late."""
    lose(server, 0, 3)
    waiting = [Rank(server, 1, 3), Rank(server, 2, 3)]
    lose(server, 0, 3)
    time.sleep(5 * joining.POLL_SECONDS)
    assert not any(rank.generation for rank in waiting)
    generations = [rank.result() for rank in (Rank(server, 0, 3), *waiting)]
    assert generations[0] == generations[1] == generations[2] and generations[0].number == 3


def test_a_call_of_a_world_of_another_size_is_not_answered(server):
    joining._write(server, CALL, Call(1, "other", 2))
    late = Rank(server, 2, 3, seconds=0.3)
    late.join(SECONDS)
    assert not server.check(["infer/answer/other/2"])
    assert str(late.error) == "nothing has come from rank 0 of 3 ranks after 0.3 s"


def test_who_is_missing_is_named_with_the_host_it_was_on(server):
    agree(server, 4)
    ranks = [Rank(server, rank, 4, seconds=0.5) for rank in (0, 2)]
    for rank in ranks:
        rank.join(SECONDS)
        assert str(rank.error) == (
            "nothing has come from rank 1 (last on host host-1), rank 3 (last on host host-3) of 4 ranks after 0.5 s"
        )
    alone = Rank(server, 1, 4, seconds=0.5)
    alone.join(SECONDS)
    assert "from rank 3 (last on host host-3) of 4 ranks" in str(alone.error), "to rank 0's call, which is still there"


def test_nonsense_in_the_store_is_told(server):
    server.set(CALL, '{"number": "one"}')
    rank = Rank(server, 1, 2)
    rank.join(SECONDS)
    assert str(rank.error).startswith("torchrun's store holds b'{\"number\": \"one\"}' at infer/call: Expected `int`")


# ------------------------------------------------------------------------------------------------ connecting


def test_a_member_s_successor_ends_the_generation(server):
    generation = agree(server, 3)
    assert [find_successor(server, generation, rank) for rank in range(3)] == [None] * 3
    successor = Rank(server, 1, 3)
    while (reason := find_successor(server, generation, 0)) is None:
        assert find_successor(server, generation, 2) is None, "rank 0 tells the others"
        time.sleep(0.01)
    assert reason == "rank 1 (host host-1, pid 101) was started anew while the ranks connected"
    assert find_successor(server, generation, 2) == "a rank was started anew while the ranks connected, as rank 0 tells"
    again = [rank.result() for rank in (Rank(server, 0, 3), Rank(server, 2, 3), successor)]
    assert again[0] == again[1] == again[2] and again[0].number == 2
    assert find_successor(server, generation, 2) == "rank 0 was started anew while the ranks connected"


class Members:
    """Processes that join, as threads. told: what launch.end was told in place of a process's end, (rank, reason)."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._joinings: list[Joining] = []
        self._threads: list[threading.Thread] = []

    def end(self, reason: str, env: RankEnv) -> None:
        self.told.put((env.rank, reason))
        raise SystemExit(1)

    def start(self, port: int, rank: int, connect: Callable[[PrefixStore], object], size: int = 2) -> None:
        """A rank that connects by calling `connect` with its store."""
        env = RankEnv(rank=rank, world_size=size, master_addr="127.0.0.1", master_port=port)
        self._joinings.append(Joining(env))
        self._threads.append(threading.Thread(target=self._join, args=(self._joinings[-1], connect), daemon=True))
        self._threads[-1].start()

    def _join(self, one: Joining, connect: Callable[[PrefixStore], object]) -> None:
        with one:
            connect(one.agree()[1])

    def next(self) -> tuple[int, str]:
        rank, reason = self.told.get(timeout=SECONDS)
        return rank, reason.removeprefix("joining the world: ")

    def stop(self) -> None:
        """What the end of a process does to its threads."""
        for one in self._joinings:
            one._joined.set()
            one._deadline.cancel()
            if one._watcher is not None:
                one._watcher.join(SECONDS)
        for thread in self._threads:
            thread.join(SECONDS)


@pytest.fixture
def members(server, monkeypatch) -> Iterator[Members]:
    found = Members()
    monkeypatch.setattr(launch, "end", found.end)
    monkeypatch.setattr(joining, "WATCH_SECONDS", 0.02)
    yield found
    found.stop()


def test_the_members_that_connect_end_when_one_is_replaced(server, members):
    agreed, over = threading.Semaphore(0), threading.Event()

    def connect(store):
        agreed.release()
        over.wait(SECONDS)

    for rank in range(3):
        members.start(server.port, rank, connect, size=3)
    for _ in range(3):
        assert agreed.acquire(timeout=SECONDS)
    Rank(server, 2, 3, seconds=1.0)
    told = dict(members.next() for _ in range(3))
    over.set()
    assert told[0].startswith("rank 2 (host ") and told[0].endswith(") was started anew while the ranks connected")
    assert told[1] == told[2] == "a rank was started anew while the ranks connected, as rank 0 tells"


def test_a_member_that_does_not_connect_is_named(server, members, monkeypatch):
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 0.5)
    over = threading.Event()
    members.start(server.port, 0, lambda store: over.wait(SECONDS))
    members.start(server.port, 1, lambda store: None)
    rank, reason = members.next()
    over.set()
    assert rank == 0 and reason.startswith("rank 0 (host ") and "rank 1" not in reason
    assert reason.endswith("has not connected to the others within 0.5 s")


def test_a_group_that_cannot_be_made_ends_the_rank_with_its_first_line(server, members):
    def fail(store):
        raise RuntimeError("Connection refused\nException raised from connect")

    for rank in range(2):
        members.start(server.port, rank, fail)
    assert {members.next() for _ in range(2)} == {(0, "Connection refused"), (1, "Connection refused")}


def test_a_store_that_is_gone_is_told(members):
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=SECONDS))
    port = store.port
    members.start(port, 0, lambda store: None)
    while not store.check([CALL]):
        time.sleep(0.01)
    del store
    rank, reason = members.next()
    assert rank == 0 and reason.startswith(f"torchrun's store at 127.0.0.1:{port} is lost: ")


# ------------------------------------------------------------------------------------------------ processes


def test_restart_counts_need_not_be_equal(server):
    """Two ranks whose agents count differently make a world, though the store holds one of the same size already."""
    assert agree(server, 2).number == 1
    processes = [say_generation(server.port, rank, count) for rank, count in enumerate((4, 0))]
    try:
        told = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert told == ["generation 2\n"] * 2


def say_generation(port: int, rank: int, restart_count: int) -> subprocess.Popen[str]:
    """One of two ranks, each on a node of its own."""
    environ = {
        **os.environ, "PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(restart_count),
    }  # fmt: skip
    command = [sys.executable, str(SCRIPTS / "say_generation.py")]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
