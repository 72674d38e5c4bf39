"""Run on every rank: pipes between stages of one rank each: hand_overs.py four|two|killed DIRECTORY.

Reports as collectives.py does; of several scenarios in one world, by name.
"""

import contextlib
import os
import resource
import signal
import time
from typing import Any
from unittest import mock

import torch
from collectives import DTYPES, _maps, _refuse, groups, main, part_of

from infer.parallel import shm, shm_pipe
from infer.parallel.groups import Groups, World

SHAPES = ([1, 1], [16, 768], [0, 5], [3, 7], [31, 33], [1, 1024], [300, 41])


def stages(world: World, slot_bytes: int = shm_pipe.SLOT_BYTES, timeout: int = 60, **options: bool) -> Groups:
    smaller = mock.patch.dict(shm_pipe.connect.__kwdefaults__, slot_bytes=slot_bytes)
    with smaller:
        return groups(world, timeout, tp=1, **options)


def kinds(made: Groups) -> list[bool]:
    """Whether hidden states come and go through shared memory."""
    return [made.pipe._inlet is not None, made.pipe._outlet is not None]


# ------------------------------------------------------------------------------------------------ worlds


def four(world: World) -> dict[str, Any]:
    return {scenario.__name__: scenario(world) for scenario in (batches, crowd, no_room, no_entry, hosts, switched_off)}


def two(world: World) -> dict[str, Any]:
    return {scenario.__name__: scenario(world) for scenario in (ahead, memory, idle, late, left, mixed_up)}


# ------------------------------------------------------------------------------------------------ scenarios


def batches(world: World) -> dict[str, Any]:
    """All dtypes and shapes through every stage, with slots that hold all, or a part, of them, or 64 bytes."""
    wrong, found = [], []
    for slot_bytes in (shm_pipe.SLOT_BYTES, 4096, 128):
        made, step = stages(world, slot_bytes), 0
        found.append(kinds(made))
        for name, dtype in DTYPES.items():
            for shape in SHAPES:
                step += 1
                expected = part_of(0, step, shape, dtype)
                if made.is_first_stage:
                    tensor = expected if step % 2 else expected.t().contiguous().t()  # the same, not contiguous
                else:
                    tensor = made.pipe.post_receive(tuple(shape), dtype, step)()
                    if not torch.equal(tensor, expected):
                        wrong.append(f"slots of {slot_bytes}, {name} {shape}")
                if not made.is_last_stage:
                    made.pipe.send(tensor, step)
        made.close()
    return {"wrong": wrong, "shared": found, "maps": _maps()}


def ahead(world: World) -> dict[str, Any]:
    """Batches are sent before the receiver comes: as many as there are slots, and one more, which waits."""
    made = stages(world, slot_bytes=4096)
    num_slots, seconds = world.size + 1, []
    for step in range(1, num_slots + 2):
        if world.rank == 0:
            started = time.monotonic()
            made.pipe.send(torch.full((32,), float(step)), step)
            seconds.append(time.monotonic() - started)
        elif step == 1:
            time.sleep(1)
    got = []
    if world.rank == 1:
        got = [made.pipe.post_receive((32,), torch.float32, step)()[3].item() for step in range(1, num_slots + 2)]
    made.close()
    return {"seconds": seconds, "got": got}


def memory(world: World) -> dict[str, Any]:
    """Bytes that the pipe's file takes, after small batches and a large one."""
    made, taken = stages(world), []
    for step, rows in enumerate((1, 1, 1, 1, 1000), start=1):
        if world.rank == 0:
            made.pipe.send(torch.ones(rows, 1024), step)
        else:
            made.pipe.post_receive((rows, 1024), torch.float32, step)()
        taken.append(_file_bytes() if world.rank == 0 else 0)
    made.close()
    return {"taken": taken}


def _file_bytes() -> int:
    """Of the one file this process has open whose name says that it is shared."""
    for number in os.listdir("/proc/self/fd"):
        try:
            if "infer-shared" in os.readlink(f"/proc/self/fd/{number}"):
                return 512 * os.stat(f"/proc/self/fd/{number}").st_blocks
        except OSError:  # the one that listed the directory
            continue
    raise AssertionError("no shared file is open")


