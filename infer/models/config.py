"""ModelConfig: a checkpoint's config.json in one normalized form, and the reading of it. No torch here."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infer.cache.layout import KvLayout
from infer.models.fields import Fields, read_json
from infer.models.mla_config import MlaConfig
from infer.models.moe_config import MoeConfig
from infer.models.names import Names
from infer.models.recognize import refuse_quantized
from infer.models.rope import RopeConfig as RopeConfig  # part of a ModelConfig, and imported with it
from infer.models.rope import read_rope, scaled_length

if TYPE_CHECKING:
    from infer.config import EngineConfig

GATED_ACTIVATIONS = {  # config.json's hidden_act -> the kind ops.act_and_mul knows
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATIONS = {**GATED_ACTIVATIONS, "relu": "relu"}  # -> the kind ops.activation knows
DTYPES = ("bfloat16", "float16", "float32")

QkNorm = Literal["none", "head", "all"]
NormKind = Literal["rms", "rms_plus_one", "layer"]
Residual = Literal["pre", "post", "sandwich", "parallel"]


@dataclass(frozen=True)
class PositionTable:
    """Learned positions: the checkpoint's table has so many rows, of which `skipped` stand before position 0's."""

    rows: int
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: all that its construction depends on.

    rope            None: no layer rotates. local_rope: that of layers with a window, where it is another
    nope_layers     layers that do not rotate, whatever the others do
    window          for each layer, how many tokens back it sees, its own included; 0 is all of them
    positions       learned positions, added to the embeddings; None: there are none
    max_position    positions [0, max_position) exist; it may be lowered to the length that is served
    norm            "rms", "rms_plus_one" (weights are stored less one) or "layer", with a bias
    residual        where norms stand: "pre" (before each block), "post" (after it, before the addition), "sandwich"
                    (both), or "parallel": both blocks read the same residual, each through a norm of its own
    qk_norm         norms of q and k before the rotation: of each "head", or of "all" heads together
    mla             attention over latents, num_kv_heads being 1 and head_dim a query's; None: over keys and values
    gated_mlp       act(gate) * up, or else act(up)
    moe             experts in the place of the feed-forward, in some layers or in all; None: there are none
    *_scale         factors on the embeddings, on every block's output before it is added, and on the logits;
                    attention_scale: on q times k (None: head_dim ** -0.5)
    *_soft_cap      attention scores and logits become cap * tanh(value / cap); 0: they do not
    eos_token_ids   any of them ends a text; may be empty
    dtype           of weights and activations, "bfloat16", "float16" or "float32"
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig | None
    local_rope: RopeConfig | None = None
    nope_layers: frozenset[int] = frozenset()
    max_position: int
    window: tuple[int, ...]
    positions: PositionTable | None = None
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    mla: MlaConfig | None = None
    norm: NormKind = "rms"
    residual: Residual = "pre"
    qk_norm: QkNorm = "none"
    gated_mlp: bool = True
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float | None = None
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    moe: MoeConfig | None = None
    names: Names = field(default_factory=Names)
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()

    def rope_of(self, layer: int) -> RopeConfig | None:
        """What a layer rotates by; None: it does not rotate."""
        if layer in self.nope_layers:
            return None
        return self.local_rope if self.window[layer] and self.local_rope is not None else self.rope

    @property
    def attention_parameters(self) -> int:
        """Matrix elements of one layer's attention."""
        if self.mla is not None:
            return self.mla.layer_parameters(self.hidden_size, self.num_heads)
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def layer_parameters(self) -> int:
        """Matrix elements of one layer with the dense feed-forward: what computing it costs, per token."""
        return self.attention_parameters + self.hidden_size * self._mlp_columns

    @property
    def active_parameters(self) -> tuple[int, ...]:
        """For each layer, the matrix elements that a token meets: of a sparse one, the experts that it goes to."""
        dense = self.layer_parameters
        if self.moe is None:
            return (dense,) * self.num_layers
        sparse = dense + self.hidden_size * (self.moe.active_columns - self._mlp_columns)
        return tuple(sparse if is_sparse else dense for is_sparse in self.moe.sparse)

    @property
    def _mlp_columns(self) -> int:
        """Of all matrices of the dense feed-forward."""
        return (3 if self.gated_mlp else 2) * self.intermediate_size

    def kv_layout(self, kv_heads: int) -> KvLayout:
        """What a layer keeps of a token on a rank with so many KV heads; of latent attention, every rank keeps all."""
        if self.mla is not None:
            return KvLayout(1, self.mla.latent_dim, self.mla.kv_lora_rank, values_in_keys=True)
        return KvLayout(kv_heads, self.head_dim, self.head_dim)


