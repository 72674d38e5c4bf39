"""Every op against its reference, and the references against independent formulas."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infer import native, ops
from infer.noise import counters, log_exponential

needs_native = pytest.mark.skipif(not native.is_loaded(), reason="the native kernels are not built")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def close(actual: Tensor, expected: Tensor, float32: float = 2e-6) -> None:
    """Within `float32` absolutely and relatively, or within about one and a half units of bfloat16's last place."""
    tolerance = float32 if expected.dtype == torch.float32 else 1.2e-2
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def int32(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---------------------------------------------------------------------------------------- norms and activations


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (1, 576), (3, 15), (5, 33), (2, 16), (70, 1000)])
@pytest.mark.parametrize("float_weight", [False, True])
def test_norms_equal_their_references(shape, dtype, float_weight):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])
    weight = weight if float_weight else weight.to(dtype)
    close(ops.rms_norm(x, weight, EPS), ops.rms_norm_reference(x, weight, EPS))
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    expected_normed, expected_total = ops.add_rms_norm_reference(x, residual, weight, EPS)
    assert torch.equal(total, expected_total)
    close(normed, expected_normed)


def test_a_float32_weight_is_not_rounded_before_the_product():
    """Gemma's norm: float32 throughout, and rounded once."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 48).bfloat16(), 1 + torch.randn(48) / 50
    exact = F.rms_norm(x.float(), (48,), weight, EPS).bfloat16()
    assert torch.equal(ops.rms_norm_reference(x, weight, EPS), exact)
    assert not torch.equal(ops.rms_norm_reference(x, weight.bfloat16(), EPS), exact)


@needs_native
def test_norms_read_strided_rows():
    x, residual, weight = torch.randn(6, 100), torch.randn(6, 80), torch.randn(40)
    view, other = x[::2, 20:60], residual[3:, :40]
    close(ops.rms_norm(view, weight, EPS), ops.rms_norm_reference(view, weight, EPS))
    for actual, expected in zip(
        ops.add_rms_norm(view, other, weight, EPS), ops.add_rms_norm_reference(view, other, weight, EPS), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_reference_is_torchs(dtype):
    x, weight = torch.randn(4, 48).to(dtype), torch.randn(48).to(dtype)
    close(ops.rms_norm_reference(x, weight, EPS), F.rms_norm(x, (48,), weight, EPS))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(0, 32), (1, 2), (3, 1536), (2, 30), (41, 258)])
def test_act_and_mul_equals_its_reference(shape, kind, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 4).to(dtype)
    # torch's own vectorized erf is off by 1e-7 absolutely, which is much in the tail: in float32, ask it in float64.
    exact = ops.act_and_mul_reference(x.double(), kind).to(dtype)
    close(ops.act_and_mul(x, kind), exact if dtype == torch.float32 else ops.act_and_mul_reference(x, kind))
    close(ops.act_and_mul_reference(x, kind), exact, float32=5e-6)


@needs_native
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations_at_the_ends(kind):
    gate = torch.tensor([-float("inf"), -1e30, -200.0, -88.0, -20.0, -5.0, -1e-20, 0.0, 1e-20, 5.0, 90.0, 1e30])
    x = torch.stack((gate, torch.ones_like(gate))).reshape(1, -1)
    actual, expected = ops.act_and_mul(x, kind), ops.act_and_mul_reference(x, kind)
    finite = slice(1, None)  # -inf * 0 is NaN in some implementations and 0 in others
    close(actual[:, finite], expected[:, finite])
    assert ops.act_and_mul(torch.full((1, 34), float("nan")), kind).isnan().all()


# ------------------------------------------------------------------------------------------------------- rotary


def rotary_case(tokens: int, num_q: int, num_kv: int, dim: int, rot_dim: int, normed: bool, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    angles = torch.rand(50, rot_dim // 2) * 6
    num_blocks, block_size = 9, 4
    return {
        "qkv": torch.randn(tokens, (num_q + 2 * num_kv) * dim).to(dtype),
        "positions": torch.randint(50, (tokens,)),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1),
        "q_norm": torch.randn(dim).to(dtype) if normed else None,
        "k_norm": torch.randn(dim).to(dtype) if normed else None,
        "eps": EPS,
        "k_pages": torch.randn(num_blocks, block_size, num_kv, dim).to(dtype),
        "v_pages": torch.randn(num_blocks, block_size, num_kv, dim).to(dtype),
        "slots": torch.randperm(num_blocks * block_size)[:tokens],
        "num_q": num_q,
        "num_kv": num_kv,
    }


def with_own_pages(case: dict) -> dict:
    return {**case, "k_pages": case["k_pages"].clone(), "v_pages": case["v_pages"].clone()}


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True, "float weights"])
@pytest.mark.parametrize(
    ("tokens", "num_q", "num_kv", "dim", "rot_dim"),
    [(0, 2, 1, 8, 8), (1, 9, 3, 64, 64), (20, 5, 2, 64, 32), (7, 3, 1, 20, 12), (3, 4, 4, 6, 2), (33, 8, 2, 96, 96)],
)
def test_rotary_write_kv_equals_its_reference(tokens, num_q, num_kv, dim, rot_dim, normed, dtype):
    case = rotary_case(tokens, num_q, num_kv, dim, rot_dim, bool(normed), dtype)
    if normed == "float weights":
        case |= {"q_norm": torch.randn(dim), "k_norm": torch.randn(dim)}
    case["slots"][::3] = -1
    actual, expected = with_own_pages(case), with_own_pages(case)
    q = ops.rotary_write_kv(**actual)
    close(q, ops.rotary_write_kv_reference(**expected))
    close(actual["k_pages"], expected["k_pages"])
    assert torch.equal(actual["v_pages"], expected["v_pages"])
    untouched = torch.ones(9 * 4, dtype=torch.bool)
    untouched[case["slots"][case["slots"] >= 0]] = False
    for name in ("k_pages", "v_pages"):
        assert torch.equal(actual[name].flatten(0, 1)[untouched], case[name].flatten(0, 1)[untouched])


@needs_native
def test_rotary_write_kv_takes_strided_pages_and_rows():
    case = rotary_case(6, 2, 2, 16, 16, True, torch.float32)
    both = torch.randn(9, 2, 4, 2, 16)
    case["qkv"] = torch.randn(6, 200)[:, 100:196]
    results = []
    for op in (ops.rotary_write_kv, ops.rotary_write_kv_reference):
        pages = both.clone()
        results.append((op(**{**case, "k_pages": pages[:, 0], "v_pages": pages[:, 1]}), pages))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


def test_rotary_reference_is_a_complex_product():
    case = rotary_case(5, 3, 1, 10, 8, False, torch.float32)
    q = ops.rotary_write_kv_reference(**case)
    raw = case["qkv"].view(5, 5, 10)[:, :3]
    turn = torch.complex(*case["cos_sin"][case["positions"]].chunk(2, dim=-1)).unsqueeze(1)
    turned = torch.complex(raw[..., :4], raw[..., 4:8]) * turn
    close(q, torch.cat((turned.real, turned.imag, raw[..., 8:]), dim=-1))
    assert torch.equal(case["v_pages"].flatten(0, 1)[case["slots"]], case["qkv"].view(5, 5, 10)[:, 4:])


# ----------------------------------------------------------------------------------------------------- sampling

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    """With more threads than rows, a row is cut into parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def same_best(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Columns, and values to the last bit."""
    assert actual[0].dtype == torch.float32 and actual[1].dtype == torch.int64
    assert actual[1].tolist() == expected[1].tolist()
    assert torch.equal(actual[0].nan_to_num(nan=-1.0, posinf=INF), expected[0].nan_to_num(nan=-1.0, posinf=INF))
    assert torch.equal(actual[0].isnan(), expected[0].isnan())


def with_broken_rows(logits: Tensor) -> Tensor:
    """[7, width]: NaN and infinities, early, late and together, and what is no more than low."""
    logits[0, [3, -2]] = NAN
    logits[1, [-1, 5]] = INF
    logits[2, 2], logits[2, -1] = INF, NAN
    logits[3] = -INF
    logits[4, :-1] = -INF
    logits[5] = torch.finfo(logits.dtype).min
    logits[6, :-3] = torch.finfo(logits.dtype).min
    return logits


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (4, 3), (1, 17), (3, 1024), (5, 3001), (2, 200_003)])
def test_argmax_rows_equals_its_reference(shape, dtype, threads):
    torch.manual_seed(0)
    spread, tied = torch.randn(shape).to(dtype), torch.randint(-3, 3, shape).to(dtype)
    for logits in (spread, tied, tied.flip(0)[:, shape[1] // 2 :]):
        same_best(ops.argmax_rows(logits), ops.argmax_rows_reference(logits))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [9, 1500, 200_003])
def test_argmax_rows_at_the_ends(width, dtype, threads):
    logits = with_broken_rows(torch.randn(7, width).to(dtype))
    same_best(ops.argmax_rows(logits), ops.argmax_rows_reference(logits))
    for row in logits.split(1):
        same_best(ops.argmax_rows(row), ops.argmax_rows_reference(row))


def race_case(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Temperatures and keys of some rows."""
    generator = torch.Generator().manual_seed(seed)
    temperatures = torch.tensor([1.1e-5, 0.2, 0.7, 1.0, 1.3, 5.0, 100.0])[torch.arange(rows) % 7]
    return temperatures, torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0, 1e6])
