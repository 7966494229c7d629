"""S3 and whatever speaks its protocol."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from captioner.errors import InputError
from captioner.sources.store.fsspec_store import PAGE_SIZE, Entry, Store
from captioner.sources.store.http import CONNECT_TIMEOUT_S, READ_TIMEOUT_S

__all__ = ["S3Store"]

_CONFIG = {
    "retries": {"max_attempts": 0},
    "connect_timeout": CONNECT_TIMEOUT_S,
    "read_timeout": READ_TIMEOUT_S,
}


class S3Store(Store):
    """S3 and whatever speaks its protocol: a bucket is listed flat, by the pages of the service."""

    _num_retries = 7  # 24 s or so: throttling passes with patience
    _pieces: ClassVar = {"max_concurrency": 2}  # of 50 MiB each: s3fs would hold ten

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        given = storage_options.get("config_kwargs") or {}
        if not isinstance(given, Mapping):
            raise InputError(f"config_kwargs of --storage-options is a {type(given).__name__}; expected an object")
        config_kwargs = {**_CONFIG, **given}
        super().__init__(url, {**storage_options, "config_kwargs": config_kwargs})

    def _connect(self) -> Any:
        fs = super()._connect()
        fs.retries = 1  # the tries are counted here; botocore's times s3fs's times ours were 125, in 200 s a write
        return fs

    def _url_options(self) -> dict[str, Any]:
        return {}  # s3fs would find versions in keys with `?versionId=`

    def info(self, url: str) -> Entry | None:
        """As Store.info; a bare prefix of keys counts as a folder."""
        found = None if url.endswith("/") else super().info(url)
        if found is not None and (found.is_folder or found.size_bytes):
            return found
        folder = url.rstrip("/") + "/"
        if any(self.pages(folder)):
            return Entry(folder, None, is_folder=True)
        return found or (Entry(url, None, is_folder=True) if any(self.pages(url)) else None)

    def bucket_and_key(self, url: str) -> tuple[str, str]:
        """Return the bucket and the key, literally: s3fs would read `?versionId=` in a key as a version."""
        path = url.removeprefix("s3://")
        if path.startswith("arn:"):
            bucket, key, _ = self.fs.split_path(url)
        else:
            bucket, _, key = path.partition("/")
        return bucket, key

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        """As Store.pages, but holds one page only; in the service's order, that of the keys' bytes."""
        for page, bucket in self._pages(prefix):
            yield [Entry(f"s3://{bucket}/{item['Key']}", item["Size"]) for item in page]

    def stamped_pages(self, prefix: str) -> Iterator[list[tuple[str, str, int]]]:
        """Yield URL, ETag and size in bytes of every object, page by page. Raises StoreError."""
        for page, bucket in self._pages(prefix):
            yield [(f"s3://{bucket}/{item['Key']}", item["ETag"], item["Size"]) for item in page]

    def _pages(self, prefix: str) -> Iterator[tuple[list[dict[str, Any]], str]]:
        bucket, key = self.bucket_and_key(prefix)
        continued: dict[str, str] = {}
        while True:
            page = self._page(bucket, key, continued)
            yield page.get("Contents", []), bucket
            if not page.get("IsTruncated"):
                return
            continued = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, bucket: str, key: str, continued: dict[str, str]) -> dict[str, Any]:
        return dict(
            self._steady(
                lambda: self.fs.call_s3(
                    "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=PAGE_SIZE, **self.fs.req_kw, **continued
                )
            )
        )
