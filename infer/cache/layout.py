"""What a layer keeps of a token in the KV cache. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KvLayout:
    """For each of `heads` KV heads a key of key_dim numbers and a value of value_dim.

    values_in_keys: the first value_dim numbers of the key are the value, which takes no room of its own. So is the
    latent of multi-head latent attention, kept once for all heads.
    """

    heads: int
    key_dim: int
    value_dim: int
    values_in_keys: bool = False

    @property
    def numel(self) -> int:
        """Numbers kept of a token."""
        return self.heads * (self.key_dim + (0 if self.values_in_keys else self.value_dim))
