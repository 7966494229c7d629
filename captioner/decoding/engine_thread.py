"""One thread that runs an engine for calls from many threads, which share its slots.

While one call encodes its images in its own thread, the captions of the other calls continue; slots that a call no
longer uses serve the others at once. Without work the thread sleeps.
"""

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from captioner.decoding.engine import Engine
from captioner.decoding.request import Generation, Request
from captioner.errors import EngineError
from captioner.model.cuda_graphs import on_device


@dataclass(eq=False, slots=True)
class _Ticket:
    """The id of a request and the future of its captions. It replaces that id in the engine, because two calls may use
    the same ids."""

    id: Hashable
    future: Future[Generation] = field(default_factory=Future)


class EngineThread:
    """Runs an engine for callers in any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()  # whose ids are tickets
        self._num_waiting_tokens = 0
        self._running: set[_Ticket] = set()
        self.num_finished = 0
        """Requests whose captions are complete. Only the engine's thread adds to it."""
        self._is_closed = False
        self._cause: BaseException | None = None
        self._idle_s = 0.0
        self._asleep_since: float | None = None
        self._thread = threading.Thread(target=self._serve, name="captioner-engine", daemon=True)
        self._thread.start()

    @property
    def num_slots(self) -> int:
        """Slots of the engine."""
        return self._engine.num_slots

    @property
    def num_busy(self) -> int:
        """Slots in which a caption or a beam is being decoded."""
        return self._engine.num_busy

    @property
    def idle_s(self) -> float:
        """Seconds so far in which the engine had no request."""
        since = self._asleep_since
        return self._idle_s + (0.0 if since is None else time.monotonic() - since)

    def run(self, requests: Iterable[Request]) -> list[Generation]:
        """Return the captions of the requests, in order. Raises as `submit` does, and EngineError with its cause if the
        engine stops meanwhile."""
        return [future.result() for future in self.submit(list(requests))]

    def submit(self, requests: Sequence[Request]) -> list[Future[Generation]]:
        """Queue requests behind those of other calls; block first while the queue is full, as queued prefixes take
        memory of the device. Raises ShapeError for a prefix that is too long, EngineError if the engine has stopped.
        """
        for request in requests:
            self._engine.check(request)
        tickets = [_Ticket(request.id) for request in requests]
        ticketed = [replace(request, id=ticket) for request, ticket in zip(requests, tickets, strict=True)]
        for ticket in tickets:
            ticket.future.set_running_or_notify_cancel()  # so that it cannot be cancelled: the engine goes on
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room())
            if self._is_closed:
                raise self._error()
            self._waiting.extend(ticketed)
            self._num_waiting_tokens += sum(len(request.prefix) for request in ticketed)
            self._changed.notify_all()
        return [ticket.future for ticket in tickets]

    def close(self) -> None:
        """Stop after the current step. Waiting and later calls raise EngineError."""
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
                    self._deliver(ended)  # of the previous step, while the device runs this one
                    ended = self._engine.end_step()
                    if self._engine.is_idle:
                        self._deliver(ended)
                        ended = ()
        except BaseException as error:
            self._cause = error
        self._deliver(ended)  # these were complete before the failure
        self._fail_all()

    def _admit(self) -> bool:
        """Fill the free slots; sleep while there is no request. False once closed."""
        with self._changed:
            if not (self._is_closed or self._waiting) and self._engine.is_idle:
                self._sleep()
            while number := min(len(self._waiting), self._engine.num_free):
                requests = [self._waiting.popleft() for _ in range(number)]
                self._num_waiting_tokens -= sum(len(request.prefix) for request in requests)
                self._running.update(map(_ticket, requests))
                self._engine.admit(requests)
                self._changed.notify_all()
            return not self._is_closed

    def _has_room(self) -> bool:
        most_images, most_tokens = self._engine.most_waiting
        return len(self._waiting) < most_images and self._num_waiting_tokens < most_tokens

    def _sleep(self) -> None:
        start = self._asleep_since = time.monotonic()
        self._changed.wait_for(lambda: self._is_closed or self._waiting)
        self._asleep_since = None
        self._idle_s += time.monotonic() - start

    def _deliver(self, generations: Iterable[Generation]) -> None:
        for generation in generations:
            ticket = _ticket(generation)
            self._running.discard(ticket)
            self.num_finished += 1
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
