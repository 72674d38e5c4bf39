"""python -m infer.models: the table of models, and what each rank of a layout holds."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import RECIPES
from worlds import ROOT

from infer.config import EngineConfig
from infer.models import FAMILIES
from infer.models.__main__ import _run
from infer.models.config import ModelConfig, load_model_config
from infer.models.layout import plan_layout, volume
from infer.parallel.topology import Topology

UNEVEN = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 1009, "hidden_size": 72, "num_hidden_layers": 5,
    "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 101, "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def write(path: Path, **fields: object) -> Path:
    (path / "config.json").write_text(json.dumps(UNEVEN | fields))
    return path


def read(path: Path) -> ModelConfig:
    return load_model_config(path, EngineConfig(model=str(path)))


def test_every_family_is_described() -> None:
    for architecture, family in FAMILIES.items():
        assert family.models and family.blocks, architecture
        assert family.checkpoints, architecture
        for checkpoint in family.checkpoints:
            owner, _, name = checkpoint.partition("/")
            assert owner and name and "/" not in name, architecture
        assert not set("|\n") & set(family.models + family.blocks), architecture


def test_every_family_is_compared_with_transformers() -> None:
    """By a recipe, which test_families.py and the layout tests run. Of models that see, Gemma 3's text part is read,
    which is another family's model under another name."""
    compared = {recipe.model_class or f"{recipe.family}ForCausalLM" for recipe in RECIPES.values()}
    assert FAMILIES.keys() - compared == {"Gemma3ForConditionalGeneration"}


def test_the_table_lists_every_family_and_fits_a_terminal() -> None:
    text = _run([])
    lines = text.splitlines()
    assert all(any(architecture in line for line in lines) for architecture in FAMILIES)
    assert max(map(len, lines)) <= 170
    for family in FAMILIES.values():
        assert all(word in text for word in family.blocks.split())
        assert all(checkpoint in text for checkpoint in family.checkpoints)


def test_the_page_of_models_has_the_table_that_the_command_prints() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    assert _run(["--markdown"]) in text, "replace its table by what `python -m infer.models --markdown` prints"


def test_the_page_on_adding_a_model_shows_a_real_diff() -> None:
    """Of files that are so, and short, as the page promises."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "docs" / "add-a-model.md").read_text(), re.DOTALL)
    assert diff is not None
    added = 0
    for part in re.split(r"^--- .*\n\+\+\+ ", diff[1], flags=re.MULTILINE)[1:]:
        file, _, body = part.partition("\n")
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines()
            assert all(line[:1] in ("+", " ") for line in lines), "nothing of what was there is touched"
            assert "\n".join(line[1:] for line in lines) in (ROOT / file).read_text(), f"{file} has other lines"
            added += sum(line.startswith("+") for line in lines)
    assert 20 < added < 40


def test_the_command_as_people_run_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "infer.models", "--layout", "--model", "configs/llama-3.1-8b", "-tp", "99"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "infer: error: tensor_parallel_size 99 is more than the model's 32 attention heads; the largest that works is "
        "32\n"
    )


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], 0),
        ([(range(3),)], 3),
        ([(range(3), range(4)), (range(3), range(4))], 12),
        ([(range(3), range(4)), (range(2, 5), range(4))], 20),
        ([(range(4), range(2)), (range(4), range(2, 5)), (range(1, 2), range(9))], 24),
    ],
)
def test_volume(boxes: list[tuple[range, ...]], expected: int) -> None:
    assert volume(boxes) == expected
    points = set().union(*(set(itertools.product(*box)) for box in boxes)) if boxes else set()
    assert len(points) == expected


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 2), (9, 5)])
@pytest.mark.parametrize("tied", [False, True])
def test_an_uneven_model_over_ranks(tmp_path: Path, tp: int, pp: int, tied: bool) -> None:
    """Every parameter is counted once, however many ranks hold it, and every rank's share is its own."""
    c = read(write(tmp_path, tie_word_embeddings=tied))
    layout = plan_layout(c, Topology(tp, pp))
    layer = 72 * (9 + 2 * 3 + 9) * 8 + 3 * 72 * 101 + 2 * 72
    assert layout.num_parameters == 5 * layer + (1 if tied else 2) * 1009 * 72 + 72
    for start in range(0, len(layout.ranks), tp):
        stage = layout.ranks[start : start + tp]
        assert len({rank.layers for rank in stage}) == 1
        assert sum(rank.num_heads for rank in stage) == 9
        assert sum(rank.num_kv_heads for rank in stage) >= 3
        for rank in stage:
            assert rank.kv_bytes_per_token == 2 * 2 * len(rank.layers) * rank.num_kv_heads * 8
    assert [layer for rank in layout.ranks[::tp] for layer in rank.layers] == list(range(5))
    copies = sum(rank.parameter_bytes for rank in layout.ranks) // 2 - layout.num_parameters
    kv_copies = sum(rank.num_kv_heads * len(rank.layers) for rank in layout.ranks) - 3 * 5
    norms = (tp - 1) * (2 * 5 + 1) * 72
    assert copies == norms + kv_copies * 2 * 8 * 72 + (1009 * 72 if tied and pp > 1 else 0)


