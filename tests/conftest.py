"""Fixtures that several test modules share."""

from collections.abc import Callable
from pathlib import Path

import family_jobs
import layout_jobs
import pytest
from checkpoints import CORE, Reference, build_checkpoint, poison
from world_scripts.jobs import JobResult
from worlds import ROOT, run_jobs

SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"


def pytest_report_header() -> str:
    chosen = ", ".join(f"{tp}x{pp}" for tp, pp in family_jobs.layouts())
    return f"families run at tp x pp = {chosen} (INFER_TEST_LAYOUT chooses the last, or all)"


class Checkpoints(dict[str, Path]):
    """The small checkpoints by name, each built when it is first asked for."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        self[name] = build_checkpoint(name, self.root / name)
        return self[name]


@pytest.fixture(scope="session")
def checkpoint_dirs(tmp_path_factory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def core_dirs(checkpoint_dirs, default_model_dir) -> dict[str, Path]:
    """The models that run in all layout tests."""
    return {**{name: checkpoint_dirs[name] for name in CORE}, "smollm2": default_model_dir}


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """SmolLM2-135M-Instruct, which `make test` fetches."""
    assert (SMOLLM2 / "config.json").is_file(), f"{SMOLLM2} is missing; run scripts/fetch_default_model.py"
    return SMOLLM2


@pytest.fixture(scope="session")
def references(core_dirs) -> dict[str, Reference]:
    """transformers' view of the core models by name; loaded when first asked."""
    return {name: Reference(path) for name, path in core_dirs.items()}


@pytest.fixture(scope="session")
def poisoned_dir(checkpoint_dirs, tmp_path_factory) -> Path:
    """A checkpoint in which nothing finite comes of layout_jobs.POISON."""
    return poison(checkpoint_dirs["mistral"], tmp_path_factory.mktemp("poisoned") / "mistral", layout_jobs.POISON)


@pytest.fixture(scope="session")
def layout_results(core_dirs, poisoned_dir, tmp_path_factory) -> Callable[[int, int], dict[str, JobResult]]:
    """(tp, pp) -> the results of `layout_jobs.jobs` in a world of tp x pp ranks, which runs once a session.

    One rank is a plain process, several are torchrun's: the script is the same.
    """
    directories = {**core_dirs, "poisoned": poisoned_dir}
    found: dict[tuple[int, int], dict[str, JobResult] | Exception] = {}

    def run(tp: int, pp: int) -> dict[str, JobResult]:
        if (tp, pp) not in found:
            root = tmp_path_factory.mktemp(f"tp{tp}-pp{pp}")
            try:
                found[tp, pp] = run_jobs(
                    layout_jobs.jobs(tp, pp, directories), root, ranks=tp * pp, timeout=240, torchrun=tp * pp > 1
                )
            except Exception as error:
                found[tp, pp] = error  # the world is not run again for each test
        result = found[tp, pp]
        if isinstance(result, Exception):
            raise result
        return result

    return run
