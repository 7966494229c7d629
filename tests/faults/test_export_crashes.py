"""An export that dies at any change ends, run again, with the files of an unbroken one: each whole, each once."""

import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from captioner.config import ExportConfig
from captioner.export import export_table
from captioner.export.formats.table import EXPORT_FORMATS
from captioner.storage import open_store
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row, write_images
from tests.faults.crashes import Crash, crashing, empty_memory

NUM_IMAGES = 5
CATALOGUES = {"iceberg", "lance"}  # whose files have times and ids of their own; their crashes are tried elsewhere
FORMATS = sorted(EXPORT_FORMATS.keys() - CATALOGUES)
STORES = ["local", "memory"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> CaptionTable:
    folder = tmp_path_factory.mktemp("table")
    table, _ = begin_table(str(folder / "table"), str(write_images(folder / "images", NUM_IMAGES)))
    add_part(table, [caption_row(number, f"{number:03d}.jpg", f"caption {number}") for number in range(NUM_IMAGES)])
    return table


def export(table: CaptionTable, output: str, name: str) -> Mapping[str, Any]:
    config = ExportConfig(table=str(table.location), output=output, format=name, rows_per_file=2)
    return export_table(config)


def files_of(output: str) -> dict[str, bytes]:
    """Return every file of OUT but `_export.json`, which has times, and the batch, which has one too."""
    store, root = open_store(output), output.rstrip("/") + "/"
    found = {entry.url.removeprefix(root): entry.url for page in store.pages(root) for entry in page}
    return {
        name: store.read_bytes(url)
        for name, url in found.items()
        if name != "_export.json" and not name.startswith("_export/batch-")
    }


def try_crashes(table: CaptionTable, folder: Path, name: str, store: str, chance: random.Random, most: int) -> int:
    """Let an export die, run it again, and look; return how often."""

    def place(run: str) -> str:
        return f"memory:/{folder}/{name}-{run}" if store == "memory" else str(folder / f"{name}-{run}")

    with crashing(None) as unbroken:
        export(table, place("unbroken"), name)
    wanted = files_of(place("unbroken"))
    points = unbroken.deaths(chance)
    chosen = points if most >= len(points) else chance.sample(points, most)
    for number, (at, moment) in enumerate(chosen):
        with crashing(at, moment) as crash:
            export(table, place(str(number)), name)
        check(crash, at)
        with crashing(None):
            export(table, place(str(number)), name)
            assert export(table, place(str(number)), name)["rows"] == 0
        assert files_of(place(str(number))) == wanted, f"dead {moment} change {at}"
        empty_memory(folder / f"{name}-{number}")
    return len(chosen)


def check(crash: Crash, at: int) -> None:
    assert crash.is_dead or crash.num_changes < at, "the injector did nothing"


@pytest.mark.parametrize(("name", "store"), [(name, STORES[number % 2]) for number, name in enumerate(FORMATS)])
def test_an_export_that_dies_at_some_change_ends_as_an_unbroken_one(
    name: str, store: str, table: CaptionTable, tmp_path: Path
) -> None:
    assert try_crashes(table, tmp_path, name, store, random.Random(name), most=2)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["jsonl", "webdataset"])  # one that is text alone and one with images
def test_an_export_that_dies_at_any_change_ends_as_an_unbroken_one(
    name: str, store: str, table: CaptionTable, tmp_path: Path
) -> None:
    assert try_crashes(table, tmp_path, name, store, random.Random(0), most=10_000)


KILLED = """
import os, signal, sys
from captioner.config import ExportConfig
from captioner.export import export_table

num_changes = 0


def count(event, _arguments):
    global num_changes
    is_change = event in ("os.rename", "os.link")
    num_changes += is_change
    if is_change and num_changes == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(count)
export_table(ExportConfig(table=sys.argv[1], output=sys.argv[2], format=sys.argv[3], rows_per_file=1))
"""
NUM_FILES = 8
KILLED_AT = 9  # renames and links: some files are there, and some are not


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_an_export_that_is_killed_ends_as_an_unbroken_one(name: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", NUM_FILES)
    table, _ = begin_table(str(tmp_path / "table"), str(images))
    add_part(table, [caption_row(number, f"{number:03d}.jpg", f"caption {number}") for number in range(NUM_FILES)])

    def run(output: str) -> None:
        export_table(ExportConfig(table=str(tmp_path / "table"), output=output, format=name, rows_per_file=1))

    unbroken, output = str(tmp_path / "unbroken"), str(tmp_path / "killed")
    run(unbroken)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "table"), output, name, str(KILLED_AT)],
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    num_written = len(list((tmp_path / "killed" / "_export" / "shards").glob("*.json")))
    assert 0 < num_written < NUM_FILES
    run(output)
    assert files_of(output) == files_of(unbroken)
