import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from captioner.config import InputConfig
from captioner.errors import ConfigError, InputError, OutputError
from captioner.images.formats import readable_formats
from captioner.inputs import freeze, listing, load_frozen, read_unit
from captioner.inputs.suffixes import IMAGE_SUFFIXES
from captioner.schema import source_schema, split_key
from captioner.storage import open_store


def _touch(folder, *names):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "out/_run")


def _rows(frozen, run, config=InputConfig()):  # noqa: B008
    tables = [t for unit in frozen.units for t in read_unit(unit, frozen.columns, config, run_folder=run)]
    return pa.concat_tables(tables).to_pylist()


def _uris(frozen, run, config=InputConfig()):  # noqa: B008
    return [row["uri"] for row in _rows(frozen, run, config)]


# -- folders, globs, files


def test_a_folder_of_images_is_listed_recursively_and_the_rest_is_counted(tmp_path, run):
    root = tmp_path / "in"
    _touch(
        root, "b.JPG", "a/x y.png", "a/plain", "notes.json", "c.txt", "d.txt", ".DS_Store", "_SUCCESS", "a/.git/x.jpg"
    )
    _touch(root, "__MACOSX/b.jpg", "photo.jpg?size=large", "_DSC0001.jpg")
    frozen = freeze(str(root), InputConfig(), run)
    names = ["_DSC0001.jpg", "a/plain", "a/x y.png", "b.JPG", "photo.jpg?size=large"]
    assert _uris(frozen, run) == [f"{root}/{name}" for name in names]
    assert frozen.kind == "files"
    assert frozen.skipped == {"hidden": 4, ".txt": 2, ".json": 1}
    assert frozen.num_images == 5


def test_texts_without_a_suffix_are_left_out_of_a_folder_and_rare_formats_are_not(tmp_path, run):
    root = tmp_path / "in"
    _touch(root, "README", "a/Makefile", "a/LICENSE", "e3b0c44298fc1c14", "x.blp", "x.im1", "x.rle", "x.py")
    frozen = freeze(str(root), InputConfig(), run)
    assert _uris(frozen, run) == [f"{root}/{name}" for name in ("e3b0c44298fc1c14", "x.blp", "x.im1", "x.rle")]
    assert frozen.skipped == {"without a suffix": 3, ".py": 1}
    assert freeze(f"{root}/README", InputConfig(), run).num_images == 1


def test_every_format_that_the_decoder_reads_has_its_suffixes():
    formats = set(readable_formats())
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    assert suffixes <= IMAGE_SUFFIXES


def test_an_images_id_is_its_uri_and_its_key_its_place(tmp_path, run):
    _touch(tmp_path / "in", "a.jpg", "b.jpg")
    frozen = freeze(str(tmp_path / "in"), InputConfig(), run)
    rows = _rows(frozen, run)
    assert [row["image_id"] for row in rows] == [row["uri"] for row in rows]
    assert [split_key(row["key"]) for row in rows] == [(0, 0), (0, 1)]
    assert [(row["attempt"], row["reason"], row["data"]) for row in rows] == [(1, None, None)] * 2


ODD_NAMES = [
    "a b.jpg",
    "ü.jpg",
    "50%.jpg",
    "%20.jpg",
    "#1.jpg",
    "q?.jpg",
    "{a,b}.jpg",
    "{1..2}.jpg",
    "*.jpg",
    "[x].jpg",
]
ODD_NAMES += ["a::b.jpg", "'\".jpg", "back\\slash.jpg", "line\nfeed.jpg", "~.jpg", "a+b&c=d.jpg", "..jpg.jpg"]


def test_odd_names_in_a_folder_mean_themselves(tmp_path, run):
    _touch(tmp_path / "in", *ODD_NAMES)
    frozen = freeze(str(tmp_path / "in"), InputConfig(), run)
    shown = {name for name in ODD_NAMES if not name.startswith(".")}
    assert {Path(uri).name for uri in _uris(frozen, run)} == shown


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if not name.startswith("~")])
def test_one_file_with_an_odd_name_is_taken_literally(tmp_path, run, name):
    _touch(tmp_path / "in", name, "other.jpg", "a.jpg")
    frozen = freeze(f"{tmp_path}/in/{name}", InputConfig(), run)
    assert _uris(frozen, run) == [f"{tmp_path}/in/{name}"]


