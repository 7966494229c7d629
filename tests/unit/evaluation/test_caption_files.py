"""Captions are read from files of every format, and errors say what was expected."""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from captioner import demo
from captioner.demo.scenes import scene_at
from captioner.errors import InputError
from captioner.evaluation.caption_files import (
    CAPTION_FORMATS,
    CaptionFormat,
    ColumnNames,
    Record,
    describe_caption_formats,
    read_captions,
)
from captioner.storage import Store
from tests.unit.evaluation.reference_files import (
    REFERENCES,
    ROWS,
    annotations,
    coco,
    karpathy,
    write_caption_table,
    write_image_parquet,
    write_json,
    write_jsonl,
    write_list_parquet,
    write_parquet,
    write_parquet_folder,
    write_rows,
    write_token,
)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda folder: write_rows(folder, ("image_id", "caption"), ","), id="csv"),
        pytest.param(lambda folder: write_rows(folder, ("uri", "caption"), "\t"), id="tsv"),
        pytest.param(lambda folder: write_jsonl(folder, is_list=True), id="jsonl of lists"),
        pytest.param(lambda folder: write_jsonl(folder, is_list=False), id="jsonl"),
        pytest.param(write_list_parquet, id="parquet of lists"),
        pytest.param(write_image_parquet, id="parquet with the images themselves"),
        pytest.param(write_parquet_folder, id="a folder of parquet"),
        pytest.param(write_caption_table, id="a caption table"),
        pytest.param(write_token, id="Flickr8k's token file"),
        pytest.param(lambda folder: write_json(folder, annotations()), id="COCO results"),
        pytest.param(lambda folder: write_json(folder, {"annotations": annotations()}), id="COCO without images"),
        pytest.param(lambda folder: write_json(folder, coco()), id="COCO"),
        pytest.param(lambda folder: write_json(folder, karpathy(has_cocoid=True)), id="Karpathy's COCO"),
        pytest.param(lambda folder: write_json(folder, karpathy(has_cocoid=False)), id="Karpathy's Flickr"),
    ],
)
def test_every_kind_of_file_gives_the_same_captions(write: Callable[[Path], Path], tmp_path: Path) -> None:
    rows = read_captions(str(write(tmp_path)))
    assert [row._replace(file_name="") for row in rows] == ROWS


def test_coco_and_karpathy_tell_the_file_names_too(tmp_path: Path) -> None:
    assert {row.file_name for row in read_captions(str(write_json(tmp_path, coco())))} == {
        f"COCO_val_{name:0>12}.jpg" for name in REFERENCES
    }
    assert {row.file_name for row in read_captions(str(write_json(tmp_path, karpathy(has_cocoid=True))))} == {
        f"{name}.jpg" for name in REFERENCES
    }


