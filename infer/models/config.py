"""ModelConfig: a checkpoint's config.json in one normalized form, and the reading of it. No torch here."""

import dataclasses
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from infer.cache.layout import KvLayout
from infer.models.fields import Fields
from infer.models.mla_config import MlaConfig
from infer.models.moe_config import MoeConfig

if TYPE_CHECKING:
    from infer.config import EngineConfig

ACTIVATIONS = {  # config.json's hidden_act -> the kind ops.act_and_mul knows
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
DTYPES = ("bfloat16", "float16", "float32")

RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. dim: rotated dimensions of a head. Fields a type does not use keep their default.

    original_max_position is the length the model was trained at, before scaling; nothing here depends on the
    length served, so that ModelConfig.max_position may be lowered freely.
    """

    type: RopeType = "default"
    theta: float = 10000.0
    dim: int
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: from factor, mscale and mscale_all_dim (yarn)
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family: all that its construction depends on.

    window: for each layer, how many tokens back it sees, its own included; 0 is all of them.
    max_position: positions [0, max_position) exist. eos_token_ids: any of them ends a text; may be empty.
    dtype: of weights and activations, "bfloat16", "float16" or "float32".
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
    rope: RopeConfig
    max_position: int
    window: tuple[int, ...]
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()

    @property
    def attention_parameters(self) -> int:
        """Matrix elements of one layer's attention."""
        if self.mla is not None:
            return self.mla.layer_parameters(self.hidden_size, self.num_heads)
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def layer_parameters(self) -> int:
        """Matrix elements of one layer: what computing it costs, per token."""
        return self.attention_parameters + 3 * self.hidden_size * self.intermediate_size

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
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """What every reader shares. The arguments are where families differ.

    num_kv_heads, head_dim: the family's defaults where config.json has none (None: num_attention_heads, and
    hidden_size / num_attention_heads). window: per layer (None: no layer has one).
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
    rope = read_rope(f, head_dim, max_position)
    return ModelConfig(
        architecture=architecture_of(f),
        vocab_size=f.count("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=f.count("intermediate_size"),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_position=max(max_position, _scaled_length(rope)),
        window=window or (0,) * num_layers,
        activation=ACTIVATIONS[f.choice("hidden_act", tuple(ACTIVATIONS), "silu")],
        tie_embeddings=f.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def sliding_window(f: Fields) -> int:
    """The `sliding_window` of families that have one. An absent one is 4096, as in their own code; null is none (0)."""
    disabled = "sliding_window" in f.data and f.get("sliding_window") is None
    return 0 if disabled else f.count("sliding_window", 4096)


def read_rope(f: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """The `rope_parameters` of config.json. Raises ValueError for a type other than ROPE_TYPES."""
    r = f.section("rope_parameters")
    nested = [name for name, value in r.data.items() if isinstance(value, dict)]
    if nested:
        raise f.error("rope_parameters", f"must not differ by layer ({', '.join(nested)}); that is not supported")
    kind = cast(RopeType, r.choice("rope_type", tuple(ROPE_TYPES), "default"))
    dim = int(head_dim * r.number("partial_rotary_factor", 1.0))
    if dim % 2 or not 0 < dim <= head_dim:
        raise r.error("partial_rotary_factor", f"must leave an even number of the {head_dim} head dimensions")
    scaling = ROPE_TYPES[kind](f, r, max_position)
    return RopeConfig(type=kind, theta=r.number("rope_theta", 10000.0), dim=dim, **scaling)


def _scaled_length(rope: RopeConfig) -> int:
    """The length scaling was made for. With yarn, config.json often keeps the one before (Qwen 2.5's instructions)."""
    return int(rope.original_max_position * rope.factor) if rope.type == "yarn" else 0


def _original_max_position(f: Fields, r: Fields, max_position: int) -> int:
    """The length before scaling. One beside the rotary section, as some checkpoints have it, wins over one inside."""
    inside = r.count("original_max_position_embeddings", max_position)
    return f.count("original_max_position_embeddings", inside)


def _default_scaling(f: Fields, r: Fields, max_position: int) -> dict[str, Any]:
    return {}


def _linear_scaling(f: Fields, r: Fields, max_position: int) -> dict[str, Any]:
    return {"factor": r.number("factor")}


def _llama3_scaling(f: Fields, r: Fields, max_position: int) -> dict[str, Any]:
    return {
        "factor": r.number("factor"),
        "low_freq_factor": r.number("low_freq_factor"),
        "high_freq_factor": r.number("high_freq_factor"),
        "original_max_position": _original_max_position(f, r, max_position),
    }


def _yarn_scaling(f: Fields, r: Fields, max_position: int) -> dict[str, Any]:
    original = _original_max_position(f, r, max_position)
    return {
        "factor": r.number("factor", max_position / original),
        "beta_fast": r.number("beta_fast", 32.0),
        "beta_slow": r.number("beta_slow", 1.0),
        "attention_factor": r.number("attention_factor", 0.0) or None,
        "mscale": r.number("mscale", 0.0),
        "mscale_all_dim": r.number("mscale_all_dim", 0.0),
        "truncate": r.flag("truncate", True),
        "original_max_position": original,
    }


ROPE_TYPES: dict[str, Callable[[Fields, Fields, int], dict[str, Any]]] = {
    "default": _default_scaling,
    "linear": _linear_scaling,
    "llama3": _llama3_scaling,
    "yarn": _yarn_scaling,
}


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
    overrides = _current_names(config.hf_overrides or {}, "hf_overrides")
    f = Fields(file, _overlay(_current_names(read_json(file), str(file)), overrides))
    for name in ("quantization_config", "compression_config"):
        if (quantization := f.get(name)) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise ValueError(f"{file}: {name} (method {method}): quantized checkpoints are not supported; "
                             f"use the original in bfloat16, float16 or float32")  # fmt: skip
    c = reader_of(architecture_of(f), file)(f)
    dtype = _read_dtype(f, config.dtype)
    eos = _read_eos(path, f, overrides, c.vocab_size)
    _refuse_unread(f, overrides, config.hf_overrides or {}, c.architecture)
    return dataclasses.replace(c, dtype=dtype, eos_token_ids=eos)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError that names the file."""
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; --model must be a Hugging Face checkpoint directory") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(data).__name__}")
    return data


def _current_names(raw: dict[str, Any], where: str) -> dict[str, Any]:
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
