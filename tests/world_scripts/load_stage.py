"""One rank's part of a checkpoint, loaded as the engine loads it; its groups are asked nothing while loading.

    load_stage.py CHECKPOINT TP_INDEX TP_SIZE PP_INDEX PP_SIZE OPTIONS [onednn]

OPTIONS: further fields of the engine's config, as JSON. onednn: as on a CPU that multiplies bfloat16 in hardware.
Prints the bytes of its parameters.
"""

import json
import sys
from types import SimpleNamespace

import torch

from infer import quant
from infer.config import EngineConfig
from infer.engine.startup import _load_stage
from infer.launch import RankEnv
from infer.models.source import read_model
from infer.parallel.groups import Group
from infer.parallel.topology import Topology


def main() -> None:
    tp, tp_size, pp, pp_size = map(int, sys.argv[2:6])
    if sys.argv[7:] == ["onednn"]:
        quant._multiplies_bfloat16 = lambda: True
    config = EngineConfig(model=sys.argv[1], **json.loads(sys.argv[6]))
    path, model_config = read_model(config)
    groups = SimpleNamespace(
        topology=Topology(tp_size, pp_size),
        pp_rank=pp,
        tp=Group(list(range(tp_size)), tp, None),
        is_first_stage=pp == 0,
        is_last_stage=pp == pp_size - 1,
    )
    world = SimpleNamespace(rank=pp * tp_size + tp, device=torch.device("cpu"), env=RankEnv())
    stage = _load_stage(world, config, path, model_config, groups)  # type: ignore[arg-type]
    print(stage.parameter_bytes)


main()
