"""Where a model's files are: a local directory, or a Hub repository downloaded once per host. No torch here."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from infer.launch import private_directory

logger = logging.getLogger(__name__)

TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "processor_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
CONFIG_PATTERNS = (
    "config.json", "generation_config.json",
    "hf_quant_config.json", "quantize_config.json", "quant_config.json",  # that it is quantized, and so refused
)  # fmt: skip
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
# Patterns match across folders. What lies in one is another copy of the model (original/, onnx/), and so are the
# consolidated files some repositories hold beside the sharded ones.
IGNORED_PATTERNS = ("*/*", "consolidated*")

_NO_GGUF = "GGUF checkpoints are not supported; give the directory or Hub id of the original in safetensors"


def resolve_model(
    model: str, revision: str | None = None, download_dir: str | None = None, *, weights: bool = True
) -> Path:
    """The directory that holds a model: `model` itself, or the local copy of that Hub repository.

    revision: branch, tag or commit of the repository (default: its main branch). download_dir: where downloads are kept
    (default: the Hub's cache). weights: False leaves the weights out (--load-format dummy). The token of a gated
    repository is read from HF_TOKEN. Of the ranks of one host one downloads, and the others wait for it.

    ValueError, on one line: no such directory or repository, no config.json, no safetensors, no access, no network.
    """
    path = _local_directory("model", model, revision)
    if path is None:
        patterns = CONFIG_PATTERNS + TOKENIZER_PATTERNS + (WEIGHT_PATTERNS if weights else ())
        path = _download("model", model, revision, download_dir, patterns)
        if weights and not any(path.glob("*.safetensors")):
            raise ValueError(f"model {model!r}: the Hub repository {_why_no_safetensors(model, revision)}")
    if not (path / "config.json").is_file():
        raise ValueError(f"model {model!r}: {_why_no_config(model, revision, path)}")
    return path


def resolve_tokenizer(tokenizer: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory that holds a tokenizer; `tokenizer` is a directory or a Hub id, as in resolve_model."""
    path = _local_directory("tokenizer", tokenizer, revision)
    if path is None:
        path = _download("tokenizer", tokenizer, revision, download_dir, TOKENIZER_PATTERNS)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"tokenizer {tokenizer!r}: {path} has neither a tokenizer.json nor a tokenizer.model")
    return path


def served_name(model: str) -> str:
    """The name a model is served under unless told otherwise: its directory's or repository's base name."""
    path = Path(model).expanduser()
    return Path(os.path.abspath(path)).name if path.is_dir() else model.rstrip("/").rpartition("/")[2]


def existing_directory(name: str) -> Path | None:
    """The directory of that name, not fetched and not checked; None where there is none."""
    path = Path(name).expanduser()
    return path if name and path.is_dir() else None


def _local_directory(what: str, name: str, revision: str | None) -> Path | None:
    """The directory of that name; None where it can only be a Hub id; ValueError where it is neither."""
    if not name:
        raise ValueError(f"the {what} is empty; give a directory, or a Hub id such as Qwen/Qwen3-0.6B")
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{what} {name!r} is a local directory: revision {revision!r} is for the Hub only")
        return path
    if path.exists():
        if path.suffix == ".gguf":
            raise ValueError(f"{what} {name!r} is a GGUF file: {_NO_GGUF}")
        raise ValueError(f"{what} {name!r} is a file; give the directory that holds it")
    if name[0] in "./~" or name.endswith("/") or name.count("/") > 1:
        raise ValueError(f"{what} {name!r}: there is no such directory (nor is it a Hub id, which reads owner/name)")
    return None


def _download(
    what: str, repo: str, revision: str | None, download_dir: str | None, patterns: tuple[str, ...]
) -> Path:
    """A snapshot of the repository's files of these patterns; every failure is a ValueError on one line."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                cache_dir=download_dir,
                token=os.environ.get("HF_TOKEN") or None,
                allow_patterns=list(patterns),
                ignore_patterns=list(IGNORED_PATTERNS),
                local_files_only=local_files_only,
            )
        )

    label = f"{what} {repo!r}" + (f" (revision {revision!r})" if revision else "")
    try:
        with _host_lock(f"{label} to {download_dir or 'the Hub cache'}", f"the download of {label}") as waited:
            if waited:
                # What the other rank has just downloaded, even if the branch has moved on since. If it failed, try.
                with contextlib.suppress(LocalEntryNotFoundError):
                    return snapshot(local_files_only=True)
            return snapshot(local_files_only=False)
    except HFValidationError as error:
        raise ValueError(f"{label}: there is no such directory, nor is it a Hub id: {_first_line(error)}") from error
    except Exception as error:  # the Hub's client raises its own, its HTTP library's and OSError, by version
        raise ValueError(f"{label}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """What the user can do about a failed download."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    here = "there is no such directory here, and "
    match error:
        case GatedRepoError():  # a RepositoryNotFoundError too
            return "access to this Hub repository is restricted: ask for it on its page, then set HF_TOKEN"
        case RepositoryNotFoundError():
            return here + "the Hub has no such repository (if it is private, set HF_TOKEN to a token that may read it)"
        case RevisionNotFoundError():
            return "the Hub repository has no such revision (give a branch, tag or commit)"
        case LocalEntryNotFoundError():
            return here + (
                "the Hub cannot be reached and its local cache does not hold all of it; give a local directory, or run "
                "with a network connection (and without HF_HUB_OFFLINE)"
            )
        case HfHubHTTPError() if error.response is not None and error.response.status_code == 401:
            return "the Hub refuses the token in HF_TOKEN (HTTP status 401)"
        case _:
            return f"the download failed: {type(error).__name__}: {_first_line(error)}"


def _why_no_safetensors(repo: str, revision: str | None) -> str:
    """The rest of a sentence on a repository without safetensors, naming other weights it holds."""
    files, problem = _listed_files(repo, revision)
    others = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".gguf"))]
    if not others:
        return f"has no *.safetensors files at its top level{problem}"
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"has no *.safetensors files, only {others[0]}{more}; give a repository or --revision that has safetensors"


def _why_no_config(model: str, revision: str | None, path: Path) -> str:
    """A sentence on a model without config.json, naming the GGUF file it has instead."""
    if existing_directory(model) is not None:
        where, files, problem = str(path), sorted(file.name for file in path.iterdir()), ""
    else:
        where, (files, problem) = "the Hub repository", _listed_files(model, revision)
    gguf = next((file for file in files if file.endswith(".gguf")), None)
    if gguf is not None:
        return f"{where} has no config.json, but {gguf}: {_NO_GGUF}"
    return f"{where} has no config.json{problem}; a Hugging Face model directory is needed"


def _listed_files(repo: str, revision: str | None) -> tuple[list[str], str]:
    """A repository's files, and where they cannot be listed, why: they are asked for only to say more in an error."""
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(repo, revision=revision, token=os.environ.get("HF_TOKEN") or None)
    except Exception as error:
        return [], f" (nor can its files be listed: {_first_line(error)})"
    return files, ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


@contextlib.contextmanager
def _host_lock(key: str, waiting_for: str) -> Iterator[bool]:
    """Hold this host's lock of that key; yields whether another process held it first.

    The lock file is not in the cache directory, which may be shared by hosts over a file system without locks.
    """
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    with (private_directory() / f"download-{name}.lock").open("a") as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            logger.info("waiting for another process on this host to finish %s", waiting_for)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield waited
