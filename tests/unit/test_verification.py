"""What `jobs/verify.py` says and does, on tables as a job leaves them."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import VerifyConfig
from captioner.errors import ConfigError, OutputError
from captioner.tables import CaptionTable
from captioner.verification import verify
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
    found = (path for path in Path(table.url).rglob("*") if path.is_file())
    return {str(path.relative_to(table.url)): path.read_bytes() for path in found}


def double(table: CaptionTable) -> None:
    """A later run captioned a row that is there."""
    [first, *_] = (pq.read_table(part) for part in table.parts("captions"))
    row = first.slice(0, 1).to_pylist()[0]
    add_part(table, [caption_row(row["key"], row["image_id"], row["caption"])], run_id="run-2")


def test_a_whole_table_is_proven_and_left_as_it_is(table: CaptionTable) -> None:
    before = files(table)
    proof = verify(VerifyConfig(table=table.url))
    assert (proof["ok"], proof["read"], proof["captioned"], proof["failed"]) == (True, 6, 5, 1)
    assert files(table) == before


def test_a_row_under_another_images_name_is_found(table: CaptionTable) -> None:
    add_part(table, [caption_row(5, "another.jpg", "x")], run_id="run-2")
    proof = verify(VerifyConfig(table=table.url))
    assert (proof["ok"], proof["misnamed"]) == (False, 1)


@pytest.mark.parametrize("name", ["captions/deep/part.parquet", "failures/notes.txt", "captions/_x.parquet"])
def test_strangers_and_folders_beside_the_parts_are_noticed(table: CaptionTable, name: str) -> None:
    path = Path(table.url, name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    proof = verify(VerifyConfig(table=table.url))
    assert not proof["ok"]
    assert len(proof["strangers"]) == 1


def test_a_part_of_a_run_that_nobody_recorded_is_noticed(table: CaptionTable) -> None:
    Path(table.run_folder, "runs", "run-1.json").unlink()
    assert len(verify(VerifyConfig(table=table.url))["foreign_parts"]) == 3


def test_a_part_under_a_name_that_lies_is_noticed(table: CaptionTable) -> None:
    part = Path(table.parts("captions")[0])
    part.rename(part.with_name(part.name.replace("-3-", "-4-").replace("-2-", "-1-")))
    assert len(verify(VerifyConfig(table=table.url))["torn_parts"]) == 1


def test_a_part_whose_footer_names_another_run_than_its_name_is_noticed(
    table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Path(table.parts("captions")[0])
    part.rename(part.with_name(part.name.replace("run-1", "run-2")))
    assert len(verify(VerifyConfig(table=table.url))["torn_parts"]) == 1
    assert "its name says run run-2, and its footer run run-1" in capsys.readouterr().err


def test_a_dry_repair_says_what_and_why_and_changes_nothing(
    table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    double(table)
    before = files(table)
    found = verify(VerifyConfig(table=table.url, repair=True, dry_run=True))
    assert (found["ok"], found["repairs"], found["duplicated"]) == (False, 1, 1)
    assert "1 of its " in capsys.readouterr().err
    assert files(table) == before


def test_a_repair_makes_the_table_whole_and_puts_aside_what_it_takes(table: CaptionTable) -> None:
    double(table)
    temporary = Path(table.url, "captions", ".part-x.parquet.0.tmp")
    temporary.write_bytes(b"half")
    torn = Path(table.url, "captions", "part-torn.parquet")
    torn.write_bytes(b"PAR1")
    assert not verify(VerifyConfig(table=table.url))["ok"]
    proof = verify(VerifyConfig(table=table.url, repair=True))
    assert (proof["ok"], proof["repairs"], proof["dropped"]) == (True, 3, 1)
    removed = {path.name: path for path in Path(table.run_folder, "removed").rglob("*") if path.is_file()}
    assert {temporary.name, torn.name} < set(removed)
    assert len(removed) == 3
    assert verify(VerifyConfig(table=table.url, repair=True))["ok"]


def test_a_failure_of_no_row_of_the_input_is_put_aside_by_a_repair_that_says_so(
    table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    add_part(table, [failure_row(NUM_IMAGES, "a tar's end", "fetch_failed")], run_id="run-2")
    proof = verify(VerifyConfig(table=table.url))
    assert (proof["ok"], proof["alien"], proof["alien_failures"]) == (False, 1, 1)
    assert f"next: python jobs/verify.py {table.url} --repair" in capsys.readouterr().err
    proof = verify(VerifyConfig(table=table.url, repair=True))
    assert "1 of its 1 rows are failures of no row of the input" in capsys.readouterr().err
    assert (proof["ok"], proof["repairs"], proof["dropped"], proof["failed"]) == (True, 1, 1, 1)
    assert len(list(Path(table.run_folder, "removed").rglob("*.parquet"))) == 1


def test_a_caption_of_no_row_of_the_input_is_told_and_left_where_it_is(table: CaptionTable) -> None:
    add_part(table, [caption_row(NUM_IMAGES, "alien.jpg", "x")], run_id="run-2")
    before = files(table)
    proof = verify(VerifyConfig(table=table.url, repair=True))
    assert (proof["ok"], proof["alien"], proof["alien_failures"]) == (False, 1, 0)
    assert {name: data for name, data in files(table).items() if name in before} == before


def test_a_compaction_keeps_the_proof_and_makes_one_sorted_part(table: CaptionTable) -> None:
    before = pq.read_table(f"{table.url}/captions").sort_by("key")
    proof = verify(VerifyConfig(table=table.url, compact=True))
    assert proof["ok"]
    assert proof["parts"] == {"captions": 1, "failures": 1}
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
    config = VerifyConfig(table=table.url, storage_options=s3.storage_options)
    assert verify(config)["duplicated"] == 2
    assert verify(replace(config, repair=True))["dropped"] == 2
    assert s3.fs.find(f"{s3.url}/out/_run/removed")
    assert verify(replace(config, compact=True))["parts"] == {"captions": 1, "failures": 0}
    proof = verify(replace(config, repair=True))
    assert proof["ok"]
    assert "repairs" not in proof


def test_a_table_with_doubled_rows_is_not_compacted_before_it_is_repaired(table: CaptionTable) -> None:
    double(table)
    with pytest.raises(OutputError, match="have to be mended before it can be compacted"):
        verify(VerifyConfig(table=table.url, compact=True))
    assert verify(VerifyConfig(table=table.url, repair=True, compact=True))["ok"]


def test_a_foreign_part_is_left_to_its_owner_and_no_row_is_dropped_for_it(table: CaptionTable) -> None:
    part = Path(table.parts("captions")[0])
    foreign = part.with_name("part-zzz-1-0123456789abcdef.parquet")
    pq.write_table(pq.read_table(part).replace_schema_metadata({"captioner.identity": "another"}), foreign)
    proof = verify(VerifyConfig(table=table.url, repair=True))
    assert (proof["missing"], proof["foreign_parts"]) == (0, [str(foreign)])
    assert foreign.exists()


@pytest.mark.parametrize("change", [{"repair": True}, {"compact": True}, {"repair": True, "dry_run": True}])
def test_a_table_in_use_is_proven_and_not_changed(
    table: CaptionTable, change: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    with table.take_lease("caption"):
        with pytest.raises(OutputError, match="is in use: caption run"):
            verify(VerifyConfig(table=table.url, **change))
        assert verify(VerifyConfig(table=table.url))["ok"]
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
