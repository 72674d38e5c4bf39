"""What a checkpoint calls its tensors: one table for each style there is. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of a checkpoint's tensors without ".weight" and ".bias"; those of a layer follow its own ("{layer}").

    A name that a model has no tensor for is not looked at. Where `qkv` is set, q, k and v lie in one tensor of that
    name: all of q, then k, then v, or, with qkv_by_head, those three of each head in turn. `gate_up` likewise is gate,
    then up. transposed: the checkpoint has the layers' matrices as [in, out].
    """

    embed: str = "model.embed_tokens"
    positions: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{layer}"

    attention_norm: str = "input_layernorm"
    attention_out_norm: str = ""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    qkv_by_head: bool = False
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"

    ffn_norm: str = "post_attention_layernorm"
    ffn_out_norm: str = ""
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = ""
    down: str = "mlp.down_proj"
    transposed: bool = False
