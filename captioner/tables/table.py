"""The output folder of a caption job: what it is, what it holds, how a part is added.

Knows where the parts are; which of its columns are stored together is in `column_family`, which rows are done in
`done`, what a part holds in `parts`, what is wrong with a table in `audit`, and how a table is changed in `repair` and
`compaction`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import InputError, JobError, OutputError
from captioner.prompts import CAPTION, answer_counts, answer_fields, answered_prompts, num_tokens
from captioner.schema import CAPTIONS, FAILURES
from captioner.storage import Location, Place, Store, as_location, full_url, open_store, urls
from captioner.storage.faults import ROOM_NEEDED, StoreError, diagnose, output_errors
from captioner.storage.json_text import parse_object
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import join, redact
from captioner.tables import lease
from captioner.tables.clock_readings import Reading, last_readings
from captioner.tables.column_family import (
    COLUMNS,
    FOLDERS,
    ColumnFamily,
    added_identity,
    begun_with,
    digest_of,
    families_of,
    is_added_name,
)
from captioner.tables.identity import flatten, refusal, to_json
from captioner.tables.parts import PartName, Stamp, encode, footer, read_ahead

__all__ = [
    "CaptionTable",
    "PartSummary",
    "columns_schema",
    "hint_at_table",
    "open_table",
    "table_around",
]

FORMAT = 1
_GROUP = 8
_SMALL_ROWS = 4096
_FIELDS = {field.name: field for schema in (CAPTIONS, FAILURES) for field in schema}


@dataclass(frozen=True)
class PartSummary:
    """What one call of `CaptionTable.write` put on disk."""

    captioned: int
    """Rows that have what they were asked for."""

    failed_by_reason: dict[str, int]
    num_tokens: int
    parts: tuple[str, ...] = ()
    """URLs of the files."""
    clocks: tuple[Reading, ...] = ()
    """The last reading of each model worker's clock among these rows."""
    answers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What `prompts.answer_counts` tells of each prompt that was asked."""

    @property
    def failed(self) -> int:
        """Rows that went to a folder of failures."""
        return sum(self.failed_by_reason.values())


class CaptionTable:
    """The output folder of a caption job."""

    def __init__(self, place: Place) -> None:
        self.location = as_location(place).folder
        self.store: Store = open_store(self.location)
        self.run_folder = self.location / "_run"

    # What the table is

    def identity(self) -> dict[str, Any] | None:
        """Return what the table was made with, prompts that were added since among it; None where no run has begun."""
        begun_as, added = self._begun_as(), self._added()
        return {**begun_as, "prompts": begun_as.get("prompts", {}) | added} if begun_as and added else begun_as

    def _begun_as(self) -> dict[str, Any] | None:
        return self._object(self._run_file, "the first run")

    def _added(self) -> dict[str, dict[str, Any]]:
        """Return the prompts that were added since the table was begun: name -> identity."""
        folder = self.location / COLUMNS
        names = [urls.name(entry.url) for entry in self.store.entries(folder) if entry.is_folder]
        files = {name: self._object(self._prompt_file(name), "a run") for name in names if is_added_name(name)}
        return {name: found.get("prompt", {}) for name, found in files.items() if found}

    def _prompt_file(self, name: str) -> Location:
        return self.location / COLUMNS / name / "prompt.json"

    def _object(self, file: Location, writer: str) -> dict[str, Any] | None:
        if (data := self.store.read_or_none(file)) is None:
            return None
        try:
            return parse_object(data)
        except ValueError as error:
            raise OutputError(
                f"{file} is damaged: {error}; expected the JSON that {writer} wrote. Restore it, or choose another"
                " OUTPUT"
            ) from error

    def families(self, wanted: Mapping[str, Any] | None = None) -> list[ColumnFamily]:
        """Return its column families, that of the captions first.

        wanted: the identity of a job that may write here; those of its prompts that are new count too."""
        begun_as = self._begun_as() or begun_with(wanted or {})
        known = begun_as.get("prompts", {})
        new = {name: one for name, one in (wanted or {}).get("prompts", {}).items() if name not in known}
        return list(families_of(begun_as, self._added() | new, self.digest))

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
            return
        _refuse_named_caption(self.location, wanted, found)
        wanted = _without_new_prompts(wanted, found)
        if _settings_that_count(found, wanted) != _settings_that_count(wanted, found):
            raise OutputError(refusal(self.location, "captions of another job", found, wanted, output="OUTPUT"))

    def claim(self, identity: Mapping[str, Any], before_write: Callable[[], None] = lambda: None) -> None:
        """Make this table one of `identity`, unless it is: begin it, or add the prompts that it has not.

        Raises as `refuse_other_job` and `before_write` do."""
        self.refuse_other_job(identity)
        if self._begun_as() is None:
            self.store.write_atomic(self._run_file, to_json({"format": FORMAT, **begun_with(identity)}), before_write)
        for family in self.families(identity):
            if family.is_added and self.store.info(file := self._prompt_file(family.prompt)) is None:
                self.refuse_parts(f"no {COLUMNS}/{family.prompt}/{file.name}", family.folders)
                added = added_identity(self.digest, identity["prompts"][family.prompt])
                self.store.write_atomic(file, to_json(added), before_write)

    @property
    def digest(self) -> str:
        """Digest of what the table was begun with, as in each part's footer; empty where no run has begun."""
        found = self._begun_as()
        return "" if found is None else digest_of(found)

    def refuse_parts(self, missing: str, folders: Sequence[str] = FOLDERS) -> None:
        """Raise OutputError where some folders have parts. missing: what is not there, so that no run can continue."""
        parts = [part for folder in folders for part in self.parts(folder)]
        if parts:
            raise OutputError(
                f"{self.location} holds {len(parts)} parts but {missing}, so no run can continue them;"
                " expected an empty folder or an earlier run of this job. Restore it, or choose another OUTPUT"
            )

    def other_names(self) -> list[str]:
        """Return the names in the table's folder that are none of its own."""
        names = {urls.name(entry.url.rstrip("/")) for entry in self.store.entries(self.location)}
        return sorted(names - {*FOLDERS, COLUMNS, "_run"})

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

    # Parts

    def parts(self, folder: str) -> list[str]:
        """Return the URLs of the parts in a folder of a column family, and of other files that readers take for one."""
        url = full_url(self.location / folder)
        names = self.store.names(url)
        return [join(url, name) for name in names if name.endswith(".parquet") and not name.startswith((".", "_"))]

    def read_all(self, parts: Iterable[str], columns: list[str], digest: str) -> Iterator[pa.Table]:
        """Yield some fixed columns of each part. digest: that of their column family.

        Raises OutputError for a part that is torn or of another run, StoreError."""
        for url, part in self._read_each(list(parts), columns):
            problem = _problem(part, digest)
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
        self, rows: pa.Table, stamp: Stamp, kept: Sequence[pa.Field] = (), families: Sequence[ColumnFamily] = ()
    ) -> PartSummary:
        """Put captioned rows on disk: at most one new file in each folder.

        rows: of `schema.captioned_schema`, with the kept columns and answers; where it has the column ASKED, a row is
        written to the families whose prompts it names. families: of the table; by default captions without answers.
        Raises JobError when the store refuses, or the run lost its lease.
        """
        rows = rows.sort_by("key")
        is_failed = pc.is_valid(rows.column("reason"))
        made, failed = rows.filter(pc.invert(is_failed)), rows.filter(is_failed)
        parts, answers = list[str | None](), dict[str, Mapping[str, int]]()
        for family in families or families_of({}, {}, stamp.identity):
            own = replace(stamp, identity=family.digest) if family.is_added else stamp
            rows_of, failures_of = family.asked(made), family.failed(failed)
            parts.append(self._write_new(family.rows, rows_of, family.schema(family.rows, kept), own))
            parts.append(self._write_new(family.failures, failures_of, FAILURES, own))
            answers |= answer_counts(rows_of, family.prompts, family.answers) if rows_of.num_rows else {}
        fields = [field for family in families for field in family.answers if field.name in made.column_names]
        return PartSummary(
            made.num_rows,
            dict(Counter(failed.column("reason").to_pylist())),
            num_tokens(made, fields),
            tuple(part for part in parts if part),
            last_readings(rows.column("model_clock")),
            answers,
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

    def failed_by_reason(self, run_id: str, folders: Sequence[str]) -> dict[str, int]:
        """Return how many images have failed in a run so far, by reason. folders: those of the failures."""
        found: dict[int, str] = {}
        for url in (url for folder in folders for url in self.parts(folder)):
            named = PartName.parse(urls.name(url))
            part = self.read(url, ["key", "reason"]) if named and named.run_id == run_id else None
            if part is not None:
                found.update(zip(part.column("key").to_pylist(), part.column("reason").to_pylist(), strict=True))
        return dict(Counter(found.values()))

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
                f" captions/ and _run/ lie{hint_at_table(table.location)}"
            )
    return table


