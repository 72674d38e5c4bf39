"""Which part is whose: pure arithmetic, checked by its invariants."""

import subprocess
import sys
from pathlib import Path

import pytest

from infer.models.config import ModelConfig, RopeConfig
from infer.parallel.placement import (
    HEAD_SHARE,
    Source,
    WeightSpec,
    balanced_layers,
    check_tensor_parallel,
    split,
    split_heads,
)


def make_config(**changes: object) -> ModelConfig:
    values: dict = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "norm_eps": 1e-5,
        "rope": RopeConfig(dim=64),
        "max_position": 8192,
        "window": (0,) * 30,
    }
    return ModelConfig(**(values | changes))


@pytest.mark.parametrize("total", [1, 2, 7, 9, 1009])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_split_covers_everything_evenly(total: int, parts: int) -> None:
    ranges = split(total, parts)
    assert [item for interval in ranges for item in interval] == list(range(total))
    lengths = [len(interval) for interval in ranges]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_kv_head_shared_by_two_ranks_is_on_both() -> None:
    first, second = split_heads(9, 3, 2)
    assert (first.query, first.kv, first.kv_map) == (range(5), range(2), (0, 0, 0, 1, 1))
    assert (second.query, second.kv, second.kv_map) == (range(5, 9), range(1, 3), (0, 1, 1, 1))


def test_kv_heads_are_replicated_when_there_are_fewer_than_ranks() -> None:
    shards = split_heads(8, 2, 8)
    assert [shard.kv for shard in shards] == [range(1)] * 4 + [range(1, 2)] * 4
    assert all(shard.kv_map == (0,) for shard in shards)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (5, 1), (8, 8), (12, 4), (14, 2)])
def test_every_query_head_reads_its_own_kv_head(heads: int, kv_heads: int) -> None:
    for tp_size in range(1, heads + 1):
        for shard in split_heads(heads, kv_heads, tp_size):
            read = [shard.kv[local] for local in shard.kv_map]
            assert read == [head // (heads // kv_heads) for head in shard.query]
            assert set(read) == set(shard.kv), "no KV head is held in vain"


def test_more_ranks_than_heads_names_both_and_what_works() -> None:
    check_tensor_parallel(make_config(), 9)
    with pytest.raises(ValueError, match=r"tensor_parallel_size 10 .* 9 attention heads; the largest that works is 9"):
        check_tensor_parallel(make_config(), 10)


def test_fewer_mlp_columns_than_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="4 is more than the model's 3 MLP columns; the largest that works is 3"):
        check_tensor_parallel(make_config(intermediate_size=3), 4)


def test_balance_counts_the_head() -> None:
    # SmolLM2-135M: the head has the parameters of 8 layers and costs 5 and a third.
    assert [len(stage) for stage in balanced_layers(make_config(), 2)] == [18, 12]
    # A head that costs next to nothing: even stages, and the odd layer not beside the embedding.
    light = make_config(vocab_size=9)
    assert [len(stage) for stage in balanced_layers(light, 3)] == [10, 10, 10]
    assert [len(stage) for stage in balanced_layers(light, 4)] == [7, 8, 8, 7]


@pytest.mark.parametrize("vocab_size", [9, 1009, 49152, 10**6])
@pytest.mark.parametrize("num_layers", [1, 3, 4, 30])
def test_balance_is_the_best_there_is(vocab_size: int, num_layers: int) -> None:
    c = make_config(vocab_size=vocab_size, num_layers=num_layers)
    head = HEAD_SHARE * vocab_size * c.hidden_size / c.layer_parameters
    for pp_size in range(1, min(num_layers, 5) + 1):
        stages = balanced_layers(c, pp_size)
        assert [layer for stage in stages for layer in stage] == list(range(num_layers))
        assert len(stages) == pp_size
        assert all(stages)
        counts = [len(stage) for stage in stages]
        slowest = max([*counts[:-1], counts[-1] + head])
        assert slowest == pytest.approx(_best_possible(num_layers, pp_size, head))


def _best_possible(num_layers: int, pp_size: int, head: float) -> float:
    if pp_size == 1:
        return num_layers + head
    options = range(1, num_layers - pp_size + 2)
    return min(max(-(-(num_layers - last) // (pp_size - 1)), last + head) for last in options)


def test_explicit_partition() -> None:
    assert balanced_layers(make_config(), 3, (9, 11, 10)) == [range(9), range(9, 20), range(20, 30)]
    with pytest.raises(ValueError, match="9,11,11 sums to 31, but the model has 30 layers"):
        balanced_layers(make_config(), 3, (9, 11, 11))
    with pytest.raises(ValueError, match="15,15 must be 3 positive layer counts"):
        balanced_layers(make_config(), 3, (15, 15))


def test_more_stages_than_layers_names_both() -> None:
    with pytest.raises(ValueError, match=r"pipeline_parallel_size 31 .* 30 layers; the largest that works is 30"):
        balanced_layers(make_config(), 31)


def test_a_spec_stacks_the_blocks_of_its_sources() -> None:
    q = Source("q", (10, 4), (range(2, 5), range(4)))
    k = Source("k", (6, 4), (range(2), range(4)))
    spec = WeightSpec((q, k))
    assert spec.local_shape == (5, 4)
    assert spec.local_numel == 20


def test_these_modules_do_not_import_torch() -> None:
    code = "import sys, infer.parallel.placement, infer.models, infer.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parent.parent)
