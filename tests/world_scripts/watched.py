"""Run on 3 ranks, with restarts: every generation is one scenario, and all but the last end by the watchdog.

The ranks print what they have seen as `NAME VALUE`; a rank that the watchdog ends prints `ended SECONDS`, from the
fault on.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import NoReturn

import torch

from infer.launch import RankEnv, set_parent_death_signal
from infer.parallel import peers
from infer.parallel.groups import Groups, World
from infer.parallel.peers import Limits
from infer.parallel.topology import Topology
from infer.parallel.watchdog import Watchdog

LIMITS = Limits(beat=0.2, silent=1.5, silent_slow=10.0, stuck=1.5, stuck_slow=10.0)
STEP_SECONDS = 0.02
LONGER = 2.0  # than the limits of a phase that is not slow


def say(name: str, value: object) -> None:
    print(name, value, flush=True)


def wait_for_ever() -> NoReturn:
    while True:
        threading.Event().wait()


def work(world: World) -> None:
    """Steps that all ranks take together, until one cannot."""
    groups = Groups(world, Topology.resolve(world.size, world.size, 1), 60, share_memory=False).warm_up()
    world.watchdog.work_out(True)
    try:
        for step in range(1 << 30):
            world.watchdog.progress(step)
            groups.tp.all_reduce(torch.ones(1))
            if step * STEP_SECONDS >= 3 * LIMITS.beat:  # all have told of a step
                yield_to_fault(world)
            time.sleep(STEP_SECONDS)
    except RuntimeError as error:
        world.watchdog.lost(f"a collective failed: {error}")


def yield_to_fault(world: World) -> None:
    """The rank whose turn it is has its fault, now."""
    rank, fault = FAULTS[world.env.restart_count]
    started = time.monotonic()
    world.watchdog.before_end(lambda: say("ended", f"{time.monotonic() - started:.2f}"))
    if fault is stop_elsewhere and world.rank == 2:
        stopped = world.watchdog.table()[rank].pid
        world.watchdog.before_end(lambda: continue_later(stopped))
    if world.rank == rank:
        fault()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_elsewhere() -> None:
    """No survivor can end this rank, for it is on another host; it comes back when they are gone."""
    stop()


def continue_later(pid: int) -> None:
    """Leaves a process behind that lets another go on once this one is gone."""
    wait = f"while kill -0 {os.getpid()} 2>/dev/null; do sleep 0.05; done; kill -CONT {pid}"
    subprocess.Popen(["sh", "-c", wait], start_new_session=True)


FAULTS = {0: (2, kill), 1: (1, stop), 2: (2, wait_for_ever), 3: (0, kill), 4: (1, stop_elsewhere)}


def live(world: World) -> None:
    """Nothing here is a fault: a pause of all, a long hold of Python's lock while loading, and having no work."""
    watchdog = world.watchdog
    watchdog.work_out(False)
    if world.rank == 0:
        pids = " ".join(str(peer.pid) for peer in watchdog.table())
        command = f"kill -STOP {pids}; sleep {LONGER}; kill -CONT {pids}"
        subprocess.Popen(["sh", "-c", command], start_new_session=True).wait()
    world.barrier()
    watchdog.phase("loading", slow=True)
    world.barrier()
    if world.rank == 2:
        ctypes.PyDLL(None).usleep(int(LONGER * 1e6))
    world.barrier()
    watchdog.phase("serving")
    watchdog.progress(7 + world.rank)
    time.sleep(LONGER)
    for peer in watchdog.table():
        say("state", replace(peer, host="", pid=0, phase_seconds=0.0, still_seconds=0.0, age_seconds=0.0))
        say("recent", peer.age_seconds < 5 * LIMITS.beat)
    world.barrier()


def main() -> None:
    env = RankEnv.from_environ()
    set_parent_death_signal(env)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's would end a survivor before it has told what it saw
    torch.set_num_threads(1)
    if FAULTS.get(env.restart_count, (0, None))[1] is stop_elsewhere:
        peers._machine = lambda: 1 + env.rank
    world = World(env, torch.device("cpu"))
    world.watchdog = Watchdog(world, LIMITS)
    world.watchdog.start()
    world.watchdog.phase("serving")
    say("generation", env.restart_count)
    if env.restart_count in FAULTS:
        work(world)
    live(world)
    started = time.monotonic()
    world.destroy()
    say("closed", f"{time.monotonic() - started:.2f}")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
