"""Where a model's chat template stands: --chat-template, the checkpoint's files, its processor's. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer.serve.chat import ChatTemplate, ChatTemplates
from infer.serve.tokenizer_config import read_json_object, special_tokens

_PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
_MAX_NAME_BYTES = 4096  # no longer text can be a file's path


def load_templates(path: Path, config: Mapping[str, Any], chosen: str | None = None) -> ChatTemplates | None:
    """The templates to use; None where the model has none, and takes plain completions only.

    chosen: --chat-template, a file's path or the template itself, goes before all. Then, as in transformers,
    chat_template.jinja and additional_chat_templates/*.jinja, else tokenizer_config.json's chat_template; then the
    template of the model's processor. Raises ValueError that names the file, or the flag, that is wrong.
    """
    names = special_tokens(path, config)
    if chosen is not None:
        return ChatTemplates({"default": ChatTemplate(*_chosen(chosen), names)})
    sources = _files(path) or _from_config(path / "tokenizer_config.json", config.get("chat_template"))
    if not sources:
        sources = next((found for file in _PROCESSOR_FILES if (found := _from_processor(path / file))), {})
    if not sources:
        return None
    if "default" not in sources:
        origin = next(iter(sources.values()))[1]
        raise ValueError(f'{origin}: there is no template named "default", only {", ".join(sorted(sources))[:200]}')
    return ChatTemplates({name: ChatTemplate(text, origin, names) for name, (text, origin) in sources.items()})


def _chosen(chosen: str) -> tuple[str, str]:
    """(source, origin)."""
    if "\n" not in chosen and len(chosen.encode("utf-8", "replace")) <= _MAX_NAME_BYTES and Path(chosen).is_file():
        return _read(Path(chosen)), chosen
    if "{" not in chosen:
        raise ValueError(f"--chat-template {chosen[:200]!r} is no file, nor a template (no {{{{ or {{% in it)")
    return chosen, "--chat-template"


def _files(path: Path) -> dict[str, tuple[str, str]]:
    """name -> (source, origin)."""
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    return {name: (_read(file), str(file)) for name, file in files.items()}


def _from_config(file: Path, value: Any) -> dict[str, tuple[str, str]]:
    """A template, or a list of named ones, as tokenizer_config.json and processor_config.json hold it."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": (value, str(file))}
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    if not isinstance(value, list):
        raise ValueError(f"{file}: chat_template must be a string or a list, not {type(value).__name__}")
    sources = {}
    for item in value:
        name, template = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise ValueError(f"{file}: each entry of the list chat_template must have a name and a template")
        sources[name] = (template, str(file))
    return sources


def _from_processor(file: Path) -> dict[str, tuple[str, str]]:
    return _from_config(file, read_json_object(file).get("chat_template")) if file.is_file() else {}


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
