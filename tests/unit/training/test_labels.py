"""Labelled splits: every kind of file, which image falls where, and what is wrong said by its message."""

import csv
import io
import itertools
import json
import logging
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.command_line import parse
from captioner.config import InputConfig, LabelsConfig
from captioner.errors import ConfigError, InputError
from captioner.schema import split_key
from captioner.training.labels import LABELS, Labels, describe_label_formats, read_labels
from captioner.training.labels.formats import LABEL_FORMATS, LabelFormat
from captioner.training.labels.image_digests import read_digests
from captioner.training.labels.rows import LabelFiles, LabelRow
from tests.sample_images import encoded

CAPTIONS = {
    "a.jpg": ["a dog on a wall", "the dog sits"],
    "b.jpg": ["two red cars"],
    "c.jpg": ["a cat sleeps", "a cat on a mat"],
}
SPLITS = {"a.jpg": "train", "b.jpg": "val", "c.jpg": "test"}
EXPECTED = {"a.jpg": "train", "b.jpg": "validation", "c.jpg": "test"}


def read(path: object, run_folder: Path, **options: Any) -> Labels:
    return read_labels(LabelsConfig(labels_path=str(path), **options), str(run_folder / "run"))


def as_dict(labels: Labels) -> dict[str, tuple[list[str], str]]:
    """Last part of the image's name -> captions and split."""
    rows = labels.table.to_pylist()
    return {row["source"].rpartition("/")[2]: (row["captions"], row["split"]) for row in rows}


def write_csv(folder: Path) -> Path:
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        writer.writerows([name, text, SPLITS[name]] for name, own in CAPTIONS.items() for text in own)
    return folder / "labels.csv"


