"""--config FILE: flags of the command line as YAML. No torch here.

    model: meta-llama/Llama-3.1-8B-Instruct
    max-model-len: 4096
    served_model_name: [llama, default]
    hf-overrides: {rope_theta: 500000.0}

A key is a flag's long name with `-` or `_`. A value is read as the command line would read its text, so that both ways
give the same configuration and the same errors. What stands on the command line wins, a list as a whole.
"""

import argparse
import difflib
import json
from pathlib import Path
from typing import Any

import yaml

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_NULL = ("", "null", "~")


def add_config_file(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Makes the values of the file that `--config` names in argv the parser's defaults. Raises ValueError."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        path = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if path is not None:
        parser.set_defaults(**read_config_file(Path(path), parser))


def read_config_file(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The file's values by the destinations of the parser's flags, checked; these flags are no longer required.

    Raises ValueError that names the file, the key and what would work.
    """
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not option.startswith("--no-") and option not in ("--help", "--config")
    }
    values: dict[str, Any] = {}
    for key, value in _read(path).items():
        name = key.replace("_", "-")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists every flag"
            raise ValueError(f"config file {path}: unknown key {key!r}; {hint}")
        action = actions[name]
        if action.dest in values:
            raise ValueError(f"config file {path}: {name} is there twice, once with - and once with _")
        if isinstance(value, str) and value.lower() in _NULL:
            continue
        try:
            values[action.dest] = _convert(action, value)
        except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
            raise ValueError(f"config file {path}: {name}: {error}") from None
        action.required = False
    return values


class _TextLoader(yaml.BaseLoader):
    """Every scalar is the text that stands in the file: 1e3, 0x10 and 010 mean what they mean on the command line."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    """The file's keys and values: texts and lists as they stand, mappings with YAML's types."""
    try:
        source = path.read_text(encoding="utf-8")
        texts, typed = yaml.load(source, Loader=_TextLoader), yaml.safe_load(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path}: not YAML: {' '.join(str(error).split())}") from None
    if typed is None:
        return {}
    if not isinstance(texts, dict):
        raise ValueError(f"config file {path}: must hold flags, such as `max-model-len: 4096`, one a line")
    return {
        key: as_typed if isinstance(as_typed, dict) else as_text
        for (key, as_text), as_typed in zip(texts.items(), typed.values(), strict=True)
    }


def _convert(action: argparse.Action, value: Any) -> Any:
    """The value as its flag's action would store it. Raises ValueError or ArgumentTypeError."""
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, str) or value.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"must be true or false, not {_show(value)}")
        return value.lower() in _TRUE
    parse = action.type if callable(action.type) else str
    if action.nargs == "+":
        parsed = [parse(_text(item)) for item in (value if isinstance(value, list) else [value])]
        if not parsed:
            raise ValueError("must hold at least one value")
        return tuple(item for part in parsed for item in (part if isinstance(part, tuple) else (part,)))
    if isinstance(value, list):
        value = ",".join(map(_text, value))
    try:
        result = parse(json.dumps(value) if isinstance(value, dict) else value)
    except ValueError:
        raise ValueError(f"{_show(value)} is not a valid {getattr(parse, '__name__', 'value')}") from None
    if action.choices is not None and result not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}, not {_show(value)}")
    return result


def _text(item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError(f"a list may hold texts and numbers, not {_show(item)}")
    return item


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
