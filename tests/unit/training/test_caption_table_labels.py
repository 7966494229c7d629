"""A caption table of our own as LABELS: its images, and the captions of it that a condition selects."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import ImageConfig, LabelsConfig, ModelConfig
from captioner.errors import ConfigError, InputError
from captioner.model.bundle import describe
from captioner.training.features.feature_plan import plan_features
from captioner.training.labels import Labels, read_labels
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images
from tests.sample_images import encoded

NUM_IMAGES = 6
CAPTIONS = [f"a dog number {number}" for number in range(NUM_IMAGES)]


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Five captions and a failure of six files; scores rise."""
    images = write_images(tmp_path / "images", NUM_IMAGES)
    found, _ = begin_table(str(tmp_path / "captions"), str(images))
    rows = [caption_row(n, str(images / f"{n:03d}.jpg"), CAPTIONS[n], clip_score=n / 10) for n in range(5)]
    add_part(found, [*rows, failure_row(5, str(images / "005.jpg"), "corrupt")])
    return str(tmp_path / "captions")


def labels_of(table: str, tmp_path: Path, **settings: object) -> Labels:
    split = {"validation_share": 0.0, "test_share": 0.0}
    return read_labels(LabelsConfig(labels_path=table, **(split | settings)), str(tmp_path / "run"))  # type: ignore[arg-type]


def pairs(labels: Labels) -> dict[str, list[str]]:
    names = [uri.rpartition("/")[2] for uri in labels.table["uri"].to_pylist()]
    return dict(zip(names, labels.table["captions"].to_pylist(), strict=True))


def test_its_captions_are_labels_of_its_images(table: str, tmp_path: Path) -> None:
    labels = labels_of(table, tmp_path)
    assert pairs(labels) == {f"{n:03d}.jpg": [CAPTIONS[n]] for n in range(5)}
    assert labels.frozen is None, "each image has a URI, so that patches can be read of it"
    assert all(Path(uri.removeprefix("file://")).is_file() for uri in labels.table["uri"].to_pylist())


def test_a_condition_selects_captions(table: str, tmp_path: Path) -> None:
    assert set(pairs(labels_of(table, tmp_path, where="clip_score > 0.25 -- the best"))) == {"003.jpg", "004.jpg"}
    assert set(pairs(labels_of(table, tmp_path, where="caption LIKE '%1' OR caption LIKE '%2'"))) == {
        "001.jpg",
        "002.jpg",
    }


def test_another_selection_is_another_fit(table: str, tmp_path: Path) -> None:
    every, best = labels_of(table, tmp_path), labels_of(table, tmp_path, where="clip_score > 0.25")
    assert every.fingerprint != best.fingerprint


WRONG = {
    "no column": ("nothing > 2", ConfigError, "nothing"),
    "a writer": ("true); DROP TABLE captions; SELECT (1", ConfigError, "3 statements; expected one SELECT"),
    "another file": ("(SELECT count(*) FROM '/etc/passwd') > 0", ConfigError, "passwd"),
    "no caption left": ("false", InputError, "no image of the split train"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_condition_that_is_none_is_refused(table: str, tmp_path: Path, name: str) -> None:
    where, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        labels_of(table, tmp_path, where=where)


def test_a_condition_without_a_caption_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,caption\na.jpg,a dog\n")
    with pytest.raises(ConfigError, match=r"--where is true, but \S+ is no caption table; expected the OUTPUT of"):
        labels_of(str(tmp_path / "labels.csv"), tmp_path, where="true")


def test_a_column_that_is_not_there_or_holds_no_texts_is_named(table: str, tmp_path: Path) -> None:
    for name in ("short", "clip_score"):
        with pytest.raises(InputError, match=rf"has no column {name} of texts, for --caption-column; it has image_id,"):
            labels_of(table, tmp_path, caption_column=name)
    with pytest.raises(InputError, match="has no column part of texts, for --split-column"):
        labels_of(table, tmp_path, split_column="part")


def test_an_image_that_moved_is_found_below_the_root(table: str, tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "moved")
    labels = labels_of(table, tmp_path, image_root=str(tmp_path / "moved"))
    assert {str(Path(uri.removeprefix("file://")).parent) for uri in labels.table["uri"].to_pylist()} == {
        str(tmp_path / "moved")
    }


def test_images_inside_tars_are_read_from_there(tmp_path: Path) -> None:
    images = [encoded(seed=seed) for seed in range(3)]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for number, image in enumerate(images):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    table, frozen = begin_table(str(tmp_path / "captions"), str(tmp_path / "images.tar"))
    unit = frozen.units[0].name
    add_part(table, [caption_row(n, f"{unit}/{n}.jpg", CAPTIONS[n]) for n in range(3)])
    labels = labels_of(str(tmp_path / "captions"), tmp_path)
    plan = plan_features(labels, describe("demo"), ModelConfig(), ImageConfig(), run_folder=str(tmp_path / "run"))
    read = [row for piece in plan.slices() for rows in plan.reader.read(piece) for row in rows.to_pylist()]
    assert [row["data"] for row in read] == images
    assert [row["source"] for row in read] == labels.table["source"].to_pylist()
    assert [row["image_id"] for row in read] == labels.table["image_id"].to_pylist()


def test_images_inside_parquet_files_are_read_from_there(tmp_path: Path) -> None:
    images = [encoded(seed=seed) for seed in range(3)]
    rows = pa.table({"image": images, "id": ["a", "b", "c"], "split": ["train", "train", "validation"]})
    pq.write_table(rows, tmp_path / "images.parquet")
    columns = {"id_column": "id", "keep_columns": ("split",)}
    table, frozen = begin_table(str(tmp_path / "captions"), str(tmp_path / "images.parquet"), **columns)
    made = [caption_row(n, "abc"[n], CAPTIONS[n], split=rows["split"][n].as_py()) for n in range(3)]
    add_part(table, made, frozen.columns.kept)
    labels = labels_of(str(tmp_path / "captions"), tmp_path)
    assert labels.table["split"].to_pylist() == ["train", "train", "validation"]
    assert labels.table["image_id"].to_pylist() == ["a", "b", "c"]
    plan = plan_features(labels, describe("demo"), ModelConfig(), ImageConfig(), run_folder=str(tmp_path / "run"))
    read = [row for piece in plan.slices() for rows in plan.reader.read(piece) for row in rows.to_pylist()]
    assert [row["data"] for row in read] == images
    assert [row["source"] for row in read] == labels.table["source"].to_pylist()
