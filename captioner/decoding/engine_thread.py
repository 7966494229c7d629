"""One thread that owns an engine, and the calls of many threads that share its slots.

While one call's images are being encoded in its own thread, the captions of all others go on; a call that ends leaves
its slots to the rest at once. Without work the thread sleeps.
"""

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from captioner.decoding.engine import Engine
from captioner.decoding.memory import WAITING_PER_SLOT
from captioner.decoding.request import Generation, Request
from captioner.errors import EngineError
from captioner.model.recording import on_device


@dataclass(eq=False, slots=True)
class _Ticket:
    """The id of a request and the promise of its captions. Stands for that id in the engine: ids of two calls may be
    the same."""

    id: Hashable
    future: Future[Generation] = field(default_factory=Future)


class EngineThread:
    """Runs an engine for callers in any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._most_waiting = WAITING_PER_SLOT * engine.num_slots
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()  # whose ids are tickets
        self._running: set[_Ticket] = set()
        self._is_closed = False
        self._cause: BaseException | None = None
        self._idle_s = 0.0
        self._asleep_since: float | None = None
        self._thread = threading.Thread(target=self._serve, name="captioner-engine", daemon=True)
        self._thread.start()

    @property
    def num_busy(self) -> int:
        """Slots in which a caption or a beam is being written."""
        return self._engine.num_busy

    @property
    def idle_s(self) -> float:
        """Seconds so far in which the engine had nothing at all to do."""
        since = self._asleep_since
        return self._idle_s + (0.0 if since is None else time.monotonic() - since)

    def run(self, requests: Iterable[Request]) -> list[Generation]:
        """Return the captions of the requests, in their order. Raises what `submit` raises, and EngineError with its
        cause if the engine stops meanwhile."""
        return [future.result() for future in self.submit(list(requests))]

    def submit(self, requests: Sequence[Request]) -> list[Future[Generation]]:
        """Queue requests behind those of other calls, and wait before that while as many wait as the device has room
        for. Raises ShapeError for a prefix of another length, and EngineError if the engine has stopped."""
        for request in requests:
            self._engine.check(request)
        tickets = [_Ticket(request.id) for request in requests]
        ticketed = [replace(request, id=ticket) for request, ticket in zip(requests, tickets, strict=True)]
        for ticket in tickets:
            ticket.future.set_running_or_notify_cancel()  # a promise cannot be cancelled: its slot is shared
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._waiting) < self._most_waiting)
            if self._is_closed:
                raise self._error()
            self._waiting.extend(ticketed)
            self._changed.notify_all()
        return [ticket.future for ticket in tickets]

    def close(self) -> None:
        """Stop after the current step. Calls that wait, and later ones, raise EngineError."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        ended: Iterable[Generation] = ()
        try:
            with on_device(self._engine.device):
                while self._admit():
                    self._engine.begin_step()
                    self._deliver(ended)  # of the step before, while a card is at this one
                    ended = self._engine.end_step()
                    if self._engine.is_idle:
                        self._deliver(ended)
                        ended = ()
        except BaseException as error:
            self._cause = error
        self._deliver(ended)  # these are whole, whatever came after them
        self._fail_all()

    def _admit(self) -> bool:
        """Fill free slots, asleep while there is nothing at all to do. False once closed."""
        with self._changed:
            if not (self._is_closed or self._waiting) and self._engine.is_idle:
                self._sleep()
            number = min(len(self._waiting), self._engine.num_free)
            requests = [self._waiting.popleft() for _ in range(number)]
            self._running.update(map(_ticket, requests))
            self._engine.admit(requests)
            if requests:
                self._changed.notify_all()
            return not self._is_closed

    def _sleep(self) -> None:
        start = self._asleep_since = time.monotonic()
        self._changed.wait_for(lambda: self._is_closed or self._waiting)
        self._asleep_since = None
        self._idle_s += time.monotonic() - start

    def _deliver(self, generations: Iterable[Generation]) -> None:
        for generation in generations:
            ticket = _ticket(generation)
            self._running.discard(ticket)
            ticket.future.set_result(replace(generation, id=ticket.id))

    def _fail_all(self) -> None:
        with self._changed:
            self._is_closed = True
            for ticket in (*self._running, *map(_ticket, self._waiting)):
                ticket.future.set_exception(self._error())
            self._running.clear()
            self._waiting.clear()
            self._changed.notify_all()

    def _error(self) -> EngineError:
        cause = self._cause
        error = EngineError(f"the decoding engine stopped: {cause!r}" if cause else "the decoding engine is closed")
        error.__cause__ = cause
        return error


def _ticket(holder: Request | Generation) -> _Ticket:
    ticket = holder.id
    assert isinstance(ticket, _Ticket)
    return ticket
