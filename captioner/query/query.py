"""What `jobs/query.py` does: SQL over a table to rows in some form, or what the table holds, or its doubtful captions.

Rows of a query go to stdout, or to --out whole or not at all. No row is shown before the last one is there, so that a
query that is asked again, because its parts were moved, shows no row twice.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import pyarrow as pa

from captioner.config import QueryConfig
from captioner.errors import JobError, OutputError
from captioner.query.output import table_lines, without_formulas, write_rows
from captioner.query.review import doubtful_sql
from captioner.query.summary import summarize, summary_lines
from captioner.query.views import Connection, ask, stream
from captioner.storage import Location, open_store
from captioner.storage.faults import StoreError, output_errors
from captioner.storage.whole_files import write_whole
from captioner.tables import CaptionTable, open_table
from captioner.terminal import counted, say, visible_lines

__all__ = ["first_rows", "query"]

_BATCH_ROWS = 16_384


def query(config: QueryConfig) -> Mapping[str, Any]:
    """Do what the flags ask for, except for a page; return a summary, empty where the rows went to stdout.

    Raises InputError where no table is or a part is damaged, ConfigError for SQL that is wrong."""
    start = time.monotonic()
    table = open_table(Location(config.table, config.storage_options))
    if not config.sql and config.review is None:
        summary = ask(table, summarize)
        say(summary_lines(summary))
        return {**summary, "seconds": round(time.monotonic() - start, 2), "table": str(table.location)}
    if config.chosen_format == "table":
        _show(ask(table, lambda connection: table_lines(_reader(connection, config)), config.sql))
        return {}
    if not config.out:
        _stream(table, config)
        return {}
    num_rows, output = _save(table, config), str(table.location.beside(config.out))
    say([f"{counted(num_rows, 'row')} written to {output}"])
    return {"rows": num_rows, "seconds": round(time.monotonic() - start, 2), "output": output}


def first_rows(table: CaptionTable, config: QueryConfig, num_rows: int) -> pa.Table:
    """Return the first rows of the query, and one more than asked for where there is one."""
    return ask(table, lambda connection: _first(_reader(connection, config), num_rows), config.sql)


def _first(rows: pa.RecordBatchReader, num_rows: int) -> pa.Table:
    taken: list[pa.RecordBatch] = []
    while sum(batch.num_rows for batch in taken) <= num_rows and (batch := next(rows, None)):
        taken.append(batch)
    return pa.Table.from_batches(taken, rows.schema).slice(0, num_rows + 1)


def _reader(connection: Connection, config: QueryConfig) -> pa.RecordBatchReader:
    sql = config.sql if config.review is None else doubtful_sql(connection, config.review)
    return stream(connection, sql, _BATCH_ROWS)


def _write(table: CaptionTable, config: QueryConfig, file: IO[bytes]) -> int:
    """Write the rows to a file and return how many; rows of an earlier attempt are overwritten."""

    def write(connection: Connection) -> int:
        file.seek(0)
        file.truncate()
        rows = _reader(connection, config)
        num_rows = write_rows(without_formulas(rows) if config.csv_safe else rows, file, config.chosen_format)
        file.flush()
        return num_rows

    return ask(table, write, config.sql)


def _spool(table: CaptionTable, config: QueryConfig, file: IO[bytes]) -> int:
    """Write the rows to a temporary file. Raises JobError where the disk has no room for them."""
    try:
        return _write(table, config, file)
    except OSError as error:
        raise JobError(
            f"the rows are gathered in {tempfile.gettempdir()} first: {error.strerror}; expected room for them all"
            " there, or in another folder that TMPDIR names"
        ) from error


def _stream(table: CaptionTable, config: QueryConfig) -> None:
    with tempfile.TemporaryFile() as spool:
        _spool(table, config, spool)
        spool.seek(0)
        _to_stdout(lambda: _copy_to_stdout(spool))


def _copy_to_stdout(spool: IO[bytes]) -> None:
    """Copy all rows as they are; to a terminal without what would command it."""
    if not sys.stdout.isatty():
        shutil.copyfileobj(spool, sys.stdout.buffer)
        return
    for line in spool:
        sys.stdout.write(visible_lines(line.decode("utf-8", "replace")))


def _show(lines: list[str]) -> None:
    _to_stdout(lambda: print(*lines, sep="\n"))


def _to_stdout(write: Callable[[], None]) -> None:
    """Write to stdout; a reader that stops early, as `| head` does, is no error."""
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit then cannot fail


def _save(table: CaptionTable, config: QueryConfig) -> int:
    """Write the rows to --out, whole or not at all, and return how many."""
    output = table.location.beside(str(config.out))
    if not output.is_local:
        with output_errors(output):
            return write_whole(open_store(output), output, lambda file: _spool(table, config, file))
    try:
        return write_whole(open_store(output), output, lambda file: _write(table, config, file))
    except StoreError as error:
        why = getattr(error.__cause__, "strerror", None) or error.fault.detail
        raise OutputError(f"--out {output.local_path}: {why}; expected a file that can be written") from error
