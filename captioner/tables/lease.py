"""The lease of a table: one job at a time writes it, and a crash leaves nothing stuck.

    with take_lease(store, run_folder, "caption") as lease:      # OutputError where another job holds it
        ...                                                      # its run is lease.run_id

`_run/lease/` holds numbered files; the highest number is the lease. A job takes a number by a write that fails where
the name exists (S3: `If-None-Match: *`; local: a hard link, or exclusive creation where the disk has none), so of
several jobs that want a number one gets it; other stores do it as well as their fsspec package. A second such write
shows if a store does; where it does not, a job writes its file, waits for 10 seconds (`Timing.settle_s`) and looks
again: the last one to write stays, the others are refused. The holder rewrites its file every 15 seconds
(`Timing.beat_s`) and removes it at the end. A crashed job never blocks the table: its lease is taken over

- at once, when its process was on this machine and is gone;
- when its last heartbeat is older than EXPIRY_S, and for 30 seconds (`Timing.watch_s`) no other one came, so that a job
  whose clock is behind is not taken for dead;
- when its last heartbeat is dated ahead of this clock, or its file cannot be read, and for EXPIRY_S no other one came.

A job takes over by taking the next number: the holder of the lower one sees it at its next heartbeat, and stops; its
writers see it before they publish (`is_held`). Knows no parts and no rows.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace

from captioner.errors import JobError, OutputError
from captioner.storage import Location, Store, full_url
from captioner.storage.faults import StoreError
from captioner.storage.urls import join, redact
from captioner.tables.lease_file import (
    EXPIRY_S,
    Found,
    Holder,
    encoded,
    file_number,
    latest,
    new_holder,
    remove_below,
)

__all__ = [
    "DEFAULT_TIMING",
    "EXPIRY_S",
    "Holder",
    "Lease",
    "Timing",
    "holder",
    "is_held",
    "new_holder",
    "refuse_if_held",
    "take_lease",
    "why_not_held",
]

log = logging.getLogger("captioner")

_NUM_TRIES = 8  # to take a number: each loses to another job, or the store is wrong


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How often a lease is written and watched, in seconds."""

    beat_s: float = 15.0
    """Between two heartbeats of the holder."""

    watch_s: float = 30.0
    """How long an expired lease is watched for a heartbeat before it is taken over."""

    watch_undated_s: float = EXPIRY_S
    """How long one is watched whose age is not known: its file cannot be read, or is dated ahead of this clock."""

    look_s: float = 1.0
    """Between two looks at a watched lease."""

    settle_s: float = 10.0
    """How long a job waits to see if another one wrote the lease too, on a store without conditional writes."""


DEFAULT_TIMING = Timing()


@dataclass
class Lease:
    """A lease that is held: the run it belongs to, and whether it was lost since."""

    store: Store
    run_folder: Location
    """The run folder of the table."""
    url: str
    holder: Holder
    why_lost: str = ""
    is_begun: bool = False
    """Whether the table had its run.json at the last heartbeat."""

    @property
    def run_id(self) -> str:
        """The run that writes under this lease."""
        return self.holder.run_id

    @property
    def is_lost(self) -> bool:
        """Whether another job took over, or the table is gone."""
        return bool(self.why_lost)

    def check(self) -> None:
        """Raise JobError unless the lease is held at this moment; StoreError."""
        if why := why_not_held(self.store, self.run_folder, self.run_id):
            raise JobError(f"{why}; this one stopped, and what it wrote stays")

    def beat(self) -> None:
        """Write a heartbeat, or note that the lease is lost."""
        was_begun, self.is_begun = self.is_begun, self.store.info(self.run_folder / "run.json") is not None
        if was_begun and not self.is_begun:  # perhaps the last heartbeat made the folder again
            self.why_lost = _removed(self.run_folder, self.run_id)
            return
        self.why_lost = why_not_held(self.store, self.run_folder, self.run_id)
        if not self.is_lost:
            self.store.write_atomic(self.url, encoded(replace(self.holder, last_beat=time.time())))


