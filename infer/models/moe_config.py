"""MoeConfig: the mixture-of-experts layers of a model in one normalized form. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from infer.models.fields import Fields

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


@dataclass(frozen=True, kw_only=True)
class MoeNames:
    """Names in the checkpoint: of the block below its layer, and of its parts below the block, without ".weight".

    correction_bias is a tensor's whole name; the expert's three matrices stand below `experts`.{number}.
    """

    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    correction_bias: str = "gate.e_score_correction_bias"
    shared: str = "shared_expert"
    shared_gate: str = "shared_expert_gate"


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Choice in two steps (DeepSeek-V2 and V3): experts stand in num_groups groups of equal size, in order; those of
    the top_groups groups that score highest may be chosen.

    score: a group's score is its best expert's ("max", V2) or the sum of its two best ("top2", V3).
    """

    num_groups: int
    top_groups: int
    score: GroupScore


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The sparse layers of a model: a router chooses top_k of num_experts experts, each a gated MLP, for every token.

    intermediate_size         MLP columns of an expert
    shared_intermediate_size  MLP columns of the expert that sees every token; 0: there is none
    shared_gated              its output is multiplied by a sigmoid of the token (Qwen2-MoE)
    sparse                    for each layer of the model, whether its feed-forward is this or the dense one
    scoring                   of the router's logits over all experts
    renormalize               the chosen scores are divided by their sum; with softmax, that makes the softmax of the
                              chosen logits alone
    correction_bias           added to the scores for the choice, not for the weights (DeepSeek-V3)
    scaling                   what the weights are multiplied by in the end (routed_scaling_factor)
    grouping                  None: any expert may be chosen
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    sparse: tuple[bool, ...]
    shared_intermediate_size: int = 0
    shared_gated: bool = False
    scoring: Scoring = "softmax"
    renormalize: bool = False
    correction_bias: bool = False
    scaling: float = 1.0
    grouping: Grouping | None = None
    names: MoeNames = MoeNames()

    @property
    def active_columns(self) -> int:
        """Matrix elements that a token meets, per element of the hidden state: router, its experts, shared expert."""
        gate = 1 if self.shared_gated else 0
        return self.num_experts + 3 * (self.top_k * self.intermediate_size + self.shared_intermediate_size) + gate


def read_experts(f: "Fields", num_experts: str, top_k: str = "num_experts_per_tok") -> tuple[int, int]:
    """(experts, experts a token): the fields of these names. Raises ValueError where there are too few to choose."""
    total, chosen = f.count(num_experts), f.count(top_k)
    if chosen > total:
        raise f.error(top_k, f"must be at most {num_experts} ({total})")
    return total, chosen


def read_grouping(
    f: "Fields", num_experts: int, top_k: int, score: GroupScore, default: tuple[int, int] = (1, 1)
) -> Grouping | None:
    """DeepSeek's n_group and topk_group; None where every group may be chosen from. default: where there are none."""
    num_groups, top_groups = f.count("n_group", default[0]), f.count("topk_group", default[1])
    if num_experts % num_groups:
        raise f.error("n_group", f"must divide the {num_experts} experts")
    size = num_experts // num_groups
    if top_groups > num_groups:
        raise f.error("topk_group", f"must be at most n_group ({num_groups})")
    if top_groups == num_groups:
        return None
    if top_groups * size < top_k:
        raise f.error("topk_group", f"must leave the {top_k} experts of a token, but {top_groups} groups have "
                                    f"{top_groups * size}")  # fmt: skip
    if score == "top2" and size < 2:
        raise f.error("n_group", "must leave at least two experts a group, whose scores are added")
    return Grouping(num_groups=num_groups, top_groups=top_groups, score=score)
