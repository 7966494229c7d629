"""What `jobs/verify.py` does, on tables as a job leaves them."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import VerifyConfig
from captioner.errors import ConfigError, OutputError
from captioner.inputs import load_frozen
from captioner.storage import Place
from captioner.storage.local_store import LocalStore
from captioner.tables import CaptionTable
from captioner.tables.verification import verify
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images
from tests.conftest import Bucket

NUM_IMAGES = 6


@pytest.fixture
def table(tmp_path: Path) -> CaptionTable:
    """A whole table of six images in three parts, the last image failed."""
    images = write_images(tmp_path / "images", NUM_IMAGES)
    table, _ = begin_table(str(tmp_path / "out"), str(images))
    table.record("run-1", {})
    table.record("run-2", {})
    ids = [f"{images}/{number:03d}.jpg" for number in range(NUM_IMAGES)]
    add_part(table, [caption_row(n, ids[n], f"caption {n}") for n in (0, 1, 2)])
    add_part(table, [caption_row(n, ids[n], f"caption {n}") for n in (3, 4)] + [failure_row(5, ids[5], "corrupt")])
    return table


def files(table: CaptionTable) -> dict[str, bytes]:
    found = (path for path in Path(table.location.local_path).rglob("*") if path.is_file())
    return {str(path.relative_to(table.location.local_path)): path.read_bytes() for path in found}


def add_duplicate(table: CaptionTable) -> None:
    """A later run captioned a row that is there."""
    [first, *_] = (pq.read_table(part) for part in table.parts("captions"))
    row = first.slice(0, 1).to_pylist()[0]
    add_part(table, [caption_row(row["key"], row["image_id"], row["caption"])], run_id="run-2")


def test_the_audit_of_a_whole_table_holds_and_changes_nothing(table: CaptionTable) -> None:
    before = files(table)
    audit = verify(VerifyConfig(table=str(table.location)))
    assert (audit["ok"], audit["read"], audit["captioned"], audit["failed"]) == (True, 6, 5, 1)
    assert files(table) == before


def test_a_table_that_lacks_rows_alone_is_finished_by_its_job(
    table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(table.parts("failures")[0]).unlink()
    assert verify(VerifyConfig(table=str(table.location)))["missing"] == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "  next: the command of the caption job again, which captions what is missing"


def test_a_row_under_another_images_name_is_found(table: CaptionTable) -> None:
    add_part(table, [caption_row(5, "another.jpg", "x")], run_id="run-2")
    audit = verify(VerifyConfig(table=str(table.location)))
    assert (audit["ok"], audit["misnamed"]) == (False, 1)


@pytest.mark.parametrize("name", ["captions/deep/part.parquet", "failures/notes.txt", "captions/_x.parquet"])
def test_unknown_files_and_folders_beside_the_parts_are_found(table: CaptionTable, name: str) -> None:
    path = Path(table.location.local_path, name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    audit = verify(VerifyConfig(table=str(table.location)))
    assert not audit["ok"]
    assert len(audit["strangers"]) == 1


def test_a_part_of_a_run_without_a_record_is_found(table: CaptionTable) -> None:
    Path(table.run_folder.local_path, "runs", "run-1.json").unlink()
    assert len(verify(VerifyConfig(table=str(table.location)))["foreign_parts"]) == 3


def test_a_part_whose_name_does_not_match_its_rows_is_found(table: CaptionTable) -> None:
    part = Path(table.parts("captions")[0])
    part.rename(part.with_name(part.name.replace("-3-", "-4-").replace("-2-", "-1-")))
    assert len(verify(VerifyConfig(table=str(table.location)))["torn_parts"]) == 1


def test_a_part_whose_footer_names_another_run_than_its_name_is_found(
    table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Path(table.parts("captions")[0])
    part.rename(part.with_name(part.name.replace("run-1", "run-2")))
    assert len(verify(VerifyConfig(table=str(table.location)))["torn_parts"]) == 1
    assert "its name says run run-2, and its footer run run-1" in capsys.readouterr().err


def test_a_dry_repair_says_what_and_why_and_changes_nothing(
    table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    add_duplicate(table)
    before = files(table)
    found = verify(VerifyConfig(table=str(table.location), repair=True, dry_run=True))
    assert (found["ok"], found["repairs"], found["duplicated"]) == (False, 1, 1)
    assert "1 of its " in capsys.readouterr().err
    assert files(table) == before


def test_a_repair_makes_the_table_whole_and_puts_aside_what_it_takes(table: CaptionTable) -> None:
    add_duplicate(table)
    temporary = Path(table.location.local_path, "captions", ".part-x.parquet.0.tmp")
    temporary.write_bytes(b"half")
    torn = Path(table.location.local_path, "captions", "part-torn.parquet")
    torn.write_bytes(b"PAR1")
    assert not verify(VerifyConfig(table=str(table.location)))["ok"]
    audit = verify(VerifyConfig(table=str(table.location), repair=True))
    assert (audit["ok"], audit["repairs"], audit["dropped"]) == (True, 3, 1)
    removed = {path.name: path for path in Path(table.run_folder.local_path, "removed").rglob("*") if path.is_file()}
    assert {temporary.name, torn.name} < set(removed)
    assert len(removed) == 3
    assert verify(VerifyConfig(table=str(table.location), repair=True))["ok"]


def test_a_repair_leaves_the_heartbeats_of_its_own_lease_alone(table: CaptionTable) -> None:
    beat = Path(table.run_folder.local_path, "lease", ".000001.json.0.tmp")
    beat.parent.mkdir()
    beat.write_bytes(b"half")  # its holder writes it at this moment
    audit = verify(VerifyConfig(table=str(table.location), repair=True))
    assert (audit["ok"], "repairs" in audit) == (True, False)


def test_a_temporary_that_its_writer_finishes_during_a_repair_is_no_error(
    table: CaptionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = Path(table.run_folder.local_path, "runs", ".run-2.json.0.tmp")
    temporary.write_bytes(b"{}")
    move = LocalStore.move

    def finished(store: LocalStore, place: Place, target: Place) -> None:
        temporary.replace(temporary.with_name("run-2.json"))
        move(store, place, target)

    monkeypatch.setattr(LocalStore, "move", finished)
    assert verify(VerifyConfig(table=str(table.location), repair=True))["ok"]


@pytest.mark.parametrize("folder", ["counts", "runs", "listing", "lease", "stopping"])
@pytest.mark.parametrize("name", [".0-150.0123abcd.tmp", "notes.txt", "0-x", "-1-5", "²-3"])
def test_temporaries_and_foreign_files_below_run_keep_no_command_from_the_table(
    table: CaptionTable, folder: str, name: str
) -> None:
    path = Path(table.run_folder.local_path, folder, name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    with table.take_lease("caption"):
        frozen = load_frozen(table.run_folder)
    assert frozen is not None
    assert frozen.num_images == NUM_IMAGES
    assert verify(VerifyConfig(table=str(table.location)))["ok"]
    assert verify(VerifyConfig(table=str(table.location), repair=True, compact=True))["ok"]
    assert not path.name.startswith(".") or folder == "lease" or not path.exists()


def test_a_failure_of_no_row_of_the_input_is_put_aside_by_a_repair_that_says_so(
    table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    add_part(table, [failure_row(NUM_IMAGES, "a tar's end", "fetch_failed")], run_id="run-2")
    audit = verify(VerifyConfig(table=str(table.location)))
    assert (audit["ok"], audit["alien"], audit["alien_failures"]) == (False, 1, 1)
    assert f"next: captioner verify {table.location} --repair" in capsys.readouterr().err
    audit = verify(VerifyConfig(table=str(table.location), repair=True))
    assert "1 of its 1 rows are failures of no row of the input" in capsys.readouterr().err
    assert (audit["ok"], audit["repairs"], audit["dropped"], audit["failed"]) == (True, 1, 1, 1)
    assert len(list(Path(table.run_folder.local_path, "removed").rglob("*.parquet"))) == 1


def test_a_caption_of_no_row_of_the_input_is_reported_and_left_where_it_is(table: CaptionTable) -> None:
    add_part(table, [caption_row(NUM_IMAGES, "orphan.jpg", "x")], run_id="run-2")
    before = files(table)
    audit = verify(VerifyConfig(table=str(table.location), repair=True))
    assert (audit["ok"], audit["alien"], audit["alien_failures"]) == (False, 1, 0)
    assert {name: data for name, data in files(table).items() if name in before} == before


def test_a_compaction_keeps_the_audit_and_makes_one_sorted_part(table: CaptionTable) -> None:
    before = pq.read_table(f"{table.location}/captions").sort_by("key")
    audit = verify(VerifyConfig(table=str(table.location), compact=True))
    [compaction] = [run for run in map(table.recorded, table.run_ids()) if run.get("purpose") == "compact"]
    assert compaction["summary"] == {"parts": {"captions": 1, "failures": 1}}, "it is recorded as finished"
    assert audit["ok"]
    assert audit["parts"] == {"captions": 1, "failures": 1}
    assert pq.read_table(table.parts("captions")[0]).replace_schema_metadata() == before.replace_schema_metadata()


def test_a_table_on_s3_is_repaired_and_compacted_as_a_local_one(tmp_path: Path, s3: Bucket) -> None:
    images = write_images(tmp_path / "images", NUM_IMAGES)
    table, _ = begin_table(f"{s3.url}/out", str(images), options=s3.storage_options, input_options={})
    for run_id in ("run-1", "run-2"):
        table.record(run_id, {})
    rows = [caption_row(n, f"{images}/{n:03d}.jpg", f"caption {n}") for n in range(NUM_IMAGES)]
    for row in rows:
        add_part(table, [row])
    add_part(table, rows[:2], run_id="run-2")
    config = VerifyConfig(table=str(table.location), storage_options=s3.storage_options)
    assert verify(config)["duplicated"] == 2
    assert verify(replace(config, repair=True))["dropped"] == 2
    assert s3.fs.find(f"{s3.url}/out/_run/removed")
    assert verify(replace(config, compact=True))["parts"] == {"captions": 1, "failures": 0}
    audit = verify(replace(config, repair=True))
    assert audit["ok"]
    assert "repairs" not in audit


def test_a_table_with_duplicate_rows_is_not_compacted_before_it_is_repaired(table: CaptionTable) -> None:
    add_duplicate(table)
    with pytest.raises(OutputError, match="have to be repaired before it can be compacted"):
        verify(VerifyConfig(table=str(table.location), compact=True))
    assert verify(VerifyConfig(table=str(table.location), repair=True, compact=True))["ok"]


def test_a_foreign_part_is_left_to_its_owner_and_no_row_is_dropped_for_it(table: CaptionTable) -> None:
    part = Path(table.parts("captions")[0])
    foreign = part.with_name("part-zzz-1-0123456789abcdef.parquet")
    pq.write_table(pq.read_table(part).replace_schema_metadata({"captioner.identity": "another"}), foreign)
    audit = verify(VerifyConfig(table=str(table.location), repair=True))
    assert (audit["missing"], audit["foreign_parts"]) == (0, [str(foreign)])
    assert foreign.exists()


@pytest.mark.parametrize("change", [{"repair": True}, {"compact": True}, {"repair": True, "dry_run": True}])
def test_a_table_in_use_is_audited_and_not_changed(
    table: CaptionTable, change: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    with table.take_lease("caption"):
        with pytest.raises(OutputError, match="is in use: caption run"):
            verify(VerifyConfig(table=str(table.location), **change))
        assert verify(VerifyConfig(table=str(table.location)))["ok"]
    assert "may still write this table" in capsys.readouterr().err


def test_a_dry_run_without_a_repair_is_refused() -> None:
    with pytest.raises(ConfigError, match="--dry-run is True; expected --repair beside it"):
        VerifyConfig(dry_run=True)


def test_the_pages_of_a_part_carry_checksums_for_other_readers(table: CaptionTable) -> None:
    data = bytearray(Path(table.parts("captions")[0]).read_bytes())
    chunk = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start + chunk.total_compressed_size - 1] ^= 1
    with pytest.raises(OSError, match="CRC checksum"):
        pq.ParquetFile(pa.BufferReader(bytes(data)), page_checksum_verification=True).read()
