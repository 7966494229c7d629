"""`lance`: a Lance data set `captions.lance`, written by its library: each shard is one append, there whole or not.

The key tells whether a shard was appended before a crash: `key` is always a column.
"""

from collections.abc import Mapping

import pyarrow as pa

from captioner.export.lake_storage import s3_options, uri_of
from captioner.export.request import ExportFormat, Request, Shard
from captioner.storage import Location

__all__ = ["LANCE"]

_NAME = "captions.lance"
_S3_NAMES = {
    "key": "aws_access_key_id",
    "secret": "aws_secret_access_key",
    "token": "aws_session_token",
    "endpoint_url": "aws_endpoint",
    "region_name": "aws_region",
}


def _columns(request: Request) -> Mapping[str, str]:
    return {"key": "key", **request.selected()}


def _write(shard: Shard) -> None:
    import lance

    place = shard.request.output / _NAME
    uri, options = uri_of(place), _options(place)
    schema = shard.schema()
    [first, *_] = shard.first.column("key").to_pylist()
    is_there = any(shard.store.entries(place / "_versions"))
    if is_there and lance.dataset(uri, storage_options=options).count_rows(filter=f"key = {first}"):
        for _ in shard.rows:  # counted, for it was written before
            pass
        return
    rows = pa.RecordBatchReader.from_batches(schema, shard.rows)
    lance.write_dataset(rows, uri, mode="append" if is_there else "create", storage_options=options)


def _options(place: Location) -> dict[str, str]:
    """Return the storage options as Lance calls them."""
    found = s3_options(place.storage_options, _S3_NAMES)
    is_plain = found.get("aws_endpoint", "").startswith("http://")
    return {**found, "allow_http": "true"} if is_plain else found


LANCE = ExportFormat(
    name="lance",
    help="a Lance data set captions.lance, with --columns (needs captioner[lance])",
    columns=_columns,
    write=_write,
    has_columns=True,
    has_several=True,
    needs=("lance", "lance"),
)
