"""Captions by image id, from whatever holds them, one row after the other.

    OUTPUT of a caption job     its captions/part-*.parquet
    .parquet, or a folder       columns image_id (or uri, image, file_name) and caption: a text, or a list of texts
    .csv, .tsv, .jsonl          the same; several rows an image are fine
    .json                       COCO captions, COCO results, Karpathy's dataset_*.json
    demo                        what the embedded images show

Reads from any store. Knows no metric, and not which images belong together.
"""

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa

from captioner import demo
from captioner.demo.scenes import scene_at
from captioner.errors import InputError, JobError
from captioner.sources.columns import is_bytes, is_struct
from captioner.sources.faults import StoreError
from captioner.sources.parquet import open_parquet
from captioner.sources.store import Entry, Store, open_store
from captioner.sources.urls import absolute, join, shown, suffix

__all__ = ["CaptionRow", "read_captions"]

_ID_COLUMNS = ("image_id", "uri", "image", "file_name")
_CAPTION_COLUMNS = ("caption", "captions")
_ROWS_A_BATCH = 8192
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_EXPECTED = "the OUTPUT of jobs/caption.py, a .parquet or a folder of them, .csv, .tsv, .jsonl, or COCO's .json"


class CaptionRow(NamedTuple):
    """One caption of an image; `file_name` is another name of the image where the file tells one."""

    image_id: str
    caption: str
    file_name: str = ""


