"""What `jobs/query.py` does: SQL over a table to rows in some form, or what the table holds, or its doubtful captions.

Rows of a query go to stdout, or to --out whole or not at all. Nothing is shown before the last row is there: a query
that is asked anew, because the job moved its parts, shows no row twice.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from captioner.config import MAX_CARDS, QueryConfig
from captioner.errors import JobError, OutputError
from captioner.gallery import write_gallery
from captioner.query.output import table_lines, write_rows
from captioner.query.review import doubtful_sql
from captioner.query.summary import summarize, summary_lines
from captioner.query.views import Connection, ask, stream
from captioner.sources.faults import output_errors
from captioner.sources.store import open_store
from captioner.sources.urls import absolute, redact, scheme, shared_options
from captioner.tables import CaptionTable, open_table

__all__ = ["query"]

_BATCH_ROWS = 16_384


def query(config: QueryConfig) -> Mapping[str, Any]:
    """Do what the flags ask for; return a summary, empty where stdout was given the rows.

    Raises InputError where no table is or a part is damaged, ConfigError for SQL that is wrong."""
    start = time.monotonic()
    table = open_table(config.table, config.storage_options)
    if config.is_gallery:
        return _gallery(table, config)
    if not config.sql and config.review is None:
        summary = ask(table, summarize)
        print(*summary_lines(summary), sep="\n", file=sys.stderr)
        return {**summary, "seconds": round(time.monotonic() - start, 2), "table": redact(table.url)}
    if config.chosen_format == "table":
        _show(ask(table, lambda connection: table_lines(_reader(connection, config)), config.sql))
        return {}
    if not config.out:
        _stream(table, config)
        return {}
    num_rows = _save(table, config)
    return {"rows": num_rows, "seconds": round(time.monotonic() - start, 2), "output": redact(absolute(config.out))}


def _gallery(table: CaptionTable, config: QueryConfig) -> Mapping[str, Any]:
    rows = ask(table, lambda connection: _first(_reader(connection, config), MAX_CARDS), config.sql)
    cut = [f"The first {MAX_CARDS:,} rows: a page holds no more."] if rows.num_rows > MAX_CARDS else []
    return write_gallery(
        rows.slice(0, MAX_CARDS),
        config.out,
        table_url=table.url,
        storage_options=config.storage_options,
        image_storage_options=config.image_storage_options,
        allow_local_uris=config.allow_local_uris,
        title=config.sql or f"The {rows.num_rows:,} most doubtful captions",
        lines=cut,
    )


def _first(rows: pa.RecordBatchReader, num_rows: int) -> pa.Table:
    """Return the first rows, and one more than asked for where there is one."""
    taken: list[pa.RecordBatch] = []
    while sum(batch.num_rows for batch in taken) <= num_rows and (batch := next(rows, None)):
        taken.append(batch)
    return pa.Table.from_batches(taken, rows.schema).slice(0, num_rows + 1)


def _reader(connection: Connection, config: QueryConfig) -> pa.RecordBatchReader:
    sql = config.sql if config.review is None else doubtful_sql(connection, config.review)
    return stream(connection, sql, _BATCH_ROWS)


def _write(table: CaptionTable, config: QueryConfig, file: IO[bytes]) -> int:
    """Write the rows to a file that holds nothing else, whatever an earlier attempt has left in it."""

    def write(connection: Connection) -> int:
        file.seek(0)
        file.truncate()
        num_rows = write_rows(_reader(connection, config), file, config.chosen_format)
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
        _to_stdout(lambda: shutil.copyfileobj(spool, sys.stdout.buffer))


def _show(lines: list[str]) -> None:
    _to_stdout(lambda: print(*lines, sep="\n"))


def _to_stdout(write: Callable[[], None]) -> None:
    """Write to stdout, as far as whoever reads it wants: `| head` is no error."""
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit goes nowhere


def _save(table: CaptionTable, config: QueryConfig) -> int:
    """Write the rows to --out, whole or not at all, and return how many."""
    url = absolute(config.out)
    if scheme(url) == "file":
        return _save_local(table, config, Path(url))
    with output_errors(url), tempfile.NamedTemporaryFile() as spool:
        num_rows = _spool(table, config, spool)
        open_store(url, shared_options(url, table.url, config.storage_options)).upload(url, spool.name)
    return num_rows


def _save_local(table: CaptionTable, config: QueryConfig, path: Path) -> int:
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            num_rows = _write(table, config, file)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"--out {path}: {error.strerror}; expected a file that can be written") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is a file, say, there is nothing to remove
            temporary.unlink()
    return num_rows
