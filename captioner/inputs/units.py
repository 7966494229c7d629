"""The frozen input: which units there are, in which order, and which columns are read from them.

`_run/units.parquet` holds one row a unit and is written last, so it exists only when the listing is complete. Knows how
to save and load itself; does not know how units are found or read.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.errors import OutputError
from captioner.schema import Reject, RejectReason
from captioner.storage import Place, Store, as_location, open_store
from captioner.storage.json_text import parse_object
from captioner.storage.parquet import open_parquet_file, read_schema

__all__ = [
    "Columns",
    "Frozen",
    "InputKind",
    "Unit",
    "UnitKind",
    "load_frozen",
    "num_further_images",
    "save_count",
    "save_frozen",
    "save_further",
]

UnitKind = Literal["listing", "parquet", "webdataset"]
InputKind = Literal["files", "list", "parquet", "webdataset"]

_FILE = "units.parquet"
_COUNTS = "counts"
_COUNT = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
_NUM_FURTHER = re.compile(r"further-([0-9]{1,18})-([0-9]{1,18})")
_FURTHER_ITEMS = "further images of rows (--explode-images takes them)"
_FURTHER = "further images of samples (--tar-images all takes them)"
_KEY = b"captioner.sources"
_MAX_TAR_ROWS = 1 << 26
_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("num_further", pa.int64()),  # since lists are images; 0 in what was frozen before
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One input file that is read as a whole."""

    ordinal: int
    """Its index in the input: the upper half of its rows' keys."""

    kind: UnitKind

    path: str
    """URL of the file; for a part of the listing its path below the run folder."""

    name: str
    """Its name in an image_id: its path below the input's folder."""

    num_rows: int | None
    """How many rows it has; None for a tar whose samples were not counted yet."""

    size_bytes: int | None
    """Size of the file when it was frozen; None where the store did not say."""

    reject: Reject | None = None
    """Why it cannot be read at all. It then has one row, which says so."""

    num_further: int = 0
    """Images of its rows that are left out, since another one comes first in the same list."""

    @property
    def max_rows(self) -> int:
        """The most rows that it may have: 64 Mi of a tar that was not counted yet, or one for each 512 bytes."""
        return max(_MAX_TAR_ROWS, (self.size_bytes or 0) // 512) if self.num_rows is None else self.num_rows


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which input columns become which output columns."""

    image: str | None = None
    """Column with the image: bytes, struct<bytes, path> or URI. In tars the ending of the member."""

    id: str | None = None

    kept: tuple[pa.Field, ...] = ()
    """The user's own columns as they are in the output: renamed, with fixed types."""

    kept_from: tuple[str, ...] = ()
    """Name of each kept column in the input."""

    has_each_item: bool = False
    """Whether each image of a row with a list of them is a row, and not the first alone."""

    has_all_images: bool = False
    """Whether each image of a tar's sample is a row, and not the first alone."""

    leaves_out_texts: bool = False
    """Whether READMEs and their like are no samples of a tar. They were when earlier releases froze the input."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The input as it was when the job first listed it."""

    kind: InputKind
    units: tuple[Unit, ...]
    columns: Columns = field(default_factory=Columns)
    skipped: Mapping[str, int] = field(default_factory=dict)
    """How many files were left out on purpose, by kind: `.json`, `hidden`, `folder marker`."""

    @property
    def num_further(self) -> int:
        """Images of rows that are left out, since another one comes first in the same list."""
        return sum(unit.num_further for unit in self.units)

    @property
    def left_out(self) -> Mapping[str, int]:
        """What is left out, by kind: files, and images of rows."""
        return {**self.skipped, **({_FURTHER_ITEMS: self.num_further} if self.num_further else {})}

    @property
    def num_images(self) -> int | None:
        """Rows of all units; None while a tar was not counted yet."""
        counts = [unit.num_rows for unit in self.units]
        return None if None in counts else sum(count for count in counts if count is not None)


def save_frozen(frozen: Frozen, run_folder: Place, before_write: Callable[[], None] = lambda: None) -> None:
    """Write `_run/units.parquet`, whole or not at all, unless `before_write` raises. The input is then frozen."""
    columns = {name: [_cell(unit, name) for unit in frozen.units] for name in _SCHEMA.names}
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_KEY: json.dumps(_describe(frozen)).encode()}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    open_store(run_folder).write_atomic(as_location(run_folder) / _FILE, buffer.getvalue(), before_write)