def read_captions(path: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[CaptionRow]:
    """Yield every caption of `path`; one that is null is an empty one.

    Raises InputError for what is not there or holds no captions, JobError for a store that does not deliver."""
    if path == "demo":
        yield from _demo()
        return
    url = absolute(path)
    store = open_store(url, storage_options)
    try:
        yield from _read(store, url)
    except StoreError as error:
        kind = JobError if error.fault.is_transient else InputError
        raise kind(f"{shown(url)} cannot be read: {error.fault.detail}; expected {_EXPECTED}") from error


def _read(store: Store, url: str) -> Iterator[CaptionRow]:
    entry = store.info(url)
    if entry is None:
        raise InputError(f"{shown(url)} does not exist; expected {_EXPECTED}")
    kind = suffix(url)
    if entry.is_folder:
        for part in _parts(store, entry):
            yield from _parquet(store, part)
    elif kind in (".parquet", ".pq"):
        yield from _parquet(store, url)
    elif kind in _DELIMITERS:
        yield from _csv(store, url, _DELIMITERS[kind])
    elif kind in (".jsonl", ".ndjson"):
        yield from _jsonl(store, url)
    elif kind == ".json":
        yield from _json(store, url)
    else:
        raise InputError(f"{shown(url)} ends in {kind or 'nothing'}; expected {_EXPECTED}")


def _parts(store: Store, folder: Entry) -> list[str]:
    """Return the Parquet files of a caption table, or those of the folder itself."""
    for place in (join(folder.url, "captions"), folder.url.rstrip("/")):
        names = [name for name in store.names(place) if name.endswith(".parquet") and name[0] not in "._"]
        if names:
            return [join(place, name) for name in names]
    raise InputError(f"{shown(folder.url)} holds no .parquet and no captions/*.parquet; expected {_EXPECTED}")


def _parquet(store: Store, url: str) -> Iterator[CaptionRow]:
    file, _ = open_parquet(store, url)
    with file:
        plain = [field.name for field in file.schema_arrow if not (is_bytes(field.type) or is_struct(field.type))]
        columns = _columns(plain, shown(url))
        try:
            batches = file.iter_batches(_ROWS_A_BATCH, columns=list(columns), use_threads=False)
            yield from _rows(chain.from_iterable(_pairs(batch, columns) for batch in batches), shown(url))
        except StoreError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            seen = " ".join(str(error).split())
            raise InputError(f"{shown(url)} is damaged: {seen}; expected a whole Parquet file") from error


def _pairs(batch: pa.RecordBatch, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    image_ids, captions = (batch.column(column).to_pylist() for column in columns)
    return zip(image_ids, captions, strict=True)


def _csv(store: Store, url: str, delimiter: str) -> Iterator[CaptionRow]:
    with io.TextIOWrapper(store.open(url), "utf-8-sig", errors="backslashreplace", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter)
        try:
            image_id, caption = _columns(reader.fieldnames or (), shown(url))
            yield from _rows(((cells[image_id], cells[caption]) for cells in reader), shown(url))
        except csv.Error as error:
            raise InputError(f"{shown(url)}, line {reader.line_num}: {error}; expected a CSV with a header") from error


def _jsonl(store: Store, url: str) -> Iterator[CaptionRow]:
    with io.TextIOWrapper(store.open(url), "utf-8-sig", errors="backslashreplace") as lines:
        objects = (_parse(line, f"{shown(url)}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
        yield from _rows((_pair(found, shown(url)) for found in objects), shown(url))


def _json(store: Store, url: str) -> Iterator[CaptionRow]:
    where = shown(url)
    match _parse(store.read_bytes(url).decode("utf-8-sig", "backslashreplace"), where):
        case {"annotations": [*annotations], "images": [*images]}:
            names = {_image_id(image["id"]): str(image["file_name"]) for image in images if _is_named(image)}
            for row in _rows((_pair(found, where) for found in annotations), where):
                yield row._replace(file_name=names.get(row.image_id, ""))
        case {"images": [*images]}:
            yield from _karpathy(images, where)
        case {"annotations": [*results]} | [*results]:
            yield from _rows((_pair(found, where) for found in results), where)
        case _:
            raise InputError(f"{where} has neither annotations nor images; expected COCO's captions_*.json")


def _is_named(image: Any) -> bool:
    return isinstance(image, dict) and "id" in image and "file_name" in image


def _karpathy(images: Sequence[Any], where: str) -> Iterator[CaptionRow]:
    for image in images:
        match image:
            case {"filename": str(file_name), "sentences": [*sentences]}:
                texts = [_sentence(found) for found in sentences]
                for row in _rows([(image.get("cocoid", file_name), texts)], where):
                    yield row._replace(file_name=file_name)
            case _:
                raise InputError(f"{where} has an image without filename and sentences; expected Karpathy's dataset")


def _sentence(found: Any) -> Any:
    match found:
        case {"raw": str(raw)}:
            return raw
        case {"tokens": [*tokens]}:
            return " ".join(map(str, tokens))
    return found


def _demo() -> Iterator[CaptionRow]:
    for image in sorted(demo.images_path().iterdir()):
        for caption in scene_at(int(image.stem.rpartition("-")[2])).captions:
            yield CaptionRow(image.name, caption)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}; expected image_id and caption") from error


def _pair(found: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(found, dict):
        raise InputError(f"{where} holds {str(found)[:40]!r}; expected objects with image_id and caption")
    image_id, caption = _columns(found, where)
    return found[image_id], found[caption]


def _columns(names: Collection[str], where: str) -> tuple[str, str]:
    """Return the columns of the image's name and of its captions."""
    image_id = next((name for name in _ID_COLUMNS if name in names), None)
    caption = next((name for name in _CAPTION_COLUMNS if name in names), None)
    if image_id is None or caption is None:
        raise InputError(f"{where} has {', '.join(names) or 'no columns'}; expected image_id and caption: rename them")
    return image_id, caption


def _rows(pairs: Iterable[tuple[Any, Any]], where: str) -> Iterator[CaptionRow]:
    for number, (value, captions) in enumerate(pairs, 1):
        image_id = _image_id(value)
        texts = captions if isinstance(captions, list) else [captions]
        if not image_id or not all(isinstance(text, str | None) for text in texts):
            raise InputError(
                f"{where}, caption row {number}: the image is {str(value)[:40]!r}, the caption {str(captions)[:40]!r};"
                " expected a text or a whole number, and a text or a list of texts"
            )
        yield from (CaptionRow(image_id, text or "") for text in texts)


def _image_id(value: Any) -> str:
    """Return the id as text, empty for what cannot be one; 400.0 is 400 (pandas writes it so beside a null)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
