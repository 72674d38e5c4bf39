"""torch.compile of a stage (--compile): inductor fuses what lies between matrix products, attention and sums.

Dynamo traces a stage's layers as one graph whose only moving size is the number of rows. So that this is possible,

- norms and activations are their references (infer/ops.py), which inductor fuses with what is around them;
- attention, between its projections, is one opaque op, and so are a sum over ranks and a product with several experts'
  weights. Each does what it does uncompiled.
"""

import copy
import functools
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from infer import ops, ops_moe
from infer.engine.tape import Forward
from infer.layers.attention import Attention, ForwardContext
from infer.layers.mla import LatentAttention
from infer.models.decoder import DecoderLayer, Stage
from infer.parallel.groups import Group

logger = logging.getLogger(__name__)


@dataclass
class _Running:
    """What the opaque ops need besides tensors and numbers, which is all that an op of a graph can be given.

    attentions: each layer's. context: of the batch that runs.
    """

    tp: Group | None = None
    attentions: list[Attention | LatentAttention] = field(default_factory=list)
    context: ForwardContext | None = None


_running = _Running()  # a process has one engine at a time; forget_stage puts it back


def compile_stage(stage: Stage, tp: Group, compiling: Callable[[], AbstractContextManager[None]]) -> Forward:
    """The stage's `forward`, compiled when a batch first wants it: once for any number of rows, and once for one.

    compiling: entered while it is, since that may take minutes in which the main thread waits for a compiler.
    Each compilation is told with its seconds. The stage's weights must not be packed.
    """
    torch.compiler.reset()  # what an engine before this one compiled would count towards Dynamo's limits
    _teach_dynamo()
    _running.tp = tp
    layers = [cast(DecoderLayer, layer) for layer in stage.layers]
    _running.attentions = [layer.attention for layer in layers]
    twins = (_with(layer, attention=_TracedAttention(layer.attention)) for layer in layers)
    traced = _with(stage, layers=nn.ModuleList(twins))
    inductor = torch._dynamo.lookup_backend("inductor")
    num_compiled = 0

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        nonlocal num_compiled
        num_compiled += 1
        with compiling():
            return inductor(graph, examples)

    compiled = torch.compile(traced.decoded, backend=backend, dynamic=True, fullgraph=True)

    def forward(x: Tensor, context: ForwardContext) -> Tensor:
        before, started = num_compiled, time.perf_counter()
        _running.context = context
        output: Tensor = compiled(stage.embedded(x, context), None)
        if num_compiled > before:
            seconds = time.perf_counter() - started
            logger.info("torch.compile took %.1f s, for a batch of %d rows and others like it", seconds, len(x))
        return output

    return forward


def forget_stage() -> None:
    """Lets go of the stage compiled last, if there is one, and of the batch that it ran last."""
    if _running.attentions:
        torch.compiler.reset()  # what was compiled refers to the weights
        _running.tp, _running.attentions, _running.context = None, [], None


def _with(module: nn.Module, **children: nn.Module) -> Any:
    """A module that shares everything with another but some of its children."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


class _TracedAttention(nn.Module):
    """An attention layer as Dynamo sees it."""

    def __init__(self, attention: Attention | LatentAttention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, context: None) -> Tensor:
        own = self.attention
        attended = torch.ops.infer_opaque.attend(own.project(x), own.local, own.q_width)
        result: Tensor = own.o(attended)
        return result


@functools.cache
def _teach_dynamo() -> None:
    """Once a process: the opaque ops, and what stands in a graph for calls that Dynamo must not look into."""
    torch.library.custom_op("infer_opaque::attend", _attend, mutates_args=()).register_fake(_attend_fake)
    torch.library.custom_op("infer_opaque::sum_over_ranks", _sum_over_ranks, mutates_args=("x",))
    substitute = torch.compiler.substitute_in_graph
    substitute(ops.rms_norm)(ops.rms_norm_reference)
    substitute(ops.add_rms_norm)(ops.add_rms_norm_reference)
    substitute(ops.act_and_mul)(ops.act_and_mul_reference)
    substitute(Group.all_reduce)(_traced_all_reduce)
    experts = torch.library.custom_op("infer_opaque::grouped_linear", ops_moe.grouped_linear, mutates_args=())
    experts.register_fake(_grouped_linear_fake)
    substitute(ops_moe.grouped_linear)(_traced_grouped_linear)


def _attend(projected: list[Tensor], local: int, width: int) -> Tensor:
    """Attention of the stage's `local`-th layer, between its projections: [T, width]. It writes the cache, too."""
    assert _running.context is not None
    return _running.attentions[local].attend(projected, _running.context)


def _attend_fake(projected: list[Tensor], local: int, width: int) -> Tensor:
    return projected[0].new_empty((projected[0].shape[0], width))


def _sum_over_ranks(x: Tensor) -> None:
    assert _running.tp is not None
    total = _running.tp.all_reduce(x)
    if total is not x:
        x.copy_(total)


def _traced_all_reduce(self: Group, tensor: Tensor) -> Tensor:
    if self.size > 1:
        tensor = tensor.contiguous()
        torch.ops.infer_opaque.sum_over_ranks(tensor)
    return tensor


def _grouped_linear_fake(x: Tensor, rows: Tensor | None, starts: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0] if rows is None else rows.shape[0], weight.shape[1]))


def _traced_grouped_linear(x: Tensor, rows: Tensor | None, starts: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.infer_opaque.grouped_linear(x, rows, starts, weight)
    return result
