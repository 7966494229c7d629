"""Two tables of the same images: which captions differ, and how much.

A sample of the first table is looked up in the second: by key where both have one frozen input, else by image_id.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.errors import InputError
from captioner.gallery.caption_cards import Row
from captioner.gallery.differences import change
from captioner.gallery.table_rows import TableRows
from captioner.sources.urls import redact
from captioner.tables import CaptionTable

__all__ = ["Comparison", "Pair", "compare", "settings_that_differ"]

_COMPARED = 20_000  # pairs among which the largest changes are looked for


@dataclass(frozen=True)
class Pair:
    """One image in both tables."""

    rows: tuple[Row, Row]
    change: float


@dataclass(frozen=True)
class Comparison:
    """The pairs that differ most, and what they were chosen from."""

    pairs: list[Pair]
    num_compared: int
    num_changed: int
    num_without_pair: int


def compare(first: TableRows, second: TableRows, num_pairs: int, seed: int) -> Comparison:
    """Return the `num_pairs` largest changes among a sample. Raises InputError if the tables share no image."""
    rows = first.draw(max(num_pairs, _COMPARED), seed)
    name = "key" if _input(first) == _input(second) else "image_id"
    others = _others(second, rows, name)
    pairs = [
        Pair((row, other), _change(row, other))
        for row in rows.to_pylist()
        if (other := others.get(row[name])) is not None and other["image_id"] == row["image_id"]
    ]
    if rows.num_rows and not pairs:
        raise InputError(
            f"{redact(second.table.url)} has none of {rows.num_rows:,} images of {redact(first.table.url)};"
            " expected two runs over the same images"
        )
    largest = sorted(pairs, key=lambda pair: (-pair.change, pair.rows[0]["key"]))[:num_pairs]
    return Comparison(largest, len(pairs), sum(pair.change > 0 for pair in pairs), rows.num_rows - len(pairs))


def _others(second: TableRows, rows: pa.Table, name: str) -> dict[Any, Row]:
    column = rows.column(name).combine_chunks()
    found = second.with_keys(column.to_numpy()) if name == "key" else second.of_images(column)
    return {row[name]: row for row in reversed(found.to_pylist())}  # of images with one name the first counts


def _input(rows: TableRows) -> tuple[Any, Any]:
    identity: Mapping[str, Any] = rows.table.identity() or {}
    return identity.get("input"), identity.get("columns")


def _change(row: Row, other: Row) -> float:
    is_failed = [found.get("reason") is not None for found in (row, other)]
    if any(is_failed):
        return 0.0 if all(is_failed) else 1.0
    return change(row["caption"] or "", other["caption"] or "")


def settings_that_differ(first: CaptionTable, second: CaptionTable) -> list[tuple[str, Any, Any]]:
    """Return name and both values of everything that the two tables were made with differently."""
    before, after = (dict(_flat(table.identity() or {})) for table in (first, second))
    names = (name for name in before | after if before.get(name) != after.get(name))
    return [(name, before.get(name), after.get(name)) for name in names]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
