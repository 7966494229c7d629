"""The lease of a table: one job at a time writes it, and a crash leaves nothing stuck.

    with take_lease(store, run_folder, "caption") as lease:      # OutputError where another job holds it
        ...                                                      # its run is lease.run_id

`_run/lease/` holds numbered files; the highest number is the lease. A number is taken by a write that fails where the
name is taken (S3: `If-None-Match: *`; local: a hard link, or exclusive creation where the disk has none), so of several
jobs that want the same one gets it; other stores do it as well as their fsspec package. The holder writes its file anew
every BEAT_S seconds and removes it at the end. It is taken over

- at once, when its process was on this machine and is no more;
- when its last heartbeat is older than EXPIRY_S, and for WATCH_S seconds no other one came, so that clocks that differ
  do not kill a job that lives.

To take over is to take the next number: whoever held the lower one sees it at its next heartbeat, and stops; its
writers see it before they publish (`is_held`). Knows no parts and no rows.
"""

import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace

from captioner.errors import JobError, OutputError
from captioner.sources.faults import StoreError
from captioner.sources.processes import machine, process_start
from captioner.sources.store import Store
from captioner.sources.urls import join, redact

__all__ = ["BEAT_S", "EXPIRY_S", "WATCH_S", "Holder", "Lease", "holder", "is_held", "refuse_if_held", "take_lease"]

log = logging.getLogger("captioner")

BEAT_S = 15.0
EXPIRY_S = 90.0
WATCH_S = 30.0
_LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds the lease, as its file says."""

    run_id: str
    purpose: str
    """`caption`, `repair` or `compact`."""

    host: str
    machine: str
    """Names the running system and its process ids; empty where the system does not tell."""

    pid: int
    process_start: str
    since: float
    """When it began, in seconds since 1970, as are the others."""

    last_beat: float

    @property
    def expires(self) -> float:
        """When another machine may take over."""
        return self.last_beat + EXPIRY_S

    @property
    def is_here(self) -> bool:
        """True if its process, living or dead, is one of this machine."""
        return bool(self.machine) and self.machine == machine()

    @property
    def is_dead(self) -> bool:
        """True if it certainly ended: only known of a process of this machine."""
        return self.is_here and process_start(self.pid) != self.process_start


@dataclass
class Lease:
    """A lease that is held: the run it belongs to, and whether it was lost since."""

    store: Store
    url: str
    holder: Holder
    is_lost: bool = False

    @property
    def run_id(self) -> str:
        """The run that writes under this lease."""
        return self.holder.run_id

    def beat(self) -> None:
        """Say that the holder lives, or find that another job took over."""
        found = _latest(self.store, _folder_of(self.url))
        if found is None or found[0] != self.url or found[1] is None or found[1].run_id != self.run_id:
            self.is_lost = True
            return
        self.store.write_atomic(self.url, _encoded(replace(self.holder, last_beat=time.time())))


@contextmanager
def take_lease(store: Store, run_folder: str, purpose: str) -> Iterator[Lease]:
    """Hold the table's lease for as long as the block runs.

    Raises OutputError when another job holds it, naming who, since when and what to do; JobError from the block when
    the lease was lost to a job that took this one for dead.
    """
    lease = _take(store, run_folder, purpose)
    ended = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()  # where a signal arrives
    heart = threading.Thread(target=_keep, args=(lease, ended, is_main), name="lease", daemon=True)
    heart.start()
    try:
        with _interruptible(lease) if is_main else nullcontext():
            yield lease
    except KeyboardInterrupt:
        if lease.is_lost:
            raise JobError(_lost(run_folder)) from None
        raise
    finally:
        ended.set()
        heart.join()
        _release(lease)


def is_held(store: Store, run_folder: str, run_id: str) -> bool:
    """Say whether a run holds the table's lease at this moment. Raises StoreError."""
    found = _latest(store, join(run_folder, "lease"))
    return found is not None and found[1] is not None and found[1].run_id == run_id


def holder(store: Store, run_folder: str) -> Holder | None:
    """Return who holds the lease and is not known to be dead; None where nobody does. Raises StoreError."""
    found = _latest(store, join(run_folder, "lease"))
    return None if found is None or found[1] is None or found[1].is_dead else found[1]


def refuse_if_held(store: Store, run_folder: str) -> None:
    """Raise OutputError where a job that may live holds the lease. Takes nothing."""
    found = holder(store, run_folder)
    if found is not None and (found.is_here or time.time() <= found.expires):
        raise OutputError(_refusal(run_folder, found))


