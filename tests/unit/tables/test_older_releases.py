"""Tables that earlier releases wrote are read, verified, repaired, continued and compacted."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import VerifyConfig
from captioner.schema import TRANSIENT_REASONS
from captioner.tables import CaptionTable, find_done
from captioner.tables.parts import is_intact
from captioner.tables.verification import verify
from tests.caption_tables import add_part, caption_row

GOLDENS = Path(__file__).parents[2] / "goldens" / "tables"
CAPTIONS = [f"caption {number}" for number in range(4)]


@pytest.fixture(params=["without_scores", "without_digests", "failures_named_by_key"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> CaptionTable:
    """Five images in two runs: four have captions, the last failed twice, one failed once and then got its caption."""
    shutil.copytree(GOLDENS / request.param, tmp_path / "out")
    return CaptionTable(str(tmp_path / "out"))


def captions(table: CaptionTable) -> list[str]:
    parts = [pq.read_table(part, columns=["key", "caption"]) for part in table.parts("captions")]
    return list(pa.concat_tables(parts).sort_by("key").column("caption").to_pylist())


def test_its_rows_are_done(table: CaptionTable) -> None:
    done = find_done(table, TRANSIENT_REASONS.__contains__)
    assert (done.num_captioned, done.attempts, done.num_duplicates) == (4, {4: 2}, 0)


def test_it_is_whole_and_a_repair_takes_nothing_out(table: CaptionTable) -> None:
    audit = verify(VerifyConfig(table=str(table.location), repair=True))
    assert (audit["ok"], audit["captioned"], audit["failed"], "repairs" in audit) == (True, 4, 1, False)


def test_it_is_compacted_together_with_the_parts_of_this_release(table: CaptionTable) -> None:
    table.record("20270101T000000Z-cccc", {})
    candidate = {**caption_row(4, "", "caption 4"), "clip_score": 0.5}
    candidate = {name: candidate[name] for name in pa.schema(_candidate_fields()).names}
    row = caption_row(4, "s3://photos/4.jpg", "caption 4", candidates=[candidate])
    add_part(table, [row], run_id="20270101T000000Z-cccc")
    audit = verify(VerifyConfig(table=str(table.location), compact=True))
    assert (audit["ok"], audit["captioned"], audit["parts"]) == (True, 5, {"captions": 1, "failures": 1})
    assert captions(table) == [*CAPTIONS, "caption 4"]
    rows = pq.read_table(table.parts("captions")[0]).to_pylist()
    assert [bool(row["candidates"]) for row in rows] == [False, True, False, False, True]
    assert rows[4]["candidates"][0]["clip_score"] == 0.5
    assert verify(VerifyConfig(table=str(table.location), repair=True, compact=True))["ok"]


def _candidate_fields() -> list[pa.Field]:
    from captioner.schema import CAPTIONS as SCHEMA

    return list(SCHEMA.field("candidates").type.value_type)


def test_a_row_that_it_holds_twice_is_dropped_once(table: CaptionTable) -> None:
    part = Path(table.parts("captions")[0])
    add_part(table, [caption_row(0, "s3://photos/0.jpg", "caption 0")], run_id="20260102T000000Z-bbbb")
    assert verify(VerifyConfig(table=str(table.location)))["duplicated"] == 1
    audit = verify(VerifyConfig(table=str(table.location), repair=True))
    assert (audit["ok"], audit["dropped"], part.exists()) == (True, 1, False)


def test_a_part_of_it_that_is_cut_short_is_torn(table: CaptionTable) -> None:
    part = Path(table.parts("captions")[0])
    part.write_bytes(part.read_bytes()[:-9])
    assert verify(VerifyConfig(table=str(table.location)))["torn_parts"] == [str(part)]
    assert not is_intact(part.read_bytes())
