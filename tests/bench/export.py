"""What does an export cost over writing the same rows, or copying the same images, without one?

    python -m tests.bench.export [--rows 1000000] [--images 2000] [--rounds 3]

`jsonl` takes turns with DuckDB's own COPY of the same parts to a JSON file; both write every column. `webdataset`,
in one process, takes turns with a loop that reads each image and adds it to a tar. Wall clock, medians. Memory is the
peak of a process that exports the table, beside that of one that exports a tenth of it. All files are removed after.
"""

import argparse
import io
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median

import duckdb

from captioner.config import ExportConfig
from captioner.export import export_table
from captioner.tables import CaptionTable
from tests.bench.query import write_table
from tests.bench.report import at_least, at_most, last_line, take_turns
from tests.caption_tables import add_part, begin_table, caption_row

ROWS_TARGET, IMAGES_TARGET, MEMORY_TARGET_MB = 0.5, 0.8, 1024
_IMAGE_BYTES = 150_000  # of a photograph as COCO has them; an export decodes none, so that any bytes do
_PEAK = """
import resource, sys
from captioner.config import ExportConfig
from captioner.export import export_table

export_table(ExportConfig(table=sys.argv[1], output=sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def rows_per_s(table: CaptionTable, num_rows: int, folder: Path, rounds: int) -> dict[str, float]:
    """Return the rows a second of an export to jsonl and of DuckDB's COPY."""
    numbers, parts = count(), f"{table.location.local_path}/captions/*.parquet"

    def export() -> None:
        export_table(ExportConfig(table=str(table.location), output=str(folder / f"export-{next(numbers)}")))

    def copy() -> None:
        target = folder / f"copy-{next(numbers)}.json"
        duckdb.sql(f"COPY (FROM read_parquet('{parts}')) TO '{target}' (FORMAT json)")

    return {
        name: num_rows / median(times) for name, times in take_turns({"jsonl": export, "copy": copy}, rounds).items()
    }


def images_per_s(folder: Path, num_images: int, rounds: int) -> dict[str, float]:
    """Return the images a second of an export to webdataset and of a loop that copies them into a tar."""
    images, numbers = folder / "images", count()
    write_bytes(images, num_images)
    table, _ = begin_table(str(folder / "table"), str(images))
    names = [f"{number:03d}.jpg" for number in range(num_images)]
    for number in range(0, num_images, 1000):
        rows = range(number, min(num_images, number + 1000))
        add_part(table, [caption_row(row, names[row], f"caption {row}") for row in rows])

    def export() -> None:
        output = str(folder / f"export-{next(numbers)}")
        export_table(ExportConfig(table=str(table.location), output=output, format="webdataset"))

    def copy() -> None:
        with tarfile.open(folder / f"copy-{next(numbers)}.tar", "w") as tar:
            for name, data in read(images, names):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    ways = {"webdataset": export, "copy": copy}
    return {name: num_images / median(times) for name, times in take_turns(ways, rounds).items()}


def write_bytes(folder: Path, num_images: int) -> None:
    folder.mkdir(parents=True)
    for number in range(num_images):
        (folder / f"{number:03d}.jpg").write_bytes(random.Random(number).randbytes(_IMAGE_BYTES))


def read(folder: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        yield name, (folder / name).read_bytes()


def peak_mb(table: CaptionTable, output: Path) -> int:
    """Return the most memory that a process held which exports a table."""
    command = [sys.executable, "-c", _PEAK, str(table.location), str(output)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="captioner-bench-") as root:
        folder = Path(root)
        table, tenth = write_table(folder / "rows", given.rows), write_table(folder / "tenth", given.rows // 10)
        rows = rows_per_s(table, given.rows, folder, given.rounds)
        images = images_per_s(folder / "images", given.images, given.rounds)
        memory = {"all": peak_mb(table, folder / "all"), "tenth": peak_mb(tenth, folder / "few")}
    for kind, found in (("rows/s", rows), ("images/s", images)):
        print(*(f"{name} {value:,.0f} {kind}" for name, value in found.items()), sep="   ")
    print(f"peak memory {memory['all']:,} MB at {given.rows:,} rows, {memory['tenth']:,} MB at a tenth")
    targets = {
        "jsonl_over_copy": at_least(round(rows["jsonl"] / rows["copy"], 3), ROWS_TARGET),
        "webdataset_over_copy": at_least(round(images["webdataset"] / images["copy"], 3), IMAGES_TARGET),
        "memory_mb": at_most(memory["all"], MEMORY_TARGET_MB),
    }
    print(last_line("export", targets, rows=given.rows, images=given.images, rates={**rows}, memory_mb=memory))


if __name__ == "__main__":
    main()
