"""One way to any store: list it page by page, read from it steadily, write to it whole or not at all.

    store = open_store("s3://bucket/photos", storage_options)
    for page in store.pages("s3://bucket/photos/"): ...
    store.write_atomic("s3://bucket/table/part-0.parquet", data)

Every method takes full URLs (see `urls`). A Store can be pickled and shared by threads; each process opens its own
connections. Credentials and endpoint come from `storage_options` or the store's usual environment variables. Knows
nothing of images, units or tables.
"""

from captioner.sources.store.fsspec_store import PAGE_SIZE, Entry, Store, pause_s
from captioner.sources.store.http import http_client
from captioner.sources.store.local import LocalStore
from captioner.sources.store.opening import open_store
from captioner.sources.store.s3 import S3Store
from captioner.sources.store.steady_file import SteadyFile

__all__ = [
    "PAGE_SIZE",
    "Entry",
    "LocalStore",
    "S3Store",
    "SteadyFile",
    "Store",
    "http_client",
    "open_store",
    "pause_s",
]
