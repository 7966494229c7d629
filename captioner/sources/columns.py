"""Which columns of a table hold the image, its name, and what the user wants to keep.

Works on Arrow schemas alone; opens nothing. What cannot be decided is an InputError that lists the columns.
"""

import difflib
from collections.abc import Sequence

import pyarrow as pa

from captioner import rows
from captioner.config import InputConfig
from captioner.errors import ConfigError, InputError
from captioner.sources.units import Columns

__all__ = ["check_kept_names", "choose", "is_bytes", "is_struct", "is_text", "plain_type"]

_URI_NAMES = frozenset(
    {
        *("image", "img", "url", "uri", "path", "file", "filename", "filepath", "image_path", "image_url", "image_uri"),
        *("image_file", "img_path", "img_url", "file_name", "file_path", "s3_uri", "s3_path", "gcs_uri"),
    }
)
_RESERVED = frozenset(
    name
    for schema in (rows.SOURCE, rows.decoded_schema(1), rows.captioned_schema(), rows.CAPTIONS, rows.FAILURES)
    for name in schema.names
)


def check_kept_names(config: InputConfig) -> None:
    """Raise ConfigError when a kept column would stand in the place of one of our own."""
    for new, old in config.kept.items():
        if new in _RESERVED:
            raise ConfigError(
                f"--keep-columns {old}: {new} is a column of the output; rename it, as --keep-columns {old}=input_{new}"
            )


def choose(schema: pa.Schema, config: InputConfig, where: str) -> Columns:
    """Return which columns of `schema` to read. Raises InputError with the columns of `where` if that is unclear."""
    schema = pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])
    image = _image_column(schema, config.image_column, where)
    if config.id_column is not None:
        _check_id(schema, config.id_column, where)
    for name in config.kept.values():
        _find(schema, name, "--keep-columns", where)
    kept = tuple(pa.field(new, _kept_type(schema.field(old).type)) for new, old in config.kept.items())
    return Columns(image=image, id=config.id_column, kept=kept, kept_from=tuple(config.kept.values()))


def is_bytes(kind: pa.DataType) -> bool:
    """Say whether values of this type are bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Say whether values of this type are strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_struct(kind: pa.DataType) -> bool:
    """Say whether this is Hugging Face's image type, struct<bytes, path>; path may be left out."""
    if not pa.types.is_struct(kind):
        return False
    fields = {child.name: child.type for child in kind}
    return "bytes" in fields and is_bytes(fields["bytes"]) and ("path" not in fields or is_text(fields["path"]))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that stands in the table once dictionaries, extension types and views are resolved."""
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # Arrow cannot take rows of views
        return pa.string() if pa.types.is_string_view(kind) else pa.binary()
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    return plain_type(kind.value_type) if pa.types.is_dictionary(kind) else _without_extensions(kind)


def _without_extensions(kind: pa.DataType) -> pa.DataType:
    """Return the type with the storage of each extension type inside it: some of Ray's unpickle what they hold."""
    if isinstance(kind, pa.BaseExtensionType):
        return _without_extensions(kind.storage_type)
    if pa.types.is_struct(kind):
        return pa.struct([child.with_type(_without_extensions(child.type)) for child in kind])
    if pa.types.is_map(kind):
        return pa.map_(_without_extensions(kind.key_type), _without_extensions(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_without_extensions(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_without_extensions(kind.value_type))
    return pa.list_(_without_extensions(kind.value_type)) if pa.types.is_list(kind) else kind


def _kept_type(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_null(kind) else kind


def _image_column(schema: pa.Schema, name: str | None, where: str) -> str:
    if name is not None:
        kind = _find(schema, name, "--image-column", where).type
        if not (is_bytes(kind) or is_struct(kind) or is_text(kind)):
            raise InputError(
                f"--image-column {name} of {where} is {kind}; expected binary, struct<bytes, path> or a string with a"
                " URI: nested images must be flattened first"
            )
        return name
    candidates = _candidates(schema)
    if len(candidates) == 1:
        return candidates[0]
    found = "several columns" if candidates else "no column"
    raise InputError(
        f"{where} has {found} that can be the image; name one with --image-column. {_listed(schema, candidates)}"
    )


def _candidates(schema: pa.Schema) -> list[str]:
    """Return bytes before URIs: who has both has them for the same images."""
    holding = [field.name for field in schema if is_bytes(field.type) or is_struct(field.type)]
    texts = [field.name for field in schema if is_text(field.type)]
    pointing = [name for name in texts if name.lower() in _URI_NAMES]
    return holding or pointing or (texts if len(schema) == 1 else [])


def _check_id(schema: pa.Schema, name: str, where: str) -> None:
    kind = _find(schema, name, "--id-column", where).type
    if pa.types.is_nested(kind) or is_bytes(kind):
        raise InputError(f"--id-column {name} of {where} is {kind}; expected a string, a number or a date")


def _find(schema: pa.Schema, name: str, flag: str, where: str) -> pa.Field:
    if schema.names.count(name) == 1:
        return schema.field(name)
    found = f"{schema.names.count(name)} columns of that name" if name in schema.names else "no such column"
    raise InputError(f"{flag} {name}: {where} has {found}. {_did_you_mean(name, schema.names)}{_listed(schema)}")


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _listed(schema: pa.Schema, only: Sequence[str] = ()) -> str:
    fields = [field for field in schema if not only or field.name in only]
    shown = ", ".join(f"{field.name}: {field.type}" for field in fields[:40])
    return f"{'Candidates' if only else 'Columns'}: {shown}{', ...' if len(fields) > 40 else ''}"