def test_captions_are_read_from_any_store(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/evaluation/captions/part-0.parquet", write_list_parquet(tmp_path).read_bytes())
    assert list(read_captions("memory://evaluation")) == ROWS


def test_the_demo_images_have_the_captions_of_their_scenes() -> None:
    rows = list(read_captions("demo"))
    assert len({row.image_id for row in rows}) == len(list(demo.images_path().iterdir()))
    assert ("scene-0180.png", scene_at(180).captions[0]) in [row[:2] for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "none.csv",
            None,
            r"none.csv does not exist; expected the OUTPUT of jobs/caption.py, a folder of .parquet, or",
        ),
        ("notes.txt", "a dog", r"notes.txt ends in .txt; expected the OUTPUT"),
        ("a.csv", "id,text\n1,a\n", r"a.csv has id, text; expected image_id and caption: rename them"),
        ("b.csv", "image_id,caption\n,a dog\n", r"b.csv, caption row 1: the image is '', .*; expected a text or a"),
        ("c.csv", "", r"c.csv has no columns; expected image_id and caption"),
        ("d.csv", 'image_id,caption\n7,"a"b\n', r'd.csv, line 2: .* goes on after the next "; expected "..." around'),
        ("e.csv", 'image_id,caption\n1,a\n7,"a\nb', r"e.csv, line 3: a value .* never ends; .*; it runs to line 4"),
        ("f.csv", "image_id,caption\n1,a\n2.jpg,a cat, a dog\n", r"f.csv, line 3: it has 3 values, the header 2; exp"),
        ("g.tsv", 'image_id\tcaption\n1\t"broken\n2\tnext"\n', r"g.tsv, line 2: .* holds whole rows; .* to line 3"),
        ("h.csv", "image_id;caption\n1;a\n", r"h.csv has one column, 'image_id;caption': .* by semicolons; expected c"),
        ("i.csv", "image_id|caption\n1|a\n", r"one column, .* separated by bars"),
        ("j.csv", "image_id\tcaption\n1\ta\n", r"one column, .* separated by tabs; expected commas: name it .tsv if"),
        ("k.tsv", "image_id,caption\n1,a\n", r"one column, .* separated by commas; expected tabs"),
        ("l.csv", "1.jpg,a cat\n2.jpg,a dog\n", r"l.csv begins with 1.jpg, where a CSV has the names of its columns"),
        ("m.csv", "image_id,caption,caption\n1,a,b\n", r"m.csv has two columns of the name caption"),
        (
            "n.csv",
            "image_id,caption\n1,\"['a cat', 'the cat']\"\n",
            r"line 2 has the caption .*, a list that is not JSON",
        ),
        ("o.csv", "i\0m\0a\0g\0e\0", r"o.csv has bytes that no text has: a binary file, or UTF-16; expected UTF-8"),
        ("a.jsonl", '{"image_id": 1,\n', r"a.jsonl, line 1 is not JSON: .*; expected image_id and caption"),
        ("b.jsonl", "[1, 2]\n", r"b.jsonl holds '\[1, 2\]'; expected objects with image_id and caption"),
        ("c.jsonl", '{"image_id": 1, "caption": [3]}', r"row 1: the image is '1', the caption '\[3\]'; expected"),
        ("a.json", '{"dog": 1}', r"a.json has neither .* images: it is an object of dog \(a number\); expected COCO's"),
        (
            "e.json",
            '"dog"',
            r"e.json has neither .* images: it is a text; expected COCO's captions_\*.json, .*\[\"caption",
        ),
        (
            "g.json",
            '[{"image": "a.jpg", "conversations": [{"from": "human", "value": "?"}]}]',
            r"g.json has a conversation about 'a.jpg' with 0 answers; expected an image and one answer",
        ),
        ("f.json", "[" * 50_000, r"f.json is not JSON: it is nested too deep"),
        ("b.json", '{"images": [{"id": 1}]}', r"b.json has an image without filename and sentences; expected Karpathy"),
        (
            "d.json",
            '{"images": [{"filename": "7", "sentences": [{"text": "a"}]}]}',
            r"caption \"\[\{'text': 'a'\}\]\"; exp",
        ),
        ("c.json", '[{"image_id": 1, "bbox": 2}]', r"c.json has image_id, bbox; expected image_id and caption"),
        ("a.parquet", "PAR1 and no more", r"a.parquet cannot be read: not a Parquet file"),
    ],
)
def test_what_holds_no_captions_is_an_error_that_names_it(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(read_captions(str(tmp_path / name)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "image_id,caption\r\n1,caf\u00e9 \u732b\r\n2,b\r\n"),
        ("a.tsv", "image_id\tcaption\n1\tcaf\u00e9 \u732b\n2\tb\n"),
        ("a.jsonl", '{"image_id": 1, "caption": "caf\u00e9 \u732b"}\n{"image_id": 2, "caption": "b"}\n'),
        ("a.json", '[{"image_id": 1, "caption": "caf\u00e9 \u732b"}, {"image_id": 2, "caption": "b"}]'),
        ("a.token", "1#0\tcaf\u00e9 \u732b\n2#0\tb\n"),
    ],
)
def test_text_in_any_unicode_encoding_is_read(tmp_path: Path, encoding: str, name: str, text: str) -> None:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    assert [row[:2] for row in read_captions(str(tmp_path / name))] == [("1", "caf\u00e9 \u732b"), ("2", "b")]


