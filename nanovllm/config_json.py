"""Reads and checks the keys of a checkpoint's JSON files. Every error names the key and its value."""

import json
from pathlib import Path
from typing import Any

from nanovllm.validation import require_bool, require_int, require_number

RawConfig = dict[str, Any]  # a JSON object as it was read
MAX_INT = 2**31 - 1  # of a size: tensors of larger ones fit in no memory, and products of two fit in an int64


def read_json(path: Path) -> RawConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file that can be read: {error}; download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; download it again")
    return content


def _get(raw: RawConfig, key: str, default: Any, kind: str) -> Any:
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise ValueError(f"{key} must be {kind}, but the key is missing")
    return value


def get_int(raw: RawConfig, key: str, default: int | None = None, minimum: int = 1) -> int:
    """raw[key], from `minimum` to MAX_INT, or `default` if the key is missing or null. Raises ValueError for others."""
    value = _get(raw, key, default, "an integer")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    require_int(key, value, minimum)
    if value > MAX_INT:
        raise ValueError(f"{key} must be at most {MAX_INT}, got {value}")
    return int(value)


def get_number(raw: RawConfig, key: str, default: float | None = None) -> float:
    """raw[key], a positive number; `default` as in get_int."""
    value = _get(raw, key, default, "a number")
    require_number(key, value, "a number above 0", lambda number: number > 0)
    return float(value)


def get_bool(raw: RawConfig, key: str, default: bool = False) -> bool:
    """raw[key], or `default` if the key is missing or null."""
    value = _get(raw, key, default, "true or false")
    require_bool(key, value)
    return value


def get_list(raw: RawConfig, key: str) -> list[Any]:
    """raw[key], or an empty list if the key is missing or null."""
    value = raw.get(key)
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"{key} must be a list, got {value!r}")
    return value or []
