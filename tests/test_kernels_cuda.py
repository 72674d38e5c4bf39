"""What can be known of the CUDA kernels without a GPU: that they compile, and the part of attention that is Python."""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_ops import MIXED, attention_case, close
from torch import Tensor

from infer import native, ops, ops_cuda

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "kernels" / "cuda"


def make(*arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", "-C", str(ROOT), "kernels-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# -------------------------------------------------------------------------------------------------- the sources


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_kernels_compile_without_warnings():
    result = make("CUDA_ARCHS=90")
    assert result.returncode == 0, result.stdout + result.stderr
    told = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("kernels/")]
    assert told == [f"kernels/cuda/{path.name}" for path in (*sorted(SOURCES.glob("*.cu")), SOURCES / "binding.cpp")]


def test_the_check_says_that_nvcc_is_missing():
    result = make("NVCC=/nowhere/nvcc")
    assert result.returncode != 0
    assert "/nowhere/nvcc is not found" in result.stderr


def test_kernels_include_cuda_alone():
    for path in (*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh"), *SOURCES.glob("*.h")):
        for header in re.findall(r'#include [<"](.*)[>"]', path.read_text()):
            assert re.fullmatch(r"cuda_\w+\.h|cstdint|type_traits|ops\.h|common\.cuh", header), f"{path.name}: {header}"


def test_the_binding_states_the_schemas_of_ops():
    binding = (SOURCES / "binding.cpp").read_text()
    defined = {
        name: signature
        for text in re.findall(r"m\.def\((.*?)\);", binding, re.DOTALL)
        for name, signature in re.findall(r"(\w+)(\(.*)", "".join(re.findall(r'"(.*)"', text)))
    }
    assert defined == native.CUDA_SCHEMAS
    bound = set(re.findall(r'm\.impl\("(\w+)"', binding))
    on_cpu_alone = {
        "argmax_rows", "largest", "perturbed_max", "packed_linear", "packed_rows", "packed_head_linear",
        "rotary_write_latent", "group_rows", "packed_grouped_linear", "combine_rows",
    }  # fmt: skip
    assert bound == (native.SCHEMAS.keys() - on_cpu_alone) | native.CUDA_SCHEMAS.keys()


def test_ops_know_the_limits_of_the_kernels():
    header = (SOURCES / "ops.h").read_text()
    limits = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)[,;]", header)}
    assert limits["head_unit"] == native.CUDA_HEAD_UNIT
    assert limits["max_head_dim"] == native.CUDA_MAX_HEAD_DIM
    assert limits["max_query_heads"] == native.CUDA_MAX_HEADS


# ------------------------------------------------------------------------------------------ prefill on CUDA


def varlen(q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, key_start: Tensor, max_q: int, max_k: int, *,
           scale: float, window_size: tuple[int, int]) -> Tensor:  # fmt: skip
    """Stands in for torch's varlen_attn, which wants a GPU, by its documentation; what it need not write is NaN."""
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0 and window_size[1] == 0
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for x in (k, v))
    for s in range(len(query_start) - 1):
        rows = slice(int(query_start[s]), int(query_start[s + 1]))
        keys = slice(int(key_start[s]), int(key_start[s + 1]))
        num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
        assert num_rows <= max_q and num_keys <= max_k
        if num_keys == 0:
            out[rows] = 0
            continue
        query_pos = torch.arange(num_keys - num_rows, num_keys).unsqueeze(1)
        visible = torch.arange(num_keys) <= query_pos
        if window_size[0] >= 0:
            visible &= torch.arange(num_keys) >= query_pos - window_size[0]
        heads = (x.transpose(0, 1) for x in (q[rows].float(), k[keys], v[keys]))
        out[rows] = F.scaled_dot_product_attention(*heads, attn_mask=visible, scale=scale).transpose(0, 1).to(q.dtype)
    return out


def attend_single_rows(q, k_pages, v_pages, block_table, query_start, seq_lens, kv_map, scale, window, soft_cap, out):
    """Stands in for the CUDA kernel."""
    whole = ops.paged_attention_reference(
        q, k_pages, v_pages, block_table, query_start, seq_lens, kv_map, scale, window, soft_cap
    )
    single = torch.ones(len(q), dtype=torch.bool)  # and those of no sequence
    for begin, end in zip(query_start.tolist(), query_start[1:].tolist(), strict=False):
        single[begin:end] = end - begin == 1
    out[single] = whole[single]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(ops_cuda, "_flash_attention", lambda device: varlen)
    monkeypatch.setattr(
        torch.ops.infer, "attend_single_rows", SimpleNamespace(default=attend_single_rows), raising=False
    )


def plan(case: dict, *told: int) -> ops_cuda.Prefill | None:
    numbers = told or (None, None, None)
    return ops_cuda.plan_prefill(case["query_start"], case["seq_lens"], case["block_table"], case["k_pages"], *numbers)


def attend(prefill: ops_cuda.Prefill, case: dict, even_groups: bool) -> Tensor:
    assert prefill.covers(case["q"], case["k_pages"], case["soft_cap"])
    return prefill.attend(
        case["q"], case["k_pages"], case["v_pages"], case["kv_map"], case["scale"], case["window"], even_groups
    )


