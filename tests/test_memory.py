"""What a GPU's memory is divided into, reckoned with figures that stand in for a GPU's."""

import pytest
import torch

from infer import ops_cuda
from infer.cache import pages
from infer.config import EngineConfig
from infer.engine import startup
from infer.models.config import ModelConfig, RopeConfig
from infer.models.decoder import Stage
from infer.parallel.groups import alone
from infer.weights import init_dummy_weights

CPU = torch.device("cpu")
MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=8, intermediate_size=20, norm_eps=1e-5, rope=RopeConfig(dim=8), max_position=64, window=(0,),
    tie_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(("ranks", "gpus", "expected"), [(1, 1, 500), (2, 2, 500), (2, 1, 200), (3, 2, 200), (8, 1, 0)])
def test_ranks_that_share_a_gpu_share_what_is_left(ranks, gpus, expected, monkeypatch):
    """Of 1000 bytes 900 may be used and 300 are in use; each rank takes 100 besides its cache."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = EngineConfig(model="m", gpu_memory_utilization=0.9)
    assert pages.available_bytes(config, torch.device("cuda", 0), ranks, peak_bytes=100) == expected


class Trials:
    """Notes the batches that are tried; a batch takes a byte a row, and the logits and their draw ten a row each."""

    def __init__(self, stage, monkeypatch):
        self.found = []  # of each trial: its sequences' rows
        self._most = 0
        self._forward, self._logits = stage.forward, stage.logits
        for name in ("reset_peak_memory_stats", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + self._most)
        monkeypatch.setattr(stage, "forward", self.forward)
        monkeypatch.setattr(stage, "logits", self.logits)

    def forward(self, x, context):
        self.found.append(context.query_start.diff().tolist())
        assert context.block_table.shape == (len(self.found[-1]), 16)
        self._most = len(x)
        return self._forward(x, context)

    def logits(self, hidden):
        self._most += 10 * len(hidden)
        return self._logits(hidden)


@pytest.mark.parametrize(
    ("rows", "seqs", "tried", "most"),
    [
        (32, 4, [[32], [29, 1, 1, 1]], 32 + 40),
        (32, 1, [[32], [32]], 32 + 10),
        (4, 20, [[4], [1, 1, 1, 1]], 4 + 40),
    ],
)
def test_the_largest_batches_are_tried(rows, seqs, tried, most, monkeypatch):
    """A prompt alone, and one beside all that may decode, whose attention needs scratch memory of its own."""
    stage = Stage(MODEL, range(1), alone(), is_first=True, is_last=True, dtype=torch.float32, device=CPU)
    init_dummy_weights(stage, 0)
    page = pages.allocate(1, 4, stage.kv_layout, 1, torch.float32, CPU)
    config = EngineConfig(model="m", max_num_batched_tokens=rows, max_num_seqs=seqs, block_size=4)
    monkeypatch.setattr(ops_cuda, "gather_room", lambda pages, num_keys, max_model_len: 1000 * num_keys)
    trials = Trials(stage, monkeypatch)
    assert startup._peak_bytes(config, stage, page, 64) == 1000 * tried[1][0] + most
    assert trials.found == tried

    largest = min(rows, seqs)
    assert startup._graph_pool_bytes(config, stage, page, 64) == largest + 10 * largest
    assert trials.found[2:] == [[1] * largest]
