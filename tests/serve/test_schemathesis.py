"""schemathesis against the server: whatever it sends, no 5xx, no status and no reply that the document lacks."""

from collections.abc import Iterator

import pytest
import requests
import schemathesis
from fake_engine import MODEL, FakeEngine
from schemathesis.config import SchemathesisConfig

from infer.serve.openapi import document

CONFIG = {
    "seed": 4,
    "generation": {"max-examples": 3, "deterministic": True, "database": "none", "no-shrink": True},
    # No document can say which fields exclude each other, or what fits a context: valid bodies may be refused.
    "checks": {"positive_data_acceptance": {"enabled": False}},
}
# What the server gives at /openapi.json, as test_openapi.py knows.
SCHEMA = schemathesis.openapi.from_dict(
    document(model_names=[MODEL], max_logprobs=20), config=SchemathesisConfig.from_dict(CONFIG)
)


@pytest.fixture(scope="module")
def url(served: tuple[str, FakeEngine]) -> Iterator[str]:
    url, engine = served
    engine.tokens_per_step = 64  # n times max_tokens may be many
    yield url
    assert not engine.num_running, "nothing is left behind"


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


@SCHEMA.parametrize()
def test_the_server_does_as_its_document_says(case: schemathesis.Case, url: str, session: requests.Session) -> None:
    case.call_and_validate(base_url=url, session=session, timeout=20)
