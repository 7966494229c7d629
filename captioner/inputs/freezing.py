"""Freeze the input: list it once and save the list, so that from then on a job means the same images.

    frozen = load_frozen(run_folder) or freeze(input_path, config, run_folder)

An interrupted freeze leaves no `units.parquet` and starts over. Raises before any model is loaded: InputError for
an input that is wrong, empty or wholly unreadable, JobError for a store that does not deliver.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa

from captioner.config import InputConfig
from captioner.errors import ConfigError, InputError
from captioner.inputs.columns import check_kept_names, check_later, choose, filled, holds_images, is_list, plain_type
from captioner.inputs.image_lists import num_images
from captioner.inputs.listing import ListingWriter
from captioner.inputs.parquet import open_parquet
from captioner.inputs.remedies import for_folder_without_images
from captioner.inputs.selection import Census, Selection, describe, input_errors, select
from captioner.inputs.tar import check_tar
from captioner.inputs.units import Columns, Frozen, Unit, save_frozen
from captioner.inputs.uri_lists import write_uri_list
from captioner.schema import MAX_UNIT_ROWS, Reject, RejectReason
from captioner.storage import Entry, Place, Store, urls
from captioner.storage.faults import StoreError

__all__ = [
    "TableFile",
    "check_input",
    "counted",
    "freeze",
    "read_footer",
    "table_unit",
    "tar_unit",
    "widen",
]

_THREADS = 16


def check_input(input_path: str, config: InputConfig) -> None:
    """Check that the input is there, without listing it. Raises as `freeze` does."""
    with input_errors(input_path):
        select(input_path, config)


def freeze(
    input_path: str,
    config: InputConfig,
    run_folder: Place,
    on_progress: Callable[[int], None] = lambda _: None,
    before_write: Callable[[], None] = lambda: None,
) -> Frozen:
    """Save what `input_path` holds below `run_folder`, and return it.

    Lists page by page: memory holds a page and one part of the listing, and the names of tars and tables.
    `on_progress` is called at every part with the number of images listed so far, `before_write` before each change of
    `run_folder`, which it prevents by raising a CaptionerError.
    """
    check_kept_names(config)
    with input_errors(input_path):
        frozen = _freeze(input_path, config, ListingWriter(run_folder, on_progress, before_write=before_write))
    save_frozen(frozen, run_folder, before_write)
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
    if kind != "webdataset" and config.tar_images != "first":
        raise ConfigError(f"--tar-images {config.tar_images}: {selection.shown} has no tars; expected no such flag")
    if kind in ("files", "webdataset") and config.explode_images:
        raise ConfigError(f"--explode-images: {selection.shown} has no table; expected no such flag")
    if kind == "files":
        _check_no_columns(config, selection, census)
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
        "list": "a .txt, .csv, .jsonl or .parquet",
        "parquet": "a .parquet",
        "webdataset": "a .tar",
    }[config.input_format]
    if not skipped:
        return f"{selection.shown} is empty, or matches nothing; expected {wanted}"
    found = f"{sum(skipped.values()):,} files, none {wanted}: {describe(skipped.items())}"
    return f"{selection.shown} has {found}{for_folder_without_images(selection.shown, skipped)}"


def _check_no_columns(config: InputConfig, selection: Selection, census: Census) -> None:
    given = (("keep", config.keep_columns), ("id", config.id_column), ("image", config.image_column))
    named = [f"--{name}-column{'s' * (name == 'keep')}" for name, value in given if value]
    named += [f"--prompts with {{{name}}}" for name in config.prompt_columns]
    if named:
        lists = census.metadata
        remedy = f", or the list of these images as INPUT: {urls.shown(lists[0])}" if lists else ""
        expected = "prompts without columns" if config.prompt_columns else "no such flag"
        raise ConfigError(
            f"{', '.join(named)}: {selection.shown} is image files, which have no columns; expected {expected}{remedy}"
        )


def _lists(
    selection: Selection, entries: Sequence[Entry], config: InputConfig, writer: ListingWriter
) -> tuple[tuple[Unit, ...], Columns]:
    columns = Columns()
    for entry in entries:
        columns = write_uri_list(selection.store, entry.url, config, writer)
    return writer.close(), columns


class TableFile(NamedTuple):
    """What the footer of a Parquet file says, or why it cannot be read."""

    entry: Entry
    schema: pa.Schema | None = None
    num_rows: int = 1
    size_bytes: int | None = None
    reject: Reject | None = None
    num_further: int = 0
    """Images that are no rows, since another one comes first in the same list."""


def _tables(
    selection: Selection, entries: Sequence[Entry], config: InputConfig, writer: ListingWriter
) -> tuple[tuple[Unit, ...], Columns]:
    del writer
    schemas: dict[pa.Schema, pa.Schema] = {}  # in the order of the files, most of which share one
    tables: list[TableFile] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for table in threads.map(lambda entry: read_footer(selection.store, entry), entries):
            known = table.schema and schemas.setdefault(table.schema, table.schema)
            tables.append(table._replace(schema=known))
    _check_some_readable((table.reject for table in tables), selection)
    first = next(table for table in tables if table.schema is not None)
    columns = choose(filled(list(schemas)), config, urls.shown(first.entry.url))
    for table in tables:
        if table.schema is not None:
            check_later(columns, table.schema, selection.name(table.entry.url), config)
            names = (selection.name(first.entry.url), selection.name(table.entry.url))
            columns = widen(columns, table.schema, names, config)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(lambda table: counted(table, columns, selection.store), tables))
    units = [table_unit(ordinal, table, selection.name(table.entry.url)) for ordinal, table in enumerate(found)]
    _check_some_readable((unit.reject for unit in units), selection)
    return tuple(units), columns


def read_footer(store: Store, entry: Entry) -> TableFile:
    """Return what the footer of a file says, or why it cannot be read. Raises StoreError where a retry may help."""
    try:
        file, size_bytes = open_parquet(store, entry.url)
    except StoreError as error:
        if error.fault.is_transient:
            raise
        return TableFile(entry, reject=error.fault.reject)
    with file:
        return TableFile(entry, file.schema_arrow.remove_metadata(), file.metadata.num_rows, size_bytes)


def counted(table: TableFile, columns: Columns, store: Store) -> TableFile:
    """Return the table with the number of its images, which lists hold; with a reject if it can have none: it lacks the
    image column of the first table, or has something else in it. Raises StoreError where a retry may help."""
    if table.schema is None:
        return table
    if columns.image not in table.schema.names:
        found = ", ".join(table.schema.names[:20])
        detail = f"no column {columns.image}, as other files have; columns: {found}"
    elif holds_images(kind := table.schema.field(columns.image).type):
        return _with_items(table, columns, store) if is_list(kind) else table
    else:
        detail = f"column {columns.image} is {kind}; expected binary, struct<bytes, path>, a string or a list of these"
    return TableFile(table.entry, reject=Reject(RejectReason.UNSUPPORTED, detail[:300]))


def _with_items(table: TableFile, columns: Columns, store: Store) -> TableFile:
    """Return a table whose images are items of lists, with the number of its rows: its images, or its lists."""
    try:
        file, _ = open_parquet(store, table.entry.url)
    except StoreError as error:
        if error.fault.is_transient:
            raise
        return TableFile(table.entry, reject=error.fault.reject)
    with file:
        num_items = sum(num_images(file, str(columns.image), group) for group in range(file.num_row_groups))
    if not table.num_rows <= num_items < MAX_UNIT_ROWS:
        detail = f"its footer says {num_items:,} images in the lists of {table.num_rows:,} rows"
        return TableFile(table.entry, reject=Reject(RejectReason.CORRUPT, detail))
    if columns.has_each_item:
        return table._replace(num_rows=num_items)
    return table._replace(num_further=num_items - table.num_rows)


def widen(columns: Columns, schema: pa.Schema, names: tuple[str, str], config: InputConfig) -> Columns:
    """Return the kept columns with types that also hold one more table's values. Raises InputError if none does."""
    pairs = zip(columns.kept, columns.kept_from, strict=True)
    return replace(columns, kept=tuple(_wider(field, old, schema, names, config) for field, old in pairs))