@contextmanager
def take_lease(store: Store, run_folder: Location, purpose: str, timing: Timing = DEFAULT_TIMING) -> Iterator[Lease]:
    """Hold the table's lease for as long as the block runs.

    Raises OutputError when another job holds it, naming who, since when and what to do; JobError from the block when
    the lease was lost to a job that took this one for dead.
    """
    lease = _take(store, run_folder, purpose, timing)
    ended = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()  # where a signal arrives
    heart = threading.Thread(target=_keep, args=(lease, ended, is_main, timing), name="lease", daemon=True)
    heart.start()
    try:
        with _interruptible(lease) if is_main else nullcontext():
            yield lease
    except KeyboardInterrupt:
        if lease.is_lost:
            raise JobError(f"{lease.why_lost}; this one stopped, and what it wrote stays") from None
        raise
    finally:
        ended.set()
        heart.join()
        _release(lease)


def is_held(store: Store, run_folder: Location, run_id: str) -> bool:
    """Return True if a run holds the table's lease at this moment. Raises StoreError."""
    return not why_not_held(store, run_folder, run_id)


def why_not_held(store: Store, run_folder: Location, run_id: str) -> str:
    """Return why a run does not hold the table's lease at this moment, as a clause; empty if it does.

    Raises StoreError."""
    found = latest(store, full_url(run_folder / "lease"))
    if found is not None and found.holder is not None and found.holder.run_id == run_id:
        return ""
    if found is None and store.info(run_folder / "run.json") is None:
        return _removed(run_folder, run_id)
    if found is None:
        return f"run {run_id} ended, or its lease {run_folder}/lease was removed"
    who = f", {_who(found.holder)}" if found.holder else ""
    return (
        f"another job took over {run_folder.parent}{who}, since no heartbeat of run {run_id} had arrived for"
        f" {EXPIRY_S:g} s"
    )


def _removed(run_folder: Location, run_id: str) -> str:
    return f"{run_folder.parent} was removed, or moved away, while run {run_id} wrote it"


def holder(store: Store, run_folder: Location) -> Holder | None:
    """Return the holder of the lease, unless it is known to be dead; None where there is none. Raises StoreError."""
    found = latest(store, full_url(run_folder / "lease"))
    return None if found is None or found.holder is None or found.holder.is_dead else found.holder


def refuse_if_held(store: Store, run_folder: Location) -> None:
    """Raise OutputError where a job that may live holds the lease. Takes nothing."""
    found = holder(store, run_folder)
    if found is not None and (found.is_here or found.is_beating):
        raise OutputError(_refusal(run_folder, found))


def _take(store: Store, run_folder: Location, purpose: str, timing: Timing) -> Lease:
    folder = full_url(run_folder / "lease")
    for attempt in range(_NUM_TRIES):
        number = 1
        if (found := latest(store, folder)) is not None:
            _check_free(store, run_folder, found, timing)
            number = file_number(found.url) + 1
        lease = Lease(store, run_folder, join(folder, f"{number:06d}.json"), new_holder(purpose))
        is_ours = _create(lease, is_patient=attempt > 0)
        if is_ours or (is_ours is None and _put(lease, timing)):
            remove_below(store, folder, number)
            return lease
        time.sleep(timing.look_s)  # until the file of the job that was faster is seen
    raise JobError(f"{run_folder}/lease: the store refused {_NUM_TRIES} times to write a file that is not there")


def _create(lease: Lease, *, is_patient: bool) -> bool | None:
    """Write the lease where no file is; return whether it is there, None for a store that cannot exclude others.

    Some servers ignore the condition: they would write a second time. Some refuse every such write: nothing is there,
    not even for a patient job. Some do not know it. Raises StoreError.
    """
    try:
        if lease.store.create(lease.url, encoded(lease.holder)):
            again = encoded(replace(lease.holder, last_beat=lease.holder.last_beat + 1e-3))
            return None if lease.store.scheme != "file" and lease.store.create(lease.url, again) else True
        return None if is_patient and lease.store.info(lease.url) is None else False
    except StoreError as error:
        if error.fault.is_transient:
            raise
        return None  # a plain write tells if it is something else


