"""Each format, read back by its own reader with equal texts."""

import csv
import json
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captioner.config import ExportConfig
from captioner.errors import OutputError
from captioner.evaluation.caption_files import read_captions
from captioner.export import export_table, record
from captioner.export.formats import txt
from captioner.export.names import file_name
from captioner.storage import Location, Store, open_store
from captioner.tables import CaptionTable
from captioner.tables.lease import Timing, take_lease
from captioner.tables.table_images import TableImages
from tests.caption_tables import add_part, begin_table, caption_row
from tests.faults.conftest import tar_of
from tests.sample_images import encoded
from tests.unit.export.conftest import CAPTIONS, NAMES, Export, files_of, write_named_images

TEXT_OF = {name: text for name, text in zip(NAMES, CAPTIONS, strict=True) if text}


def document(folder: Path) -> Any:
    return json.loads((folder / "captions-00000.json").read_text())


def test_jsonl_has_the_columns_of_the_table(export: Export, tmp_path: Path) -> None:
    export()
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions-00000.jsonl").read_text().splitlines()]
    assert {row["image_id"]: row["caption"] for row in rows} == TEXT_OF
    assert rows[0]["mean_logprob"] == -0.5
    assert [one["caption"] for one in rows[2]["candidates"]] == ["a cat", "one cat"]


def test_jsonl_has_null_for_what_json_has_no_number_for(table: CaptionTable, export: Export, tmp_path: Path) -> None:
    nan = {**caption_row(0, "", "x"), "mean_logprob": float("nan")}
    columns = ("caption", "num_tokens", "finish_reason", "mean_logprob", "min_logprob", "is_repetitive")
    odd = caption_row(
        3, "c.jpg", ":NaN,", min_logprob=float("-inf"), candidates=[{name: nan[name] for name in columns}]
    )
    add_part(table, [odd])
    export(where="key = 3", columns=("caption", "min_logprob", "candidates"))
    [line] = (tmp_path / "out" / "captions-00000.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert (found["caption"], found["min_logprob"], found["candidates"][0]["mean_logprob"]) == (":NaN,", None, None)


def test_csv_has_a_header_and_the_same_texts(export: Export, tmp_path: Path) -> None:
    export(format="csv")
    with (tmp_path / "out" / "captions-00000.csv").open(newline="") as file:
        assert {row["image_id"]: row["caption"] for row in csv.DictReader(file)} == TEXT_OF


def test_csv_can_be_made_safe_for_spreadsheets(tmp_path: Path) -> None:
    table, _ = begin_table(str(tmp_path / "table"), str(write_named_images(tmp_path / "images", ["a.jpg"])))
    add_part(table, [caption_row(0, "@a.jpg", "=HYPERLINK(1)")])
    config = ExportConfig(table=str(tmp_path / "table"), output=str(tmp_path / "out"), format="csv")
    export_table(config)
    with pytest.raises(OutputError, match="csv_safe"):  # one OUT does not hold both
        export_table(replace(config, csv_safe=True))
    export_table(replace(config, csv_safe=True, output=str(tmp_path / "safe")))
    plain, safe = (
        next(csv.DictReader((tmp_path / name / "captions-00000.csv").read_text().splitlines()))
        for name in ("out", "safe")
    )
    assert (plain["image_id"], plain["caption"]) == ("@a.jpg", "=HYPERLINK(1)")
    assert (safe["image_id"], safe["caption"], safe["num_tokens"]) == ("'@a.jpg", "'=HYPERLINK(1)", plain["num_tokens"])


def test_txt_lies_in_a_tree_like_that_of_the_images(export: Export, tmp_path: Path) -> None:
    export(format="txt", captions="all")
    assert files_of(tmp_path / "out") == {
        "a/x.txt": b'a "dog", running\n',
        "a/über alles.v2.txt": "café 中 🐕\n".encode(),
        "b/x.txt": b"a cat\none cat\n",
        "d.txt": b"the end\n",
    }


def test_txt_lies_beside_each_image_and_replaces_nothing(export: Export, tmp_path: Path) -> None:
    (tmp_path / "images" / "d.txt").write_text("mine")
    before = files_of(tmp_path / "images")
    assert export(format="txt", names="beside")["refused"] == {"name_taken": 1}
    found = files_of(tmp_path / "images")
    assert {name: found[name] for name in before} == before
    assert sorted(found.keys() - before.keys()) == ["a/x.txt", "a/über alles.v2.txt", "b/x.txt"]
    assert files_of(tmp_path / "out") == {}
    assert export(format="txt", names="beside")["rows"] == 0


def test_txt_replaces_nothing_on_a_server_that_ignores_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "_create_once", lambda store, place, data: store.write_atomic(place, data) or True)
    monkeypatch.setattr(record, "take_lease", partial(take_lease, timing=Timing(settle_s=0.1)))
    table, _ = begin_table(str(tmp_path / "table"), str(write_named_images(tmp_path / "images", ["c.jpg"])))
    config = ExportConfig(table=str(tmp_path / "table"), output=f"memory://{tmp_path}/out", format="txt")
    for number, name in enumerate(["c.jpg", "c.png"]):
        add_part(table, [caption_row(number, name, f"caption {number}")])
        assert export_table(config)["refused"] == ({"name_taken": 1} if number else {})
    assert open_store(config.output).read_bytes(f"{config.output}/c.txt") == b"caption 0\n"


