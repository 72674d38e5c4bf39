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


def norms(c):
    return (2 * c.num_layers + 1) * c.hidden_size


# Elements that every rank of a stage has, beside routers. Norms of q and k are among them.
ON_EVERY_RANK = {
    "llama-3.1-405b": norms,
    "mixtral-8x22b": norms,
    "qwen3-235b-a22b": lambda c: norms(c) + c.num_layers * 2 * 128,
    "deepseek-v3": lambda c: norms(c) + c.num_layers * (1536 * 7168 + 1536 + (512 + 64) * 7168 + 512),
}
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


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - set(LARGE)))
def test_configs_have_the_published_numbers_of_parameters(name):
    c = read(name)
    assert plan_layout(c, Topology(1, 1)).num_parameters == PARAMETERS[name]
    assert c.dtype == "bfloat16" and c.eos_token_ids


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_two_nodes_of_eight_hold_the_published_size(name, expert_parallel):
    """The bytes of the ranks, less the copies that several of them hold, are the model's: none is missing or twice."""
    c = read(name)
    if c.moe is None and expert_parallel:
        pytest.skip("a dense model")
    layout = plan_layout(c, Topology(8, 2), expert_parallel=expert_parallel)
    assert layout.num_parameters == PARAMETERS[name]
    copies = 2 * 7 * ON_EVERY_RANK[name](c)
    if c.moe is not None:  # routers are float32 on every rank
        routers = sum(c.moe.sparse) * c.moe.num_experts * (c.hidden_size + c.moe.correction_bias)
        copies += (4 * 8 - 2) * routers
    if name == "qwen3-235b-a22b":  # each of its 4 KV heads is on two ranks
        copies += 2 * c.num_layers * 2 * 4 * 128 * c.hidden_size
    assert sum(rank.parameter_bytes for rank in layout.ranks) == 2 * PARAMETERS[name] + copies
    assert [rank.rank for rank in layout.ranks] == list(range(16))
    for stage in (layout.ranks[:8], layout.ranks[8:]):  # nothing here is too odd to divide evenly
        assert len({(rank.parameter_bytes, rank.kv_bytes_per_token, rank.num_experts) for rank in stage}) == 1


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
