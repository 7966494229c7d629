"""Where images come from: listings on any store, lists of URIs, Parquet tables and tar shards.

    frozen = load_frozen(run_folder) or freeze(input_path, config.input, run_folder)
    for unit in frozen.units:
        for table in read_unit(unit, frozen.columns, config.input, run_folder=run_folder, done=done.get(unit.ordinal)):
            ...                                    # rows.source_schema(frozen.columns.kept)
    outcomes = Fetcher(config.input_path, config.input, config.image).fetch(uris)

Knows stores and file formats; does not know what an image is, nor Ray, nor the model.
"""

from captioner.sources.blocks import MAX_BLOCK_BYTES, Limits
from captioner.sources.faults import StoreError
from captioner.sources.fetching import Fetcher
from captioner.sources.freezing import freeze
from captioner.sources.listing import ROWS_PER_LISTING, listed_ids
from captioner.sources.reading import count_images, read_unit
from captioner.sources.refreshing import Refreshed, refresh, revisit
from captioner.sources.refusals import Refusals
from captioner.sources.selection import describe
from captioner.sources.store import Entry, Store, open_store
from captioner.sources.units import Columns, Frozen, Unit, load_frozen, save_count
from captioner.sources.urls import absolute, join, redact

__all__ = [
    "MAX_BLOCK_BYTES",
    "ROWS_PER_LISTING",
    "Columns",
    "Entry",
    "Fetcher",
    "Frozen",
    "Limits",
    "Refreshed",
    "Refusals",
    "Store",
    "StoreError",
    "Unit",
    "absolute",
    "count_images",
    "describe",
    "freeze",
    "join",
    "listed_ids",
    "load_frozen",
    "open_store",
    "read_unit",
    "redact",
    "refresh",
    "revisit",
    "save_count",
]
