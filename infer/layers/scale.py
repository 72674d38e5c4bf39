"""Elementwise steps that some families have between their blocks: factors and soft caps."""

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """x * factor."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class SoftCap(nn.Module):
    """cap * tanh(x / cap): nearly x where it is small, never beyond the cap (Gemma 2)."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.cap) * self.cap


class EmbedScale(nn.Module):
    """x * factor, the factor first rounded to the model's dtype, as Gemma was trained. The positions do not matter."""

    def __init__(self, factor: float, dtype: torch.dtype):
        super().__init__()
        self.factor = torch.tensor(factor, dtype=dtype).item()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * self.factor
