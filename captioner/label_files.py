"""What LABELS holds, row by row: where each image is, its captions and its split, as the files have them.

    .parquet                       an image column of bytes, struct<bytes, path> or URIs
    .csv, .tsv, .jsonl, .json      names of images; relative ones are below --image-root
    .token, .token.txt             the same, with Flickr8k's split lists beside
    .tar                           WebDataset samples with a .txt or a .json
    demo                           the embedded scenes, drawn into a Parquet file below the run folder

Several files of a kind make one set; where their names tell splits, those count. A row that is none carries a problem.
Knows not which rows belong to one image, nor what may be done with them.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.caption_files import CAPTION_COLUMNS, Record, Wanted, image_name, read_records, texts_of
from captioner.config import InputConfig, LabelsConfig
from captioner.demo import scenes
from captioner.errors import ConfigError, InputError, JobError
from captioner.rows import RejectReason, row_key
from captioner.same_pictures import read_digests
from captioner.sources import Columns, Frozen, Limits, Unit, freeze, open_store, read_unit, urls
from captioner.sources.columns import is_text, plain_type
from captioner.sources.faults import Fault, StoreError, output_errors
from captioner.sources.parquet import open_parquet
from captioner.sources.selection import Found, select
from captioner.splits import SPLITS, Split, read_split_lists, split_of_file

__all__ = ["LabelFiles", "LabelRow", "read_rows"]

_DEMO_IMAGES: dict[Split, int] = {"train": 8000, "validation": 400, "test": 1000}
_DEMO_GROUP_ROWS = 512
_FILE_NAMES = (
    *("uri", "url", "image", "image_path", "image_url", "img_path", "file_name", "filename", "file_path", "filepath"),
    *("file", "path"),
)
_TAR_CAPTIONS = ("txt", *CAPTION_COLUMNS)
_BESIDE_IMAGES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
_IMAGE_ID = "image_id"
_ROWS_A_BATCH = 8192
_THREADS = 8
_EXPECTED = (
    "a .parquet, .csv, .tsv, .jsonl, COCO's or Karpathy's .json, Flickr8k.token.txt, .tar shards, or a folder of"
    f" .parquet or .tar, or of images with {_BESIDE_IMAGES[0]} or {_BESIDE_IMAGES[1]}; else --labels-format"
)


class LabelRow(NamedTuple):
    """One row as its file has it: an image and some of its captions, or why it is none."""

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
    """Of the bytes, where the image's name may be that of another."""

    is_named: bool = True
    """Whether the file says what the image is called; else its place is its name."""


ReadUnit = Callable[[Unit, Columns, InputConfig, LabelsConfig], Iterator[LabelRow]]


class LabelFiles(NamedTuple):
    """The rows of all files, and how to get at the images: those without a URI are rows of the frozen input."""

    location: str
    access: InputConfig
    rows: Iterator[LabelRow]
    frozen: Frozen | None = None


def read_rows(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None = None) -> LabelFiles:
    """Return every row of LABELS. Raises InputError for what cannot be read at all, JobError for a failing store."""
    if config.labels_path == "demo":
        url = _write_demo(config, run_folder, output_options)
        config = replace(config, labels_path=url, storage_options=dict(output_options or {}))
    config = replace(config, labels_path=urls.absolute(config.labels_path))
    with _label_errors(config.labels_path):
        files = _read(config, run_folder, output_options)
    return files._replace(rows=_with_errors(files.rows, config.labels_path))


def _with_errors(rows: Iterator[LabelRow], url: str) -> Iterator[LabelRow]:
    with _label_errors(url):
        yield from rows


@contextmanager
def _label_errors(url: str) -> Iterator[None]:
    """Turn a StoreError into one that names LABELS: InputError, or JobError where another try may help."""
    try:
        yield
    except StoreError as error:
        kind = JobError if error.fault.is_transient else InputError
        raise kind(f"{urls.shown(url)} cannot be read: {error.fault.detail}; expected {_EXPECTED}") from error


