"""Who is given up and who is not, without ranks; then real ranks that are killed, stopped and stuck."""

import re
import subprocess
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from worlds import SCRIPTS, run_world

from infer.launch import RankEnv, process_key
from infer.parallel import peers
from infer.parallel.peers import AwakeClock, Fault, Identity, Limits, PeerState, Standing, judge
from infer.parallel.watchdog import NCCL_ENVIRONMENT, Watchdog, set_nccl_environment
from infer.signals import Order

LIMITS = Limits()


def serving(rank: int, **changes: object) -> PeerState:
    return replace(PeerState(rank, f"node-{rank}", 100 + rank, phase="serving", slow=False), **changes)  # type: ignore


def blamed(*states: PeerState) -> list[tuple[int, Fault]]:
    return [(peer.rank, peer.fault) for peer in judge(states, LIMITS)]


# ------------------------------------------------------------------------------------------------ policy


def test_silence_is_short_while_serving_and_long_while_any_rank_loads():
    assert blamed(serving(0), serving(1, age_seconds=4.9)) == []
    assert blamed(serving(0), serving(1, age_seconds=5.1)) == [(1, Fault.SILENT)]
    assert blamed(serving(0, slow=True), serving(1, age_seconds=59)) == []
    assert blamed(serving(0, slow=True), serving(1, age_seconds=61)) == [(1, Fault.SILENT)]


def test_ranks_that_went_together_are_named_together():
    states = [serving(0), serving(1, age_seconds=1.2), serving(2, age_seconds=5.1), serving(3, age_seconds=4.4)]
    assert blamed(*states) == [(2, Fault.SILENT), (3, Fault.SILENT)]


def test_only_a_rank_with_work_is_stuck():
    assert blamed(serving(0), serving(1, still_seconds=1e6)) == []
    assert blamed(serving(0), serving(1, work_out=True, still_seconds=9.9)) == []
    assert blamed(serving(0), serving(1, work_out=True, still_seconds=10.1)) == [(1, Fault.STUCK)]
    assert blamed(serving(0), serving(1, work_out=True, slow=True, still_seconds=1799)) == []
    assert blamed(serving(0), serving(1, work_out=True, slow=True, still_seconds=1801)) == [(1, Fault.STUCK)]


def test_of_a_hung_collective_the_rank_that_does_not_wait_is_named():
    waiting = [serving(rank, work_out=True, waits=True, still_seconds=11, step=5) for rank in range(3)]
    assert blamed(*waiting[:2], serving(2, work_out=True, still_seconds=10.5, step=5)) == [(2, Fault.STUCK)]
    # A rank that computes keeps the others waiting, with right.
    assert blamed(*waiting[:2], serving(2, work_out=True, still_seconds=0.5, step=5)) == []
    # All wait for one another; the last is a step behind.
    assert blamed(*waiting[:2], replace(waiting[2], step=4)) == [(2, Fault.STUCK)]
    assert blamed(*waiting) == [(0, Fault.STUCK), (1, Fault.STUCK), (2, Fault.STUCK)]


def test_a_pause_of_this_process_makes_nobody_old():
    now = 100.0
    clock = AwakeClock(1.0, lambda: now)
    heard = clock.now()
    for _ in range(4):
        now += 0.5
        clock.tick()
    assert clock.now() - heard == 2.0
    now += 3600.0
    assert clock.now() - heard == 3.0, "before the watchdog's thread has come to its tick"
    clock.tick()
    now += 0.25
    assert clock.now() - heard == 3.25


def standing(computing: bool = True, limits: Limits = LIMITS) -> tuple[Standing, AwakeClock]:
    clock = AwakeClock(60.0)
    return Standing(Identity(3, "node", 1, 2, 3), clock, limits, computing), clock


def test_the_main_loop_moves_with_its_step_and_its_work():
    own, _ = standing(computing=False)
    own.set_phase("serving", slow=False)
    time.sleep(0.05)
    own.set_work_out(True)  # begins to count here
    assert own.state().still_seconds < 0.04
    own.progress(1, waits=False)
    time.sleep(0.05)
    own.progress(1, waits=True)  # no move: it is the same step
    own.set_work_out(True)
    state = own.state()
    assert state.still_seconds >= 0.05 and (state.step, state.waits, state.work_out) == (1, True, True)
    own.progress(2, waits=False)
    assert own.state().still_seconds < 0.04


