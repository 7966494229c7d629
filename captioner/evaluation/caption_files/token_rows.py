"""Captions in the lists of Flickr8k and Flickr30k."""

from collections.abc import Iterator

from captioner.evaluation.caption_files.records import ColumnNames, Record
from captioner.inputs.text_files import open_text
from captioner.storage import Store
from captioner.storage.urls import shown

__all__ = ["read_token_rows"]


def read_token_rows(store: Store, url: str, wanted: ColumnNames) -> Iterator[Record]:
    """Yield the captions of Flickr8k's and Flickr30k's lists: `name.jpg#0`, a tab, a caption."""
    del wanted  # the format has no columns
    with open_text(store, url) as lines:
        for number, line in enumerate(lines, 1):
            key, tab, caption = line.rstrip("\r\n").partition("\t")
            file_name, mark, _ = key.rpartition("#")
            if tab and mark:
                yield Record(file_name, caption, file_name)
            elif line.strip():
                seen = f"{shown(url)}, line {number} is {line.strip()[:40]!r}"
                yield Record(problem=f"{seen}; expected `name.jpg#0`, a tab, a caption")