def test_a_name_that_is_not_utf8_is_listed_too(tmp_path, run):
    _touch(tmp_path / "in", "a.jpg", os.fsdecode(b"\xff.jpg"))
    rows = _rows(freeze(str(tmp_path / "in"), InputConfig(), run), run)
    assert [Path(row["image_id"]).name for row in rows] == ["a.jpg", r"\xff.jpg"]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("*.jpg", ["a.jpg", "b.jpg"]),
        ("?.jpg", ["a.jpg", "b.jpg"]),
        ("[b-z].jpg", ["b.jpg"]),
        ("**/*.jpg", ["a.jpg", "b.jpg", "sub/c.jpg"]),
        ("*/c.*", ["sub/c.jpg"]),
        ("sub/*", ["sub/c.jpg"]),
        ("{a,sub/c}.jpg", ["a.jpg", "sub/c.jpg"]),
        ("{a,gone}.jpg", ["a.jpg", "gone.jpg"]),
        ("{s,t}ub/*.jpg", ["sub/c.jpg"]),
        ("{sub,a.jpg}", ["sub/c.jpg", "a.jpg"]),
        ("sub/c.dat", ["sub/c.dat"]),
        ("**/*.dat", ["sub/c.dat"]),
        ("sub/", ["sub/c.jpg"]),
    ],
)
def test_globs_braces_and_single_files_select_what_they_say(tmp_path, run, path, names):
    _touch(tmp_path / "in", "a.jpg", "b.jpg", "sub/c.jpg", "sub/c.dat", "d.json")
    frozen = freeze(f"{tmp_path}/in/{path}", InputConfig(), run)
    assert _uris(frozen, run) == [f"{tmp_path}/in/{name}" for name in names]


def test_a_path_relative_to_the_working_folder_becomes_absolute(tmp_path, run, monkeypatch):
    _touch(tmp_path / "in", "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert _uris(freeze("in", InputConfig(), run), run) == [f"{tmp_path}/in/a.jpg"]
    assert _uris(freeze(f"file://{tmp_path}/in", InputConfig(), run), run) == [f"{tmp_path}/in/a.jpg"]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.jpg", "b.jpg", "meta.parquet"], "files"),
        (["README", "LICENSE", "train.parquet"], "parquet"),
        (["preview.png", "0.parquet", "1.parquet"], "parquet"),
        (["a", "b"], "files"),
    ],
)
def test_a_folder_is_what_most_of_its_files_are(tmp_path, run, names, kind, monkeypatch):
    monkeypatch.setattr(listing, "ROWS_PER_LISTING", 1)
    _touch(tmp_path / "in", *(name for name in names if not name.endswith(".parquet")))
    for name in names:
        if name.endswith(".parquet"):
            (tmp_path / "in").mkdir(exist_ok=True)
            pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "in" / name)
    frozen = freeze(str(tmp_path / "in"), InputConfig(), run)
    assert frozen.kind == kind
    assert Path(f"{run}/listing/part-000000.parquet").exists() == (kind == "files")


def test_input_format_files_takes_every_suffix(tmp_path, run):
    _touch(tmp_path / "in", "a.dat", "b.json", ".hidden")
    frozen = freeze(str(tmp_path / "in"), InputConfig(input_format="files"), run)
    assert _uris(frozen, run) == [f"{tmp_path}/in/a.dat", f"{tmp_path}/in/b.json"]


# -- wrong and empty inputs


def test_a_path_that_does_not_exist_is_an_error(tmp_path, run):
    with pytest.raises(InputError, match=r"/nope does not exist; expected a file, a folder or prefix, a glob"):
        freeze(str(tmp_path / "nope"), InputConfig(), run)


def test_an_empty_folder_is_an_error(tmp_path, run):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=r"in/? is empty, or matches nothing; expected an image, a .tar or a .parquet"):
        freeze(str(tmp_path / "in"), InputConfig(), run)


def test_a_folder_without_images_says_what_is_there(tmp_path, run):
    _touch(tmp_path / "in", "a.json", "b.json", "c.txt", ".x")
    message = r"4 files, none an image, a .tar or a .parquet: .json x2, .txt x1, hidden x1; pass --input-format files"
    with pytest.raises(InputError, match=message):
        freeze(str(tmp_path / "in"), InputConfig(), run)
    assert load_frozen(run) is None


