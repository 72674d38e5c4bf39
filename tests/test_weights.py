"""Reading checkpoints: every rank its own slices and no others, and an error for everything that can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from infer.layers.declare import declared
from infer.models.config import ModelConfig, RopeConfig
from infer.models.decoder import Stage, balanced_layers
from infer.weights import Checkpoint, check_tied, init_dummy_weights, load_weights

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=1009, hidden_size=72, num_layers=4, num_heads=9, num_kv_heads=3,
    head_dim=8, intermediate_size=100, norm_eps=1e-5, rope=RopeConfig(dim=8), max_position=64, window=(0,) * 4,
    qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Rank:
    """What building and loading a stage needs to know of a group."""

    def __init__(self, index: int = 0, size: int = 1):
        self.index, self.size = index, size


def make_stages(c: ModelConfig, tp: Rank, pp: int = 1, dtype: torch.dtype = torch.float32) -> list[Stage]:
    cpu = torch.device("cpu")
    return [
        Stage(c, layers, tp, is_first=i == 0, is_last=i == pp - 1, dtype=dtype, device=cpu)
        for i, layers in enumerate(balanced_layers(c, pp))
    ]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Every tensor of the model, whole, by the names Llama's checkpoints use."""
    generator = torch.Generator().manual_seed(1)
    (stage,) = make_stages(CONFIG, Rank())
    sources = [source for _, spec in declared(stage) for source in spec.sources]
    return {source.name: torch.randn(source.shape, generator=generator).bfloat16() for source in sources}


@pytest.fixture
def single(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    """One file for each layer, one for what is before and one for what is after them."""
    weight_map = {}
    for name in tensors:
        layer = name.split(".")[2] if ".layers." in name else "embed" if "embed" in name else "head"
        weight_map[name] = f"model-{layer}.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(path: Path, weight_map: object) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_names_are_those_of_llama_checkpoints(tensors: dict[str, Tensor]) -> None:
    layer = "model.layers.3."
    assert {name.removeprefix(layer) for name in tensors if name.startswith(layer)} == {
        "input_layernorm.weight", "post_attention_layernorm.weight",
        *(f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")),
        *(f"mlp.{p}_proj.{kind}" for p in ("gate", "up", "down") for kind in ("weight", "bias")),
    }  # fmt: skip
    assert {name for name in tensors if ".layers." not in name} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    }  # fmt: skip


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 2), (9, 4)])
def test_each_rank_holds_its_slices(single: Path, tensors: dict[str, Tensor], tp: int, pp: int) -> None:
    """Column-parallel, row-parallel, merged and replicated blocks are where the checkpoint has them."""
    for index in range(tp):
        for stage in make_stages(CONFIG, Rank(index, tp), pp):
            load_weights(stage, Checkpoint(single))
            for parameter, spec in declared(stage):
                blocks = [tensors[s.name][tuple(slice(p.start, p.stop) for p in s.part)] for s in spec.sources]
                torch.testing.assert_close(parameter, torch.cat(blocks).float(), atol=0, rtol=0)


def test_the_slices_of_all_ranks_are_the_model(tensors: dict[str, Tensor]) -> None:
    """Every element of every tensor is on some rank; only KV heads and norms are on several, a bias sum on one."""
    counts = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    for index in range(2):
        for stage in make_stages(CONFIG, Rank(index, 2), 2):
            for _, spec in declared(stage):
                for source in spec.sources:
                    counts[source.name][tuple(slice(p.start, p.stop) for p in source.part)] += 1
    for name, count in counts.items():
        if "k_proj" in name or "v_proj" in name:
            assert [head.unique().tolist() for head in count.chunk(3)] == [[1], [2], [1]], name
        else:
            assert count.unique().tolist() == [2 if "norm" in name else 1], name


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_bytes_read_are_the_rank_s_part(sharded: Path, tensors: dict[str, Tensor], tp: int, pp: int) -> None:
    whole = sum(tensor.numel() * 2 for tensor in tensors.values())
    total = 0
    for index in range(tp):
        for stage in make_stages(CONFIG, Rank(index, tp), pp):
            checkpoint = Checkpoint(sharded)
            load_weights(stage, checkpoint)
            held = sum(parameter.numel() * 2 for parameter in stage.parameters())  # bfloat16 on disk
            assert checkpoint.bytes_read == held
            total += checkpoint.bytes_read
    replicated = 1.1 if tp > 1 else 1.0  # norms, and KV heads on two ranks
    assert whole <= total <= whole * replicated