@pytest.mark.parametrize(
    "content",
    [
        '{"1": "a cat", "2": ["b"], "3": []}',
        '{"1": [{"caption": "a cat"}], "2": [{"image_id": 2, "caption": "b"}]}',
        '{"image_id": 1, "caption": "a cat"}\n{"image_id": 2, "caption": "b"}\n',
        '{"1": "a cat",\n "2": "b"}',
    ],
)
def test_captions_by_image_and_lines_in_a_json_file_are_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert [row[:2] for row in read_captions(str(tmp_path / "a.json"))] == [("1", "a cat"), ("2", "b")]


def test_a_json_file_of_one_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"image_id": "1.jpg", "caption": "a cat"}')
    assert [row[:2] for row in read_captions(str(tmp_path / "a.json"))] == [("1.jpg", "a cat")]


def test_values_of_any_length_lists_and_lines_in_a_cell_are_whole(tmp_path: Path) -> None:
    long = "a" * 300_000
    rows = [
        "image_id,caption",
        "",
        f"1,{long}",
        '2,"[""a cat"", ""the cat""]"',
        '3,"two\nlines, one ""cell"""',
        "4,x,,",
    ]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    assert [row[:2] for row in read_captions(str(tmp_path / "a.csv"))] == [
        ("1", long),
        ("2", "a cat"),
        ("2", "the cat"),
        ("3", 'two\nlines, one "cell"'),
        ("4", "x"),
    ]


def test_a_folder_without_tables_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no .parquet and no captions/\*.parquet; expected the OUTPUT"):
        list(read_captions(str(tmp_path)))


def test_a_parquet_file_that_is_damaged_inside_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, "captions.parquet", {"image_id": ["a" * 50] * 9, "caption": ["b" * 50] * 9})
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"captions.parquet is damaged: .*; expected a whole Parquet file"):
        list(read_captions(str(path)))


def read_colon_rows(store: Store, url: str, columns: ColumnNames) -> Iterator[Record]:
    for line in store.read_bytes(url).decode().splitlines():
        name, _, caption = line.partition(": ")
        yield Record(name, caption)


def test_a_format_from_outside_the_package_is_read_and_is_in_the_help_and_the_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CaptionFormat("colon", (".colon.txt",), read_colon_rows, "a name, a colon, a caption")
    monkeypatch.setitem(CAPTION_FORMATS, "colon", entry)
    path = tmp_path / "references.colon.txt"
    path.write_text("".join(f"{row.image_id}: {row.caption}\n" for row in ROWS))
    assert list(read_captions(str(path))) == ROWS
    assert ".colon.txt (a name, a colon, a caption)" in describe_caption_formats()
    with pytest.raises(InputError, match=r"expected the OUTPUT of .* ends in .*, \.token\.txt, \.colon\.txt"):
        list(read_captions(str(tmp_path / "not-there.csv")))


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_llavas_conversations_of_one_answer_are_captions(tmp_path: Path, name: str) -> None:
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "a cat"}]
    rows = [{"id": "1", "image": "00/1.jpg", "conversations": turns}]
    (tmp_path / name).write_text(json.dumps(rows if name == "llava.json" else rows[0]))
    assert [row[:3] for row in read_captions(str(tmp_path / name))] == [("00/1.jpg", "a cat", "00/1.jpg")]


def test_the_list_of_an_image_folder_has_captions(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,a cat\n")
    assert [row[:2] for row in read_captions(str(tmp_path / "metadata.csv"))] == [("a.jpg", "a cat")]
