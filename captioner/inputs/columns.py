"""Which columns of a table hold the image, its id, and the values that the user keeps.

Works on Arrow schemas alone; opens nothing. Raises InputError with the columns where the choice is not clear.
"""

import difflib
import itertools
import re
from collections.abc import Sequence

import pyarrow as pa

from captioner import schema as rows
from captioner.config import InputConfig
from captioner.errors import ConfigError, InputError
from captioner.inputs.units import Columns

__all__ = [
    "RESERVED_COLUMNS",
    "check_kept_names",
    "check_later",
    "choose",
    "filled",
    "holds_images",
    "holds_uris",
    "is_bytes",
    "is_list",
    "is_struct",
    "is_text",
    "item_type",
    "plain_type",
]

_URI_NAMES = frozenset(
    {
        *("image", "img", "url", "uri", "path", "file", "filename", "filepath", "image_path", "image_url", "image_uri"),
        *("image_file", "img_path", "img_url", "file_name", "file_path", "s3_uri", "s3_path", "gcs_uri"),
    }
)
_IMAGE_NAMES = frozenset({"image", "img", "file", "image_file"})  # of these, bytes are more likely the image itself
_HASHES = (
    "md5 sha sha1 sha224 sha256 sha384 sha512 blake2 blake3 xxhash hash ahash dhash phash whash crc crc32 digest"
    " checksum fingerprint signature etag uuid guid embedding embeddings emb vector features"
)
_HASH_WORDS = frozenset(_HASHES.split())
_OF_VIEWS = ("doubt", "why")
"""Columns that a view of jobs/query.py adds to those of the table."""

RESERVED_COLUMNS = frozenset(
    name
    for schema in (rows.SOURCE, rows.decoded_schema(1), rows.captioned_schema(), rows.CAPTIONS, rows.FAILURES)
    for name in schema.names
) | frozenset(_OF_VIEWS)
"""Names that no column of a user can have in the output."""


def check_kept_names(config: InputConfig) -> None:
    """Raise ConfigError when a kept column has the name of a column of the output, or of another one.

    In any case of its letters: SQL and many readers do not tell WIDTH from width."""
    ours = {name.lower(): name for name in RESERVED_COLUMNS}
    kept: dict[str, str] = {}
    for new, old in config.kept_columns.items():
        remedy = f"rename it, as --keep-columns {old}=input_{new.lower()}"
        flag = f"{config.flag_of(old)} {old}"
        if (own := ours.get(new.lower())) is not None:
            raise ConfigError(f"{flag}: {new} is a column of the output{_also(own, new)}; {remedy}")
        if (other := kept.setdefault(new.lower(), new)) != new:
            raise ConfigError(f"{flag}: {new} and {other} differ in case alone; {remedy}")


def _also(own: str, new: str) -> str:
    return "" if own == new else f", where it is written {own}: SQL does not tell them apart"


def choose(schema: pa.Schema, config: InputConfig, where: str) -> Columns:
    """Return which columns of `schema` to read. Raises InputError with the columns of `where` if that is unclear."""
    schema = pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])
    image = _image_column(schema, config.image_column, where)
    if config.id_column is not None:
        _check_id(schema, config.id_column, where)
    for name in config.kept_columns.values():
        _find(schema, name, config.flag_of(name), where)
    for name in config.prompt_columns:
        _check_has_text(schema, name, where)
    kept = tuple(pa.field(new, _kept_type(schema.field(old).type)) for new, old in config.kept_columns.items())
    if config.explode_images and not is_list(kind := schema.field(image).type):
        raise ConfigError(f"--explode-images: column {image} of {where} is {kind} and no list; expected no such flag")
    return Columns(
        image=image,
        id=config.id_column,
        kept=kept,
        kept_from=tuple(config.kept_columns.values()),
        has_each_item=config.explode_images,
    )


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether values of this type are bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Return whether values of this type are strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_struct(kind: pa.DataType) -> bool:
    """Return whether this is Hugging Face's image type, struct<bytes, path>; path may be left out, either null."""
    if not pa.types.is_struct(kind):
        return False
    fields = {child.name: child.type for child in kind}
    data, path = fields.get("bytes"), fields.get("path", pa.null())
    has_values = not (data == pa.null() == path)
    return (
        data is not None
        and (is_bytes(data) or data == pa.null())
        and (is_text(path) or path == pa.null())
        and has_values
    )


def is_list(kind: pa.DataType) -> bool:
    """Return whether each value of this type holds several."""
    kind = plain_type(kind)
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def item_type(kind: pa.DataType) -> pa.DataType:
    """Return the plain type of an image in a column: of the items of lists, else of the values."""
    kind = plain_type(kind)
    return plain_type(kind.value_type) if is_list(kind) else kind


