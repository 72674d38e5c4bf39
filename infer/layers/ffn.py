"""The feed-forward block: gate, up and down projections (Shazeer, 2020), split by MLP column."""

from torch import Tensor, nn

from infer import ops
from infer.layers.declare import Placement
from infer.layers.linear import ColumnLinear, RowLinear, Rows
from infer.layers.moe import MoE
from infer.models.config import ModelConfig
from infer.parallel.placement import split


class MLP(nn.Module):
    """x [T, hidden] -> act(gate(x)) * up(x), projected down to [T, hidden]."""

    def __init__(self, prefix: str, c: ModelConfig, place: Placement):
        super().__init__()
        size, held = c.intermediate_size, split(c.intermediate_size, place.tp.size)[place.tp.index]
        gate_up = (Rows(f"{prefix}.gate_proj", size, held), Rows(f"{prefix}.up_proj", size, held))
        self.activation = c.activation
        self.gate_up = ColumnLinear(c.hidden_size, gate_up, c.mlp_bias, place)
        self.down = RowLinear(f"{prefix}.down_proj", size, held, c.hidden_size, c.mlp_bias, place)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.act_and_mul(self.gate_up(x), self.activation))


def make_ffn(prefix: str, c: ModelConfig, layer: int, place: Placement) -> nn.Module:
    """The feed-forward block of a layer, whose name is prefix ("model.layers.3")."""
    if c.moe is not None and c.moe.sparse[layer]:
        return MoE(prefix, c, place)
    return MLP(f"{prefix}.mlp", c, place)
