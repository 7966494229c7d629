"""A caption table as views of DuckDB, which can read its parts and no other file or address.

    captions    one row an image that has a caption
    failures    one row an image without a caption: its last failed attempt
    attempts    every failed attempt, those too whose image got its caption later
    unanswered  one row for each prompt that was added later and each captioned image that failed to get its answer
    images      captions and failures: one row an image
    runs        one row an invocation of the job

The columns of added prompts are joined to the captions by key, null where an image has none yet. Nothing is imported:
DuckDB reads from the Parquet files the columns and row groups that a query needs. A table may be written, repaired or
compacted meanwhile (see `moved_parts`).
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa

from captioner.errors import CaptionerError, ConfigError, InputError, JobError
from captioner.query.moved_parts import ask_again
from captioner.query.part_files import PROTOCOL, READ_ONLY, PartFiles
from captioner.query.runs import read_runs
from captioner.schema import CAPTIONS, FAILURES, RejectReason
from captioner.storage import Entry, Location
from captioner.storage.faults import StoreError, diagnose, output_errors
from captioner.storage.urls import name, redact
from captioner.tables import CaptionTable, ColumnFamily
from captioner.tables.column_family import all_answers

__all__ = ["UNANSWERED", "VIEWS", "Connection", "ask", "quoted", "read_rows", "select", "stream"]

T = TypeVar("T")
Connection = duckdb.DuckDBPyConnection
VIEWS = ("captions", "failures", "attempts", "unanswered", "images", "runs")
UNANSWERED = FAILURES.insert(2, pa.field("prompt", pa.string()))
"""Columns of the view `unanswered`."""

_ROOT = f"{PROTOCOL}:/"
_EMPTY = "empty"  # schema of the tables without rows that say what columns a view has at least
_BEGUN = "begun"  # schema of what the table was begun with, apart from what was added: a prompt may have any name
_ADDED = "added"  # schema of the answers to each added prompt, by its name
_UNANSWERED = "added_failures"  # schema of the failed attempts at each
_SCHEMAS = (_EMPTY, _BEGUN, _ADDED, _UNANSWERED)
_CAPTIONS = f"{_BEGUN}.captions"
_WRITER = re.compile(r'"type":"(COPY|INSERT|UPDATE|DELETE|MERGE[A-Z_]*)_QUERY_NODE"')  # a quote in a text is escaped
_SETTINGS = {
    "autoinstall_known_extensions": False,  # nothing is ever downloaded
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    "python_enable_replacements": False,  # a name in SQL is a view's, never a variable's of this program
}


def ask(table: CaptionTable, question: Callable[[Connection], T], sql: str = "") -> T:
    """Return the answer of `question`, which is given the views of a table and asked again if parts were moved.

    sql: the SELECT that it runs, so that only the views it names are made; by default all are.
    Raises ConfigError for SQL that is wrong, InputError for a part that cannot be read, JobError where neither helps.
    """

    def answer(parts: dict[str, Entry]) -> T:
        with _connection(table, families, parts, sql) as connection:
            return question(connection)

    with output_errors(table.location):
        families = table.families()
        try:
            return ask_again(lambda: _parts(table, families), answer, duckdb.Error)
        except duckdb.Error as error:
            raise _explained(error, table) from error


def read_rows(table: CaptionTable, sql: str) -> pa.Table:
    """Return the rows of one SELECT. Raises as `ask` does."""
    return ask(table, lambda connection: select(connection, sql).to_arrow_table(), sql)


def select(connection: Connection, sql: str) -> duckdb.DuckDBPyRelation:
    """Return the rows of one SELECT, not yet read. Raises ConfigError for any other statement."""
    _check_select(connection, sql)
    return connection.sql(sql)


def stream(connection: Connection, sql: str, batch_rows: int) -> pa.RecordBatchReader:
    """Return the rows of one SELECT batch by batch; whichever batch fails raises duckdb.Error."""
    rows = select(connection, sql).to_arrow_reader(batch_rows)
    return pa.RecordBatchReader.from_batches(rows.schema, _batches(rows))


def _batches(rows: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    try:
        yield from rows
    except OSError as error:  # Arrow's interface for streams passes the text of an error only
        raise _of_duckdb(str(error)) from error


def _of_duckdb(text: str) -> duckdb.Error:
    """Return the error whose text begins with its kind: "Conversion Error: ..." was a ConversionException."""
    words = text.partition(" Error:")[0].split(" ")
    kind = "".join(word[:1].upper() + word[1:] for word in words) + "Exception"
    return getattr(duckdb, kind, duckdb.Error)(text)


def _check_select(connection: Connection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise ConfigError(f"SQL holds {len(statements)} statements; expected one SELECT")
    if statements[0].type == duckdb.StatementType.MULTI:
        raise ConfigError("SQL has a PIVOT without its values; expected them: PIVOT ... ON column IN ('a', 'b') ...")
    if statements[0].type != duckdb.StatementType.SELECT:
        raise ConfigError(
            f"SQL is {statements[0].type.name}, and a caption table is only read; expected one SELECT,"
            " WITH ... SELECT, FROM, DESCRIBE or SUMMARIZE"
        )
    [[tree]] = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
    if (writes := _WRITER.search(tree)) is not None:
        raise ConfigError(
            f"SQL is a WITH that holds {writes[1]}, and a caption table is only read; expected SELECTs alone"
        )


# The connection


def _parts(table: CaptionTable, families: Sequence[ColumnFamily]) -> dict[str, Entry]:
    """Return the parts that are there now: `captions/part-...` -> what the listing says of it."""
    return {
        f"{folder}/{name(entry.url)}": entry
        for family in families
        for folder in family.folders
        for entry in _entries(table, table.location / folder)
        if entry.url.endswith(".parquet") and not entry.is_folder and not name(entry.url).startswith((".", "_"))
    }


def _entries(table: CaptionTable, folder: Location) -> Sequence[Entry]:
    """Return the entries of a folder; of a local one without sizes, which a query finds for the parts it reads."""
    if not folder.is_local:
        return table.store.entries(folder)
    path = Path(table.store.path(folder))
    try:
        return [Entry(str(path / found), None) for found in sorted(os.listdir(path))] if path.is_dir() else []  # noqa: PTH208
    except OSError as error:
        raise StoreError(diagnose(error)) from error


@contextlib.contextmanager
def _connection(
    table: CaptionTable, families: Sequence[ColumnFamily], parts: dict[str, Entry], sql: str
) -> Iterator[Connection]:
    """Yield a connection that has the views of `sql`, or all, and may read these parts and nothing else."""
    with tempfile.TemporaryDirectory(prefix="captioner-query-") as spill:
        connection = duckdb.connect(config={**_SETTINGS, "temp_directory": spill})
        try:
            connection.register_filesystem(PartFiles(table.store, parts))
            folders = [f"{_ROOT}/{folder}/" for family in families for folder in family.folders]
            connection.execute(f"SET allowed_directories = {_list(folders)}")
            connection.execute("SET enable_external_access = false; SET lock_configuration = true")
            _Views(connection, table, families, list(parts)).create(sql)
            yield connection
        finally:
            connection.unregister_filesystem(PROTOCOL)
            connection.close()


@dataclass(frozen=True)
class _Views:
    """Makes the views that SQL names, and no others: each costs reading the footers of some parts."""

    connection: Connection
    table: CaptionTable
    families: Sequence[ColumnFamily]
    parts: Sequence[str]
    """`captions/part-...`"""

    def create(self, sql: str) -> None:
        """Create the views that `sql` names; all where it names none, or one that does not exist."""
        named = self._named(sql) if sql else set()
        wanted = named if named and named <= set(VIEWS) else set(VIEWS)
        self.connection.execute("".join(f"CREATE SCHEMA {name};" for name in _SCHEMAS))
        if wanted != {"runs"}:
            self._create_captions()
            self._create_joined(wanted)
        if "runs" in wanted:
            self._create_table("runs", read_runs(self.table))

    def _named(self, sql: str) -> set[str]:
        _check_select(self.connection, sql)
        return {found.lower() for found in self.connection.get_table_names(sql)}

    def _create_captions(self) -> None:
        captions, *added = self.families
        self._create_of_parts(_CAPTIONS, captions.rows, captions.schema(captions.rows))
        if not added:
            self.connection.execute(f"CREATE VIEW captions AS FROM {_CAPTIONS}")
            return
        for family in added:
            self._create_of_parts(f"{_ADDED}.{family.prompt}", family.rows, family.schema(family.rows))
        own = list(self._columns(f"FROM {_CAPTIONS}"))
        answers = [field.name for field in all_answers(self.families)]
        columns = [*(name for name in CAPTIONS.names[:-1]), *answers]
        columns += [name for name in own if name not in columns]
        joins = (f"LEFT JOIN {_ADDED}.{one.prompt} AS {one.prompt}_parts USING (key)" for one in added)
        places = {field.name: f"{one.prompt}_parts" for one in added for field in one.answers}
        chosen = (f"{places.get(name, 'captions')}.{quoted(name)}" for name in columns)
        self.connection.execute(
            f"CREATE VIEW captions AS SELECT {', '.join(chosen)} FROM {_CAPTIONS} AS captions {' '.join(joins)}"
        )

    def _create_unanswered(self) -> None:
        self._create_empty(f"{_EMPTY}.unanswered", UNANSWERED)
        selects = [f"FROM {_EMPTY}.unanswered"]
        for family in self.families[1:]:
            failures = f"{_UNANSWERED}.{family.prompt}"
            self._create_of_parts(failures, family.failures, FAILURES)
            selects.append(
                f"""SELECT key, image_id, '{family.prompt}' AS prompt, reason, detail, attempt, run_id FROM {failures}
                SEMI JOIN {_CAPTIONS} USING (key) ANTI JOIN {_ADDED}.{family.prompt} USING (key) {_LAST_ATTEMPT}"""
            )
        self.connection.execute(f"CREATE VIEW unanswered AS {' UNION ALL '.join(selects)}")

    def _create_joined(self, wanted: set[str]) -> None:
        if "unanswered" in wanted:
            self._create_unanswered()
        if wanted & {"attempts", "failures", "images"}:
            self._create_of_parts("attempts", self.families[0].failures, FAILURES)
        if wanted & {"failures", "images"}:
            self.connection.execute(_FAILURES)
        if "images" in wanted:
            self.connection.execute("CREATE VIEW images AS FROM captions UNION ALL BY NAME FROM failures")

    def _create_of_parts(self, view: str, folder: str, schema: pa.Schema) -> None:
        """Create a view of the columns of `schema`, null in parts that are older than the column, and of their own."""
        empty = f"{_EMPTY}.{quoted(view)}"
        own = [part for part in self.parts if part.startswith(f"{folder}/")]
        kinds = [self._columns(f"FROM read_parquet({_list([f'{_ROOT}/{part}'])})") for part in _one_a_run(own)]
        is_uniform = all(kind == kinds[0] for kind in kinds)  # if not, DuckDB reads the footers of all parts
        parts = f"read_parquet({_list([f'{_ROOT}/{part}' for part in own])}, union_by_name = {not is_uniform})"
        found = {column: kind for columns in kinds for column, kind in columns.items()}
        if [column for column in found if column in schema.names] != schema.names:
            self._create_empty(empty, schema)
            parts = self._with_all_columns(empty, found, parts) if own else empty
        self.connection.execute(f"CREATE VIEW {view} AS FROM {parts}")

    def _with_all_columns(self, empty: str, found: Mapping[str, str], parts: str) -> str:
        """Return SQL of the parts with the columns of the table `empty`, and their own before the last one."""
        fixed = self._columns(f"FROM {empty}")
        known = [quoted(column) if column in found else f"NULL::{kind} AS {column}" for column, kind in fixed.items()]
        own = [quoted(column) for column in found if column not in fixed]
        return f"(SELECT {', '.join([*known[:-1], *own, known[-1]])} FROM {parts})"

    def _columns(self, sql: str) -> dict[str, str]:
        return {column: kind for column, kind, *_ in self.connection.execute(f"DESCRIBE {sql}").fetchall()}

    def _create_empty(self, table: str, schema: pa.Schema) -> None:
        """Create a table without rows. `schema.empty_table` imports pandas, which takes half of a query's start."""
        self._create_table(table, pa.Table.from_batches([], schema))

    def _create_table(self, table: str, rows: pa.Table) -> None:
        self.connection.register("rows_of_arrow", rows)
        self.connection.execute(f"CREATE TABLE {table} AS FROM rows_of_arrow")
        self.connection.unregister("rows_of_arrow")


