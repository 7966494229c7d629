"""When not single images but a whole store is out of reach, a job should end and not write a failure a row.

Credentials that are wrong or ran out, a bucket that is gone, a server that is down: many images in a row then fail to
arrive, without one that does. Rows that failed in an earlier run say nothing here, nor does one web server among many,
nor one table that cannot be read.
"""

import threading
from collections.abc import Sequence

import pyarrow as pa

from captioner.errors import JobError
from captioner.rows import Reject, RejectReason
from captioner.sources import urls

__all__ = ["Refusals"]

_MOST_IN_A_ROW = 256
_FEWEST_PLACES = 8  # web servers or input files that fail together before the network is to blame
_ACCESS = frozenset({RejectReason.FORBIDDEN, RejectReason.FETCH_FAILED, RejectReason.UNREACHABLE})


class Refusals:
    """Counts images in a row that their store did not give; may be told by several threads."""

    def __init__(self, input_path: str) -> None:
        self._own_host = urls.host(input_path) if urls.scheme(input_path).startswith("http") else None
        self._lock = threading.Lock()
        self._num_in_a_row = 0
        self._places: set[str] = set()
        self._units: set[str] = set()
        self._has_seen_one = False

    def see(self, rows: pa.Table, found: Sequence[object]) -> None:
        """Take note of what became of rows of `rows.source_schema`: a Reject, or anything else.

        Raises JobError when a store gave nothing for so long that it is out of reach.
        """
        uris, attempts = rows.column("uri").to_pylist(), rows.column("attempt").to_pylist()
        units = (rows.column("key").to_numpy() >> 32).tolist()
        with self._lock:
            for uri, unit, attempt, outcome in zip(uris, units, attempts, found, strict=True):
                if attempt == 1:
                    self._see_one(uri or f"input file {unit}", "" if uri is None else uri, outcome)

    def _see_one(self, shown: str, uri: str, outcome: object) -> None:
        if not isinstance(outcome, Reject) or outcome.reason not in _ACCESS:
            self._num_in_a_row, self._has_seen_one = 0, True
            self._places.clear()
            self._units.clear()
            return
        self._num_in_a_row += 1
        (self._places if uri else self._units).add(self._place(uri) if uri else shown)
        if self._is_out_of_reach():
            raise JobError(self._complaint(shown, outcome))

    def _place(self, uri: str) -> str:
        """Return the web server, or an empty string for a store that the user has access to as a whole."""
        host = urls.host(uri) if urls.scheme(uri) in ("http", "https") else None
        return "" if host in (None, self._own_host) else str(host)

    def _is_out_of_reach(self) -> bool:
        """Say whether so many failed together; an input file counts once, since a tar may fail by a single row."""
        if len(self._units) >= _FEWEST_PLACES:
            return True
        is_of_many = "" in self._places or len(self._places | self._units) >= _FEWEST_PLACES
        return self._num_in_a_row >= _MOST_IN_A_ROW and is_of_many

    def _complaint(self, shown: str, last: Reject) -> str:
        since = "since some arrived before" if self._has_seen_one else "and none arrived before"
        return (
            f"{self._num_in_a_row} images in a row did not arrive, {since}; the last is {urls.redact(shown)}:"
            f" {last.reason}: {last.detail}. Mend the access (credentials, endpoint, network, mount) and give the same"
            " command again: it asks for all of them anew"
        )