def test_a_glob_or_braces_that_match_nothing_are_errors(tmp_path, run):
    with pytest.raises(InputError, match="matches nothing"):
        freeze(f"{tmp_path}/*.jpg", InputConfig(), run)
    with pytest.raises(InputError, match=r"none of its 3 names, from .*0.jpg on"):
        freeze(f"{tmp_path}/{{0..2}}.jpg", InputConfig(), run)


def test_columns_of_image_files_are_refused(tmp_path, run):
    _touch(tmp_path / "in", "a.jpg")
    with pytest.raises(ConfigError, match=r"--keep-columns, --id-column: .* is image files, which have no columns"):
        freeze(str(tmp_path / "in"), InputConfig(keep_columns=("a",), id_column="b"), run)


@pytest.mark.parametrize("name", ["width", "caption", "uri", "reason", "pixels", "run_id"])
def test_a_kept_column_must_not_take_the_place_of_an_output_column(tmp_path, run, name):
    with pytest.raises(ConfigError, match=f"is a column of the output; .* as --keep-columns {name}=input_{name}"):
        freeze(str(tmp_path), InputConfig(keep_columns=(name,)), run)


def test_credentials_in_the_input_are_refused_and_not_shown(run):
    with pytest.raises(InputError) as caught:
        freeze("https://me:secret@host/list.txt", InputConfig(), run)
    assert "holds credentials" in str(caught.value)
    assert "secret" not in str(caught.value)


# -- lists of URIs


def test_a_text_list_is_one_uri_a_line_beside_the_list(tmp_path, run):
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbfa b.jpg\r\n\n  s3://b/#1.jpg \n/abs.jpg\nhttps://u:p@h/x.jpg?sig=1\n"
    )
    rows = _rows(freeze(str(tmp_path / "list.txt"), InputConfig(), run), run)
    uris = [f"{tmp_path}/a b.jpg", "s3://b/#1.jpg", "/abs.jpg", "https://u:p@h/x.jpg?sig=1"]
    assert [row["uri"] for row in rows] == uris
    assert [row["image_id"] for row in rows] == [*uris[:3], "https://***@h/x.jpg?sig=***"]


def test_a_csv_list_keeps_columns_ids_and_rows_without_a_uri(tmp_path, run):
    text = 'id,url,note\n1,a.jpg,"two\nlines"\n,b.jpg,\n3,,empty\n\n4,c.jpg\n'
    (tmp_path / "list.csv").write_text(text)
    config = InputConfig(id_column="id", keep_columns=("note=remark",))
    frozen = freeze(str(tmp_path / "list.csv"), config, run)
    rows = _rows(frozen, run, config)
    assert [row["image_id"] for row in rows] == ["1", f"{tmp_path}/b.jpg", "3", "4"]
    assert [row["remark"] for row in rows] == ["two\nlines", "", "empty", ""]
    assert [(row["uri"] is None, row["reason"]) for row in rows] == [(False, None)] * 2 + [
        (True, "empty"),
        (False, None),
    ]
    assert frozen.columns.kept == (pa.field("remark", pa.string()),)


def test_a_csv_without_a_header_is_refused_because_its_first_image_would_vanish(tmp_path, run):
    (tmp_path / "list.csv").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(InputError, match=r"list.csv begins with a.jpg, where a CSV has the names of its columns; add"):
        freeze(str(tmp_path / "list.csv"), InputConfig(), run)