_LAST_ATTEMPT = "QUALIFY row_number() OVER (PARTITION BY key ORDER BY attempt DESC, run_id DESC) = 1"
_FAILURES = f"""
    CREATE VIEW failures AS
        SELECT attempts.* FROM attempts ANTI JOIN {_CAPTIONS} USING (key) {_LAST_ATTEMPT}
"""


def _one_a_run(parts: Sequence[str]) -> list[str]:
    """Return one part of each run: one release of this package wrote all parts of a run."""
    return list({part.rsplit("-", 2)[0]: part for part in parts}.values())


def _list(paths: Sequence[str]) -> str:
    return "[" + ", ".join("'" + path.replace("'", "''") + "'" for path in paths) + "]"


def quoted(name: str) -> str:
    """Return the name of a column or a view as SQL."""
    return '"' + name.replace('"', '""') + '"'


# What went wrong

_DAMAGED = re.compile(r"Failed to read file|magic bytes|\.parquet\b")
_STORE_FAULT = re.compile(r"StoreError: (?P<reason>\w+): (?P<detail>[^\n]*)")  # what a Python file raised, as text
_HINT_AT_CATALOG = re.compile(r'\nDid you mean "(pg_|sqlite_|duckdb_|empty|begun|added)[^\n]*')
_SOURCE_LINE = re.compile(r"\s*^LINE \d.*", re.MULTILINE | re.DOTALL)


