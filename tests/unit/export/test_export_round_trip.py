"""What an export writes is read again: as labels of a fit, as captions to evaluate, as images to caption."""

from pathlib import Path
from typing import Any

import pytest

from captioner.config import EvaluateConfig, InputConfig, LabelsConfig
from captioner.errors import InputError
from captioner.evaluation import evaluate
from captioner.inputs import Limits, freeze, read_unit
from captioner.training.labels import read_labels
from tests.unit.export.conftest import CAPTIONS, NAMES, Export, write_named_images

TEXT_OF = {name: text.replace("\n", " ") for name, text in zip(NAMES, CAPTIONS, strict=True) if text}
LABELS = {
    "jsonl": ("captions-00000.jsonl", True),
    "csv": ("captions-00000.csv", True),
    "coco": ("captions-00000.json", True),
    "txt": ("", True),
    "webdataset": ("", False),
    "hf": ("", False),
    "hf-folder": ("", False),
}
"""Format -> the file below OUT that is given as LABELS, and whether it takes --image-root."""


def labels_of(tmp_path: Path, name: str, **options: Any) -> list[tuple[str, list[str]]]:
    """Return the captions of every image that the labels have, in the order of captions."""
    file, needs_root = LABELS[name]
    if needs_root:
        options["image_root"] = str(tmp_path / "images")
    path = str(tmp_path / "out" / file) if file else str(tmp_path / "out")
    labels = read_labels(LabelsConfig(labels_path=path, **options), str(tmp_path / "run"))
    assert not labels.failed
    rows = labels.table.to_pylist()
    assert all(Path(row["uri"]).exists() for row in rows if row["uri"])
    return sorted([" ".join(text.split()) for text in row["captions"]] for row in rows)


@pytest.mark.parametrize("name", LABELS)
def test_an_export_is_labels_of_a_fit(name: str, export: Export, tmp_path: Path) -> None:
    export(format=name)
    assert labels_of(tmp_path, name) == sorted([text] for text in TEXT_OF.values())


@pytest.mark.parametrize("name", ["coco", "txt", "webdataset"])
def test_several_captions_of_an_image_come_back(name: str, export: Export, tmp_path: Path) -> None:
    export(format=name, captions="all", where="key = 2")
    assert labels_of(tmp_path, name) == [["a cat", "one cat"]]


@pytest.mark.parametrize("name", ["webdataset", "hf", "hf-folder"])
def test_an_export_is_an_input_of_the_same_images(name: str, export: Export, tmp_path: Path) -> None:
    export(format=name, rows_per_file=3)
    access = InputConfig()
    frozen = freeze(str(tmp_path / "out"), access, str(tmp_path / "run"))
    found = []
    for unit in frozen.units:
        for rows in read_unit(unit, frozen.columns, access, run_folder=str(tmp_path / "run"), limits=Limits()):
            for row in rows.to_pylist():
                assert row["reason"] is None
                found.append(row["data"] if row["data"] is not None else Path(row["uri"]).read_bytes())
    assert found == [(tmp_path / "images" / image).read_bytes() for image in TEXT_OF]


@pytest.mark.parametrize("name", ["jsonl", "coco"])
def test_an_export_is_references_of_the_captions_that_it_has(name: str, export: Export, tmp_path: Path) -> None:
    export(format=name)
    file = tmp_path / "out" / LABELS[name][0]
    found = evaluate(EvaluateConfig(captions=str(tmp_path / "it's a [1] table*"), references=str(file)))
    assert (found["images"], found["captions_unmatched"], found["bleu_1"]) == (4, 0, 1.0)


def test_a_text_without_an_image_and_a_single_text_are_told(tmp_path: Path) -> None:
    folder = write_named_images(tmp_path / "images", ["a.jpg"])
    (folder / "a.txt").write_text("a dog\n\nthe dog\n")
    (folder / "b.txt").write_text("a cat\n")
    labels = read_labels(LabelsConfig(labels_path=str(folder), max_failed_share=1), str(tmp_path / "run"))
    assert labels.table.column("captions").to_pylist() == [["a dog", "the dog"]]
    assert labels.failed == {"no_image": 1}
    with pytest.raises(InputError, match=r"a\.txt is a single file; expected a folder of images with \.txt beside"):
        read_labels(LabelsConfig(labels_path=str(folder / "a.txt")), str(tmp_path / "other"))
