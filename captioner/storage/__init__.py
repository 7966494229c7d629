"""One way to any store: list it page by page, read from it steadily, write to it whole or not at all.

    table = Location("s3://bucket/table", storage_options)
    store = open_store(table)
    for page in store.pages("s3://bucket/photos/"): ...
    store.write_atomic(table / "captions" / "part-0.parquet", data)

Every method takes a Location, or a full URL (see `urls`) where there are millions. A Store can be pickled and shared by
threads; each process opens its own connections. Credentials and endpoint come from the storage options or the store's
usual environment variables. Knows nothing of images, units or tables.
"""

from captioner.storage.faults import StoreError
from captioner.storage.fsspec_store import PAGE_SIZE, Entry, Store, pause_s
from captioner.storage.http_store import http_client
from captioner.storage.local_store import LocalStore
from captioner.storage.location import Location, Place, as_location, full_url
from captioner.storage.opening import open_store
from captioner.storage.s3_store import S3Store
from captioner.storage.steady_file import SteadyFile
from captioner.storage.stop_file import StopFile
from captioner.storage.urls import absolute, join, redact

__all__ = [
    "PAGE_SIZE",
    "Entry",
    "LocalStore",
    "Location",
    "Place",
    "S3Store",
    "SteadyFile",
    "StopFile",
    "Store",
    "StoreError",
    "absolute",
    "as_location",
    "full_url",
    "http_client",
    "join",
    "open_store",
    "pause_s",
    "redact",
]
