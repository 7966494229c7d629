"""What `jobs/gallery.py` does: rows of a caption table, their pictures fetched again, on one page.

write_gallery(rows, "doubtful.html", table_url="s3://bucket/captions", title="The most doubtful captions")
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from captioner.config import GalleryConfig
from captioner.errors import InputError
from captioner.gallery.caption_cards import SCORES, Row, caption_card, pair_card
from captioner.gallery.comparison import Comparison, compare, settings_that_differ
from captioner.gallery.page import Page, write_page
from captioner.gallery.pictures import Picture, Pictures
from captioner.gallery.table_rows import TableRows
from captioner.rows import Reject, RejectReason
from captioner.sources.faults import output_errors
from captioner.sources.urls import absolute, name, redact, scheme
from captioner.tables import CaptionTable

__all__ = ["gallery", "write_gallery"]

_NO_KEY = Reject(RejectReason.MISSING, "the table has no such image")


def gallery(config: GalleryConfig) -> Mapping[str, Any]:
    """Write the page and return its summary. Raises InputError where no table is, or tables share no image."""
    table = _open(config.table, config.storage_options)
    rows = TableRows.of(table)
    pictures = Pictures.of(
        table, config.storage_options, config.image_storage_options, allow_local_uris=config.allow_local_uris
    )
    if config.compare:
        other = _open(config.compare, config.storage_options)
        comparison = compare(rows, TableRows.of(other), config.sample, config.seed)
        page, seen = _comparison_page(comparison, (table, other), pictures)
    else:
        sample = rows.draw(config.sample, config.seed)
        line = _sampled(sample.num_rows, rows, config.seed)
        page, seen = _page(sample.to_pylist(), _title(table), [line, *_made_by(table)], pictures)
    return _write(page, seen, config.output, table, config.storage_options)


def write_gallery(
    rows: pa.Table,
    output: str,
    *,
    table_url: str,
    storage_options: Mapping[str, Any] | None = None,
    title: str = "",
    lines: Sequence[str] = (),
) -> Mapping[str, Any]:
    """Write a page of `rows`, in their order, and return a summary: rows, pictures, size_bytes, output.

    rows: any columns, `key` or `image_id` of the table among them; what else the table knows of these images is added.
    `storage_options` are the table's, and those of `output` and the images where they are on the same kind of store.
    `lines` stand below the title. Raises InputError for a table that is none, or rows that name no image.
    """
    options = storage_options or {}
    table = _open(table_url, options)
    found = _completed(rows, TableRows.of(table))
    pictures = Pictures.of(table, options)
    page, seen = _page(found, title or _title(table), [*lines, *_made_by(table)], pictures)
    return _write(page, seen, output, table, options)


def _open(url: str, storage_options: Mapping[str, Any]) -> CaptionTable:
    table = CaptionTable(absolute(url), storage_options)
    with output_errors(table.url):
        if table.identity() is None:
            raise InputError(f"{redact(table.url)} is no caption table; expected the OUTPUT of jobs/caption.py")
    return table


def _completed(rows: pa.Table, table: TableRows) -> list[Row]:
    """Return the rows with what the table has of their images; their own columns win."""
    column = next((name for name in ("key", "image_id") if name in rows.column_names), None)
    if column is None:
        raise InputError(
            f"the rows have the columns {', '.join(rows.column_names)}; expected key or image_id among them, which say"
            " whose pictures to show"
        )
    values = rows.column(column).combine_chunks().drop_null().unique()
    if column == "key" and not pa.types.is_integer(values.type):
        raise InputError(f"the rows' key is {values.type}; expected the table's own, an int64")
    known = table.with_keys(values.cast(pa.int64()).to_numpy()) if column == "key" else table.of_images(values)
    by_value = {row[column]: row for row in reversed(known.to_pylist())}
    return [{**by_value.get(row[column], {}), **row} for row in rows.to_pylist()]


# What stands on the page


def _page(rows: Sequence[Row], title: str, lines: Sequence[str], pictures: Pictures) -> tuple[Page, list[Picture]]:
    keys = [row["key"] for row in rows if row.get("key") is not None and row.get("reason") is None]
    found = pictures.get(keys)
    cards = [caption_card(row, found.get(row.get("key", -1), _NO_KEY)) for row in rows]
    scores = [score for score in SCORES[:2] if any(row.get(score) is not None for row in rows)]
    return Page(title=title, cards=cards, lines=lines, scores=scores), list(found.values())


def _comparison_page(
    comparison: Comparison, tables: tuple[CaptionTable, CaptionTable], pictures: Pictures
) -> tuple[Page, list[Picture]]:
    labels = _labels(tables)
    keys = [pair.rows[0]["key"] for pair in comparison.pairs]
    found = pictures.get(keys)
    cards = [
        pair_card(pair.rows, labels, found[key], pair.change) for key, pair in zip(keys, comparison.pairs, strict=True)
    ]
    page = Page(
        title=f"{labels[0]} and {labels[1]}",
        cards=cards,
        lines=list(_compared(comparison, tables, labels)),
        scores=["change"],
        layout="pairs",
    )
    return page, list(found.values())


def _write(
    page: Page, pictures: Sequence[Picture], output: str, table: CaptionTable, options: Mapping[str, Any]
) -> Mapping[str, Any]:
    is_shared = scheme(absolute(output)) == scheme(table.url)
    size_bytes = write_page(page, output, options if is_shared else {})
    missing = Counter(str(picture.reason) for picture in pictures if isinstance(picture, Reject))
    return {
        "rows": len(page.cards),
        "pictures": len(pictures) - missing.total(),
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


def _sampled(num_rows: int, rows: TableRows, seed: int) -> str:
    failures = f" and {rows.num_failures:,} failed attempts" if rows.num_failures else ""
    whole = f"{rows.num_captions:,} captions{failures}"
    if num_rows >= rows.num_captions + rows.num_failures:
        return f"{whole}: the whole table."
    return f"{num_rows:,} of {whole}, drawn at random (seed {seed})."


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
