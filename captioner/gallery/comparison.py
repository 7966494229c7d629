"""Two tables of the same images: which captions, or answers to another prompt, differ, and how much.

A sample of the first table is looked up in the second: by key where both have one input, which reads few parts; by
image_id where they have not, or where a key is that of another image there.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.errors import InputError
from captioner.gallery.caption_cards import Row
from captioner.gallery.differences import change
from captioner.gallery.shown_column import with_texts_of
from captioner.gallery.table_rows import TableRows
from captioner.prompts import CAPTION

__all__ = ["Comparison", "Pair", "compare"]

_COMPARED = 20_000  # pairs among which the largest changes are looked for


@dataclass(frozen=True)
class Pair:
    """One image in both tables."""

    rows: tuple[Row, Row]
    change: float

    @property
    def has_caption(self) -> tuple[bool, bool]:
        """Whether the image has a caption, in each table."""
        first, second = self.rows
        return first.get("caption") is not None, second.get("caption") is not None


@dataclass(frozen=True)
class Comparison:
    """The pairs of captions that differ most, then some of the images without one, and what they were chosen from."""

    pairs: list[Pair]

    num_compared: int
    """Images with a caption in both tables."""

    num_changed: int
    """Those of them whose captions differ."""

    num_failed: tuple[int, int, int]
    """Images without a caption: in the first table alone, in the second alone, in both."""

    num_without_pair: int


def compare(first: TableRows, second: TableRows, num_pairs: int, seed: int, *, column: str = CAPTION) -> Comparison:
    """Return the largest changes among a sample, `num_pairs` with those that have no caption in one table.

    column: the prompt whose answers stand in place of the captions.
    Raises InputError if the tables share no image."""
    rows = first.draw(max(num_pairs, _COMPARED), seed)
    others = _others(first, second, rows)
    pairs = [
        _pair(with_texts_of(column, row), with_texts_of(column, other))
        for row in rows.to_pylist()
        if (other := others.get(row["key"])) is not None
    ]
    if rows.num_rows and not pairs:
        raise InputError(
            f"{second.table.location} has none of {rows.num_rows:,} images of {first.table.location};"
            " expected two runs over the same images"
        )
    captioned = [pair for pair in pairs if all(pair.has_caption)]
    failed = [pair for pair in pairs if not all(pair.has_caption)]
    return Comparison(
        pairs=_chosen(_largest(captioned), _largest(failed), num_pairs),
        num_compared=len(captioned),
        num_changed=sum(pair.change > 0 for pair in captioned),
        num_failed=_num_failed(failed),
        num_without_pair=rows.num_rows - len(pairs),
    )


def _largest(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: (-pair.change, pair.rows[0]["key"]))


def _chosen(captioned: list[Pair], failed: list[Pair], num_pairs: int) -> list[Pair]:
    """Return captions, then failures: these take what captions leave free, and up to a quarter in any case."""
    failed = failed[: max(num_pairs - len(captioned), num_pairs // 4)]
    return captioned[: num_pairs - len(failed)] + failed


def _num_failed(failed: list[Pair]) -> tuple[int, int, int]:
    found = Counter(pair.has_caption for pair in failed)
    return found[False, True], found[True, False], found[False, False]


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


def _pair(row: Row, other: Row) -> Pair:
    before, after = row.get("caption"), other.get("caption")
    if before is None or after is None:
        return Pair((row, other), 0.0 if before == after else 1.0)
    return Pair((row, other), change(before, after))
