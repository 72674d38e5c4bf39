"""How fast one GPU runs a model's shape in one of several ways: figures as JSON, beside the hardware's limits.

    python scripts/gpu_bench.py graphs --model configs/llama-3.1-8b --output-json graphs.json

graphs: CUDA graphs, the default; eager: --enforce-eager; compile: --compile. All have random weights in bfloat16 and
run the same workloads, and so does tests/gpu/peer_transformers.py, to compare with.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infer.bench.offline import Bench, open_engine
from infer.bench.report import write_json
from infer.config import EngineConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "compile": {"compile": True},
}


@dataclass(frozen=True)
class Workload:
    """So many requests at once. figure: what of it counts, as in Bench.latency's report."""

    requests: int
    input_len: int
    output_len: int
    figure: str


WORKLOADS = {
    "decode of 1 request at 1k": Workload(1, 1024, 65, "between_tokens"),
    "decode of 64 requests at 1k": Workload(64, 1024, 65, "between_tokens"),
    "prefill of 8k tokens": Workload(1, 8192, 1, "first_token"),
}
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--model", required=True, help="directory with a config.json")
    parser.add_argument("--output-json", type=Path, required=True, help="file for the figures")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_bench: torch.cuda.is_available() is false: there is no GPU to measure")
    write_json(args.output_json, measure_variant(args.variant, args.model))


def measure_variant(variant: str, model: str) -> dict[str, Any]:
    """The figures by workload, and the hardware's limits."""
    # All prompts of a workload are one batch, so that all its decode steps have all its requests.
    config = EngineConfig(
        model=model,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=max(w.input_len + w.output_len for w in WORKLOADS.values()),
        max_num_seqs=max(w.requests for w in WORKLOADS.values()),
        max_num_batched_tokens=max(w.requests * w.input_len for w in WORKLOADS.values()),
        enable_prefix_caching=False,
        disable_log_stats=True,
        **VARIANTS[variant],
    )
    found: dict[str, Any] = {}
    with open_engine(config, "scripts/gpu_bench.py") as engine:
        for name, work in WORKLOADS.items():
            options = argparse.Namespace(
                model=model, input_len=work.input_len, output_len=work.output_len, batch_size=work.requests,
                num_iters_warmup=2, num_iters=REPEATS,
            )  # fmt: skip
            report = Bench(engine, options).latency()
            figure = report[work.figure]
            found[name] = {"seconds": figure["median"], "limit": figure["limit"]}
            hardware = report["hardware"]
    return {"workloads": found, "hardware": hardware, "torch": torch.__version__}


if __name__ == "__main__":
    main()
