"""Caption tables: find what is done, write a part, prove that every row came out once.

    OUTPUT/captions/part-*.parquet   one row an image that has a caption
    OUTPUT/failures/part-*.parquet   one row a failed attempt; append-only
    OUTPUT/_run/run.json             what this table is: input, model, decoding
    OUTPUT/_run/runs/*.json          one file an invocation: config, versions, summary
    OUTPUT/_run/units.parquet, listing/    the frozen input (see `captioner.sources`)

The parts themselves are the only record of what is done: nothing else is read to continue a run. Knows no Ray and no
model. A part is written whole or not at all, under a name made from its rows, so that writing it twice is writing it
once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.errors import JobError, OutputError
from captioner.keys import KeySet
from captioner.rows import CAPTIONS, FAILURES, captions_schema
from captioner.sources.store import Store, open_store
from captioner.sources.urls import join, redact

__all__ = ["Audit", "CaptionTable", "Done", "PartSummary", "Stamp"]

FORMAT = 1
_READERS = 16  # parts read at the same time: they wait for the store, not for a core
_ROW_GROUP_ROWS = 131_072
_FAILURE_COLUMNS = ["key", "attempt", "reason"]
_FIELDS = {field.name: field for schema in (CAPTIONS, FAILURES) for field in schema}


@dataclass(frozen=True)
class Stamp:
    """What stands in the footer of every part: who wrote it, and for which table."""

    run_id: str
    identity: str

    @property
    def footer(self) -> dict[bytes, bytes]:
        """The Parquet key-value metadata."""
        return {b"captioner.run_id": self.run_id.encode(), b"captioner.identity": self.identity.encode()}


@dataclass(frozen=True)
class PartSummary:
    """What one call of `CaptionTable.write` put on disk."""

    captioned: int
    failed_by_reason: dict[str, int]
    num_tokens: int

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


@dataclass
class Audit:
    """What `CaptionTable.audit` found; the table is right when `is_whole`."""

    read: int | None
    captioned: int
    failed: int
    failed_by_reason: dict[str, int]
    missing: int
    duplicated: int
    alien: int
    unread_units: int
    torn_parts: list[str]
    foreign_parts: list[str]

    @property
    def is_whole(self) -> bool:
        """True if every row of the input came out exactly once, and nothing else did."""
        wrong = self.missing or self.duplicated or self.alien or self.unread_units
        return not (wrong or self.torn_parts or self.foreign_parts)


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
        strangers = [part for folder in ("captions", "failures") for part in self._parts(folder)]
        if strangers:
            raise OutputError(
                f"{redact(self.url)} holds {len(strangers)} parts but no _run/run.json, so no run can continue them;"
                " expected an empty folder or an earlier run of this job. Choose another OUTPUT"
            )

    def record(self, run_id: str, facts: Mapping[str, Any]) -> None:
        """Write `_run/runs/<run_id>.json`: the config, the versions, later the summary."""
        self.store.write_atomic(join(self.run_folder, "runs", f"{run_id}.json"), _json(facts))

    # What is done

    def done(self, is_retried: Callable[[str], bool]) -> Done:
        """Return what need not be done again: every captioned row, and each failed one unless its reason is retried.

        Reads the key columns of all parts. Raises OutputError for a part that is torn or of another run.
        """
        done = Done()
        for part in self._read_parts("captions", ["key"]):
            done.keys.add(part.column("key").to_numpy())
        done.num_captioned = done.keys.count()
        failures = _last_attempts(_concat(self._read_parts("failures", _FAILURE_COLUMNS)))
        failures = failures.filter(pa.array(~done.keys.contains(failures.column("key").to_numpy())))
        retried = pa.array([is_retried(reason) for reason in failures.column("reason").to_pylist()], pa.bool_())
        again, final = failures.filter(retried), failures.filter(pc.invert(retried))
        done.attempts = dict(zip(again.column("key").to_pylist(), again.column("attempt").to_pylist(), strict=True))
        done.keys.add(final.column("key").to_numpy())
        done.num_failed = final.num_rows
        return done

    def _parts(self, folder: str) -> list[str]:
        url = join(self.url, folder)
        names = self.store.names(url)
        return [join(url, name) for name in names if name.endswith(".parquet") and not name.startswith((".", "_"))]

    def _read_parts(self, folder: str, columns: list[str]) -> Iterator[pa.Table]:
        identity = self.digest
        with ThreadPoolExecutor(_READERS) as pool:
            for url, part in pool.map(lambda url: (url, self._read_part(url, columns)), self._parts(folder)):
                problem = _problem(part, identity)
                if problem:
                    raise OutputError(
                        f"{redact(url)} {problem}; expected a part of this table."
                        " See what jobs/verify.py says, then move the file away"
                    )
                yield part

    def _read_part(self, url: str, columns: list[str]) -> pa.Table | None:
        """Return some columns of a part, its footer in the schema's metadata; None where it cannot be read."""
        try:
            with pq.ParquetFile(self.store.open(url)) as file:
                part = file.read(columns=columns).select(columns).cast(pa.schema([_FIELDS[name] for name in columns]))
                return part.replace_schema_metadata(file.metadata.metadata)
        except (pa.ArrowException, OSError, KeyError, ValueError):  # the last for a null where none may be
            return None

    # Writing

    def write(self, rows: pa.Table, stamp: Stamp, kept: Sequence[pa.Field] = ()) -> PartSummary:
        """Put captioned rows on disk: at most one new file each in `captions/` and `failures/`.

        rows: of `rows.captioned_schema(kept)`. Raises JobError when the store refuses.
        """
        rows = rows.sort_by("key")
        is_failed = pc.is_valid(rows.column("reason"))
        captions, failures = rows.filter(pc.invert(is_failed)), rows.filter(is_failed)
        self._write_part("captions", captions, captions_schema(kept), stamp)
        self._write_part("failures", failures, FAILURES, stamp)
        reasons = Counter(failures.column("reason").to_pylist())
        return PartSummary(captions.num_rows, dict(reasons), pc.sum(captions.column("num_tokens")).as_py() or 0)

    def _write_part(self, folder: str, rows: pa.Table, schema: pa.Schema, stamp: Stamp) -> None:
        if not rows.num_rows:
            return
        run_ids = pa.repeat(pa.scalar(stamp.run_id), rows.num_rows)
        rows = rows.append_column("run_id", run_ids).select(schema.names).cast(schema)
        content = hashlib.blake2b(rows.column("key").to_numpy().tobytes(), digest_size=8).hexdigest()
        url = join(self.url, folder, f"part-{stamp.run_id}-{rows.num_rows}-{content}.parquet")
        try:
            self.store.write_atomic(url, _parquet(rows.replace_schema_metadata(stamp.footer)))
        except OSError as error:
            raise JobError(f"{redact(url)} could not be written: {error}") from error

    def num_written(self, run_id: str) -> int:
        """Return how many rows a run has put on disk so far, from the names of its parts."""
        names = [
            name.split("-") for folder in ("captions", "failures") for name in self.store.names(join(self.url, folder))
        ]
        return sum(int(name[-2]) for name in names if "-".join(name[1:-2]) == run_id)

    def sample(self, num_rows: int) -> list[dict[str, Any]]:
        """Return `image_id` and `caption` of the first rows of the table's first part."""
        for part in self._parts("captions")[:1]:
            rows = self._read_part(part, ["image_id", "caption"])
            return [] if rows is None else rows.slice(0, num_rows).to_pylist()
        return []

    # Proof

    def audit(self, unit_rows: Mapping[int, int | None]) -> Audit:
        """Return whether each row of the input came out exactly once.

        unit_rows: rows of each unit of the frozen input, None where it was never read to its end.
        """
        seen, digest = _Seen(), self.digest
        for folder in ("captions", "failures"):
            for url in self._parts(folder):
                part = self._read_part(url, ["key"] if folder == "captions" else _FAILURE_COLUMNS)
                seen.add(folder, url, part, digest)
        return seen.judge(unit_rows)


