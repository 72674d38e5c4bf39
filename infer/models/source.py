"""Finds a model's files and reads its config. No torch here."""

from pathlib import Path

from infer.config import EngineConfig
from infer.hub import existing_directory, resolve_model, resolve_tokenizer
from infer.models.config import ModelConfig, load_model_config


def read_model(config: EngineConfig, *, weights: bool | None = None) -> tuple[Path, ModelConfig]:
    """The model's directory, fetched from the Hub if needed, and its config. Raises ValueError.

    weights: whether they are fetched too (None: unless load_format makes them up).
    """
    weights = config.load_format != "dummy" if weights is None else weights
    if weights and existing_directory(config.model) is None:
        # From the Hub the config comes first: what cannot be run is refused before its weights are fetched.
        read_model(config, weights=False)
    path = resolve_model(config.model, config.revision, config.download_dir, weights=weights)
    model_config = load_model_config(path, config)
    if config.max_model_len is not None and config.max_model_len > model_config.max_position:
        raise ValueError(
            f"max_model_len {config.max_model_len} is more than the model's {model_config.max_position} positions"
        )
    return path, model_config


def tokenizer_path(config: EngineConfig, model_path: Path) -> Path:
    """The tokenizer's directory: the model's own unless another was named. Raises ValueError."""
    if config.tokenizer is None:
        return resolve_tokenizer(str(model_path))
    return resolve_tokenizer(config.tokenizer, None, config.download_dir)
