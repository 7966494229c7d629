"""Every format of labels: to add one, write its reader and enter it in LABEL_FORMATS."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from captioner.config import LabelsConfig
from captioner.evaluation.caption_files import CAPTION_FORMATS, has_suffix
from captioner.inputs.suffixes import TAR_SUFFIXES
from captioner.training.labels.caption_tables import read_caption_table
from captioner.training.labels.named_images import read_named_images
from captioner.training.labels.parquet_images import read_parquet_images
from captioner.training.labels.rows import LabelFiles
from captioner.training.labels.tar_samples import read_tar_samples
from captioner.training.labels.text_files import read_text_files

__all__ = ["LABEL_FORMATS", "LabelFormat", "describe_label_formats", "label_format_of"]

Read = Callable[[LabelsConfig, str, Mapping[str, Any] | None], LabelFiles]


@dataclass(frozen=True)
class LabelFormat:
    """A kind of file that holds images, or names of images, with captions."""

    name: str
    """Name in --labels-format."""

    suffixes: tuple[str, ...]
    """Ends of the names of such files, in lower case."""

    read: Read
    """Returns the rows of LABELS, given the folder of the run and the options of its store. Raises InputError for files
    that are not of this format, StoreError."""

    help: str
    """What such a file holds, for the help page."""

    may_fill_folder: bool = False
    """Whether a folder of such files may be LABELS; of several such formats the one with most files is read."""


def _naming_images(name: str, help: str, *, may_fill_folder: bool = False) -> LabelFormat:  # noqa: A002 - as the field
    """Return the entry of a format of captions whose rows name their images."""
    captions = CAPTION_FORMATS[name]
    read = partial(read_named_images, read_as=captions)
    return LabelFormat(name, captions.suffixes, read, help, may_fill_folder=may_fill_folder)


LABEL_FORMATS = {
    entry.name: entry
    for entry in (
        LabelFormat(
            "parquet",
            CAPTION_FORMATS["parquet"].suffixes,
            read_parquet_images,
            "images as bytes, struct<bytes, path> or URIs",
            may_fill_folder=True,
        ),
        LabelFormat(
            "webdataset", TAR_SUFFIXES, read_tar_samples, "samples with a .txt or a .json", may_fill_folder=True
        ),
        _naming_images("csv", "names of images"),
        _naming_images("tsv", "names of images"),
        _naming_images("jsonl", "names of images", may_fill_folder=True),
        _naming_images("json", "COCO's or Karpathy's"),
        _naming_images("token", "Flickr8k's, with its split lists beside"),
        LabelFormat("table", (), read_caption_table, "the OUTPUT of a caption job, or what --where selects of it"),
        LabelFormat(
            "txt",
            (".txt",),
            read_text_files,
            "in a folder, NAME.txt for each NAME.jpg, a caption a line",
            may_fill_folder=True,
        ),
    )
}


def label_format_of(url: str) -> LabelFormat | None:
    """Return the format of a file by its name; None for an unknown one."""
    return next((entry for entry in LABEL_FORMATS.values() if has_suffix(url, entry.suffixes)), None)


def describe_label_formats() -> str:
    """Return the help on LABELS: name, suffixes and content of each format."""
    entries = "; ".join(
        f"{entry.name}: {' or '.join(entry.suffixes) or 'a folder'}, {entry.help}" for entry in LABEL_FORMATS.values()
    )
    return f"--labels-format takes auto (by the name of LABELS) or one of these. {entries}."