def _read(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None) -> LabelFiles:
    config, kind = _kind(config)
    access = _access(config, kind)
    if kind not in (".parquet", ".tar"):
        return LabelFiles(config.labels_path, access, _of_names(config, kind))
    frozen = freeze(config.labels_path, access, urls.join(run_folder, "labels"), output_options)
    if kind == ".tar":
        rows = _of_units(config, access, frozen, _samples)
    elif _is_of_uris(frozen, config):
        return LabelFiles(config.labels_path, access, _of_names(config, kind))
    else:
        paths = [unit.path for unit in frozen.units if unit.problem is None]
        image = frozen.columns.image
        assert image is not None
        digests = read_digests(paths, image, config.storage_options, id_column=_IMAGE_ID)
        rows = _of_units(config, access, frozen, partial(_table_rows, digests=digests))
    return LabelFiles(config.labels_path, access, rows, frozen)


def _kind(config: LabelsConfig) -> tuple[LabelsConfig, str]:
    """Return the suffix to read LABELS by; the config names the file with the captions where it named their folder."""
    if config.labels_format != "auto":
        return config, ".tar" if config.labels_format == "webdataset" else f".{config.labels_format}"
    if suffix := _plain_suffix(config.labels_path):
        return config, suffix
    selection = select(config.labels_path, InputConfig(storage_options=config.storage_options))
    counts: Counter[str] = Counter()
    for found in selection.files:
        if urls.name(found.entry.url) in _BESIDE_IMAGES and urls.parent(found.entry.url) + "/" == selection.root:
            return replace(config, labels_path=found.entry.url), _plain_suffix(found.entry.url)
        counts[_plain_suffix(found.entry.url)] += 1
    best = max((".parquet", ".tar", ".jsonl"), key=lambda suffix: counts[suffix])
    if not counts[best]:
        raise InputError(f"{selection.shown} is no file with captions and holds none; expected {_EXPECTED}")
    return config, best


def _plain_suffix(url: str) -> str:
    """Return one suffix for each kind of file, empty for other kinds."""
    suffix = ".token" if url.lower().endswith(".token.txt") else urls.suffix(url)
    known = {".pq": ".parquet", ".ndjson": ".jsonl", **dict.fromkeys(urls.TAR_SUFFIXES, ".tar")}
    known |= {suffix: suffix for suffix in (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".token")}
    return known.get(suffix, "")


def _access(config: LabelsConfig, kind: str) -> InputConfig:
    """Return how the images are read, as a caption job would read them."""
    options = InputConfig(storage_options=config.storage_options, allow_local_uris=config.allow_local_uris)
    if kind == ".parquet":
        return replace(options, input_format="parquet", image_column=config.image_column)
    if kind == ".tar":
        wanted = (*_captions_of(config, _TAR_CAPTIONS), config.split_column or "split")
        kept = tuple(f"{name}=label_{number}" for number, name in enumerate(wanted))
        return replace(options, input_format="webdataset", image_column=config.image_column, keep_columns=kept)
    return options


def _captions_of(config: LabelsConfig, default: Sequence[str]) -> tuple[str, ...]:
    return tuple(default) if config.caption_column is None else (config.caption_column,)


# Names of images, in any file that has rows


def _of_names(config: LabelsConfig, kind: str) -> Iterator[LabelRow]:
    options = InputConfig(storage_options=config.storage_options)
    files = [found.entry.url for found in select(config.labels_path, options).files if _is_of(found, kind)]
    roots = [urls.absolute(root) for root in urls.expand_braces(config.image_root)] if config.image_root else []
    if len(roots) > 1 and len(roots) != len(files):
        raise ConfigError(
            f"--image-root {config.image_root} is {len(roots)} folders, LABELS are {len(files)} files; expected one"
            " folder, or one for each file"
        )
    splits = _splits_of_files(files)
    for number, url in enumerate(files):
        root = roots[number % len(roots)] if roots else urls.parent(url)
        yield from _of_file(url, root, splits.get(url, ""), config, kind)


