"""Every CUDA kernel against the op's reference, which runs on the CPU."""

import pytest
import torch
from test_ops import EPS, MIXED, attention_case, int32, rotary_case
from test_ops_latent import latent_case
from torch import Tensor

from infer import native, ops, ops_cuda, ops_latent
from infer.cache.layout import KvLayout
from infer.layers.attention import ForwardContext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no GPU here"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def close(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Within `factor` times about one and a half units of the last place."""
    tolerance = factor * ROUNDING[expected.dtype]
    assert actual.is_cuda and actual.dtype == expected.dtype
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


def on_gpu(case: dict) -> dict:
    """Copies; strides stay as they are."""
    return {name: to_gpu(value) if isinstance(value, Tensor) else value for name, value in case.items()}


def to_gpu(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return x.cuda()
    whole = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device="cuda")
    return whole.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def test_the_kernels_run_on_this_gpu():
    assert native.is_loaded(), "the native kernels are not built"
    assert native.cuda_runs(0), "the log says why"
    assert native.decode_runs_on_device(32, KvLayout(8, 128, 128), torch.bfloat16, torch.device("cuda"))
    assert not native.decode_runs_on_device(32, KvLayout(8, 100, 100), torch.bfloat16, torch.device("cuda"))
    assert not native.decode_runs_on_device(32, KvLayout(8, 128, 64), torch.bfloat16, torch.device("cuda"))


# ---------------------------------------------------------------------------------------- norms and activations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (1, 576), (3, 15), (5, 33), (70, 1000), (3, 4096), (2, 20000)])
@pytest.mark.parametrize("float_weight", [False, True])
def test_norms_equal_their_references(shape, dtype, float_weight):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])
    weight = weight if float_weight else weight.to(dtype)
    close(ops.rms_norm(x.cuda(), weight.cuda(), EPS), ops.rms_norm_reference(x, weight, EPS))
    normed, total = ops.add_rms_norm(x.cuda(), residual.cuda(), weight.cuda(), EPS)
    expected_normed, expected_total = ops.add_rms_norm_reference(x, residual, weight, EPS)
    assert torch.equal(total.cpu(), expected_total)
    close(normed, expected_normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [16, 20, 21])  # aligned to 16 bytes in all dtypes, in some, in none
def test_norms_read_strided_rows(offset, dtype):
    weight, x, residual = torch.randn(40).to(dtype), torch.randn(6, 96).to(dtype), torch.randn(6, 80).to(dtype)
    view, other = x[::2, offset : offset + 40], residual[3:, 40:]
    actual = ops.rms_norm(to_gpu(view), weight.cuda(), EPS)
    close(actual, ops.rms_norm_reference(view, weight, EPS))
    pairs = zip(
        ops.add_rms_norm(to_gpu(view), to_gpu(other), weight.cuda(), EPS),
        ops.add_rms_norm_reference(view, other, weight, EPS),
        strict=True,
    )
    for actual, expected in pairs:
        close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(0, 32), (1, 2), (3, 1536), (2, 30), (41, 258), (3, 28672)])
