"""Lists of URIs: a URI a line, CSV, TSV, JSON lines or JSON. Each row becomes one of the listing.

Knows what a list means; the syntax of each format stands elsewhere.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

import pyarrow as pa

from captioner.config import InputConfig
from captioner.errors import InputError
from captioner.inputs import columns
from captioner.inputs.delimited import open_delimited
from captioner.inputs.json_objects import JsonRow, read_objects
from captioner.inputs.listing import ListingWriter
from captioner.inputs.payloads import check_uri
from captioner.inputs.remedies import check_is_list, first_lines
from captioner.inputs.suffixes import IMAGE_SUFFIXES
from captioner.inputs.text_files import open_text
from captioner.inputs.units import Columns
from captioner.storage import Store, urls

__all__ = ["write_uri_list"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_LOOKED_AT = 1_000  # objects whose keys are the columns of a list
_KINDS = (pa.float64(), pa.string(), pa.list_(pa.string()))


def write_uri_list(store: Store, url: str, config: InputConfig, writer: ListingWriter) -> Columns:
    """Add every URI of a list to the listing. Relative URIs are resolved against the list's folder.

    Text: one URI a line, blank lines are skipped. CSV: with a header; an empty cell is a row without an image. JSON:
    objects, one a line or in a list. Columns are strings, those of images lists of them too. Raises InputError naming
    the line of a broken list, or the columns if none has URIs.
    """
    if delimiter := _DELIMITERS.get(urls.suffix(url)):
        return _write_csv(store, url, delimiter, config, writer)
    if urls.suffix(url) in _JSON_SUFFIXES:
        return _write_objects(store, url, config, writer)
    if config.kept_columns or config.id_column or config.image_column or config.explode_images:
        raise InputError(f"{urls.redact(url)} is a plain list; columns can only be taken from .csv or .parquet")
    with open_text(store, url) as lines:
        first = first_lines(lines)
        check_is_list(first, urls.redact(url))
        for number, line in enumerate(chain(first, lines), 1):
            if uri := line.strip():
                check_uri(uri, f"{urls.redact(url)}, line {number}")
                writer.add(urls.resolve(uri, urls.parent(url)))
    return Columns()


def _write_csv(store: Store, url: str, delimiter: str, config: InputConfig, writer: ListingWriter) -> Columns:
    where = urls.redact(url)
    with open_delimited(store, url, delimiter) as file:
        chosen = columns.choose(pa.schema([pa.field(name, pa.string()) for name in file.header]), config, where)
        writer.kept = chosen.kept
        for number, row in enumerate(file.rows):
            if row.problem:
                raise InputError(row.problem)
            cells = dict(zip(file.header, row.cells, strict=True))
            _add(writer, url, chosen, cells, _OfRow(f"{where}, line {row.line}", number))
    return chosen


def _write_objects(store: Store, url: str, config: InputConfig, writer: ListingWriter) -> Columns:
    rows = read_objects(store, url)
    first = list(islice(rows, _LOOKED_AT))
    for row in first:
        if image := next((name for name in row.values if urls.suffix(name) in IMAGE_SUFFIXES or "://" in name), None):
            raise InputError(
                f"{row.place} has the key {urls.redact(image)[:80]}, where a list has the names of its columns;"
                ' expected objects such as {"url": ...}'
            )
    chosen = columns.choose(_schema(first), config, urls.redact(url))
    writer.kept = tuple(field.with_type(pa.string()) for field in chosen.kept)
    for number, row in enumerate(chain(first, rows)):
        cells = {name: _text(value) for name, value in row.values.items()}
        images = _images(row, str(chosen.image))
        num_further = 0 if chosen.has_each_item else len(images) - 1
        is_numbered = chosen.has_each_item and isinstance(row.values.get(str(chosen.image)), list)
        for item, image in enumerate(images[: len(images) - num_further]):
            of_row = _OfRow(row.place, number, f"-{item}" if is_numbered else "", num_further)
            _add(writer, url, chosen, cells | {str(chosen.image): image}, of_row)
    return replace(chosen, kept=writer.kept)


def _images(row: JsonRow, column: str) -> list[str | None]:
    """Return the URIs of a row's images, null for a row without any."""
    found = row.values.get(column)
    images = (found or [None]) if isinstance(found, list) else [found]
    if not all(isinstance(image, str | None) for image in images):
        raise InputError(
            f"{row.place}: {column} is {str(found)[:40]}; expected the URI of an image, a list of them, or null"
        )
    return images


def _schema(rows: Sequence[JsonRow]) -> pa.Schema:
    """Return the keys of objects as columns: of lists or strings where a value is, else of what can be no image."""
    kinds: dict[str, pa.DataType] = {}
    for row in rows:
        for name, value in row.values.items():
            kinds[name] = max(kinds.get(name, _KINDS[0]), _kind(value), key=_KINDS.index)
    return pa.schema(list(kinds.items()))


def _kind(value: Any) -> pa.DataType:
    if isinstance(value, list) and value and all(isinstance(item, str | None) for item in value):
        return pa.list_(pa.string())
    return pa.string() if isinstance(value, str) else pa.float64()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)


class _OfRow(NamedTuple):
    """An image's row in a list."""

    place: str
    number: int
    end: str = ""
    """Of its id, where the row has several images."""

    num_further: int = 0
    """Images of the row that are left out."""


def _add(writer: ListingWriter, url: str, chosen: Columns, cells: Mapping[str, str | None], row: _OfRow) -> None:
    uri = (cells.get(str(chosen.image)) or "").strip()
    check_uri(uri, row.place)
    image_id = (cells.get(chosen.id) if chosen.id is not None else None) or ""
    unnamed = "" if uri else f"{urls.redact(url)}#{row.number}"
    writer.add(
        urls.resolve(uri, urls.parent(url)) if uri else "",
        image_id=(image_id or unnamed) and (image_id or unnamed) + row.end,
        kept=[cells.get(name) for name in chosen.kept_from],
        num_further=row.num_further,
    )
