"""MlaConfig: multi-head latent attention in one normalized form. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads are made from one short vector.

    q_lora_rank        size of the vector that queries are made from; 0: from the hidden state itself
    kv_lora_rank       size of the latent, the vector that keys and values are made from
    qk_nope_head_dim   dimensions of a head's query and key without a position
    qk_rope_head_dim   those with one, by rotation; all heads share the key's, which is made from the hidden state
    v_head_dim         dimensions of a head's value
    softmax_scale      what scores are multiplied by, the stretch of YaRN included
    """

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    softmax_scale: float

    @property
    def qk_head_dim(self) -> int:
        """Of a head's query: without a position, then with one."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """What is kept of a token: its latent, then the rotated key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def layer_parameters(self, hidden_size: int, num_heads: int) -> int:
        """Matrix elements of one layer's attention."""
        query = num_heads * self.qk_head_dim
        made_from = self.q_lora_rank or hidden_size
        down = hidden_size * (self.q_lora_rank + self.latent_dim)
        up = made_from * query + self.kv_lora_rank * num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return down + up + num_heads * self.v_head_dim * hidden_size