@pytest.mark.parametrize(
    ("rows", "width", "start"), [(0, 5, 0), (300, 1, 7), (300, 45, 3), (70, 2100, 0), (2, 60_001, 90)]
)
def test_perturbed_max_equals_its_reference(rows, width, start, scale, dtype, threads):
    logits = (torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    args = (*race_case(rows, width), start)
    same_best(ops.perturbed_max(logits, *args), ops.perturbed_max_reference(logits, *args))
    args = (args[0][::2].contiguous(), args[1][::2].contiguous(), start)
    same_best(ops.perturbed_max(logits[::2], *args), ops.perturbed_max_reference(logits[::2], *args))


@needs_native
def test_perturbed_max_equals_its_reference_where_rounding_decides(threads):
    """Logits that undo the noise: all scores are equal but for their last bits."""
    temperatures, keys = race_case(40, 0)
    states = counters(torch.arange(3000)) + keys[:, None]
    noise = log_exponential(states, torch.empty_like(states), torch.empty(states.shape))
    for offset in (0.1, 17.0, -300.0):
        logits = temperatures[:, None] * noise + offset
        args = (logits, temperatures, keys, 0)
        same_best(ops.perturbed_max(*args), ops.perturbed_max_reference(*args))
        assert len(ops.perturbed_max_reference(*args)[1].unique()) > 3, "rounding decides nothing"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [9, 1500, 30_000])
