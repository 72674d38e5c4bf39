"""Declaring a module's parameters: each once, as a WeightSpec, from which it is allocated, loaded and counted."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from infer.parallel.placement import WeightSpec
from infer.quant import allocate

if TYPE_CHECKING:
    from infer.parallel.groups import Group


@dataclass(frozen=True)
class Placement:
    """Where this rank's modules are built: its tensor-parallel group, and the dtype and device of their parameters.

    expert_parallel: the group's ranks share out whole experts, not the columns of each.
    On the meta device nothing is allocated, which is how memory is planned.
    """

    tp: "Group"
    dtype: torch.dtype
    device: torch.device
    expert_parallel: bool = False


class Layer(nn.Module):
    """A module whose own parameters are declared. specs: parameter name -> its declaration."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, WeightSpec] = {}

    def declare(
        self, name: str, spec: WeightSpec, place: Placement, dtype: torch.dtype | None = None
    ) -> nn.Parameter:
        """Allocates the part of a parameter that this rank holds, and only that; its values are undefined.

        dtype: where it is not that of the others (None).

        To be assigned to the attribute of that name: `self.weight = self.declare("weight", spec, place)`.
        """
        self.specs[name] = spec
        data = allocate(spec.local_shape, dtype or place.dtype, place.device)
        return nn.Parameter(data, requires_grad=False)

    def pack(self) -> None:
        """Once the parameters are loaded: keeps them in the form that is fastest here, if there is one (quant.py)."""


def declared(module: nn.Module) -> Iterator[tuple[Tensor, WeightSpec]]:
    """Every parameter under a module with its declaration, once each; a shared one stands where it was declared."""
    for layer in module.modules():
        if isinstance(layer, Layer):
            for name, spec in layer.specs.items():
                yield layer.get_parameter(name), spec
