"""What `jobs/query.py` does: rows by `captioner.query`, or a page of images where --out asks for one."""

from collections.abc import Mapping
from typing import Any

from captioner.config import MAX_CARDS, QueryConfig
from captioner.gallery.gallery import write_gallery
from captioner.query import query
from captioner.query.query import first_rows
from captioner.storage import Location
from captioner.tables import open_table

__all__ = ["query_or_page"]


def query_or_page(config: QueryConfig) -> Mapping[str, Any]:
    """Do what the flags ask for and return the summary, empty where stdout was given the rows.

    Raises InputError where no table is or a part is damaged, ConfigError for SQL that is wrong."""
    return _write_page(config) if config.is_gallery else query(config)


def _write_page(config: QueryConfig) -> Mapping[str, Any]:
    table = open_table(Location(config.table, config.storage_options))
    rows = first_rows(table, config, MAX_CARDS)
    is_cut = rows.num_rows > MAX_CARDS
    return write_gallery(
        rows.slice(0, MAX_CARDS),
        config.out,
        table_url=config.table,
        storage_options=config.storage_options,
        image_access=config.image_access,
        title=config.sql or f"The {rows.num_rows:,} most doubtful captions",
        lines=[f"The first {MAX_CARDS:,} rows: a page holds no more."] if is_cut else [],
    )
