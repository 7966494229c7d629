"""What one export was asked for, in the terms of its table, and the contract of a format.

A format is a file in `formats` and an entry of `formats.table.EXPORT_FORMATS`. It says which columns it needs, as SQL
over `captions`, and writes one file, or some, from the rows of one shard. Knows no SQL engine and no table.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

import pyarrow as pa

from captioner.config import ExportConfig
from captioner.export.images import ImageSource
from captioner.query.views import quoted
from captioner.storage import Location, Store, open_store
from captioner.storage.whole_files import write_whole
from captioner.tables import CaptionTable, ColumnFamily

__all__ = ["DEFAULT_TEXT", "ExportFormat", "Outcome", "Refusal", "Request", "Shard"]

T = TypeVar("T")
DEFAULT_TEXT = "{caption}"


class Refusal:
    """Why a row is not in what was written; counted in the summary and in `_export.json`."""

    NO_TEXT = "no_text"
    ESCAPES = "name_leaves_the_folder"
    TAKEN = "name_taken"
    UNUSABLE = "name_unusable"
    NO_FILE = "image_is_no_file"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for. Can be pickled."""

    config: ExportConfig
    output: Location
    kinds: Mapping[str, str]
    """Column of `captions` -> its type in SQL."""

    text: str
    """SQL of the one text of an image."""

    texts: str
    """SQL of all its texts, a list."""

    images: ImageSource
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Run -> the prompt that it was given."""

    added: Sequence[str] = ()
    """The prompts that were added later whose answers are exported."""

    folder: str = ""
    """The INPUT of the table, below which names begin where it is a folder."""

    @property
    def columns(self) -> list[str]:
        """The columns of `captions` that are exported."""
        return list(self.config.columns or self.kinds)

    def selected(self) -> dict[str, str]:
        """Return SQL of each exported column, the text among them where it is not the caption as it is."""
        own = {"text": self.text} if self.config.text != DEFAULT_TEXT else {}
        several = {"captions": self.texts} if self.config.captions == "all" else {}
        return {**{name: quoted(name) for name in self.columns}, **own, **several}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the rows of one shard."""

    number: int
    rows: int
    """Rows that are in the files."""

    refused: Mapping[str, int]
    files: Mapping[str, int]
    """Name below OUT -> size in bytes; empty where the format has a file an image."""


@dataclass
class Shard:
    """The rows of one file, on their way there. `rows` can be read once."""

    request: Request
    number: int
    batches: Iterator[pa.RecordBatch]
    num_rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    files: dict[str, int] = field(default_factory=dict)
    _store: Store | None = None

    @property
    def rows(self) -> Iterator[pa.RecordBatch]:
        """The rows, in batches of the columns that the format asked for, in the order of their keys."""
        for batch in self.batches:
            self.num_rows += batch.num_rows
            yield batch

    def schema(self) -> pa.Schema:
        """Return the schema of the batches, of which there is one at least."""
        schema: pa.Schema = self.first.schema
        return schema

    @property
    def first(self) -> pa.RecordBatch:
        """The first batch, which is still to come."""
        first = next(self.batches)
        self.batches = itertools.chain([first], self.batches)
        return first

    @property
    def store(self) -> Store:
        """The store of OUT."""
        if self._store is None:
            self._store = open_store(self.request.output)
        return self._store

    def publish(self, name: str, write: Callable[[IO[bytes]], T]) -> T:
        """Write the file `name` below OUT, whole or not at all. Raises StoreError."""

        def counted(file: IO[bytes]) -> T:
            result = write(file)
            self.files[name] = file.tell()
            return result

        return write_whole(self.store, self.request.output / name, counted)

    def outcome(self) -> Outcome:
        """Return what became of the rows."""
        rows = self.num_rows - self.refused.total()
        return Outcome(number=self.number, rows=rows, refused=dict(self.refused), files=self.files)


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A form that captions are written in."""

    name: str
    help: str
    """What is written, for the help page."""

    columns: Callable[[Request], Mapping[str, str]] = lambda _: {}
    """Returns name -> SQL over `captions` of what `write` needs. `key` comes first by itself.

    Raises ConfigError for a column that the format cannot hold; asked before anything is written."""

    write: Callable[[Shard], None] = lambda _: None
    """Writes the files of a shard. The same rows give the same bytes. Raises StoreError."""

    file: str = ""
    """Name of a shard's last file below OUT, with its number: `captions-{:05d}.jsonl`; empty for a file an image."""

    rows_per_file: int = 1_000_000
    has_columns: bool = False
    """Whether --columns has a meaning."""

    has_several: bool = False
    """Whether an image may have several captions (--captions all)."""

    reads_images: bool = False
    """Whether it can hold images (--no-images leaves them out)."""

    goes_to_hub: bool = False
    """Whether OUT is a data set that --push-to-hub can upload."""

    needs: tuple[str, str] | None = None
    """A package that it imports, and the extra of this package that brings it."""

    needs_prompts: bool = False
    """Whether it says what was asked of each image, so that the prompt of each run is read."""

    register: Callable[[Request, CaptionTable, ColumnFamily, Sequence[str]], Mapping[str, Any]] | None = None
    """In place of `write`: gives the parts of a column family themselves to another catalogue, by their URLs.

    Returns counts."""

    def file_of(self, number: int) -> str:
        """Return the name of a shard's last file."""
        return self.file.format(number)
