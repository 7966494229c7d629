"""The input, looked at once and written down: from then on a job always means the same images.

    frozen = load_frozen(run_folder) or freeze(input_path, config, run_folder)

An interrupted freeze leaves no `units.parquet` and is started afresh. Raises before any model is loaded: InputError for
an input that is wrong, empty or wholly unreadable, JobError for a store that does not deliver.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa

from captioner.config import InputConfig
from captioner.errors import ConfigError, InputError, JobError
from captioner.rows import Reject, RejectReason
from captioner.sources import urls
from captioner.sources.columns import check_kept_names, choose, plain_type
from captioner.sources.faults import StoreError
from captioner.sources.listing import ListingWriter, write_uri_list
from captioner.sources.parquet import open_parquet
from captioner.sources.selection import Census, Selection, describe, select
from captioner.sources.store import Entry, Store
from captioner.sources.units import Columns, Frozen, Unit, save_frozen
from captioner.sources.webdataset import check_tar

__all__ = ["TableFile", "checked", "freeze", "look_at", "table_unit", "tar_unit", "widened"]

_THREADS = 16


def freeze(
    input_path: str,
    config: InputConfig,
    run_folder: str,
    output_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Frozen:
    """Write down what `input_path` holds, below `run_folder`, and return it.

    Lists page by page: memory holds a page and one part of the listing, and the names of tars and tables.
    `on_progress` is told the number of images listed so far, at every part.
    """
    check_kept_names(config)
    try:
        frozen = _freeze(input_path, config, ListingWriter(run_folder, output_options, on_progress))
    except StoreError as error:
        kind = JobError if error.fault.is_transient else InputError
        raise kind(f"{urls.redact(input_path)} cannot be listed: {error.fault.detail}") from error
    save_frozen(frozen, run_folder, output_options)
    return frozen


def _freeze(input_path: str, config: InputConfig, writer: ListingWriter) -> Frozen:
    selection = select(input_path, config)
    census = Census(config)
    may_be_files = config.input_format in ("auto", "files")
    for entry in census.images(selection):
        if may_be_files:
            writer.add(entry.url, entry.size_bytes)
    kind = census.kind
    skipped = census.skipped(kind)
    if kind is None:
        raise InputError(_nothing_found(selection, config, skipped))
    if kind == "files":
        _check_no_columns(config, selection)
        return Frozen(kind=kind, units=writer.close(), skipped=skipped)
    writer.discard()
    build = {"list": _lists, "parquet": _tables, "webdataset": _tars}[kind]
    units, columns = build(selection, census.entries(kind), config, writer)
    frozen = Frozen(kind=kind, units=units, columns=columns, skipped=skipped)
    if frozen.num_images == 0:
        raise InputError(f"{selection.shown} has no rows; expected images, or URIs of them")
    return frozen


def _nothing_found(selection: Selection, config: InputConfig, skipped: Mapping[str, int]) -> str:
    wanted = {
        "auto": "an image, a .tar or a .parquet",
        "files": "a file that is not hidden",
        "list": "a .txt, .csv or .parquet",
        "parquet": "a .parquet",
        "webdataset": "a .tar",
    }[config.input_format]
    if not skipped:
        return f"{selection.shown} is empty, or matches nothing; expected {wanted}"
    found = f"{sum(skipped.values()):,} files, none {wanted}: {describe(skipped.items())}"
    return f"{selection.shown} has {found}; pass --input-format files to take all, or list to read URIs from them"


def _check_no_columns(config: InputConfig, selection: Selection) -> None:
    given = (("keep", config.keep_columns), ("id", config.id_column), ("image", config.image_column))
    named = [f"--{name}-column{'s' * (name == 'keep')}" for name, value in given if value]
    if named:
        raise ConfigError(f"{', '.join(named)}: {selection.shown} is image files, which have no columns; leave it out")


def _lists(
    selection: Selection, entries: Sequence[Entry], config: InputConfig, writer: ListingWriter
) -> tuple[tuple[Unit, ...], Columns]:
    columns = Columns()
    for entry in entries:
        columns = write_uri_list(selection.store, entry.url, config, writer)
    return writer.close(), columns


class TableFile(NamedTuple):
    """A Parquet file as its footer has it, or why it has none."""

    entry: Entry
    schema: pa.Schema | None = None
    num_rows: int = 1
    size_bytes: int | None = None
    problem: Reject | None = None


def _tables(
    selection: Selection, entries: Sequence[Entry], config: InputConfig, writer: ListingWriter
) -> tuple[tuple[Unit, ...], Columns]:
    del writer
    units: list[Unit] = []
    columns: Columns | None = None
    first = ""
    with ThreadPoolExecutor(_THREADS) as threads:
        for table in threads.map(lambda entry: look_at(selection.store, entry), entries):
            name = selection.name(table.entry.url)
            if table.schema is not None and columns is None:
                columns, first = choose(table.schema, config, urls.shown(table.entry.url)), name
            if table.schema is not None and columns is not None:
                columns = widened(columns, table.schema, (first, name))
                table = checked(table, columns)
            units.append(table_unit(len(units), table, name))
    _check_some_readable((unit.problem for unit in units), selection)
    assert columns is not None
    return tuple(units), columns


def look_at(store: Store, entry: Entry) -> TableFile:
    """Return what a file's footer says, or why it cannot be read. Raises StoreError where another try may help."""
    try:
        file, size_bytes = open_parquet(store, entry.url)
    except StoreError as error:
        if error.fault.is_transient:
            raise
        return TableFile(entry, problem=error.fault.reject)
    with file:
        return TableFile(entry, file.schema_arrow.remove_metadata(), file.metadata.num_rows, size_bytes)