def test_perturbed_max_at_the_ends(width, dtype, threads):
    logits = with_broken_rows(torch.randn(7, width).to(dtype))
    temperatures, keys = race_case(7, 4)
    args = (logits, temperatures, keys, 0)
    same_best(ops.perturbed_max(*args), ops.perturbed_max_reference(*args))
    for i, row in enumerate(logits.split(1)):
        args = (row, temperatures[i : i + 1], keys[i : i + 1], 0)
        same_best(ops.perturbed_max(*args), ops.perturbed_max_reference(*args))


@needs_native
@pytest.mark.parametrize(
    ("key", "low", "high"), [(0x31628AF67B2131AB, -3.6, -2.9), (2**64 - 0x9E3779B97F4A7C15, 30.0, 36.6)]
)
def test_perturbed_max_at_the_ends_of_the_uniform(key, low, high):
    """Token 0's random bits are all ones, where float32 moves its noise from -3.6 to -2.8, or all zeros."""
    keys = torch.tensor([key])
    other = ops.perturbed_max_reference(torch.zeros(1, 1), torch.ones(1), keys, 1)[0].item()
    for between in torch.linspace(low, high, 9).tolist():
        args = (torch.tensor([[0.0, between - other]]), torch.ones(1), keys, 0)
        assert ops.perturbed_max_reference(*args)[1].tolist() == [0], "token 0 has won by its noise"
        same_best(ops.perturbed_max(*args), ops.perturbed_max_reference(*args))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (4, 3), (1, 17), (3, 1024), (2, 5001), (40, 700)])
