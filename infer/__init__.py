"""A pure-PyTorch, torchrun-native inference framework.

    from infer import LLM, SamplingParams

Names are imported on first use, so that `import infer` costs nothing and does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer.llm import LLM
    from infer.outputs import CompletionOutput, RequestOutput
    from infer.request import FinishReason, SamplingParams, StructuredOutputs

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "FinishReason", "RequestOutput", "SamplingParams", "StructuredOutputs"]

_HOME = {
    "LLM": "infer.llm",
    "CompletionOutput": "infer.outputs",
    "RequestOutput": "infer.outputs",
    "FinishReason": "infer.request",
    "SamplingParams": "infer.request",
    "StructuredOutputs": "infer.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'infer' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
