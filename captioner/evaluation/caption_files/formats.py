"""Every format of captions: to add one, write its reader and enter it in CAPTION_FORMATS."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from captioner.evaluation.caption_files.delimited_rows import read_delimited_rows
from captioner.evaluation.caption_files.json_rows import read_json_lines, read_json_rows
from captioner.evaluation.caption_files.parquet_rows import read_parquet_rows
from captioner.evaluation.caption_files.records import ColumnNames, Record
from captioner.evaluation.caption_files.token_rows import read_token_rows
from captioner.storage import Store
from captioner.storage.urls import name, suffix

__all__ = [
    "CAPTION_FORMATS",
    "CaptionFormat",
    "caption_format_of",
    "describe_caption_formats",
    "has_suffix",
    "list_suffixes",
]


@dataclass(frozen=True)
class CaptionFormat:
    """A kind of file that holds captions of images."""

    name: str
    suffixes: tuple[str, ...]
    """Ends of the names of such files, in lower case."""

    read: Callable[[Store, str, ColumnNames], Iterator[Record]]
    """Yields the rows of the file at a URL. Raises InputError for a file that is not of this format, StoreError."""

    help: str
    """What such a file holds, for the help page."""

    has_split_lists: bool = False
    """Whether files beside it may list the images of each split, as Flickr8k's do."""


CAPTION_FORMATS = {
    entry.name: entry
    for entry in (
        CaptionFormat("parquet", (".parquet", ".pq"), read_parquet_rows, "Parquet"),
        CaptionFormat("csv", (".csv",), partial(read_delimited_rows, delimiter=","), "CSV with a header"),
        CaptionFormat("tsv", (".tsv",), partial(read_delimited_rows, delimiter="\t"), "TSV with a header"),
        CaptionFormat("jsonl", (".jsonl", ".ndjson"), read_json_lines, "a JSON object a line"),
        CaptionFormat(
            "json", (".json",), read_json_rows, "COCO's captions or results, Karpathy's datasets, LLaVA's conversations"
        ),
        CaptionFormat(
            "token", (".token", ".token.txt"), read_token_rows, "lists of Flickr8k and Flickr30k", has_split_lists=True
        ),
    )
}


def caption_format_of(url: str) -> CaptionFormat | None:
    """Return the format of a file by its name; None for an unknown one."""
    return next((entry for entry in CAPTION_FORMATS.values() if has_suffix(url, entry.suffixes)), None)


def has_suffix(url: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file's name ends so; a suffix may have several dots."""
    return suffix(url) in suffixes or name(url).lower().endswith(suffixes)


def list_suffixes() -> str:
    """Return every suffix, for an error message."""
    return ", ".join(ending for entry in CAPTION_FORMATS.values() for ending in entry.suffixes)


def describe_caption_formats() -> str:
    """Return the help on files of captions: the suffixes and the content of each format."""
    entries = ", ".join(f"{' or '.join(entry.suffixes)} ({entry.help})" for entry in CAPTION_FORMATS.values())
    return f"Captions and references are read from {entries}, or a folder of .parquet."