def test_largest_equals_its_reference(shape, dtype, threads):
    torch.manual_seed(0)
    spread, tied = torch.randn(shape).to(dtype), torch.randint(-3, 3, shape).to(dtype)
    tied[:, ::7] = -0.0  # equals 0
    for logits in (spread, tied, spread.sort(-1).values, tied.sort(-1, descending=True).values[::2]):
        for k in (1, 2, 16, 50, 256, 4096):
            values, columns = ops.largest(logits, k)
            expected_values, expected_columns = ops.largest_reference(logits, k)
            assert torch.equal(columns, expected_columns) and torch.equal(values, expected_values)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [9, 400, 3000])
def test_largest_at_the_ends(width, dtype):
    logits = with_broken_rows(torch.randn(7, width).to(dtype))
    logits[0, width // 2 :] = NAN
    for k in (1, 2, 3, 8, 100, 2000):
        values, columns = ops.largest(logits, k)
        expected_values, expected_columns = ops.largest_reference(logits, k)
        torch.testing.assert_close(values, expected_values, atol=0, rtol=0, equal_nan=True)
        assert torch.equal(columns[~values.isnan()], expected_columns[~values.isnan()])  # NaNs are in no order


@needs_native
def test_sampling_ops_name_what_is_wrong():
    logits, temperatures, keys = torch.zeros(2, 4), torch.ones(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"argmax_rows: logits has shape \[2, 0\], must have a column"):
        ops.argmax_rows(logits[:, :0])
    with pytest.raises(ValueError, match="perturbed_max: the last dimension of logits has stride 2"):
        ops.perturbed_max(logits[:, ::2], temperatures, keys, 0)
    with pytest.raises(ValueError, match=r"perturbed_max: temperatures has shape \[1\], must have \[2\]"):
        ops.perturbed_max(logits, temperatures[:1], keys, 0)
    with pytest.raises(ValueError, match="perturbed_max: keys has dtype Int, must have Long"):
        ops.perturbed_max(logits, temperatures, keys.int(), 0)
    with pytest.raises(ValueError, match=r"largest: k is 0, must be in \[1, 4\]"):
        ops.largest(logits, 0)


# ---------------------------------------------------------------------------------------------- paged attention


def attention_case(
    lengths: list[tuple[int, int]],
    kv_map: list[int],
    dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    soft_cap: float = 0.0,
    spare_blocks: int = 2,
) -> dict:
    """`lengths` are (query rows, keys) of each sequence. Blocks of a table that no row may read hold an invalid id."""
    torch.manual_seed(0)
    num_kv = max(kv_map) + 1
    num_blocks = sum(-(-keys // block_size) for _, keys in lengths) + 1
    free = torch.randperm(num_blocks).tolist()
    table = torch.full((len(lengths), max((-(-k // block_size) for _, k in lengths), default=0) + spare_blocks), 2**30)
    for s, (rows, keys) in enumerate(lengths):
        first = max(0, keys - rows - window + 1) // block_size if window else 0
        for block in range(first, -(-keys // block_size)):
            table[s, block] = free.pop()
    pages = torch.randn(2, num_blocks, block_size, num_kv, dim).to(dtype)
    return {
        "q": torch.randn(sum(rows for rows, _ in lengths), len(kv_map), dim).to(dtype),
        "k_pages": pages[0],
        "v_pages": pages[1],
        "block_table": table.int(),
        "query_start": int32([0, *itertools.accumulate(rows for rows, _ in lengths)]),
        "seq_lens": int32([keys for _, keys in lengths]),
        "kv_map": int32(kv_map),
        "scale": dim**-0.5,
        "window": window,
        "soft_cap": soft_cap,
    }


def sdpa(case: dict) -> Tensor:
    """What paged_attention should return, by torch's own attention over gathered keys (no soft cap)."""
    outputs = []
    starts = case["query_start"].tolist()
    for s, keys in enumerate(case["seq_lens"].tolist()):
        q = case["q"][starts[s] : starts[s + 1]].transpose(0, 1)
        where = [
            (max(0, int(case["block_table"][s, i // case["k_pages"].shape[1]])), i % case["k_pages"].shape[1])
            for i in range(keys)
        ]
        where = [(min(block, case["k_pages"].shape[0] - 1), offset) for block, offset in where]
        k, v = (
            torch.stack([pages[block, offset] for block, offset in where])[:, case["kv_map"].long()].transpose(0, 1)
            for pages in (case["k_pages"], case["v_pages"])
        )
        visible = torch.ones(q.shape[1], keys, dtype=torch.bool).tril(keys - q.shape[1])
        if case["window"]:
            visible &= ~visible.tril(keys - q.shape[1] - case["window"])
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=case["scale"]).transpose(0, 1))
    return torch.cat(outputs)


MIXED = [(1, 1), (1, 37), (5, 5), (0, 8), (20, 50), (1, 300), (3, 130), (40, 40)]


@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize("kv_map", [[0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 2]])
def test_paged_attention_reference_is_sdpa(kv_map, window):
    case = attention_case(MIXED, kv_map, window=window)
    close(ops.paged_attention_reference(**case), sdpa(case))


def test_paged_attention_reference_caps_scores():
    case = attention_case([(1, 3)], [0], dim=4, soft_cap=2.0)
    block = case["block_table"][0, 0]
    k, v = case["k_pages"][block, :3, 0], case["v_pages"][block, :3, 0]
    weights = (2.0 * torch.tanh(k @ case["q"][0, 0] * 0.5 / 2.0)).softmax(0)
    close(ops.paged_attention_reference(**case)[0, 0], weights @ v)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 1, 16, 100])
@pytest.mark.parametrize("kv_map", [[0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 2], [1, 0, 1, 0], [0] * 40])
def test_paged_attention_equals_its_reference(kv_map, window, soft_cap, dtype):
    case = attention_case(MIXED, kv_map, window=window, soft_cap=soft_cap, dtype=dtype)
    close(ops.paged_attention(**case), ops.paged_attention_reference(**case))


@needs_native
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257, 511, 513, 1100])
def test_paged_attention_at_page_tile_and_chunk_boundaries(keys):
    for rows in {1, 2, min(keys, 4), min(keys, 5), min(keys, 33), min(keys, 64)}:
        case = attention_case([(min(rows, keys), keys)], [0, 0, 0, 1], dim=8)
        close(ops.paged_attention(**case), ops.paged_attention_reference(**case))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 4, 6, 16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
def test_paged_attention_with_any_head_and_block_size(block_size, dim, dtype):
    case = attention_case([(1, 70), (30, 70)], [0, 0, 1], dim=dim, block_size=block_size, dtype=dtype)
    close(ops.paged_attention(**case), ops.paged_attention_reference(**case))


@needs_native
def test_paged_attention_with_large_scores():
    case = attention_case([(1, 400), (30, 400)], [0, 0, 0], dim=32)
    case["q"] *= 300
    close(ops.paged_attention(**case), ops.paged_attention_reference(**case), float32=2e-4)


@needs_native
def test_paged_attention_of_nothing():
    assert ops.paged_attention(**attention_case([], [0, 0])).shape == (0, 2, 16)
    assert ops.paged_attention(**attention_case([(0, 5), (0, 0)], [0, 0])).shape == (0, 2, 16)


@needs_native
def test_paged_attention_gives_zeros_to_rows_of_no_sequence():
    case = attention_case([(2, 20)], [0, 0])
    padded = {**case, "q": torch.cat((case["q"], torch.ones(3, 2, 16)))}
    out = ops.paged_attention(**padded)
    assert torch.equal(out[:2], ops.paged_attention(**case))
    assert torch.equal(out[2:], torch.zeros(3, 2, 16))
    assert torch.equal(ops.paged_attention_reference(**padded)[2:], torch.zeros(3, 2, 16))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_takes_strided_pages_and_queries(dtype):
    case = attention_case([(1, 40), (6, 20)], [0, 1], dtype=dtype)
    expected = ops.paged_attention(**case)
    both = torch.stack((case["k_pages"], case["v_pages"]), dim=1)
    wide = torch.cat((case["q"], case["q"]), dim=1)
    strided = {**case, "k_pages": both[:, 0], "v_pages": both[:, 1], "q": wide[:, 2:]}
    assert torch.equal(ops.paged_attention(**strided), expected)


@needs_native
def test_a_sequence_does_not_feel_its_neighbours_or_the_threads():
    lengths = [(1, 700), (30, 90), (1, 33), (2, 260)]
    case = attention_case(lengths, [0, 0, 0, 1, 1], dim=64)
    threads = torch.get_num_threads()
    together = ops.paged_attention(**case)
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.paged_attention(**case), together)
    finally:
        torch.set_num_threads(threads)
    for s, (rows, _) in enumerate(lengths):
        begin = int(case["query_start"][s])
        alone = {
            **case,
            "q": case["q"][begin : begin + rows],
            "block_table": case["block_table"][s : s + 1],
            "query_start": int32([0, rows]),
            "seq_lens": case["seq_lens"][s : s + 1],
        }
        assert torch.equal(ops.paged_attention(**alone), together[begin : begin + rows])


@needs_native
def test_nan_in_the_cache_reaches_only_its_own_sequence():
    case = attention_case([(1, 20), (1, 20), (30, 30)], [0])
    case["k_pages"][case["block_table"][1, 0], 3] = float("nan")
    out = ops.paged_attention(**case)
    assert out[1].isnan().all()
    assert out[0].isfinite().all() and out[2:].isfinite().all()


# ------------------------------------------------------------------------------------------------------- errors


@needs_native
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_table": int32([[9]])}, IndexError, r"block_table\[0, 0\] is 9, must be in \[0, 2\)"),
        ({"block_table": int32([[-1]])}, IndexError, r"block_table\[0, 0\] is -1"),
        ({"seq_lens": int32([17])}, IndexError, r"seq_lens\[0\] is 17, but block_table has 1 blocks of 16 keys"),
        ({"seq_lens": int32([1])}, IndexError, r"seq_lens\[0\] is 1, must be at least its 2 query rows"),
        ({"query_start": int32([0, 3])}, IndexError, r"query_start\[1\] is 3"),
        ({"query_start": int32([-1, 2])}, IndexError, r"query_start\[0\] is -1"),
        ({"kv_map": int32([0, 1])}, IndexError, r"kv_map\[1\] is 1, must be in \[0, 1\)"),
        ({"kv_map": int32([0])}, ValueError, r"kv_map has shape \[1\], must have \[2\]"),
        ({"window": -1}, ValueError, "window is -1"),
        ({"soft_cap": -1.0}, ValueError, "soft_cap is -1"),
        ({"seq_lens": torch.tensor([5])}, ValueError, "seq_lens has dtype Long, must have Int"),
        ({"v_pages": torch.zeros(2, 16, 2, 16)}, ValueError, "v_pages has shape"),
        ({"k_pages": torch.zeros(2, 16, 1, 16).bfloat16()}, ValueError, "k_pages has dtype BFloat16"),
    ],
)
def test_paged_attention_names_what_is_wrong(change, error, message):
    case = attention_case([(2, 5)], [0, 0], spare_blocks=0)
    with pytest.raises(error, match=message):
        ops.paged_attention(**{**case, **change})


@needs_native
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": torch.tensor([0, 50])}, IndexError, r"positions\[1\] is 50, must be in \[0, 50\)"),
        ({"positions": torch.tensor([-1, 0])}, IndexError, r"positions\[0\] is -1"),
        ({"slots": torch.tensor([0, 36])}, IndexError, r"slots\[1\] is 36, must be -1 or in \[0, 36\)"),
        ({"slots": torch.tensor([-2, 0])}, IndexError, r"slots\[0\] is -2"),
        ({"slots": torch.tensor([0])}, ValueError, "slots has shape"),
        ({"cos_sin": torch.zeros(50, 10)}, ValueError, "cos_sin has 10 columns"),
        ({"num_q": 3}, ValueError, "qkv has shape"),
        ({"q_norm": torch.zeros(4)}, ValueError, "q_norm has shape"),
    ],
)
def test_rotary_write_kv_names_what_is_wrong(change, error, message):
    case = rotary_case(2, 2, 1, 8, 8, False, torch.float32)
    before = case["k_pages"].clone()
    with pytest.raises(error, match=message):
        ops.rotary_write_kv(**{**case, **change})
    assert torch.equal(case["k_pages"], before)


@needs_native
def test_small_ops_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"weight has shape \[4\], must have \[8\]"):
        ops.rms_norm(torch.zeros(2, 8), torch.zeros(4), EPS)
    with pytest.raises(ValueError, match="weight has dtype BFloat16, must have Float"):
        ops.rms_norm(torch.zeros(2, 8), torch.zeros(8).bfloat16(), EPS)
    with pytest.raises(ValueError, match="last dimension of x has stride 2"):
        ops.rms_norm(torch.zeros(8, 2).t(), torch.zeros(8), EPS)
    with pytest.raises(ValueError, match="x has 7 columns"):
        ops.act_and_mul(torch.zeros(2, 7), "silu")


@pytest.mark.parametrize("op", [ops.act_and_mul, ops.act_and_mul_reference])
def test_unknown_activations_are_named(op):
    with pytest.raises(ValueError, match="kind is 'relu', must be one of silu, gelu, gelu_tanh"):
        op(torch.zeros(2, 8), "relu")


# ----------------------------------------------------------------------------------------------------- dispatch


def test_linear():
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    close(ops.linear(x, weight, bias), x @ weight.T + bias)
    close(ops.linear(x, weight), x @ weight.T)


@needs_native
def test_a_dtype_without_kernel_runs_the_reference_and_says_so_once(caplog):
    native.log_fallback.cache_clear()
    x, weight = torch.randn(2, 8, dtype=torch.float16), torch.ones(8, dtype=torch.float16)
    for _ in range(3):
        assert torch.equal(ops.rms_norm(x, weight, EPS), ops.rms_norm_reference(x, weight, EPS))
    assert [record.message for record in caplog.records] == [
        "rms_norm: no native kernel for cpu tensors of torch.float16, using the PyTorch reference"
    ]


@needs_native
def test_torch_agrees_with_the_registrations():
    checks = ("test_schema", "test_faketensor")
    x, weight = torch.randn(3, 8), torch.ones(8)
    opcheck = torch.library.opcheck
    opcheck(torch.ops.infer.rms_norm, (x, weight, EPS), test_utils=checks)
    opcheck(torch.ops.infer.add_rms_norm, (x, x.clone(), weight, EPS), test_utils=checks)
    opcheck(torch.ops.infer.act_and_mul, (x, "silu"), test_utils=checks)
    opcheck(torch.ops.infer.rotary_write_kv, tuple(rotary_case(3, 2, 1, 8, 8, True, torch.float32).values()))
    opcheck(torch.ops.infer.paged_attention, tuple(attention_case([(2, 5)], [0, 0]).values()), test_utils=checks)


def python(code: str, **environ: str) -> subprocess.CompletedProcess:
    root = str(Path(ops.__file__).parents[1])
    environ = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120, check=False
    )


@needs_native
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_gives_the_same(capability):
    """This module's own comparisons, in a process where torch and the kernels keep to a smaller instruction set."""
    code = (
        "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', "
        f"{__file__!r}, '-k', 'equals_its_reference or ends or boundaries or neighbours or any_head']))"
    )
    result = python(code, ATEN_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_infer_ops_chooses(caplog):
    show = "import torch; from infer import native; print(native.is_loaded())"
    assert python(show, INFER_OPS="reference").stdout == "False\n"
    wrong = python(show, INFER_OPS="fast")
    assert wrong.returncode != 0
    assert "INFER_OPS is 'fast', must be 'native' or 'reference'" in wrong.stderr


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is not built"),
        (b"not a library", "is not a kernel library of this program"),
        (b"..infer-kernels torch=1.0.0\0..", "was built for torch 1.0.0, this is torch " + torch.__version__[:4]),
        (f"infer-kernels torch={torch.__version__.split('+')[0]}\0".encode(), "does not load"),
    ],
)
def test_a_library_that_cannot_be_used_is_named(tmp_path, content, problem):
    library = tmp_path / "_kernels.so"
    if content is not None:
        library.write_bytes(content)
    assert problem in native.load_library(library)


@needs_native
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setitem(native.SCHEMAS, "rms_norm", "(Tensor x, Tensor weight) -> Tensor")
    assert "is out of date: it lacks rms_norm(Tensor x" in native.load_library(native.library_path())


def test_setup_survives_a_failing_compiler(tmp_path):
    root = Path(ops.__file__).parents[1]
    for name in ("setup.py", "kernels", "infer"):
        source = root / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("infer: native kernels were not built") == 1