def test_files_of_other_stages_are_not_opened(sharded: Path) -> None:
    first, last = make_stages(CONFIG, Rank(), 2)
    for file in ("model-3.safetensors", "model-head.safetensors"):
        (sharded / file).write_bytes(b"not safetensors")
    load_weights(first, Checkpoint(sharded))
    with pytest.raises(ValueError, match=r"model-3\.safetensors is truncated, corrupt or unreadable"):
        load_weights(last, Checkpoint(sharded))


def test_only_the_slices_are_asked_for(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What safetensors itself hands out, not what we count, is the rank's part."""
    handed = 0

    class Spy:
        def __init__(self, file: Path, **options: str):
            self.file = safe_open(file, **options)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, name: str) -> "SpySlice":
            return SpySlice(self.file.get_slice(name))

    class SpySlice:
        def __init__(self, view: object):
            self.get_shape, self.get_dtype, self.view = view.get_shape, view.get_dtype, view

        def __getitem__(self, index: object) -> Tensor:
            nonlocal handed
            block = self.view[index]
            handed += block.numel() * block.element_size()
            return block

    monkeypatch.setattr("infer.weights.safe_open", Spy)
    (stage,) = make_stages(CONFIG, Rank(1, 3))
    checkpoint = Checkpoint(single)
    load_weights(stage, checkpoint)
    assert handed == checkpoint.bytes_read == stage.parameter_bytes // 2


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_are_cast_to_the_compute_dtype(
    tensors: dict[str, Tensor], tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    save_file({name: tensor.to(stored) for name, tensor in tensors.items()}, tmp_path / SINGLE)
    (stage,) = make_stages(CONFIG, Rank(), dtype=wanted)
    checkpoint = Checkpoint(tmp_path)
    load_weights(stage, checkpoint)
    assert {parameter.dtype for parameter in stage.parameters()} == {wanted}
    torch.testing.assert_close(stage.embed.weight, tensors["model.embed_tokens.weight"].to(stored).to(wanted))
    assert checkpoint.bytes_read == sum(tensor.numel() for tensor in tensors.values()) * stored.itemsize


def test_any_single_file_will_do_and_extra_tensors_are_fine(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors | {"rotary_emb.inv_freq": torch.ones(3)}, tmp_path / "weights.safetensors")
    (stage,) = make_stages(CONFIG, Rank())
    load_weights(stage, Checkpoint(tmp_path))
    assert torch.equal(stage.norm.weight, tensors["model.norm.weight"].float())


def test_a_model_saved_without_its_head_has_no_prefix(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if "lm_head" not in name}
    save_file(bare, tmp_path / SINGLE)
    tied = ModelConfig(**{**vars(CONFIG), "tie_embeddings": True})
    (stage,) = make_stages(tied, Rank())
    load_weights(stage, Checkpoint(tmp_path))
    assert torch.equal(stage.head.owner[0].weight, bare["embed_tokens.weight"].float())


# ------------------------------------------------------------------------------------------------ what can be wrong


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / SINGLE)
    edit(tensors)
    save_file(tensors, path / SINGLE)


