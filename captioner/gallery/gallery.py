"""Pages of a caption table: rows and their pictures, or two tables beside each other.

write_gallery(rows, "doubtful.html", table_url="s3://bucket/captions", title="The most doubtful captions")
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from captioner.errors import InputError
from captioner.gallery.caption_cards import Row, caption_card, pair_card
from captioner.gallery.comparison import Comparison, compare, settings_that_differ
from captioner.gallery.page import Page, page_html, write_page
from captioner.gallery.pictures import thumbnails
from captioner.gallery.references import references_of
from captioner.gallery.table_rows import TableRows, ask_rows
from captioner.rows import CAPTIONS, FAILURES, SCORES, Reject, RejectReason
from captioner.sources.urls import absolute, name, redact, shared_options
from captioner.table_images import TableImages
from captioner.tables import CaptionTable, open_table

__all__ = ["write_comparison", "write_gallery"]

_NO_KEY = Reject(RejectReason.MISSING, "the table has no such image")
_NAMING = ("key", "image_id")
_NUM_OWN = 3  # columns of a query that stand on each card


def write_gallery(
    rows: pa.Table,
    output: str,
    *,
    table_url: str,
    storage_options: Mapping[str, Any] | None = None,
    image_storage_options: Mapping[str, Any] | None = None,
    allow_local_uris: bool = False,
    title: str = "",
    lines: Sequence[str] = (),
    references: str | None = None,
) -> Mapping[str, Any]:
    """Write a page of `rows`, in their order, and return a summary: rows, pictures, size_bytes, output.

    rows: any columns, `key` or `image_id` of the table among them; what else the table knows of these images is added,
    and columns that the table does not have stand on each card. `storage_options` are the table's, and those of
    `output`, `references` and the images where they are on the same kind of store. `lines` stand below the title.
    Raises InputError for a table that is none, or rows that name no image.
    """
    options = storage_options or {}
    table = open_table(table_url, options)
    images = TableImages.of(table, options, image_storage_options, allow_local_uris=allow_local_uris)
    found = _completed(rows, table)
    told = references_of([_id(row) for row in found], references, options) if references and found else {}
    page = Page(
        title=title or _title(table),
        cards=[caption_card(row, _NO_KEY, told.get(_id(row), ())) for row in found],
        lines=[*lines, *_made_by(table)],
        scores=[*_own(rows.column_names, images), *(score for score in SCORES[:2] if _has(score, found))],
    )
    keys = [None if row.get("reason") is not None else row.get("key") for row in found]
    return _written(page, keys, images, output, shared_options(absolute(output), table.url, options))


def write_comparison(
    table_url: str,
    other_url: str,
    output: str,
    *,
    num_pairs: int,
    seed: int = 0,
    storage_options: Mapping[str, Any] | None = None,
    image_storage_options: Mapping[str, Any] | None = None,
    allow_local_uris: bool = False,
) -> Mapping[str, Any]:
    """Write a page of the largest changes from one table to another, and return a summary as `write_gallery` does.

    Raises InputError for a table that is none, or two that share no image.
    """
    options = storage_options or {}
    tables = open_table(table_url, options), open_table(other_url, options)
    images = TableImages.of(tables[0], options, image_storage_options, allow_local_uris=allow_local_uris)
    comparison = ask_rows(
        tables[0], lambda first: ask_rows(tables[1], lambda second: compare(first, second, num_pairs, seed))
    )
    labels = _labels(tables)
    page = Page(
        title=f"{labels[0]} and {labels[1]}",
        cards=[pair_card(pair.rows, labels, _NO_KEY, pair.change) for pair in comparison.pairs],
        lines=_compared(comparison, tables, labels),
        scores=["change"],
        layout="pairs",
    )
    keys = [pair.rows[0]["key"] for pair in comparison.pairs]
    return _written(page, keys, images, output, shared_options(absolute(output), tables[0].url, options))


def _completed(rows: pa.Table, table: CaptionTable) -> list[Row]:
    """Return the rows with what the table has of their images; their own columns win."""
    column = _naming(rows)
    names = set(rows.column_names)
    if not rows.num_rows or any(set(schema.names) <= names for schema in (CAPTIONS, FAILURES)):
        return list(rows.to_pylist())
    values = rows.column(column).combine_chunks().drop_null().unique()
    known = ask_rows(table, lambda found: _known(found, column, values))
    by_value = {row[column]: row for row in reversed(known.to_pylist())}
    return [{**by_value.get(row[column], {}), **row} for row in rows.to_pylist()]


def _known(found: TableRows, column: str, values: pa.Array) -> pa.Table:
    return found.with_keys(values.cast(pa.int64()).to_numpy()) if column == "key" else found.of_images(values)


def _naming(rows: pa.Table) -> str:
    """Return the column that says whose pictures to show. Raises InputError where none is, or none that can be."""
    naming = [column for column in _NAMING if column in rows.column_names]
    if not naming:
        raise InputError(
            f"the rows have the columns {', '.join(rows.column_names)}; expected key or image_id among them, which say"
            " whose pictures to show"
        )
    for column in naming:
        kind = rows.schema.field(column).type
        if not (pa.types.is_signed_integer(kind) if column == "key" else pa.types.is_string(kind)):
            raise InputError(f"the rows' {column} is {kind}; expected the table's own, {CAPTIONS.field(column).type}")
    return naming[0]


def _own(names: Sequence[str], images: TableImages) -> list[str]:
    """Return the columns that a query made: what a person asked for, he wants to see."""
    known = {*CAPTIONS.names, *FAILURES.names, *(field.name for field in images.frozen.columns.kept)}
    return [name for name in names if name not in known][:_NUM_OWN]


def _has(column: str, rows: Sequence[Row]) -> bool:
    return any(row.get(column) is not None for row in rows)


def _id(row: Row) -> str:
    return str(row.get("image_id") or "")


def _written(
    page: Page, keys: Sequence[int | None], images: TableImages, output: str, options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Write a page whose cards have no pictures yet, with those of their keys in the room that its texts leave."""
    wanted = [key for key in keys if key is not None]
    seen = thumbnails(images, wanted, page_bytes=len(page_html(page).encode()))
    cards = [
        card if key is None else replace(card, picture=seen[key]) for card, key in zip(page.cards, keys, strict=True)
    ]
    size_bytes = write_page(replace(page, cards=cards), output, options)
    missing = Counter(str(picture.reason) for picture in seen.values() if isinstance(picture, Reject))
    return {
        "rows": len(page.cards),
        "pictures": len(seen) - missing.total(),
        "pictures_missing_by_reason": dict(missing),
        "size_bytes": size_bytes,
        "output": redact(absolute(output)),
    }