def load_frozen(run_folder: Place) -> Frozen | None:
    """Return the input that an earlier run froze; None where no run has finished that.

    Units that were read to their end since then know their number of rows.
    """
    store = open_store(run_folder)
    file = as_location(run_folder) / _FILE
    if (data := store.read_or_none(file)) is None:
        return None
    try:
        opened = open_parquet_file(data)
        table = opened.read([name for name in _SCHEMA.names if name in opened.schema_arrow.names])
        described = parse_object(table.schema.metadata[_KEY])
        if "num_further" not in table.schema.names:
            table = table.append_column("num_further", pa.array([0] * table.num_rows))
        table = table.select(_SCHEMA.names).cast(_SCHEMA.with_metadata(table.schema.metadata))
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{file} is damaged: {error}; expected the input that the first run froze. Restore it, or"
            " choose another OUTPUT"
        ) from error
    units = (_unit(row) for row in table.to_pylist())
    counts, num_further = _load_counts(run_folder, store), num_further_images(run_folder)
    return Frozen(
        kind=described["kind"],
        units=tuple(replace(unit, num_rows=counts.get(unit.ordinal, unit.num_rows)) for unit in units),
        columns=_columns(described["columns"]),
        skipped=described["skipped"] | ({_FURTHER: num_further} if num_further else {}),
    )


def save_count(ordinal: int, num_rows: int, run_folder: Place) -> None:
    """Record how many rows a unit has that was frozen uncounted, as the name of an empty file."""
    open_store(run_folder).write_atomic(as_location(run_folder) / _COUNTS / f"{ordinal}-{num_rows}", b"")


def save_further(ordinal: int, num_images: int, run_folder: Place) -> None:
    """Record how many images of a tar are left out because another of their sample comes first, as `save_count`."""
    if num_images:
        open_store(run_folder).write_atomic(as_location(run_folder) / _COUNTS / f"further-{ordinal}-{num_images}", b"")


def num_further_images(run_folder: Place) -> int:
    """Return how many images of tars were left out so far because another of their sample comes first."""
    names = open_store(run_folder).names(as_location(run_folder) / _COUNTS)
    return sum({int(found[1]): int(found[2]) for found in map(_NUM_FURTHER.fullmatch, names) if found}.values())


def _load_counts(run_folder: Place, store: Store) -> dict[int, int]:
    found = map(_COUNT.fullmatch, store.names(as_location(run_folder) / _COUNTS))  # not temporaries, nor foreign files
    return {int(count[1]): int(count[2]) for count in found if count}


def _cell(unit: Unit, name: str) -> object:
    if name in ("reason", "detail"):
        return unit.reject and str(getattr(unit.reject, name))
    return getattr(unit, name)


def _unit(row: dict[str, Any]) -> Unit:
    reason, detail = row.pop("reason"), row.pop("detail")
    return Unit(**row, reject=Reject(RejectReason(reason), detail) if reason else None)


def _describe(frozen: Frozen) -> dict[str, Any]:
    columns = frozen.columns
    kept = base64.b64encode(pa.schema(columns.kept).serialize().to_pybytes()).decode()
    named = {
        "image": columns.image,
        "id": columns.id,
        "kept": kept,
        "kept_from": columns.kept_from,
        "has_each_item": columns.has_each_item,
        "has_all_images": columns.has_all_images,
        "leaves_out_texts": columns.leaves_out_texts,
    }
    return {"kind": frozen.kind, "columns": named, "skipped": dict(frozen.skipped)}


def _columns(described: dict[str, Any]) -> Columns:
    kept = read_schema(base64.b64decode(described["kept"]))
    return Columns(
        image=described["image"],
        id=described["id"],
        kept=tuple(kept),
        kept_from=tuple(described["kept_from"]),
        has_each_item=described.get("has_each_item", False),
        has_all_images=described.get("has_all_images", False),
        leaves_out_texts=described.get("leaves_out_texts", False),
    )
