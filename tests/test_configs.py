"""configs/: shapes of real models, which need no weights and no tokenizer to be measured."""

import json
import re
import subprocess
import sys

import pytest
from worlds import ROOT

from infer.config import EngineConfig
from infer.models.config import load_model_config
from infer.models.layout import plan_layout
from infer.parallel.topology import Topology

# As the safetensors of their repositories count; DeepSeek-V3 without its multi-token prediction layer.
PARAMETERS = {
    "deepseek-v3": 671_026_419_200,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-0.6b": 596_049_920,
    "qwen3-235b-a22b": 235_093_634_560,
}
LARGE = ("deepseek-v3", "llama-3.1-405b", "mixtral-8x22b", "qwen3-235b-a22b")
SMALLER = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "eos_token_id": 3,
}  # fmt: skip


def read(name):
    path = ROOT / "configs" / name
    return load_model_config(path, EngineConfig(model=str(path)))


def test_every_config_is_listed():
    assert {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()} == set(PARAMETERS)
    text = (ROOT / "configs" / "README.md").read_text()
    for name, count in PARAMETERS.items():
        assert re.search(rf"^\| `{re.escape(name)}` \| .* \| {count:,} \|$", text, re.MULTILINE), name


@pytest.mark.parametrize("name", PARAMETERS)
def test_configs_have_the_published_numbers_of_parameters(name):
    c = read(name)
    assert plan_layout(c, Topology(1, 1)).num_parameters == PARAMETERS[name]
    assert c.dtype == "bfloat16" and c.eos_token_ids


@pytest.mark.parametrize("name", LARGE)
def test_two_nodes_of_eight_hold_the_published_size(name):
    """The bytes of the ranks, less the copies that several of them hold, are the model's: none is missing or twice."""
    layout = plan_layout(read(name), Topology(8, 2))
    assert layout.num_parameters == PARAMETERS[name]
    held = sum(rank.parameter_bytes for rank in layout.ranks)
    copies = held - 2 * PARAMETERS[name]
    assert 0 < copies < 0.02 * held
    assert max(rank.parameter_bytes for rank in layout.ranks) < 1.2 * held / 16
    assert [rank.rank for rank in layout.ranks] == list(range(16))


def test_a_config_alone_can_be_measured(tmp_path):
    command = [sys.executable, "-m", "infer.bench", "throughput", "--model", "configs/llama-3.2-1b"]
    command += ["--load-format", "dummy", "--hf-overrides", json.dumps(SMALLER), "--max-model-len", "64"]
    command += ["--num-gpu-blocks-override", "64", "--input-len", "9", "--output-len", "5", "--concurrency", "1", "3"]
    figures = tmp_path / "figures.json"
    done = subprocess.run([*command, "--output-json", figures], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = json.loads(figures.read_text())["runs"]
    assert [run["concurrency"] for run in runs] == [1, 3]
    assert all(run["output_tokens_per_second"] > 0 for run in runs)
