"""A table to export: images in two folders, odd names, a failure, candidates."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from captioner.config import ExportConfig
from captioner.export import export_table
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row, failure_row
from tests.sample_images import encoded

NAMES = ["a/x.jpg", "a/über alles.v2.jpg", "b/x.jpg", "c.jpg", "d.jpg"]
"""Images in the order of the listing; the caption of one failed."""

CAPTIONS = ['a "dog",\nrunning', "café 中 🐕", "a cat", None, "the end"]
TEMPLATE = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{image}\nSay what you see.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
Export = Callable[..., Mapping[str, Any]]


def write_named_images(folder: Path, names: list[str] = NAMES) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(seed=seed))
    return folder


def candidate(caption: str) -> dict[str, Any]:
    made = caption_row(0, "", caption)
    columns = ("caption", "num_tokens", "finish_reason", "mean_logprob", "min_logprob", "is_repetitive")
    return {name: made[name] for name in columns}


@pytest.fixture
def table(tmp_path: Path) -> CaptionTable:
    images = write_named_images(tmp_path / "images")
    table, _ = begin_table(str(tmp_path / "it's a [1] table*"), str(images))
    rows = [caption_row(number, NAMES[number], text) for number, text in enumerate(CAPTIONS) if text]
    rows[2]["candidates"] = [candidate("a cat"), candidate("one cat")]
    add_part(table, [rows[0], rows[3], failure_row(3, "c.jpg", "corrupt")], run_id="run-1")
    add_part(table, rows[1:3], run_id="run-2")
    table.record("run-1", {"config": {"model": {"prompt": "<|begin_of_text|>{image} What is this?"}}})
    table.record("run-2", {"config": {"model": {"prompt": None}}, "model": {"template": TEMPLATE}})
    return table


@pytest.fixture
def export(table: CaptionTable, tmp_path: Path) -> Export:
    """Exports that table to a folder `out`."""

    def run(**flags: Any) -> Mapping[str, Any]:
        flags = {"table": str(table.location), "output": str(tmp_path / "out"), **flags}
        return export_table(ExportConfig(**flags))

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of OUT but its record, by name."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if not name.startswith("_export")}
