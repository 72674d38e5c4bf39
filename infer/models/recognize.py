"""What a checkpoint says of itself that decides whether it can be run at all. No torch here."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infer.models.fields import Fields, read_json

PLAIN_WANTED = "quantized checkpoints are not supported; use the original in bfloat16, float16 or float32"

# Files beside config.json in which older tools (and NVIDIA's ModelOpt) tell how they quantized.
QUANTIZATION_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}

# Endings of tensors that only quantized checkpoints have -> whose they are.
QUANTIZED_TENSORS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or INT8",
    ".weight_scale_inv": "FP8 in blocks",
    ".SCB": "bitsandbytes INT8",
    ".absmax": "bitsandbytes 4 bits",
    "_proj_blocks": "MXFP4",
}

# safetensors' names of the element types that quantized weights come in.
QUANTIZED_DTYPES = {
    "F8_E4M3": "FP8", "F8_E5M2": "FP8", "F8_E8M0": "scales of MXFP8 or MXFP4", "F4": "FP4", "F6_E2M3": "FP6",
    "F6_E3M2": "FP6", "I8": "INT8", "U8": "4 or 8 bits, packed", "I32": "GPTQ or AWQ, packed",
}  # fmt: skip


def refuse_quantized(f: Fields) -> None:
    """Raises ValueError that names the method where config.json, or a file beside it, says the weights are quantized.

    An override of quantization_config by null trusts the user: the tensors' own dtypes then decide.
    """
    for name in ("quantization_config", "compression_config"):
        if (value := f.get(name)) is not None:
            raise ValueError(f"{f.file}: {name} (method {_method(value)}): {PLAIN_WANTED}")
        text = f.data.get("text_config")  # of a model that also sees or hears
        if isinstance(text, dict) and text.get(name) is not None:
            raise ValueError(f"{f.file}: text_config.{name} (method {_method(text[name])}): {PLAIN_WANTED}")
    if "quantization_config" in f.data:
        return
    for name, tool in QUANTIZATION_FILES.items():
        if (file := f.file.with_name(name)).is_file():
            raise ValueError(f"{file} (method {_method(read_json(file), tool)}): {PLAIN_WANTED}")


def _method(value: Any, otherwise: str = "not named") -> str:
    """The method a quantization_config names, with its bits or format where it says them."""
    if not isinstance(value, dict):
        return otherwise
    inner = value.get("quantization")  # ModelOpt's file
    value = {**value, **inner} if isinstance(inner, dict) else value
    flags = {"load_in_4bit": "4 bits", "load_in_8bit": "8 bits"}  # bitsandbytes
    bits = [text for flag, text in flags.items() if value.get(flag) is True or value.get(f"_{flag}") is True]
    bits += [f"{value[name]} bits" for name in ("bits", "w_bit") if isinstance(value.get(name), int)]
    bits += [str(value[name]) for name in ("quant_algo", "format") if value.get(name)]
    method = value.get("quant_method") or ("bitsandbytes" if any(flag in value for flag in flags) else otherwise)
    return ", ".join([str(method), *bits[:1]])


def quantized_tensors(names: Iterable[str]) -> str | None:
    """Whose tensors are among these names, and one of them, for people; None where all may be plain ones."""
    for name in names:
        for ending, method in QUANTIZED_TENSORS.items():
            if name.endswith(ending):
                return f"{name} is a tensor of a quantized checkpoint ({method})"
    return None


def unsupported(architecture: str, known: Iterable[str], file: Path, auto_map: Any) -> ValueError:
    """The error for an architecture that no reader knows: why, the nearest one that is, and all of those."""
    known = list(known)
    # Their endings are alike, and would make any two names near ones.
    stems = {_stem(name): name for name in known}
    near = difflib.get_close_matches(_stem(architecture), stems, n=1)
    hint = f"; the nearest is {stems[near[0]]}" if near else ""
    supported = f"supported are {', '.join(known)} (python -m infer.models tells more)"
    if isinstance(auto_map, dict) and auto_map:
        return ValueError(
            f"{file}: architecture {architecture} is not supported{hint}; the checkpoint brings code of its own for it "
            f"(auto_map: {next(iter(auto_map.values()))}), which is never run: it could do anything on every host that "
            f"serves the model; {supported}"
        )
    return ValueError(f"{file}: architecture {architecture} is not supported{hint}; {supported}")


def _stem(architecture: str) -> str:
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", architecture) or architecture
