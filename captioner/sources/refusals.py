"""When not single images but a whole store is out of reach, a job should end and not write a failure a row.

Credentials that are wrong or ran out, a bucket that is gone, a server that is down: many images in a row then fail to
arrive, without one that does. Rows that failed in an earlier run say nothing here, nor does one web server among many.
"""

import threading
from collections.abc import Iterable

from captioner.errors import JobError
from captioner.rows import Reject, RejectReason
from captioner.sources import urls

__all__ = ["Refusals"]

_MOST_IN_A_ROW = 256
_FEWEST_HOSTS = 8  # of web servers that fail together before the network is to blame
_ACCESS = frozenset({RejectReason.FORBIDDEN, RejectReason.FETCH_FAILED})


class Refusals:
    """Counts images in a row that their store did not give; may be told by several threads."""

    def __init__(self, input_path: str) -> None:
        self._own_host = urls.host(input_path) if urls.scheme(input_path).startswith("http") else None
        self._lock = threading.Lock()
        self._num_in_a_row = 0
        self._places: set[str] = set()
        self._has_seen_one = False

    def see(self, outcomes: Iterable[tuple[str, object]]) -> None:
        """Take note of what became of some URIs that were tried for the first time: a Reject, or anything else.

        Raises JobError when a store gave nothing for so long that it is out of reach.
        """
        with self._lock:
            for uri, outcome in outcomes:
                if isinstance(outcome, Reject) and outcome.reason in _ACCESS:
                    self._num_in_a_row += 1
                    self._places.add(self._place(uri))
                    if self._num_in_a_row >= _MOST_IN_A_ROW and self._is_out_of_reach():
                        raise JobError(self._complaint(uri, outcome))
                else:
                    self._num_in_a_row, self._has_seen_one = 0, True
                    self._places.clear()

    def _place(self, uri: str) -> str:
        """Return the web server, or an empty string for a store that the user has access to as a whole."""
        host = urls.host(uri) if urls.scheme(uri) in ("http", "https") else None
        return "" if host in (None, self._own_host) else str(host)

    def _is_out_of_reach(self) -> bool:
        return "" in self._places or len(self._places) >= _FEWEST_HOSTS

    def _complaint(self, uri: str, last: Reject) -> str:
        since = "since some arrived before" if self._has_seen_one else "and none arrived before"
        return (
            f"{self._num_in_a_row} images in a row did not arrive, {since}; the last is {urls.redact(uri)}:"
            f" {last.reason}: {last.detail}. None of them was written as a failure; mend the access (credentials,"
            " endpoint, network) and give the same command again"
        )
