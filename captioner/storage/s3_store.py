"""S3 and compatible stores."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from captioner.errors import InputError
from captioner.schema import RejectReason
from captioner.storage import urls
from captioner.storage.faults import Fault, StoreError
from captioner.storage.fsspec_store import PAGE_SIZE, Entry, Extent, Store
from captioner.storage.http_store import CONNECT_TIMEOUT_S, READ_TIMEOUT_S
from captioner.storage.location import Location, Place, full_url

__all__ = ["S3Store"]

_CONFIG = {
    "retries": {"max_attempts": 0},
    "connect_timeout": CONNECT_TIMEOUT_S,
    "read_timeout": READ_TIMEOUT_S,
}


class S3Store(Store):
    """S3 and compatible stores. A listing asks for all keys below a prefix, not folder by folder."""

    _num_retries = 7  # about 24 s: throttling passes
    _pieces: ClassVar = {"max_concurrency": 2}  # of 50 MiB each; s3fs would hold ten

    def __init__(self, location: Location) -> None:
        options = location.storage_options
        given = options.get("config_kwargs") or {}
        if not isinstance(given, Mapping):
            raise InputError(f"config_kwargs of --storage-options is a {type(given).__name__}; expected an object")
        config_kwargs = {**_CONFIG, **given}
        super().__init__(location.opened_with({**options, "config_kwargs": config_kwargs}))

    def _connect(self) -> Any:
        fs = super()._connect()
        fs.retries = 1  # `Store.retried` retries; with those of botocore and s3fs there were 125 tries, 200 s a write
        return fs

    def _url_options(self) -> dict[str, Any]:
        return {}  # s3fs would read `?versionId=` in a key as a version

    def info(self, place: Place) -> Entry | None:
        """As Store.info; a bare prefix of keys counts as a folder."""
        url = full_url(place)
        found = None if url.endswith("/") else super().info(url)
        if found is not None and (found.is_folder or found.size_bytes):
            return found
        folder = url.rstrip("/") + "/"
        if any(self.pages(folder)):
            return Entry(folder, None, is_folder=True)
        return found or (Entry(url, None, is_folder=True) if any(self.pages(url)) else None)

    def read_bytes(self, place: Place) -> bytes:
        """As Store.read_bytes, in one request: s3fs would ask for the size first, to read pieces of it at once."""
        return bytes(self.retried(lambda: self.fs.cat_file(self.path(place), max_concurrency=1)))

    def bucket_and_key(self, place: Place) -> tuple[str, str]:
        """Return the bucket and the literal key: s3fs would read `?versionId=` in it as a version."""
        url = full_url(place)
        path = url.removeprefix("s3://")
        if path.startswith("arn:"):
            bucket, key, _ = self.fs.split_path(url)
        else:
            bucket, _, key = path.partition("/")
        return bucket, key

    def pages(self, prefix: Place) -> Iterator[list[Entry]]:
        """As Store.pages, with one page in memory; in the order of the keys' bytes, as the service lists them."""
        for page, bucket in self._pages(prefix):
            yield [Entry(f"s3://{bucket}/{item['Key']}", item["Size"]) for item in page]

    def versioned_pages(self, prefix: Place) -> Iterator[list[tuple[str, str, int]]]:
        """Yield URL, ETag and size in bytes of every object, page by page. Raises StoreError."""
        for page, bucket in self._pages(prefix):
            yield [(f"s3://{bucket}/{item['Key']}", item["ETag"], item["Size"]) for item in page]

    def _pages(self, prefix: Place) -> Iterator[tuple[list[dict[str, Any]], str]]:
        bucket, key = self.bucket_and_key(prefix)
        continued: dict[str, str] = {}
        seen: set[int] = set()
        extent = Extent(urls.shown(full_url(prefix)))
        while True:
            page = self._page(bucket, key, continued)
            extent.grow(len(page.get("Contents", [])), 1)
            yield page.get("Contents", []), bucket
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")
            if token is None or hash(token) in seen:
                detail = f"the listing of {prefix} does not end: its server repeats a continuation token, or has none"
                raise StoreError(Fault(RejectReason.FETCH_FAILED, detail))
            seen.add(hash(token))
            continued = {"ContinuationToken": token}

    def _page(self, bucket: str, key: str, continued: dict[str, str]) -> dict[str, Any]:
        return dict(
            self.retried(
                lambda: self.fs.call_s3(
                    "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=PAGE_SIZE, **self.fs.req_kw, **continued
                )
            )
        )