def write_jsonl(folder: Path) -> Path:
    rows = [{"uri": name, "captions": own, "split": SPLITS[name]} for name, own in CAPTIONS.items()]
    (folder / "labels.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "labels.jsonl"


def write_imagefolder(folder: Path) -> Path:
    write_jsonl(folder).rename(folder / "metadata.jsonl")
    (folder / "a.jpg").write_bytes(encoded())
    return folder


def write_uri_parquet(folder: Path) -> Path:
    columns = {"url": list(CAPTIONS), "caption": list(CAPTIONS.values()), "split": list(SPLITS.values())}
    pq.write_table(pa.table(columns), folder / "labels.parquet")
    return folder / "labels.parquet"


def write_karpathy(folder: Path) -> Path:
    images = [
        {"filename": name, "split": SPLITS[name], "sentences": [{"raw": text} for text in own], "sentids": [1]}
        for name, own in CAPTIONS.items()
    ]
    (folder / "dataset.json").write_text(json.dumps({"dataset": "flickr8k", "images": images}))
    return folder / "dataset.json"


def write_flickr8k(folder: Path) -> Path:
    lines = [f"{name}#{number}\t{text}" for name, own in CAPTIONS.items() for number, text in enumerate(own)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, name in (("train", "a.jpg"), ("dev", "b.jpg"), ("test", "c.jpg")):
        (folder / f"Flickr_8k.{split}Images.txt").write_text(name + "\n")
    return folder / "Flickr8k.token.txt"


@pytest.mark.parametrize(
    "write", [write_csv, write_jsonl, write_imagefolder, write_uri_parquet, write_karpathy, write_flickr8k]
)
def test_every_kind_of_file_with_names_gives_the_same_labels(write: Callable[[Path], Path], tmp_path: Path) -> None:
    labels = read(write(tmp_path), tmp_path)
    assert as_dict(labels) == {name: (own, EXPECTED[name]) for name, own in CAPTIONS.items()}
    assert labels.table.schema == LABELS
    assert labels.table["uri"].to_pylist() == [str(tmp_path / name) for name in CAPTIONS]
    assert labels.table["image_id"].to_pylist() == list(CAPTIONS)
    assert labels.counts() == {"train": (1, 2), "validation": (1, 1), "test": (1, 2)}


def test_a_file_with_a_name_that_says_nothing_is_read_as_the_format_that_is_given(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path).rename(tmp_path / "labels.data")
    assert as_dict(read(path, tmp_path, labels_format="jsonl")) == as_dict(read(write_csv(tmp_path), tmp_path))


def read_colon_lines(config: LabelsConfig, run_folder: str, options: Mapping[str, Any] | None) -> LabelFiles:
    lines = [line.split(": ", 2) for line in Path(config.labels_path).read_text().splitlines()]
    rows = (LabelRow(name, name, f"/images/{name}", None, [text], split) for name, split, text in lines)
    return LabelFiles(config.labels_path, InputConfig(), rows)


def test_a_format_from_outside_the_package_is_read_by_suffix_and_flag_and_is_in_the_help_and_the_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = LabelFormat("colon", (".colon",), read_colon_lines, "a name, a split and a caption")
    monkeypatch.setitem(LABEL_FORMATS, "colon", entry)
    path = tmp_path / "labels.colon"
    path.write_text("\n".join(f"{name}: {SPLITS[name]}: {own[0]}" for name, own in CAPTIONS.items()))
    expected = {name: ([own[0]], EXPECTED[name]) for name, own in CAPTIONS.items()}
    assert as_dict(read(path, tmp_path)) == expected
    assert as_dict(read(path.rename(tmp_path / "labels.txt"), tmp_path, labels_format="colon")) == expected
    assert "colon: .colon, a name, a split and a caption" in describe_label_formats()
    with pytest.raises(
        ConfigError, match=r"--labels-format is xml; expected one of auto, parquet, .*, token, table, txt, colon$"
    ):
        read(path, tmp_path, labels_format="xml")
    (tmp_path / "notes.md").write_text("no labels")
    with pytest.raises(
        InputError, match=r"expected a file that ends in .*, \.colon, a caption table, a folder of \.parquet or"
    ):
        read(tmp_path / "notes.md", tmp_path)


def coco(folder: Path, name: str, images: Mapping[int, str]) -> Path:
    annotations = [
        {"image_id": number, "id": n, "caption": f"{file} {n}"} for number, file in images.items() for n in (1, 2)
    ]
    listed = [{"id": number, "file_name": file} for number, file in images.items()]
    (folder / name).write_text(json.dumps({"images": listed, "annotations": annotations}))
    return folder / name


def test_coco_names_its_images_below_the_image_root(tmp_path: Path) -> None:
    path = coco(tmp_path, "captions_train2017.json", {number: f"{number:012}.jpg" for number in range(100)})
    labels = read(path, tmp_path, image_root=str(tmp_path / "images"))
    first = labels.table.slice(0, 1).to_pylist()[0]
    assert (first["image_id"], first["uri"]) == ("0", f"{tmp_path}/images/000000000000.jpg")
    assert first["captions"] == ["000000000000.jpg 1", "000000000000.jpg 2"]
    counts = labels.counts()
    assert sum(count.num_images for count in counts.values()) == 100
    assert all(count.num_images for count in counts.values())


def test_files_that_are_called_after_splits_are_these_splits_each_with_its_own_root(tmp_path: Path) -> None:
    coco(tmp_path, "captions_train2017.json", {1: "1.jpg"})
    coco(tmp_path, "captions_val2017.json", {2: "2.jpg"})
    labels = read(tmp_path / "captions_{train,val}2017.json", tmp_path, image_root=str(tmp_path / "{train,val}2017"))
    assert [(row["uri"], row["split"]) for row in labels.table.to_pylist()] == [
        (f"{tmp_path}/train2017/1.jpg", "train"),
        (f"{tmp_path}/val2017/2.jpg", "validation"),
    ]
    with pytest.raises(ConfigError, match=r"is 3 folders, LABELS are 2 files; expected one folder, or one for each"):
        read(tmp_path / "captions_{train,val}2017.json", tmp_path, image_root="{a,b,c}")


def test_one_file_that_is_called_after_a_split_is_still_split(tmp_path: Path) -> None:
    path = coco(tmp_path, "captions_val2014.json", {number: f"{number}.jpg" for number in range(60)})
    assert read(path, tmp_path).counts()["train"].num_images > 40


def test_karpathys_restval_joins_train_and_filepath_leads_to_the_image(tmp_path: Path) -> None:
    image = {
        "filepath": "val2014",
        "filename": "x.jpg",
        "cocoid": 5,
        "split": "restval",
        "sentences": [{"raw": " a\n dog "}],
    }
    other = {**image, "filename": "y.jpg", "cocoid": 6, "split": "val"}
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [image, other]}))
    [first, second] = read(tmp_path / "dataset_coco.json", tmp_path, image_root="s3://bucket/coco").table.to_pylist()
    assert (first["image_id"], first["uri"], first["split"]) == ("5", "s3://bucket/coco/val2014/x.jpg", "train")
    assert (first["captions"], second["split"]) == (["a dog"], "validation")


