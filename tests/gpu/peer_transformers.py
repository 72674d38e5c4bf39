"""The workloads of scripts/gpu_bench.py on transformers' own model and attention: figures as JSON, to compare with.

    python tests/gpu/peer_transformers.py --model configs/llama-3.1-8b --output-json transformers.json

Random weights in bfloat16, a forward pass a step, greedy, with its default cache.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infer.bench.limits import Model
from infer.bench.machine import measure
from infer.bench.report import write_json
from infer.config import EngineConfig
from infer.launch import RankEnv
from infer.models.config import load_model_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpu_bench import REPEATS, WORKLOADS, Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with a config.json")
    parser.add_argument("--output-json", type=Path, required=True, help="file for the figures")
    args = parser.parse_args()
    write_json(args.output_json, measure_peer(args.model))


@torch.inference_mode()
def measure_peer(path: str) -> dict[str, Any]:
    """The figures by workload. Says so, instead, where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return {"missing": "not installed"}
    device, model_config = torch.device("cuda", 0), load_model_config(Path(path), EngineConfig(model=path))
    with device:
        config = transformers.AutoConfig.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found = {}
    hardware = measure(device, torch.bfloat16, RankEnv())
    for name, work in WORKLOADS.items():
        limit = Model.of(model_config).run(hardware, work.requests, work.input_len, work.output_len)
        least = limit.prefill if work.figure == "first_token" else limit.decode / (work.output_len - 1)
        times = [run_workload(model, work, model_config.vocab_size, device) for _ in range(1 + REPEATS)][1:]
        found[name] = {"seconds": statistics.median(times), "limit": least}
    return {"workloads": found, "version": transformers.__version__}


def run_workload(model: Callable[..., Any], work: Workload, vocab_size: int, device: torch.device) -> float:
    """Seconds of the prompts' pass, or of one decode step on average."""
    gc.collect()
    torch.cuda.empty_cache()
    ids = torch.randint(0, vocab_size, (work.requests, work.input_len), device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    ids = out.logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    if work.figure == "first_token":
        return time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(work.output_len - 1):
        out = model(ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        ids = out.logits[:, -1:].argmax(-1)
        ids.tolist()  # whoever streams tokens waits for each
    return (time.perf_counter() - started) / (work.output_len - 1)


if __name__ == "__main__":
    main()
