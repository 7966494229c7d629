"""Pages of a caption table: rows and their images, or two tables beside each other.

write_gallery(rows, "doubtful.html", table_url="s3://bucket/captions", title="The most doubtful captions")
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from captioner.config import ImageAccessConfig
from captioner.errors import InputError
from captioner.gallery.caption_cards import CHANGED, SAME, Row, caption_card, pair_card
from captioner.gallery.comparison import Comparison, compare
from captioner.gallery.page import Page, page_html, write_page
from captioner.gallery.page_images import thumbnails
from captioner.gallery.references import references_of
from captioner.gallery.shown_column import check_is_prompt, with_texts_of
from captioner.gallery.table_rows import TableRows, ask_rows
from captioner.gallery.wording import COMPLETE, doubt_words, model_name
from captioner.prompts import CAPTION
from captioner.schema import CAPTIONS, FAILURES, SCORES, Reject, RejectReason, captions_schema
from captioner.storage import Location
from captioner.tables import CaptionTable, open_table
from captioner.tables.identity import settings_that_differ
from captioner.tables.table_images import TableImages
from captioner.terminal import counted, say

__all__ = ["write_comparison", "write_gallery"]

_NO_IMAGE = Reject(RejectReason.MISSING, "the table has no such image")
_NAMING = ("key", "image_id")
_NUM_OWN = 3  # columns of a query that each card shows


def write_gallery(
    rows: pa.Table,
    output: str,
    *,
    table_url: str,
    storage_options: Mapping[str, Any] | None = None,
    image_access: ImageAccessConfig | None = None,
    title: str = "",
    lines: Sequence[str] = (),
    column: str = CAPTION,
    references: str | None = None,
    reference_column: str = "",
) -> Mapping[str, Any]:
    """Write a page of `rows`, in their order, and return its summary.

    rows: any columns, `key` or `image_id` of the table among them; what else the table knows of these images is added,
    and each card shows the columns that the table does not have. `storage_options` are the table's, and those of
    `output`, `references` and the images where they are on the same kind of store. `lines` come below the title.
    column: the prompt whose answers stand in place of the captions; reference_column: of `references`.
    Raises InputError for a table that is none, or rows that name no image, ConfigError for a prompt that it has not.
    """
    options = storage_options or {}
    table = open_table(Location(table_url, options))
    check_is_prompt(column, table)
    images = TableImages.of(table, image_access)
    found = [with_texts_of(column, row) for row in _completed(rows, table, column)]
    named = [_id(row) for row in found]
    texts = references_of(named, references, options, reference_column) if references and found else {}
    paths = images.paths([row["key"] for row in found if row.get("key") is not None])
    page = Page(
        title=title or _title(table),
        cards=[
            caption_card(row, _NO_IMAGE, texts.get(_id(row), ()), paths.get(row.get("key", -1), "")) for row in found
        ],
        lines=[*_shown(column), *lines, *_made_by(table)],
        scores=[*_own(rows, table, images), *(score for score in SCORES[:2] if _has(score, found))],
        quiet_tags=[COMPLETE],
    )
    keys = [None if row.get("reason") is not None else row.get("key") for row in found]
    return _write(page, keys, images, table.location.beside(output))


def write_comparison(
    table_url: str,
    other_url: str,
    output: str,
    *,
    num_pairs: int,
    seed: int = 0,
    column: str = CAPTION,
    storage_options: Mapping[str, Any] | None = None,
    image_access: ImageAccessConfig | None = None,
) -> Mapping[str, Any]:
    """Write a page of the largest changes from one table to another, and return a summary as `write_gallery` does.

    column: the prompt whose answers stand in place of the captions. Raises InputError for a table that is none, or two
    that share no image, ConfigError for a prompt that one of them has not.
    """
    options = storage_options or {}
    tables = open_table(Location(table_url, options)), open_table(Location(other_url, options))
    for table in tables:
        check_is_prompt(column, table)
    images = TableImages.of(tables[0], image_access)
    comparison = ask_rows(
        tables[0],
        lambda first: ask_rows(tables[1], lambda second: compare(first, second, num_pairs, seed, column=column)),
    )
    labels, keys = _labels(tables), [pair.rows[0]["key"] for pair in comparison.pairs]
    paths = images.paths(keys)
    page = Page(
        title=f"{labels[0]} and {labels[1]}",
        cards=[
            pair_card(pair.rows, labels, _NO_IMAGE, pair.change, paths.get(key, ""))
            for pair, key in zip(comparison.pairs, keys, strict=True)
        ],
        lines=[*_shown(column), *_compared(comparison, tables, labels, column)],
        scores=["change"],
        quiet_tags=[CHANGED, SAME, COMPLETE],
        layout="pairs",
    )
    return _write(page, keys, images, tables[0].location.beside(output))


def _completed(rows: pa.Table, table: CaptionTable, column: str) -> list[Row]:
    """Return the rows with what the table has of their images, `column` among it; their own columns win."""
    naming = _naming(rows)
    names = set(rows.column_names)
    wanted = [{*CAPTIONS.names, column}, set(FAILURES.names)]
    if not rows.num_rows or any(needed <= names for needed in wanted):
        return list(rows.to_pylist())
    values = rows.column(naming).combine_chunks().drop_null().unique()
    known = ask_rows(table, lambda found: _known(found, naming, values))
    by_value = {row[naming]: row for row in reversed(known.to_pylist())}
    return [{**by_value.get(row[naming], {}), **row} for row in rows.to_pylist()]


def _known(found: TableRows, column: str, values: pa.Array) -> pa.Table:
    return found.with_keys(values.cast(pa.int64()).to_numpy()) if column == "key" else found.of_images(values)


def _naming(rows: pa.Table) -> str:
    """Return the column that names the images to show. Raises InputError where it is missing or of another type."""
    naming = [column for column in _NAMING if column in rows.column_names]
    if not naming:
        raise InputError(
            f"the rows have the columns {', '.join(rows.column_names)}; expected key or image_id among them, which name"
            " the images to show"
        )
    for column in naming:
        kind = rows.schema.field(column).type
        if not (pa.types.is_signed_integer(kind) if column == "key" else pa.types.is_string(kind)):
            raise InputError(f"the rows' {column} is {kind}; expected the table's own, {CAPTIONS.field(column).type}")
    return naming[0]


def _own(rows: pa.Table, table: CaptionTable, images: TableImages) -> list[str]:
    """Return the first columns that are a query's own: the cards show them, but for doubts, which are tags."""
    ours = captions_schema(images.frozen.columns.kept, table.answers())
    known = {*ours.names, *FAILURES.names}
    if "why" in rows.column_names and all(map(doubt_words, filter(None, rows.column("why").to_pylist()))):
        known.add("why")
    return [name for name in rows.column_names if name not in known][:_NUM_OWN]


