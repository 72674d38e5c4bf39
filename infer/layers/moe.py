"""A mixture of experts in the place of the feed-forward block (Shazeer et al., 2017; Fedus et al., 2022).

By tensor parallelism every rank holds some columns of every expert; by expert parallelism it holds whole experts, some
of them. Either way the router is the same on every rank, each rank adds up what its part makes of every token, and one
sum over the ranks ends the layer, the shared expert's part included.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from infer import ops, ops_moe
from infer.layers.declare import Layer, Placement
from infer.layers.linear import ColumnLinear, MatrixLayer, RowLinear, Rows
from infer.models.config import ModelConfig
from infer.models.moe_config import Grouping, MoeConfig
from infer.parallel.placement import Source, WeightSpec, split, split_columns
from infer.quant import PlainStack, Stack, choose_stack

_TINY = 1e-20  # keeps a sum of scores that are all zero from being divided by


class Router(MatrixLayer):
    """x [T, hidden] -> (weights [T, k] float32, experts [T, k] int64). Held by every rank, in float32.

    Float32 whatever the model's dtype: near scores would otherwise often be equal, and the choice be chance.
    """

    def __init__(self, prefix: str, hidden: int, c: MoeConfig, place: Placement):
        super().__init__()
        place = dataclasses.replace(place, dtype=torch.float32)
        num_experts, names = c.num_experts, c.names
        every = (range(num_experts), range(hidden))
        self.hold(WeightSpec((Source(f"{prefix}.{names.router}.weight", (num_experts, hidden), every),)), place)
        self.correction: nn.Parameter | None = None
        if c.correction_bias:
            spec = WeightSpec((Source(f"{prefix}.{names.correction_bias}", (num_experts,), (every[0],)),))
            self.correction = self.declare("correction", spec, place)
        self.top_k = c.top_k
        self._score = torch.sigmoid if c.scoring == "sigmoid" else functools.partial(torch.softmax, dim=-1)
        # What scores go through before the choice, and the chosen ones before they are weights.
        self._before_choice: list[Callable[[Tensor], Tensor]] = []
        self._after_choice: list[Callable[[Tensor], Tensor]] = []
        if c.correction_bias:
            self._before_choice.append(self._corrected)
        if c.grouping is not None:
            self._before_choice.append(functools.partial(_in_best_groups, g=c.grouping))
        if c.renormalize:
            self._after_choice.append(_renormalized)
        if c.scaling != 1.0:
            self._after_choice.append(functools.partial(torch.mul, other=c.scaling))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self._score(self.matrix.multiply(x))
        choice = _through(self._before_choice, scores)
        experts = choice.topk(self.top_k, dim=-1).indices
        return _through(self._after_choice, scores.gather(1, experts)), experts

    def _corrected(self, scores: Tensor) -> Tensor:
        assert self.correction is not None
        return scores + self.correction


def _through(steps: list[Callable[[Tensor], Tensor]], scores: Tensor) -> Tensor:
    for step in steps:
        scores = step(scores)
    return scores


def _renormalized(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + _TINY)


def _in_best_groups(scores: Tensor, g: Grouping) -> Tensor:
    """scores [T, experts] with -inf for experts outside of the groups that may be chosen from."""
    num_experts = scores.shape[1]
    by_group = scores.view(-1, g.num_groups, num_experts // g.num_groups)
    best = by_group.topk(2 if g.score == "top2" else 1, dim=-1).values.sum(-1)
    chosen = best.topk(g.top_groups, dim=-1).indices
    closed = torch.ones_like(best).scatter_(1, chosen, 0.0).unsqueeze(-1) > 0
    return by_group.masked_fill(closed, float("-inf")).view(-1, num_experts)


class ExpertMatrices(Layer):
    """A weight [E, N, K] of the experts this rank holds, used through `stack` in whatever form it is stored."""

    weight: nn.Parameter
    stack: Stack

    def __init__(self, sources: list[list[Source]], place: Placement):
        """sources: for each expert held, the tensors that stand one below another in its matrix."""
        super().__init__()
        spec = WeightSpec(tuple(source for expert in sources for source in expert))
        self.weight = self.declare("weight", spec, place)
        self._num_experts = len(sources)
        self.stack = PlainStack(self._stacked())

    def pack(self) -> None:
        self.stack = choose_stack(self._stacked())
        if not isinstance(self.stack, PlainStack):
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)

    def forward(self, x: Tensor, rows: Tensor | None, starts: Tensor) -> Tensor:
        return self.stack.multiply(x, rows, starts)

    def _stacked(self) -> Tensor:
        """The declared weight [E * N, K] as [E, N, K]."""
        rows, columns = self.weight.shape
        return self.weight.data.view(self._num_experts, rows // self._num_experts, columns)


class Experts(nn.Module):
    """The gated MLPs of this rank's experts, or its columns of them: its part of their sum, [T, hidden]."""

    def __init__(self, prefix: str, c: ModelConfig, moe: MoeConfig, place: Placement):
        super().__init__()
        self.held, columns = _part(moe, place)
        size, hidden, names = moe.intermediate_size, range(c.hidden_size), moe.names
        gate_up, down = [], []
        for expert in self.held:
            below = f"{prefix}.{names.experts}.{expert}"
            shape, part = (size, c.hidden_size), (columns, hidden)
            gate_up.append([Source(f"{below}.{name}.weight", shape, part) for name in (names.gate, names.up)])
            down.append([Source(f"{below}.{names.down}.weight", (c.hidden_size, size), (hidden, columns))])
        self.gate_up, self.down = ExpertMatrices(gate_up, place), ExpertMatrices(down, place)
        self.activation = c.activation

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, hidden]; weights, experts [T, k]: the router's."""
        rows, starts, places = ops_moe.group_rows(experts, self.held.start, len(self.held))
        gated = ops.act_and_mul(self.gate_up(x, rows, starts), self.activation)
        return ops_moe.combine_rows(self.down(gated, None, starts), places, weights)


