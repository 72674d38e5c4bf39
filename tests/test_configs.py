"""configs/: shapes of real models, which need no weights and no tokenizer to be measured."""

import json
import subprocess
import sys

import pytest
from worlds import ROOT

from infer.config import EngineConfig
from infer.models.config import load_model_config

BILLIONS = {"llama-3.1-8b": 8.030, "llama-3.1-70b": 70.554, "llama-3.2-1b": 1.236, "qwen3-0.6b": 0.596}
SMALLER = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "eos_token_id": 3,
}  # fmt: skip


def test_every_config_is_listed():
    assert {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()} == set(BILLIONS)


@pytest.mark.parametrize("name", BILLIONS)
def test_configs_have_the_published_numbers_of_parameters(name):
    path = ROOT / "configs" / name
    c = load_model_config(path, EngineConfig(model=str(path)))
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    assert (c.layer_parameters * c.num_layers + embeddings) / 1e9 == pytest.approx(BILLIONS[name], abs=2e-3)
    assert c.dtype == "bfloat16" and c.eos_token_ids


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