def _is_of(found: Found, kind: str) -> bool:
    return found.is_named or _plain_suffix(found.entry.url) == kind


def _splits_of_files(files: Sequence[str]) -> dict[str, str]:
    """Return the split that each file's name says, where they are several and one of them is for training."""
    found = {url: str(split) for url in files if (split := split_of_file(url))}
    return found if len(files) > 1 and "train" in found.values() else {}


def _of_file(url: str, root: str, split: str, config: LabelsConfig, kind: str) -> Iterator[LabelRow]:
    store = open_store(url, config.storage_options)
    lists = read_split_lists(store, urls.parent(url)) if kind == ".token" else {}
    for number, record in enumerate(read_records(url, config.storage_options, _wanted(config), kind), 1):
        row = _of_record(record, root, f"{urls.shown(url)}, caption row {number}")
        if lists and not row.problem:
            listed = lists.get(str(record.file_name))
            row = row._replace(split=listed or "", left_out="" if listed else "in_no_split_list")
        yield row if row.split else row._replace(split=split)


def _wanted(config: LabelsConfig) -> Wanted:
    return Wanted(
        image_id=(_IMAGE_ID,),
        captions=_captions_of(config, CAPTION_COLUMNS),
        file_name=_FILE_NAMES if config.image_column is None else (config.image_column,),
        split=(config.split_column or "split",),
        named={kind: flag for kind, (flag, column) in _flags(config).items() if column is not None},
        expected="a column with images and one with captions: name them with --image-column and --caption-column",
    )


def _flags(config: LabelsConfig) -> dict[str, tuple[str, str | None]]:
    """Return the flag that names the column of each field, and the name that it was given."""
    return {
        "file_name": ("--image-column", config.image_column),
        "captions": ("--caption-column", config.caption_column),
        "split": ("--split-column", config.split_column),
    }


def _of_record(record: Record, root: str, where: str) -> LabelRow:
    if record.problem:
        return LabelRow(problem="unreadable", detail=record.problem)
    image_id = image_name(record.image_id)
    name = image_id if record.file_name is None else image_name(record.file_name)
    captions = texts_of(record.captions)
    if not name:
        return LabelRow(problem="no_image", detail=f"{where} has no image")
    if captions is None:
        seen = str(record.captions)[:40]
        return LabelRow(problem="unreadable", detail=f"{where} has the caption {seen!r}, not a text or a list of them")
    uri = urls.resolve(name, root)
    return LabelRow(image_id or urls.shown(name), urls.shown(uri), uri, None, captions, str(record.split or ""))


# Images that lie beside their captions, in Parquet files and tars


def _is_of_uris(frozen: Frozen, config: LabelsConfig) -> bool:
    unit = next(unit for unit in frozen.units if unit.problem is None)
    file, _ = open_parquet(open_store(unit.path, config.storage_options), unit.path)
    with file:
        return is_text(plain_type(file.schema_arrow.field(frozen.columns.image).type))


def _of_units(config: LabelsConfig, access: InputConfig, frozen: Frozen, read: ReadUnit) -> Iterator[LabelRow]:
    """Yield the rows of every unit in order; several are read at the same time."""
    splits = _splits_of_files([unit.path for unit in frozen.units])
    with ThreadPoolExecutor(_THREADS) as threads:
        pieces = threads.map(lambda unit: list(read(unit, frozen.columns, access, config)), frozen.units)
        for unit, rows in zip(frozen.units, pieces, strict=True):
            for row in rows:
                yield row if row.split else row._replace(split=splits.get(unit.path, ""))


