"""The caption table: parts, resumption, proof."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import DecodingConfig
from captioner.errors import JobError, OutputError
from captioner.inputs import Frozen, Unit
from captioner.schema import CAPTIONS, FAILURES, TRANSIENT_REASONS, captioned_schema, row_key
from captioner.tables import Audit, CaptionTable, Stamp, audit, find_done, findings, repair
from captioner.tables.keys import KeySet

IDENTITY = {"input": "in", "model": {"name": "demo", "fingerprint": "abc"}}


def captioned(keys: list[int], failed: dict[int, str] | None = None, attempt: int = 1) -> pa.Table:
    """Rows as they leave the model: a caption for each of `keys`, a reject for each of `failed`."""
    rows = [{**_row(key, attempt), "caption": f"caption {key}", "num_tokens": 3, "finish_reason": "stop",
             "mean_logprob": -0.5, "min_logprob": -1.0, "is_repetitive": False,
             "width": 4, "height": 5, "size_bytes": 6}
            for key in keys]  # fmt: skip
    rows += [{**_row(key, attempt), "reason": reason, "detail": "why"} for key, reason in (failed or {}).items()]
    return pa.Table.from_pylist(rows, captioned_schema())


def _row(key: int, attempt: int) -> dict[str, object]:
    return {"key": key, "image_id": f"image-{key}", "attempt": attempt}


@pytest.fixture
def table(tmp_path: Path) -> CaptionTable:
    return CaptionTable(str(tmp_path / "out"))


@pytest.fixture
def stamp(table: CaptionTable) -> Stamp:
    table.claim(IDENTITY)
    for run_id in ("run-1", "run-2"):
        table.record(run_id, {})
    return Stamp("run-1", table.digest)


def audited(table: CaptionTable, unit_rows: dict[int, int | None]) -> Audit:
    """The audit of a table over tars of so many rows."""
    return audit(table, frozen_units(unit_rows))[0]


def frozen_units(unit_rows: dict[int, int | None]) -> Frozen:
    """Tars of so many rows."""
    units = [
        Unit(ordinal=ordinal, kind="webdataset", path="x", name="x", num_rows=num_rows, size_bytes=None)
        for ordinal, num_rows in unit_rows.items()
    ]
    return Frozen(kind="webdataset", units=tuple(units))


def is_transient(reason: str) -> bool:
    return reason in TRANSIENT_REASONS


def test_a_part_holds_exactly_the_pinned_columns(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([1, 2], {3: "corrupt"}), stamp)
    [captions] = Path(table.location.local_path).glob("captions/*.parquet")
    [failures] = Path(table.location.local_path).glob("failures/*.parquet")
    assert pq.read_schema(captions).remove_metadata() == CAPTIONS
    assert pq.read_schema(failures).remove_metadata() == FAILURES
    assert pq.read_schema(captions).metadata[b"captioner.run_id"] == b"run-1"
    assert pq.read_schema(captions).metadata[b"captioner.identity"] == stamp.identity.encode()


def test_rows_in_are_rows_out(table: CaptionTable, stamp: Stamp) -> None:
    summary = table.write(captioned([5, 1], {3: "corrupt", 4: "corrupt", 9: "missing"}), stamp)
    assert (summary.captioned, summary.failed, summary.num_tokens) == (2, 3, 6)
    assert summary.failed_by_reason == {"corrupt": 2, "missing": 1}
    rows = pq.read_table(f"{table.location}/captions").to_pylist()
    assert [row["key"] for row in rows] == [1, 5]
    assert {row["reason"] for row in pq.read_table(f"{table.location}/failures").to_pylist()} == {"corrupt", "missing"}


def test_writing_the_same_rows_twice_is_writing_them_once(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([1, 2]), stamp)
    table.write(captioned([2, 1]), stamp)
    assert len(list(Path(table.location.local_path).glob("captions/*"))) == 1


def test_two_attempts_of_one_image_by_one_run_are_two_parts(table: CaptionTable, stamp: Stamp) -> None:
    for attempt in (1, 2):
        table.write(captioned([], {1: "corrupt"}, attempt), stamp)
    rows = pq.read_table(f"{table.location}/failures").to_pylist()
    assert sorted(row["attempt"] for row in rows) == [1, 2]
    assert audited(table, {0: 2}).duplicated == 0


def test_a_part_of_failures_that_is_named_by_its_keys_alone_is_whole(table: CaptionTable, stamp: Stamp) -> None:
    """Earlier releases left the attempts out of the name."""
    table.write(captioned([0], {1: "corrupt", 2: "missing"}, attempt=2), stamp)
    [part] = Path(table.location.local_path, "failures").iterdir()
    part.rename(part.with_name("part-run-1-2-96a3cf72d606b6a4.parquet"))
    assert audited(table, {0: 3}).is_whole


def test_a_failed_write_leaves_nothing_behind(table: CaptionTable, stamp: Stamp) -> None:
    (Path(table.location.local_path) / "captions").write_text("a file where the folder should be")
    with pytest.raises(JobError, match="could not be written"):
        table.write(captioned([1]), stamp)


def test_done_rows_are_found_in_the_parts_and_transient_failures_are_tried_again(
    table: CaptionTable, stamp: Stamp
) -> None:
    table.write(
        captioned([row_key(0, 1), row_key(7, 0)], {row_key(0, 2): "corrupt", row_key(0, 3): "fetch_failed"}), stamp
    )
    done = find_done(table, is_transient)
    assert done.keys.positions(0, 5).tolist() == [False, True, True, False, False]
    assert done.keys.positions(7, 2).tolist() == [True, False]
    assert done.attempts == {row_key(0, 3): 1}
    assert (done.num_captioned, done.num_failed) == (2, 1)


def test_a_row_that_failed_and_was_captioned_later_is_done(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([], {1: "fetch_failed", 2: "fetch_failed"}), stamp)
    table.write(captioned([1], {2: "missing"}, attempt=2), stamp)
    done = find_done(table, is_transient)
    assert done.attempts == {}
    assert (done.num_captioned, done.num_failed) == (1, 1)


def test_another_model_into_the_same_output_is_refused_naming_the_difference(table: CaptionTable, stamp: Stamp) -> None:
    table.claim(IDENTITY)
    assert table.digest == stamp.identity
    with pytest.raises(OutputError, match=r"model\.fingerprint: abc there, xyz now"):
        table.claim({**IDENTITY, "model": {"name": "demo", "fingerprint": "xyz"}})


def test_the_same_model_by_another_name_continues_the_table(table: CaptionTable, stamp: Stamp) -> None:
    table.claim(IDENTITY)
    table.claim({**IDENTITY, "model": {"name": "/elsewhere/demo", "fingerprint": "abc"}})
    assert table.digest == stamp.identity


@pytest.mark.parametrize("lacking", [field.name for field in fields(DecodingConfig)])
def test_a_table_of_a_release_without_some_decoding_option_continues_with_its_default(
    table: CaptionTable, lacking: str
) -> None:
    decoding = {**asdict(DecodingConfig()), "stop": []}
    earlier = {name: value for name, value in decoding.items() if name != lacking}
    table.claim({**IDENTITY, "decoding": earlier})
    digest = table.digest
    table.claim({**IDENTITY, "decoding": decoding})
    assert table.digest == digest  # the parts of both releases are those of one table
    with pytest.raises(OutputError, match=rf"decoding\.{lacking}: {re.escape(str(decoding[lacking]))} there, 7 now"):
        table.claim({**IDENTITY, "decoding": {**decoding, lacking: 7}})


@pytest.mark.parametrize("text", ["{", "5", '["ab"]', "[" * 50_000])
def test_a_damaged_run_file_is_named(table: CaptionTable, text: str) -> None:
    table.claim(IDENTITY)
    Path(table.run_folder.local_path, "run.json").write_text(text)
    with pytest.raises(OutputError, match=r"_run/run.json is damaged: .*Restore it, or choose another OUTPUT"):
        table.claim(IDENTITY)


@pytest.mark.parametrize("keys", [pa.array([None], pa.int64()), pa.array(["a"])], ids=["null", "text"])
def test_a_part_with_keys_that_are_none_counts_as_torn(table: CaptionTable, stamp: Stamp, keys: pa.Array) -> None:
    table.write(captioned([1]), stamp)
    (part,) = Path(table.location.local_path, "captions").iterdir()
    rows = pq.read_table(part).set_column(0, "key", keys)
    pq.write_table(rows.replace_schema_metadata(stamp.footer), part)
    assert audited(table, {0: 2}).torn_parts == [str(part)]


def test_captions_among_the_failures_count_as_foreign(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([1]), stamp)
    (part,) = Path(table.location.local_path, "captions").iterdir()
    Path(table.location.local_path, "failures").mkdir()
    moved = part.rename(Path(table.location.local_path, "failures", part.name))
    assert audited(table, {0: 2}).foreign_parts == [str(moved)]


def test_a_folder_with_parts_but_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "someone-elses.parquet").write_bytes(b"")
    with pytest.raises(OutputError, match="holds 1 parts but no _run"):
        CaptionTable(str(tmp_path)).claim(IDENTITY)


def test_a_torn_part_stops_a_rerun_instead_of_being_captioned_again(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([1]), stamp)
    (Path(table.location.local_path) / "captions" / "part-torn.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(OutputError, match=r"part-torn\.parquet cannot be read"):
        find_done(table, is_transient)


def test_an_audit_of_a_whole_table_finds_nothing(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([0, 1], {2: "fetch_failed"}), stamp)
    table.write(captioned([2], {row_key(1, 0): "corrupt"}, attempt=2), stamp)
    audit = audited(table, {0: 3, 1: 1})
    assert audit.is_whole
    assert (audit.read, audit.captioned, audit.failed) == (4, 3, 1)
    assert audit.failed_by_reason == {"corrupt": 1}


def test_an_audit_finds_what_is_missing_duplicate_and_orphan(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([0, 1]), stamp)
    table.write(captioned([1, 9, row_key(5, 0)], {2: "corrupt"}), stamp)
    table.write(captioned([], {2: "corrupt", 3: "corrupt"}), stamp)
    audit = audited(table, {0: 5, 1: None})
    assert not audit.is_whole
    assert (audit.missing, audit.duplicated, audit.alien, audit.unread_units) == (1, 2, 2, 1)


def test_an_audit_names_torn_and_foreign_parts(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([0]), stamp)
    table.write(captioned([0]), Stamp("run-2", "another identity"))
    (Path(table.location.local_path) / "captions" / "part-torn.parquet").write_bytes(b"PAR1 half a file")
    audit = audited(table, {0: 1})
    assert [Path(part).name for part in audit.torn_parts] == ["part-torn.parquet"]
    assert "run-2" in audit.foreign_parts[0]
    assert not audit.is_whole


def test_the_rows_on_disk_are_known_from_the_names_of_the_parts(table: CaptionTable, stamp: Stamp) -> None:
    table.write(captioned([1, 2], {3: "corrupt"}), stamp)
    table.write(captioned([4]), Stamp("run-2", stamp.identity))
    assert (table.num_written("run-1"), table.num_written("run-2"), table.num_written("run")) == (3, 1, 0)
    assert table.num_written("run-1", ["failures"]) == sum(table.failed_by_reason("run-1", ["failures"]).values()) == 1


def test_a_repair_that_drops_rows_of_a_part_keeps_another_part_of_the_keys_that_are_left(
    table: CaptionTable, stamp: Stamp
) -> None:
    frozen = frozen_units({0: 1})
    table.write(captioned([], {0: "corrupt"}, attempt=1), stamp)
    table.write(captioned([], dict.fromkeys([0, 5, row_key(2, 0)], "fetch_failed"), attempt=9), stamp)
    repair(table, frozen, list(findings(table, frozen, audit(table, frozen)[1])), "run-2")
    rows = pq.read_table(f"{table.location}/failures").to_pylist()
    assert sorted((row["key"], row["attempt"]) for row in rows) == [(0, 1), (0, 9)]
    assert audited(table, {0: 1}).is_whole


def test_an_invocation_leaves_its_record(table: CaptionTable) -> None:
    table.record("run-1", {"config": {"limit": 3}})
    assert json.loads((Path(table.run_folder.local_path) / "runs" / "run-1.json").read_text()) == {
        "config": {"limit": 3}
    }


def test_a_key_set_returns_the_keys_it_already_had() -> None:
    keys = KeySet()
    assert keys.add(np.array([row_key(0, 3), row_key(2, 1)])).tolist() == []
    assert keys.add(np.array([row_key(2, 1), row_key(2, 5), row_key(4, 0), row_key(4, 0)])).tolist() == [
        row_key(2, 1),
        row_key(4, 0),
    ]
    assert keys.count() == 4
    assert keys.contains(np.array([row_key(0, 3), row_key(0, 4), row_key(9, 9)])).tolist() == [True, False, False]
