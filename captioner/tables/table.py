"""The output folder of a caption job: what it is, what it holds, how a part is added.

Knows where the parts are and which rows are done; how a part looks inside is in `parts`, what is wrong with a table in
`audit`, and how it is mended in `mending`, `repair` and `compaction`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.errors import JobError, OutputError
from captioner.keys import KeySet
from captioner.rows import CAPTIONS, FAILURES, captions_schema
from captioner.sources import urls
from captioner.sources.faults import StoreError
from captioner.sources.store import Store, open_store
from captioner.sources.urls import join, redact
from captioner.tables import lease
from captioner.tables.parts import PartName, Stamp, digest_of_keys, encode, footer, read_ahead
from captioner.waiting import Reading, last_readings

__all__ = [
    "FAILURE_COLUMNS",
    "FOLDERS",
    "CaptionTable",
    "Done",
    "PartSummary",
    "columns_schema",
    "concat_attempts",
    "last_attempts",
    "light",
]

FORMAT = 1
FOLDERS = ("captions", "failures")
FAILURE_COLUMNS = ["key", "attempt", "reason"]
_GROUP = 8
_SMALL_ROWS = 4096
_FIELDS = {field.name: field for schema in (CAPTIONS, FAILURES) for field in schema}


@dataclass(frozen=True)
class PartSummary:
    """What one call of `CaptionTable.write` put on disk."""

    captioned: int
    failed_by_reason: dict[str, int]
    num_tokens: int
    parts: tuple[str, ...] = ()
    """URLs of the files."""
    clocks: tuple[Reading, ...] = ()
    """What the model workers' clocks said last among these rows, one reading a worker."""

    @property
    def failed(self) -> int:
        """Rows that went to `failures/`."""
        return sum(self.failed_by_reason.values())


@dataclass
class Done:
    """What a table holds already.

    `keys` need no more work. `attempts` maps the keys that will be tried again to the attempts they had.
    """

    keys: KeySet = field(default_factory=KeySet)
    attempts: dict[int, int] = field(default_factory=dict)
    num_captioned: int = 0
    num_failed: int = 0
    num_doubled: int = 0
    """Rows that stand in the table more than once: a writer that outlived its driver came late (see `mending`)."""

    parts: frozenset[str] = frozenset()
    """URLs of the parts that were read."""


