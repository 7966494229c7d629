"""What `jobs/gallery.py` does: a sample, the rows of a query, or two tables beside each other, on one page."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from captioner.config import GalleryConfig
from captioner.gallery import write_comparison, write_gallery
from captioner.gallery.table_rows import TableRows, ask_rows
from captioner.prompts import CAPTION
from captioner.query.views import ask, select
from captioner.storage import Location
from captioner.tables import open_table

__all__ = ["gallery"]


def gallery(config: GalleryConfig) -> Mapping[str, Any]:
    """Write the page and return its summary. Raises InputError where no table is, or tables share no image,
    ConfigError for a prompt that a table has not."""
    shown: Mapping[str, Any] = {
        "column": config.caption_column or CAPTION,
        "storage_options": config.storage_options,
        "image_access": config.image_access,
    }
    if config.compare:
        return write_comparison(
            config.table, config.compare, config.output, num_pairs=config.sample, seed=config.seed, **shown
        )
    rows, line = _query(config) if config.query else _sample(config)
    return write_gallery(
        rows,
        config.output,
        table_url=config.table,
        lines=[line],
        references=config.references,
        reference_column=config.reference_column,
        **shown,
    )


def _query(config: GalleryConfig) -> tuple[pa.Table, str]:
    """Return the first rows of the query, and how they were chosen. Raises ConfigError for SQL that is wrong."""
    sql = config.query or ""
    table = open_table(Location(config.table, config.storage_options))
    rows = ask(table, lambda found: select(found, sql).limit(config.sample + 1).to_arrow_table(), sql)
    more = f"The first {config.sample:,} rows of: " if rows.num_rows > config.sample else ""
    return rows.slice(0, config.sample), more + sql


def _sample(config: GalleryConfig) -> tuple[pa.Table, str]:
    """Return rows drawn at random, and how they were chosen."""
    return ask_rows(open_table(Location(config.table, config.storage_options)), lambda rows: _drawn(rows, config))


def _drawn(rows: TableRows, config: GalleryConfig) -> tuple[pa.Table, str]:
    sample = rows.draw(config.sample, config.seed)
    num_rows = rows.num_captions + rows.num_failures
    failures = f" and {rows.num_failures:,} failed attempts" if rows.num_failures else ""
    whole = f"{rows.num_captions:,} captions{failures}"
    if not num_rows:
        return sample, "The table has no rows yet."
    if config.sample >= num_rows:
        return sample, f"{whole}: the whole table."
    return sample, f"{sample.num_rows:,} of {whole}, drawn at random (seed {config.seed})."