def test_a_quote_that_never_ends_is_an_error_because_it_swallows_rows(tmp_path, run):
    (tmp_path / "list.csv").write_text('url,note\n"a.jpg,x\nb.jpg,y\n')
    with pytest.raises(
        InputError, match=r'list.csv, line 2: a value that begins with " never ends; expected "..." around'
    ):
        freeze(str(tmp_path / "list.csv"), InputConfig(), run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "url\nhttps://h/a.jpg?crop=1,2,3&w=80\n",
            r"a.csv, line 2: it has 3 values, the header 1; expected as",
        ),
        ("b.csv", "url;caption\nhttps://h/a.jpg;a cat\n", r"b.csv has one column, 'url;caption': .* by semicolons"),
        ("c.tsv", "url,caption\na.jpg,x\n", r"c.tsv has one column, .* by commas; expected tabs"),
        (
            "d.txt",
            "x.jpg\ndata:image/png;base64,iVBORw0KGgo=\n",
            r"d.txt, line 2 holds an image itself, as data:image/png;b",
        ),
        (
            "e.csv",
            "url\n" + "/9j/" + "4AAQ" * 99 + "\n",
            r"e.csv, line 2 holds an image itself, as /9j/4AAQ.*; expected its",
        ),
    ],
)
def test_a_list_whose_values_would_be_cut_is_refused_by_its_line(tmp_path, run, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        freeze(str(tmp_path / name), InputConfig(), run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.jsonl",
            '{"file_name": "a.jpg", "text": "a cat", "n": 1}\n\n{"file_name": null}\n{"file_name": "b.jpg", "n": [2]}',
        ),
        ("b.json", '{"image": "a.jpg", "text": "a cat", "n": 1}\n{"image": ""}\n{"image": "b.jpg", "n": [2]}\n'),
        ("c.json", '[{"url": "a.jpg", "text": "a cat", "n": 1},\n {}, {"url": "b.jpg", "n": [2]}]'),
        (
            "d.json",
            '{"images": [{"uri": "a.jpg", "text": "a cat", "n": 1}, {"id": 2}, {"uri": "b.jpg", "n": [2]}], "info": 1}',
        ),
        ("e.ndjson", '{"path": "a.jpg", "text": "a cat", "n": 1}\n{"text": null}\n{"path": "b.jpg", "n": [2]}\n'),
    ],
)
def test_lists_of_json_objects_are_read_with_columns(tmp_path, run, name, text):
    (tmp_path / name).write_text(text)
    config = InputConfig(keep_columns=("n", "text=said"))
    rows = _rows(freeze(str(tmp_path / name), config, run), run, config)
    assert [row["uri"] for row in rows] == [f"{tmp_path}/a.jpg", None, f"{tmp_path}/b.jpg"]
    assert [(row["n"], row["said"]) for row in rows] == [("1", "a cat"), (None, None), ("[2]", None)]
    assert rows[1]["image_id"] == f"{tmp_path}/{name}#1"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"url": "a.jpg"}\n{"url": "b.jpg"', r"a.jsonl, line 2 is not JSON: .*; expected an object a line"),
        ("m.json", '{"a.jpg": "a cat"}', r"m.json has the key a.jpg, where a list has the names of its columns"),
        ("o.csv", "url;caption, long\na.jpg;x, y\n", r"o.csv has a column, 'url;caption': .* separated by semicolons"),
        ("n.csv", "# a list\nurl\na.jpg\n", r"n.csv begins with '# a list'; expected the names of its columns"),
        ("b.jsonl", '"a.jpg"\n', r"b.jsonl, line 1 is a text; expected an object"),
        (
            "c.jsonl",
            '{"url": "a.jpg"}\n{"url": 7}\n',
            r"c.jsonl, line 2: url is .*; expected the URI of an image",
        ),
        ("d.json", '{"dog": [1]}', r"d.json is an object of dog \(a list\); expected objects, in a list or one a line"),
        ("e.json", "[" * 50_000, r"e.json is not JSON: it is nested too deep; expected objects"),
        (
            "f.jsonl",
            '{"text": "a"}\n{"n": 1}\n',
            r"f.jsonl has no column that can be the image; name one with --image-c",
        ),
        ("g.jsonl", '{"url": "data:image/png;base64,AAAA"}\n', r"g.jsonl, line 1 holds an image itself"),
        (
            "h.zip",
            "",
            r"h.zip ends in .zip; expected an image, a .tar, .*: unpack it and name its folder, or write it as",
        ),
        (
            "i.tar.zst",
            "",
            r"ends in .zst; expected .*: unpack it first; only tars are read as .tar.gz. To decode it all",
        ),
        ("j.txt.gz", "", r"ends in .gz; expected .*: unpack it first"),
        ("k.arrow", "", r"ends in .arrow; expected .*: write it as a .parquet"),
        ("l.npz", "", r"ends in .npz; expected .*: write its images, or URIs of them, as a .parquet"),
    ],
)
def test_a_named_file_of_another_kind_is_refused_with_the_remedy(tmp_path, run, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        freeze(str(tmp_path / name), InputConfig(), run)


def test_json_beside_images_is_no_list(tmp_path, run):
    _touch(tmp_path / "in", "a.jpg", "metadata.jsonl", "x.json", "b.zip")
    assert freeze(str(tmp_path / "in"), InputConfig(), run).skipped == {".jsonl": 1, ".json": 1, ".zip": 1}


def test_lists_in_utf_16_are_read(tmp_path, run):
    (tmp_path / "list.csv").write_bytes("url,n\n/caf\u00e9.jpg,1\n".encode("utf-16"))
    (tmp_path / "list.txt").write_bytes("/caf\u00e9.jpg\n".encode("utf-16"))
    assert _uris(freeze(str(tmp_path / "list.csv"), InputConfig(), run), run) == ["/caf\u00e9.jpg"]
    assert _uris(freeze(str(tmp_path / "list.txt"), InputConfig(), run), run) == ["/caf\u00e9.jpg"]


def test_an_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").touch()
    with pytest.raises(OutputError, match=r"output .*/in/a.jpg/_run/listing cannot be read or written: NotADirectory"):
        freeze(str(tmp_path / "in"), InputConfig(), str(tmp_path / "in/a.jpg/_run"))


def test_a_damaged_freeze_is_named(tmp_path, run):
    (tmp_path / "a.jpg").touch()
    freeze(str(tmp_path / "a.jpg"), InputConfig(), run)
    Path(run, "units.parquet").write_text("{")
    with pytest.raises(OutputError, match=r"_run/units.parquet is damaged: .*Restore it, or choose another OUTPUT"):
        load_frozen(run)


def test_the_run_folder_of_a_table_written_into_the_input_is_hidden(tmp_path, run):
    for name in ("a.jpg", "captions/_run/units.parquet", "captions/_run/listing/part-000000.parquet"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    frozen = freeze(str(tmp_path / "in"), InputConfig(), run)
    assert (frozen.kind, frozen.num_images, frozen.skipped) == ("files", 1, {"hidden": 2})


def test_a_csv_without_a_column_of_uris_lists_its_columns(tmp_path, run):
    (tmp_path / "list.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"no column that can be the image; .*Columns: a: string, b: string"):
        freeze(str(tmp_path / "list.csv"), InputConfig(), run)


def test_a_broken_csv_names_the_line(tmp_path, run):
    (tmp_path / "list.csv").write_text("url\na.jpg\n" + '"' + "x" * 200_000 + '"y')
    with pytest.raises(
        InputError, match=r'list.csv, line 3: a value that begins with " goes on after the next "; expected'
    ):
        freeze(str(tmp_path / "list.csv"), InputConfig(), run)


def test_columns_of_a_text_list_are_refused(tmp_path, run):
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with pytest.raises(InputError, match=r"is a plain list; columns can only be taken from .csv or .parquet"):
        freeze(str(tmp_path / "list.txt"), InputConfig(id_column="id"), run)


def test_a_folder_of_lists_needs_to_be_called_one(tmp_path, run):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text(f"/{name}.jpg\n")
    frozen = freeze(str(tmp_path / "in"), InputConfig(input_format="list"), run)
    assert _uris(frozen, run) == ["/a.jpg", "/b.jpg"]
    assert _uris(freeze(f"{tmp_path}/in/*.txt", InputConfig(), run), run) == ["/a.jpg", "/b.jpg"]


def test_an_empty_list_is_an_error(tmp_path, run):
    (tmp_path / "list.txt").write_text("\n\n")
    with pytest.raises(InputError, match="has no rows"):
        freeze(str(tmp_path / "list.txt"), InputConfig(), run)


# -- the frozen listing


def test_what_is_frozen_is_loaded_again(tmp_path, run):
    (tmp_path / "list.csv").write_text("url,a\nx.jpg,1\n")
    config = InputConfig(keep_columns=("a",))
    assert load_frozen(run) is None
    frozen = freeze(str(tmp_path / "list.csv"), config, run)
    assert load_frozen(run) == frozen
    table = next(read_unit(frozen.units[0], frozen.columns, config, run_folder=run))
    assert table.schema == source_schema(frozen.columns.kept)


def test_a_listing_has_parts_and_tells_its_progress(tmp_path, run, monkeypatch):
    monkeypatch.setattr(listing, "ROWS_PER_LISTING", 3)
    _touch(tmp_path / "in", *(f"{number}.jpg" for number in range(7)))
    told = []
    frozen = freeze(str(tmp_path / "in"), InputConfig(), run, on_progress=told.append)
    assert [(unit.ordinal, unit.num_rows) for unit in frozen.units] == [(0, 3), (1, 3), (2, 1)]
    assert told == [3, 6, 7]
    assert [split_key(row["key"]) for row in _rows(frozen, run)][3:5] == [(1, 0), (1, 1)]


def test_of_a_listing_part_only_the_row_groups_that_hold_a_row_are_read(tmp_path, run, monkeypatch):
    monkeypatch.setattr(listing, "_ROWS_PER_GROUP", 4)
    (tmp_path / "list.txt").write_text("".join(f"s3://b/{number}.jpg\n" for number in range(14)))
    frozen = freeze(str(tmp_path / "list.txt"), InputConfig(), run)
    read = []
    groups = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_groups", lambda file, these, **how: read.append(these) or groups(file, these, **how)
    )

    def uris(positions):
        done = ~np.isin(np.arange(14), positions)
        tables = read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run, done=done)
        return [uri for table in tables for uri in table["uri"].to_pylist()]

    assert uris([1, 9, 11, 13]) == ["s3://b/1.jpg", "s3://b/9.jpg", "s3://b/11.jpg", "s3://b/13.jpg"]
    assert uris([]) == []
    assert uris(range(14)) == [f"s3://b/{number}.jpg" for number in range(14)]
    assert read == [[0, 2, 3], [], [0, 1, 2, 3]]


def test_an_interrupted_freeze_is_not_taken_for_a_whole_one_and_leaves_nothing_behind(tmp_path, run, monkeypatch):
    monkeypatch.setattr(listing, "ROWS_PER_LISTING", 2)
    _touch(tmp_path / "in", *(f"{number}.jpg" for number in range(9)))

    def stop(num_so_far):
        if num_so_far >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        freeze(str(tmp_path / "in"), InputConfig(), run, on_progress=stop)
    assert load_frozen(run) is None
    assert len(list(Path(f"{run}/listing").iterdir())) == 3
    for number in range(2, 9):
        (tmp_path / "in" / f"{number}.jpg").unlink()
    frozen = freeze(str(tmp_path / "in"), InputConfig(), run)
    assert len(_uris(frozen, run)) == 2
    assert [path.name for path in Path(f"{run}/listing").iterdir()] == ["part-000000.parquet"]


def test_freezing_twice_gives_the_same(tmp_path, run):
    _touch(tmp_path / "in", *(f"{number % 7}/{number}.jpg" for number in range(50)))
    first = freeze(str(tmp_path / "in"), InputConfig(), run)
    keys = {row["key"]: row["uri"] for row in _rows(first, run)}
    assert {row["key"]: row["uri"] for row in _rows(freeze(str(tmp_path / "in"), InputConfig(), run), run)} == keys


def test_credentials_are_not_written_down_with_the_units(tmp_path, run):
    (tmp_path / "list.txt").write_text("a.jpg\n")
    freeze(str(tmp_path / "list.txt"), InputConfig(storage_options={"secret": "do-not-tell"}), run)
    written = b"".join(path.read_bytes() for path in Path(run).rglob("*") if path.is_file())
    assert b"do-not-tell" not in written


def test_memory_works_as_any_other_store(run):
    store = open_store("memory://in")
    store.write_atomic("memory://in-freezing/a b.jpg", b"1")
    store.write_atomic("memory://in-freezing/sub/c.jpg", b"1")
    assert _uris(freeze("memory://in-freezing", InputConfig(), run), run) == [
        "memory://in-freezing/a b.jpg",
        "memory://in-freezing/sub/c.jpg",
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("WIDTH",), "--keep-columns WIDTH: WIDTH is a column of the output, where it is written width"),
        (("text", "TEXT"), "--keep-columns TEXT: TEXT and text differ in case alone"),
        (("why",), "--keep-columns why: why is a column of the output"),
        (("a=Why",), "--keep-columns a: Why is a column of the output, where it is written why"),
    ],
)
def test_kept_names_that_sql_cannot_tell_apart_are_refused(tmp_path, run, columns, message):
    with pytest.raises(ConfigError, match=message):
        freeze(str(tmp_path), InputConfig(keep_columns=columns), run)


def test_folders_that_writers_leave_behind_are_not_read_and_partitions_are(tmp_path, run):
    for folder in ("year=2024", "_x=1", "plain"):
        _touch(tmp_path / "in" / folder, "a.jpg")
    for folder in ("_temporary/0", "_delta_log", "__MACOSX", ".hidden", "plain/_old"):
        _touch(tmp_path / "in" / folder, "a.jpg")
    frozen = freeze(str(tmp_path / "in"), InputConfig(), run)
    assert (frozen.num_images, frozen.skipped) == (3, {"hidden": 5})
