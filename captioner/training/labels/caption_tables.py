"""Labels in a caption table of our own: the captions that a job wrote of its images, or those that SQL selects.

To distil one captioner into another, or to teach a style from captions that were chosen or edited. Where the images
are, the table's frozen input says.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from captioner.config import ImageAccessConfig, LabelsConfig
from captioner.schema import split_key
from captioner.storage import Location, urls
from captioner.storage.faults import output_errors
from captioner.training.labels.rows import LabelFiles, LabelRow, access_of

if TYPE_CHECKING:
    import pyarrow as pa

    from captioner.inputs import Unit
    from captioner.tables import CaptionTable
    from captioner.tables.table_images import TableImages

__all__ = ["hint_at_table", "is_caption_table", "read_caption_table"]


def is_caption_table(config: LabelsConfig) -> bool:
    """Return whether LABELS are the OUTPUT of a caption job. Raises StoreError."""
    from captioner.tables.table import table_around  # here and below, not above: the help page needs none of it

    place = Location(config.labels_path, config.storage_options)
    return table_around(place) == place.folder


def hint_at_table(config: LabelsConfig) -> str:
    """Return the table that LABELS are a folder of, as a piece of a message; empty where they are none's."""
    from captioner.tables import table

    return table.hint_at_table(Location(config.labels_path, config.storage_options))


def read_caption_table(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None) -> LabelFiles:
    """Return a row for each caption of the table that `--where` selects. Raises ConfigError for wrong SQL."""
    from captioner.query.views import read_rows
    from captioner.tables import open_table
    from captioner.tables.table_images import TableImages

    del run_folder, output_options  # the table's input is frozen already
    table = open_table(Location(config.labels_path, config.storage_options))
    images = TableImages.of(table, ImageAccessConfig(image_root=config.image_root or ""))
    found = read_rows(table, _sql(table, config))
    in_files = images.frozen.kind in ("parquet", "webdataset")
    rows = _in_files(found, images) if in_files else _by_uri(found, images, table.location)
    return LabelFiles(config.labels_path, access_of(config), rows, images.frozen if in_files else None)


def _sql(table: "CaptionTable", config: LabelsConfig) -> str:
    """Return the SELECT of the flags. Raises InputError for a column that the table lacks, or that holds no texts."""
    from captioner.query.texts import text_columns, texts_sql

    columns = {config.caption_column or "caption": "--caption-column"}
    if config.split_column:
        return texts_sql(table, columns | {config.split_column: "--split-column"}, where=config.where)
    split = "split" if "split" in text_columns(table) else "NULL"
    return texts_sql(table, columns, where=config.where, others=[split])


def _by_uri(found: "pa.Table", images: "TableImages", table: Location) -> Iterator[LabelRow]:
    """Yield the rows of images that have a URI each."""
    keys = found.column(0).to_pylist()
    with output_errors(table):
        paths = images.paths(keys)
    for key, image_id, caption, split in zip(keys, *_texts(found), strict=True):
        uri = paths.get(key)
        if uri is None:
            yield LabelRow(problem="no_image", detail=f"{image_id} is not in the input of the table any more")
        else:
            yield LabelRow(image_id, urls.shown(uri), uri, None, [caption or ""], split or "")


def _in_files(found: "pa.Table", images: "TableImages") -> Iterator[LabelRow]:
    """Yield the rows of images inside Parquet files or tars."""
    units = {unit.ordinal: unit for unit in images.frozen.units}
    for key, image_id, caption, split in zip(found.column(0).to_pylist(), *_texts(found), strict=True):
        source = _source(units[split_key(key)[0]], key, image_id)
        yield LabelRow(image_id, source, None, key, [caption or ""], split or "")


def _source(unit: "Unit", key: int, image_id: str) -> str:
    """Return the permanent name of an image inside a file."""
    if unit.kind == "parquet":
        return f"{urls.shown(unit.path)}#{split_key(key)[1]}"
    return urls.shown(unit.path) + image_id.removeprefix(unit.name)


def _texts(found: "pa.Table") -> list[list[str | None]]:
    return [found.column(number).to_pylist() for number in (1, 2, 3)]
