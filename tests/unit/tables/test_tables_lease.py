"""The lease of a table: one job at a time, and nothing stuck after a crash."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from captioner.errors import JobError, OutputError
from captioner.storage import Location, Store
from captioner.tables import CaptionTable, Stamp, holder, lease, lease_file
from tests.conftest import Bucket
from tests.unit.tables.test_tables import IDENTITY, captioned

KINDS = ["local", "local without links", "s3", "memory"]


@pytest.fixture(params=KINDS)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CaptionTable]:
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("s3")
        yield CaptionTable(Location(f"{bucket.url}/out", bucket.storage_options))
    elif request.param == "memory":
        yield CaptionTable(f"memory://{tmp_path}/out")
    else:
        if request.param == "local without links":
            request.getfixturevalue("monkeypatch").setattr(Path, "hardlink_to", _refuse_to_link)
        yield CaptionTable(str(tmp_path / "out"))


def _refuse_to_link(path: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted", str(path))  # as FUSE and SMB answer


@pytest.fixture
def local(tmp_path: Path) -> CaptionTable:
    return CaptionTable(str(tmp_path / "out"))


QUICK = lease.Timing(beat_s=0.05, watch_s=0.4, watch_undated_s=0.6, look_s=0.05, settle_s=0.5)


def leave_behind(table: CaptionTable, **changes: object) -> lease.Holder:
    """Put a lease there as a job that was killed leaves it."""
    left = replace(lease.new_holder("caption"), **changes)  # type: ignore[arg-type]
    assert table.store.create(f"{table.run_folder}/lease/000001.json", json.dumps(asdict(left)).encode())
    return left


def test_a_second_job_is_refused_and_reads_who_holds_the_table_since_when_and_what_to_do(table: CaptionTable) -> None:
    expected = (
        rf"out is in use: caption run \S+ by process {os.getpid()} on \S+, since 20\S+ \S+ UTC; .*kill {os.getpid()}"
    )
    with table.take_lease("caption"):
        with pytest.raises(OutputError, match=expected), table.take_lease("repair"):
            pass
        assert holder(table.store, table.run_folder) is not None
    assert holder(table.store, table.run_folder) is None
    with table.take_lease("repair"):
        pass


def test_of_many_jobs_that_want_the_lease_at_once_one_gets_it(table: CaptionTable) -> None:
    assert len(take_at_once(table, 8)) == 1


def take_at_once(table: CaptionTable, num_jobs: int) -> list[str]:
    """Return the runs of those jobs that got the lease."""
    start, held = threading.Barrier(num_jobs), list[str]()

    def want() -> None:
        start.wait()
        with ExitStack() as stack:
            with suppress(OutputError):
                held.append(stack.enter_context(table.take_lease("caption", QUICK)).run_id)
            start.wait()

    threads = [threading.Thread(target=want) for _ in range(num_jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return held


def test_the_lease_of_a_process_of_this_machine_that_is_gone_is_taken_over_at_once(table: CaptionTable) -> None:
    left = leave_behind(table, pid=os.getpid(), process_start="another process had this id")
    with table.take_lease("caption") as taken:
        assert taken.run_id != left.run_id
        assert [name for name in table.store.names(f"{table.run_folder}/lease") if name[0] != "."] == ["000002.json"]
    assert table.store.names(f"{table.run_folder}/lease") == []


def test_a_killed_driver_of_this_machine_leaves_nothing_stuck(local: CaptionTable) -> None:
    code = (
        "import sys, time; from captioner.tables import CaptionTable\n"
        "with CaptionTable(sys.argv[1]).take_lease('caption'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(local.location)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"process {process.pid} "), local.take_lease("caption"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with local.take_lease("caption"):
        pass


def test_the_lease_of_another_machine_is_taken_over_only_after_its_heartbeats_stopped(table: CaptionTable) -> None:
    left = leave_behind(table, machine="elsewhere", host="node-7", last_beat=time.time() - lease.EXPIRY_S + 60)
    until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(left.expires))
    with pytest.raises(OutputError, match=f"on node-7, .* can be taken over from {until} on, 90 s after its last"):
        table.take_lease("caption", QUICK).__enter__()
    table.store.remove(f"{table.run_folder}/lease/000001.json")
    leave_behind(table, machine="elsewhere", last_beat=time.time() - lease.EXPIRY_S - 1)
    with table.take_lease("caption", QUICK):
        pass


def test_a_machine_whose_clock_is_behind_is_not_taken_for_dead(local: CaptionTable) -> None:
    left = leave_behind(local, machine="elsewhere", last_beat=time.time() - 1000)
    beating = threading.Timer(
        0.1,
        lambda: local.store.write_atomic(
            f"{local.run_folder}/lease/000001.json",
            json.dumps(asdict(replace(left, last_beat=left.last_beat + 15))).encode(),
        ),
    )
    beating.start()
    with pytest.raises(OutputError, match="is in use"), local.take_lease("caption", QUICK):
        pass
    beating.join()


def test_a_lease_file_that_cannot_be_read_is_taken_over_after_it_was_watched(local: CaptionTable) -> None:
    assert local.store.create(f"{local.run_folder}/lease/000001.json", b"{")
    with local.take_lease("caption", QUICK):
        pass


def test_heartbeats_are_written_while_the_lease_is_held(table: CaptionTable) -> None:
    with table.take_lease("caption", QUICK) as held:
        give_up = time.monotonic() + 200
        while (found := holder(table.store, table.run_folder)) and found.last_beat == held.holder.last_beat:
            assert time.monotonic() < give_up
            time.sleep(0.02)


def lose(table: CaptionTable, held: lease.Lease) -> None:
    """Let another job take over, and work on until this one learns of it."""
    other = asdict(replace(held.holder, run_id="other"))
    assert table.store.create(f"{table.run_folder}/lease/000002.json", json.dumps(other).encode())
    time.sleep(20)


def test_a_job_that_lost_its_lease_stops_and_leaves_the_new_holder_alone(local: CaptionTable) -> None:
    with pytest.raises(JobError, match="another job took over"), local.take_lease("caption", QUICK) as held:
        lose(local, held)
    found = holder(local.store, local.run_folder)
    assert found is not None
    assert found.run_id == "other"


def _ignore(store: Store, place: str, data: bytes) -> bool:
    store.fs.pipe_file(store.path(place), data)
    return True


def _always_refuse(store: Store, place: str, data: bytes) -> bool:
    return False  # HTTP 412 for any conditional write


def _not_implemented(store: Store, place: str, data: bytes) -> bool:
    answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
    raise ClientError(answer, "PutObject")


@pytest.mark.parametrize("answer", [_ignore, _always_refuse, _not_implemented])
def test_on_a_store_without_conditional_writes_one_of_many_jobs_gets_the_lease_and_it_is_said(
    answer: Callable[[Store, str, bytes], bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Store, "_create_once", answer)
    table = CaptionTable(f"memory://{tmp_path}/out")
    held = take_at_once(table, 8)
    assert len(held) == 1
    assert "lease=not_exclusive" in caplog.text
    assert "If-None-Match" in caplog.text
    assert table.store.names(table.run_folder / "lease") == []
    with table.take_lease("caption", QUICK), pytest.raises(OutputError, match="is in use"):
        table.take_lease("repair", QUICK).__enter__()


def test_a_slow_write_over_a_lease_that_is_held_stops_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "_create_once", _ignore)
    table = CaptionTable(f"memory://{tmp_path}/out")
    table.claim(IDENTITY)
    with pytest.raises(JobError, match="another job took over"), table.take_lease("caption", QUICK) as held:
        overwrite_and_write(table, held)


def overwrite_and_write(table: CaptionTable, held: lease.Lease) -> None:
    table.store.write_atomic(held.url, json.dumps(asdict(replace(held.holder, run_id="slow"))).encode())
    with pytest.raises(JobError, match=r"another job took over .* caption run slow by process"):
        table.write(captioned([1]), Stamp(held.run_id, table.digest, is_leased=True))
    time.sleep(20)


@pytest.mark.parametrize("field", ["last_beat", "pid", "host"])
@pytest.mark.parametrize("value", [None, "soon", [], True, -1, 1e300, float("nan")])
def test_a_lease_with_a_value_of_a_wrong_type_is_watched_and_taken_over(
    local: CaptionTable, field: str, value: object
) -> None:
    left = asdict(replace(lease.new_holder("caption"), machine="elsewhere", last_beat=time.time() - 1000))
    place = f"{local.run_folder}/lease/000001.json"
    assert local.store.create(place, json.dumps({**left, field: value}).encode())
    holder(local.store, local.run_folder)
    with local.take_lease("caption", replace(QUICK, watch_s=0.06, watch_undated_s=0.06)):
        pass


def test_a_lease_in_a_form_of_a_later_release_is_respected_while_it_beats(local: CaptionTable) -> None:
    place = f"{local.run_folder}/lease/000001.json"
    left = {**asdict(lease.new_holder("caption")), "machine": "elsewhere", "a_later_field": 1}
    assert local.store.create(place, json.dumps(left).encode())
    with pytest.raises(OutputError, match="is in use: caption run"), local.take_lease("caption", QUICK):
        pass
    local.store.write_atomic(place, b"another form")
    beating = threading.Timer(0.1, lambda: local.store.write_atomic(place, b"another form, again"))
    beating.start()
    with pytest.raises(OutputError, match="in a form that this release does not know"):
        local.take_lease("caption", QUICK).__enter__()
    beating.join()


def test_a_lease_dated_an_hour_ahead_is_judged_by_its_heartbeats_and_the_clocks_are_named(local: CaptionTable) -> None:
    left = leave_behind(local, machine="elsewhere", last_beat=time.time() + 3600)
    place = f"{local.run_folder}/lease/000001.json"
    beat = json.dumps(asdict(replace(left, last_beat=left.last_beat + 15))).encode()
    beating = threading.Timer(0.1, lambda: local.store.write_atomic(place, beat))
    beating.start()
    with pytest.raises(OutputError, match=r"dated 3,6\d\d s ahead of this machine's clock: set both"):
        local.take_lease("caption", QUICK).__enter__()
    beating.join()
    with local.take_lease("caption", QUICK):  # no heartbeat comes any more
        pass


@pytest.mark.parametrize("is_made_again", [False, True], ids=["gone", "made again by a heartbeat"])
def test_a_table_that_is_removed_while_a_job_writes_it_is_said_to_be_removed(
    local: CaptionTable, is_made_again: bool
) -> None:
    local.claim(IDENTITY)
    with pytest.raises(JobError, match="out was removed, or moved away"), local.take_lease("caption", QUICK) as held:
        remove_and_write(local, held, is_made_again=is_made_again)


def remove_and_write(table: CaptionTable, held: lease.Lease, *, is_made_again: bool) -> None:
    give_up = time.monotonic() + 200
    while not held.is_begun:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    digest, output = table.digest, Path(table.location.local_path)
    output.rename(output.with_name("moved"))
    if is_made_again:
        table.store.write_atomic(held.url, lease_file.encoded(held.holder))
    else:
        with pytest.raises(JobError, match="out was removed, or moved away, while run"):
            table.write(captioned([1]), Stamp(held.run_id, digest, is_leased=True))
    time.sleep(20)


def test_a_job_that_ignores_ctrl_c_stops_too_when_it_lost_its_lease(local: CaptionTable) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with local.take_lease("caption", QUICK):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(JobError, match="another job took over"), local.take_lease("caption", QUICK) as held:
            lose(local, held)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_job_releases_its_lease(local: CaptionTable) -> None:
    with pytest.raises(KeyboardInterrupt), local.take_lease("caption"):
        raise KeyboardInterrupt
    assert holder(local.store, local.run_folder) is None


def test_a_writer_whose_run_lost_the_lease_publishes_nothing(table: CaptionTable) -> None:
    table.claim(IDENTITY)
    with table.take_lease("caption") as first:
        stamp = Stamp(first.run_id, table.digest, is_leased=True)
        table.write(captioned([1]), stamp)
    with pytest.raises(JobError, match="came too late was not written"):
        table.write(captioned([2]), stamp)
    with table.take_lease("caption"), pytest.raises(JobError, match="came too late was not written"):
        table.write(captioned([2], {3: "corrupt"}), stamp)
    assert (len(table.parts("captions")), len(table.parts("failures"))) == (1, 0)


def test_a_writer_checks_the_lease_after_its_file_is_whole(
    local: CaptionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.claim(IDENTITY)
    seen: list[list[str]] = []
    why_not_held = lease.why_not_held

    def asked(store: Store, run_folder: Location, run_id: str) -> str:
        seen.append(store.names(local.location / "captions"))
        return why_not_held(store, run_folder, run_id)

    monkeypatch.setattr(lease, "why_not_held", asked)
    with local.take_lease("caption") as held:
        local.write(captioned([1]), Stamp(held.run_id, local.digest, is_leased=True))
    assert [name[0] for name in seen[0]] == ["."]
