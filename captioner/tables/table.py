"""The output folder of a caption job: what it is, what it holds, how a part is added.

Knows where the parts are and which rows are done; what a part holds is in `parts`, what is wrong with a table in
`audit`, and how a table is changed in `repair` and `compaction`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import InputError, JobError, OutputError
from captioner.prompts import answer_counts, answer_fields, answered_prompts, num_tokens
from captioner.schema import CAPTIONS, FAILURES, captions_schema
from captioner.storage import Location, Place, Store, as_location, full_url, open_store, urls
from captioner.storage.faults import ROOM_NEEDED, StoreError, diagnose, output_errors
from captioner.storage.json_text import parse_object
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import join, redact
from captioner.tables import lease
from captioner.tables.clock_readings import Reading, last_readings
from captioner.tables.failures import FAILURE_COLUMNS, FailedAttempts
from captioner.tables.identity import flatten, refusal, to_json
from captioner.tables.keys import KeySet
from captioner.tables.parts import PartName, Stamp, encode, footer, read_ahead

__all__ = [
    "FOLDERS",
    "CaptionTable",
    "Done",
    "PartSummary",
    "columns_schema",
    "open_table",
    "table_around",
]

FORMAT = 1
FOLDERS = ("captions", "failures")
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
    """The last reading of each model worker's clock among these rows."""
    answers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What `prompts.answer_counts` tells of each prompt."""

    @property
    def failed(self) -> int:
        """Rows that went to `failures/`."""
        return sum(self.failed_by_reason.values())


@dataclass
class Done:
    """The rows that a table holds already.

    `keys` need no more work. `attempts` maps the keys that will be tried again to the attempts they had.
    """

    keys: KeySet = field(default_factory=KeySet)
    attempts: dict[int, int] = field(default_factory=dict)
    num_captioned: int = 0
    num_failed: int = 0
    num_duplicates: int = 0
    """Rows that another part holds too: a writer outlived its driver (see `repair.deduplicate`)."""

    parts: frozenset[str] = frozenset()
    """URLs of the parts that were read."""


class CaptionTable:
    """The output folder of a caption job."""

    def __init__(self, place: Place) -> None:
        self.location = as_location(place).folder
        self.store: Store = open_store(self.location)
        self.run_folder = self.location / "_run"

    # What the table is

    def identity(self) -> dict[str, Any] | None:
        """Return what the table was made with, or None where no run has begun."""
        if self.store.info(self._run_file) is None:
            return None
        try:
            return parse_object(self.store.read_bytes(self._run_file))
        except ValueError as error:
            raise OutputError(
                f"{self._run_file} is damaged: {error}; expected the JSON that the first run wrote."
                " Restore it, or choose another OUTPUT"
            ) from error

    def answers(self) -> list[pa.Field]:
        """Return the columns that its prompts add."""
        return answer_fields(answered_prompts(self.identity() or {}))

    @property
    def _run_file(self) -> Location:
        return self.run_folder / "run.json"

    def refuse_other_job(self, identity: Mapping[str, Any]) -> None:
        """Check that a run of `identity` may write here. Writes nothing.

        Raises OutputError when the folder holds another run's captions, naming what differs, or parts without a run.
        """
        found, wanted = self.identity(), {"format": FORMAT, **identity}
        if found is None:
            self.refuse_parts("no _run/run.json")
        elif _settings_that_count(found, wanted) != _settings_that_count(wanted, found):
            raise OutputError(refusal(self.location, "captions of another job", found, wanted, output="OUTPUT"))

    def claim(self, identity: Mapping[str, Any], before_write: Callable[[], None] = lambda: None) -> None:
        """Make this table one of `identity`, unless it is. Raises as `refuse_other_job` and `before_write` do."""
        self.refuse_other_job(identity)
        if self.identity() is None:
            self.store.write_atomic(self._run_file, to_json({"format": FORMAT, **identity}), before_write)

    @property
    def digest(self) -> str:
        """Digest of what the table was made with, as in each part's footer; empty where no run has begun."""
        found = self.identity()
        return "" if found is None else hashlib.blake2b(to_json(found), digest_size=16).hexdigest()

    def refuse_parts(self, missing: str) -> None:
        """Raise OutputError where the table has parts. missing: what it lacks, so that no run can continue it."""
        parts = [part for folder in FOLDERS for part in self.parts(folder)]
        if parts:
            raise OutputError(
                f"{self.location} holds {len(parts)} parts but {missing}, so no run can continue them;"
                " expected an empty folder or an earlier run of this job. Restore it, or choose another OUTPUT"
            )

    def other_names(self) -> list[str]:
        """Return the names in the table's folder that are none of its own."""
        names = {urls.name(entry.url.rstrip("/")) for entry in self.store.entries(self.location)}
        return sorted(names - {*FOLDERS, "_run"})

    def record(self, run_id: str, facts: Mapping[str, Any]) -> None:
        """Write `_run/runs/<run_id>.json`: the config, the versions, later the summary."""
        self.store.write_atomic(self.run_folder / "runs" / f"{run_id}.json", to_json(facts))

    def recorded(self, run_id: str) -> Mapping[str, Any]:
        """Return what `record` has kept of a run; nothing where that cannot be read."""
        try:
            return parse_object(self.store.read_bytes(self.run_folder / "runs" / f"{run_id}.json"))
        except ValueError:
            return {}

    def run_ids(self) -> set[str]:
        """Return the ids of all runs that were recorded."""
        names = self.store.names(self.run_folder / "runs")
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def take_lease(
        self, purpose: str, timing: lease.Timing = lease.DEFAULT_TIMING
    ) -> AbstractContextManager[lease.Lease]:
        """Return the lease, which keeps every other job from writing this table; see `lease.take_lease`."""
        return lease.take_lease(self.store, self.run_folder, purpose, timing)

    # What is done

    def done(self, is_retried: Callable[[str], bool]) -> Done:
        """Return which rows are done: every captioned row, and each failed one unless its reason is retried.

        Reads the key columns of all parts. Raises OutputError for a part that is torn or of another run, StoreError.
        """
        done, parts = Done(), {folder: self.parts(folder) for folder in FOLDERS}
        done.parts = frozenset(url for found in parts.values() for url in found)
        for part in self._columns(parts["captions"], ["key"]):
            done.num_duplicates += len(done.keys.add(part.column("key").to_numpy()))
        done.num_captioned = done.keys.count()
        failed = FailedAttempts()
        for part in self._columns(parts["failures"], FAILURE_COLUMNS):
            failed.add(part)
        done.num_duplicates += failed.num_duplicates
        for rows in failed.last(done.keys):
            retried = pa.array([is_retried(reason) for reason in rows.column("reason").to_pylist()], pa.bool_())
            again, final = rows.filter(retried), rows.filter(pc.invert(retried))
            done.attempts.update(zip(again.column("key").to_pylist(), again.column("attempt").to_pylist(), strict=True))
            done.keys.add(final.column("key").to_numpy())
            done.num_failed += final.num_rows
        return done

    def parts(self, folder: str) -> list[str]:
        """Return the URLs of the parts in `captions` or `failures`, and of other files that readers take for one."""
        url = full_url(self.location / folder)
        names = self.store.names(url)
        return [join(url, name) for name in names if name.endswith(".parquet") and not name.startswith((".", "_"))]

    def _columns(self, parts: Iterable[str], columns: list[str]) -> Iterator[pa.Table]:
        identity = self.digest
        for url, part in self._read_each(list(parts), columns):
            problem = _problem(part, identity)
            if problem:
                raise OutputError(
                    f"{redact(url)} {problem}; expected a part of this table. See what jobs/verify.py"
                    f" {self.location} says; with --repair it puts a torn one aside"
                )
            assert part is not None
            yield part

    def _read_each(self, parts: Sequence[str], columns: list[str]) -> Iterator[tuple[str, pa.Table | None]]:
        """Yield the columns of each part; a thread reads several in one call, which costs as much as one part."""
        groups = [parts[start : start + _GROUP] for start in range(0, len(parts), _GROUP)]
        for group, found in read_ahead(lambda group: [self.read(url, columns) for url in group], groups):
            yield from zip(group, found, strict=True)

    def read(self, url: str, columns: list[str]) -> pa.Table | None:
        """Return some fixed columns of a part, its footer in the schema's metadata; None where it is torn.

        Raises StoreError where the store does not deliver it.
        """
        schema = columns_schema(columns)
        try:
            with open_parquet_file(self._open(url)) as file:
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
        """Return a file for Arrow; a small part is read whole, in one request."""
        named = PartName.parse(urls.name(url))
        is_small = named is not None and named.num_rows <= _SMALL_ROWS
        return self.store.read_bytes(url) if is_small else self.store.open(url)

    # Writing

    def write(
        self, rows: pa.Table, stamp: Stamp, kept: Sequence[pa.Field] = (), answers: Sequence[pa.Field] = ()
    ) -> PartSummary:
        """Put captioned rows on disk: at most one new file each in `captions/` and `failures/`.

        rows: of `schema.captioned_schema(kept, answers)`. Raises JobError when the store refuses, or the run lost its
        lease.
        """
        rows = rows.sort_by("key")
        is_failed = pc.is_valid(rows.column("reason"))
        captions, failures = rows.filter(pc.invert(is_failed)), rows.filter(is_failed)
        parts = [
            self._write_new("captions", captions, captions_schema(kept, answers), stamp),
            self._write_new("failures", failures, FAILURES, stamp),
        ]
        reasons = Counter(failures.column("reason").to_pylist())
        return PartSummary(
            captions.num_rows,
            dict(reasons),
            num_tokens(captions, answers),
            tuple(part for part in parts if part),
            last_readings(rows.column("model_clock")),
            answer_counts(captions, answers),
        )

    def _write_new(self, folder: str, rows: pa.Table, schema: pa.Schema, stamp: Stamp) -> str | None:
        if not rows.num_rows:
            return None
        run_ids = pa.repeat(pa.scalar(stamp.run_id), rows.num_rows)
        return self.write_part(folder, rows.append_column("run_id", run_ids).select(schema.names).cast(schema), stamp)

    def write_part(self, folder: str, rows: pa.Table, stamp: Stamp, root: Location | None = None) -> str:
        """Put sorted rows of the table on disk as one part; return its URL. Raises as `write` does.

        root: what `folder` lies in; by default the table."""
        url = full_url((root or self.location) / folder / str(PartName.of(folder, stamp.run_id, rows)))
        try:
            self.store.write_atomic(url, encode(rows, stamp), lambda: self._check_lease(stamp))
        except OSError as error:
            fault = diagnose(error)
            remedy = f"; {ROOM_NEEDED}" if fault.is_disk_full else ""
            raise JobError(f"{redact(url)} could not be written: {fault.detail}{remedy}") from error
        return url

    def _check_lease(self, stamp: Stamp) -> None:
        why = lease.why_not_held(self.store, self.run_folder, stamp.run_id) if stamp.is_leased else ""
        if why:
            raise JobError(f"{why}: a part that came too late was not written. The same command continues")

    def num_written(self, run_id: str, folders: Sequence[str] = FOLDERS) -> int:
        """Return how many rows a run has put on disk so far, from the names of its parts."""
        names = (PartName.parse(urls.name(url)) for folder in folders for url in self.parts(folder))
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
            with open_parquet_file(self.store.open(url)) as file:
                batch = next(file.iter_batches(num_rows, columns=["image_id", "caption"]))
                rows: list[dict[str, Any]] = batch.cast(columns_schema(["image_id", "caption"])).to_pylist()
                return rows
        return []


