"""This process's place in the world: joined once, shared by every engine it builds one after the other."""

import atexit
import logging
import os
import signal
import sys
from typing import NoReturn

import torch

from infer.config import EngineConfig
from infer.engine.batch import Kind
from infer.engine.loop import Courier, Engine, follow, leave
from infer.launch import RankEnv
from infer.parallel.groups import World
from infer.parallel.peers import PeerState
from infer.parallel.watchdog import set_nccl_environment
from infer.signals import end_script_on_sigterm

LOG_FORMAT = "%(levelname)s %(asctime)s [{rank}%(name)s] %(message)s"


def set_up_logging(env: RankEnv) -> None:
    """Lets the program's log lines through, unless the application has set up logging itself."""
    logger = logging.getLogger("infer")
    if logging.getLogger().handlers or logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    rank = f"rank {env.rank} " if env.world_size > 1 else ""
    handler.setFormatter(logging.Formatter(LOG_FORMAT.format(rank=rank), datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class Process:
    """Rank 0's world and the courier to the other ranks."""

    _joined: "Process | None" = None

    def __init__(self, env: RankEnv):
        self.env = env
        self.world = _join_world(env)
        end_script_on_sigterm(self._end_if_lost)
        self.world.watchdog.when_ordered(self._take_order)
        self.courier = Courier(self.world)
        self.engine: Engine | None = None  # the open one
        self._num_engines = 0
        self._broken: str | None = None  # what ended a build half-way: the other ranks may be anywhere in it

    @classmethod
    def join(cls, env: RankEnv) -> "Process":
        """Joins the world (once). On every rank but 0 this does not return: they serve rank 0 and end with it."""
        if cls._joined is None:
            set_up_logging(env)
            if env.rank != 0:
                follow(_join_world(env))
            cls._joined = cls(env)
            atexit.register(cls._joined.leave)
        return cls._joined

    def build_engine(self, config: EngineConfig) -> Engine:
        """An engine over all ranks, which is the open one until `engine` is None again.

        Raises StartupError, a ValueError, of which every rank has learned. After anything else, such as Ctrl-C, the
        world cannot go on.
        """
        self._num_engines += 1
        try:
            self.engine = Engine(self.world, self.courier, config, number=self._num_engines)
        except ValueError:
            raise
        except BaseException as error:
            self._broken = repr(error)
            raise
        return self.engine

    def _end_if_lost(self) -> None:
        """Ends this process if torchrun's signal came because another rank has ended; the watchdog tells which."""
        if self.world.watchdog.is_any_lost():
            self.world.watchdog.lost("another rank has ended, and torchrun ends this one")

    def _take_order(self, peer: PeerState) -> None:
        """Another rank was told to end; a script hears of it as of a signal of its own. On its own host it had that."""
        if self.world.watchdog.is_elsewhere(peer.rank):
            os.kill(os.getpid(), signal.SIGTERM)

    def leave(self) -> None:
        """Ends the followers and the world. One that is broken ends without ceremony: nobody would answer."""
        engine = self.engine
        broken = self._broken if engine is None else engine.broken
        if broken is not None and self.world.size > 1:
            if not broken.startswith(("SystemExit", "KeyboardInterrupt")):  # which have been told already
                print(f"infer: all ranks end: the engine was stopped by {broken}", file=sys.stderr)
            _exit(1)
        try:
            if engine is not None and self.world.size > 1:
                engine.close()  # the script did not: NCCL's groups do not end while the ranks have CUDA graphs
            self.courier.send(Kind.EXIT)
            self.courier.close()
            leave(self.world)
        except RuntimeError as error:
            print(f"infer: the world ended early: {error}".splitlines()[0], file=sys.stderr)
            _exit(1)


def _join_world(env: RankEnv) -> World:
    """Joins the other ranks; from here on a loss of any ends this one."""
    set_nccl_environment()
    world = World(env, pick_device(env))
    world.watchdog.start()
    return world


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def pick_device(env: RankEnv) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", env.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
