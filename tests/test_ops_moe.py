"""The ops of a mixture of experts: kernels against references, and references against a loop that is plainly right."""

import pytest
import torch
from torch import Tensor

from infer import native, ops, ops_moe
from infer.quant import PackedStack, PlainStack, choose_stack

needs_kernels = pytest.mark.skipif(not native.is_loaded(), reason="the native kernels are not loaded")
DTYPES = [torch.float32, torch.bfloat16]

# Tokens, experts of each, all experts, (first held, number held)
CHOICES = {
    "all held": (7, 3, 5, (0, 5)),
    "some held": (9, 2, 8, (3, 2)),
    "none held": (4, 2, 8, (6, 0)),
    "no tokens": (0, 2, 4, (0, 4)),
    "one of each": (1, 1, 3, (0, 3)),
    "many": (150, 4, 16, (4, 9)),
}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def choose_experts(tokens: int, top_k: int, num_experts: int) -> Tensor:
    """[tokens, top_k] int64, different ones in each row."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k, dim=-1).indices


@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_sorted_by_expert(name):
    tokens, top_k, num_experts, (first, count) = CHOICES[name]
    experts = choose_experts(tokens, top_k, num_experts)
    for group in {ops_moe.group_rows, ops_moe.group_rows_reference}:
        rows, starts, place = group(experts, first, count)
        assert (rows.dtype, starts.dtype, place.dtype) == (torch.int64, torch.int32, torch.int64)
        assert (rows.shape, starts.shape, place.shape) == ((tokens * top_k,), (count + 1,), (tokens, top_k))
        bounds = starts.tolist()
        for e in range(count):
            expected = [t for t in range(tokens) if first + e in experts[t]]
            assert rows[bounds[e] : bounds[e + 1]].tolist() == expected, f"expert {first + e}"
        for t in range(tokens):
            for j in range(top_k):
                e = int(experts[t, j]) - first
                if 0 <= e < count:
                    assert rows[place[t, j]] == t and bounds[e] <= place[t, j] < bounds[e + 1]
                else:
                    assert place[t, j] == -1
        assert ((rows >= 0) & (rows < max(1, tokens))).all(), "what is not held must be safe to read"


# Rows of each expert, inputs, outputs.
SHAPES = {
    "one expert": ([5], 16, 32),
    "empty ones": ([0, 3, 0, 0, 7, 0], 24, 48),
    "none at all": ([0, 0], 8, 16),
    "all on one": ([0, 61, 0], 40, 80),
    "odd": ([1, 2, 3, 1], 37, 53),
    "one input": ([2, 2], 1, 1),
    "wide": ([1, 0, 1, 1, 0, 1, 1, 1, 1, 1], 96, 400),
    "tall": ([130, 1, 77], 129, 65),
    "long": ([3, 50], 4500, 20),
}


def make_groups(name: str, dtype: torch.dtype, extra: int = 2):
    """(x sorted, starts, weight); `extra` rows come after the last expert's."""
    counts, inputs, outputs = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(sum(counts) + extra, inputs, generator=generator).to(dtype)
    weight = (torch.randn(len(counts), outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    return x, torch.tensor([0, *counts]).cumsum(0).int(), weight


def one_by_one(x: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    bounds = starts.tolist()
    expert = [e for e in range(len(weight)) for _ in range(bounds[e], bounds[e + 1])]
    products = [weight[e].double() @ x[row].double() for row, e in enumerate(expert)]
    return torch.stack(products) if products else x.new_zeros(0, weight.shape[1]).double()


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_each_row_meets_its_expert(name, dtype):
    x, starts, weight = make_groups(name, dtype)
    expected, held = one_by_one(x, starts, weight), int(starts[-1])
    # Rows in another order, as a router leaves them.
    generator = torch.Generator().manual_seed(1)
    shuffled = torch.randperm(len(x), generator=generator)
    rows = torch.empty_like(shuffled)
    rows[shuffled] = torch.arange(len(x))
    packed = torch.stack([ops.pack_linear(w) for w in weight])
    outputs = weight.shape[1]
    for got in (
        ops_moe.grouped_linear(x, None, starts, weight),
        ops_moe.grouped_linear(x[shuffled], rows, starts, weight),
        ops_moe.packed_grouped_linear_reference(x[shuffled], rows, starts, packed, outputs),
        ops_moe.packed_grouped_linear(x, None, starts, packed, outputs),
        ops_moe.packed_grouped_linear(x[shuffled], rows, starts, packed, outputs),
    ):
        assert got.dtype == dtype and got.shape == (len(x), outputs)
        torch.testing.assert_close(got[:held].double(), expected, atol=tolerance(dtype), rtol=tolerance(dtype))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    """To the last bit, whatever else its expert and the others have to do."""
    x, starts, weight = make_groups("tall", dtype, extra=0)
    packed = torch.stack([ops.pack_linear(w) for w in weight])
    whole = ops_moe.packed_grouped_linear(x, None, starts, packed, weight.shape[1])
    bounds = starts.tolist()
    for row in (0, 17, 129, 130, 131, 207):
        expert = next(e for e in range(3) if row < bounds[e + 1])
        alone = torch.tensor([0, 0, 0, 0], dtype=torch.int32)
        alone[expert + 1 :] = 1
        got = ops_moe.packed_grouped_linear(x, torch.tensor([row]), alone, packed, weight.shape[1])
        assert torch.equal(got[0], whole[row]), f"row {row}"
        assert torch.equal(got[0], ops.packed_linear(x[row : row + 1], packed[expert], None, weight.shape[1])[0])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    x, starts, weight = make_groups("wide", torch.float32, extra=0)
    x, weight = x.repeat(1, 30), weight.repeat(1, 1, 30)  # enough work to be shared out
    packed = torch.stack([ops.pack_linear(w) for w in weight])
    expected = ops_moe.packed_grouped_linear(x, None, starts, packed, weight.shape[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops_moe.packed_grouped_linear(x, None, starts, packed, weight.shape[1]), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 37, 300])
def test_tokens_get_their_weighted_sum(width, dtype):
    generator = torch.Generator().manual_seed(width)
    y = torch.randn(11, width, generator=generator).to(dtype)
    y[9:] = float("nan")  # rows of other ranks' experts hold anything
    place = torch.tensor([[0, 3], [8, -1], [-1, -1], [2, 2]])
    weights = torch.rand(4, 2, generator=generator)
    expected = torch.zeros(4, width)
    for t in range(4):
        for j in range(2):
            if place[t, j] >= 0:
                expected[t] += weights[t, j] * y[place[t, j]].float()
    for combine in {ops_moe.combine_rows, ops_moe.combine_rows_reference}:
        got = combine(y, place, weights)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, atol=tolerance(dtype), rtol=tolerance(dtype))
    assert ops_moe.combine_rows(y, place[:0], weights[:0]).shape == (0, width)


@needs_kernels
def test_wrong_indices_are_refused_by_name():
    x, starts, weight = make_groups("odd", torch.float32)
    packed, outputs = torch.stack([ops.pack_linear(w) for w in weight]), weight.shape[1]
    wrong = starts.clone()
    wrong[-1] = len(x) + 1
    with pytest.raises(IndexError, match="packed_grouped_linear: starts must rise from 0 to the 9 rows"):
        ops_moe.packed_grouped_linear(x, None, wrong, packed, outputs)
    with pytest.raises(IndexError, match="packed_grouped_linear: starts must rise"):
        ops_moe.packed_grouped_linear(x, None, starts.flip(0), packed, outputs)
    rows = torch.arange(len(x))
    rows[3] = len(x)
    with pytest.raises(IndexError, match=r"packed_grouped_linear: rows\[3\] is 9"):
        ops_moe.packed_grouped_linear(x, rows, starts, packed, outputs)
    with pytest.raises(ValueError, match="packed_grouped_linear: x has 36 columns, the weights 37"):
        ops_moe.packed_grouped_linear(x[:, 1:], None, starts, packed, outputs)
    with pytest.raises(IndexError, match=r"combine_rows: place\[0, 1\] is 9"):
        ops_moe.combine_rows(x, torch.tensor([[0, 9]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="group_rows: experts has dtype Int"):
        ops_moe.group_rows(torch.zeros(2, 2, dtype=torch.int32), 0, 2)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 24), (30, 24), (32, 23)])
def test_a_stack_multiplies_the_same_however_it_is_stored(outputs, inputs, dtype):
    weight = torch.randn(3, outputs, inputs).to(dtype)
    x, starts = torch.randn(6, inputs).to(dtype), torch.tensor([0, 1, 1, 6], dtype=torch.int32)
    expected = PlainStack(weight.clone()).multiply(x, None, starts)
    stack = choose_stack(weight)
    assert isinstance(stack, PackedStack)
    got = stack.multiply(x, None, starts)
    torch.testing.assert_close(got, expected, atol=tolerance(dtype), rtol=tolerance(dtype))


@needs_kernels
def test_activations_of_fewer_bits_than_the_weights_are_widened():
    x, weight = torch.randn(5, 33).bfloat16(), torch.randn(20, 33)
    packed = ops.pack_linear(weight)
    for multiply in (ops.packed_linear, ops.packed_linear_reference):
        got = multiply(x, packed, None, 20)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, x.float() @ weight.t(), atol=1e-5, rtol=1e-5)
    assert ops.linear(x, weight).dtype == torch.float32


def test_a_gpu_whose_grouped_products_need_the_host_is_told_apart():
    weight = torch.zeros(2, 16, 12, dtype=torch.bfloat16)
    assert not ops_moe.runs_on_device(weight), "a CPU has no graphs to run in"
