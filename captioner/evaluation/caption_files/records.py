"""Rows of captions, and the columns that they are read from. Knows no format."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from captioner.errors import InputError

__all__ = ["CAPTION_COLUMN_NAMES", "SCORED_COLUMN", "CaptionRow", "ColumnNames", "Record", "image_name", "texts_of"]

CAPTION_COLUMN_NAMES = ("caption", "captions", "text")
SCORED_COLUMN = "caption"
"""The column of a caption table whose CLIPScore stands in `clip_score`."""


class CaptionRow(NamedTuple):
    """One caption of an image; `file_name` is another name of the image, if the file has one."""

    image_id: str
    caption: str
    file_name: str = ""
    key: int | None = None
    """Row of a caption table; None elsewhere."""

    clip_score: float | None = None


class Record(NamedTuple):
    """One row as its file has it, unchecked. A row that cannot be read has a `problem`."""

    image_id: Any = None
    captions: Any = None
    file_name: Any = None
    split: Any = None
    key: Any = None
    clip_score: Any = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """Which columns to read: of each tuple the first that the file has; an empty one for none."""

    image_id: tuple[str, ...] = ("image_id", "uri", "url", "image", "file_name")
    captions: tuple[str, ...] = CAPTION_COLUMN_NAMES
    file_name: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    clip_score: tuple[str, ...] = ()
    has_image: bool = False
    """Whether each row holds its image, so that no column has to name it."""

    flags: Mapping[str, str] = field(default_factory=dict)
    """Field -> the flag that names its one column, which then must exist."""

    expected: str = "image_id and caption: rename them"
    """Ends the error about a file without a column of images, or of captions."""

    rows_per_batch: int = 8192
    """Rows of a Parquet file that are held at once."""

    def are_in(self, names: Collection[str]) -> bool:
        """Return whether one of the names is a column of captions, and one that of an image."""
        has_image = any(name in names for name in (*self.image_id, *self.file_name))
        return has_image and any(name in names for name in self.captions)

    def choose(self, names: Collection[str], where: str) -> dict[str, str]:
        """Return the column of each field that has one. Raises InputError that lists the file's columns."""
        candidates = {kind: getattr(self, kind) for kind in Record._fields if kind != "problem"}
        found = {kind: next((name for name in these if name in names), None) for kind, these in candidates.items()}
        for kind, flag in self.flags.items():
            if found[kind] is None:
                raise InputError(f"{where} has {', '.join(names)}; expected the column of {flag} {candidates[kind][0]}")
        has_image = self.has_image or found["image_id"] or found["file_name"]
        if found["captions"] is None or not has_image:
            raise InputError(f"{where} has {', '.join(names) or 'no columns'}; expected {self.expected}")
        return {kind: column for kind, column in found.items() if column is not None}


def texts_of(captions: Any) -> list[str] | None:
    """Return one caption or several as texts, a null as an empty one; None for what is neither."""
    texts = captions if isinstance(captions, list) else [captions]
    return [text or "" for text in texts] if all(isinstance(text, str | None) for text in texts) else None


def image_name(value: Any) -> str:
    """Return the id as text, empty for what cannot be one; 400.0 is 400 (pandas writes it so beside a null)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