def test_names_beside_images_need_no_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.tar").write_bytes(tar_of([encoded()] * 2))
    table, _ = begin_table(str(tmp_path / "tars"), str(tmp_path / "images"))
    add_part(table, [caption_row(position, f"a.tar/{position}", "one") for position in range(2)])
    monkeypatch.setattr(TableImages, "rows", lambda *_: pytest.fail("a tar is read"))
    config = ExportConfig(table=str(tmp_path / "tars"), output=str(tmp_path / "out"), format="txt", names="beside")
    assert export_table(config)["refused"] == {"image_is_no_file": 2}


def test_names_beside_images_open_a_store_once(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Location] = []
    monkeypatch.setattr(txt, "open_store", lambda place: (opened.append(place), open_store(place))[1])
    monkeypatch.setattr(txt, "_WRITERS", 1)
    assert export(format="txt", names="beside")["rows"] == 4
    assert len(opened) == 1


def test_names_that_leave_out_collide_or_overwrite_an_image_are_refused_and_counted(tmp_path: Path) -> None:
    names = [
        "../a.jpg",
        "b/../../b.jpg",
        "c.jpg",
        "c.png",
        "d.txt",
        "_export.jpg",
        "_export/e.jpg",
        "f/" + 300 * "f",
        "g.jpg",
    ]
    table, _ = begin_table(str(tmp_path / "table"), str(write_named_images(tmp_path / "images", ["a.jpg"])))
    add_part(table, [caption_row(number, name, f"caption {number}") for number, name in enumerate(names)])
    config = ExportConfig(table=str(tmp_path / "table"), output=str(tmp_path / "out" / "deep"), format="txt")
    summary = export_table(config)
    assert summary["refused"] == {
        "name_leaves_the_folder": 2,
        "name_taken": 2,
        "name_unusable": 1,
    }
    found = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.txt")]
    assert sorted(map(str, found)) == ["deep/_export.txt", "deep/c.txt", "deep/d.txt.txt", "deep/g.txt"]
    assert (tmp_path / "out" / "deep" / "c.txt").read_text() == "caption 2\n"


@pytest.mark.parametrize(
    ("image_id", "name"),
    [
        ("s3://bucket/a/b.jpg", "bucket/a/b.txt"),
        ("a.b/c d.é.jpeg", "a.b/c d.é.txt"),
        ("shard.tar/000", "shard.tar/000.txt"),
        (".jpg", ".jpg.txt"),
        ("/elsewhere/a.jpg", "elsewhere/a.txt"),
        ("/photos/2024/a.jpg", "2024/a.txt"),
        ("/photos-2/a.jpg", "photos-2/a.txt"),
    ],
)
def test_the_name_of_a_file_follows_that_of_the_image(image_id: str, name: str) -> None:
    assert file_name(image_id, ".txt", "/photos") == (name, "")
    assert file_name(image_id, ".txt", "/photos/") == (name, "")


