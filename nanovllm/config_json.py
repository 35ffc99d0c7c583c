"""Reads the JSON files of a checkpoint, and their keys with checks. Every error names the key and its value."""

import json
from pathlib import Path
from typing import Any

from nanovllm.validation import require_bool, require_int, require_number


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a JSON file that can be read: {error}; download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; download it again")
    return content


def get_int(raw: dict[str, Any], key: str, default: int | None = None, minimum: int = 1) -> int:
    """raw[key]; `default` stands in when the key is missing or null, and without one that is an error."""
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} must be an integer, but the key is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    require_int(key, value, minimum)
    return int(value)


def get_number(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    """raw[key], a positive number; `default` as in get_int."""
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} must be a number, but the key is missing")
    require_number(key, value, "a number above 0", lambda number: number > 0)
    return float(value)


def get_bool(raw: dict[str, Any], key: str, default: bool = False) -> bool:
    """raw[key]; `default` stands in when the key is missing or null."""
    value = raw.get(key)
    value = default if value is None else value
    require_bool(key, value)
    return value


def get_list(raw: dict[str, Any], key: str) -> list[Any]:
    """raw[key]; an empty list when the key is missing or null."""
    value = raw.get(key)
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"{key} must be a list, got {value!r}")
    return value or []
