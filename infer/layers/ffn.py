"""The feed-forward block, split by MLP column: gated (Shazeer, 2020) or plain."""

from torch import Tensor, nn

from infer import ops
from infer.layers.declare import Placement
from infer.layers.linear import ColumnLinear, RowLinear, Rows
from infer.layers.moe import MoE
from infer.models.config import ModelConfig
from infer.parallel.placement import split


class MLP(nn.Module):
    """x [T, hidden] -> act(gate(x)) * up(x), projected down to [T, hidden]. prefix: the layer's name."""

    def __init__(self, prefix: str, c: ModelConfig, place: Placement):
        super().__init__()
        names, size = c.names, c.intermediate_size
        held = split(size, place.tp.size)[place.tp.index]
        if names.gate_up:
            up = range(size + held.start, size + held.stop)
            gate_up = tuple(Rows(f"{prefix}.{names.gate_up}", 2 * size, rows) for rows in (held, up))
        else:
            gate_up = tuple(Rows(f"{prefix}.{name}", size, held) for name in (names.gate, names.up))
        self.activation = c.activation
        self.gate_up = ColumnLinear(c.hidden_size, gate_up, c.mlp_bias, place)
        self.down = RowLinear(f"{prefix}.{names.down}", size, held, c.hidden_size, c.mlp_bias, place)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.act_and_mul(self.gate_up(x), self.activation))


class PlainMLP(nn.Module):
    """x [T, hidden] -> act(up(x)), projected down to [T, hidden]. prefix: the layer's name."""

    def __init__(self, prefix: str, c: ModelConfig, place: Placement):
        super().__init__()
        names, size = c.names, c.intermediate_size
        held = split(size, place.tp.size)[place.tp.index]
        rows = (Rows(f"{prefix}.{names.up}", size, held),)
        self.activation = c.activation
        self.up = ColumnLinear(c.hidden_size, rows, c.mlp_bias, place, transposed=names.transposed)
        self.down = RowLinear(
            f"{prefix}.{names.down}", size, held, c.hidden_size, c.mlp_bias, place, transposed=names.transposed
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.activation(self.up(x), self.activation))


def make_ffn(prefix: str, c: ModelConfig, layer: int, place: Placement) -> nn.Module:
    """The feed-forward block of a layer, whose name is prefix ("model.layers.3")."""
    if c.moe is not None and c.moe.sparse[layer]:
        return MoE(prefix, c, place)
    return MLP(prefix, c, place) if c.gated_mlp else PlainMLP(prefix, c, place)
