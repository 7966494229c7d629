"""Labels in Parquet files: a column of images as bytes or struct<bytes, path>, or of their URIs."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from captioner.config import InputConfig, LabelsConfig
from captioner.errors import InputError
from captioner.evaluation.caption_files import CAPTION_FORMATS, ColumnNames, image_name, read_records, texts_of
from captioner.inputs import Frozen, Unit, freeze
from captioner.inputs.access import open_input, store_options
from captioner.inputs.columns import holds_uris, is_list, item_type, plain_type
from captioner.inputs.parquet import open_parquet
from captioner.schema import row_key
from captioner.storage import Location, urls
from captioner.training.labels.image_digests import read_digests
from captioner.training.labels.named_images import read_named_images
from captioner.training.labels.rows import IMAGE_ID, LabelFiles, LabelRow, access_of, label_columns
from captioner.training.labels.units import rows_of_units

__all__ = ["read_parquet_images"]


def read_parquet_images(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None) -> LabelFiles:
    """Return the rows of all files; those with images in them are frozen below `run_folder`."""
    access = access_of(config, input_format="parquet", image_column=config.image_column)
    frozen = freeze(config.labels_path, access, Location(run_folder, output_options) / "labels")
    kind = _image_type(frozen, access)
    if holds_uris(str(frozen.columns.image), item_type(kind)):
        named = replace(config, image_column=frozen.columns.image) if is_list(kind) else config
        files = read_named_images(named, run_folder, output_options, read_as=CAPTION_FORMATS["parquet"])
        return files._replace(access=access)
    _check_one_a_row(frozen)
    paths = [unit.path for unit in frozen.units if unit.reject is None]
    image = frozen.columns.image
    assert image is not None
    digests = read_digests(paths, image, store_options(access, paths[0]), id_column=IMAGE_ID)
    rows = rows_of_units(frozen, partial(_rows, config=config, access=access, digests=digests))
    return LabelFiles(config.labels_path, access, rows, frozen)


def _check_one_a_row(frozen: Frozen) -> None:
    """Raise InputError where a row has several images: which of them a caption is of is not known."""
    if unit := next((unit for unit in frozen.units if unit.num_further), None):
        raise InputError(
            f"{urls.shown(unit.path)}: rows have up to {unit.num_further + 1:,} images in the lists of column"
            f" {frozen.columns.image}; expected one image a row, as a caption says what one image shows: write each"
            " image with its caption as a row"
        )


def _image_type(frozen: Frozen, access: InputConfig) -> pa.DataType:
    unit = next(unit for unit in frozen.units if unit.reject is None)
    file, _ = open_parquet(open_input(access, unit.path), unit.path)
    with file:
        return plain_type(file.schema_arrow.field(str(frozen.columns.image)).type)


def _rows(
    unit: Unit, config: LabelsConfig, access: InputConfig, digests: Mapping[str, Mapping[int, str]]
) -> Iterator[LabelRow]:
    if unit.reject is not None:
        yield LabelRow(problem=str(unit.reject.reason), detail=f"{unit.name}: {unit.reject.detail}")
        return
    records = read_records(unit.path, store_options(access, unit.path), _columns(config), CAPTION_FORMATS["parquet"])
    for position, record in enumerate(records):
        source = f"{urls.shown(unit.path)}#{position}"
        captions = texts_of(record.captions)
        if captions is None:
            yield LabelRow(problem="unreadable", detail=f"{source} has the caption {str(record.captions)[:40]!r}")
            continue
        name = image_name(record.image_id)
        yield LabelRow(
            image_id=name or f"{unit.name}#{position}",
            source=source,
            key=row_key(unit.ordinal, position),
            captions=captions,
            split=str(record.split or ""),
            digest=digests[unit.path].get(position, ""),
            is_named=bool(name),
        )


def _columns(config: LabelsConfig) -> ColumnNames:
    columns = label_columns(config)
    flags = {field: flag for field, flag in columns.flags.items() if field != "file_name"}
    return replace(columns, file_name=(), flags=flags, has_image=True)
