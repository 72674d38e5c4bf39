"""The command lines that the pages show are ones that torchrun and the program take."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from worlds import ROOT

from infer.serve.server import parse

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def command_lines(page: Path) -> list[list[str]]:
    """The words of every torchrun line of a page, shell variables replaced by a number."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:\w+=\S+ )*(torchrun .*)", text, re.MULTILINE)
    lines += re.findall(r"^ {4}srun .* bash -c 'exec +(torchrun [^']*)'", text, re.MULTILINE)
    return [shlex.split(re.sub(r"\$\{?\w+\}?", "0", line), comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_torchrun_lines(page, tmp_path, monkeypatch):
    (tmp_path / "server.yaml").write_text("max-model-len: 4096")  # --config in one of the lines
    monkeypatch.chdir(tmp_path)
    for words in command_lines(page):
        line = f"{page.name}: {shlex.join(words)}"
        args = get_args_parser().parse_args(words[1:])
        assert args.max_restarts > 0, f"{line}: without --max-restarts the first lost rank is the end"
        assert args.rdzv_backend == "static" and args.master_port, f"{line}: this is c10d, which unpickles"
        if args.module and args.training_script == "infer.serve":
            engine, _ = parse(args.training_script_args)
            num_nodes = int(args.nnodes.rpartition(":")[2]) or 2  # 0: a shell variable
            assert engine.tensor_parallel_size * engine.pipeline_parallel_size == num_nodes * int(args.nproc_per_node)


def test_there_are_lines_for_each_way_to_start_several_nodes():
    lines = command_lines(ROOT / "docs" / "multi-node.md")
    assert len(lines) == 3 and all("--node-rank" in words and "--nnodes" in words for words in lines)
