"""Captions by image id, from whatever holds them, one row after the other.

    OUTPUT of a caption job     its captions/part-*.parquet
    .parquet, or a folder       columns image_id (or uri, image, file_name) and caption: a text, or a list of texts
    .csv, .tsv, .jsonl          the same; several rows an image are fine
    .json                       COCO captions, COCO results, Karpathy's dataset_*.json
    .token, .token.txt          Flickr8k's and Flickr30k's: `name.jpg#0`, a tab, a caption
    demo                        what the embedded images show

`read_records` gives rows as they are, with the columns that the caller names; `read_captions` checks them. Reads from
any store. Knows no metric, and not which images belong together.
"""

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from captioner import demo
from captioner.demo.scenes import scene_at
from captioner.errors import InputError, JobError
from captioner.sources.columns import is_bytes, is_struct
from captioner.sources.faults import StoreError
from captioner.sources.parquet import open_parquet
from captioner.sources.store import Entry, Store, open_store
from captioner.sources.urls import absolute, join, name, shown, suffix

__all__ = [
    "CAPTION_COLUMNS",
    "CaptionRow",
    "Record",
    "Wanted",
    "image_name",
    "read_captions",
    "read_records",
    "texts_of",
]

CAPTION_COLUMNS = ("caption", "captions")
_ROWS_A_BATCH = 8192
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_EXPECTED = "the OUTPUT of jobs/caption.py, a .parquet or a folder of them, .csv, .tsv, .jsonl, or COCO's .json"


class CaptionRow(NamedTuple):
    """One caption of an image; `file_name` is another name of the image where the file tells one."""

    image_id: str
    caption: str
    file_name: str = ""
    key: int | None = None
    """Row of a caption table; None elsewhere."""

    clip_score: float | None = None