def open_table(place: Place) -> CaptionTable:
    """Return a table that is there: a run has begun it, or it has parts. Raises InputError where none is."""
    table = CaptionTable(place)
    with output_errors(table.location):
        if table.identity() is None and not any(table.parts(folder) for folder in FOLDERS):
            raise InputError(
                f"{table.location} is no caption table; expected the OUTPUT of jobs/caption.py, the folder in which"
                f" captions/ and _run/ lie{_hint(table)}"
            )
    return table


def _hint(table: CaptionTable) -> str:
    """Return the table that the path is a folder of, as the end of a message; empty where it is none's."""
    found = table_around(table.location)
    return "" if found is None else f": {found}"


def table_around(place: Place) -> Location | None:
    """Return the table that a place is, or is a folder of; None where it is none. Raises StoreError."""
    here = as_location(place).folder
    around = [here, here.parent] if here.name in (*FOLDERS, "_run") else [here]
    store = open_store(here)
    return next((folder for folder in around if store.info(folder / "_run" / "run.json")), None)


def columns_schema(columns: Iterable[str]) -> pa.Schema:
    """Return the schema of some fixed columns of either folder."""
    return pa.schema([_FIELDS[name] for name in columns])


def _problem(part: pa.Table | None, identity: str) -> str:
    if part is None:
        return "cannot be read"
    found = footer(part.schema.metadata).identity
    return "" if found == identity else f"was written by another run (its footer says {found or 'nothing'})"


def _settings_that_count(identity: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be equal in two identities.

    Not the model's name: its fingerprint identifies it, in any folder. Not its dtype where one is `auto`,
    which another one may mean: it is compared once the workers are known (`captioning.number_format`).
    """
    is_auto = "auto" in (flatten(each).get("model.dtype") for each in (identity, other))
    without = {"model.name", "model.dtype"} if is_auto else {"model.name"}
    return {name: value for name, value in flatten(identity).items() if name not in without}