def test_images_in_none_of_flickr8ks_lists_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_flickr8k(tmp_path)
    with path.open("a") as lines:
        lines.write("d.jpg#0\tnobody's image\nd.jpg#1\tstill\n")
    labels = read(path, tmp_path)
    assert "d.jpg" not in as_dict(labels)
    assert labels.left_out == {"in_no_split_list": 1}


# Images beside their captions


def write_image_parquet(path: Path, names: list[str], **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(seed=ord(name[0])), "path": name} for name in names]
    pq.write_table(pa.table({"image": images, "caption": [CAPTIONS[name] for name in names], **columns}), path)
    return path


def test_images_in_parquet_stay_there_and_splits_come_from_a_column(tmp_path: Path) -> None:
    names = list(CAPTIONS)
    path = write_image_parquet(tmp_path / "labels.parquet", names, image_id=names, fold=["train", "dev", "testing"])
    labels = read(path, tmp_path, split_column="fold")
    assert [split_key(key) for key in labels.table["key"].to_pylist()] == [(0, 0), (0, 1), (0, 2)]
    assert labels.table["uri"].null_count == 3
    assert labels.table["source"].to_pylist() == [f"{path}#{row}" for row in range(3)]
    assert dict(zip(labels.table["image_id"].to_pylist(), labels.table["split"].to_pylist(), strict=True)) == EXPECTED


