"""Columns of parts that other releases wrote: which are sound, and how parts of several releases become one.

A release may add columns of a caption, also in the structs of `candidates`; parts of earlier ones are without them.
Knows schemas and rows in memory, no store.
"""

from collections.abc import Sequence

import pyarrow as pa

from captioner.caption_columns import CAPTION_COLUMNS

__all__ = ["concat_parts", "is_known_layout"]

_MAY_LACK = {column.name for column in CAPTION_COLUMNS} - {"caption"}


def is_known_layout(found: pa.Schema, wanted: pa.Schema) -> bool:
    """Return True if a part with the columns `found` is one of `wanted`, or of a release before some were added."""
    missing = set(wanted.names) - set(found.names)
    return (
        len(set(found.names)) == len(found.names)
        and missing <= _MAY_LACK
        and set(found.names) <= set(wanted.names)
        and all(_fits(field, wanted.field(field.name)) for field in found)
    )


def _fits(found: pa.Field, wanted: pa.Field) -> bool:
    is_nullable = wanted.nullable or found.name in _MAY_LACK
    return (is_nullable or not found.nullable) and _holds(found.type, wanted.type)


def _holds(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Return True if two types are equal but for nulls and for fields of a struct that `found` is without."""
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _holds(found.value_type, wanted.value_type)
    if pa.types.is_struct(found) and pa.types.is_struct(wanted):
        fields = {field.name: field.type for field in wanted}
        missing = set(fields) - {field.name for field in found}
        known = all(field.name in fields and _holds(field.type, fields[field.name]) for field in found)
        return known and (not missing or missing <= _MAY_LACK)
    return bool(found == wanted)


def concat_parts(parts: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of parts as one table; null in columns that a part is without."""
    if all(part.schema.equals(parts[0].schema) for part in parts):
        return pa.concat_tables(parts)
    rows = pa.concat_tables([part.cast(_nullable(part.schema)) for part in parts], promote_options="permissive")
    order = max((part.schema.names for part in parts), key=len)
    rows = rows.select([*order, *(name for name in rows.column_names if name not in order)])
    return rows.cast(pa.schema([_shared_field(field, parts) for field in rows.schema]))


def _shared_field(field: pa.Field, parts: Sequence[pa.Table]) -> pa.Field:
    """Return the field as all parts have it; nullable where they differ."""
    found = [part.schema.field(field.name) if field.name in part.column_names else None for part in parts]
    return found[0] if found[0] is not None and all(other == found[0] for other in found) else field


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([_nullable_field(field) for field in schema])


def _nullable_field(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_list(kind):
        kind = pa.list_(_nullable_field(kind.value_field))
    elif pa.types.is_struct(kind):
        kind = pa.struct([_nullable_field(child) for child in kind])
    return pa.field(field.name, kind)
