"""Labels as text files: NAME.txt beside NAME.jpg, or in a tree of its own with --image-root; a caption a line."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from captioner.config import InputConfig, LabelsConfig
from captioner.errors import InputError
from captioner.inputs.selection import Selection, is_hidden, select
from captioner.inputs.suffixes import is_image_name
from captioner.inputs.text_files import decoded
from captioner.storage import Store, urls
from captioner.tables.parts import read_ahead
from captioner.training.labels.rows import LabelFiles, LabelRow, access_of

__all__ = ["read_text_files"]

_SUFFIX = ".txt"


def read_text_files(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None) -> LabelFiles:
    """Return a row for each text file, with the URI of its image. Raises InputError where LABELS is a single file."""
    del run_folder, output_options  # there is nothing to freeze: each image has a URI
    access = access_of(config)
    return LabelFiles(config.labels_path, access, _rows(config, access))


def _rows(config: LabelsConfig, access: InputConfig) -> Iterator[LabelRow]:
    texts = select(config.labels_path, access)
    files = _named(texts)
    images = files if config.image_root is None else _named(select(config.image_root, access))
    of_stem = {_stem(name): url for name, url in reversed(images.items()) if is_image_name(name)}
    wanted = [(name, url) for name, url in files.items() if name.lower().endswith(_SUFFIX)]
    for (name, url), text in read_ahead(partial(_text, texts.store), wanted):
        uri = of_stem.get(_stem(name))
        if uri is None:
            yield LabelRow(problem="no_image", detail=f"{urls.shown(url)} has no image of its name")
            continue
        captions = [line for line in text.splitlines() if line.strip()]
        yield LabelRow(urls.shown(_stem(name)), urls.shown(uri), uri, None, captions)


def _named(selection: Selection) -> dict[str, str]:
    """Return name below the folder -> URL of each file, in order; hidden ones are left out."""
    found = {}
    for file in selection.files:
        if file.is_named:
            raise InputError(
                f"{selection.shown} is a single file; expected a folder of images with {_SUFFIX} beside them, or of"
                f" {_SUFFIX} with --image-root"
            )
        name = selection.name(file.entry.url)
        if not is_hidden(name, urls.suffix(name)):
            found[name] = file.entry.url
    return found


def _stem(name: str) -> str:
    return name[: -len(urls.suffix(name))] if urls.suffix(name) else name


def _text(store: Store, file: tuple[str, str]) -> str:
    return decoded(store.read_bytes(file[1]), file[1])