def _explained(error: duckdb.Error, table: CaptionTable) -> CaptionerError:
    """Return an error of DuckDB as one of ours, with its remedy."""
    text = redact(str(error).strip())
    if isinstance(error, duckdb.OutOfMemoryException):
        return JobError(f"the query needs more memory than there is: {text.splitlines()[0]}")
    if isinstance(error, duckdb.PermissionException) or READ_ONLY in text:
        return ConfigError(f"SQL reads this table and no other file: {_cause(text)}")
    if isinstance(error, duckdb.CatalogException):
        text = _HINT_AT_CATALOG.sub("", text)
    if isinstance(error, duckdb.CatalogException | duckdb.ParserException | duckdb.BinderException):
        return ConfigError(f"{text}\nThe views are {', '.join(VIEWS)}; `DESCRIBE captions` shows the columns of one")
    if (fault := _STORE_FAULT.search(text)) is not None:
        kind = JobError if fault["reason"] == RejectReason.FETCH_FAILED else InputError
        return kind(f"{table.location} cannot be read: {fault['detail']}")
    is_damaged = isinstance(error, duckdb.InvalidInputException) and _DAMAGED.search(text)
    if is_damaged or isinstance(error, duckdb.IOException) or type(error) is duckdb.Error:
        seen, where = _cause(text), table.location
        return InputError(f"a part of {where} cannot be read: {seen}; expected whole parts: see jobs/verify.py {where}")
    return ConfigError(f"the query failed: {text}")


def _cause(text: str) -> str:
    """Return the text of a part's error without the SQL of the view, and without the traceback of a store's error."""
    lines = [line for line in _SOURCE_LINE.sub("", text).splitlines() if line.strip()]
    return lines[-1] if "Traceback" in lines[0] else " ".join(lines)