class CaptionTable:
    """The output folder of a caption job."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.store: Store = open_store(self.url, storage_options or {})
        self.run_folder = join(self.url, "_run")

    # What the table is

    def identity(self) -> dict[str, Any] | None:
        """Return what the table was made with, or None where no run has begun."""
        if self.store.info(self._run_file) is None:
            return None
        try:
            return dict(json.loads(self.store.read_bytes(self._run_file)))
        except ValueError as error:
            raise OutputError(
                f"{redact(self._run_file)} is damaged: {error}; expected the JSON that the first run wrote."
                " Restore it, or choose another OUTPUT"
            ) from error

    @property
    def _run_file(self) -> str:
        return join(self.run_folder, "run.json")

    def check(self, identity: Mapping[str, Any]) -> None:
        """Check that a run of `identity` may write here. Writes nothing.

        Raises OutputError when the folder holds another run's captions, naming what differs, or nobody's parts.
        """
        found, wanted = self.identity(), {"format": FORMAT, **identity}
        if found is None:
            self._refuse_strangers()
        elif _essence(found) != _essence(wanted):
            raise OutputError(_difference(self.url, found, wanted))

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make this table one of `identity`, unless it is already. Raises OutputError as `check` does."""
        self.check(identity)
        if self.identity() is None:
            self.store.write_atomic(self._run_file, _json({"format": FORMAT, **identity}))

    @property
    def digest(self) -> str:
        """Digest of what the table was made with, as it stands in each part's footer; empty where no run has begun."""
        found = self.identity()
        return "" if found is None else hashlib.blake2b(_json(found), digest_size=16).hexdigest()

    def _refuse_strangers(self) -> None:
        strangers = [part for folder in FOLDERS for part in self.parts(folder)]
        if strangers:
            raise OutputError(
                f"{redact(self.url)} holds {len(strangers)} parts but no _run/run.json, so no run can continue them;"
                " expected an empty folder or an earlier run of this job. Choose another OUTPUT"
            )

    def record(self, run_id: str, facts: Mapping[str, Any]) -> None:
        """Write `_run/runs/<run_id>.json`: the config, the versions, later the summary."""
        self.store.write_atomic(join(self.run_folder, "runs", f"{run_id}.json"), _json(facts))

    def run_ids(self) -> set[str]:
        """Return the ids of all runs that were recorded."""
        names = self.store.names(join(self.run_folder, "runs"))
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def take_lease(self, purpose: str) -> AbstractContextManager[lease.Lease]:
        """Return what keeps every other job from writing this table; see `lease.take_lease`."""
        return lease.take_lease(self.store, self.run_folder, purpose)

    # What is done

    def done(self, is_retried: Callable[[str], bool]) -> Done:
        """Return what need not be done again: every captioned row, and each failed one unless its reason is retried.

        Reads the key columns of all parts. Raises OutputError for a part that is torn or of another run, StoreError.
        """
        done, parts = Done(), {folder: self.parts(folder) for folder in FOLDERS}
        done.parts = frozenset(url for found in parts.values() for url in found)
        for part in self._columns(parts["captions"], ["key"]):
            done.num_doubled += len(done.keys.add(part.column("key").to_numpy()))
        done.num_captioned = done.keys.count()
        attempts = concat_attempts(map(light, self._columns(parts["failures"], FAILURE_COLUMNS)))
        done.num_doubled += attempts.num_rows - attempts.group_by(["key", "attempt"]).aggregate([]).num_rows
        failures = last_attempts(attempts)
        failures = failures.filter(pa.array(~done.keys.contains(failures.column("key").to_numpy())))
        retried = pa.array([is_retried(reason) for reason in failures.column("reason").to_pylist()], pa.bool_())
        again, final = failures.filter(retried), failures.filter(pc.invert(retried))
        done.attempts = dict(zip(again.column("key").to_pylist(), again.column("attempt").to_pylist(), strict=True))
        done.keys.add(final.column("key").to_numpy())
        done.num_failed = final.num_rows
        return done

    def parts(self, folder: str) -> list[str]:
        """Return the URLs of the parts in `captions` or `failures`, and of whatever else readers take for one."""
        url = join(self.url, folder)
        names = self.store.names(url)
        return [join(url, name) for name in names if name.endswith(".parquet") and not name.startswith((".", "_"))]

    def _columns(self, parts: Iterable[str], columns: list[str]) -> Iterator[pa.Table]:
        identity = self.digest
        for url, part in self._read_each(list(parts), columns):
            problem = _problem(part, identity)
            if problem:
                raise OutputError(
                    f"{redact(url)} {problem}; expected a part of this table. See what jobs/verify.py"
                    f" {redact(self.url)} says; with --repair it puts a torn one aside"
                )
            assert part is not None
            yield part

    def _read_each(self, parts: Sequence[str], columns: list[str]) -> Iterator[tuple[str, pa.Table | None]]:
        """Yield the columns of each part; a thread is asked for several at once, or asking would take as long."""
        groups = [parts[start : start + _GROUP] for start in range(0, len(parts), _GROUP)]
        for group, found in read_ahead(lambda group: [self.read(url, columns) for url in group], groups):
            yield from zip(group, found, strict=True)

    def read(self, url: str, columns: list[str]) -> pa.Table | None:
        """Return some fixed columns of a part, its footer in the schema's metadata; None where it is torn.

        Raises StoreError where the store does not deliver it.
        """
        schema = columns_schema(columns)
        try:
            with pq.ParquetFile(self._open(url)) as file:
                part, metadata = file.read(columns=columns, use_threads=False), file.metadata.metadata
            part = part.replace_schema_metadata()
            if not part.schema.equals(schema):
                part = part.select(columns).cast(schema)
            return part.replace_schema_metadata(metadata)
        except StoreError:
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError):  # the last for a null where none may be
            return None

    def _open(self, url: str) -> Any:
        """Return what Arrow reads a part from: a small one comes whole, in one request."""
        said = PartName.parse(urls.name(url))
        is_small = said is not None and said.num_rows <= _SMALL_ROWS
        return pa.BufferReader(self.store.read_bytes(url)) if is_small else self.store.open(url)

    # Writing

    def write(self, rows: pa.Table, stamp: Stamp, kept: Sequence[pa.Field] = ()) -> PartSummary:
        """Put captioned rows on disk: at most one new file each in `captions/` and `failures/`.

        rows: of `rows.captioned_schema(kept)`. Raises JobError when the store refuses, or the run lost its lease.
        """
        rows = rows.sort_by("key")
        is_failed = pc.is_valid(rows.column("reason"))
        captions, failures = rows.filter(pc.invert(is_failed)), rows.filter(is_failed)
        parts = [
            self._write_new("captions", captions, captions_schema(kept), stamp),
            self._write_new("failures", failures, FAILURES, stamp),
        ]
        reasons = Counter(failures.column("reason").to_pylist())
        num_tokens = pc.sum(captions.column("num_tokens")).as_py() or 0
        return PartSummary(
            captions.num_rows,
            dict(reasons),
            num_tokens,
            tuple(part for part in parts if part),
            last_readings(rows.column("model_clock")),
        )

    def _write_new(self, folder: str, rows: pa.Table, schema: pa.Schema, stamp: Stamp) -> str | None:
        if not rows.num_rows:
            return None
        run_ids = pa.repeat(pa.scalar(stamp.run_id), rows.num_rows)
        return self.write_part(folder, rows.append_column("run_id", run_ids).select(schema.names).cast(schema), stamp)

    def write_part(self, folder: str, rows: pa.Table, stamp: Stamp) -> str:
        """Put rows of the table, sorted by key, on disk as one part; return its URL. Raises as `write` does."""
        name = PartName(stamp.run_id, rows.num_rows, digest_of_keys(rows.column("key").to_numpy()))
        url = join(self.url, folder, str(name))
        try:
            self.store.write_atomic(url, encode(rows, stamp), lambda: self._check_lease(stamp))
        except OSError as error:
            raise JobError(f"{redact(url)} could not be written: {error}") from error
        return url

    def _check_lease(self, stamp: Stamp) -> None:
        if stamp.is_leased and not lease.is_held(self.store, self.run_folder, stamp.run_id):
            raise JobError(
                f"run {stamp.run_id} ended, or lost {redact(self.url)} to another job: a part that came too late was"
                " not written. The same command continues"
            )

    def num_written(self, run_id: str) -> int:
        """Return how many rows a run has put on disk so far, from the names of its parts."""
        names = (PartName.parse(urls.name(url)) for folder in FOLDERS for url in self.parts(folder))
        return sum(found.num_rows for found in names if found and found.run_id == run_id)

    def failed_by_reason(self, run_id: str) -> dict[str, int]:
        """Return how many failures of a run are on disk so far, by reason."""
        counts: Counter[str] = Counter()
        for url in self.parts("failures"):
            named = PartName.parse(urls.name(url))
            part = self.read(url, ["reason"]) if named and named.run_id == run_id else None
            counts.update([] if part is None else part.column("reason").to_pylist())
        return dict(counts)

    def sample(self, num_rows: int) -> list[dict[str, Any]]:
        """Return `image_id` and `caption` of the first rows of the table's first part."""
        for url in self.parts("captions")[:1]:
            with pq.ParquetFile(self.store.open(url)) as file:
                rows: list[dict[str, Any]] = next(
                    file.iter_batches(num_rows, columns=["image_id", "caption"])
                ).to_pylist()
                return rows
        return []


