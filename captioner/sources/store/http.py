"""Web servers."""

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import aiohttp

from captioner import __version__
from captioner.sources.hosts import is_same, socket_guard
from captioner.sources.store.fsspec_store import Entry, Store, file_or_folder, in_order

__all__ = ["CONNECT_TIMEOUT_S", "READ_TIMEOUT_S", "HttpStore", "http_client"]

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0  # between two pieces of a body
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
) -> aiohttp.ClientSession:
    """Return a session that gives up a server which is silent for long, however long the whole answer takes.

    home: a URL of the server that the given headers are for; one that it sends us on to does not get them."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=num_connections, socket_factory=socket_factory)
    headers = {"User-Agent": f"captioner/{__version__}", **client_kwargs.pop("headers", {})}
    return aiohttp.ClientSession(
        loop=loop,
        connector=connector,
        headers=headers,
        middlewares=(_keep_headers_at(home),),
        **{"timeout": timeout, **client_kwargs},
    )


def _keep_headers_at(home: str) -> aiohttp.ClientMiddlewareType:
    async def send(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:  # of a redirect, too
        if not is_same(str(request.url), home):
            for name in {name for name in request.headers if name.lower() not in _HARMLESS_HEADERS}:
                request.headers.popall(name)
        return await handler(request)

    return send


class HttpStore(Store):
    """A web server: folders are pages of links."""

    def _url_options(self) -> dict[str, Any]:
        """Return what makes a session that no redirect leads inside, unless this server is there itself."""
        return {"get_client": functools.partial(http_client, home=self._url, socket_factory=socket_guard(self._url))}

    def url(self, path: str) -> str:
        """A path is a URL here."""
        return path

    def info(self, url: str) -> Entry | None:
        """As Store.info; a page of HTML counts as a folder."""
        found = self._or_none(lambda: self.fs.info(url))
        is_folder = url.endswith("/") or (found or {}).get("mimetype") == "text/html"
        return found and file_or_folder(url, found.get("size"), is_folder=is_folder)

    def _children(self, folder: str) -> list[Entry]:
        root = folder.rstrip("/") + "/"
        found = self._steady(lambda: self.fs.ls(root, detail=True))
        below = {info["name"] for info in found if info["name"].startswith(root)}
        plain = (link for link in below if link != root and not {"?", "#"} & set(link.removeprefix(root)[:1]))
        return in_order([Entry(link, None, is_folder=link.endswith("/")) for link in plain])

    def _reader(self, url: str) -> Any:
        """Return a reader; a server that cannot give ranges is read to a temporary file first."""
        info = self.fs.info(url)
        if info.get("partial") and info.get("size") is not None:
            return self.fs.open(url, "rb", cache_type="none")
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        self.fs.get_file(url, spool)
        spool.seek(0)
        return spool
