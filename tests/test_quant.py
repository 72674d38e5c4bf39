"""Storage schemes: the same numbers, wherever they lie."""

import pytest
import torch

from infer import native, ops, quant

SHAPES = [(1, 16, 8), (3, 17, 9), (7, 100, 5001), (241, 65, 33), (6, 64, 64), (500, 33, 48), (0, 16, 16)]  # (T, N, K)


def _case(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, outputs, inputs = shape
    generator = torch.Generator().manual_seed(rows)
    make = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    return make(rows, inputs), make(outputs, inputs), make(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_products_are_the_plain_ones(shape, dtype, with_bias):
    x, weight, bias = _case(shape, dtype)
    bias = bias if with_bias else None
    packed = ops.pack_linear(weight)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    for product in (ops.packed_linear, ops.packed_linear_reference):
        got = product(x, packed, bias, weight.shape[0])
        assert got.dtype is dtype
        assert got.shape == expected.shape
        error = (got.double() - expected).abs() / (expected.abs() + shape[2] ** 0.5)
        assert error.numel() == 0 or error.max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype):
    if not native.is_loaded():
        pytest.skip("the reference leaves the order of its sums to PyTorch")
    x, weight, bias = _case((245, 100, 300), dtype)
    packed = ops.pack_linear(weight)
    together = ops.packed_linear(x, packed, bias, 100)
    for first, last in ((0, 1), (3, 5), (100, 113), (240, 245)):
        assert torch.equal(ops.packed_linear(x[first:last], packed, bias, 100), together[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_scheme_gives_rows_and_products(dtype):
    x, weight, bias = _case((5, 37, 21), dtype)
    ids = torch.tensor([0, 36, 15, 16, 17, 16])
    expected = quant.Plain(weight).multiply(x, bias)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    packed = quant.Packed(weight.clone())
    assert torch.equal(packed.rows(ids), weight[ids])
    torch.testing.assert_close(packed.multiply(x, bias), expected, rtol=tolerance, atol=tolerance)
    if torch.backends.mkldnn.is_available():
        by_onednn = quant.OneDnn(weight)
        torch.testing.assert_close(by_onednn.multiply(x, bias), expected, rtol=tolerance, atol=tolerance)
        with pytest.raises(TypeError, match="no rows"):
            by_onednn.rows(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 2), (64, 33), (160, 6), (33, 8), (33, 7), (1, 2)], ids=str)
@pytest.mark.parametrize("allocated", [True, False])
def test_packing_in_place_gives_what_packing_does(shape, dtype, allocated, monkeypatch):
    monkeypatch.setattr(quant, "_BYTES_AT_ONCE", 1000)  # several parts, the last one shorter
    plain = torch.randn(shape).to(dtype)
    weight = quant.allocate(shape, dtype, torch.device("cpu")).copy_(plain) if allocated else plain.clone()
    packed = quant.Packed(weight).packed
    assert torch.equal(packed, ops.pack_linear(plain))
    fits = (allocated or shape[0] % 16 == 0) and shape[1] * dtype.itemsize % 4 == 0
    assert packed.numel() == 0 or (packed.data_ptr() == weight.data_ptr()) == fits


@pytest.mark.parametrize("shape", [(3, 30, 24), (4, 33, 10), (2, 16, 8), (3, 5, 7), (0, 5, 4)], ids=str)
def test_a_stack_of_padded_matrices_is_packed_in_place(shape, monkeypatch):
    monkeypatch.setattr(quant, "_BYTES_AT_ONCE", 500)
    plain = torch.randn(shape).bfloat16()
    weight = quant.allocate(shape, plain.dtype, torch.device("cpu")).copy_(plain)
    packed = quant.PackedStack(weight).packed
    assert len(packed) == len(plain)
    assert all(torch.equal(mine, ops.pack_linear(matrix)) for mine, matrix in zip(packed, plain, strict=True))
    assert packed.numel() == 0 or (packed.data_ptr() == weight.data_ptr()) == (shape[-1] % 2 == 0)


def test_a_weight_is_kept_once_where_the_cpu_multiplies_bfloat16(monkeypatch):
    if not native.is_loaded() or not torch.backends.mkldnn.is_available():
        pytest.skip("nothing is packed here, or not by oneDNN")
    monkeypatch.setattr(quant, "_multiplies_bfloat16", lambda: True)
    weight = torch.randn(32, 16).bfloat16()
    assert isinstance(quant.choose(weight, needs_rows=False), quant.OneDnn)
    assert isinstance(quant.choose(weight, needs_rows=True), quant.Packed)
    monkeypatch.setattr(quant, "_MAX_COPIED_BYTES", weight.nbytes - 1)
    assert isinstance(quant.choose(weight, needs_rows=False), quant.Packed)


def test_wrong_arguments_are_refused_by_name():
    if not native.is_loaded():
        pytest.skip("native kernels are not built")
    x, weight, _ = _case((2, 20, 8), torch.float32)
    packed, short = ops.pack_linear(weight), ops.pack_linear(weight.bfloat16())
    for bad_x, weights, outputs, word in (
        (x[:, :7], packed, 20, "columns"), (x, packed, 33, "outputs"), (x, short, 20, "dtype"),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=word):
            ops.packed_linear(bad_x, weights, None, outputs)
