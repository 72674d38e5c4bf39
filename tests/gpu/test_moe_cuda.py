"""Experts on a GPU: every op against its reference on the CPU, and a layer captured as a graph where it can be."""

import pytest
import torch
from test_ops_moe import CHOICES, SHAPES, choose_experts, make_groups, one_by_one
from test_placement import make_config

from infer import ops_moe
from infer.engine.graphs import CudaCapture
from infer.layers.declare import Placement, declared
from infer.layers.moe import MoE
from infer.models.moe_config import MoeConfig
from infer.parallel.groups import alone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no GPU here"),
]

DEVICE = torch.device("cuda", 0)
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_sorted_by_expert(name):
    tokens, top_k, num_experts, (first, count) = CHOICES[name]
    experts = choose_experts(tokens, top_k, num_experts)
    expected = ops_moe.group_rows_reference(experts, first, count)
    got = ops_moe.group_rows(experts.cuda(), first, count)
    held = int(expected[1][-1])
    assert torch.equal(got[0].cpu()[:held], expected[0][:held])
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(got[1:], expected[1:], strict=True))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_each_row_meets_its_expert(name, dtype):
    x, starts, weight = make_groups(name, dtype)
    expected, held = one_by_one(x, starts, weight), int(starts[-1])
    rows = torch.arange(len(x) - 1, -1, -1)
    on_gpu = weight.cuda()
    for got in (
        ops_moe.grouped_linear(x.cuda(), None, starts.cuda(), on_gpu),
        ops_moe.grouped_linear(x.flip(0).cuda(), rows.cuda(), starts.cuda(), on_gpu),
    ):
        assert got.dtype == dtype and got.shape == (len(x), weight.shape[1])
        tolerance = ROUNDING[dtype]
        torch.testing.assert_close(got[:held].double().cpu(), expected, atol=tolerance, rtol=tolerance)


def test_tokens_get_their_weighted_sum():
    y, place = torch.randn(11, 64).bfloat16(), torch.tensor([[0, 3], [8, -1], [-1, -1], [2, 2]])
    y[9:] = float("nan")
    weights = torch.rand(4, 2)
    expected = ops_moe.combine_rows_reference(y, place, weights)
    got = ops_moe.combine_rows(y.cuda(), place.cuda(), weights.cuda())
    torch.testing.assert_close(got.cpu(), expected, atol=2e-2, rtol=2e-2)


def test_a_captured_layer_follows_its_tokens():
    """Other tokens go to other experts, which a graph only follows if the host has no part in it."""
    moe = MoeConfig(
        num_experts=12, top_k=3, intermediate_size=64, sparse=(True,) * 30, shared_intermediate_size=32,
        shared_gated=True,
    )  # fmt: skip
    layer = MoE("model.layers.0", make_config(hidden_size=128, moe=moe), Placement(alone(), torch.bfloat16, DEVICE))
    for parameter, _ in declared(layer):
        parameter.data.normal_(0.0, 0.1)
    layer.router.weight.data.normal_(0.0, 1.0)
    if not layer.runs_on_device():
        pytest.skip(f"{torch.cuda.get_device_name(DEVICE)} has no grouped products that leave the host out")
    x = torch.zeros(7, 128, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty_like(x)

    def work() -> None:
        out.copy_(layer(x))

    work()
    graph = CudaCapture(DEVICE, pool_bytes=64 << 20)(work)
    for seed in range(3):
        x.copy_(torch.randn(7, 128, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close(out, layer(x), atol=1e-2, rtol=1e-2)
    torch.cuda.synchronize(DEVICE)
    graph.reset()
