"""A closed LLM gives its memory back, though the script still has the object; so does one that an error has broken."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from infer import LLM, SamplingParams


def open_llm(model: Path) -> tuple[LLM, list[weakref.ref]]:
    """A small LLM, and references to its stage, to some of its tensors and to its cache."""
    llm = LLM(
        model=str(model), dtype="float32", num_gpu_blocks_override=64, max_model_len=128, num_threads=1,
        disable_log_stats=True,
    )  # fmt: skip
    runner = llm.engine.built.runner
    held: list[object] = [runner.stage, runner.stage.norm.weight, *runner.stage.buffers()]
    return llm, [weakref.ref(x) for x in (*held, runner.pages.k[0], runner.pages.v[-1])]


def num_alive(held: list[weakref.ref]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in held)


PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def test_a_closed_llm_holds_neither_weights_nor_cache(checkpoint_dirs: dict[str, Path]) -> None:
    llm, held = open_llm(checkpoint_dirs["llama"])
    llm.generate([5, 6, 7], PARAMS, use_tqdm=False)
    assert num_alive(held) == len(held)
    llm.close()
    assert num_alive(held) == 0
    llm.close()  # again: nothing to do
    assert llm.engine.pipeline_time().busy[0] > 0, "figures outlive it"


def test_so_does_a_broken_one(checkpoint_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, held = open_llm(checkpoint_dirs["llama"])
    runner = llm.engine.built.runner

    def fail(x: torch.Tensor, context: object) -> torch.Tensor:
        raise RuntimeError("no memory")

    monkeypatch.setattr(runner, "_forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        llm.generate([5, 6, 7], PARAMS, use_tqdm=False)
    monkeypatch.undo()
    llm.close()
    assert num_alive(held) == 0


def test_so_does_one_that_cannot_be_built(checkpoint_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after the cache is there."""
    held: list[weakref.ref] = []

    def fail(runner: object) -> None:
        held.extend(weakref.ref(x) for x in (runner.stage, runner.pages.k[0]))  # type: ignore[attr-defined]
        raise ValueError("no tape")

    monkeypatch.setattr("infer.engine.runner.Runner.record", fail)
    with pytest.raises(ValueError, match="no tape"):
        open_llm(checkpoint_dirs["llama"])
    assert len(held) == 2 and num_alive(held) == 0
