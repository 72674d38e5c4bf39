"""The ops of latent attention against their references, and these against independent formulas."""

import itertools

import pytest
import torch
from test_ops import DTYPES, EPS, MIXED, attention_case, close, int32, needs_native
from torch import Tensor

from infer import ops, ops_gathered, ops_latent

LATENT, ROPE = 20, 6


def latent_case(tokens: int, heads: int, latent: int, rope: int, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    angles = torch.rand(50, rope // 2) * 6
    num_blocks, block_size = 9, 4
    return {
        "q_latent": torch.randn(tokens, heads, latent).to(dtype),
        "q_rope": torch.randn(tokens, heads, rope).to(dtype),
        "kv": torch.randn(tokens, latent + rope).to(dtype),
        "positions": torch.randint(50, (tokens,)),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1),
        "norm": torch.randn(latent).to(dtype),
        "eps": EPS,
        "pages": torch.randn(num_blocks, block_size, 1, latent + rope).to(dtype),
        "slots": torch.randperm(num_blocks * block_size)[:tokens],
    }


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "latent", "rope"), [(0, 2, 8, 2), (1, 5, LATENT, ROPE), (33, 3, 512, 64), (7, 1, 33, 18)]
)
def test_rotary_write_latent_equals_its_reference(tokens, heads, latent, rope, dtype):
    case = latent_case(tokens, heads, latent, rope, dtype)
    case["slots"][::3] = -1
    actual, expected = ({**case, "pages": case["pages"].clone()} for _ in range(2))
    q = ops_latent.rotary_write_latent(**actual)
    close(q, ops_latent.rotary_write_latent_reference(**expected))
    assert torch.equal(q[..., :latent], case["q_latent"])
    close(actual["pages"], expected["pages"])
    untouched = torch.ones(9 * 4, dtype=torch.bool)
    untouched[case["slots"][case["slots"] >= 0]] = False
    assert torch.equal(actual["pages"].flatten(0, 1)[untouched], case["pages"].flatten(0, 1)[untouched])


@needs_native
def test_rotary_write_latent_takes_strided_arguments():
    case = latent_case(6, 3, LATENT, ROPE, torch.float32)
    heads, both = torch.randn(6, 200)[:, :90].view(6, 3, 30), torch.randn(9, 2, 4, 1, LATENT + ROPE)
    case |= {"q_latent": heads[:, :, :LATENT], "q_rope": heads[:, :, 24:], "kv": torch.randn(6, 80)[:, 30:56]}
    results = []
    for op in (ops_latent.rotary_write_latent, ops_latent.rotary_write_latent_reference):
        pages = both.clone()
        results.append((op(**{**case, "pages": pages[:, 1]}), pages))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


def test_the_rotation_is_that_of_other_attention():
    """What rotary_write_kv makes of the same queries and key."""
    case = latent_case(5, 2, LATENT, ROPE, torch.float32)
    q = ops_latent.rotary_write_latent_reference(**case)
    qkv = torch.cat((case["q_rope"].flatten(1), case["kv"][:, LATENT:], torch.zeros(5, ROPE)), dim=-1)
    k_pages, v_pages = (torch.zeros(9, 4, 1, ROPE) for _ in range(2))
    rotated = ops.rotary_write_kv_reference(
        qkv, case["positions"], case["cos_sin"], None, None, EPS, k_pages, v_pages, case["slots"], 2, 1
    )
    assert torch.equal(q[..., LATENT:], rotated)
    kept = case["pages"].flatten(0, 1)[case["slots"], 0]
    assert torch.equal(kept[:, LATENT:], k_pages.flatten(0, 1)[case["slots"], 0])
    close(kept[:, :LATENT], ops.rms_norm_reference(case["kv"][:, :LATENT], case["norm"], EPS))


@needs_native
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"slots": torch.tensor([36])}, r"slots\[0\] is 36, must be -1 or in \[0, 36\)"),
        ({"positions": torch.tensor([50])}, r"positions\[0\] is 50, must be in \[0, 50\)"),
        ({"kv": torch.zeros(1, 25)}, r"kv has shape \[1, 25\], must have \[1, 26\]"),
        ({"norm": torch.zeros(LATENT, dtype=torch.bfloat16)}, "norm has dtype BFloat16, must have Float"),
        ({"pages": torch.zeros(9, 4, 2, 26)}, r"pages has shape \[9, 4, 2, 26\]"),
    ],
)
def test_wrong_arguments_are_named(change, problem):
    with pytest.raises((ValueError, IndexError), match=problem):
        ops_latent.rotary_write_latent(**{**latent_case(1, 2, LATENT, ROPE, torch.float32), **change})


# ------------------------------------------------------------------------------------------ a product for each head


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "outputs", "inputs"),
    [(0, 2, 5, 4), (1, 5, 20, 12), (3, 1, 16, 7), (70, 3, 33, 19), (9, 2, 512, 128), (600, 2, 24, 512)],
)
def test_head_linear_equals_its_reference(tokens, heads, outputs, inputs, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, heads + 1, inputs + 3).to(dtype), torch.randn(heads, outputs, inputs).to(dtype)
    x = x[:, 1:, 3:]
    packed = ops_latent.pack_head_linear(weight)
    actual = ops_latent.packed_head_linear(x, packed, outputs)
    assert actual.is_contiguous()
    exact = torch.einsum("thk,hnk->thn", x.double(), weight.double())
    torch.testing.assert_close(actual.double(), exact, atol=2e-4 if dtype == torch.float32 else 0.1, rtol=1e-2)
    reference = ops_latent.packed_head_linear_reference(x, packed, outputs) if tokens else actual
    torch.testing.assert_close(actual, reference, atol=2e-4, rtol=1e-2)
    plain = ops_latent.head_linear(x, weight)
    assert plain.is_contiguous()
    torch.testing.assert_close(plain.double(), exact, atol=2e-4 if dtype == torch.float32 else 0.1, rtol=1e-2)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_head_linear_does_not_depend_on_others(dtype):
    x, weight = torch.randn(37, 3, 40).to(dtype), torch.randn(3, 50, 40).to(dtype)
    packed = ops_latent.pack_head_linear(weight)
    whole = ops_latent.packed_head_linear(x, packed, 50)
    for rows in (1, 2, 8, 21):
        assert torch.equal(ops_latent.packed_head_linear(x[:rows], packed, 50), whole[:rows])