def _part(moe: MoeConfig, place: Placement) -> tuple[range, range]:
    """The experts this rank holds, and which of their columns."""
    size, index = place.tp.size, place.tp.index
    if place.expert_parallel:
        return split(moe.num_experts, size)[index], range(moe.intermediate_size)
    return range(moe.num_experts), split_columns(moe.intermediate_size, size)[index]


class SharedExpert(nn.Module):
    """A gated MLP that sees every token, split by column: this rank's part of its result, [T, hidden]."""

    def __init__(self, prefix: str, c: ModelConfig, moe: MoeConfig, place: Placement):
        super().__init__()
        names, size = moe.names, moe.shared_intermediate_size
        below, held = f"{prefix}.{names.shared}", split_columns(size, place.tp.size)[place.tp.index]
        gate_up = (Rows(f"{below}.{names.gate}", size, held), Rows(f"{below}.{names.up}", size, held))
        self.activation = c.activation
        self.gate_up = ColumnLinear(c.hidden_size, gate_up, False, place)
        self.down = RowLinear(f"{below}.{names.down}", size, held, c.hidden_size, False, place)

    def forward(self, x: Tensor) -> Tensor:
        return self.down.partial(ops.act_and_mul(self.gate_up(x), self.activation))


class GatedSharedExpert(SharedExpert):
    """A shared expert whose result is multiplied by a sigmoid of the token (Qwen2-MoE)."""

    def __init__(self, prefix: str, c: ModelConfig, moe: MoeConfig, place: Placement):
        super().__init__(prefix, c, moe, place)
        # One output, which every rank computes.
        self.gate = ColumnLinear(c.hidden_size, (Rows(f"{prefix}.{moe.names.shared_gate}", 1, range(1)),), False, place)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(self.gate(x))


class MoE(nn.Module):
    """x [T, hidden] -> [T, hidden]: the chosen experts' weighted sum, and the shared expert beside it.

    prefix: of the decoder layer in the checkpoint.
    """

    def __init__(self, prefix: str, c: ModelConfig, place: Placement):
        super().__init__()
        assert c.moe is not None, "only for layers of a model with experts"
        moe, block = c.moe, f"{prefix}.{c.moe.names.block}"
        self.tp = place.tp
        self.router = Router(block, c.hidden_size, moe, place)
        self.experts = Experts(block, c, moe, place)
        self.shared: SharedExpert | None = None
        self._add_shared: Callable[[Tensor, Tensor], Tensor] = self._without_shared
        if moe.shared_intermediate_size:
            kind = GatedSharedExpert if moe.shared_gated else SharedExpert
            self.shared = kind(block, c, moe, place)
            self._add_shared = self._with_shared

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.router(x)
        return self.tp.all_reduce(self._add_shared(self.experts(x, weights, experts), x))

    def runs_on_device(self) -> bool:
        """Whether no product waits for the host, as CUDA graphs need it."""
        stacks = (self.experts.gate_up.stack, self.experts.down.stack)
        return all(isinstance(stack, PlainStack) and ops_moe.runs_on_device(stack.weight) for stack in stacks)

    def _with_shared(self, routed: Tensor, x: Tensor) -> Tensor:
        assert self.shared is not None
        return routed + self.shared(x)

    def _without_shared(self, routed: Tensor, x: Tensor) -> Tensor:
        return routed
