"""Joins the world, says its generation, and waits for the others."""

import os

import torch

from infer.launch import RankEnv
from infer.parallel.groups import World

world = World(RankEnv.from_environ(), torch.device("cpu"))
world.barrier()
print("generation", world.generation, flush=True)
os._exit(0)
