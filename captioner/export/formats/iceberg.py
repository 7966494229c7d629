"""`iceberg`: the parts of the table as an Iceberg table, registered where they lie: no row is copied or chosen.

The columns of a prompt that was added later are a table beside it, `captions_tags` of `tags`, to be joined by `key`.
One commit adds the parts that are new and drops those that a compaction took away. Its snapshot says the parts in
`captioner.parts`, a digest of their names: a rerun that finds it has nothing to do.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from captioner.errors import ConfigError, OutputError
from captioner.export.lake_storage import s3_options, uri_of
from captioner.export.request import ExportFormat, Request
from captioner.storage import Location
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import name
from captioner.tables import CaptionTable, ColumnFamily
from captioner.tables.parts import PartName

__all__ = ["ICEBERG"]

_KEY = "captioner.parts"
_S3_NAMES = {
    "key": "s3.access-key-id",
    "secret": "s3.secret-access-key",
    "token": "s3.session-token",
    "endpoint_url": "s3.endpoint",
    "region_name": "s3.region",
}


def _register(request: Request, table: CaptionTable, family: ColumnFamily, urls: Sequence[str]) -> Mapping[str, Any]:
    """Register the parts and return what stands in the table's snapshot. Raises OutputError for another's table."""
    identifier = f"{request.config.iceberg_table}_{family.prompt}" if family.is_added else request.config.iceberg_table
    parts = {_path(Location(url)): url for url in urls}
    schema = _schema(table, parts.values())
    found = _table(request, table, identifier, schema)
    there = {task.file.file_path: task.file for task in found.scan().plan_files()}
    root = _path(table.location / family.rows)
    if others := [path for path in there if not path.startswith(f"{root}/")]:
        raise OutputError(
            f"the Iceberg table {identifier} holds {name(others[0])}, which is no part of {table.location};"
            " expected a new table, or this one's: choose another --iceberg-table"
        )
    names = [*([family.rows] if family.is_added else []), *sorted(map(name, parts))]  # added parts may share names
    key = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
    new, gone = sorted(parts.keys() - there.keys()), [file for path, file in there.items() if path not in parts]
    if new or gone:
        _commit(found, schema, new, gone, {_KEY: key})
    snapshot = found.refresh().current_snapshot()
    assert snapshot is not None
    counts = snapshot.summary.additional_properties if snapshot.summary else {}
    return {
        "table": identifier,
        "key": key,
        "snapshot": snapshot.snapshot_id,
        "rows": int(counts.get("added-records", 0)),
        "removed": sum(file.record_count for file in gone),
        "runs": sorted({named.run_id for named in map(PartName.parse, map(name, parts)) if named}),
    }


def _commit(found: Any, schema: pa.Schema, new: list[str], gone: list[Any], properties: dict[str, str]) -> None:
    with found.transaction() as transaction:
        with transaction.update_schema() as update:
            update.union_by_name(schema)
        if gone:
            with transaction.update_snapshot(snapshot_properties=properties).overwrite() as overwrite:
                for file in gone:
                    overwrite.delete_data_file(file)
        if new:
            transaction.add_files(new, snapshot_properties=properties)


def _table(request: Request, table: CaptionTable, identifier: str, schema: pa.Schema) -> Any:
    from pyiceberg.catalog import load_catalog

    catalog = load_catalog("captioner", **_catalog(request, table))
    catalog.create_namespace_if_not_exists(identifier.rpartition(".")[0])
    return catalog.create_table_if_not_exists(identifier, schema)


def _catalog(request: Request, table: CaptionTable) -> dict[str, Any]:
    """Return the properties of the catalog: those given, else of SQLite in OUT; S3 as the table's options say."""
    given = request.config.iceberg_catalog
    if not given and not request.output.is_local:
        raise ConfigError(
            f"OUT is {request.output}, where no SQLite file can lie; expected --iceberg-catalog with the properties of"
            ' a catalog, as {"type": "rest", "uri": "https://..."}'
        )
    folder = "" if given else request.output.local_path
    own = {} if given else {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}"}
    return {**s3_options(table.location.storage_options, _S3_NAMES), **own, **given}


def _path(place: Location) -> str:
    return f"file://{uri_of(place)}" if place.is_local else uri_of(place)


def _schema(table: CaptionTable, parts: Iterable[str]) -> pa.Schema:
    """Return the columns of all parts, each of which may be null: one part of each run is looked at."""
    one_a_run = {name(url).rsplit("-", 2)[0]: url for url in sorted(parts)}
    schemas = []
    for url in one_a_run.values():
        with open_parquet_file(table.store.open(url)) as file:
            schemas.append(file.schema_arrow.remove_metadata())
    fields = pa.unify_schemas(schemas, promote_options="permissive")
    return pa.schema([field.with_nullable(True) for field in fields])


ICEBERG = ExportFormat(
    name="iceberg",
    help="the parts registered as an Iceberg table without copying them (needs captioner[iceberg])",
    needs=("pyiceberg", "iceberg"),
    register=_register,
)