def columns_schema(columns: Iterable[str]) -> pa.Schema:
    """Return the schema of some fixed columns of either folder."""
    return pa.schema([_FIELDS[name] for name in columns])


def light(failures: pa.Table) -> pa.Table:
    """Return the FAILURE_COLUMNS of a part in 16 bytes a row: each reason is written once."""
    index = failures.schema.get_field_index("reason")
    return failures.set_column(index, "reason", failures.column(index).dictionary_encode()).replace_schema_metadata()


def concat_attempts(failures: Iterable[pa.Table]) -> pa.Table:
    """Return all failures, each `light`, as one table."""
    return pa.concat_tables([light(FAILURES.empty_table().select(FAILURE_COLUMNS)), *failures])


def last_attempts(failures: pa.Table) -> pa.Table:
    """Return each failed key's row of the highest attempt, sorted by key."""
    rows = failures.sort_by([("key", "ascending"), ("attempt", "ascending")])
    keys = rows.column("key").to_numpy()
    is_last = np.ones(len(keys), bool)
    is_last[:-1] = keys[1:] != keys[:-1]
    return rows.filter(pa.array(is_last))


def _problem(part: pa.Table | None, identity: str) -> str:
    if part is None:
        return "cannot be read"
    found = footer(part.schema.metadata).identity
    return "" if found == identity else f"was written by another run (its footer says {found or 'nothing'})"


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _essence(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the model's name: what a model is, its fingerprint says, wherever it lies."""
    return {name: value for name, value in _flat(identity) if name != "model.name"}


def _difference(url: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    before, now = dict(_flat(found)), dict(_flat(wanted))
    names = sorted(name for name in before | now if before.get(name) != now.get(name))
    lines = [f"  {name}: {before.get(name)} there, {now.get(name)} now" for name in names]
    return "\n".join(
        [
            f"{redact(url)} holds captions of another job; expected the same settings as before. These differ:",
            *lines,
            "Choose another OUTPUT, or repeat the earlier settings to continue it.",
        ]
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