def holds_images(kind: pa.DataType) -> bool:
    """Return whether a column of this type can be read as images, URIs of them, or lists of either.

    One of nulls alone has none."""
    kind = item_type(kind)
    return is_bytes(kind) or is_struct(kind) or is_text(kind) or pa.types.is_null(kind)


def holds_uris(name: str, kind: pa.DataType) -> bool:
    """Return whether a column holds URIs: texts, or bytes under a name of URIs, as some writers store strings."""
    return is_text(kind) or (_is_variable(kind) and name.lower() in _URI_NAMES - _IMAGE_NAMES)


def filled(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the first schema, in which a column without values has the type of the first later file with some."""
    known: dict[str, pa.DataType] = {}
    for field in itertools.chain.from_iterable(schemas):
        if not pa.types.is_null(plain_type(field.type)):
            known.setdefault(field.name, field.type)
    return pa.schema([field.with_type(known.get(field.name, field.type)) for field in schemas[0]])


def _is_variable(kind: pa.DataType) -> bool:
    return is_bytes(kind) and not pa.types.is_fixed_size_binary(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values once dictionaries, extension types and views are resolved."""
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # Arrow has no `take` for views
        return pa.string() if pa.types.is_string_view(kind) else pa.binary()
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    return plain_type(kind.value_type) if pa.types.is_dictionary(kind) else _without_extensions(kind)


def _without_extensions(kind: pa.DataType) -> pa.DataType:
    """Return the type with each extension type and dictionary inside it replaced by what it holds."""
    if isinstance(kind, pa.BaseExtensionType):
        return _without_extensions(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _without_extensions(kind.value_type)
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
        if not holds_images(kind):
            raise InputError(
                f"--image-column {name} of {where} is {kind}; expected binary, struct<bytes, path>, a string with a"
                " URI, or a list of one of these"
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
    """Return columns of bytes, else of URIs: a table with both has them for the same images. Else lists of them.

    Bytes of one length, or called a hash, are more likely that than images: taken where there is nothing else."""
    pointing = [
        field.name for field in schema if holds_uris(field.name, field.type) and field.name.lower() in _URI_NAMES
    ]
    bytes_ = [field for field in schema if is_bytes(field.type) and field.name not in pointing]
    fixed = [f.name for f in bytes_ if not _is_variable(f.type) or _is_hash(f.name)]
    holding = [f.name for f in schema if is_struct(f.type) or (f in bytes_ and f.name not in fixed)]
    texts = [field.name for field in schema if is_text(field.type)]
    return holding or pointing or _lists(schema) or fixed or (texts if len(schema) == 1 else [])


def _is_hash(name: str) -> bool:
    return not _HASH_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))


def _lists(schema: pa.Schema) -> list[str]:
    """Return columns with lists of bytes, else of URIs by their name, as `images` and `image_urls`."""
    lists = [(field.name, item_type(field.type)) for field in schema if is_list(field.type)]
    holding = [name for name, kind in lists if _is_variable(kind) or is_struct(kind)]
    pointing = [name for name, kind in lists if is_text(kind) and name.lower().removesuffix("s") in _URI_NAMES]
    return holding or pointing


def check_later(columns: Columns, schema: pa.Schema, where: str, config: InputConfig) -> None:
    """Raise InputError for a later file whose ids are no single values, or whose kept column is written otherwise."""
    if columns.id in schema.names:
        _check_id(schema, str(columns.id), where, may_be_bytes=True)
    for name in columns.kept_from:
        others = [other for other in schema.names if other.lower() == name.lower()]
        if others and name not in others:
            raise InputError(
                f"{config.flag_of(name)} {name}: {where} has {others[0]}, which differs in case alone; expected one"
                " name in all files"
            )


def _check_id(schema: pa.Schema, name: str, where: str, *, may_be_bytes: bool = False) -> None:
    kind = plain_type(_find(schema, name, "--id-column", where).type)
    if pa.types.is_nested(kind) or (is_bytes(kind) and not may_be_bytes):
        raise InputError(f"--id-column {name} of {where} is {kind}; expected a string, a number or a date")


def _check_has_text(schema: pa.Schema, name: str, where: str) -> None:
    """Raise InputError for a column whose values are no text of a prompt."""
    kind = schema.field(name).type
    item = kind.value_type if is_list(kind) else kind
    if is_bytes(item) or pa.types.is_nested(item):
        raise InputError(f"--prompts {name}: {name} of {where} is {kind}; expected texts, numbers, or lists of them")


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
