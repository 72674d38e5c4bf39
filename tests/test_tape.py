"""Recorded ops: the same bits as one by one, whatever the batch, and refused where they would not be."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from checkpoints import RECIPES
from torch import Tensor
from worlds import ROOT

from infer import native
from infer.cache import pages
from infer.config import EngineConfig
from infer.engine import tape
from infer.layers.attention import ForwardContext
from infer.models.config import load_model_config
from infer.models.decoder import Stage
from infer.parallel.groups import alone
from infer.quant import OneDnn
from infer.weights import init_dummy_weights

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not native.is_loaded(), reason="the native kernels are not loaded")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def _stage(path, dtype: torch.dtype, layers: range, is_first: bool, is_last: bool) -> Stage:
    config = load_model_config(path, EngineConfig(model=str(path), dtype=str(dtype).removeprefix("torch.")))
    stage = Stage(config, layers, alone(), is_first=is_first, is_last=is_last, dtype=dtype, device=CPU)
    init_dummy_weights(stage, seed=3)
    stage.pack()
    return stage


def _memory(stage: Stage, dtype: torch.dtype) -> pages.Pages:
    memory = pages.allocate(32, 4, stage.kv_layout, stage.num_layers, dtype, CPU)
    for page in (*memory.k, *memory.v):
        page.copy_(torch.randn(page.shape))
    return memory


def _batch(memory: pages.Pages, rows: list[int], keys: list[int]) -> ForwardContext:
    """Sequences with so many rows, the last of so many keys, in blocks of their own."""
    width = -(-max(keys) // 4)
    table = torch.arange(len(rows) * width, dtype=torch.int32).view(len(rows), width)
    positions = torch.cat([torch.arange(k - r, k) for r, k in zip(rows, keys, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    return ForwardContext(
        positions=positions,
        slots=table[owner, positions // 4].long() * 4 + positions % 4,
        block_table=table,
        query_start=torch.tensor([0, *rows]).cumsum(0).int(),
        seq_lens=torch.tensor(keys, dtype=torch.int32),
        k_pages=memory.k,
        v_pages=memory.v,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recorded_stage_gives_the_same_bits(name, dtype, checkpoint_dirs):
    for layers, is_first, is_last in ((range(3), True, False), (range(2, 4), False, True)):
        stage = _stage(checkpoint_dirs[name], dtype, layers, is_first, is_last)
        memory, copy = (_memory(stage, dtype) for _ in range(2))
        for ours, theirs in zip((*memory.k, *memory.v), (*copy.k, *copy.v), strict=True):
            theirs.copy_(ours)
        forward = tape.record_stage(stage, memory)
        assert forward is not stage
        for ours, theirs in zip((*memory.k, *memory.v), (*copy.k, *copy.v), strict=True):
            assert torch.equal(ours, theirs), "recording must not write to the cache"
        for rows, keys in (([1], [1]), ([1, 1, 1], [9, 1, 30]), ([7, 1, 12], [7, 20, 29]), ([40], [40])):
            shape = (sum(rows),) if is_first else (sum(rows), stage.config.hidden_size)
            x = torch.randint(0, 1000, shape) if is_first else torch.randn(shape).to(dtype)
            got, expected = forward(x, _batch(memory, rows, keys)), stage(x, _batch(copy, rows, keys))
            assert torch.equal(got, expected)
            for ours, theirs in zip((*memory.k, *memory.v), (*copy.k, *copy.v), strict=True):
                assert torch.equal(ours, theirs)


def _record(function: tape.Function, *rows: int) -> tape.Function | None:
    return tape.record(function, *([torch.randn(n, 8)] for n in rows))


def test_what_depends_on_the_inputs_is_not_recorded(caplog):
    def by_rows(inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0] + len(inputs[0])

    def by_content(inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0].relu() if inputs[0].shape[0] > 3 else inputs[0].sigmoid()

    for function in (by_rows, by_content):
        caplog.clear()
        assert _record(function, 3, 5) is None
        assert "depend on its inputs" in caplog.text


def test_what_cannot_be_told_is_not_recorded(caplog):
    assert _record(lambda inputs: inputs[0].to(torch.float64), 3, 5) is None
    assert "takes torch.float64" in caplog.text
    kept = torch.ones(8)
    assert _record(lambda inputs: kept, 3, 5) is None
    assert "none of its ops' results" in caplog.text


def test_a_tape_keeps_what_is_read_again():
    def function(inputs: Sequence[Tensor]) -> Tensor:
        x = inputs[0]
        y = x * x
        return torch.add(y, y, alpha=2) * x + y.sum(-1, keepdim=True)

    replay = _record(function, 3, 5)
    assert replay is not None
    for rows in (1, 4):
        x = torch.randn(rows, 8)
        before = x.clone()
        assert torch.equal(replay([x]), function([x]))
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16], ids=str)
def test_numbers_do_not_decide_the_dtype(dtype):
    def function(inputs: Sequence[Tensor]) -> Tensor:
        return (inputs[0] - 5).masked_fill(inputs[0] < 2, 0) * 3

    replay = tape.record(function, [torch.ones(3, dtype=dtype)], [torch.ones(5, dtype=dtype)])
    x = torch.arange(7).to(dtype)
    assert replay is not None
    assert torch.equal(replay([x]), function([x]))
    assert replay([x]).dtype is dtype


def test_products_by_onednn_can_be_recorded():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    matrix = OneDnn(torch.randn(16, 8).bfloat16())
    examples = ([torch.randn(n, 8).bfloat16()] for n in (3, 5))
    replay = tape.record(lambda inputs: matrix.multiply(inputs[0]), *examples)
    x = torch.randn(4, 8).bfloat16()
    assert replay is not None
    assert torch.equal(replay([x]), matrix.multiply(x))


def test_wrong_calls_are_refused_by_name():
    native = torch.classes.infer.Tape(1)
    with pytest.raises(ValueError, match=r"aten::add.* reads slot 5"):
        native.add("aten::add", "Tensor", [None, None], [0, 5])
    with pytest.raises(ValueError, match=r"aten::add.* needs its argument other"):
        native.add("aten::add", "Tensor", [None], [0])
    with pytest.raises(RuntimeError, match="no_such_op"):
        native.add("aten::no_such_op", "", [], [])
    with pytest.raises(ValueError, match="no slot 1 of 1"):
        native.finish([1])
    native.finish([0])
    with pytest.raises(ValueError, match="0 inputs, takes 1"):
        native.run([])


def test_recording_does_not_import_dynamo():
    code = (
        "import sys, torch; from infer import native; from infer.engine import tape\n"
        "assert native.is_loaded()\n"
        "assert tape.record(lambda inputs: inputs[0] + 1, [torch.zeros(3)], [torch.zeros(5)]) is not None\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
