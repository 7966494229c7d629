"""The column of a prompt with a JSON schema: typed where the schema is flat, else JSON as text.

A schema is flat where it is an object of properties, named apart in any case of letters, that each are a text, a
number, a truth value, or a list of one of these. Knows JSON schemas and Arrow; not who wrote the answers.
"""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

__all__ = ["column_type", "parse_answer"]

_TYPES = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
_INT64 = 1 << 63


def column_type(schema: Mapping[str, Any]) -> pa.DataType:
    """Return the type of the column: a struct of the properties, or string where the schema is not flat."""
    properties = schema.get("properties")
    if schema.get("type") != "object" or not isinstance(properties, dict) or not properties:
        return pa.string()
    if schema.get("additionalProperties", True) is not False:
        return pa.string()
    if "" in properties or len({name.lower() for name in properties}) < len(properties):
        return pa.string()  # SQL would call them otherwise
    fields = {name: _field_type(of) for name, of in properties.items()}
    if None in fields.values():
        return pa.string()
    return pa.struct([pa.field(name, kind) for name, kind in fields.items()])


def _field_type(schema: Any) -> pa.DataType | None:
    """Return the type of one property, None where it has none that Arrow has."""
    if not isinstance(schema, dict):
        return None
    if "enum" in schema and "type" not in schema:
        return pa.string() if all(isinstance(value, str) for value in schema["enum"]) else None
    kind = schema.get("type")
    if kind == "array":
        items = _field_type(schema.get("items"))
        return None if items is None or pa.types.is_list(items) else pa.list_(items)
    return _TYPES.get(kind) if isinstance(kind, str) else None


def parse_answer(text: str, kind: pa.DataType) -> Any:
    """Return an answer as a value of its column; None where it is cut off or holds a number that Arrow has not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not pa.types.is_struct(kind):
        return text
    if not isinstance(value, dict):
        return None
    try:
        return pa.scalar(_finite(value), kind).as_py()
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return None


def _finite(value: Any) -> Any:
    """Return the value, its whole numbers within 64 bits. Raises OverflowError."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise OverflowError(value)
    return value
