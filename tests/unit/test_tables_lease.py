"""The lease of a table: one job at a time, and nothing stuck after a crash."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from captioner.errors import JobError, OutputError
from captioner.sources.store import Store
from captioner.tables import CaptionTable, Stamp, holder, lease
from tests.conftest import Bucket
from tests.unit.test_tables import IDENTITY, captioned

KINDS = ["local", "local without links", "s3", "memory"]


@pytest.fixture(params=KINDS)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CaptionTable]:
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("s3")
        yield CaptionTable(f"{bucket.url}/out", bucket.storage_options)
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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats in hundredths of a second."""
    for name, seconds in {"BEAT_S": 0.05, "WATCH_S": 0.4, "_LOOK_S": 0.05}.items():
        monkeypatch.setattr(lease, name, seconds)


def leave_behind(table: CaptionTable, **changes: object) -> lease.Holder:
    """Put a lease there as a job that was killed leaves it."""
    left = replace(lease._holder("caption"), **changes)  # type: ignore[arg-type]
    assert table.store.create(f"{table.run_folder}/lease/000001.json", json.dumps(asdict(left)).encode())
    return left


def test_a_second_job_is_refused_and_told_who_holds_the_table_since_when_and_what_to_do(table: CaptionTable) -> None:
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


def test_of_many_that_want_it_at_once_one_gets_it(table: CaptionTable) -> None:
    start, outcomes = threading.Barrier(8), []

    def want() -> None:
        start.wait()
        with ExitStack() as stack:
            try:
                outcomes.append(stack.enter_context(table.take_lease("caption")).run_id)
            except OutputError:
                outcomes.append(None)
            start.wait()

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome is not None for outcome in outcomes) == 1


def test_a_process_of_this_machine_that_is_gone_is_succeeded_at_once(table: CaptionTable) -> None:
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
    with subprocess.Popen([sys.executable, "-c", code, local.url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"process {process.pid} "), local.take_lease("caption"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with local.take_lease("caption"):
        pass


def test_another_machine_is_succeeded_only_after_its_heartbeats_stopped(table: CaptionTable, quick: None) -> None:
    left = leave_behind(table, machine="elsewhere", host="node-7", last_beat=time.time() - lease.EXPIRY_S + 60)
    until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(left.expires))
    with pytest.raises(OutputError, match=f"on node-7, .* can be taken over from {until} on, 90 s after its last"):
        table.take_lease("caption").__enter__()
    table.store.remove(f"{table.run_folder}/lease/000001.json")
    leave_behind(table, machine="elsewhere", last_beat=time.time() - lease.EXPIRY_S - 1)
    with table.take_lease("caption"):
        pass


def test_a_machine_whose_clock_is_behind_is_not_taken_for_dead(local: CaptionTable, quick: None) -> None:
    left = leave_behind(local, machine="elsewhere", last_beat=time.time() - 1000)
    beating = threading.Timer(
        0.1,
        lambda: local.store.write_atomic(
            f"{local.run_folder}/lease/000001.json",
            json.dumps(asdict(replace(left, last_beat=left.last_beat + 15))).encode(),
        ),
    )
    beating.start()
    with pytest.raises(OutputError, match="is in use"), local.take_lease("caption"):
        pass
    beating.join()


def test_a_lease_file_that_says_nothing_is_succeeded_after_it_was_watched(local: CaptionTable, quick: None) -> None:
    assert local.store.create(f"{local.run_folder}/lease/000001.json", b"{")
    with local.take_lease("caption"):
        pass


def test_heartbeats_are_written_while_the_lease_is_held(table: CaptionTable, quick: None) -> None:
    with table.take_lease("caption") as held:
        give_up = time.monotonic() + 20
        while (found := holder(table.store, table.run_folder)) and found.last_beat == held.holder.last_beat:
            assert time.monotonic() < give_up
            time.sleep(0.02)


def lose(table: CaptionTable, held: lease.Lease) -> None:
    """Let another job take over, and work on until this one learns of it."""
    other = asdict(replace(held.holder, run_id="other"))
    assert table.store.create(f"{table.run_folder}/lease/000002.json", json.dumps(other).encode())
    time.sleep(20)


def test_a_job_that_lost_its_lease_stops_and_leaves_the_new_holder_alone(local: CaptionTable, quick: None) -> None:
    with pytest.raises(JobError, match="another job took over"), local.take_lease("caption") as held:
        lose(local, held)
    found = holder(local.store, local.run_folder)
    assert found is not None
    assert found.run_id == "other"


def test_a_job_that_ignores_ctrl_c_stops_too_when_it_lost_its_lease(local: CaptionTable, quick: None) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with local.take_lease("caption"):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(JobError, match="another job took over"), local.take_lease("caption") as held:
            lose(local, held)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_job_gives_its_lease_back(local: CaptionTable) -> None:
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


def test_a_writer_asks_for_the_lease_after_its_file_is_whole(
    local: CaptionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.claim(IDENTITY)
    seen: list[list[str]] = []
    is_held = lease.is_held

    def asked(store: Store, run_folder: str, run_id: str) -> bool:
        seen.append(store.names(f"{local.url}/captions"))
        return is_held(store, run_folder, run_id)

    monkeypatch.setattr(lease, "is_held", asked)
    with local.take_lease("caption") as held:
        local.write(captioned([1]), Stamp(held.run_id, local.digest, is_leased=True))
    assert [name[0] for name in seen[0]] == ["."]
