"""Run on every rank: the collectives of groups of CPU ranks, one scenario a run: collectives.py SCENARIO DIRECTORY.

Each rank writes DIRECTORY/RANK.json when it is done.
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infer.launch import RankEnv
from infer.parallel import shm
from infer.parallel.groups import Group, Groups, World
from infer.parallel.topology import Topology

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_SLOT = 4096  # so that tests meet chunks, and shares of chunks, with little data
SHAPES = ([1], [3], [1, 576], [7, 33], [1021], [2, 0], [5, 1024], [9, 1000], [64, 576], [18001])


def main(scenarios: Mapping[str, Any]) -> None:
    scenario, directory = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    env = RankEnv.from_environ()
    world = World(env, torch.device("cpu"))
    result = scenarios[scenario](world)
    (directory / f"{env.rank}.json").write_text(json.dumps(result))
    with contextlib.suppress(RuntimeError):  # where a rank has been killed there is no last meeting
        world.barrier()
    os._exit(0)


def groups(world: World, timeout: int = 60, tp: int = 0, **options: bool) -> Groups:
    tp = tp or world.size
    return Groups(world, Topology.resolve(world.size, tp, world.size // tp), timeout, **options).warm_up()


def shared_group(world: World, size: int, slot_bytes: int) -> Group:
    """A group of the first `size` ranks with small slots; the others only take part in making it."""
    ranks = list(range(size))
    group = dist.new_group(ranks)
    said = shm.introduce(dist.group.WORLD)
    if world.rank >= size:
        return None
    shared = shm.connect(group, ranks, said, world.rank, 60, slot_bytes)
    assert shared is not None
    return Group(ranks, world.rank, group, shared=shared)


def part_of(rank: int, number: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings to one call: known to all, so that each can tell what must come out."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    # Integers: torch's normal draws depend on the vectors it uses.
    values = torch.randint(-(1 << 20), 1 << 20, shape, generator=generator)
    return values.float().mul_(10.0 ** (number % 3 - 5)).to(dtype)


def total_of(size: int, number: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    total = part_of(0, number, shape, dtype).float()
    for rank in range(1, size):
        total += part_of(rank, number, shape, dtype).float()
    return total.to(dtype)


# ------------------------------------------------------------------------------------------------ scenarios


def sums(world: World) -> dict[str, Any]:
    """Groups of 2, 3 and 4 ranks, several slot sizes: sums, in any order of sizes, between gathers."""
    wrong, digest = [], hashlib.sha256()
    cases = [(name, dtype, shape) for name, dtype in DTYPES.items() for shape in SHAPES]
    for size in (2, 3, 4):
        for slot_bytes in (SMALL_SLOT, 64, 1 << 20):
            group = shared_group(world, size, slot_bytes)
            if group is None:
                continue
            for number, (name, dtype, shape) in enumerate(cases):
                if slot_bytes == 64 and shape[0] > 5 and len(shape) == 2:
                    continue  # thousands of chunks teach nothing new
                mine, total = part_of(world.rank, number, shape, dtype), total_of(size, number, shape, dtype)
                if number % 2 and len(shape) == 2:
                    mine = mine.t().contiguous().t()  # the same values, not contiguous
                found = group.all_reduce(mine)
                digest.update(found.contiguous().view(torch.uint8).numpy().tobytes())
                if not torch.equal(found, total):
                    wrong.append(f"{size} ranks, slots of {slot_bytes}, {name} {shape}")
            group.close()
    return {"wrong": wrong, "digest": digest.hexdigest()}


def gathers(world: World) -> dict[str, Any]:
    """Many gathers in a row, in which the first rank is the only one that waits, of all kinds of tensors."""
    wrong = []
    for slot_bytes in (SMALL_SLOT, 64):
        group = shared_group(world, world.size, slot_bytes)
        for number in range(60):
            dtype = (torch.float64, torch.float32, torch.bfloat16, torch.int64)[number % 4]
            rows = (1, 4, 0, 7, 33)[number % 5]
            widths = [(number * 7 + rank * 5) % 23 + (0 if number % 11 == 0 else 1) for rank in range(world.size)]
            parts = [
                part_of(rank, number, [rows, width], torch.float32).mul(100).to(dtype)
                for rank, width in enumerate(widths)
            ]
            mine = parts[world.rank]
            if number % 2:
                mine = mine.t().contiguous().t()
            if world.rank == 0 and number % 13 == 0:
                time.sleep(0.02)  # the others run ahead as far as they may
            found = group.gather(mine, widths)
            expected = torch.cat(parts, dim=-1) if world.rank == 0 else None
            if (found is None) != (expected is None) or (found is not None and not torch.equal(found, expected)):
                wrong.append(f"gather {number}, slots of {slot_bytes}: {dtype} {rows} rows {widths}")
            if number % 7 == 0:
                total = group.all_reduce(torch.full((3,), float(world.rank + number)))
                if total[0] != sum(range(world.size)) + number * world.size:
                    wrong.append(f"sum after gather {number}: {total[0]}")
        group.close()
    return {"wrong": wrong}


def crowd(world: World) -> dict[str, Any]:
    """Thousands of sums; now and then a rank comes late, so that the others sleep."""
    group = groups(world).tp
    started, wrong = time.monotonic(), 0
    for number in range(5000):
        if number % 500 == 100 * world.rank:
            time.sleep(0.002)
        value = group.all_reduce(torch.full((576,), float(world.rank + number)))
        wrong += int(value[5] != sum(range(world.size)) + number * world.size)
    return {"wrong": wrong, "seconds": time.monotonic() - started, "shared": group._shared is not None}


def layouts(world: World) -> dict[str, Any]:
    """Two groups of two, one a stage, made twice in one world; then all without shared memory."""
    shared, sums = [], []
    for options in ({}, {}, {"share_memory": False}):
        made = groups(world, tp=2, **options)
        shared.append(made.tp._shared is not None)
        sums.append(made.tp.all_reduce(torch.tensor([float(1 << world.rank)])).item())
        sums.append(made.tp.all_reduce(torch.tensor([1 << world.rank])).item())  # int64 goes through gloo
        made.close()
    return {"shared": shared, "sums": sums, "maps": _maps()}


def late(world: World) -> dict[str, Any]:
    """Rank 1 does not come to a sum."""
    group = groups(world, timeout=2).tp
    if world.rank == 1:
        world.store.wait(["given up"])
        return {}
    result = _error_of(group, 4)
    world.store.set("given up", "")
    return result


def mixed_up(world: World) -> dict[str, Any]:
    """The ranks call different things."""
    group = groups(world, timeout=5).tp
    return _error_of(group, 3 + world.rank)


def left(world: World) -> dict[str, Any]:
    """Rank 1 closes its group while the other waits."""
    group = groups(world).tp
    if world.rank == 1:
        time.sleep(0.5)
        group.close()
        return {}
    return _error_of(group, 4)


def killed(world: World) -> dict[str, Any]:
    """Rank 2 is killed while the others wait for it, each in its own way."""
    group = groups(world).tp
    if world.rank == 2:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return _error_of(group, 4)


def no_room(world: World) -> dict[str, Any]:
    """Rank 0 may not make as much memory as the segment takes; all use gloo, and say so."""
    if world.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    group = groups(world).tp
    return {"shared": group._shared is not None, "sum": group.all_reduce(torch.ones(3)).tolist()}


def no_entry(world: World) -> dict[str, Any]:
    """Rank 1 may not open the memory that rank 0 has made."""
    if world.rank == 1:
        os.open = _refuse
    group = groups(world).tp
    return {"shared": group._shared is not None, "sum": group.all_reduce(torch.ones(3)).tolist()}


def _refuse(*args: Any) -> int:
    raise PermissionError("not yours")


def plain(world: World) -> dict[str, Any]:
    """What the environment made of it."""
    group = groups(world).tp
    return {"shared": group._shared is not None, "sum": group.all_reduce(torch.ones(3)).tolist()}


def _error_of(group: Group, width: int) -> dict[str, Any]:
    started = time.monotonic()
    try:
        group.all_reduce(torch.ones(width))
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - started}
    return {"error": "", "seconds": time.monotonic() - started}


def _maps() -> int:
    """How many segments this process has mapped."""
    return sum("infer-shared" in line for line in Path("/proc/self/maps").read_text().splitlines())


if __name__ == "__main__":
    main(globals())
