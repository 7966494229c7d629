"""What an export holds to, whatever its format: new rows alone, whole files, nothing that is not ours."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest

from captioner.config import ExportConfig, VerifyConfig
from captioner.errors import ConfigError, InputError, OutputError, UsageError
from captioner.export import export_table
from captioner.export.formats.table import EXPORT_FORMATS
from captioner.export.request import ExportFormat, Shard
from captioner.storage import LocalStore, Place
from captioner.tables import CaptionTable
from captioner.tables.verification import verify
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images
from tests.conftest import Bucket, JobHere
from tests.unit.export.conftest import Export, files_of

FILES = sorted(name for name, form in EXPORT_FORMATS.items() if not form.needs)  # libraries name the others
TEXTS = [name for name in FILES if not EXPORT_FORMATS[name].reads_images]


def lines_of(folder: Path, name: str = "captions-00000.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rows_leave_in_the_order_of_the_input_whatever_part_holds_them(export: Export, tmp_path: Path) -> None:
    summary = export()
    assert summary["rows"] == 4
    assert [row["key"] for row in lines_of(tmp_path / "out")] == [0, 1, 2, 4]


def test_a_failure_never_leaves_as_a_caption(export: Export, tmp_path: Path) -> None:
    export()
    assert "c.jpg" not in {row["image_id"] for row in lines_of(tmp_path / "out")}
    with pytest.raises(InputError, match=r"has no captions --where image_id = 'c\.jpg'"):
        export(where="image_id = 'c.jpg'", output=str(tmp_path / "none"))
    assert not (tmp_path / "none" / "_export.json").exists()


@pytest.mark.parametrize("name", TEXTS)
def test_the_same_command_again_writes_nothing(name: str, export: Export, tmp_path: Path) -> None:
    export(format=name)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert export(format=name) == {**export(format=name), "rows": 0, "exports": []} | {
        "seconds": pytest.approx(0, abs=9)
    }
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_table_that_grew_adds_only_what_is_new(table: CaptionTable, export: Export, tmp_path: Path) -> None:
    export()
    first = files_of(tmp_path / "out")
    add_part(table, [caption_row(3, "c.jpg", "late")], run_id="run-3")
    assert export()["rows"] == 1
    assert {name: files_of(tmp_path / "out")[name] for name in first} == first
    assert [row["caption"] for row in lines_of(tmp_path / "out", "captions-00001.jsonl")] == ["late"]
    exports = json.loads((tmp_path / "out" / "_export.json").read_text())["exports"]
    assert [(one["runs"], one["rows"]) for one in exports] == [(["run-1", "run-2"], 4), (["run-3"], 1)]


def test_a_row_that_two_parts_hold_leaves_once(table: CaptionTable, export: Export, tmp_path: Path) -> None:
    add_part(table, [caption_row(0, "a/x.jpg", 'a "dog",\nrunning')], run_id="run-2")
    assert export()["rows"] == 4
    assert [row["key"] for row in lines_of(tmp_path / "out")] == [0, 1, 2, 4]


def test_files_have_the_stated_number_of_rows(export: Export, tmp_path: Path) -> None:
    export(rows_per_file=3)
    names = [f"captions-0000{number}.jsonl" for number in (0, 1)]
    assert [[row["key"] for row in lines_of(tmp_path / "out", name)] for name in names] == [[0, 1, 2], [4]]


def test_where_and_columns_choose(export: Export, tmp_path: Path) -> None:
    export(where="caption LIKE 'a%' -- not the others", columns=("image_id", "caption"))
    assert lines_of(tmp_path / "out") == [
        {"image_id": "a/x.jpg", "caption": 'a "dog",\nrunning'},
        {"image_id": "b/x.jpg", "caption": "a cat"},
    ]


def test_the_text_is_made_of_any_columns(export: Export, tmp_path: Path) -> None:
    export(text="{caption} [{width}x{height}] {clip_score}", columns=("key",), where="key = 2")
    assert lines_of(tmp_path / "out") == [{"key": 2, "text": "a cat [48x40]"}]


def test_an_image_without_text_is_left_out_and_counted(table: CaptionTable, export: Export) -> None:
    add_part(table, [caption_row(3, "c.jpg", " ")])
    assert export()["refused"] == {"no_text": 1}
    with pytest.raises(InputError, match=r"--text \{clip_score\} is empty for all 5 captions"):
        export(text="{clip_score}", output=str(table.location) + "-empty")


def test_an_export_that_wrote_nothing_is_no_success_however_often_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, _ = begin_table(str(tmp_path / "table"), str(write_images(tmp_path / "images", 2)))
    add_part(table, [caption_row(0, "../a.jpg", "one"), caption_row(1, "../b.jpg", "two")])
    config = ExportConfig(table=str(tmp_path / "table"), output=str(tmp_path / "out"), format="txt")
    for _ in range(2):
        summary = export_table(config)
        assert (summary["ok"], summary["rows"], summary["refused"]) == (False, 0, {"name_leaves_the_folder": 2})
        assert capsys.readouterr().err.splitlines() == [
            f"NOTHING WAS EXPORTED to {tmp_path}/out",
            "2 images left out: name_leaves_the_folder",
        ]


def test_a_rerun_says_what_an_export_left_out(
    table: CaptionTable, export: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    add_part(table, [caption_row(3, "c.jpg", " ")])
    export()
    told = capsys.readouterr().err
    summary = export()
    assert (summary["ok"], summary["rows"], summary["refused"]) == (True, 0, {"no_text": 1})
    assert "4 images exported to" in told
    assert "has all but these" in capsys.readouterr().err


def test_a_rerun_reads_each_batch_once(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    export()
    read: list[str] = []
    original = LocalStore.read_bytes

    def counted(store: LocalStore, place: Place) -> bytes:
        read.append(str(place))
        return original(store, place)

    monkeypatch.setattr(LocalStore, "read_bytes", counted)
    assert export()["ok"]
    assert sum("batch-" in place for place in read) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"format": "xml"}, "--format is xml; expected one of jsonl, csv"),
        ({"text": "{tags}"}, r"--text has \{tags\}; expected columns of the table in braces: key, image_id, caption"),
        ({"text": "{caption"}, "--text is {caption: expected '}' before end of string"),
        ({"text": "{caption!r}"}, r"--text has \{caption!r\}; expected columns"),
        ({"columns": ("nope",)}, "--columns has nope; expected columns of the table: key"),
        ({"where": "nope = 1"}, "--where is nope = 1: Binder Error: Referenced column"),
        ({"where": "true); DROP TABLE captions; SELECT (1"}, "expected one SELECT"),
        ({"format": "kohya", "columns": ("key",)}, "--columns is key; expected none with --format kohya"),
        ({"format": "kohya", "captions": "all"}, "--captions is all; expected best with --format kohya"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    flags: dict[str, Any], message: str, export: Export, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(**flags)
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    form = replace(EXPORT_FORMATS["csv"], name="orc", needs=("no_such_package", "orc"))
    monkeypatch.setitem(EXPORT_FORMATS, "orc", form)
    with pytest.raises(ConfigError, match=r"needs the package no_such_package: pip install '\.\[orc\]'"):
        export(format="orc")


def test_a_folder_with_files_of_others_is_refused(export: Export, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"holds thesis\.tex and no _export\.json"):
        export()
    assert files_of(tmp_path / "out") == {"thesis.tex": b"mine"}


def test_a_folder_of_another_export_is_refused(export: Export) -> None:
    export()
    with pytest.raises(OutputError, match=r"holds another export(.|\n)*where:  there, key > 1 now"):
        export(where="key > 1")


def test_a_file_of_others_is_never_replaced(table: CaptionTable, export: Export, tmp_path: Path) -> None:
    export()
    (tmp_path / "out" / "captions-00001.jsonl").write_text("mine")
    add_part(table, [caption_row(3, "c.jpg", "late")])
    with pytest.raises(OutputError, match=r"captions-00001.jsonl exists and is no file of this export"):
        export()
    assert (tmp_path / "out" / "captions-00001.jsonl").read_text() == "mine"


def test_a_table_without_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    table, _ = begin_table(str(tmp_path / "table"), str(tmp_path / "images"))
    add_part(table, [failure_row(0, "a.jpg", "corrupt")])
    with pytest.raises(InputError, match="the table has no captions; expected some to export"):
        export_table(ExportConfig(table=str(tmp_path / "table"), output=str(tmp_path / "out")))


def test_a_table_that_is_compacted_in_the_middle_gives_the_same_bytes(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, _ = begin_table(str(tmp_path / "small"), str(write_images(tmp_path / "few", 6)))
    for run in range(3):
        rows = [caption_row(number, f"{number:03d}.jpg", f"caption {number}") for number in (run, run + 3)]
        add_part(table, rows, run_id=f"run-{run}")
        table.record(f"run-{run}", {})
    flags = {"table": str(table.location), "rows_per_file": 2, "columns": ("key", "caption")}
    export(**flags, output=str(tmp_path / "unbroken"))
    written = EXPORT_FORMATS["jsonl"].write

    def write(shard: Shard) -> None:
        if shard.number == 1:
            raise KeyboardInterrupt
        written(shard)

    monkeypatch.setitem(EXPORT_FORMATS, "jsonl", replace(EXPORT_FORMATS["jsonl"], write=write))
    with pytest.raises(KeyboardInterrupt):
        export(**flags)
    monkeypatch.setitem(EXPORT_FORMATS, "jsonl", replace(EXPORT_FORMATS["jsonl"], write=written))
    assert list(files_of(tmp_path / "out")) == ["captions-00000.jsonl"]
    verify(VerifyConfig(table=str(table.location), compact=True))
    export(**flags)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "unbroken")


def test_a_store_is_an_out_as_any_folder(table: CaptionTable, export: Export, tmp_path: Path, s3: Bucket) -> None:
    for name in ("jsonl", "hf", "hf-folder"):  # lines, a writer that seeks, many files
        export(format=name, output=str(tmp_path / name))
        flags = {"format": name, "output": f"{s3.url}/{name}", "output_storage_options": dict(s3.storage_options)}
        assert export(**flags)["rows"] == 4
        assert export(**flags)["rows"] == 0
        prefix = f"{s3.name}/{name}/"
        found = {key.removeprefix(prefix): s3.fs.cat_file(key) for key in s3.fs.find(prefix)}
        assert {key: data for key, data in found.items() if not key.startswith("_export")} == files_of(tmp_path / name)


def test_a_format_is_one_entry_that_another_package_can_add(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(shard: Shard) -> None:
        def shout(file: IO[bytes]) -> None:
            for batch in shard.rows:
                file.writelines(f"{text}!\n".encode() for text in batch.column("loud").to_pylist())

        shard.publish(f"{shard.number}.shout", shout)

    def columns(request: Any) -> Mapping[str, str]:
        return {"loud": f"upper({request.text})"}

    shout = ExportFormat(name="shout", help="loud", columns=columns, write=write, file="{}.shout")
    monkeypatch.setitem(EXPORT_FORMATS, "shout", shout)
    export(format="shout", where="key >= 2")
    assert files_of(tmp_path / "out") == {"0.shout": b"A CAT!\nTHE END!\n"}


def test_the_command_prints_a_summary_and_refuses_with_2(
    table: CaptionTable, tmp_path: Path, job_here: JobHere
) -> None:
    job = partial(job_here, "export.py", str(table.location))
    done = job(str(tmp_path / "out"), "--format", "coco")
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 4, done.stderr
    refused = job(str(tmp_path / "out"), "--format", "nope")
    assert (refused.returncode, "expected one of jsonl, csv" in refused.stderr) == (2, True)
