"""A batch script: every prompt of a file (one a line), completed over all ranks.

    python scripts/generate.py prompts.txt
    torchrun --nproc-per-node 4 --max-restarts 10 scripts/generate.py prompts.txt --pipeline-parallel-size 2

Rank 0 goes on past LLM(...); the other ranks serve inside it and end with rank 0.
"""

import argparse
from pathlib import Path

from infer import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="text file, one prompt a line")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    llm = LLM(model=args.model, dtype=args.dtype, pipeline_parallel_size=args.pipeline_parallel_size)
    prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=args.max_tokens))
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