# What it says of itself


def _title(table: CaptionTable) -> str:
    return name(redact(table.url)) or redact(table.url)


def _labels(tables: tuple[CaptionTable, CaptionTable]) -> tuple[str, str]:
    """Return short names of two tables that differ."""
    first, second = (_title(table) for table in tables)
    return (first, second) if first != second else (redact(tables[0].url), redact(tables[1].url))


def _made_by(table: CaptionTable) -> list[str]:
    identity = table.identity() or {}
    model, images = (identity.get("model") or {}).get("name"), identity.get("input")
    if not model or not images:
        return []
    return [f"Captioned by {name(model) if model.startswith('/') else model} from {images}."]


def _compared(comparison: Comparison, tables: tuple[CaptionTable, CaptionTable], labels: tuple[str, str]) -> list[str]:
    share = comparison.num_changed / max(1, comparison.num_compared)
    lines = [
        f"Of {comparison.num_compared:,} captions compared, {comparison.num_changed:,} differ ({share:.0%});"
        f" the {len(comparison.pairs):,} with the largest changes come first."
    ]
    if comparison.num_without_pair:
        lines.append(f"{comparison.num_without_pair:,} more are not in {labels[1]}.")
    for setting, before, now in settings_that_differ(*tables):
        lines.append(f"{setting}: {before} in {labels[0]}, {now} in {labels[1]}.")
    return lines
