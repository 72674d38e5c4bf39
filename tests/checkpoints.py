"""Small random checkpoints in float32, one of each family, and what transformers makes of them.

A checkpoint is what a Hugging Face directory holds: config.json, safetensors, a byte-level BPE tokenizer whose
vocabulary is the model's. Their sizes divide by nothing on purpose.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import recipes_core
import recipes_dense
import recipes_mla
import recipes_moe
from recipes import BOS as BOS
from recipes import COMMON, VOCAB_SIZE
from recipes import EOS as EOS

# Core recipes run in all layout tests, the others in test_families.py.
CORE = tuple(recipes_core.RECIPES)
RECIPES = {**recipes_core.RECIPES, **recipes_dense.RECIPES, **recipes_moe.RECIPES, **recipes_mla.RECIPES}


def build_checkpoint(name: str, path: Path) -> Path:
    """Writes the checkpoint of that name to a directory. The same name always gives the same weights."""
    import torch
    import transformers

    recipe = RECIPES[name]
    config = getattr(transformers, recipe.config_class or f"{recipe.family}Config")(**{**COMMON, **recipe.config})
    torch.manual_seed(CORE.index(name) if name in CORE else zlib.crc32(name.encode()))
    model = getattr(transformers, recipe.model_class or f"{recipe.family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if parameter_name.endswith("bias"):  # zeros, of which nobody would miss the addition
                parameter.normal_(0.0, 0.5)
            elif "norm" in parameter_name or ".ln_" in parameter_name:
                parameter.normal_(recipe.norm_mean, 0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):  # zeros, too
                buffer.normal_(0.0, 0.2)
    shards = {"max_shard_size": recipe.max_shard_size} if recipe.max_shard_size else {}
    model.save_pretrained(path, **shards)
    write_tokenizer(path)
    return path


def poison(source: Path, path: Path, token: int) -> Path:
    """A copy of a checkpoint of one file, in which the embedding of a token is NaN. Its output weights are its own."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" in tensors, "tied, it would make every logit of that token NaN"
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens: 3 special ones, 256 bytes, then pairs of characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|begin|>", "<|end|>", "<|pad|>"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(a, b) for a in letters for b in letters] + [("\u0120", b) for b in letters]  # U+0120 writes a blank
    pairs += [(a, b) for a in letters.upper() for b in letters]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = pairs[: VOCAB_SIZE - len(pieces)]
    pieces += [a + b for a, b in pairs]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def make_prompts(vocab_size: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """Random prompts of these lengths, without special tokens."""
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(3, vocab_size, length).tolist() for length in lengths]


@dataclass
class Sequence:
    """A prompt with a continuation, and the reference's view of it.

    logprobs [len(tokens) - 1, vocab] float32: row i is the distribution of tokens[i + 1].
    """

    prompt: list[int]
    token_ids: list[int]
    logprobs: np.ndarray

    def rows(self) -> np.ndarray:
        """The rows that predict the continuation."""
        return self.logprobs[len(self.prompt) - 1 :]


class Reference:
    """A checkpoint in transformers, float32, without a KV cache's shortcuts in what is reported."""

    def __init__(self, path: Path):
        self._path = path

    @cache  # noqa: B019 - lives as long as the session, as does the reference
    def _model(self) -> Callable[..., Any]:
        import torch
        import transformers

        # Its other ways to multiply by experts want sizes that are multiples of four.
        options = {"dtype": torch.float32, "experts_implementation": "eager"}
        return transformers.AutoModelForCausalLM.from_pretrained(self._path, **options).eval()

    def greedy(self, prompt: list[int], num_tokens: int) -> Sequence:
        """The most likely continuation of num_tokens tokens."""
        import torch

        model, past, ids, tokens = self._model(), None, torch.tensor([prompt]), []
        with torch.inference_mode():
            for _ in range(num_tokens):
                out = model(ids, past_key_values=past, use_cache=True)
                past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                tokens.append(int(ids))
        return self.score(prompt, tokens)

    def score(self, prompt: list[int], token_ids: list[int]) -> Sequence:
        """The reference's log-probabilities along a given continuation, from one forward pass over all of it."""
        import torch

        with torch.inference_mode():
            logits = self._model()(torch.tensor([prompt + token_ids[:-1]]), use_cache=False).logits[0]
            return Sequence(prompt, token_ids, logits.float().log_softmax(-1).numpy())