def _wider(field: pa.Field, old: str, schema: pa.Schema, names: tuple[str, str], config: InputConfig) -> pa.Field:
    if old not in schema.names:
        return field
    other = pa.field(field.name, plain_type(schema.field(old).type))
    try:
        both = pa.unify_schemas([pa.schema([field]), pa.schema([other])], promote_options="permissive")
    except pa.ArrowTypeError as error:
        flag = config.flag_of(old)
        raise InputError(
            f"{flag} {old} is {field.type} in {names[0]} and {other.type} in {names[1]}; expected one type."
            f" Drop it from {flag}"
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
        reject=table.reject,
        num_further=table.num_further,
    )


def _tars(
    selection: Selection, entries: Sequence[Entry], config: InputConfig, writer: ListingWriter
) -> tuple[tuple[Unit, ...], Columns]:
    """Return the tars as units. Only the first ones are opened, until one can be read."""
    del writer
    if config.id_column:
        raise ConfigError("--id-column: samples of a tar are named by their members; use --keep-columns for it")
    units = [tar_unit(ordinal, entry, selection) for ordinal, entry in enumerate(entries)]
    rejects = (unit.reject or check_tar(selection.store, unit.path) for unit in units)
    _check_some_readable(rejects, selection)
    kept = tuple(pa.field(new, pa.string()) for new in config.kept_columns)
    columns = Columns(image=config.image_column, kept=kept, kept_from=tuple(config.kept_columns.values()))
    return tuple(units), replace(columns, has_all_images=config.tar_images == "all", leaves_out_texts=True)


def tar_unit(ordinal: int, entry: Entry, selection: Selection) -> Unit:
    """Return a tar as an uncounted unit; as one of a single row where a name in braces does not exist."""
    exists = entry.size_bytes is not None or selection.store.info(entry.url) is not None
    return Unit(
        ordinal=ordinal,
        kind="webdataset",
        path=entry.url,
        name=selection.name(entry.url),
        num_rows=None if exists else 1,
        size_bytes=entry.size_bytes,
        reject=None if exists else Reject(RejectReason.MISSING, "no such file when the input was frozen"),
    )


def _check_some_readable(rejects: Iterable[Reject | None], selection: Selection) -> None:
    """Raise InputError if every unit has a reject. Stops at the first that has none."""
    first, num_seen = None, 0
    for reject in rejects:
        if reject is None:
            return
        first, num_seen = first or reject, num_seen + 1
    assert first is not None
    raise InputError(
        f"{selection.shown}: none of its {num_seen:,} files can be read; the first is {first.reason}: {first.detail}"
    )