def _table_rows(
    unit: Unit,
    columns: Columns,
    access: InputConfig,
    config: LabelsConfig,
    digests: Mapping[str, Mapping[int, str]],
) -> Iterator[LabelRow]:
    """Yield the rows of a Parquet file with images in it."""
    del columns
    if unit.problem is not None:
        yield LabelRow(problem=str(unit.problem.reason), detail=f"{unit.name}: {unit.problem.detail}")
        return
    records = read_records(unit.path, access.storage_options, _wanted_beside(config), ".parquet")
    for position, record in enumerate(records):
        source = f"{urls.shown(unit.path)}#{position}"
        captions = texts_of(record.captions)
        if captions is None:
            yield LabelRow(problem="unreadable", detail=f"{source} has the caption {str(record.captions)[:40]!r}")
            continue
        name = image_name(record.image_id)
        yield LabelRow(
            image_id=name or f"{unit.name}#{position}",
            source=source,
            key=row_key(unit.ordinal, position),
            captions=captions,
            split=str(record.split or ""),
            digest=digests[unit.path].get(position, ""),
            is_named=bool(name),
        )


def _wanted_beside(config: LabelsConfig) -> Wanted:
    wanted = _wanted(config)
    named = {kind: flag for kind, flag in wanted.named.items() if kind != "file_name"}
    return replace(wanted, file_name=(), named=named, has_image=True)


def _samples(unit: Unit, columns: Columns, access: InputConfig, config: LabelsConfig) -> Iterator[LabelRow]:
    """Yield the samples of a tar; no image is held."""
    del config
    limits = Limits(max_image_bytes=0)
    for table in read_unit(unit, columns, access, run_folder="", limits=limits):
        for row in table.to_pylist():
            yield _of_sample(row, urls.shown(unit.path) + row["image_id"].removeprefix(unit.name))


def _of_sample(row: Mapping[str, Any], source: str) -> LabelRow:
    if row["reason"] in (RejectReason.FETCH_FAILED, RejectReason.CHANGED):
        raise StoreError(Fault(RejectReason.FETCH_FAILED, f"{source}: {row['detail']}", is_transient=True))
    if row["reason"] != RejectReason.TOO_LARGE:  # what an image is that is there, but may not be held
        return LabelRow(problem=row["reason"], detail=f"{source}: {row['detail']}")
    *texts, split = (row[name] for name in row if name.startswith("label_"))
    captions = next((found for text in texts if text and (found := _texts_in(text))), [])
    return LabelRow(row["image_id"], source, None, row["key"], captions, split or "")


def _texts_in(text: str) -> list[str]:
    """Return the captions in a member: a JSON list of texts, or else a caption a line."""
    if text.startswith("["):
        with suppress(ValueError):
            return texts_of(json.loads(text)) or []
    return text.splitlines()


# The demo


def _write_demo(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None) -> str:
    """Return the URL of a Parquet file with the demo's scenes, drawn unless an earlier run did."""
    sizes = {split: min(size, config.limit or size) for split, size in _DEMO_IMAGES.items()}
    name = "demo-{train}-{validation}-{test}.parquet".format(**sizes)
    url = urls.join(urls.absolute(run_folder), "labels", name)
    store = open_store(url, output_options)
    with output_errors(run_folder):
        if store.info(url) is None:
            store.write_atomic(url, _drawn(sizes))
    return url


def _drawn(sizes: Mapping[Split, int]) -> bytes:
    examples = chain.from_iterable(scenes.examples(split, sizes[split]) for split in SPLITS)
    columns: dict[str, list[Any]] = {"image_id": [], "image": [], "captions": [], "split": []}
    for example in examples:
        row = {"image_id": example.image_id, "image": example.image, "captions": example.captions}
        for field, value in (row | {"split": example.split}).items():
            columns[field].append(value)
    buffer = io.BytesIO()
    # the images are compressed already; small groups, since one is the least that is read
    pq.write_table(pa.table(columns), buffer, compression="none", row_group_size=_DEMO_GROUP_ROWS)
    return buffer.getvalue()
