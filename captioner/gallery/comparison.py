"""Two tables of the same images: which captions differ, and how much.

A sample of the first table is looked up in the second: by key where both were made of one input, which reads few parts;
by image_id where they were not, or where a key turns out to mean another image there.
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
    others = _others(first, second, rows)
    pairs = [
        Pair((row, other), _change(row, other))
        for row in rows.to_pylist()
        if (other := others.get(row["key"])) is not None
    ]
    if rows.num_rows and not pairs:
        raise InputError(
            f"{redact(second.table.url)} has none of {rows.num_rows:,} images of {redact(first.table.url)};"
            " expected two runs over the same images"
        )
    largest = sorted(pairs, key=lambda pair: (-pair.change, pair.rows[0]["key"]))[:num_pairs]
    return Comparison(largest, len(pairs), sum(pair.change > 0 for pair in pairs), rows.num_rows - len(pairs))


def _others(first: TableRows, second: TableRows, rows: pa.Table) -> dict[int, Row]:
    """Return key -> the second table's row of the same image.

    A listing that changed between two runs of one input gives its keys to other images: then names decide."""
    images = dict(zip(rows.column("key").to_pylist(), rows.column("image_id").to_pylist(), strict=True))
    if _input(first) == _input(second):
        found = second.with_keys(rows.column("key").to_numpy()).to_pylist()
        if found and all(row["image_id"] == images[row["key"]] for row in found):
            return {row["key"]: row for row in found}
    named = second.of_images(rows.column("image_id").combine_chunks()).to_pylist()
    by_name = {row["image_id"]: row for row in reversed(named)}  # of images with one name the first counts
    return {key: by_name[image] for key, image in images.items() if image in by_name}


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