def hint_at_table(place: Place) -> str:
    """Return the table that a place is a folder of, as a piece of a message; empty where it is none's."""
    found = table_around(place)
    return "" if found is None else f": {found}"


def table_around(place: Place) -> Location | None:
    """Return the table that a place is, or is a folder of; None where it is none. Raises StoreError."""
    here = as_location(place).folder
    around, inner = [here], here
    for _ in range(3):  # OUTPUT/columns/tags/answers is the deepest folder of parts
        around += [inner.parent] if inner.name in (*FOLDERS, COLUMNS, "_run") else []
        inner = inner.parent
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


def _without_new_prompts(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a job without the prompts that it adds to a table."""
    known = {name: one for name, one in wanted.get("prompts", {}).items() if name in found.get("prompts", {})}
    return {name: value for name, value in wanted.items() if name != "prompts"} | ({"prompts": known} if known else {})


def _refuse_named_caption(table: Location, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise OutputError where a job names `caption`, and the captions of the table answer no named prompt."""
    if CAPTION in wanted.get("prompts", {}) and CAPTION not in found.get("prompts", {}):
        named = wanted["prompts"][CAPTION]
        raise OutputError(
            f"{table} has captions that answer --prompt, or the model's own prompt, and --prompts has {CAPTION}:"
            f" {named.get('text') or named.get('texts')}; expected prompts without it: a column answers one prompt."
            f" Name it {CAPTION}_2, or leave it out, and give --prompt as before, or choose another OUTPUT"
        )


def _settings_that_count(identity: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be equal in two identities.

    Not the model's name: its fingerprint identifies it, in any folder. Not its dtype where one is `auto`,
    which another one may mean: it is compared once the workers are known (`captioning.number_format`).
    """
    is_auto = "auto" in (flatten(each).get("model.dtype") for each in (identity, other))
    without = {"model.name", "model.dtype"} if is_auto else {"model.name"}
    return {name: value for name, value in flatten(identity).items() if name not in without}
