"""How much memory loading takes: a rank's own weights and little more, packing included.

Measured is anonymous memory: a checkpoint's files are mapped, and their pages can be given back at any time.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from worlds import ROOT, SCRIPTS, python_path

from infer.config import EngineConfig
from infer.layers.declare import declared
from infer.models.config import load_model_config
from infer.models.decoder import Stage
from infer.parallel.groups import alone

COMMON = {
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}  # fmt: skip
CONFIGS = {  # some 400 MB each, or of each stage
    "dense": COMMON | {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "num_hidden_layers": 9, "intermediate_size": 4096,
    },
    "tied": COMMON | {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 160003, "num_hidden_layers": 3, "intermediate_size": 2048,
        "tie_word_embeddings": True,
    },
    "head": COMMON | {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 200003, "num_hidden_layers": 2, "intermediate_size": 64,
    },
    "experts": COMMON | {
        "architectures": ["MixtralForCausalLM"], "vocab_size": 8000, "num_hidden_layers": 4, "intermediate_size": 1792,
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    },
}  # fmt: skip
NUM_FILES = 6
OVERHEAD = 300 << 20  # the interpreter, torch, and what is on its way from a file into its place
TIMEOUT = 120.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The checkpoint of that name, written when it is first asked for, and deleted in the end."""
    written: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            write_checkpoint(written[name], CONFIGS[name])
        return written[name]

    yield checkpoint
    for path in written.values():
        shutil.rmtree(path)


def write_checkpoint(path: Path, config: dict[str, object]) -> None:
    """Over several files, in bfloat16."""
    (path / "config.json").write_text(json.dumps(config))
    c = load_model_config(path, EngineConfig(model=str(path)))
    meta = torch.device("meta")
    stage = Stage(c, range(c.num_layers), alone(), is_first=True, is_last=True, dtype=torch.bfloat16, device=meta)
    shapes = {source.name: source.shape for _, spec in declared(stage) for source in spec.sources}
    tile = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(NUM_FILES)]
    for number, (name, shape) in enumerate(shapes.items()):
        size = torch.Size(shape).numel()
        files[number * NUM_FILES // len(shapes)][name] = tile.repeat(-(-size // len(tile)))[:size].view(shape)
    weight_map = {}
    for number, tensors in enumerate(files):
        file = path / f"model-{number}.safetensors"
        save_file(tensors, file)
        weight_map |= dict.fromkeys(tensors, file.name)
        tensors.clear()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def peak_while_loading(checkpoint: Path, *args: object) -> tuple[int, int]:
    """(bytes of the rank's parameters, the most anonymous memory that its process held at once). args: of
    load_stage.py."""
    command = [sys.executable, str(SCRIPTS / "load_stage.py"), str(checkpoint), *map(str, args)]
    env = {"PYTHONPATH": python_path(ROOT, ROOT / "tests"), "PATH": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    peak, deadline = 0, time.monotonic() + TIMEOUT
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline, f"loading did not end within {TIMEOUT:g} s"
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.001)  # a copy of any size worth noticing takes longer
        out, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    return int(out), peak


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # ended meanwhile
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@pytest.mark.parametrize(
    ("name", "tp", "tp_size", "pp", "pp_size", "options"),
    [
        ("dense", 0, 2, 0, 1, {}),
        ("dense", 1, 2, 0, 1, {"dtype": "float32"}),
        ("dense", 0, 1, 1, 2, {}),
        ("tied", 0, 1, 0, 1, {}),
        ("experts", 0, 2, 0, 1, {"enable_expert_parallel": True}),
    ],
)
def test_a_rank_takes_its_own_weights_and_little_more(
    checkpoints: Callable[[str], Path], name: str, tp: int, tp_size: int, pp: int, pp_size: int, options: dict
) -> None:
    own, peak = peak_while_loading(checkpoints(name), tp, tp_size, pp, pp_size, json.dumps(options))
    print(f"{own / 2**20:.0f} MiB of weights, at most {peak / 2**20:.0f} MiB held")
    assert peak > own, "the weights themselves were not seen"
    assert peak <= 1.1 * own + OVERHEAD


@pytest.mark.parametrize(("name", "pp", "pp_size"), [("dense", 0, 1), ("head", 1, 2)])
def test_so_it_is_where_the_cpu_multiplies_bfloat16(
    checkpoints: Callable[[str], Path], name: str, pp: int, pp_size: int
) -> None:
    """oneDNN packs into a second copy there."""
    own, peak = peak_while_loading(checkpoints(name), 0, 1, pp, pp_size, "{}", "onednn")
    print(f"{own / 2**20:.0f} MiB of weights, at most {peak / 2**20:.0f} MiB held")
    assert own < peak <= 1.1 * own + OVERHEAD
