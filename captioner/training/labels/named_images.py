"""Labels that name their images: rows of any format of captions, with a path or a URI of an image."""

from collections.abc import Iterator, Mapping
from typing import Any

from captioner.config import LabelsConfig
from captioner.errors import ConfigError
from captioner.evaluation.caption_files import CaptionFormat, Record, has_suffix, image_name, read_records, texts_of
from captioner.inputs.access import store_options
from captioner.inputs.payloads import check_uri
from captioner.inputs.selection import select
from captioner.storage import open_store, urls
from captioner.storage.patterns import expand_braces
from captioner.training.labels.rows import LabelFiles, LabelRow, access_of, label_columns, splits_of_files
from captioner.training.labels.splits import read_split_lists

__all__ = ["read_named_images"]


def read_named_images(
    config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None, *, read_as: CaptionFormat
) -> LabelFiles:
    """Return the rows of all files of one format, each image by its URI."""
    del run_folder, output_options  # there is nothing to freeze: each image has a URI
    return LabelFiles(config.labels_path, access_of(config), _of_files(config, read_as))


def _of_files(config: LabelsConfig, read_as: CaptionFormat) -> Iterator[LabelRow]:
    selection = select(config.labels_path, access_of(config))
    found = [file for file in selection.files if file.is_named or has_suffix(file.entry.url, read_as.suffixes)]
    files = [file.entry.url for file in found]
    roots = [urls.absolute(root) for root in expand_braces(config.image_root)] if config.image_root else []
    if len(roots) > 1 and len(roots) != len(files):
        raise ConfigError(
            f"--image-root {config.image_root} is {len(roots)} folders, LABELS are {len(files)} files; expected one"
            " folder, or one for each file"
        )
    splits = splits_of_files(files)
    for number, url in enumerate(files):
        root = roots[number % len(roots)] if roots else urls.parent(url)
        yield from _of_file(url, root, splits.get(url, ""), config, read_as)


def _of_file(url: str, root: str, split: str, config: LabelsConfig, read_as: CaptionFormat) -> Iterator[LabelRow]:
    options = store_options(access_of(config), url)
    store = open_store(url, options)
    lists = read_split_lists(store, urls.parent(url)) if read_as.has_split_lists else {}
    records = read_records(url, options, label_columns(config), read_as)
    for number, record in enumerate(records, 1):
        row = _of_record(record, root, f"{urls.shown(url)}, caption row {number}")
        if lists and not row.problem:
            listed = lists.get(str(record.file_name))
            row = row._replace(split=listed or "", left_out="" if listed else "in_no_split_list")
        yield row if row.split else row._replace(split=split)


def _of_record(record: Record, root: str, where: str) -> LabelRow:
    if record.problem:
        return LabelRow(problem="unreadable", detail=record.problem)
    image_id = image_name(record.image_id)
    name = image_id if record.file_name is None else image_name(_only(record.file_name))
    captions = texts_of(record.captions)
    if isinstance(record.file_name, list) and len(record.file_name) > 1:
        seen = f"{where} has {len(record.file_name)} images"
        return LabelRow(problem="several_images", detail=f"{seen}; expected one: a caption says what one image shows")
    if not name:
        return LabelRow(problem="no_image", detail=f"{where} has no image")
    if captions is None:
        seen = str(record.captions)[:40]
        return LabelRow(problem="unreadable", detail=f"{where} has the caption {seen!r}, not a text or a list of them")
    check_uri(name, where)
    uri = urls.resolve(name, root)
    return LabelRow(image_id or urls.shown(name), urls.shown(uri), uri, None, captions, str(record.split or ""))


def _only(value: Any) -> Any:
    """Return the item of a list of one, else the value."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