@dataclass
class _Seen:
    """What an audit has read so far."""

    captioned: KeySet = field(default_factory=KeySet)
    failures: list[pa.Table] = field(default_factory=list)
    duplicated: int = 0
    torn: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def add(self, folder: str, url: str, part: pa.Table | None, identity: str) -> None:
        problem = _problem(part, identity)
        if part is None:
            self.torn.append(redact(url))
        elif problem:
            self.foreign.append(redact(url))
        elif folder == "captions":
            self.duplicated += len(self.captioned.add(part.column("key").to_numpy()))
        else:
            self.failures.append(part)

    def judge(self, unit_rows: Mapping[int, int | None]) -> Audit:
        failed, reasons = self._failed()
        present = _union(self.captioned, failed)
        expected = [(unit, rows) for unit, rows in unit_rows.items() if rows is not None]
        missing = sum(int((~present.positions(unit, rows)).sum()) for unit, rows in expected)
        alien = sum(int(present.positions(unit)[rows:].sum()) for unit, rows in expected)
        alien += sum(present.count(unit) for unit in present.units - set(unit_rows))
        return Audit(
            read=sum(rows for _, rows in expected) if len(expected) == len(unit_rows) else None,
            captioned=self.captioned.count(),
            failed=failed.count(),
            failed_by_reason=reasons,
            missing=missing,
            duplicated=self.duplicated,
            alien=alien,
            unread_units=len(unit_rows) - len(expected),
            torn_parts=self.torn,
            foreign_parts=self.foreign,
        )

    def _failed(self) -> tuple[KeySet, dict[str, int]]:
        """Return the keys whose last word is a failure, and how many have each reason."""
        attempts = _concat(self.failures)
        distinct = attempts.group_by(["key", "attempt"]).aggregate([])
        self.duplicated += attempts.num_rows - distinct.num_rows
        last = _last_attempts(attempts)
        last = last.filter(pa.array(~self.captioned.contains(last.column("key").to_numpy())))
        failed = KeySet()
        failed.add(last.column("key").to_numpy())
        return failed, dict(Counter(last.column("reason").to_pylist()))


def _concat(failures: Iterable[pa.Table]) -> pa.Table:
    empty = FAILURES.empty_table().select(_FAILURE_COLUMNS)
    return pa.concat_tables([empty, *(part.replace_schema_metadata() for part in failures)])


def _last_attempts(failures: pa.Table) -> pa.Table:
    """Return each failed key's row of the highest attempt, sorted by key."""
    rows = failures.sort_by([("key", "ascending"), ("attempt", "ascending")])
    keys = rows.column("key").to_numpy()
    is_last = np.ones(len(keys), bool)
    is_last[:-1] = keys[1:] != keys[:-1]
    return rows.filter(pa.array(is_last))


def _union(first: KeySet, second: KeySet) -> KeySet:
    union = KeySet()
    for keys in (first, second):
        for unit in keys.units:
            union.add((unit << 32) + np.flatnonzero(keys.positions(unit)))
    return union


def _problem(part: pa.Table | None, identity: str) -> str:
    if part is None:
        return "cannot be read"
    found = (part.schema.metadata or {}).get(b"captioner.identity", b"").decode()
    return "" if found == identity else f"was written by another run (its footer says {found or 'nothing'})"


def _parquet(rows: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    return bytes(buffer.getvalue())


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
