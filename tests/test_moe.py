"""Mixture of experts: routing against transformers, whole models at every layout, what each rank holds and reads."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from recipes import COMMON
from recipes_moe import SPLIT_EXPERTS
from safetensors import safe_open
from test_model import CPU, Meeting, Saved, ThreadGroup, build_stages, read_config, run_layout, save_random
from test_placement import make_config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from infer import native
from infer.engine import tape
from infer.layers.declare import Placement, declared
from infer.layers.moe import MoE, Router
from infer.models.decoder import Stage
from infer.models.moe_config import Grouping, MoeConfig
from infer.parallel.groups import alone
from infer.parallel.placement import balanced_layers, check_tensor_parallel, split_columns
from infer.quant import PackedStack
from infer.weights import Checkpoint, init_dummy_weights, load_weights

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)]  # (tp, pp)
HIDDEN = 48


# ----------------------------------------------------------------------------------------------------- routing

THEIRS = {  # what transformers' routers read
    "hidden_size": HIDDEN, "num_local_experts": 12, "num_experts": 12, "num_experts_per_tok": 3,
    "norm_topk_prob": False, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2, "topk_method": "greedy",
}  # fmt: skip
OURS = MoeConfig(num_experts=12, top_k=3, intermediate_size=8, sparse=(True,))
ROUTERS = {  # name: (transformers' class, what differs in its config, what differs in ours)
    "mixtral": (MixtralTopKRouter, {}, {"renormalize": True}),
    "qwen": (Qwen2MoeTopKRouter, {}, {}),
    "qwen, renormalized": (Qwen2MoeTopKRouter, {"norm_topk_prob": True}, {"renormalize": True}),
    "deepseek v2, greedy": (DeepseekV2TopkRouter, {}, {"scaling": 2.5}),
    "deepseek v2, groups": (
        DeepseekV2TopkRouter,
        {"topk_method": "group_limited_greedy"},
        {"scaling": 2.5, "grouping": Grouping(num_groups=4, top_groups=2, score="max")},
    ),
    "deepseek v3": (
        DeepseekV3TopkRouter,
        {"norm_topk_prob": True},
        {"scaling": 2.5, "grouping": Grouping(num_groups=4, top_groups=2, score="top2"), "scoring": "sigmoid",
         "renormalize": True, "correction_bias": True},
    ),
    "deepseek v3, not renormalized": (
        DeepseekV3TopkRouter,
        {"n_group": 2, "topk_group": 1},
        {"scaling": 2.5, "grouping": Grouping(num_groups=2, top_groups=1, score="top2"), "scoring": "sigmoid",
         "correction_bias": True},
    ),
}  # fmt: skip


def make_router(c: MoeConfig, dtype: torch.dtype = torch.float32) -> Router:
    return Router("mlp", HIDDEN, c, Placement(alone(), dtype, CPU))


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_equals_transformers(name: str) -> None:
    kind, theirs, ours = ROUTERS[name]
    torch.manual_seed(3)
    reference = kind(SimpleNamespace(**(THEIRS | theirs)))
    router = make_router(dataclasses.replace(OURS, **ours))
    x, weight, correction = torch.randn(200, HIDDEN), torch.randn(12, HIDDEN) * 0.2, torch.randn(12) * 0.3
    with torch.inference_mode():
        reference.weight.copy_(weight)
        router.weight.copy_(weight)
        if router.correction is not None:
            reference.e_score_correction_bias.copy_(correction)
            router.correction.copy_(correction)
        _, expected_weights, expected = reference(x)
        weights, experts = router(x)
        order, expected_order = experts.argsort(-1), expected.argsort(-1)
        assert torch.equal(experts.gather(1, order), expected.gather(1, expected_order))
        torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


def test_a_router_is_float32_whatever_the_model_is() -> None:
    router = make_router(OURS, torch.bfloat16)
    torch.manual_seed(3)
    weight, x = torch.randn(12, HIDDEN), torch.randn(9, HIDDEN).bfloat16()
    with torch.inference_mode():
        router.weight.copy_(weight)
        plain = router(x)
        router.pack()
        packed = router(x)
        expected = torch.softmax(x.float() @ weight.t(), -1).topk(3, -1)
    for weights, experts in (plain, packed):
        assert weights.dtype == torch.float32
        assert torch.equal(experts, expected.indices)
        torch.testing.assert_close(weights, expected.values)


# ------------------------------------------------------------------------------------------------ whole models


@pytest.fixture(scope="module", params=SPLIT_EXPERTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    recipe = SPLIT_EXPERTS[request.param]
    config = getattr(transformers, f"{recipe.family}Config")(**{**COMMON, **recipe.config})
    return save_random(config, tmp_path_factory.mktemp(request.param))


def loaded_and_packed(saved: Saved):
    def fill(stage: Stage) -> None:
        load_weights(stage, Checkpoint(saved.path))
        stage.pack()

    return fill


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["split experts", "whole experts"])
def test_logits_equal_transformers_at_every_layout(saved: Saved, expert_parallel: bool) -> None:
    c = read_config(saved.path)
    for tp, pp in LAYOUTS:
        fill = loaded_and_packed(saved)
        got = run_layout(c, tp, pp, fill, saved.sequences, expert_parallel=expert_parallel)
        for mine, reference in zip(got, saved.logits, strict=True):
            worst = (mine - reference).abs().max().item()
            assert worst < 2e-4, f"tp={tp} pp={pp}: logits differ by {worst}"


def test_weights_as_they_were_loaded_give_the_same(saved: Saved) -> None:
    c = read_config(saved.path)
    got = run_layout(c, 1, 1, lambda stage: load_weights(stage, Checkpoint(saved.path)), saved.sequences)
    for mine, reference in zip(got, saved.logits, strict=True):
        torch.testing.assert_close(mine, reference, atol=2e-4, rtol=0)


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["split experts", "whole experts"])
def test_every_rank_reads_its_own_experts_alone(saved: Saved, expert_parallel: bool) -> None:
    """Every element of every expert is read by one rank of two, and no rank asks for another's tensors."""
    c = read_config(saved.path)
    sizes, counts = expert_tensors(saved), {}
    for index in range(2):
        (stage,) = build_stages(c, ThreadGroup(Meeting(2), index), 1, expert_parallel=expert_parallel)
        checkpoint = Checkpoint(saved.path)
        load_weights(stage, checkpoint)
        held = sum(parameter.numel() * parameter.element_size() for parameter, _ in declared(stage))
        assert checkpoint.bytes_read == held == stage.parameter_bytes
        for _, spec in declared(stage):
            for source in spec.sources:
                if ".experts." in source.name:
                    block = tuple(slice(part.start, part.stop) for part in source.part)
                    counts.setdefault(source.name, torch.zeros(source.shape))[block] += 1
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name in counts}
        if expert_parallel and index == 0:  # the first of 3 experts' ranks has 2, of 7's 4
            assert experts == set(range(-(-c.moe.num_experts // 2)))
    assert {name: count.numel() for name, count in counts.items()} == sizes
    assert all(count.unique().tolist() == [1] for count in counts.values())


def expert_tensors(saved: Saved) -> dict[str, int]:
    """Name -> elements, of all experts' tensors in the checkpoint; as a published one has them, each by itself."""
    found = {}
    for file in saved.path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if ".experts." in name:
                    found[name] = tensors.get_tensor(name).numel()
    assert found and all(name.endswith(".weight") for name in found)
    return found


def test_dummy_experts_are_the_same_at_every_layout(saved: Saved) -> None:
    c = read_config(saved.path)

    def fill(stage: Stage) -> None:
        init_dummy_weights(stage, 5)

    one = run_layout(c, 1, 1, fill, saved.sequences)
    assert one[0].std() > 0
    for expert_parallel in (False, True):
        got = run_layout(c, 3, 1, fill, saved.sequences, expert_parallel=expert_parallel)
        for mine, reference in zip(got, one, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)


def make_layer(saved: Saved, dtype: torch.dtype) -> MoE:
    """The last layer's experts, random, all on one rank."""
    c = read_config(saved.path)
    layer = MoE("model.layers.1", c, Placement(alone(), dtype, CPU))
    torch.manual_seed(0)
    for parameter, _ in declared(layer):
        parameter.data = (torch.randn(parameter.shape) * 0.3).to(parameter.dtype)
    return layer


def uses_sigmoid(saved: Saved) -> bool:
    """PyTorch computes the last few sigmoids of a tensor in another way than those before, up to their last bit."""
    moe = read_config(saved.path).moe
    return moe.scoring == "sigmoid" or moe.shared_gated


def check_same_alone(layer: MoE, x: torch.Tensor, together: torch.Tensor, *, exact: bool) -> None:
    """Whether each token's result is the one that it has beside others."""
    alone_too = torch.cat([layer(row) for row in x.split(1)])
    if exact:
        assert torch.equal(alone_too, together), "a token's result depends on its neighbours"
    else:
        torch.testing.assert_close(alone_too, together, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not native.is_loaded(), reason="the native kernels are not loaded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_layer_gives_the_same_bits_whoever_goes_where(saved: Saved, dtype: torch.dtype) -> None:
    layer = make_layer(saved, dtype)
    with torch.inference_mode():
        for part in layer.modules():
            if hasattr(part, "pack"):
                part.pack()
        assert isinstance(layer.experts.down.stack, PackedStack)
        hidden = read_config(saved.path).hidden_size
        examples = ([torch.randn(rows, hidden).to(dtype)] for rows in (3, 5))
        replay = tape.record(lambda inputs: layer(inputs[0]), *examples)
        assert replay is not None
        for rows in (1, 2, 40):
            x = torch.randn(rows, hidden).to(dtype)
            together = layer(x)
            assert torch.equal(replay([x]), together)
            if dtype == torch.float32:  # whose products are our own
                check_same_alone(layer, x, together, exact=not uses_sigmoid(saved))


# ------------------------------------------------------------------------------------------------- what fits


def small_config(**moe: object):
    values: dict = {"num_experts": 3, "top_k": 2, "intermediate_size": 64, "sparse": (True,) * 30}
    return make_config(moe=MoeConfig(**(values | moe)))


def test_more_ranks_than_experts_or_columns_is_refused_by_name() -> None:
    check_tensor_parallel(small_config(), 3, expert_parallel=True)
    with pytest.raises(ValueError, match=r"tensor_parallel_size 4 .* 3 experts, .*enable_expert_parallel.* works is 3"):
        check_tensor_parallel(small_config(), 4, expert_parallel=True)
    check_tensor_parallel(small_config(), 4)
    with pytest.raises(ValueError, match=r"4 is more than .* 2 columns of an expert; the largest that works is 2"):
        check_tensor_parallel(small_config(intermediate_size=2), 4)
    with pytest.raises(ValueError, match="4 is more than the model's 3 columns of the shared expert"):
        check_tensor_parallel(small_config(shared_intermediate_size=3), 4)


def test_dense_columns_do_not_matter_where_no_layer_is_dense() -> None:
    dense, sparse = make_config(intermediate_size=2), small_config()
    with pytest.raises(ValueError, match="2 MLP columns"):
        check_tensor_parallel(dense, 4)
    check_tensor_parallel(dataclasses.replace(sparse, intermediate_size=2), 4)
    some = dataclasses.replace(sparse.moe, sparse=(True,) * 29 + (False,))
    with pytest.raises(ValueError, match="2 MLP columns"):
        check_tensor_parallel(dataclasses.replace(sparse, intermediate_size=2, moe=some), 4)


def test_expert_parallelism_of_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="enable_expert_parallel has no effect on LlamaForCausalLM"):
        check_tensor_parallel(make_config(), 2, expert_parallel=True)


def test_stages_are_balanced_by_what_a_token_meets() -> None:
    # Three dense layers as heavy as ten sparse ones each; the head costs next to nothing.
    heavy = small_config(top_k=1, num_experts=1, intermediate_size=1, sparse=(False,) * 3 + (True,) * 27)
    c = dataclasses.replace(heavy, vocab_size=1, num_heads=1, num_kv_heads=1, head_dim=2, intermediate_size=100)
    dense, sparse = c.active_parameters[0], c.active_parameters[-1]
    assert dense == c.hidden_size * (8 + 300) and sparse == c.hidden_size * (8 + 4)
    assert [len(stage) for stage in balanced_layers(c, 2)] == [2, 28]
    assert [len(stage) for stage in balanced_layers(c, 4)] == [1, 1, 2, 26]


def test_columns_are_split_at_multiples_where_they_are_some() -> None:
    assert [len(part) for part in split_columns(768, 5)] == [160, 152, 152, 152, 152]
    assert [len(part) for part in split_columns(37, 2)] == [19, 18]
    assert [len(part) for part in split_columns(16, 3)] == [6, 5, 5]  # fewer eights than ranks
    for total, parts in ((768, 5), (37, 2), (16, 3)):
        assert [i for part in split_columns(total, parts) for i in part] == list(range(total))


# --------------------------------------------------------------------------------------------------- config.json

WRONG = [
    ("mixtral", {"num_experts_per_tok": 4}, r"num_experts_per_tok is 4; it must be at most num_local_experts \(3\)"),
    ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
    ("qwen2_moe", {"mlp_only_layers": [5]}, r"mlp_only_layers is \[5\]; it must be a list of layers, each from 0 to 4"),
    ("qwen2_moe", {"decoder_sparse_step": 6}, "decoder_sparse_step is 6; it must leave a layer with experts among 5"),
    ("glm4_moe", {"first_k_dense_replace": 4}, "first_k_dense_replace is 4; it must be an integer from 0 to 3"),
    ("glm4_moe", {"n_group": 3}, "n_group is 3; it must divide the 10 experts"),
    ("glm4_moe", {"topk_group": 1}, "topk_group is 1; it must leave the 3 experts of a token"),
    ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size is 0; it must be a positive integer"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_fields_are_named(name: str, changes: dict, message: str, tmp_path) -> None:
    recipe = SPLIT_EXPERTS[name]
    config = getattr(transformers, f"{recipe.family}Config")(**{**COMMON, **recipe.config}).to_dict()
    config |= {"architectures": [f"{recipe.family}ForCausalLM"]} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_sparse_layers_are_those_that_config_json_says(saved: Saved) -> None:
    c = read_config(saved.path)
    expected = {
        "Glm4MoeForCausalLM": (False, True, True, True),
        "MixtralForCausalLM": (True,) * 4,
        "OlmoeForCausalLM": (True,) * 4,
        "Qwen2MoeForCausalLM": (False, False, False, True, False),  # every second one, the second aside
        "Qwen3MoeForCausalLM": (False, True, True, True),
    }
    assert c.moe.sparse == expected[c.architecture]
    (stage,) = build_stages(c, alone(), 1)
    assert tuple(isinstance(layer.ffn, MoE) for layer in stage.layers) == c.moe.sparse


def test_only_the_router_and_its_bias_are_float32() -> None:
    """Their bytes count as what they are."""
    c = dataclasses.replace(small_config(correction_bias=True, scoring="sigmoid"), dtype="bfloat16")
    stage = Stage(
        c, range(1), alone(), is_first=False, is_last=False, dtype=torch.bfloat16, device=torch.device("meta")
    )
    kinds: dict[torch.dtype, int] = {}
    for parameter, _ in declared(stage):
        kinds[parameter.dtype] = kinds.get(parameter.dtype, 0) + parameter.numel()
    assert kinds[torch.float32] == 3 * c.hidden_size + 3
    assert stage.parameter_bytes == 2 * kinds[torch.bfloat16] + 4 * kinds[torch.float32]
