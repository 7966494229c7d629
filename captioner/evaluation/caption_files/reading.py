"""Captions by image id from any file, row by row; `demo` gives those of the embedded images.

`read_records` gives rows as they are, with the columns that the caller names; `read_captions` checks them. Reads from
any store. Knows no metric, and not which images belong together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from captioner import demo
from captioner.demo.scenes import scene_at
from captioner.errors import InputError, JobError
from captioner.evaluation.caption_files.formats import CaptionFormat, caption_format_of, list_suffixes
from captioner.evaluation.caption_files.parquet_rows import read_parquet_rows
from captioner.evaluation.caption_files.records import (
    SCORED_COLUMN,
    CaptionRow,
    ColumnNames,
    Record,
    image_name,
    texts_of,
)
from captioner.storage import Entry, Store, open_store
from captioner.storage.faults import StoreError
from captioner.storage.urls import absolute, join, shown, suffix

__all__ = ["read_captions", "read_records"]

_FOR_EVALUATION = ColumnNames(key=("key",), clip_score=("clip_score",))


def read_captions(
    path: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    column: tuple[str, str] | None = None,
    rows_per_batch: int = 8192,
) -> Iterator[CaptionRow]:
    """Yield every caption of `path`; one that is null is an empty one.

    column: of the captions, and the flag that says so; a `clip_score` beside it is of another one, unless it is
    `caption`.
    Raises InputError for what does not exist or holds no captions, JobError for a store that does not deliver."""
    if path == "demo":
        yield from _demo()
        return
    columns = replace(_of_column(column), rows_per_batch=rows_per_batch)
    for number, record in enumerate(read_records(path, storage_options, columns), 1):
        if record.problem:
            raise InputError(record.problem)
        image_id, texts = image_name(record.image_id), texts_of(record.captions)
        if not image_id or texts is None:
            raise InputError(
                f"{shown(absolute(path))}, caption row {number}: the image is {str(record.image_id)[:40]!r}, the"
                f" caption {str(record.captions)[:40]!r}; expected a text or a whole number, and a text or a list of"
                " texts"
            )
        of_table = _of_kind(record.key, int), _of_kind(record.clip_score, int | float)
        yield from (CaptionRow(image_id, text, str(record.file_name or ""), *of_table) for text in texts)


def _of_column(column: tuple[str, str] | None) -> ColumnNames:
    if column is None:
        return _FOR_EVALUATION
    name, flag = column
    scores = _FOR_EVALUATION.clip_score if name == SCORED_COLUMN else ()
    return replace(_FOR_EVALUATION, captions=(name,), clip_score=scores, flags={"captions": flag})


def read_records(
    path: str,
    storage_options: Mapping[str, Any] | None = None,
    columns: ColumnNames = _FOR_EVALUATION,
    read_as: CaptionFormat | None = None,
) -> Iterator[Record]:
    """Yield every row of `path` as it is, by default in the format that its name says. Raises as read_captions."""
    url = absolute(path)
    store = open_store(url, storage_options)
    try:
        yield from _read(store, url, columns, read_as)
    except StoreError as error:
        raised = JobError if error.fault.is_transient else InputError
        raise raised(f"{shown(url)} cannot be read: {error.fault.detail}; expected {_expected()}") from error


def _read(store: Store, url: str, columns: ColumnNames, read_as: CaptionFormat | None) -> Iterator[Record]:
    entry = store.info(url)
    if entry is None:
        raise InputError(f"{shown(url)} does not exist; expected {_expected()}")
    if entry.is_folder:
        for part in _parts(store, entry):
            yield from read_parquet_rows(store, part, columns)
        return
    read_as = read_as or caption_format_of(url)
    if read_as is None:
        raise InputError(f"{shown(url)} ends in {suffix(url) or 'nothing'}; expected {_expected()}")
    yield from read_as.read(store, url, columns)


def _expected() -> str:
    return f"the OUTPUT of jobs/caption.py, a folder of .parquet, or a file that ends in {list_suffixes()}"


def _parts(store: Store, folder: Entry) -> list[str]:
    """Return the Parquet files of a caption table, else those in the folder itself."""
    for parts in (join(folder.url, "captions"), folder.url.rstrip("/")):
        names = [name for name in store.names(parts) if name.endswith(".parquet") and name[0] not in "._"]
        if names:
            return [join(parts, name) for name in names]
    raise InputError(f"{shown(folder.url)} holds no .parquet and no captions/*.parquet; expected {_expected()}")


def _demo() -> Iterator[CaptionRow]:
    for image in sorted(demo.images_path().iterdir()):
        for caption in scene_at(int(image.stem.rpartition("-")[2])).captions:
            yield CaptionRow(image.name, caption)


def _of_kind(value: Any, kind: Any) -> Any:
    """Return the value if it is of this kind: a file that is no caption table may use the name for something else."""
    return value if isinstance(value, kind) and not isinstance(value, bool) else None
