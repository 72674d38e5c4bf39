"""What a small random checkpoint is made from, and what all of them share. Recipes stand in recipes_*.py."""

from dataclasses import dataclass
from typing import Any

VOCAB_SIZE = 1009
BOS, EOS, PAD = 0, 1, 2
MAX_POSITION = 512
WINDOW = 24

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITION,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.2,  # large, so that the most likely token leads clearly
}


@dataclass(frozen=True)
class Recipe:
    """family: the prefix of transformers' classes. max_shard_size: over several files where given.

    norm_mean: about which the weights of norms lie (0 where the model adds 1 to them).
    engine: further engine arguments, of every world that runs it.
    model_class, config_class: where they are not the prefix with "ForCausalLM" and "Config".
    """

    family: str
    config: dict[str, Any]
    max_shard_size: str | None = None
    norm_mean: float = 1.0
    engine: dict[str, Any] | None = None
    model_class: str = ""
    config_class: str = ""