def _has(column: str, rows: Sequence[Row]) -> bool:
    return any(row.get(column) is not None for row in rows)


def _id(row: Row) -> str:
    return str(row.get("image_id") or "")


def _write(page: Page, keys: Sequence[int | None], images: TableImages, output: Location) -> Mapping[str, Any]:
    """Write the page with the images of `keys`, one a card, as large as its texts leave room for."""
    wanted = [key for key in keys if key is not None]
    found = thumbnails(images, wanted, page_bytes=len(page_html(page).encode()))
    cards = [
        card if key is None else replace(card, image=found[key]) for card, key in zip(page.cards, keys, strict=True)
    ]
    size_bytes = write_page(replace(page, cards=cards), output)
    missing = Counter(str(image.reason) for image in found.values() if isinstance(image, Reject))
    num_shown, num_bytes = len(found) - missing.total(), f"{size_bytes / 1e6:.1f} MB"
    without = ", ".join(f"{count:,} {reason}" for reason, count in sorted(missing.items()))
    say([f"page      {output}: {counted(len(page.cards), 'card')} with {counted(num_shown, 'image')}, {num_bytes}"])
    say([f"          without their image: {without}"] if without else [])
    if found and not num_shown and images.moved is None:
        say([f"          {images.input_path} was read; if the images lie elsewhere now: --image-root FOLDER"])
    return {
        "rows": len(page.cards),
        "pictures": num_shown,
        "pictures_missing_by_reason": dict(missing),
        "size_bytes": size_bytes,
        "output": str(output),
    }


# Titles and lines


def _title(table: CaptionTable) -> str:
    return table.location.name or str(table.location)


def _labels(tables: tuple[CaptionTable, CaptionTable]) -> tuple[str, str]:
    """Return short names of two tables that differ."""
    first, second = (_title(table) for table in tables)
    return (first, second) if first != second else (str(tables[0].location), str(tables[1].location))


def _shown(column: str) -> list[str]:
    return [] if column == CAPTION else [f"The texts are the answers to the prompt {column}."]


def _made_by(table: CaptionTable) -> list[str]:
    identity = table.identity() or {}
    model, images = (identity.get("model") or {}).get("name"), identity.get("input")
    return [f"Captioned by {model_name(model)} from {images}."] if model and images else []


def _compared(
    comparison: Comparison, tables: tuple[CaptionTable, CaptionTable], labels: tuple[str, str], column: str
) -> list[str]:
    text = "a caption" if column == CAPTION else "an answer"
    lines = [_num_changed(comparison, text), *_num_failed(comparison, labels, text)]
    if comparison.num_without_pair:
        lines.append(f"{comparison.num_without_pair:,} more are not in {labels[1]}.")
    differing = settings_that_differ(*(table.identity() or {} for table in tables))
    return lines + [_setting(*found, labels) for found in _telling(differing)]


def _num_changed(comparison: Comparison, text: str) -> str:
    num_compared, num_changed = comparison.num_compared, comparison.num_changed
    if not num_compared:
        return f"No image has {text} in both tables."
    compared = counted(num_compared, text.split()[1])
    line = f"Of {compared} compared, {num_changed:,} differ ({num_changed / num_compared:.0%})"
    num_shown = sum(all(pair.has_caption) and pair.change > 0 for pair in comparison.pairs)
    if num_shown < num_changed:
        return f"{line}; the {num_shown:,} with the largest changes are here."
    return f"{line}; the largest changes come first." if num_changed > 1 else f"{line}."


def _num_failed(comparison: Comparison, labels: tuple[str, str], text: str) -> list[str]:
    places = (f"in {labels[0]} alone", f"in {labels[1]} alone", "in both")
    counts = [f"{count:,} {place}" for count, place in zip(comparison.num_failed, places, strict=True) if count]
    return [f"Without {text}: {', '.join(counts)}; these come last."] if counts else []


def _telling(differing: Sequence[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Return the settings to tell of: the fingerprint of a model only where its name does not differ."""
    names = {name for name, _, _ in differing}
    return [found for found in differing if found[0] != "model.fingerprint" or "model.name" not in names]


def _setting(setting: str, before: Any, now: Any, labels: tuple[str, str]) -> str:
    if setting == "model.name":
        shown = [model_name(str(value)) for value in (before, now)]
        before, now = shown if shown[0] != shown[1] else (before, now)
    return f"{setting}: {before} in {labels[0]}, {now} in {labels[1]}."