def test_what_is_printed(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 123456}, "weight_map": {}}
    (write(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = _run(["--layout", "--model", str(tmp_path), "-tp", "2", "-pp", "2"]).splitlines()
    assert lines[0] == f"{tmp_path}: LlamaForCausalLM in bfloat16, 5 layers, tp 2 x pp 2 = 4 ranks"
    first, last = lines[3].split(), lines[6].split()
    assert first[:4] == ["0", "0", "0", "embedding"] and last[:3] == ["3", "1", "1"] and "head" in last
    layout = plan_layout(read(tmp_path), Topology(2, 2))
    assert [f"{rank.parameter_bytes:,}" for rank in layout.ranks] == [line.split()[-3] for line in lines[3:7]]
    assert [f"{rank.kv_bytes_per_token:,}" for rank in layout.ranks] == [line.split()[-1] for line in lines[3:7]]
    assert f"parameters of the model, each once: {layout.num_parameters:,} (0.00 billion)" in lines
    assert "bytes of the checkpoint, by its index: 123,456" in lines
    table = _run(["--layout", "--model", str(tmp_path), "-tp", "2", "--markdown"])
    assert "| rank | pp | tp | layers |" in table


def test_the_rank_with_the_least_room_decides_how_many_tokens_fit(tmp_path: Path) -> None:
    args = ["--layout", "--model", str(write(tmp_path)), "-tp", "2", "-pp", "2"]
    layout = plan_layout(read(tmp_path), Topology(2, 2))
    usable = math.floor(0.001 * 0.5 * 2**30)
    room = {rank.rank: (usable - rank.parameter_bytes) // rank.kv_bytes_per_token for rank in layout.ranks}
    tightest = min(room, key=lambda rank: room[rank])
    text = _run([*args, "--gpu-memory", "0.001", "--gpu-memory-utilization", "0.5"])
    assert f"{room[tightest] // 16 * 16:,} tokens, less what activations take; rank {tightest} has" in text
    assert "none, the weights leave no room; take more ranks, or GPUs of over 0.0 GiB" in _run(
        [*args, "--gpu-memory", "0.0001"]
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--layout"], "--model"),
        (["-tp", "8"], "unrecognized arguments: -tp 8"),
        (["--layout", "--model", "M", "-tp", "10"], "the largest that works is 9"),
        (["--layout", "--model", "M", "-pp", "6"], "5 layers; the largest that works is 5"),
        (["--layout", "--model", "M", "-pp", "2", "--pipeline-layer-partition", "4,2"], "sums to 6"),
        (["--layout", "--model", "M", "--gpu-memory", "80G"], "'80G' is not a number of GiB such as 80"),
        (["--layout", "--model", "M", "--gpu-memory", "-1"], "'-1' is not a number of GiB"),
        (["--layout", "--model", "M", "--max-num-seqs", "8"], "unrecognized arguments: --max-num-seqs 8"),
    ],
)
def test_errors_say_what_would_work(tmp_path: Path, args: list[str], words: str) -> None:
    path = str(write(tmp_path))
    with pytest.raises(ValueError) as caught:
        _run([path if arg == "M" else arg for arg in args])
    assert words in str(caught.value)
