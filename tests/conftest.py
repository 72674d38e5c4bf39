"""Fixtures that several test modules share."""

from pathlib import Path

import pytest
from checkpoints import RECIPES, Reference, build_checkpoint
from worlds import ROOT

SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def checkpoint_dirs(tmp_path_factory) -> dict[str, Path]:
    """The small checkpoints by name, built once a session."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: build_checkpoint(name, root / name) for name in RECIPES}


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """SmolLM2-135M-Instruct, which `make test` fetches."""
    assert (SMOLLM2 / "config.json").is_file(), f"{SMOLLM2} is missing; run scripts/fetch_default_model.py"
    return SMOLLM2


@pytest.fixture(scope="session")
def references(checkpoint_dirs, default_model_dir) -> dict[str, Reference]:
    """transformers' view of every checkpoint by name; loaded when first asked."""
    return {name: Reference(path) for name, path in {**checkpoint_dirs, "smollm2": default_model_dir}.items()}
