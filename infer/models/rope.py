"""RopeConfig: the rotary position embedding of a checkpoint, and the reading of it. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from infer.models.fields import Fields

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. dim: rotated dimensions of a head. Fields a type does not use keep their default.

    interleaved: the checkpoint rotates neighbours (GPT-J, GLM), not the two halves of a head (GPT-NeoX, Llama); the
    rows of q and k are put into the latter order as they are loaded.
    original_max_position is the length the model was trained at, before scaling. short_factor and long_factor
    (longrope): [dim / 2], for lengths up to that and beyond. Nothing here depends on the length served, which may be
    lowered freely; the types "dynamic" and "longrope" take it in when their table is built (layers/rotary.py).
    """

    type: RopeType = "default"
    theta: float = 10000.0
    dim: int
    interleaved: bool = False
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: from factor, mscale and mscale_all_dim (yarn, longrope)
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rope(
    f: Fields, head_dim: int, max_position: int, *, theta: float = 10000.0, partial: float = 1.0
) -> RopeConfig:
    """The `rope_parameters` of config.json. theta, partial: the family's defaults, where it has none.

    Raises ValueError for a type other than ROPE_TYPES, and where they differ by layer.
    """
    r = f.section("rope_parameters")
    nested = [name for name, value in r.data.items() if isinstance(value, dict)]
    if nested:
        raise f.error("rope_parameters", f"must not differ by layer ({', '.join(nested)}); that is not supported")
    return read_rope_section(f, r, head_dim, max_position, theta=theta, partial=partial)


def read_rope_section(
    f: Fields, r: Fields, head_dim: int, max_position: int, *, theta: float, partial: float = 1.0
) -> RopeConfig:
    """As read_rope, from a section r, of those that there are for several kinds of layers."""
    name = r.choice("rope_type", (*ROPE_TYPES, *ROPE_ALIASES), "default")
    kind = cast(RopeType, ROPE_ALIASES.get(name, name))
    dim = int(head_dim * r.number("partial_rotary_factor", partial))
    if dim % 2 or not 0 < dim <= head_dim:
        raise r.error("partial_rotary_factor", f"must leave an even number of the {head_dim} head dimensions")
    scaling = ROPE_TYPES[kind](f, r, max_position, dim)
    return RopeConfig(type=kind, theta=r.number("rope_theta", theta), dim=dim, **scaling)


def read_two_ropes(
    f: Fields, head_dim: int, max_position: int, *, theta: float, local_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """(that of layers that see all, that of layers with a window), which no scaling stretches unless it is said so.

    As transformers 5 writes them, each has a section of its own; before that one section was that of the former alone.
    theta, local_theta: what they have where config.json has none.
    """
    if "sliding_window" in f.data and f.get("sliding_window") is None:
        raise f.error("sliding_window", "must be a number: layers with a window rotate otherwise than those without")
    rope, local = f.section("rope_parameters"), Fields(f.file, {})
    if any(isinstance(value, dict) for value in rope.data.values()):
        rope, local = rope.section("full_attention"), rope.section("sliding_attention")
    return (
        read_rope_section(f, rope, head_dim, max_position, theta=theta),
        read_rope_section(f, local, head_dim, max_position, theta=local_theta),
    )


def scaled_length(rope: RopeConfig) -> int:
    """The length scaling was made for, where config.json often keeps the one before: with yarn (Qwen 2.5's
    instructions) and dynamic NTK scaling."""
    return int(rope.original_max_position * rope.factor) if rope.type in ("yarn", "dynamic") else 0


def _original_max_position(f: Fields, r: Fields, max_position: int) -> int:
    """The length before scaling. One beside the rotary section, as some checkpoints have it, wins over one inside."""
    inside = r.count("original_max_position_embeddings", max_position)
    return f.count("original_max_position_embeddings", inside)


def _default_scaling(f: Fields, r: Fields, max_position: int, dim: int) -> dict[str, Any]:
    return {}


def _linear_scaling(f: Fields, r: Fields, max_position: int, dim: int) -> dict[str, Any]:
    return {"factor": r.number("factor")}


def _dynamic_scaling(f: Fields, r: Fields, max_position: int, dim: int) -> dict[str, Any]:
    if dim < 4:
        raise r.error("rope_type", f"needs more than the {dim} rotated dimensions of this model")
    return {"factor": r.number("factor"), "original_max_position": max_position}


def _llama3_scaling(f: Fields, r: Fields, max_position: int, dim: int) -> dict[str, Any]:
    return {
        "factor": r.number("factor"),
        "low_freq_factor": r.number("low_freq_factor"),
        "high_freq_factor": r.number("high_freq_factor"),
        "original_max_position": _original_max_position(f, r, max_position),
    }


def _yarn_scaling(f: Fields, r: Fields, max_position: int, dim: int) -> dict[str, Any]:
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


def _longrope_scaling(f: Fields, r: Fields, max_position: int, dim: int) -> dict[str, Any]:
    original = _original_max_position(f, r, max_position)
    return {
        "factor": r.number("factor", max_position / original),
        "attention_factor": r.number("attention_factor", 0.0) or None,
        "short_factor": r.numbers("short_factor", dim // 2),
        "long_factor": r.numbers("long_factor", dim // 2),
        "original_max_position": original,
    }


ROPE_TYPES: dict[str, Callable[[Fields, Fields, int, int], dict[str, Any]]] = {
    "default": _default_scaling,
    "linear": _linear_scaling,
    "dynamic": _dynamic_scaling,
    "llama3": _llama3_scaling,
    "yarn": _yarn_scaling,
    "longrope": _longrope_scaling,
}
ROPE_ALIASES = {"su": "longrope"}  # what the first checkpoints of Phi-3 call it
