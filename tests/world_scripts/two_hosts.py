"""Run on every rank: tensor-parallel groups over what seems two hosts: two_hosts.py four|six|killed DIRECTORY.

Reports as collectives.py does; of several scenarios in one world, by name.
"""

import contextlib
import hashlib
import os
import signal
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from collectives import DTYPES, _error_of, _maps, groups, main, part_of

from infer.engine import tape
from infer.parallel import shm
from infer.parallel.groups import Groups, World
from infer.parallel.hosts import AcrossHosts

SHAPES = ([1], [3], [1, 576], [7, 33], [1021], [2, 0], [9, 1000], [18001], [600_001])


def split(world: World, first_on_second: int, timeout: int = 60, tp: int = 0) -> Groups:
    """The ranks from `first_on_second` on are on a host of their own."""
    with mock.patch.object(shm, "_host", lambda: 1 + int(world.rank >= first_on_second)):
        return groups(world, timeout, tp)


def sums_over(world: World, made: Groups) -> dict[str, Any]:
    wrong, digest = [], hashlib.sha256()
    for number, (name, dtype) in enumerate(DTYPES.items()):
        for shape in SHAPES:
            mine = part_of(world.rank, number, shape, dtype)
            expected = mine.float()
            dist.all_reduce(expected)
            found = made.tp.all_reduce(mine)
            digest.update(found.view(torch.uint8).numpy().tobytes())
            # Two roundings to the dtype of partial sums that no part exceeds by much, and one of the result.
            scale = 4.0 * torch.finfo(dtype).eps * 10.0 ** (number % 3 - 5) * (1 << 20) * world.size
            if not torch.allclose(found.float(), expected, rtol=0, atol=scale):
                wrong.append(f"{name} {shape}")
    return {"wrong": wrong, "digest": digest.hexdigest(), "kind": type(made.tp._shared).__name__}


# ------------------------------------------------------------------------------------------------ worlds


def four(world: World) -> dict[str, Any]:
    scenarios = (two_and_two, three_and_one, gather, recorded, closed)
    return {scenario.__name__: scenario(world) for scenario in scenarios}


# ------------------------------------------------------------------------------------------------ scenarios


def two_and_two(world: World) -> dict[str, Any]:
    return sums_over(world, split(world, 2))


def three_and_one(world: World) -> dict[str, Any]:
    return sums_over(world, split(world, 3))


def gather(world: World) -> dict[str, Any]:
    """A gather stays on gloo."""
    made = split(world, 2)
    widths = [3, 1, 4, 2]
    found = made.tp.gather(torch.full((2, widths[world.rank]), float(world.rank)), widths)
    return {"found": None if found is None else found.tolist()}


def recorded(world: World) -> dict[str, Any]:
    """A tape records a sum on all ranks alike, whether they use gloo or not."""
    tp = split(world, 2).tp

    def twice(inputs: Any) -> torch.Tensor:
        return tp.all_reduce(tp.all_reduce(inputs[0] * 2) + 1)

    replay = tape.record(twice, [torch.ones(3, 5)], [torch.ones(4, 5)])
    sums = []
    with torch.inference_mode():
        for number in range(20):
            total = replay([torch.full((2, 5), float(world.rank + number))])
            sums.append(total[1, 3].item())
    return {"sums": sums}


def closed(world: World) -> dict[str, Any]:
    """Made twice, closed twice; then on hosts of which one may not share."""
    before = _maps()
    for _ in range(2):
        made = split(world, 2)
        assert isinstance(made.tp._shared, AcrossHosts)
        made.close()
    with mock.patch.object(shm, "make_file", _refuse_file) if world.rank == 2 else contextlib.nullcontext():
        made = split(world, 2)
    total = made.tp.all_reduce(torch.ones(3)).tolist()
    return {"maps left": _maps() - before, "shared": made.tp._shared is not None, "total": total}


def six(world: World) -> dict[str, Any]:
    """tp 3, pp 2, hosts of four ranks and of two: the second stage alone is on both."""
    made = split(world, 4, tp=3)
    return {
        "kind": type(made.tp._shared).__name__,
        "sum": made.tp.all_reduce(torch.tensor([float(10**world.rank)])).item(),
        "pipe": [made.pipe._inlet is not None, made.pipe._outlet is not None],
    }


def killed(world: World) -> dict[str, Any]:
    """The first rank of the second host is killed."""
    tp = split(world, 2, timeout=10).tp
    if world.rank == 2:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return _error_of(tp, 4)


def _refuse_file(*sizes: int) -> int:
    raise OSError("not here")


if __name__ == "__main__":
    main(globals())