def test_act_and_mul_equals_its_reference(shape, kind, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 4).to(dtype)
    # In float32 torch's own erf is off by more than the kernel's: ask it in float64.
    exact = ops.act_and_mul_reference(x.double() if dtype == torch.float32 else x, kind).to(dtype)
    close(ops.act_and_mul(x.cuda(), kind), exact, factor=2 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations_at_the_ends(kind):
    gate = torch.tensor([-1e30, -200.0, -88.0, -20.0, -5.0, -1e-20, 0.0, 1e-20, 5.0, 90.0, 1e30])
    x = torch.stack((gate, torch.ones_like(gate))).reshape(1, -1)
    close(ops.act_and_mul(x.cuda(), kind), ops.act_and_mul_reference(x, kind), factor=2)
    assert ops.act_and_mul(torch.full((1, 34), float("nan"), device="cuda"), kind).isnan().all()


# ------------------------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True, "float weights"])
@pytest.mark.parametrize(
    ("tokens", "num_q", "num_kv", "dim", "rot_dim"),
    [(0, 2, 1, 8, 8), (1, 9, 3, 64, 64), (20, 5, 2, 64, 32), (7, 3, 1, 20, 12), (3, 4, 4, 6, 2), (33, 8, 2, 128, 128)],
)
def test_rotary_write_kv_equals_its_reference(tokens, num_q, num_kv, dim, rot_dim, normed, dtype):
    case = rotary_case(tokens, num_q, num_kv, dim, rot_dim, bool(normed), dtype)
    if normed == "float weights":
        case |= {"q_norm": torch.randn(dim), "k_norm": torch.randn(dim)}
    case["slots"][::3] = -1
    there = on_gpu(case)
    q = ops.rotary_write_kv(**there)
    close(q, ops.rotary_write_kv_reference(**case))
    close(there["k_pages"], case["k_pages"])  # untouched slots included
    assert torch.equal(there["v_pages"].cpu(), case["v_pages"])


def test_rotary_write_kv_takes_strided_pages_and_rows():
    case = rotary_case(6, 2, 2, 16, 16, True, torch.float32)
    both = torch.randn(9, 2, 4, 2, 16)
    case |= {"qkv": torch.randn(6, 200)[:, 100:196], "k_pages": both[:, 0], "v_pages": both[:, 1]}
    there = on_gpu(case)
    close(ops.rotary_write_kv(**there), ops.rotary_write_kv_reference(**case))
    close(there["k_pages"], case["k_pages"])
    close(there["v_pages"], case["v_pages"])


# ---------------------------------------------------------------------------------------------- paged attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 1, 16, 100])
@pytest.mark.parametrize("kv_map", [[0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 2], [1, 0, 1, 0], [0] * 40])
def test_paged_attention_equals_its_reference(kv_map, window, soft_cap, dtype):
    case = attention_case(MIXED, kv_map, window=window, soft_cap=soft_cap, dtype=dtype)
    close(ops.paged_attention(**on_gpu(case)), ops.paged_attention_reference(**case))


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1100, 8191, 8192, 8193, 40000])
def test_paged_attention_at_page_tile_and_split_boundaries(keys):
    for rows in {1, min(keys, 2), min(keys, 33)}:
        case = attention_case([(rows, keys)], [0, 0, 0, 1], dim=8)
        close(ops.paged_attention(**on_gpu(case)), ops.paged_attention_reference(**case), factor=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 96, 128, 136, 256])
@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
@pytest.mark.parametrize("kv_map", [[0, 1], [0, 0, 1], [0] * 7])
def test_paged_attention_with_any_head_and_block_size(kv_map, block_size, dim, dtype):
    case = attention_case([(1, 70), (30, 70), (1, 141)], kv_map, dim=dim, block_size=block_size, dtype=dtype)
    close(ops.paged_attention(**on_gpu(case)), ops.paged_attention_reference(**case))


def test_heads_of_other_sizes_take_the_reference():
    case = attention_case([(1, 40), (6, 20)], [0, 1], dim=20)
    close(ops.paged_attention(**on_gpu(case)), ops.paged_attention_reference(**case), factor=4)


def test_paged_attention_with_large_scores():
    case = attention_case([(1, 400), (30, 400)], [0, 0, 0], dim=32)
    case["q"] *= 300
    close(ops.paged_attention(**on_gpu(case)), ops.paged_attention_reference(**case), factor=100)