@pytest.mark.parametrize("image_id", ["/photos/../a.jpg", "s3://../a.jpg", "/../a.jpg", "/photos//../a.jpg"])
def test_no_name_leads_out_of_the_folder(image_id: str) -> None:
    assert file_name(image_id, ".txt", "/photos")[1] == "name_leaves_the_folder"


@pytest.mark.parametrize("letter", ["\n", "\x1b", "\x7f", "\x9b"])
def test_no_name_holds_a_control_character(letter: str) -> None:
    assert file_name(f"a/b{letter}c.jpg", ".txt")[1] == "name_unusable"


@pytest.mark.parametrize("name", ["txt", "kohya"])
def test_names_of_a_folders_images_begin_below_the_folder(name: str, tmp_path: Path) -> None:
    images = write_named_images(tmp_path / "images", ["a/x.jpg"])
    table, _ = begin_table(str(tmp_path / "table"), str(images))
    add_part(table, [caption_row(0, str(images / "a" / "x.jpg"), "a dog")])  # as a job names the images of a folder
    summary = export_table(ExportConfig(table=str(tmp_path / "table"), output=str(tmp_path / "out"), format=name))
    assert (summary["rows"], summary["refused"]) == (1, {})
    if name == "txt":
        assert (tmp_path / "out" / "a" / "x.txt").read_text() == "a dog\n"
    else:
        assert document(tmp_path / "out") == {"a/x": {"caption": "a dog"}}


def test_kohya_has_a_caption_for_each_path_without_suffix(export: Export, tmp_path: Path) -> None:
    export(format="kohya")
    found = document(tmp_path / "out")
    assert found == {name.removesuffix(".jpg"): {"caption": text} for name, text in TEXT_OF.items()}


def test_kohya_has_the_tags_of_the_table(tmp_path: Path) -> None:
    table, _ = begin_table(str(tmp_path / "table"), str(write_named_images(tmp_path / "images", ["a.jpg", "b.jpg"])))
    kept = [pa.field("tags", pa.list_(pa.string()))]
    rows = [caption_row(0, "a.jpg", "a dog", tags=["dog", "grass"]), caption_row(1, "b.jpg", "a cat", tags=None)]
    add_part(table, rows, kept)
    config = ExportConfig(table=str(tmp_path / "table"), output=str(tmp_path / "out"), format="kohya")
    export_table(config)
    assert document(tmp_path / "out") == {
        "a": {"caption": "a dog", "tags": "dog, grass"},
        "b": {"caption": "a cat"},
    }


def test_coco_is_read_by_pycocotools_and_by_evaluate(export: Export, tmp_path: Path) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    export(format="coco", captions="all")
    file = tmp_path / "out" / "captions-00000.json"
    with redirect_stdout(StringIO()):
        found = coco_module.COCO(str(file))
    names = {image["id"]: image["file_name"] for image in found.loadImgs(found.getImgIds())}
    texts = {(names[one["image_id"]], one["caption"]) for one in found.loadAnns(found.getAnnIds())}
    assert texts == {*TEXT_OF.items(), ("b/x.jpg", "one cat")}
    assert {(row.file_name, row.caption) for row in read_captions(str(file))} == texts


def test_llava_has_the_fields_of_its_training_and_the_prompt_that_was_asked(export: Export, tmp_path: Path) -> None:
    export(format="llava", captions="all")
    found = document(tmp_path / "out")
    assert [set(one) for one in found] == [{"id", "image", "conversations"}] * 5
    assert len({one["id"] for one in found}) == 5
    says = {(one["image"], *(turn["value"] for turn in one["conversations"])) for one in found}
    first, second = "<image>\nWhat is this?", "<image>\nSay what you see."
    asked = {"a/x.jpg": first, "d.jpg": first}
    pairs = [*TEXT_OF.items(), ("b/x.jpg", "one cat")]
    assert says == {(name, asked.get(name, second), text) for name, text in pairs}
    assert {tuple(turn["from"] for turn in one["conversations"]) for one in found} == {("human", "gpt")}


def test_llava_asks_what_the_user_says(export: Export, tmp_path: Path) -> None:
    export(format="llava", prompt="Describe it.")
    assert document(tmp_path / "out")[0]["conversations"][0]["value"] == "<image>\nDescribe it."
