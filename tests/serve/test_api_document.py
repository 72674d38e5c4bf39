"""docs/api.md names exactly the fields that the code knows."""

import re
from pathlib import Path

from infer.serve.schema import SamplingBody
from infer.serve.schema_chat import ChatBody
from infer.serve.schema_completion import CompletionBody
from infer.serve.schema_tokenize import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from infer.serve.untaken import IGNORED, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def fields(heading: str) -> list[str]:
    """The names in the first column of the table under a heading."""
    part = PAGE.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def check(heading: str, known: set[str]) -> None:
    named = fields(heading)
    assert len(named) == len(set(named)), f"{heading}: a field stands there twice"
    assert set(named) == known, f"{heading}: {sorted(set(named) ^ known)}"


def test_fields_of_bodies():
    shared = set(SamplingBody.__struct_fields__)
    check("Fields of both generating routes", shared)
    check("Fields of POST /v1/completions", set(CompletionBody.__struct_fields__) - shared)
    check("Fields of POST /v1/chat/completions", set(ChatBody.__struct_fields__) - shared)
    tokenize = (TokenizeTextBody, TokenizeChatBody, DetokenizeBody)
    check("POST /tokenize and POST /detokenize", {name for kind in tokenize for name in kind.__struct_fields__})


def test_fields_that_no_body_takes():
    check("Accepted without effect", set(IGNORED))
    check("Refused", set(REFUSED))
    taken = set(CompletionBody.__struct_fields__) & set(ChatBody.__struct_fields__)
    assert not taken & (IGNORED | set(REFUSED)), "both routes take it"
