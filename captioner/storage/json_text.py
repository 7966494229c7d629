"""JSON from outside, which may be damaged or odd."""

import json
from typing import Any

__all__ = ["parse_json", "parse_object"]


def parse_json(text: str | bytes) -> Any:
    """Return the value that `text` holds. Raises ValueError for anything else, as for arrays a thousand deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the object that `text` holds. Raises ValueError for anything else."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value