def _take(store: Store, run_folder: str, purpose: str) -> Lease:
    folder = join(run_folder, "lease")
    while True:
        found = _latest(store, folder)
        number = 1
        if found is not None:
            _check_free(store, run_folder, found)
            number = _number(found[0]) + 1
        lease = Lease(store, join(folder, f"{number:06d}.json"), _holder(purpose))
        if store.create(lease.url, _encoded(lease.holder)):
            _remove_below(store, folder, number)
            return lease


def _check_free(store: Store, run_folder: str, found: tuple[str, Holder | None]) -> None:
    """Return when the job behind a lease is gone; raise OutputError when it lives, or may."""
    url, held = found
    if held is not None and held.is_dead:
        log.info("lease=taken_over run=%s reason=%s", held.run_id, f"process {held.pid} of this machine is gone")
        return
    if held is not None and (held.is_here or time.time() <= held.expires):
        raise OutputError(_refusal(run_folder, held))
    log.info("lease=watched file=%s for_s=%g", redact(url), WATCH_S)
    give_up = time.monotonic() + WATCH_S
    while time.monotonic() < give_up:
        time.sleep(min(_LOOK_S, WATCH_S))
        again = _latest(store, _folder_of(url))
        if again is not None and again[1] is not None and again != found:
            raise OutputError(_refusal(run_folder, again[1]))
    log.info("lease=taken_over run=%s reason=%s", held.run_id if held else "unknown", "its heartbeats stopped")


def _latest(store: Store, folder: str) -> tuple[str, Holder | None] | None:
    """Return the URL of the lease that counts and who holds it, None for a file that says nothing."""
    names = [name for name in store.names(folder) if _number(name) >= 0]
    if not names:
        return None
    url = join(folder, max(names, key=_number))
    try:
        return url, Holder(**json.loads(store.read_bytes(url)))
    except (ValueError, TypeError):
        return url, None
    except StoreError:
        if store.info(url) is None:  # removed at this moment
            return _latest(store, folder)
        raise


def _number(url: str) -> int:
    stem = url.rpartition("/")[2].removesuffix(".json")
    return int(stem) if stem.isdecimal() else -1


def _folder_of(url: str) -> str:
    return url.rpartition("/")[0]


def _encoded(held: Holder) -> bytes:
    return (json.dumps(asdict(held), indent=2) + "\n").encode()


def _remove_below(store: Store, folder: str, number: int) -> None:
    for name in store.names(folder):
        if 0 <= _number(name) < number:
            store.remove(join(folder, name))


def _holder(purpose: str) -> Holder:
    now = time.time()
    return Holder(
        run_id=f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{secrets.token_hex(2)}",
        purpose=purpose,
        host=socket.gethostname(),
        machine=machine(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()) or "",
        since=now,
        last_beat=now,
    )


def _keep(lease: Lease, ended: threading.Event, is_main: bool) -> None:
    """Send heartbeats until the end; where the lease is lost, interrupt the main thread if it is what holds it."""
    while not lease.is_lost and not ended.wait(BEAT_S):
        try:
            lease.beat()
        except StoreError as error:  # the next one may arrive; if another job takes over meanwhile, it will say so
            log.info("lease=no_heartbeat error=%s", error)
    if lease.is_lost:
        log.info("lease=lost run=%s", lease.run_id)
        if is_main:
            os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def _interruptible(lease: Lease) -> Iterator[None]:
    """Let the loss of the lease interrupt a job that ignores Ctrl-C, as one behind `nohup ... &` in a script does."""

    def interrupt(*_: object) -> None:
        if lease.is_lost:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if before == signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def _release(lease: Lease) -> None:
    with suppress(StoreError):  # what is left behind expires
        if not lease.is_lost and is_held(lease.store, _folder_of(_folder_of(lease.url)), lease.run_id):
            lease.store.remove(lease.url)


def _refusal(run_folder: str, held: Holder) -> str:
    where = redact(run_folder.rpartition("/")[0])
    who = f"process {held.pid} on {held.host}, since {_clock(held.since)}"
    wait = "Wait for it, or end it"
    if held.is_here:
        remedy = f"{wait} (kill {held.pid})"
    else:
        remedy = (
            f"{wait} there; if it is gone, its lease can be taken over from {_clock(held.expires)} on,"
            f" {EXPIRY_S:g} s after its last heartbeat"
        )
    return f"{where} is in use: {held.purpose} run {held.run_id} by {who}; expected no other job on it. {remedy}"


def _lost(run_folder: str) -> str:
    return (
        f"another job took over {redact(run_folder.rpartition('/')[0])}, since no heartbeat of this one had arrived for"
        f" {EXPIRY_S:g} s; this one stopped, and what it wrote stays"
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
