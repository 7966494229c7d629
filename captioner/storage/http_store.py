"""Web servers."""

import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from captioner import __version__
from captioner.schema import RejectReason
from captioner.storage import urls
from captioner.storage.faults import Fault, StoreError
from captioner.storage.fsspec_store import Entry, Store, file_or_folder, in_order
from captioner.storage.hosts import HostGuard, is_same
from captioner.storage.location import Place, full_url

if TYPE_CHECKING:
    import aiohttp

__all__ = ["CONNECT_TIMEOUT_S", "MAX_INDEX_BYTES", "READ_TIMEOUT_S", "HttpStore", "guarded", "http_client"]

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0  # between two pieces of a body
MAX_INDEX_BYTES = 64 << 20  # about half a million links
_PIECE_BYTES = 1 << 16
_HARMLESS_HEADERS = frozenset(
    {"accept", "accept-encoding", "connection", "host", "if-match", "if-range", "range", "user-agent"}
)


async def http_client(
    *,
    loop: Any,
    home: str,
    num_connections: int = 100,
    socket_factory: Callable[..., Any] | None = None,
    **client_kwargs: Any,
) -> "aiohttp.ClientSession":
    """Return a session that gives up on a silent server, and takes as long as it must for a whole answer.

    home: a URL of the server that the given headers are for. A server that it redirects to does not get them."""
    import aiohttp  # here, where it is needed: it takes a seventh of a second

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=num_connections, socket_factory=socket_factory)
    headers = {"User-Agent": f"captioner/{__version__}", **client_kwargs.pop("headers", {})}
    return aiohttp.ClientSession(
        loop=loop,
        connector=connector,
        headers=headers,
        middlewares=(_keep_headers_at(home),),
        response_class=_response_class(),
        **{"timeout": timeout, **client_kwargs},
    )


@functools.cache
def _response_class() -> "type[aiohttp.ClientResponse]":
    import aiohttp

    class _Response(aiohttp.ClientResponse):
        """An answer whose text has a limit: fsspec reads the page of a folder whole."""

        async def text(self, encoding: str | None = None, errors: str = "strict") -> str:
            """As ClientResponse.text. Raises StoreError for more than MAX_INDEX_BYTES."""
            data = bytearray()
            async for piece in self.content.iter_chunked(_PIECE_BYTES):
                data += piece
                if len(data) > MAX_INDEX_BYTES:
                    detail = (
                        f"the page of a folder has more than {MAX_INDEX_BYTES:,} bytes; pass a list of its URLs (.txt)"
                    )
                    raise StoreError(Fault(RejectReason.FETCH_FAILED, detail))
            self._body = bytes(data)
            return await super().text(encoding, errors)

    return _Response


class _Spool(io.FileIO):
    """A temporary file that takes at most half of what is free on its disk: a body may have no end."""

    def __init__(self) -> None:
        folder = tempfile.gettempdir()
        descriptor, path = tempfile.mkstemp(dir=folder)
        Path(path).unlink()
        super().__init__(descriptor, "r+b")
        self._left = shutil.disk_usage(folder).free // 2

    def write(self, data: Any) -> int:
        """As FileIO.write. Raises StoreError."""
        self._left -= len(data)
        if self._left < 0:
            detail = "a file of a server that gives no ranges has more bytes than half of the temporary folder's disk"
            raise StoreError(Fault(RejectReason.FETCH_FAILED, detail))
        return super().write(data)


def _keep_headers_at(home: str) -> "aiohttp.ClientMiddlewareType":
    async def send(
        request: "aiohttp.ClientRequest", handler: "aiohttp.ClientHandlerType"
    ) -> "aiohttp.ClientResponse":  # called for a redirect too
        if not is_same(str(request.url), home):
            for name in {name for name in request.headers if name.lower() not in _HARMLESS_HEADERS}:
                request.headers.popall(name)
        return await handler(request)

    return send


def _is_below(link: str, root: str) -> bool:
    return urls.is_inside(unquote(link.removeprefix(root).removesuffix("/")))  # a server resolves %2e%2e too


def guarded(url: str, storage_options: Mapping[str, Any], home: str, guard: HostGuard | None = None) -> dict[str, Any]:
    """Return the options that open a URL of any store, by a session as HttpStore has it where that is a web server.

    home: as of `http_client`. guard: where it may lead; by default to no inner address but those of `home`. In a store
    in a store (`zip://::http://...`) the options are the outer store's."""
    kind = urls.scheme(url.rpartition("::")[2] if urls.is_chained(url) else url)
    if kind not in ("http", "https"):
        return dict(storage_options)
    session = {"get_client": functools.partial(http_client, home=home, socket_factory=guard or HostGuard.at(home))}
    if not urls.is_chained(url):
        return {**session, **storage_options}
    inner = storage_options.get(kind)
    return {**storage_options, kind: {**session, **(inner if isinstance(inner, Mapping) else {})}}


class HttpStore(Store):
    """A web server: folders are pages of links."""

    def _url_options(self) -> dict[str, Any]:
        """Return a client that no redirect leads to an inner address, unless this server has one itself."""
        home = full_url(self._location)
        return guarded(home, {}, home)

    def url(self, path: str) -> str:
        """Return the path: it is a URL here."""
        return path

    def info(self, place: Place) -> Entry | None:
        """As Store.info; a page of HTML counts as a folder."""
        url = full_url(place)
        found = self._or_none(lambda: self.fs.info(url))
        is_folder = url.endswith("/") or (found or {}).get("mimetype") == "text/html"
        return found and file_or_folder(url, found.get("size"), is_folder=is_folder)

    def _children(self, folder: str) -> list[Entry]:
        root = folder.rstrip("/") + "/"
        found = self.retried(lambda: self.fs.ls(root, detail=True))
        below = {info["name"] for info in found if info["name"].startswith(root)}
        plain = (link for link in below if not {"?", "#"} & set(link.removeprefix(root)[:1]) and _is_below(link, root))
        return in_order([Entry(link, None, is_folder=link.endswith("/")) for link in plain])

    def _reader(self, place: Place) -> Any:
        """Return a reader; a server that cannot give ranges is read to a temporary file first."""
        url = full_url(place)
        info = self.fs.info(url)
        if info.get("partial") and info.get("size") is not None:
            return self.fs.open(url, "rb", cache_type="none")
        spool = _Spool()
        try:
            self.fs.get_file(url, spool)
        except BaseException:
            spool.close()
            raise
        spool.seek(0)
        return spool