# ---------------------------------------------------------------------------------- attention with values in the keys


def with_values_in_keys(case: dict, value_dim: int) -> dict:
    return {**case, "v_pages": case["k_pages"][..., :value_dim]}


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "value_dim"), [(5, 26, 20), (1, 16, 8), (16, 48, 32), (37, 40, 33), (3, 576, 512), (20, 576, 512)]
)
def test_attention_with_values_in_the_keys_equals_its_reference(heads, dim, value_dim, dtype):
    case = with_values_in_keys(attention_case(MIXED, [0] * heads, dim=dim, dtype=dtype), value_dim)
    actual = ops.paged_attention(**case)
    assert actual.shape == (len(case["q"]), heads, value_dim)
    close(actual, ops.paged_attention_reference(**case), float32=1e-5)


@needs_native
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 40), (40, 16)])
def test_values_may_be_of_another_size(dim, value_dim):
    case = attention_case(MIXED, [0, 0, 1, 1, 1], dim=dim)
    case["v_pages"] = torch.randn(*case["k_pages"].shape[:3], value_dim)
    close(ops.paged_attention(**case), ops.paged_attention_reference(**case), float32=1e-5)


@needs_native
def test_a_row_does_not_depend_on_its_neighbours():
    """37 heads of one key are several tasks, however many rows there are."""
    case = with_values_in_keys(attention_case(MIXED, [0] * 37, dim=40), 32)
    whole, starts = ops.paged_attention(**case), case["query_start"].tolist()
    for s, (begin, end) in enumerate(itertools.pairwise(starts)):
        one = {
            "q": case["q"][begin:end],
            "block_table": case["block_table"][s : s + 1],
            "query_start": int32([0, end - begin]),
            "seq_lens": case["seq_lens"][s : s + 1],
        }
        assert torch.equal(ops.paged_attention(**{**case, **one}), whole[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
# Sequence by sequence and row by row; some at a time; all at once.
@pytest.mark.parametrize("gather_bytes", [1, 60_000, 1 << 28])
def test_attention_over_gathered_latents_equals_the_reference(gather_bytes, dtype, monkeypatch):
    """What a GPU runs."""
    monkeypatch.setattr(ops_gathered, "GATHER_BYTES", gather_bytes)
    case = with_values_in_keys(attention_case(MIXED, [0] * 5, dim=26, dtype=dtype), LATENT)
    case["q"] = torch.cat((case["q"], torch.ones(3, 5, 26, dtype=dtype)))  # rows of no sequence
    names = ("q", "k_pages", "block_table", "query_start", "seq_lens", "scale")
    q, pages, *others, scale = (case[name] for name in names)
    actual = ops_gathered.attend_gathered(q, pages, LATENT, *others, scale)
    close(actual, ops.paged_attention_reference(**case), float32=1e-5)


def test_the_absorbed_form_is_attention_over_expanded_keys():
    """DeepSeek-V2, 2024, equations 9 to 19, on one sequence without a prefix."""
    torch.manual_seed(0)
    tokens, heads, nope, value = 7, 3, 12, 10
    q, latents = torch.randn(tokens, heads, nope + ROPE), torch.randn(tokens, LATENT + ROPE)
    up = torch.randn(heads, nope + value, LATENT)
    keys_up, values_up = up[:, :nope], up[:, nope:]

    expanded = torch.einsum("tl,hnl->thn", latents[:, :LATENT], up)
    shared = latents[:, None, LATENT:].expand(tokens, heads, ROPE)
    keys, values = torch.cat((expanded[..., :nope], shared), -1), expanded[..., nope:]
    by_head: list[Tensor] = [x.transpose(0, 1) for x in (q, keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True, scale=0.3).transpose(0, 1)

    absorbed = ops_latent.head_linear(q[..., :nope], keys_up.transpose(1, 2))
    case = attention_case([(tokens, tokens)], [0] * heads, dim=LATENT + ROPE) | {"scale": 0.3}
    pages = case["k_pages"]
    pages.flatten(0, 1)[case["block_table"][0, 0] * 16 + torch.arange(tokens), 0] = latents
    case |= {"q": torch.cat((absorbed, q[..., nope:]), -1), "v_pages": pages[..., :LATENT]}
    actual = ops_latent.head_linear(ops.paged_attention(**case), values_up)
    close(actual, expected, float32=1e-4)


@needs_native
def test_torch_agrees_with_the_registrations():
    checks = ("test_schema", "test_faketensor")
    case = latent_case(3, 2, LATENT, ROPE, torch.float32)
    torch.library.opcheck(torch.ops.infer.rotary_write_latent, tuple(case.values()), test_utils=checks)
    x, packed = torch.randn(3, 2, 8), ops_latent.pack_head_linear(torch.randn(2, 20, 8))
    torch.library.opcheck(torch.ops.infer.packed_head_linear, (x, packed, 20), test_utils=checks)
    values = with_values_in_keys(attention_case([(2, 5)], [0, 0]), 8)
    values["v_pages"] = values["v_pages"].clone()
    torch.library.opcheck(torch.ops.infer.paged_attention, tuple(values.values()), test_utils=checks)
