"""Python literals to JSON, for models that write arguments as Python. No torch here."""

import ast
import json
from typing import Any

_JSON_NAMES = {"true": True, "false": False, "null": None}  # Python's are constants


def literal_json(text: str) -> str:
    """One literal as JSON. Raises ValueError for anything else."""
    return _dump(_parse(text))


def keywords_json(text: str) -> str:
    """`city="Paris", days=[1, 2]` as a JSON object. Raises ValueError for what is not keywords with literals."""
    call = _parse(f"f({text}\n)")
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("a call takes keywords only")
    parts = [f"{_dump_text(str(keyword.arg))}: {_dump(keyword.value)}" for keyword in call.keywords]
    return "{" + ", ".join(parts) + "}"


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise ValueError(f"not a Python literal: {type(error).__name__}") from None


def _dump(node: ast.expr) -> str:
    try:
        text = json.dumps(_value(node), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # What has no UTF-8, half a surrogate pair, stays the escape that it was.
    return text if _is_text(text) else json.dumps(_value(node), allow_nan=False)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _dump_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):  # bool is an int
            return value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise ValueError(f"{type(node).__name__} is not a literal")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str() as key):
            return key
        case ast.Constant(value=bool() | int() | float() | None as key):
            return json.dumps(key)
    raise ValueError("an object's keys are strings")