def decoder_config(
    f: Fields,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    window: tuple[int, ...] | None = None,
    has_rope: bool = True,
    rope_theta: float = 10000.0,
    partial_rotary: float = 1.0,
    norm_eps: float = 1e-6,
    activation: str = "silu",
    gated_mlp: bool = True,
    tie_embeddings: bool = False,
    intermediate_size: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: QkNorm = "none",
) -> ModelConfig:
    """What every reader shares; what else a family has, its reader replaces in the result.

    The arguments are where families differ. From num_kv_heads to intermediate_size those of config.json's fields are
    the family's defaults, for where it has none (num_kv_heads None: num_attention_heads; head_dim None: hidden_size /
    num_attention_heads). window: per layer (None: no layer has one).
    """
    num_layers, hidden_size = f.count("num_hidden_layers"), f.count("hidden_size")
    num_heads = f.count("num_attention_heads")
    num_kv_heads = f.count("num_key_value_heads", num_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise f.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    if head_dim is None and hidden_size % num_heads and f.get("head_dim") is None:
        raise f.error("hidden_size", f"must be a multiple of num_attention_heads ({num_heads}), or head_dim be given")
    head_dim = f.count("head_dim", head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise f.error("head_dim", "must be even: rotary embedding turns pairs of dimensions")
    max_position = f.count("max_position_embeddings")
    rope = read_rope(f, head_dim, max_position, theta=rope_theta, partial=partial_rotary) if has_rope else None
    activations = GATED_ACTIVATIONS if gated_mlp else ACTIVATIONS
    return ModelConfig(
        architecture=architecture_of(f),
        vocab_size=f.count("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=f.count("intermediate_size", intermediate_size),
        norm_eps=f.number("rms_norm_eps", norm_eps),
        rope=rope,
        max_position=max_position if rope is None else max(max_position, scaled_length(rope)),
        window=window or (0,) * num_layers,
        activation=ACTIVATIONS[f.choice("hidden_act", tuple(activations), activation)],
        gated_mlp=gated_mlp,
        tie_embeddings=f.flag("tie_word_embeddings", tie_embeddings),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def layer_windows(f: Fields, size: int, default: Sequence[int]) -> tuple[int, ...]:
    """For each layer: size where `layer_types` says "sliding_attention", 0 where it says "full_attention"; the default
    without it."""
    kinds = f.get("layer_types")
    if kinds is None:
        return tuple(default)
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != len(default) or any(kind not in known for kind in kinds):
        raise f.error("layer_types", f"must be a list of {len(default)} of {' and '.join(known)}")
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)


def alternating_windows(f: Fields, size: int, every: int) -> tuple[int, ...]:
    """As layer_windows; without layer_types, layer number `every`, counted from 1, and its multiples see all."""
    numbers = range(1, f.count("num_hidden_layers") + 1)
    return layer_windows(f, size, [size if number % every else 0 for number in numbers])


def sliding_window(f: Fields) -> int:
    """The `sliding_window` of families that have one. An absent one is 4096, as in their own code; null is none (0)."""
    disabled = "sliding_window" in f.data and f.get("sliding_window") is None
    return 0 if disabled else f.count("sliding_window", 4096)


def architecture_of(f: Fields) -> str:
    """The first of `architectures`. Raises ValueError where there is none."""
    names = f.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise f.error("architectures", 'must be a list such as ["LlamaForCausalLM"]')
    return names[0]


def load_model_config(path: Path, config: "EngineConfig") -> ModelConfig:
    """Reads config.json and generation_config.json of a checkpoint directory.

    config.hf_overrides is laid over config.json first; config.dtype decides the dtype unless it is "auto".
    Raises ValueError that names the file and field: missing or corrupt JSON, unknown architecture, quantized weights,
    a field of the wrong kind, an override that nothing reads.
    """
    # The readers import this module, so their registry can only be imported once it is complete.
    from infer.models import reader_of

    file = path / "config.json"
    overrides = current_names(config.hf_overrides or {}, "hf_overrides")
    f = Fields(file, _overlay(current_names(read_json(file), str(file)), overrides))
    refuse_quantized(f)
    c = reader_of(architecture_of(f), file, f.get("auto_map"))(f)
    dtype = _read_dtype(f, config.dtype)
    eos = _read_eos(path, f, overrides, c.vocab_size)
    _refuse_unread(f, overrides, config.hf_overrides or {}, c.architecture)
    return dataclasses.replace(c, dtype=dtype, eos_token_ids=eos)


def current_names(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The same with the names of transformers 5: `dtype`, and one `rope_parameters` for all that is rotary."""
    data = dict(raw)
    if "torch_dtype" in data:
        data.setdefault("dtype", data.pop("torch_dtype"))
    rope: dict[str, Any] = {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if data.get(name) is not None:
            rope[name] = data.pop(name)
    for name in ("rope_parameters", "rope_scaling"):
        section = data.pop(name, rope)
        if isinstance(section, dict):
            rope |= section
        elif section is None:  # "no scaling", said aloud
            rope.setdefault("rope_type", "default")
        else:
            raise ValueError(f"{where}: {name} must be an object or null, not {section!r}")
    if "type" in rope:
        old_name = rope.pop("type")
        rope.setdefault("rope_type", old_name)
    if rope:
        data["rope_parameters"] = rope
    return data


def _overlay(data: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """overrides over data; of the rotary parameters those named are replaced, or all but theta with a new type."""
    merged = {**data, **overrides}
    if "rope_parameters" in overrides:
        base = data.get("rope_parameters", {})
        if "rope_type" in overrides["rope_parameters"]:
            base = {"rope_theta": base["rope_theta"]} if "rope_theta" in base else {}
        merged["rope_parameters"] = {**base, **overrides["rope_parameters"]}
    return merged


def _read_dtype(f: Fields, wanted: str) -> str:
    stored = f.get("dtype")
    if wanted != "auto":
        return wanted
    if stored is None:
        return "float32"
    name = str(stored).removeprefix("torch.")
    if name not in DTYPES:
        raise f.error("dtype", f"cannot be used as it is; choose --dtype {', '.join(DTYPES)}")
    return name


def _read_eos(path: Path, f: Fields, overrides: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """End tokens: an override's, else generation_config.json's (its makers generate with those), else config.json's."""
    file = path / "generation_config.json"
    source = f
    if "eos_token_id" not in overrides and file.exists():
        generation = Fields(file, read_json(file))
        source = generation if generation.get("eos_token_id") is not None else f
    value = source.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise source.error("eos_token_id", f"must be a token id or a list of them, each under {vocab_size}")
    return tuple(dict.fromkeys(ids))


def _refuse_unread(f: Fields, overrides: dict[str, Any], given: dict[str, Any], architecture: str) -> None:
    """An override that no reader looked at would be ignored in silence; most often it is misspelt."""
    rope = f.section("rope_parameters")
    unread = [name for name in overrides if name not in f.read]
    unread += [name for name in overrides.get("rope_parameters", {}) if name not in rope.read]
    if not unread:
        return
    near = difflib.get_close_matches(unread[0], f.read, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"hf_overrides: {unread[0]} has no effect on {architecture}{hint} (given: {', '.join(given)})")