def test_a_folder_of_parquet_as_hugging_face_exports_it_is_split_by_file_names(tmp_path: Path) -> None:
    write_image_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ["c.jpg"])
    write_image_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", ["a.jpg"])
    write_image_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ["b.jpg"])
    labels = read(tmp_path / "data", tmp_path)
    rows = labels.table.select(["image_id", "split"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("test-00000-of-00001.parquet#0", "test"),
        ("train-00000-of-00001.parquet#0", "train"),
        ("validation-00000-of-00001.parquet#0", "validation"),
    ]


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_samples_of_tars_have_their_captions_in_txt_or_json(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "train-0.tar",
        {
            "1.jpg": encoded(seed=1),
            "1.txt": b"a dog\nthe dog\n",
            "2.json": json.dumps({"captions": ["a cat", "the cat"], "split": "test"}).encode(),
            "2.jpg": encoded(seed=2),
            "3.txt": b"no image",
        },
    )
    write_tar(tmp_path / "val-0.tar", {"1.jpg": encoded(seed=3), "1.json": json.dumps({"caption": "a cow"}).encode()})
    labels = read(tmp_path / "{train,val}-0.tar", tmp_path, max_failed_share=0.5)
    assert [(row["captions"], row["split"]) for row in labels.table.to_pylist()] == [
        (["a dog", "the dog"], "train"),
        (["a cat", "the cat"], "test"),
        (["a cow"], "validation"),
    ]
    assert [row["image_id"] for row in labels.table.to_pylist()] == [
        "train-0.tar/1.jpg",
        "train-0.tar/2.jpg",
        "val-0.tar/1.jpg",
    ]
    assert labels.table["source"][0].as_py() == f"{tmp_path}/train-0.tar/1.jpg"
    assert labels.failed == {"missing": 1}


def test_the_demo_is_drawn_once_with_the_splits_of_its_scenes(tmp_path: Path) -> None:
    labels = read("demo", tmp_path, limit=3)
    assert labels.counts() == {"train": (3, 15), "validation": (3, 15), "test": (3, 15)}
    [file] = (tmp_path / "run" / "labels").glob("demo-*.parquet")
    before = file.stat().st_mtime_ns
    assert read("demo", tmp_path, limit=3).fingerprint == labels.fingerprint
    assert file.stat().st_mtime_ns == before


def write_row_a_caption(path: Path, images: list[bytes], columns: Mapping[str, Any], paths: list[Any]) -> Path:
    rows = [{"bytes": data, "path": name} for data, name in zip(images, paths, strict=True)]
    images = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    captions = [f"caption {number}" for number in range(len(rows))]
    pq.write_table(pa.table({"image": images, "caption": captions, **columns}), path, row_group_size=7)
    return path


@pytest.mark.parametrize("has_paths", [True, False])
def test_a_image_that_stands_in_a_row_a_caption_is_one_image_in_one_split(has_paths: bool, tmp_path: Path) -> None:
    images = [encoded(seed=number // 5) for number in range(200)]
    names = [f"{number // 5}.jpg" if has_paths else None for number in range(200)]
    path = write_row_a_caption(tmp_path / "labels.parquet", images, {}, names)
    labels = read(path, tmp_path, validation_share=0.3, test_share=0.2)
    assert labels.table.num_rows == 40
    assert {len(own) for own in labels.table["captions"].to_pylist()} == {5}


def test_images_of_one_path_and_other_bytes_are_two_images(tmp_path: Path) -> None:
    path = write_row_a_caption(
        tmp_path / "labels.parquet", [encoded(seed=1), encoded(seed=2)], {"split": ["train"] * 2}, ["0.jpg", "0.jpg"]
    )
    assert read(path, tmp_path).table.num_rows == 2


def test_an_image_id_that_stands_for_two_images_is_an_error_that_names_both(tmp_path: Path) -> None:
    for shard in (0, 1):
        images = [encoded(seed=10 * shard + number) for number in range(3)]
        write_row_a_caption(tmp_path / f"{shard}.parquet", images, {"image_id": [0, 1, 2]}, [None] * 3)
    with pytest.raises(InputError, match=r"image_id 0 means two images, .*0.parquet#0 and .*1.parquet#0; expected one"):
        read(tmp_path, tmp_path)


def test_an_image_id_in_several_shards_is_one_image_where_the_bytes_are_equal(tmp_path: Path) -> None:
    for shard in (0, 1):
        write_row_a_caption(tmp_path / f"{shard}.parquet", [encoded(seed=1)], {"image_id": ["a"]}, [None])
    assert read(tmp_path, tmp_path, validation_share=0, test_share=0).counts()["train"] == (1, 2)


def test_a_list_of_one_image_is_that_image_and_one_of_several_has_no_caption_of_its_own(tmp_path: Path) -> None:
    kinds = {"bytes": [[b"a"], [b"b"]], "urls": [["a.jpg"], ["b.jpg"]]}
    for kind, images in kinds.items():
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"images": images, "caption": ["x", "y"]}), path)
        labels = read(path, tmp_path / f"run-{kind}")
        assert sorted(captions for captions, _ in as_dict(labels).values()) == [["x"], ["y"]]
    rows = [{"image": [f"{name}.jpg"], "caption": name} for name in "abc"]
    several = {"image": ["d.jpg", "e.jpg"], "caption": "d and e"}
    labels = read(jsonl(tmp_path, [*rows, several]), tmp_path / "run-json", max_failed_share=0.5)
    assert (len(as_dict(labels)), labels.failed) == (3, {"several_images": 1})
    pq.write_table(pa.table({"images": [[b"a", b"b"]], "caption": ["x"]}), tmp_path / "several.parquet")
    with pytest.raises(InputError, match="expected one image a row, as a caption says what one image shows"):
        read(tmp_path / "several.parquet", tmp_path / "run")


def test_urls_that_are_stored_as_bytes_name_the_images_of_labels(tmp_path: Path) -> None:
    urls = pa.array([f"{name}".encode() for name in CAPTIONS], pa.binary())
    for name in CAPTIONS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(seed=ord(name[0])))
    pq.write_table(pa.table({"url": urls, "caption": list(CAPTIONS.values())}), tmp_path / "l.parquet")
    labels = read(tmp_path / "l.parquet", tmp_path, validation_share=0, test_share=0)
    assert labels.table["uri"].to_pylist() == [str(tmp_path / name) for name in CAPTIONS]


def test_images_with_distinct_names_are_not_read(tmp_path: Path) -> None:
    names = list(CAPTIONS)
    paths = [
        write_image_parquet(tmp_path / "a.parquet", names),
        write_image_parquet(tmp_path / "b.parquet", names, image_id=[f"another-{name}" for name in names]),
    ]
    for path in map(str, paths):
        assert read_digests([path], "image", {}, id_column="image_id") == {path: {}}
        assert read(path, tmp_path, validation_share=0, test_share=0).table.num_rows == 3


