"""Rows of labels, as readers of any format yield them. Knows no format, and not which rows belong to one image."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from captioner.config import InputConfig, LabelsConfig
from captioner.evaluation.caption_files import CAPTION_COLUMN_NAMES, ColumnNames
from captioner.inputs import Frozen
from captioner.inputs.access import with_home
from captioner.training.labels.splits import split_of_file

__all__ = [
    "IMAGE_ID",
    "LabelFiles",
    "LabelRow",
    "access_of",
    "caption_column_names",
    "label_columns",
    "splits_of_files",
]

IMAGE_ID = "image_id"
"""Column that names an image."""

_FILE_NAMES = (
    *("uri", "url", "image", "image_path", "image_url", "img_path", "file_name", "filename", "file_path", "filepath"),
    *("file", "path"),
)


class LabelRow(NamedTuple):
    """One row as its file has it: an image and some of its captions, or a `problem`."""

    image_id: str = ""
    source: str = ""
    uri: str | None = None
    key: int | None = None
    captions: Sequence[str] = ()
    split: str = ""
    left_out: str = ""
    problem: str = ""
    detail: str = ""
    digest: str = ""
    """Of the image's bytes, where another image may have its name."""

    is_named: bool = True
    """Whether the file names the image; else its place in the file is its name."""


def access_of(config: LabelsConfig, **columns: Any) -> InputConfig:
    """Return how images and files of LABELS are opened; `columns` as of InputConfig."""
    access = InputConfig(
        storage_options=config.storage_options,
        allow_local_uris=config.allow_local_uris,
        deny_private_hosts=config.deny_private_hosts,
        **columns,
    )
    return with_home(access, config.labels_path)


class LabelFiles(NamedTuple):
    """The rows of all files, and how their images are read: those without a URI are rows of the frozen input."""

    location: str
    access: InputConfig
    rows: Iterator[LabelRow]
    frozen: Frozen | None = None


def label_columns(config: LabelsConfig) -> ColumnNames:
    """Return the columns to read from rows that name their images."""
    return ColumnNames(
        image_id=(IMAGE_ID,),
        captions=caption_column_names(config, (*CAPTION_COLUMN_NAMES, "text")),
        file_name=_FILE_NAMES if config.image_column is None else (config.image_column,),
        split=(config.split_column or "split",),
        flags={field: flag for field, (flag, column) in _flags(config).items() if column is not None},
        expected="a column with images and one with captions: name them with --image-column and --caption-column",
    )


def caption_column_names(config: LabelsConfig, default: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that may hold captions, the likeliest first."""
    return tuple(default) if config.caption_column is None else (config.caption_column,)


def splits_of_files(files: Sequence[str]) -> dict[str, str]:
    """Return the split of each file whose name says it. Empty for one file, and where no file is for training."""
    found = {url: str(split) for url in files if (split := split_of_file(url))}
    return found if len(files) > 1 and "train" in found.values() else {}


def _flags(config: LabelsConfig) -> dict[str, tuple[str, str | None]]:
    """Return the flag that names the column of each field, and the name that it was given."""
    return {
        "file_name": ("--image-column", config.image_column),
        "captions": ("--caption-column", config.caption_column),
        "split": ("--split-column", config.split_column),
    }