def _put(lease: Lease, timing: Timing) -> bool:
    """Write a lease where the store cannot exclude others, and return True if it is there after a while.

    Of several jobs that do so the last one stays. The others see it now; one that was in the way of a slow write sees
    it at its next heartbeat, and its writers before they publish. Raises OutputError as `_check_free` does.
    """
    lease.store.write_atomic(lease.url, encoded(lease.holder))
    log.warning(
        "lease=not_exclusive store=%s wait_s=%g reason=%s",
        redact(lease.url),
        timing.settle_s,
        "the store does not honour conditional writes (If-None-Match: *), so the lease is looked at again",
    )
    time.sleep(timing.settle_s)
    found = latest(lease.store, _folder_of(lease.url))
    if found is not None and found.holder is not None and found.holder.run_id != lease.run_id:
        raise OutputError(_refusal(lease.run_folder, found.holder))
    return found is not None and found.holder is not None


def _check_free(store: Store, run_folder: Location, found: Found, timing: Timing) -> None:
    """Return when the job behind a lease is gone; raise OutputError when it lives, or may."""
    held = found.holder
    if held is not None and held.is_dead:
        log.info("lease=taken_over run=%s reason=%s", held.run_id, f"process {held.pid} of this machine is gone")
        return
    if held is not None and (held.is_here or held.is_beating):
        raise OutputError(_refusal(run_folder, held))
    is_dated = held is not None and not held.ahead_s
    watch_s = timing.watch_s if is_dated else timing.watch_undated_s
    log.info("lease=watched file=%s for_s=%g", redact(found.url), watch_s)
    give_up = time.monotonic() + watch_s
    while time.monotonic() < give_up:
        time.sleep(timing.look_s)
        again = latest(store, _folder_of(found.url))
        if again is None:
            return
        if again != found:
            raise OutputError(_refusal(run_folder, again.holder))
    log.info("lease=taken_over run=%s reason=%s", held.run_id if held else "unknown", "its heartbeats stopped")


def _folder_of(url: str) -> str:
    return url.rpartition("/")[0]


def _keep(lease: Lease, ended: threading.Event, is_main: bool, timing: Timing) -> None:
    """Send heartbeats until the end; where the lease is lost and the main thread holds it, interrupt that thread."""
    while not lease.is_lost and not ended.wait(timing.beat_s):
        try:
            lease.beat()
        except StoreError as error:  # the next one may arrive, and finds out if another job took over
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
    with suppress(StoreError):  # a file that stays expires
        if not lease.is_lost and is_held(lease.store, lease.run_folder, lease.run_id):
            remove_below(lease.store, _folder_of(lease.url), file_number(lease.url) + 1)


def _refusal(run_folder: Location, held: Holder | None) -> str:
    if held is None:
        return (
            f"{run_folder.parent} is in use: another job writes {run_folder}/lease, in a form that this release does"
            " not know; expected no other job on it. Wait for it, or end it"
        )
    wait = "Wait for it, or end it"
    if held.is_here:
        remedy = f"{wait} (kill {held.pid})"
    elif held.ahead_s:
        remedy = (
            f"{wait} there. Its heartbeats are dated {held.ahead_s:,.0f} s ahead of this machine's clock: set both"
            f" clocks; until then its lease can be taken over once none arrived for {EXPIRY_S:g} s"
        )
    else:
        remedy = (
            f"{wait} there; if it is gone, its lease can be taken over from {_clock(held.expires)} on,"
            f" {EXPIRY_S:g} s after its last heartbeat"
        )
    return f"{run_folder.parent} is in use: {_who(held)}; expected no other job on it. {remedy}"


def _who(held: Holder) -> str:
    return f"{held.purpose} run {held.run_id} by process {held.pid} on {held.host}, since {_clock(held.since)}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