# Which image falls where


def jsonl(folder: Path, rows: list[Mapping[str, Any]]) -> Path:
    path = folder / "labels.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_train_split_without_a_validation_split_gives_some_of_its_images(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.jpg", "caption": "x", "split": "test" if n < 10 else "train"} for n in range(100)]
    counts = read(jsonl(tmp_path, rows), tmp_path, validation_share=0.3).counts()
    assert counts["test"].num_images == 10
    assert 10 < counts["validation"].num_images < 50


def test_a_long_file_logs_every_fifteen_seconds_how_many_rows_were_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"image": f"{n}.jpg", "caption": "x", "split": ("train", "val")[n % 2]} for n in range(10)]
    seconds = itertools.count(step=4.0)  # a row takes as long
    caplog.set_level(logging.INFO, "captioner")
    path = jsonl(tmp_path, rows)
    read_labels(LabelsConfig(labels_path=str(path)), str(tmp_path / "run"), clock=lambda: next(seconds))
    assert [record.getMessage() for record in caplog.records if "rows=" in record.getMessage()] == [
        f"labels={path} rows=4 rows_per_s=0",
        f"labels={path} rows=8 rows_per_s=0",
    ]


def test_a_limit_takes_the_first_images_of_each_split(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.jpg", "caption": "x", "split": ("train", "val")[n % 2]} for n in range(10)]
    labels = read(jsonl(tmp_path, rows), tmp_path, limit=2)
    assert labels.table["image_id"].to_pylist() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert labels.left_out == {"limit": 6}


def test_images_beyond_a_limit_do_not_count_as_failures(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.jpg", "caption": "x" if n % 50 else "", "split": "train"} for n in range(1, 101)]
    labels = read(jsonl(tmp_path, rows), tmp_path, limit=2, validation_share=0)
    assert labels.failed == {"no_caption": 2}
    labels.check_failed({})
    with pytest.raises(InputError, match=r"1 of 2 images .* \(1 missing\)"):
        labels.check_failed({"missing": 1})


def test_an_image_in_two_splits_is_an_error_that_names_it(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": "x", "split": "train"}, {"image": "a.jpg", "caption": "y", "split": "val"}]
    with pytest.raises(InputError, match=r"image a.jpg is in two splits, train and validation; expected each image in"):
        read(jsonl(tmp_path, rows), tmp_path)


def test_two_names_of_one_file_are_one_image(tmp_path: Path) -> None:
    rows = [
        {"image_id": "one", "image": "a.jpg", "caption": "x", "split": "train"},
        {"image_id": "two", "image": "./a.jpg", "caption": "y", "split": "test"},
    ]
    with pytest.raises(InputError, match=r"image one is in two splits, train and test"):
        read(jsonl(tmp_path, rows), tmp_path)
    rows[1]["split"] = "train"
    assert read(jsonl(tmp_path, rows), tmp_path).counts()["train"] == (1, 2)


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    good = [json.dumps({"image": f"{n}.jpg", "caption": "x", "split": "train"}) for n in range(9)]
    bad = [
        '{"image": ',
        '{"image": "e.jpg", "caption": " "}',
        '{"image": "", "caption": "x"}',
        '{"image": "f", "caption": 7}',
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join([*good, *bad]))
    labels = read(tmp_path / "labels.jsonl", tmp_path, max_failed_share=0.4)
    assert labels.failed == {"unreadable": 2, "no_caption": 1, "no_image": 1}
    with pytest.raises(
        InputError, match=r"4 of 13 images .* \(1 no_caption, 1 no_image, 2 unreadable\), more than --max-"
    ):
        read(tmp_path / "labels.jsonl", tmp_path, max_failed_share=0.3)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "coco.json",
            json.dumps(
                {
                    "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(9)],
                    "annotations": [{"image_id": n, "caption": "x"} for n in range(8)] + [{"image_id": 8}],
                }
            ),
            "has image_id; expected a column with images and one with captions",
        ),
        (
            "karpathy.json",
            json.dumps(
                {
                    "images": [
                        *({"filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": "x"}]} for n in range(8)),
                        {"filename": "8.jpg", "split": "train"},
                    ]
                }
            ),
            "has an image without filename and sentences",
        ),
        (
            "long.csv",
            "image,caption\n0.jpg,a cat, a dog\n" + "".join(f"{n}.jpg,x\n" for n in range(1, 9)),
            "line 2: it has 3 values, the header 2",
        ),
    ],
)
def test_one_bad_record_is_counted_and_no_end(name: str, content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    options = {"validation_share": 0, "test_share": 0}
    labels = read(tmp_path / name, tmp_path, max_failed_share=0.2, **options)
    assert labels.failed == {"unreadable": 1}
    assert labels.table.num_rows == 8
    with pytest.raises(InputError, match=rf"1 of 9 images .* \(1 unreadable\).*{problem}"):
        read(tmp_path / name, tmp_path, max_failed_share=0.1, **options)


def test_a_quote_that_swallows_rows_of_labels_is_an_error_for_nobody_knows_how_many(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'image,caption\n0.jpg,x\n1.jpg,"x\n' + "".join(f"{n}.jpg,x\n" for n in range(2, 99))
    )
    with pytest.raises(InputError, match=r'a.csv, line 3: a value that begins with " never ends; .* runs to line 100'):
        read(tmp_path / "a.csv", tmp_path, max_failed_share=0.5)


@pytest.mark.parametrize("flag", ["image_column", "caption_column", "split_column"])
@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_uri_parquet])
def test_a_column_that_is_named_and_not_there_is_an_error(
    flag: str, write: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no_such|image_column no_such"):
        read(write(tmp_path), tmp_path, **{flag: "no_such"})


def test_a_split_column_that_no_sample_of_a_tar_has_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": encoded(seed=1), "1.json": b'{"caption": "a dog", "split": "train"}'})
    with pytest.raises(InputError, match=r"no row of .*a.tar has a split by --split-column spilt; expected train"):
        read(tmp_path / "a.tar", tmp_path, split_column="spilt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, r"none.json does not exist; expected a file, a folder"),
        (
            "notes.md",
            "a dog",
            r"notes.md is no file with captions and holds none; expected a file that ends in",
        ),
        (
            "a.csv",
            "image,words\na.jpg,x\n",
            r"a.csv has image, words; expected a column with images and one with captions",
        ),
        (
            "x.jsonl",
            '{"image": "data:image/png;base64,AAAA", "caption": "x"}\n',
            r"x.jsonl, caption row 1 holds an image itself, as data:image/png;base64,.*; expected its URI",
        ),
        ("b.csv", "image,caption,split\na.jpg,x,held-out\n", r"image a.jpg has the split 'held-out'; expected train,"),
        ("c.csv", "image,caption,split\na.jpg,x,test\n", r"c.csv has no image of the split train; expected images"),
        (
            "d.csv",
            "image_id,image,caption\n1,a.jpg,x\n1,b.jpg,y\n",
            r"image_id 1 means two images, .*a.jpg and .*b.jpg",
        ),
        ("a.json", '{"dog": 1}', r"a.json has neither annotations nor images"),
        (
            "a.token",
            "a.jpg a dog\n",
            r"1 of 1 images .* \(1 unreadable\).*line 1 is 'a.jpg a dog'; expected `name.jpg#0`",
        ),
        ("a.tar", "no tar", r"a.tar: none of its 1 files can be read"),
        ("a.parquet", "PAR1", r"a.parquet: none of its 1 files can be read"),
    ],
)
def test_what_holds_no_labels_is_an_error_that_names_it(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"validation_share": 0.6, "test_share": 0.5},
            r"--validation-share and --test-share together is 1.1; expected",
        ),
        ({"max_failed_share": 2}, r"--max-failed-share is 2; expected 0 to 1"),
        ({"limit": 0}, r"--limit is 0; expected at least 1"),
    ],
)
def test_a_share_out_of_range_is_an_error(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelsConfig(**options)


def test_the_command_line_and_a_config_file_name_the_labels_alike(tmp_path: Path) -> None:
    (tmp_path / "fit.yaml").write_text("labels_path: labels.csv\ncaption_column: text\nvalidation_share: 0.1\n")
    config = parse(LabelsConfig, ["--config", str(tmp_path / "fit.yaml")])
    assert config == parse(LabelsConfig, ["labels.csv", "--caption-column", "text", "--validation-share", "0.1"])
    assert (config.labels_path, config.caption_column) == ("labels.csv", "text")
