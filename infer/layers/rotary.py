"""Rotary position embedding (Su et al., 2021): the table of cosines and sines, with the known ways to stretch it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from infer.models.config import RopeConfig


class Rotary(nn.Module):
    """cos_sin [max_position, rope.dim] float32: cosines of all frequencies, then sines. Shared by a stage's layers.

    rope None: two columns that turn nothing, for layers without rotation (times 1, plus 0: exact).
    """

    cos_sin: Tensor

    def __init__(self, rope: RopeConfig | None, max_position: int, device: torch.device):
        super().__init__()
        inverse_frequencies, scale = torch.zeros(1), 1.0
        if rope is not None:
            inverse_frequencies, scale = INVERSE_FREQUENCIES[rope.type](rope, max_position)
        if device.type == "meta":  # computing there would import half of torch's compiler: 2 s
            cos_sin = torch.empty(max_position, 2 * len(inverse_frequencies), device=device)
        else:
            # In float32 throughout, as the models were trained; the table is filled once, on the host.
            positions = torch.arange(max_position, dtype=torch.float32)
            angles = torch.outer(positions, inverse_frequencies)
            cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1) * scale
        self.register_buffer("cos_sin", cos_sin.to(device), persistent=False)


def _frequencies(rope: RopeConfig, theta: float | None = None) -> Tensor:
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    return 1.0 / (theta or rope.theta) ** exponents


def _default(rope: RopeConfig, max_position: int) -> tuple[Tensor, float]:
    return _frequencies(rope), 1.0


def _linear(rope: RopeConfig, max_position: int) -> tuple[Tensor, float]:
    """Positions divided by the factor (Chen et al., 2023)."""
    return _frequencies(rope) / rope.factor, 1.0


def _dynamic(rope: RopeConfig, max_position: int) -> tuple[Tensor, float]:
    """Dynamic NTK scaling (bloc97 and emozilla, 2023): the base grows with the length beyond the trained one.

    The length is the one served, not that of a sequence: cached keys keep the angle they were written with, so a base
    that moved while a sequence grew would not fit them. A model served at no more than its trained length is unscaled.
    """
    stretch = max(max_position / rope.original_max_position, 1.0)
    growth = rope.factor * stretch - (rope.factor - 1)
    return _frequencies(rope, rope.theta * growth ** (rope.dim / (rope.dim - 2))), 1.0


def _longrope(rope: RopeConfig, max_position: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., 2024): a factor for each frequency; the long ones to serve more than the trained length.

    By the length served for the reason given in _dynamic. The scale depends on the model's own lengths alone.
    """
    factors = rope.long_factor if max_position > rope.original_max_position else rope.short_factor
    scale = rope.attention_factor
    if scale is None:
        growth = math.log(rope.factor) / math.log(rope.original_max_position) if rope.factor > 1 else 0.0
        scale = math.sqrt(1 + growth)
    return _frequencies(rope) / torch.tensor(factors, dtype=torch.float32), scale


def _llama3(rope: RopeConfig, max_position: int) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are stretched by the factor, short ones kept, those between interpolated."""
    frequencies = _frequencies(rope)
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # over the trained length
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if low == high:  # no band between the two: a step
        return torch.where(turns < low, frequencies / rope.factor, frequencies), 1.0
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor), 1.0


def _yarn(rope: RopeConfig, max_position: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): as llama3, but the band is linear in the dimension, and cos and sin are scaled."""
    frequencies = _frequencies(rope)

    def dim_of(turns: float) -> float:
        """The (fractional) dimension whose wave turns so often over the trained length."""
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    if first == last:
        last += 0.001
    stretched = ((torch.arange(rope.dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return frequencies * (1 - stretched + stretched / rope.factor), _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    def growth(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return growth(rope.mscale) / growth(rope.mscale_all_dim)
    return growth(1.0)


# Each, given the length served, has (inverse frequencies [dim / 2], factor on cosines and sines).
INVERSE_FREQUENCIES: dict[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "longrope": _longrope,
    "llama3": _llama3,
    "yarn": _yarn,
}
