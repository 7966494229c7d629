"""What a job reads: image files on any store, lists of URIs, Parquet tables and tar shards.

    frozen = load_frozen(run_folder) or freeze(input_path, config.input, run_folder)
    for unit in frozen.units:
        for table in read_unit(unit, frozen.columns, config.input, run_folder=run_folder, done=done.get(unit.ordinal)):
            ...                                    # source_schema(frozen.columns.kept)
    outcomes = Fetcher(config.input_path, config.input, config.image).fetch(uris)

Knows stores and file formats; does not know what an image is, nor Ray, nor the model.
"""

from captioner.inputs.blocks import MAX_BLOCK_BYTES, Limits
from captioner.inputs.fetching import Fetcher
from captioner.inputs.freezing import check_input, freeze
from captioner.inputs.listing import ROWS_PER_LISTING, listed_ids
from captioner.inputs.outages import OutageDetector
from captioner.inputs.reading import count_images, empty_columns, read_unit
from captioner.inputs.refreshing import Refreshed, refresh, revisit
from captioner.inputs.selection import describe
from captioner.inputs.suffixes import is_image_name
from captioner.inputs.units import (
    Columns,
    Frozen,
    Unit,
    load_frozen,
    num_further_images,
    save_count,
    save_further,
)

__all__ = [
    "MAX_BLOCK_BYTES",
    "ROWS_PER_LISTING",
    "Columns",
    "Fetcher",
    "Frozen",
    "Limits",
    "OutageDetector",
    "Refreshed",
    "Unit",
    "check_input",
    "count_images",
    "describe",
    "empty_columns",
    "freeze",
    "is_image_name",
    "listed_ids",
    "load_frozen",
    "num_further_images",
    "read_unit",
    "refresh",
    "revisit",
    "save_count",
    "save_further",
]
