"""python -m infer.models: which models there are, and what each rank of a layout would hold.

python -m infer.models
python -m infer.models --layout --model configs/llama-3.1-405b -tp 8 -pp 2 --gpu-memory 80
"""

import argparse
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from infer import launch
from infer.config import EngineConfig, Parser, add_flags, from_args
from infer.models import FAMILIES
from infer.models.fields import Fields, read_json
from infer.models.source import read_model
from infer.parallel.topology import Topology
from infer.tables import markdown_table, table

if TYPE_CHECKING:
    from infer.models.layout import Layout, RankShare

INDEX = "model.safetensors.index.json"
HEADER = ("models", "architecture", "checkpoints", "blocks", "tp", "pp", "ep")
LAYOUT_HEADER = (
    "rank", "pp", "tp", "layers", "heads", "KV heads", "experts", "parameter bytes", "GiB", "KV bytes a token",
)  # fmt: skip
WIDTHS = (26, 31, 40, 44, 3, 3, 3)  # of the columns on a terminal
LAYOUT_FLAGS = {
    "model", "revision", "download_dir", "hf_overrides", "dtype", "tensor_parallel_size", "pipeline_parallel_size",
    "pipeline_layer_partition", "enable_expert_parallel", "block_size", "gpu_memory_utilization",
}  # fmt: skip


def main() -> None:
    try:
        print(_run(sys.argv[1:]))
    except ValueError as error:
        launch.fail(str(error), None)


def _run(argv: list[str]) -> str:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m infer.models", description=summary, epilog=examples, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="write the table as Markdown")
    parser.add_argument(
        "--layout", action="store_true", help="what each rank would hold; --layout --help lists what it takes"
    )
    if "--layout" not in argv:
        return families_table(parser.parse_args(argv).markdown)
    parser.add_argument(
        "--gpu-memory",
        type=_gibibytes,
        metavar="GIB",
        help="of each GPU: how many tokens of KV cache fit beside the weights",
    )
    add_flags(parser, EngineConfig, LAYOUT_FLAGS)
    args = parser.parse_args(argv)
    return _layout(from_args(args, EngineConfig), args.gpu_memory, args.markdown)


def _gibibytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB such as 80")
    return size


def families_table(markdown: bool) -> str:
    """The table of everything in the registry."""
    rows = [
        (f.models, architecture, ", ".join(f.checkpoints), f.blocks, "any", "any", "yes" if f.experts else "-")
        for architecture, f in FAMILIES.items()
    ]
    if markdown:
        cells = [(a, f"`{b}`", *rest) for a, b, *rest in rows]
        return markdown_table(HEADER, cells, left=range(len(HEADER)))
    lines = [line for row in rows for line in _wrapped(row)]
    return table(HEADER, lines, left=range(len(HEADER))) + "\n\n" + textwrap.fill(NOTE, 120)


NOTE = (
    "tp: ranks a layer is split over, evenly or not, at most as many as attention heads. pp: stages the layers are "
    "split over. ep: --enable-expert-parallel spreads whole experts over the tp ranks."
)


def _wrapped(row: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A row as several, so that no cell is wider than its column."""
    cells = [
        textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False)
        for cell, width in zip(row, WIDTHS, strict=True)
    ]
    return list(zip_longest(*cells, fillvalue=""))


def _layout(config: EngineConfig, gpu_memory: float | None, markdown: bool) -> str:
    """Reads the config alone, plans, and writes what came out."""
    path, c = read_model(config, weights=False)
    topology = Topology(config.tensor_parallel_size or 1, config.pipeline_parallel_size)
    from infer.models.layout import plan_layout  # which needs torch, as nothing above does

    layout = plan_layout(c, topology, config.pipeline_layer_partition, config.enable_expert_parallel)
    shown = (markdown_table if markdown else table)(LAYOUT_HEADER, _ranks(layout), left=(3,))
    title = (
        f"{config.model}: {c.architecture} in {c.dtype}, {c.num_layers} layers, "
        f"tp {topology.tp_size} x pp {topology.pp_size} = {topology.world_size} ranks"
    )
    lines = [title, "", shown, "", *_totals(layout, path / INDEX)]
    if gpu_memory is not None:
        lines.append(_room(layout, gpu_memory, config))
    return "\n".join(lines)


def _ranks(layout: "Layout") -> list[list[str]]:
    rows = []
    for r in layout.ranks:
        numbers = [r.num_heads, r.num_kv_heads or "latent", r.num_experts or "-"]
        sizes = [f"{r.parameter_bytes:,}", f"{r.parameter_bytes / 2**30:.2f}", f"{r.kv_bytes_per_token:,}"]
        rows.append([*map(str, (r.rank, r.pp, r.tp)), _layers(r), *map(str, numbers), *sizes])
    return rows


def _layers(r: "RankShare") -> str:
    ends = ["embedding"] * r.is_first, ["head"] * r.is_last
    return " + ".join([*ends[0], f"{r.layers.start} to {r.layers.stop - 1}", *ends[1]])


def _totals(layout: "Layout", index: Path) -> list[str]:
    held = sum(r.parameter_bytes for r in layout.ranks)
    largest = max(layout.ranks, key=lambda r: r.parameter_bytes)
    lines = [
        f"parameters of the model, each once: {layout.num_parameters:,} ({layout.num_parameters / 1e9:.2f} billion)",
        f"parameter bytes of all ranks, with what several hold: {held:,} ({held / 2**30:.2f} GiB)",
        f"parameter bytes of rank {largest.rank}, the most: {largest.parameter_bytes:,} "
        f"({largest.parameter_bytes / 2**30:.2f} GiB)",
    ]
    size = Fields(index, read_json(index)).section("metadata").get("total_size") if index.is_file() else None
    if isinstance(size, (int, float)):
        lines.append(f"bytes of the checkpoint, by its index: {int(size):,}")
    return lines


def _room(layout: "Layout", memory: float, config: EngineConfig) -> str:
    """What is left for the KV cache: the rank with the least room decides, each by its own bytes a token.

    memory: GiB of each GPU.
    """
    share = config.gpu_memory_utilization
    what = f"KV cache in {memory:g} GiB x {share:g} (--gpu-memory-utilization) a rank"
    spare = int(memory * share * 2**30)
    tokens, tightest = min(((spare - r.parameter_bytes) // r.kv_bytes_per_token, r.rank) for r in layout.ranks)
    if tokens < config.block_size:
        needed = max(r.parameter_bytes for r in layout.ranks) / 2**30 / share
        return f"{what}: none, the weights leave no room; take more ranks, or GPUs of over {needed:.1f} GiB"
    tokens -= tokens % config.block_size
    return f"{what}: {tokens:,} tokens, less what activations take; rank {tightest} has the least room"


if __name__ == "__main__":
    main()
