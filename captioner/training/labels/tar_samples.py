"""Labels in WebDataset tars: samples of an image with a .txt or a .json beside it."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from captioner.config import InputConfig, LabelsConfig
from captioner.evaluation.caption_files import CAPTION_COLUMN_NAMES, texts_of
from captioner.inputs import Columns, Limits, Unit, freeze, read_unit
from captioner.schema import RejectReason
from captioner.storage import Location, urls
from captioner.storage.faults import Fault, StoreError
from captioner.storage.json_text import parse_json
from captioner.training.labels.rows import LabelFiles, LabelRow, access_of, caption_column_names
from captioner.training.labels.units import rows_of_units

__all__ = ["read_tar_samples"]


def read_tar_samples(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None) -> LabelFiles:
    """Return the samples of all tars, which are frozen below `run_folder`."""
    texts = (*caption_column_names(config, ("txt", *CAPTION_COLUMN_NAMES)), config.split_column or "split")
    access = access_of(
        config,
        input_format="webdataset",
        image_column=config.image_column,
        keep_columns=tuple(f"{name}=label_{number}" for number, name in enumerate(texts)),
    )
    frozen = freeze(config.labels_path, access, Location(run_folder, output_options) / "labels")
    rows = rows_of_units(frozen, partial(_samples, columns=frozen.columns, access=access))
    return LabelFiles(config.labels_path, access, rows, frozen)


def _samples(unit: Unit, columns: Columns, access: InputConfig) -> Iterator[LabelRow]:
    """Yield the samples of a tar; no image is held."""
    limits = Limits(max_image_bytes=0)
    for table in read_unit(unit, columns, access, run_folder="", limits=limits):
        for row in table.to_pylist():
            yield _of_sample(row, urls.shown(unit.path) + row["image_id"].removeprefix(unit.name))


def _of_sample(row: Mapping[str, Any], source: str) -> LabelRow:
    if row["reason"] in (RejectReason.FETCH_FAILED, RejectReason.CHANGED):
        raise StoreError(Fault(RejectReason.FETCH_FAILED, f"{source}: {row['detail']}", is_transient=True))
    if row["reason"] != RejectReason.TOO_LARGE:  # an image that is there: none may be held
        return LabelRow(problem=row["reason"], detail=f"{source}: {row['detail']}")
    *texts, split = (row[name] for name in row if name.startswith("label_"))
    captions = next((found for text in texts if text and (found := _texts_in(text))), [])
    return LabelRow(row["image_id"], source, None, row["key"], captions, split or "")


def _texts_in(text: str) -> list[str]:
    """Return the captions in a member: a JSON list of texts, or else a caption a line."""
    if text.startswith("["):
        with suppress(ValueError):
            return texts_of(parse_json(text)) or []
    return text.splitlines()