@pytest.mark.parametrize("computing", [True, False])
def test_a_long_step_on_a_cpu_is_not_stuck_and_a_sleeping_one_is(computing):
    """On a GPU the CPU time of the main loop proves nothing: waiting for the device takes it too."""
    own, _ = standing(computing)
    own.set_phase("serving", slow=False)
    own.set_work_out(True)
    own.progress(1, waits=False)
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        pass
    own.observe()
    assert (own.state().still_seconds < 0.1) is computing
    threading.Event().wait(0.3)
    own.observe()
    assert own.state().still_seconds >= 0.3


def test_where_a_main_loop_stands():
    own, _ = standing(False, Limits(beat=0.01, silent=1, silent_slow=1, stuck=1, stuck_slow=1))
    own.set_work_out(True)
    own.progress(1, waits=False)
    time.sleep(0.05)
    clock = AwakeClock(0.02, lambda: watch(own))
    clock.now()
    state = own.state()
    assert re.fullmatch(r"parallel/peers\.py:\d+ in now", seen.where) and seen.waits, seen
    assert state.rank == 3


seen = PeerState(0, "", 0)


def watch(own: Standing) -> float:
    """Has another thread look at this one, which is inside the program's code."""
    global seen
    thread = threading.Thread(target=own.observe)
    thread.start()
    thread.join()
    seen = own.state()
    return 0.0


# ------------------------------------------------------------------------------------------------ messages


def test_a_table_comes_over_as_it_was():
    world = [Identity(0, "höst-a", 11, 5, 6), Identity(1, "b", 12, (3 << 31) + 7, 1 << 24)]
    table = [
        PeerState(0, "höst-a", 11, step=2**31 - 1, phase="serving", slow=False, work_out=True, waits=True,
                  phase_seconds=12.345, still_seconds=1.5, age_seconds=0.25, where="engine/loop.py:3 in run",
                  order=Order.STOP_NOW),
        PeerState(1, "b", 12, fault=Fault.STUCK),
    ]  # fmt: skip
    assert peers.decode(peers.encode(table, 4, farewell=True), 4, world) == (table, True)
    assert peers.decode(
        peers.encode([replace(table[0], step=2**31, where="ä" * 40, phase_seconds=1e9)], 4, False), 4, world
    )


def test_a_message_of_another_generation_is_refused():
    words = peers.encode([PeerState(0, "a", 1)], 3, farewell=False)
    world = [Identity(0, "a", 1, 0, 0)]
    with pytest.raises(ValueError, match="generation 3 and 1 rows; expected magic 0x57415443 and generation 4"):
        peers.decode(words, 4, world)
    with pytest.raises(ValueError, match="magic 0x0"):
        peers.decode(np.zeros_like(words), 4, world)
    with pytest.raises(ValueError, match="about rank 1 in a world of 1"):
        peers.decode(peers.encode([PeerState(1, "a", 1)], 4, False), 4, world)


def test_limits_are_longer_than_beats():
    with pytest.raises(ValueError, match=r"silent \(2 s\) must be at least three beats of 1 s"):
        Limits(silent=2)
    with pytest.raises(ValueError, match=r"beat .* must be positive"):
        Limits(beat=0)


def test_one_rank_has_a_table_and_no_threads():
    env = RankEnv()
    threads = threading.active_count()
    world = {"env": env, "rank": 0, "size": 1, "device": torch.device("cpu"), "watch_group": None, "generation": 0}
    watchdog = Watchdog(SimpleNamespace(**world, members=[peers.own_identity(0, "node")]))
    watchdog.start()
    watchdog.phase("serving")
    watchdog.work_out(True)
    watchdog.progress(3)
    (state,) = watchdog.table()
    assert (state.rank, state.phase, state.slow, state.step, state.work_out) == (0, "serving", False, 3, True)
    assert threading.active_count() == threads
    watchdog.close()


