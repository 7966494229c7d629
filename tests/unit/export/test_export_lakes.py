"""Tables of a lake: what their own libraries read is what the captions are, however often the export ran."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from captioner.config import ImageAccessConfig, VerifyConfig
from captioner.errors import ConfigError, InputError, OutputError
from captioner.tables import CaptionTable
from captioner.tables.verification import verify
from tests.caption_tables import add_part, begin_table, caption_row, write_images
from tests.conftest import Bucket
from tests.unit.export.conftest import CAPTIONS, NAMES, Export

TEXT_OF = {name: text for name, text in zip(NAMES, CAPTIONS, strict=True) if text}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the libraries' own


# Lance


def lance_rows(folder: str, options: dict[str, str] | None = None) -> list[dict[str, Any]]:
    lance = pytest.importorskip("lance")
    return list(lance.dataset(f"{folder}/captions.lance", storage_options=options).to_table().to_pylist())


def test_lance_has_the_columns_and_grows(table: CaptionTable, export: Export, tmp_path: Path) -> None:
    flags = {"format": "lance", "text": "Look: {caption}", "columns": ("image_id", "candidates"), "rows_per_file": 3}
    assert export(**flags)["rows"] == 4
    assert export(**flags)["rows"] == 0
    add_part(table, [caption_row(3, "c.jpg", "late")])
    assert export(**flags)["rows"] == 1
    rows = lance_rows(str(tmp_path / "out"))
    assert [row["key"] for row in rows] == [0, 1, 2, 4, 3]
    assert {row["image_id"]: row["text"] for row in rows} == {
        name: f"Look: {text}" for name, text in {**TEXT_OF, "c.jpg": "late"}.items()
    }
    assert [one["caption"] for one in rows[2]["candidates"]] == ["a cat", "one cat"]


def test_a_shard_that_lance_has_already_is_not_appended_again(export: Export, tmp_path: Path) -> None:
    export(format="lance", rows_per_file=2)
    for file in [*(tmp_path / "out" / "_export" / "shards").iterdir(), tmp_path / "out" / "_export.json"]:
        if file.parent.name == "shards":
            file.unlink()  # as if killed between the append and its record
    record = json.loads((tmp_path / "out" / "_export.json").read_text())
    (tmp_path / "out" / "_export.json").write_text(json.dumps({**record, "exports": []}))
    assert export(format="lance", rows_per_file=2)["rows"] == 4
    assert [row["key"] for row in lance_rows(str(tmp_path / "out"))] == [0, 1, 2, 4]


def test_lance_lies_on_a_store_too(export: Export, s3: Bucket) -> None:
    options = dict(s3.storage_options)
    assert export(format="lance", output=f"{s3.url}/out", output_storage_options=options)["rows"] == 4
    known = {
        "aws_access_key_id": options["key"],
        "aws_secret_access_key": options["secret"],
        "aws_endpoint": s3.endpoint,
        "aws_region": "us-east-1",
        "allow_http": "true",
    }
    assert {row["image_id"]: row["caption"] for row in lance_rows(f"{s3.url}/out", known)} == TEXT_OF


# Iceberg


def iceberg_table(out: Path) -> Any:
    catalog = pytest.importorskip("pyiceberg.catalog")
    return catalog.load_catalog("captioner", type="sql", uri=f"sqlite:///{out}/catalog.db", warehouse=f"file://{out}")


def iceberg_rows(out: Path) -> list[dict[str, Any]]:
    return list(iceberg_table(out).load_table("captioner.captions").scan().to_arrow().to_pylist())


def test_iceberg_has_the_parts_where_they_lie_and_grows(table: CaptionTable, export: Export, tmp_path: Path) -> None:
    assert export(format="iceberg")["rows"] == 4
    assert export(format="iceberg")["exports"] == []
    add_part(table, [caption_row(3, "c.jpg", "late")], run_id="run-3")
    assert export(format="iceberg")["rows"] == 1
    rows = iceberg_rows(tmp_path / "out")
    assert {row["image_id"]: row["caption"] for row in rows} == {**TEXT_OF, "c.jpg": "late"}
    found = iceberg_table(tmp_path / "out").load_table("captioner.captions")
    files = {task.file.file_path for task in found.scan().plan_files()}
    assert files == {f"file://{url}" for url in table.parts("captions")}
    assert not list((tmp_path / "out").rglob("part-*"))
    exports = json.loads((tmp_path / "out" / "_export.json").read_text())["exports"]
    assert [(one["rows"], one["runs"]) for one in exports] == [
        (4, ["run-1", "run-2"]),
        (1, ["run-1", "run-2", "run-3"]),
    ]


def test_a_commit_whose_record_was_lost_is_known_by_its_snapshot(export: Export, tmp_path: Path) -> None:
    export(format="iceberg")
    record = json.loads((tmp_path / "out" / "_export.json").read_text())
    (tmp_path / "out" / "_export.json").write_text(json.dumps({**record, "exports": []}))
    assert export(format="iceberg")["rows"] == 4
    assert len(iceberg_rows(tmp_path / "out")) == 4
    assert len(iceberg_table(tmp_path / "out").load_table("captioner.captions").snapshots()) == 1


def test_parts_that_a_compaction_took_away_leave_the_iceberg_table(tmp_path: Path, export: Export) -> None:
    table, _ = begin_table(str(tmp_path / "small"), str(write_images(tmp_path / "few", 3)))
    for number in range(3):
        add_part(table, [caption_row(number, f"{number:03d}.jpg", f"caption {number}")], run_id=f"run-{number}")
        table.record(f"run-{number}", {})
    flags = {"format": "iceberg", "table": str(table.location)}
    export(**flags)
    verify(VerifyConfig(table=str(table.location), compact=True))
    export(**flags)
    assert sorted(row["caption"] for row in iceberg_rows(tmp_path / "out")) == ["caption 0", "caption 1", "caption 2"]
    shutil.rmtree(table.location.local_path + "/_run/removed", ignore_errors=True)
    assert len(iceberg_rows(tmp_path / "out")) == 3


def test_iceberg_takes_the_parts_as_they_are(export: Export, tmp_path: Path, s3: Bucket) -> None:
    with pytest.raises(ConfigError, match="--format iceberg takes the parts as they are; expected no --where"):
        export(format="iceberg", where="key > 1")
    options = dict(s3.storage_options)
    with pytest.raises(ConfigError, match="where no SQLite file can lie; expected --iceberg-catalog"):
        export(format="iceberg", output=f"{s3.url}/out", output_storage_options=options)


def test_iceberg_of_a_table_without_captions_is_refused_and_claims_nothing(tmp_path: Path, export: Export) -> None:
    table, _ = begin_table(str(tmp_path / "empty"), str(write_images(tmp_path / "few", 1)))
    with pytest.raises(InputError, match="the table has no captions; expected some"):
        export(format="iceberg", table=str(table.location))
    assert not (tmp_path / "out" / "_export.json").exists()


def test_iceberg_reads_the_parts_with_the_options_of_the_table(tmp_path: Path, s3: Bucket, export: Export) -> None:
    table, _ = begin_table(
        f"{s3.url}/table", str(write_images(tmp_path / "few", 1)), options=s3.storage_options, input_options={}
    )
    add_part(table, [caption_row(0, "000.jpg", "one")])
    options = dict(s3.storage_options)
    flags = {"table": f"{s3.url}/table", "storage_options": options, "output": str(tmp_path / "out")}
    of_images = ImageAccessConfig(image_root=str(tmp_path / "few"))
    assert export(format="iceberg", **flags, output_storage_options={}, image_access=of_images)["rows"] == 1


def test_a_table_of_others_in_the_catalogue_is_refused(export: Export, tmp_path: Path) -> None:
    table, _ = begin_table(str(tmp_path / "small"), str(write_images(tmp_path / "few", 1)))
    add_part(table, [caption_row(0, "000.jpg", "one")])
    own = {"type": "sql", "uri": f"sqlite:///{tmp_path}/shared.db", "warehouse": f"file://{tmp_path}/lake"}
    export(format="iceberg", iceberg_catalog=own)
    with pytest.raises(OutputError, match="which is no part of"):
        export(format="iceberg", table=str(table.location), output=str(tmp_path / "two"), iceberg_catalog=own)