class Record(NamedTuple):
    """One row as its file has it, unchecked; `problem` says why it is none."""

    image_id: Any = None
    captions: Any = None
    file_name: Any = None
    split: Any = None
    key: Any = None
    clip_score: Any = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Names of the columns to read, the first that is there of each; empty for none."""

    image_id: tuple[str, ...] = ("image_id", "uri", "image", "file_name")
    captions: tuple[str, ...] = CAPTION_COLUMNS
    file_name: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    clip_score: tuple[str, ...] = ()
    has_image: bool = False
    """Whether each row has its image with it, so that no column need name it."""

    named: Mapping[str, str] = field(default_factory=dict)
    """Field -> the flag by which its one column was asked for: then it has to be there."""

    expected: str = "image_id and caption: rename them"
    """What to say of a file without a name of the image, or without captions."""

    def choose(self, names: Collection[str], where: str) -> dict[str, str]:
        """Return the column of each field that has one. Raises InputError with the columns that there are."""
        wished = {kind: getattr(self, kind) for kind in Record._fields if kind != "problem"}
        found = {kind: next((name for name in these if name in names), None) for kind, these in wished.items()}
        for kind, flag in self.named.items():
            if found[kind] is None:
                raise InputError(f"{where} has {', '.join(names)}; expected the column of {flag} {wished[kind][0]}")
        has_image = self.has_image or found["image_id"] or found["file_name"]
        if found["captions"] is None or not has_image:
            raise InputError(f"{where} has {', '.join(names) or 'no columns'}; expected {self.expected}")
        return {kind: column for kind, column in found.items() if column is not None}


_FOR_EVALUATION = Wanted(key=("key",), clip_score=("clip_score",))


def read_captions(path: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[CaptionRow]:
    """Yield every caption of `path`; one that is null is an empty one.

    Raises InputError for what is not there or holds no captions, JobError for a store that does not deliver."""
    if path == "demo":
        yield from _demo()
        return
    for number, record in enumerate(read_records(path, storage_options), 1):
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


def read_records(
    path: str, storage_options: Mapping[str, Any] | None = None, wanted: Wanted = _FOR_EVALUATION, kind: str = ""
) -> Iterator[Record]:
    """Yield every row of `path` as it is. `kind` is a suffix to read it by; by default its own. Raises as above."""
    url = absolute(path)
    store = open_store(url, storage_options)
    try:
        yield from _read(store, url, wanted, kind)
    except StoreError as error:
        fault = JobError if error.fault.is_transient else InputError
        raise fault(f"{shown(url)} cannot be read: {error.fault.detail}; expected {_EXPECTED}") from error


def _read(store: Store, url: str, wanted: Wanted, kind: str) -> Iterator[Record]:
    entry = store.info(url)
    if entry is None:
        raise InputError(f"{shown(url)} does not exist; expected {_EXPECTED}")
    kind = kind or (".token" if name(url).lower().endswith(".token.txt") else suffix(url))
    if entry.is_folder:
        for part in _parts(store, entry):
            yield from _parquet(store, part, wanted)
    elif kind in (".parquet", ".pq"):
        yield from _parquet(store, url, wanted)
    elif kind in _DELIMITERS:
        yield from _csv(store, url, _DELIMITERS[kind], wanted)
    elif kind in (".jsonl", ".ndjson"):
        yield from _jsonl(store, url, wanted)
    elif kind == ".json":
        yield from _json(store, url, wanted)
    elif kind == ".token":
        yield from _token(store, url)
    else:
        raise InputError(f"{shown(url)} ends in {kind or 'nothing'}; expected {_EXPECTED}")


def _parts(store: Store, folder: Entry) -> list[str]:
    """Return the Parquet files of a caption table, or those of the folder itself."""
    for place in (join(folder.url, "captions"), folder.url.rstrip("/")):
        names = [name for name in store.names(place) if name.endswith(".parquet") and name[0] not in "._"]
        if names:
            return [join(place, name) for name in names]
    raise InputError(f"{shown(folder.url)} holds no .parquet and no captions/*.parquet; expected {_EXPECTED}")


def _parquet(store: Store, url: str, wanted: Wanted) -> Iterator[Record]:
    file, _ = open_parquet(store, url)
    with file:
        plain = [field.name for field in file.schema_arrow if not (is_bytes(field.type) or is_struct(field.type))]
        columns = wanted.choose(plain, shown(url))
        try:
            for batch in file.iter_batches(_ROWS_A_BATCH, columns=sorted(set(columns.values())), use_threads=False):
                yield from _records({field: batch.column(column).to_pylist() for field, column in columns.items()})
        except StoreError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            seen = " ".join(str(error).split())
            raise InputError(f"{shown(url)} is damaged: {seen}; expected a whole Parquet file") from error


def _records(values: Mapping[str, Sequence[Any]]) -> Iterator[Record]:
    return (Record(**dict(zip(values, row, strict=True))) for row in zip(*values.values(), strict=True))


def _csv(store: Store, url: str, delimiter: str, wanted: Wanted) -> Iterator[Record]:
    with io.TextIOWrapper(store.open(url), "utf-8-sig", errors="backslashreplace", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter)
        try:
            columns = wanted.choose(reader.fieldnames or (), shown(url))
        except csv.Error as error:
            raise InputError(f"{shown(url)}, line {reader.line_num}: {error}; expected a CSV with a header") from error
        yield from _csv_rows(reader, columns, shown(url))


def _csv_rows(reader: "csv.DictReader[str]", columns: Mapping[str, str], where: str) -> Iterator[Record]:
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Record(problem=f"{where}, line {reader.line_num + 1}: {error}; expected a CSV with a header")
            continue
        if cells is None:
            return
        yield Record(**{field: cells[column] for field, column in columns.items()})


def _jsonl(store: Store, url: str, wanted: Wanted) -> Iterator[Record]:
    with io.TextIOWrapper(store.open(url), "utf-8-sig", errors="backslashreplace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_line(line, f"{shown(url)}, line {number}", shown(url), wanted)


def _json_line(line: str, place: str, where: str, wanted: Wanted) -> Record:
    try:
        found = _parse(line, place)
    except InputError as error:
        return Record(problem=str(error))
    return _record(found, where, wanted)


def _record(found: Any, where: str, wanted: Wanted) -> Record:
    if not isinstance(found, dict):
        return Record(problem=f"{where} holds {str(found)[:40]!r}; expected objects with image_id and caption")
    try:
        return Record(**{field: found[column] for field, column in wanted.choose(found, where).items()})
    except InputError as error:
        return Record(problem=str(error))


def _json(store: Store, url: str, wanted: Wanted) -> Iterator[Record]:
    where = shown(url)
    match _parse(store.read_bytes(url).decode("utf-8-sig", "backslashreplace"), where):
        case {"annotations": [*annotations], "images": [*images]}:
            names = {image_name(image["id"]): str(image["file_name"]) for image in images if _is_named(image)}
            for record in (_record(found, where, wanted) for found in annotations):
                yield record._replace(file_name=names.get(image_name(record.image_id), ""))
        case {"images": [*images]}:
            yield from (_karpathy(image, where) for image in images)
        case {"annotations": [*results]} | [*results]:
            yield from (_record(found, where, wanted) for found in results)
        case _:
            raise InputError(f"{where} has neither annotations nor images; expected COCO's captions_*.json")


def _is_named(image: Any) -> bool:
    return isinstance(image, dict) and "id" in image and "file_name" in image


def _karpathy(image: Any, where: str) -> Record:
    match image:
        case {"filename": str(file_name), "sentences": [*sentences]}:
            path = "/".join(part for part in (image.get("filepath"), file_name) if part)
            texts = [_sentence(found) for found in sentences]
            return Record(image.get("cocoid", file_name), texts, path, image.get("split"))
    return Record(problem=f"{where} has an image without filename and sentences; expected Karpathy's dataset")


def _sentence(found: Any) -> Any:
    match found:
        case {"raw": str(raw)}:
            return raw
        case {"tokens": [*tokens]}:
            return " ".join(map(str, tokens))
    return found


def _token(store: Store, url: str) -> Iterator[Record]:
    with io.TextIOWrapper(store.open(url), "utf-8-sig", errors="backslashreplace") as lines:
        for number, line in enumerate(lines, 1):
            key, tab, caption = line.rstrip("\r\n").partition("\t")
            file_name, mark, _ = key.rpartition("#")
            if tab and mark:
                yield Record(file_name, caption, file_name)
            elif line.strip():
                seen = f"{shown(url)}, line {number} is {line.strip()[:40]!r}"
                yield Record(problem=f"{seen}; expected `name.jpg#0`, a tab, a caption")


def _demo() -> Iterator[CaptionRow]:
    for image in sorted(demo.images_path().iterdir()):
        for caption in scene_at(int(image.stem.rpartition("-")[2])).captions:
            yield CaptionRow(image.name, caption)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}; expected image_id and caption") from error


def texts_of(captions: Any) -> list[str] | None:
    """Return one caption or several as texts, a null as an empty one; None for what is neither."""
    texts = captions if isinstance(captions, list) else [captions]
    return [text or "" for text in texts] if all(isinstance(text, str | None) for text in texts) else None


def _of_kind(value: Any, kind: Any) -> Any:
    """Return what only a caption table has: another file may use the name for something else."""
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def image_name(value: Any) -> str:
    """Return the id as text, empty for what cannot be one; 400.0 is 400 (pandas writes it so beside a null)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