def refuse(path: Path, *words: str, c: ModelConfig = CONFIG, pp: int = 1) -> None:
    """Loading raises a ValueError of one line that holds all the words."""
    with pytest.raises(ValueError) as caught:
        for stage in make_stages(c, Rank(), pp):
            load_weights(stage, Checkpoint(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_tensor(single: Path) -> None:
    change(single, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refuse(single, SINGLE, "model.layers.2.mlp.up_proj.weight is missing", "the nearest name is model.layers.")


def test_missing_head_says_what_to_do_unless_tied(single: Path) -> None:
    change(single, lambda tensors: tensors.pop("lm_head.weight"))
    refuse(single, SINGLE, "lm_head.weight is missing", "tie_word_embeddings")
    tied = ModelConfig(**{**vars(CONFIG), "tie_embeddings": True})
    for pp in (1, 2):
        for stage in make_stages(tied, Rank(), pp):
            load_weights(stage, Checkpoint(single))


def test_a_head_that_is_called_tied_and_is_not(single: Path, tensors: dict[str, Tensor]) -> None:
    tied = ModelConfig(**{**vars(CONFIG), "tie_embeddings": True})
    check_tied(CONFIG, Checkpoint(single))
    with pytest.raises(ValueError, match=r"lm_head\.weight is there and differs; use it with --hf-overrides"):
        check_tied(tied, Checkpoint(single))
    change(single, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    check_tied(tied, Checkpoint(single))
    change(single, lambda tensors: tensors.pop("lm_head.weight"))
    check_tied(tied, Checkpoint(single))


def test_wrong_shape(single: Path) -> None:
    change(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(71)}))
    refuse(single, SINGLE, "model.norm.weight has shape [71]", "[72]")


def test_wrong_shape_is_found_before_anything_is_read(single: Path) -> None:
    change(single, lambda tensors: tensors.update({"lm_head.weight": torch.ones(1010, 72)}))
    (stage,) = make_stages(CONFIG, Rank())
    checkpoint = Checkpoint(single)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[1010, 72\]"):
        load_weights(stage, checkpoint)
    assert checkpoint.bytes_read == 0


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")]
)
def test_wrong_dtype(single: Path, dtype: torch.dtype, name: str) -> None:
    change(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(72).to(dtype)}))
    refuse(single, SINGLE, f"model.norm.weight has dtype {name}", "BF16")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(single: Path, keep: int) -> None:
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[:keep])
    refuse(single, SINGLE, "truncated, corrupt or unreadable")


def test_truncated_shard(sharded: Path) -> None:
    file = sharded / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refuse(sharded, "model-2.safetensors", "truncated, corrupt or unreadable")


def test_index_points_to_a_file_that_is_not_there(sharded: Path) -> None:
    (sharded / "model-1.safetensors").unlink()
    refuse(sharded, INDEX, "model.layers.1.", "model-1.safetensors, which is not there")


def test_index_names_a_tensor_the_file_lacks(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    write_index(sharded, index | {"lm_head.weight": "model-0.safetensors"})
    refuse(sharded, "model-0.safetensors", "lm_head.weight is missing, though", INDEX)


@pytest.mark.parametrize("where", ["../model-0.safetensors", "/weights.safetensors", 3])
def test_index_may_not_lead_elsewhere(sharded: Path, where: object) -> None:
    write_index(sharded, {"lm_head.weight": where})
    refuse(sharded, INDEX, "lm_head.weight must be in a file of the same directory", repr(where))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_unparseable_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, encoding="latin-1")
    refuse(sharded, INDEX)


def test_no_safetensors_says_what_was_found(tmp_path: Path) -> None:
    refuse(tmp_path, str(tmp_path), SINGLE, INDEX)
    (tmp_path / "pytorch_model.bin").touch()
    refuse(tmp_path, "pytorch_model.bin cannot be used")


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refuse(sharded, "6 safetensors files but no", INDEX)


# ---------------------------------------------------------------------------------------------------- dummy weights


def test_dummy_weights_do_not_depend_on_the_layout() -> None:
    """Across blocks of 1024 rows too: the vocabulary has 2500 here."""
    c = ModelConfig(**{**vars(CONFIG), "vocab_size": 2500})
    (whole,) = make_stages(c, Rank())
    init_dummy_weights(whole, 3)
    expected = {}
    for parameter, spec in declared(whole):
        parts = parameter.split([source.local_shape[0] for source in spec.sources])
        expected.update({source.name: part for source, part in zip(spec.sources, parts, strict=True)})
    for index in range(3):
        for stage in make_stages(c, Rank(index, 3), 2):
            init_dummy_weights(stage, 3)
            for parameter, spec in declared(stage):
                blocks = [expected[s.name][tuple(slice(p.start, p.stop) for p in s.part)] for s in spec.sources]
                assert torch.equal(parameter, torch.cat(blocks))
    assert whole.embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(expected["model.embed_tokens.weight"], expected["lm_head.weight"])
    assert torch.equal(whole.norm.weight, torch.ones(72))
