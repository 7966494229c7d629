"""Captions of images, read from any of the formats that people keep them in.

A format is one reader and one entry of CAPTION_FORMATS. Knows no metric, and not which images belong together.
"""

from captioner.evaluation.caption_files.formats import (
    CAPTION_FORMATS,
    CaptionFormat,
    caption_format_of,
    describe_caption_formats,
    has_suffix,
    list_suffixes,
)
from captioner.evaluation.caption_files.reading import read_captions, read_records
from captioner.evaluation.caption_files.records import (
    CAPTION_COLUMN_NAMES,
    SCORED_COLUMN,
    CaptionRow,
    ColumnNames,
    Record,
    image_name,
    texts_of,
)

__all__ = [
    "CAPTION_COLUMN_NAMES",
    "CAPTION_FORMATS",
    "SCORED_COLUMN",
    "CaptionFormat",
    "CaptionRow",
    "ColumnNames",
    "Record",
    "caption_format_of",
    "describe_caption_formats",
    "has_suffix",
    "image_name",
    "list_suffixes",
    "read_captions",
    "read_records",
    "texts_of",
]