def crowd(world: World) -> dict[str, Any]:
    """Thousands of batches through more stages than cores, in both directions of waiting."""
    made, wrong, started = stages(world), 0, time.monotonic()
    for step in range(1, 3001):
        tensor = torch.full((16, 96), float(step))
        if not made.is_first_stage:
            tensor = made.pipe.post_receive((16, 96), torch.float32, step)()
            wrong += int(tensor[7, 7] != step)
        if step % 500 == 100 * world.rank:
            time.sleep(0.002)
        if not made.is_last_stage:
            made.pipe.send(tensor, step)
    return {"wrong": wrong, "seconds": time.monotonic() - started, "shared": kinds(made)}


def idle(world: World) -> dict[str, Any]:
    """Rank 1 waits for a batch for two seconds."""
    made = stages(world)
    before = _cpu_seconds()
    if world.rank == 0:
        time.sleep(2)
        made.pipe.send(torch.ones(4), 1)
    else:
        made.pipe.post_receive((4,), torch.float32, 1)()
    return {"cpu": _cpu_seconds() - before}


def killed(world: World) -> dict[str, Any]:
    """Rank 1 of three stages is killed: the next waits for its batch, the one before for room."""
    made = stages(world)
    if world.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == 0:
        return _error_of(lambda: [made.pipe.send(torch.ones(4), step) for step in range(1, 10)])
    return _error_of(made.pipe.post_receive((4,), torch.float32, 1))


def late(world: World) -> dict[str, Any]:
    """Rank 0 sends nothing."""
    made = stages(world, timeout=2)
    if world.rank == 0:
        world.store.wait(["given up"])
        return _error_of(lambda: made.pipe.send(torch.ones(4), 1))
    result = _error_of(made.pipe.post_receive((4,), torch.float32, 1))
    world.store.set("given up", "")
    return result


def left(world: World) -> dict[str, Any]:
    """Rank 0 sends a batch and closes its groups; then rank 1 does."""
    made = stages(world)
    if world.rank == 0:
        made.pipe.send(torch.ones(4), 1)
        made.pipe._outlet.close()
        return {}
    time.sleep(0.5)
    first = made.pipe.post_receive((4,), torch.float32, 1)()
    return {"first": first.tolist(), **_error_of(made.pipe.post_receive((4,), torch.float32, 2))}


def mixed_up(world: World) -> dict[str, Any]:
    """The ranks mean different batches."""
    made = stages(world)
    if world.rank == 0:
        made.pipe.send(torch.ones(4), 1)
        world.store.wait(["seen"])
        return _error_of(lambda: made.pipe.send(torch.ones(4), 2))
    result = _error_of(made.pipe.post_receive((5,), torch.float32, 2))
    world.store.set("seen", "")
    return result


def no_room(world: World) -> dict[str, Any]:
    """Rank 1 may not make its file; the others may."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        return _through(stages(world))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def no_entry(world: World) -> dict[str, Any]:
    """Rank 1 may not open rank 0's file."""
    with mock.patch.object(os, "open", _refuse) if world.rank == 1 else contextlib.nullcontext():
        return _through(stages(world))


def hosts(world: World) -> dict[str, Any]:
    """Ranks 2 and 3 seem to be on another host than ranks 0 and 1."""
    with mock.patch.object(shm, "_host", lambda: 1 + world.rank // 2):
        return _through(stages(world))


def switched_off(world: World) -> dict[str, Any]:
    return _through(stages(world, share_memory=False))


def _through(made: Groups) -> dict[str, Any]:
    tensor = torch.arange(6.0) if made.is_first_stage else made.pipe.post_receive((6,), torch.float32, 1)()
    if not made.is_last_stage:
        made.pipe.send(tensor, 1)
    return {"shared": kinds(made), "tensor": tensor.tolist()}


def _error_of(call: Any) -> dict[str, Any]:
    started = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - started}
    return {"error": "", "seconds": time.monotonic() - started}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(globals())
