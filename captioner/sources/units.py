"""The frozen input: which units there are, in which order, and which columns are read from them.

`_run/units.parquet` holds one row a unit and is written last, so it is there only when the listing is complete. Knows
how to write itself down and nothing of how units are found or read.
"""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.errors import OutputError
from captioner.rows import Reject, RejectReason
from captioner.sources import urls
from captioner.sources.store import Store, open_store

__all__ = [
    "Columns",
    "Frozen",
    "InputKind",
    "Unit",
    "UnitKind",
    "load_frozen",
    "save_count",
    "save_frozen",
]

UnitKind = Literal["listing", "parquet", "webdataset"]
InputKind = Literal["files", "list", "parquet", "webdataset"]

_FILE = "units.parquet"
_COUNTS = "counts"
_KEY = b"captioner.sources"
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
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One input file that is read as a whole."""

    ordinal: int
    """Its place in the input, which is the upper half of its rows' keys."""

    kind: UnitKind

    path: str
    """URL of the file; for a part of the listing its path below the run folder."""

    name: str
    """What people call it in an image_id: its path below the input's folder."""

    num_rows: int | None
    """Rows it gives; None for a tar, whose samples nobody has counted yet."""

    size_bytes: int | None
    """Size of the file when it was frozen; None where the store did not tell."""

    problem: Reject | None = None
    """Why it cannot be read at all; it then gives one row that says so."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which input columns become which output columns."""

    image: str | None = None
    """Column with the image: bytes, struct<bytes, path> or URI. In tars the ending of the member."""

    id: str | None = None

    kept: tuple[pa.Field, ...] = ()
    """The user's own columns as they stand in the output: renamed, types pinned."""

    kept_from: tuple[str, ...] = ()
    """Name of each kept column in the input."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The input as it was when the job first saw it."""

    kind: InputKind
    units: tuple[Unit, ...]
    columns: Columns = field(default_factory=Columns)
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Files that were left out on purpose, by what they are: `.json`, `hidden`, `folder marker`."""

    @property
    def num_images(self) -> int | None:
        """Rows of all units, or None while there is a tar that nobody has counted."""
        counts = [unit.num_rows for unit in self.units]
        return None if None in counts else sum(count for count in counts if count is not None)


def save_frozen(frozen: Frozen, run_folder: str, output_options: Mapping[str, Any] | None = None) -> None:
    """Write `_run/units.parquet`, whole or not at all; from then on the input is frozen."""
    columns = {name: [_cell(unit, name) for unit in frozen.units] for name in _SCHEMA.names}
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_KEY: json.dumps(_describe(frozen)).encode()}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    open_store(run_folder, output_options).write_atomic(urls.join(run_folder, _FILE), buffer.getvalue())


def load_frozen(run_folder: str, output_options: Mapping[str, Any] | None = None) -> Frozen | None:
    """Return what an earlier run froze, or None where none has finished doing so.

    Units that were read to their end since then have their number of rows.
    """
    store = open_store(run_folder, output_options)
    url = urls.join(urls.absolute(run_folder), _FILE)
    if store.info(url) is None:
        return None
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(url)))
    except pa.ArrowException as error:
        raise OutputError(
            f"{urls.redact(url)} is damaged: {error}; expected what the first run froze. Restore it, or choose another"
            " OUTPUT"
        ) from error
    described = json.loads(table.schema.metadata[_KEY])
    units = (_unit(row) for row in table.to_pylist())
    counts = _load_counts(run_folder, store)
    return Frozen(
        kind=described["kind"],
        units=tuple(replace(unit, num_rows=counts.get(unit.ordinal, unit.num_rows)) for unit in units),
        columns=_columns(described["columns"]),
        skipped=described["skipped"],
    )


def save_count(ordinal: int, num_rows: int, run_folder: str, output_options: Mapping[str, Any] | None = None) -> None:
    """Note how many rows a unit gives that was frozen uncounted; the name of an empty file says it."""
    url = urls.join(urls.absolute(run_folder), _COUNTS, f"{ordinal}-{num_rows}")
    open_store(run_folder, output_options).write_atomic(url, b"")


def _load_counts(run_folder: str, store: Store) -> dict[int, int]:
    names = store.names(urls.join(urls.absolute(run_folder), _COUNTS))
    pairs = (name.partition("-") for name in names)
    return {int(ordinal): int(num_rows) for ordinal, _, num_rows in pairs}


def _cell(unit: Unit, name: str) -> object:
    if name in ("reason", "detail"):
        return unit.problem and str(getattr(unit.problem, name))
    return getattr(unit, name)


def _unit(row: dict[str, Any]) -> Unit:
    reason, detail = row.pop("reason"), row.pop("detail")
    return Unit(**row, problem=Reject(RejectReason(reason), detail) if reason else None)


def _describe(frozen: Frozen) -> dict[str, Any]:
    columns = frozen.columns
    kept = base64.b64encode(pa.schema(columns.kept).serialize().to_pybytes()).decode()
    named = {"image": columns.image, "id": columns.id, "kept": kept, "kept_from": columns.kept_from}
    return {"kind": frozen.kind, "columns": named, "skipped": dict(frozen.skipped)}


def _columns(described: dict[str, Any]) -> Columns:
    kept = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(described["kept"])))
    return Columns(
        image=described["image"], id=described["id"], kept=tuple(kept), kept_from=tuple(described["kept_from"])
    )
