"""CUDA graphs and the memory they share."""

import pytest
import torch

from infer.engine.graphs import CudaCapture, Work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no GPU here"),
]

DEVICE = torch.device("cuda", 0)
MIB = 1 << 20


def work_on(x: torch.Tensor, out: torch.Tensor) -> Work:
    """3 * x^2 + 1, with three tensors like x at once."""

    def work() -> None:
        square = x * x
        out.copy_(square * 3 + 1)

    return work


def test_the_pool_is_as_large_as_the_largest_work_needs() -> None:
    """Though it is captured last, and each tensor is larger than any before."""
    sizes = [n * MIB for n in range(2, 33, 3)]  # bytes
    pairs = [[torch.ones(size // 4, device=DEVICE) for _ in range(2)] for size in sizes]
    capture, graphs, reserved = CudaCapture(DEVICE, pool_bytes=3 * sizes[-1]), [], []
    torch.cuda.empty_cache()
    for x, out in pairs:
        graphs.append(capture(work_on(x, out)))
        reserved.append(torch.cuda.memory_reserved(DEVICE))
    assert max(reserved) - min(reserved) <= 4 * MIB, reserved

    for number, (x, _) in enumerate(pairs):
        x.fill_(number)
    for graph in (*graphs, *reversed(graphs)):
        graph.replay()
    for number, (_, out) in enumerate(pairs):
        assert (out == 3 * number**2 + 1).all()

    torch.cuda.synchronize(DEVICE)
    for graph in graphs:
        graph.reset()
    del graphs, graph, capture
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) <= reserved[-1] - 3 * sizes[-1] + 4 * MIB
