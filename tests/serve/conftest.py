"""Fixtures around the helpers of fake_engine.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, frontend, is_ready, wait_until, write_tokenizer

from infer.serve.text import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(scope="module")
def served(tokenizer_path: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, FakeEngine]]:
    """(base URL, engine), shared by a module's tests."""
    with frontend(tokenizer_path) as handle:
        engine = FakeEngine(handle, tokenizer)
        engine.hello()
        wait_until(lambda: is_ready(handle.port))
        yield f"http://127.0.0.1:{handle.port}", engine
        engine.close()
