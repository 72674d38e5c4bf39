"""The tables of cosines and sines against transformers, for the lengths that are served."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from infer.layers.rotary import Rotary
from infer.models.rope import RopeConfig

CPU = torch.device("cpu")
TRAINED = 64
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.5 + i for i in range(8)]}


def theirs(num_positions: int, max_position: int = TRAINED, **rope: object) -> torch.Tensor:
    """cos_sin [num_positions, 16] that transformers uses for a sequence of so many tokens."""
    c = LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=max_position,
        rope_parameters={"rope_theta": 1000.0, **rope},
    )  # fmt: skip
    cos, sin = LlamaRotaryEmbedding(c)(torch.zeros(1), torch.arange(num_positions)[None])
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


def ours(max_position: int, **rope: object) -> torch.Tensor:
    return Rotary(RopeConfig(theta=1000.0, dim=16, **rope), max_position, CPU).cos_sin


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("served", [TRAINED // 2, TRAINED, 4 * TRAINED])
def test_dynamic_ntk_by_the_length_served(served):
    """As transformers for a sequence of that length; one within the trained length is not scaled."""
    rope = {"type": "dynamic", "factor": 4.0, "original_max_position": TRAINED}
    close(ours(served, **rope), theirs(served, rope_type="dynamic", factor=4.0))
    if served <= TRAINED:
        close(ours(served, **rope), ours(served))


@pytest.mark.parametrize(("served", "used"), [(TRAINED, "short_factor"), (TRAINED + 1, "long_factor")])
def test_longrope_by_the_length_served(served, used):
    factors = {name: tuple(values) for name, values in FACTORS.items()}
    rope = {"type": "longrope", "factor": 4.0, "original_max_position": TRAINED, **factors}
    expected = theirs(
        served, 4 * TRAINED, rope_type="longrope", original_max_position_embeddings=TRAINED, factor=4.0, **FACTORS
    )
    close(ours(served, **rope), expected)
    other = {**rope, used: (9.0,) * 8}
    assert not torch.allclose(ours(served, **other), expected, atol=1e-2)
    assert torch.equal(ours(served, **{**rope, "attention_factor": 1.0})[0], torch.tensor([1.0] * 8 + [0.0] * 8))


def test_layers_without_rotation_turn_nothing():
    table = Rotary(None, 7, CPU).cos_sin
    assert torch.equal(table, torch.tensor([[1.0, 0.0]]).expand(7, 2))
