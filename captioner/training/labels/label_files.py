"""The rows of LABELS as the files have them: where each image is, its captions and its split.

Several files of one format make one set; where their names say splits, those count. A row that cannot be used carries a
problem. Does not know which rows belong to one image, or what a format looks like inside.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from captioner.config import LabelsConfig
from captioner.errors import ConfigError, InputError, JobError
from captioner.inputs.selection import is_hidden, select
from captioner.storage import urls
from captioner.storage.faults import StoreError
from captioner.training.labels.caption_tables import hint_at_table, is_caption_table
from captioner.training.labels.demo_labels import write_demo_labels
from captioner.training.labels.formats import LABEL_FORMATS, LabelFormat, label_format_of
from captioner.training.labels.rows import LabelFiles, LabelRow, access_of

__all__ = ["check_labels", "read_rows"]

_BESIDE_IMAGES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")


def check_labels(config: LabelsConfig) -> None:
    """Check that LABELS are there and --labels-format is known, without a listing. Raises as `read_rows` does."""
    _named_format(config)
    if config.labels_path != "demo":
        with _label_errors(config.labels_path):
            select(config.labels_path, access_of(config))


def read_rows(config: LabelsConfig, run_folder: str, output_options: Mapping[str, Any] | None = None) -> LabelFiles:
    """Return every row of LABELS.

    Raises ConfigError for an unknown --labels-format, InputError for files that cannot be read at all, JobError for a
    failing store."""
    if config.labels_path == "demo":
        url = write_demo_labels(config, run_folder, output_options)
        config = replace(config, labels_path=url, storage_options=dict(output_options or {}))
    config = replace(config, labels_path=urls.absolute(config.labels_path))
    with _label_errors(config.labels_path):
        config, labels_format = _choose_format(config)
        files = labels_format.read(config, run_folder, output_options)
    return files._replace(rows=_with_errors(files.rows, config.labels_path))


def _with_errors(rows: Iterator[LabelRow], url: str) -> Iterator[LabelRow]:
    with _label_errors(url):
        yield from rows


@contextmanager
def _label_errors(url: str) -> Iterator[None]:
    """Raise a StoreError as one that names LABELS: InputError, or JobError where another try may help."""
    try:
        yield
    except StoreError as error:
        raised = JobError if error.fault.is_transient else InputError
        raise raised(f"{urls.shown(url)} cannot be read: {error.fault.detail}; expected {_expected()}") from error


def _choose_format(config: LabelsConfig) -> tuple[LabelsConfig, LabelFormat]:
    """Return the format of LABELS, and a config that names the file with captions if LABELS is a folder of images."""
    found = _named_format(config) or label_format_of(config.labels_path)
    if found is None and is_caption_table(config):
        found = LABEL_FORMATS["table"]
    if config.where and (found is None or found.name != "table"):
        raise ConfigError(
            f"--where is {config.where}, but {urls.shown(config.labels_path)} is no caption table; expected the OUTPUT"
            f" of a caption job{hint_at_table(config)}, or no --where"
        )
    if found:
        return config, found
    selection = select(config.labels_path, access_of(config))
    counts: Counter[str] = Counter()
    for file in selection.files:
        url = file.entry.url
        found = label_format_of(url)
        if found and urls.name(url) in _BESIDE_IMAGES and urls.parent(url) + "/" == selection.root:
            return replace(config, labels_path=url), found
        if found and found.may_fill_folder and not is_hidden(selection.name(url), urls.suffix(url)):
            counts[found.name] += 1
    if not counts:
        raise InputError(f"{selection.shown} is no file with captions and holds none; expected {_expected()}")
    return config, LABEL_FORMATS[max(LABEL_FORMATS, key=lambda name: counts[name])]


def _named_format(config: LabelsConfig) -> LabelFormat | None:
    """Return the format of --labels-format, None for `auto`. Raises ConfigError for an unknown one."""
    if config.labels_format == "auto":
        return None
    if config.labels_format not in LABEL_FORMATS:
        names = ", ".join(["auto", *LABEL_FORMATS])
        raise ConfigError(f"--labels-format is {config.labels_format}; expected one of {names}")
    return LABEL_FORMATS[config.labels_format]


def _expected() -> str:
    suffixes = ", ".join(ending for entry in LABEL_FORMATS.values() for ending in entry.suffixes)
    folders = " or ".join(entry.suffixes[0] for entry in LABEL_FORMATS.values() if entry.may_fill_folder)
    return (
        f"a file that ends in {suffixes}, a caption table, a folder of {folders}, or one of images with"
        f" {_BESIDE_IMAGES[0]} or {_BESIDE_IMAGES[1]}; else --labels-format"
    )
