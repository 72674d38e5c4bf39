"""Tool calls: a parser for each format that models write them in, and the grammar that forces them. No torch here."""

from collections.abc import Sequence
from typing import Any

from infer.serve.tools.base import ContentDelta, ToolDelta, ToolParser
from infer.serve.tools.forced import NamedParser, RequiredParser
from infer.serve.tools.grammar import named_schema, required_schema
from infer.serve.tools.hermes import HermesParser
from infer.serve.tools.llama3_json import Llama3JsonParser
from infer.serve.tools.mistral import MistralParser
from infer.serve.tools.pythonic import PythonicParser
from infer.serve.tools.qwen3_coder import Qwen3CoderParser

__all__ = [
    "PARSERS", "ContentDelta", "NamedParser", "RequiredParser", "ToolDelta", "ToolParser", "make_parser",
    "named_schema", "parser_class", "required_schema",
]  # fmt: skip

# --tool-call-parser -> its class
PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "qwen3_coder": Qwen3CoderParser,
}


def parser_class(name: str) -> type[ToolParser]:
    """Raises ValueError that names the parsers there are."""
    if name not in PARSERS:
        raise ValueError(f"there is no tool-call parser {name!r}; known are {', '.join(PARSERS)}")
    return PARSERS[name]


def make_parser(name: str, tools: Sequence[dict[str, Any]]) -> ToolParser:
    """A parser for one choice. tools: the request's, as OpenAI's JSON. Raises ValueError for an unknown name."""
    return parser_class(name)(tools)