def test_rows_and_sequences_that_pad_give_zeros():
    case = attention_case([(1, 20), (1, 9), (0, 0), (0, 0)], [0, 0, 1])  # the last two rows have no sequence
    case["q"] = torch.ones(4, 3, 16)
    out = ops.paged_attention(**on_gpu(case))
    close(out, ops.paged_attention_reference(**case))
    assert (out[:2] != 0).any() and (out[2:] == 0).all()
    case["seq_lens"][1] = 0  # a row, but no keys
    assert (ops.paged_attention(**on_gpu(case))[1] == 0).all()
    nothing = attention_case([], [0, 0])
    assert ops.paged_attention(**on_gpu(nothing)).shape == (0, 2, 16)
    assert (ops.paged_attention(**on_gpu({**nothing, "q": torch.ones(3, 2, 16)})) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_takes_strided_pages_and_queries(dtype):
    case = attention_case([(1, 40), (6, 20)], [0, 1], dtype=dtype)
    both = torch.stack((case["k_pages"], case["v_pages"]), dim=1)
    wide = torch.cat((case["q"], case["q"]), dim=1)
    strided = on_gpu({**case, "k_pages": both[:, 0], "v_pages": both[:, 1], "q": wide[:, 2:]})
    assert torch.equal(ops.paged_attention(**strided), ops.paged_attention(**on_gpu(case)))


def test_a_sequence_does_not_feel_its_neighbours_or_the_width_of_the_table():
    lengths = [(1, 700), (30, 90), (1, 33), (2, 260), (1, 9000)]
    case = on_gpu(attention_case(lengths, [0, 0, 0, 1, 1], dim=64))
    together = ops.paged_attention(**case)
    wide = torch.nn.functional.pad(case["block_table"], (0, 900), value=2**30)
    assert torch.equal(ops.paged_attention(**{**case, "block_table": wide}), together)
    for s, (rows, _) in enumerate(lengths):
        begin = int(case["query_start"][s])
        alone = {
            **case,
            "q": case["q"][begin : begin + rows],
            "block_table": case["block_table"][s : s + 1],
            "query_start": int32([0, rows]).cuda(),
            "seq_lens": case["seq_lens"][s : s + 1],
        }
        assert torch.equal(ops.paged_attention(**alone), together[begin : begin + rows])


def test_nan_in_the_cache_reaches_only_its_own_sequence():
    case = attention_case([(1, 20), (1, 20), (30, 30)], [0])
    case["k_pages"][case["block_table"][1, 0], 3] = float("nan")
    case["v_pages"][case["block_table"][0, 1], 4:] = float("nan")  # behind the last key
    out = ops.paged_attention(**on_gpu(case))
    assert out[1].isnan().all()
    assert out[0].isfinite().all() and out[2:].isfinite().all()


def test_a_graph_of_a_decode_step_holds_for_other_lengths():
    first, second = (
        attention_case(lengths, [0, 0, 0, 1, 1], dim=64, dtype=torch.bfloat16)
        for lengths in ([(1, 40), (1, 5), (1, 300)], [(1, 700), (1, 1), (0, 0)])
    )
    width = max(case["block_table"].shape[1] for case in (first, second))
    for case in (first, second):
        case["block_table"] = torch.nn.functional.pad(case["block_table"], (0, width - case["block_table"].shape[1]))
        case["q"] = torch.randn(3, 5, 64).bfloat16()
    num_blocks = max(len(first["k_pages"]), len(second["k_pages"]))
    for case in (first, second):
        for name in ("k_pages", "v_pages"):
            case[name] = torch.cat((case[name], torch.zeros(num_blocks - len(case[name]), 16, 2, 64).bfloat16()))
    static = on_gpu(first)
    ops.paged_attention(**static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.paged_attention(**static)
    for case in (second, first):
        for name, value in case.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        graph.replay()
        close(out, ops.paged_attention_reference(**case))


# ------------------------------------------------------------------------------------------------------ prefill


def context(case: dict, told: bool) -> ForwardContext:
    """The context of a batch on the GPU that does not only decode."""
    query_lens, seq_lens = case["query_start"].diff().cpu(), case["seq_lens"].cpu()
    numbers = {
        "max_query_len": int(query_lens.max()),
        "max_seq_len": int(seq_lens.max()),
        "prefill_keys": int(seq_lens[query_lens > 1].sum()),
    }
    rows = torch.zeros(len(case["q"]), dtype=torch.int64, device="cuda")
    return ForwardContext(
        positions=rows, slots=rows, block_table=case["block_table"], query_start=case["query_start"],
        seq_lens=case["seq_lens"], k_pages=[case["k_pages"]], v_pages=[case["v_pages"]], **(numbers if told else {}),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("gather_bytes", [1, 2 * 150 * 64 * 2, 1 << 28])  # by sequences, by some of them, all at once
@pytest.mark.parametrize(
    ("kv_map", "even_groups"), [([0], True), ([0, 0, 1, 1], True), ([0, 0, 0, 1, 1], False), ([0, 1, 1, 1, 2], False)]
)
def test_prefill_equals_the_reference(kv_map, even_groups, gather_bytes, told, window, dtype, monkeypatch):
    monkeypatch.setattr(ops_cuda, "GATHER_BYTES", gather_bytes)
    case = attention_case(MIXED, kv_map, dim=64, window=window, dtype=dtype)
    case["q"] = torch.cat((case["q"], torch.ones(3, len(kv_map), 64, dtype=dtype)))  # rows of no sequence
    there = on_gpu(case)
    prefill = context(there, told).prefill
    assert prefill is not None, "torch has no varlen_attn that can be used here"
    # FlashAttention rounds the weights to the dtype before it sums.
    close(
        ops.paged_attention(**there, prefill=prefill, even_groups=even_groups),
        ops.paged_attention_reference(**case),
        factor=2,
    )


@pytest.mark.parametrize(("dtype", "soft_cap"), [(torch.float32, 0.0), (torch.bfloat16, 5.0)])
def test_what_flash_attention_lacks_goes_row_by_row(dtype, soft_cap):
    case = attention_case(MIXED, [0, 0, 1, 1], dim=64, dtype=dtype, soft_cap=soft_cap)
    there = on_gpu(case)
    out = ops.paged_attention(**there, prefill=context(there, True).prefill, even_groups=True)
    close(out, ops.paged_attention_reference(**case))


def test_the_host_never_waits_for_the_device():
    """Neither in a step that only decodes, nor where the host tells its numbers."""
    decode = on_gpu(attention_case([(1, 40), (1, 5)], [0, 0], dim=64, dtype=torch.bfloat16))
    mixed = on_gpu(attention_case(MIXED, [0, 0], dim=64, dtype=torch.bfloat16))
    rotary = on_gpu(rotary_case(20, 5, 2, 64, 32, True, torch.bfloat16))
    x, weight = torch.randn(4, 128, device="cuda"), torch.randn(128, device="cuda")
    numbers = {"max_query_len": 40, "max_seq_len": 300, "prefill_keys": sum(keys for rows, keys in MIXED if rows > 1)}

    def step() -> None:
        ops.rms_norm(x, weight, EPS)
        ops.add_rms_norm(x, x, weight, EPS)
        ops.act_and_mul(x, "silu")
        ops.rotary_write_kv(**rotary)
        ops.paged_attention(**decode)
        prefill = ops_cuda.plan_prefill(
            mixed["query_start"], mixed["seq_lens"], mixed["block_table"], mixed["k_pages"], **numbers
        )
        ops.paged_attention(**mixed, prefill=prefill, even_groups=True)

    step()  # what is found out once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_pages": torch.zeros(9, 16, 1, 16)}, r"v_pages has shape \[9, 16, 1, 16\]"),
        ({"seq_lens": torch.tensor([5])}, "seq_lens has dtype Long"),
        ({"kv_map": int32([0, 0])}, r"kv_map has shape \[2\]"),
        ({"window": -1}, "window is -1"),
    ],
)
def test_wrong_arguments_are_told(change, message):
    case = on_gpu({**attention_case([(1, 5)], [0]), **change})
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(**case)


# ------------------------------------------------------------------------------------------------ latent attention


@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention_equals_the_reference(dtype):
    """It has no kernel here: PyTorch's matrix products over gathered latents."""
    case = attention_case(MIXED, [0] * 16, dim=576, dtype=dtype)
    there = on_gpu(case)
    names = ("block_table", "query_start", "seq_lens", "kv_map", "scale")
    actual = ops_latent.attend_latents(
        there["q"], there["k_pages"], there["k_pages"][..., :512], *(there[name] for name in names)
    )
    close(actual, ops.paged_attention_reference(**{**case, "v_pages": case["k_pages"][..., :512]}), factor=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_write_latent_equals_the_reference(dtype):
    case = latent_case(33, 5, 512, 64, dtype)
    case["slots"][::3] = -1
    there = on_gpu(case)
    close(ops_latent.rotary_write_latent(**there), ops_latent.rotary_write_latent_reference(**case))
    close(there["pages"], case["pages"])
