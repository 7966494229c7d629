"""Whether a whole store is out of reach: then a job ends, and does not write a failure for every row.

Wrong or expired credentials, a missing bucket, a server that is down: many images in a row then fail, and none arrives.
Where one has arrived before, in this run or an earlier one, it is asked for again: if it still arrives, the failures
are those of the images, as of a folder of archived objects, and their rows say so.
Rows that failed in an earlier run do not count, nor does one web server among many, nor one table that cannot be read.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TypeGuard

import pyarrow as pa

from captioner.errors import JobError
from captioner.schema import Reject, RejectReason
from captioner.storage import urls
from captioner.storage.faults import ARCHIVED

__all__ = ["OutageDetector"]

_MAX_IN_A_ROW = 256
_MIN_SOURCES = 8  # web servers or input files that fail together before the network is at fault
_ACCESS = frozenset({RejectReason.FORBIDDEN, RejectReason.FETCH_FAILED, RejectReason.UNREACHABLE})


_MAX_ASKED = 4  # each may take a minute
_NOTHING = Reject(RejectReason.FETCH_FAILED, "")


def _is_refused(outcome: object) -> TypeGuard[Reject]:
    return isinstance(outcome, Reject) and outcome.reason in _ACCESS


class OutageDetector:
    """Counts images in a row that their store did not deliver. Thread-safe.

    ask: what comes of the image or file at a URI now. path_of: the URL of the file that a unit is. earlier: URIs of
    images, and of files that they are in, that an earlier run captioned."""

    def __init__(
        self,
        input_path: str,
        ask: Callable[[str], object] = lambda _: _NOTHING,
        path_of: Callable[[int], str | None] = lambda _: None,
        earlier: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._ask = ask
        self._path_of = path_of
        self._earlier = earlier
        self._arrived_unit: int | None = None  # the last one that held its images itself
        self._arrived: dict[tuple[str, str], str] = {}  # the last URI that arrived from each store
        self._own_host = urls.host(input_path) if urls.scheme(input_path).startswith("http") else None
        self._lock = threading.Lock()
        self._num_in_a_row = 0
        self._servers: set[str] = set()
        self._units: set[str] = set()
        self._has_seen_one = False

    def record(self, rows: pa.Table, found: Sequence[object]) -> None:
        """Record the outcome of rows of `source_schema`: a Reject, or anything else for success.

        Raises JobError when so many in a row failed that their store is out of reach.
        """
        uris, attempts = rows.column("uri").to_pylist(), rows.column("attempt").to_pylist()
        units = (rows.column("key").to_numpy() >> 32).tolist()
        with self._lock:
            for uri, unit, attempt, outcome in zip(uris, units, attempts, found, strict=True):
                if attempt == 1:
                    self._record_one(unit, "" if uri is None else uri, outcome)

    def _record_one(self, unit: int, uri: str, outcome: object) -> None:
        shown = uri or f"input file {unit}"
        if not _is_refused(outcome) or ARCHIVED in outcome.detail:
            self._note_arrival(unit, uri, outcome)
            return
        self._num_in_a_row += 1
        (self._servers if uri else self._units).add(self._server(uri) if uri else shown)
        if not self._is_out_of_reach():
            return
        if not self._still_arrives(uri or self._path_of(unit) or ""):
            raise JobError(self._message(shown, outcome))
        self._reset()

    def _note_arrival(self, unit: int, uri: str, outcome: object) -> None:
        self._has_seen_one = True
        if outcome is None and not uri:
            self._arrived_unit = unit
        elif outcome is None and not self._is_web(uri):
            self._arrived[urls.server(uri)] = uri
        self._reset()

    def _still_arrives(self, refused: str) -> bool:
        """Return whether something arrives that arrived before from the store of a URL that is refused."""
        unit = None if self._arrived_unit is None else self._path_of(self._arrived_unit)
        known = [self._arrived.get(urls.server(refused)), unit]
        ours = [url for url in known if url and urls.server(url) == urls.server(refused)]
        if not ours and refused and not self._is_web(refused):
            ours = [url for url in self._earlier() if urls.server(url) == urls.server(refused)]
        return any(not _is_refused(self._ask(url)) for url in ours[:_MAX_ASKED])

    def _reset(self) -> None:
        self._num_in_a_row = 0
        self._servers.clear()
        self._units.clear()

    def _is_web(self, uri: str) -> bool:
        """Return whether a URI is on a web server other than the input's own, of which a list names many."""
        return urls.scheme(uri) in ("http", "https") and urls.host(uri) != self._own_host

    def _server(self, uri: str) -> str:
        """Return the web server; an empty string for a store that credentials open as a whole."""
        return urls.host(uri) if self._is_web(uri) else ""

    def _is_out_of_reach(self) -> bool:
        """Return whether enough failed together. An input file counts once, since a tar may fail with a single row."""
        if len(self._units) >= _MIN_SOURCES:
            return True
        is_of_many = "" in self._servers or len(self._servers | self._units) >= _MIN_SOURCES
        return self._num_in_a_row >= _MAX_IN_A_ROW and is_of_many

    def _message(self, shown: str, last: Reject) -> str:
        since = "since some arrived before" if self._has_seen_one else "and none arrived before"
        return (
            f"{self._num_in_a_row} images in a row did not arrive, {since}; the last is {urls.redact(shown)}:"
            f" {last.reason}: {last.detail}. Check credentials, endpoint, network and mount, then run the"
            " same command again: it retries all of them"
        )