KEY_BYTES = 2 * 16 * 2  # of a key and a value of one head, in 16 bits


@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize(
    ("kv_map", "even_groups"),
    [([0], True), ([0, 0, 1, 1], True), ([0, 0, 1, 1], False), ([0, 0, 0, 1, 1], False), ([0, 1, 1, 1, 2], False)],
)
# Sequence by sequence and head by head; some sequences at a time; two heads at a time; all at once.
@pytest.mark.parametrize("gather_bytes", [1, 150 * KEY_BYTES, 2 * 225 * KEY_BYTES, 1 << 28])
def test_prefill_equals_the_reference(kv_map, even_groups, window, gather_bytes, on_cpu, monkeypatch):
    monkeypatch.setattr(ops_cuda, "GATHER_BYTES", gather_bytes)
    case = attention_case(MIXED, kv_map, window=window, dtype=torch.bfloat16)
    case["q"] = torch.cat((case["q"], torch.ones(3, len(kv_map), 16, dtype=torch.bfloat16)))  # rows of no sequence
    num_keys = sum(keys for rows, keys in MIXED if rows > 1)
    for prefill in (plan(case), plan(case, 40, 300, num_keys), plan(case, 1000, 1000, num_keys)):
        assert sum(run.num_keys for run in prefill.runs) == num_keys
        close(attend(prefill, case, even_groups), ops.paged_attention_reference(**case))


def test_sequences_take_turns_where_their_keys_are_too_many(on_cpu, monkeypatch):
    """Gathered keys stay within the bound, except for a sequence that is longer by itself."""
    lengths = [(2, 30), (1, 90), (2, 70), (3, 60), (2, 200), (1, 8), (1, 9), (4, 100)]
    case = attention_case(lengths, [0], dtype=torch.bfloat16)
    monkeypatch.setattr(ops_cuda, "GATHER_BYTES", 100 * KEY_BYTES)
    gathered = []

    def watched(q, k, v, *rest, **more):
        gathered.append((len(q), len(k)))
        return varlen(q, k, v, *rest, **more)

    monkeypatch.setattr(ops_cuda, "_flash_attention", lambda device: watched)
    close(attend(plan(case), case, even_groups=True), ops.paged_attention_reference(**case))
    assert gathered == [(5, 100), (3, 60), (2, 200), (6, 100)]


def test_the_room_for_gathered_keys_is_what_a_trial_leaves(on_cpu, monkeypatch):
    monkeypatch.setattr(ops_cuda, "GATHER_BYTES", 100 * KEY_BYTES)
    pages = torch.zeros(1, 16, 3, 16, dtype=torch.bfloat16)

    def room(num_keys, max_model_len=64, pages=pages):
        return ops_cuda.gather_room(pages, num_keys=num_keys, max_model_len=max_model_len) / KEY_BYTES

    assert room(10) == 100 - 3 * 10  # all heads at once
    assert room(45) == 100 - 2 * 45  # two and one
    assert room(100) == room(1000) == 0
    assert room(100, max_model_len=250) == 150  # a cached prompt of this length, one head at a time
    assert room(10, pages=pages.float()) == 0, "the decode kernel gathers nothing"


def test_one_plan_serves_layers_of_any_window(on_cpu):
    cases = [attention_case(MIXED, [0, 0], window=window, dtype=torch.float16) for window in (64, 0, 7, 64)]
    for case in cases:  # the same blocks are there for all; only the widest table has them all
        case["block_table"] = cases[1]["block_table"]
    prefill = plan(cases[0])
    for case in cases:
        close(attend(prefill, case, even_groups=True), ops.paged_attention_reference(**case))


def test_prefill_does_not_touch_keys_that_no_row_sees(on_cpu):
    case = attention_case([(3, 90), (2, 2)], [0], window=5, dtype=torch.bfloat16, block_size=16)
    assert int(case["block_table"][0, 0]) == 2**30  # a block that is gone
    prefill = plan(case)
    slots = prefill.slots(prefill.runs[0], 5)
    first_seen = 90 - 3 - 5 + 1
    assert len(slots) == 92 and slots[:first_seen].unique().numel() == 1 and slots[0] == slots[first_seen]


def test_no_plan_for_what_flash_attention_does_not_cover(on_cpu):
    assert plan(attention_case([(2, 5)], [0])) is None  # float32
    assert plan(attention_case([(2, 5)], [0], dim=20, dtype=torch.bfloat16)) is None
    assert plan(attention_case([(1, 5), (0, 3)], [0], dtype=torch.bfloat16)) is None  # no sequence has several rows
    case = attention_case([(2, 5)], [0], dtype=torch.bfloat16)
    assert not plan(case).covers(case["q"], case["k_pages"], 5.0)
    strided = torch.stack((case["k_pages"], case["v_pages"]), dim=1)[:, 0]
    assert not plan(case).covers(case["q"], strided, 0.0)