def test_a_signal_means_a_loss_where_a_neighbour_s_process_is_gone():
    """torchrun has waited for such a rank before it tells the others; one that is told to end as well still lives."""
    watchdog = Watchdog(
        SimpleNamespace(env=RankEnv(), rank=0, size=2, device=torch.device("cpu"), watch_group=None)
    )
    assert not watchdog.is_any_lost()
    with subprocess.Popen(["sleep", "60"]) as process:
        start_time = int(process_key(process.pid).partition("-")[2])
        neighbour = replace(watchdog._identity, rank=1, pid=process.pid, start_time=start_time)
        watchdog._world = [watchdog._identity, neighbour]
        assert not watchdog.is_any_lost()
        process.kill()
        process.wait()
        assert watchdog.is_any_lost()
    watchdog._world = [watchdog._identity, replace(neighbour, machine=neighbour.machine + 1)]
    assert not watchdog.is_any_lost(), "of another host nothing can be told"
    watchdog._world = [watchdog._identity, replace(neighbour, pid=watchdog._identity.pid)]
    assert watchdog.is_any_lost(), "the number is another process's now"


def test_what_the_user_set_for_nccl_stands():
    environ = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "100"}
    set_nccl_environment(environ)
    assert environ == NCCL_ENVIRONMENT | {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "100"}


# ------------------------------------------------------------------------------------------------ ranks


@pytest.fixture(scope="module")
def generations():
    """A world of 3 ranks that ends five times, each time in another way, and then well. attempt, rank -> its log."""
    result = run_world(SCRIPTS / "watched.py", ranks=3, restarts=5, timeout=150)
    assert result.returncode == 0, result.report()
    return {(log.attempt, log.rank): log for log in result.ranks}


def check(generations, attempt: int, rank: int, fault: str, within: tuple[float, float], survivors=None) -> None:
    """Every survivor has named the rank, its host and phase, in one line, in time."""
    for survivor in survivors or {0, 1, 2} - {rank}:
        log = generations[attempt, survivor]
        line = (
            rf"infer: rank {survivor} ends: rank {rank} \(host [\w.-]+, pid \d+\), phase serving "
            rf"since [\d:]+, step \d+: {fault}\n"
        )
        assert re.search(line, log.stderr), log
        assert log.stderr.count("infer: rank") == 1, log
        (seconds,) = re.findall(r"ended (\S+)", log.stdout)
        assert within[0] <= float(seconds) <= within[1], log


def test_a_killed_rank_is_named_at_once(generations):
    check(generations, 0, 2, r"gone, its connection closed at [\d:]+", (0, 1.0))


def test_a_stopped_rank_is_named_and_killed(generations):
    check(generations, 1, 1, r"silent since [\d:]+ \(\d\.\d s\)", (1.0, 4.0))
    assert "infer:" not in generations[1, 1].stderr, "a survivor has killed it"


def test_a_hung_main_loop_is_named_and_not_those_that_wait_for_it(generations):
    check(generations, 2, 2, r"its main loop has not moved since [\d:]+ \(\d\.\d s\)", (1.0, 4.0), survivors={0, 1, 2})


def test_the_loss_of_rank_0_is_named(generations):
    check(generations, 3, 0, r"gone, its connection closed at [\d:]+", (0, 1.0))


def test_a_stopped_rank_that_comes_back_when_the_others_are_gone_ends(generations):
    check(generations, 4, 1, r"silent since [\d:]+ \(\d\.\d s\)", (1.0, 4.0))
    assert re.search(r"infer: rank 1 ends: rank 0 \(host .* gone", generations[4, 1].stderr), generations[4, 1]


def test_nobody_is_blamed_for_a_pause_a_held_lock_or_idleness(generations):
    for rank in range(3):
        log = generations[5, rank]
        assert "infer:" not in log.stderr, log
        lines = log.stdout.splitlines()
        states = [PeerState(r, "", 0, step=7 + r, phase="serving", slow=False) for r in range(3)]
        assert [line for line in lines if line.startswith("state")] == [f"state {state}" for state in states], log
        assert lines.count("recent True") == 3, log
        assert float(lines[-1].removeprefix("closed ")) < 2.0, log