def checked(table: TableFile, columns: Columns) -> TableFile:
    """Return the table, or its problem if it lacks the image column that the first table has."""
    assert table.schema is not None
    if columns.image in table.schema.names:
        return table
    found = ", ".join(table.schema.names[:20])
    problem = Reject(RejectReason.UNSUPPORTED, f"no column {columns.image}, as other files have; columns: {found}")
    return TableFile(table.entry, problem=problem)


def widened(columns: Columns, schema: pa.Schema, names: tuple[str, str]) -> Columns:
    """Return the kept columns with types that hold the values of one more table too. Raises InputError if none does."""
    pairs = zip(columns.kept, columns.kept_from, strict=True)
    return replace(columns, kept=tuple(_wider(field, old, schema, names) for field, old in pairs))


def _wider(field: pa.Field, old: str, schema: pa.Schema, names: tuple[str, str]) -> pa.Field:
    if old not in schema.names:
        return field
    other = pa.field(field.name, plain_type(schema.field(old).type))
    try:
        both = pa.unify_schemas([pa.schema([field]), pa.schema([other])], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise InputError(
            f"--keep-columns {old} is {field.type} in {names[0]} and {other.type} in {names[1]}; leave it out"
        ) from error
    return pa.field(field.name, both.field(0).type)


def table_unit(ordinal: int, table: TableFile, name: str) -> Unit:
    """Return a Parquet file as a unit."""
    return Unit(
        ordinal=ordinal,
        kind="parquet",
        path=table.entry.url,
        name=name,
        num_rows=table.num_rows,
        size_bytes=table.size_bytes,
        problem=table.problem,
    )


def _tars(
    selection: Selection, entries: Sequence[Entry], config: InputConfig, writer: ListingWriter
) -> tuple[tuple[Unit, ...], Columns]:
    """Return the tars as units; only the first ones are opened, until one can be read."""
    del writer
    if config.id_column:
        raise ConfigError("--id-column: samples of a tar are named by their members; use --keep-columns for it")
    units = [tar_unit(ordinal, entry, selection) for ordinal, entry in enumerate(entries)]
    problems = (unit.problem or check_tar(selection.store, unit.path) for unit in units)
    _check_some_readable(problems, selection)
    kept = tuple(pa.field(new, pa.string()) for new in config.kept)
    return tuple(units), Columns(image=config.image_column, kept=kept, kept_from=tuple(config.kept.values()))


def tar_unit(ordinal: int, entry: Entry, selection: Selection) -> Unit:
    """Return a tar as a unit that nobody has counted, or, where a name in braces stands for nothing, one row long."""
    is_there = entry.size_bytes is not None or selection.store.info(entry.url) is not None
    return Unit(
        ordinal=ordinal,
        kind="webdataset",
        path=entry.url,
        name=selection.name(entry.url),
        num_rows=None if is_there else 1,
        size_bytes=entry.size_bytes,
        problem=None if is_there else Reject(RejectReason.MISSING, "no such file when the input was frozen"),
    )


def _check_some_readable(problems: Iterable[Reject | None], selection: Selection) -> None:
    """Raise InputError if every unit has a problem; asks for no more of them than it takes to know."""
    first, num_seen = None, 0
    for problem in problems:
        if problem is None:
            return
        first, num_seen = first or problem, num_seen + 1
    assert first is not None
    raise InputError(
        f"{selection.shown}: none of its {num_seen:,} files can be read; the first is {first.reason}: {first.detail}"
    )
