"""What does a table of a hundred million rows cost to resume, verify, repair and compact?

    python -m tests.bench.tables [--rows 1000000 10000000] [--folder FOLDER]

The input are Parquet files of a million URIs each, the table is parts of 16,384 rows as a job writes them (made-up
captions, one image in a hundred failed), written by `CaptionTable.write_part`. Each step runs in a process of its own,
as the job that it belongs to would: `resume` reads what is done and cuts what is left of a table from which a tenth of
the parts was taken, `verify` audits, `repair` drops a hundredth of the parts that is there twice, `compact` makes
few parts of many. Shown for each size: seconds, rows a second, and the greatest memory of the process. Memory should
grow by the keys alone: the target is 4 bytes a row beyond what the smallest table takes.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.config import InputConfig, VerifyConfig
from captioner.inputs import freeze, load_frozen
from captioner.inputs.slices import cut
from captioner.schema import CAPTIONS, FAILURES, MAX_UNIT_ROWS, TRANSIENT_REASONS, row_key
from captioner.tables import CaptionTable, Stamp, find_done
from captioner.tables.verification import verify
from tests.bench.report import at_most, last_line

UNIT_ROWS = 1_000_000
PART_ROWS = 16_384
FAILED_EVERY = 100
RUN, LATE_RUN = "20260101-000000-bench", "20260102-000000-late"
BYTES_A_ROW = 4.0
MIB = 1 << 20


def make_input(folder: Path, num_rows: int) -> None:
    """Parquet files of URIs: of each only the footer is read."""
    folder.mkdir(parents=True)
    for ordinal, start in enumerate(range(0, num_rows, UNIT_ROWS)):
        count = min(UNIT_ROWS, num_rows - start)
        uris = pa.array(["https://images.test/one.jpg"], pa.string()).take(pa.array(np.zeros(count, np.int64)))
        pq.write_table(pa.table({"uri": uris.dictionary_encode()}), folder / f"{ordinal:05d}.parquet")


def make_table(folder: Path, images: Path) -> CaptionTable:
    """The parts of a finished job."""
    table = CaptionTable(str(folder))
    frozen = freeze(str(images), InputConfig(), table.run_folder)
    table.claim({"input": str(images), "model": {"name": "demo", "fingerprint": "abc"}})
    stamp = Stamp(RUN, table.digest)
    table.record(RUN, {"purpose": "caption"})

    def write(first: tuple[int, int]) -> None:
        ordinal, start = first
        stop = min(start + PART_ROWS, frozen.units[ordinal].num_rows or 0)
        positions = np.arange(start, stop)
        keys = positions + row_key(ordinal, 0)
        is_failed = positions % FAILED_EVERY == 0
        table.write_part("captions", _captions(keys[~is_failed]), stamp)
        table.write_part("failures", _failures(keys[is_failed]), stamp)

    starts = [(unit.ordinal, start) for unit in frozen.units for start in range(0, unit.num_rows or 0, PART_ROWS)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, starts))
    return table


def _ids(keys: np.ndarray) -> pa.Array:
    return pa.array(np.char.add("images/", np.char.zfill((keys & (MAX_UNIT_ROWS - 1)).astype(str), 9)))


def _captions(keys: np.ndarray) -> pa.Table:
    """Rows of `schema.CAPTIONS` with a hundred different captions."""
    number = len(keys)
    texts = [f"a drawing of {n} red circles above a small blue square on the left" for n in range(100)]
    made: dict[str, Any] = {
        "key": keys,
        "image_id": _ids(keys),
        "caption": pa.array(texts).take(pa.array(keys % 100)),
        "finish_reason": pa.repeat(pa.scalar("stop"), number),
        "is_repetitive": np.zeros(number, bool),
        "run_id": pa.repeat(pa.scalar(RUN), number),
    }
    scores = np.linspace(-1.0, -0.1, number)
    return pa.table([_column(made.get(field.name), field, scores) for field in CAPTIONS], CAPTIONS)


def _column(values: Any, field: pa.Field, scores: np.ndarray) -> pa.Array:
    if values is not None:
        return pa.array(values).cast(field.type) if not isinstance(values, pa.Array) else values.cast(field.type)
    if field.nullable:
        return pa.nulls(len(scores), field.type)
    filler = scores if pa.types.is_floating(field.type) else np.full(len(scores), 14)
    return pa.array(filler).cast(field.type)


def _failures(keys: np.ndarray) -> pa.Table:
    number = len(keys)
    made: dict[str, Any] = {
        "key": keys,
        "image_id": _ids(keys),
        "reason": pa.repeat(pa.scalar("corrupt"), number),
        "detail": pa.repeat(pa.scalar("image file is truncated"), number),
        "attempt": np.ones(number, np.int32),
        "run_id": pa.repeat(pa.scalar(RUN), number),
    }
    return pa.table([pa.array(made[field.name]).cast(field.type) for field in FAILURES], FAILURES)


def resume(table: CaptionTable) -> int:
    """Read what is done and cut what is left, as a rerun does before it starts; return the images left."""
    frozen = load_frozen(table.run_folder)
    assert frozen is not None
    done = find_done(table, TRANSIENT_REASONS.__contains__)
    slices = [
        piece
        for unit in frozen.units
        for piece in cut(unit, unit.num_rows, done.keys.positions(unit.ordinal, unit.num_rows), {})
    ]
    return sum(piece.num_left or 0 for piece in slices)


def take_parts(table: CaptionTable, aside: Path) -> None:
    """Take every tenth part of captions away."""
    aside.mkdir()
    for url in table.parts("captions")[::10]:
        shutil.move(url, aside)


def put_back(table: CaptionTable, aside: Path) -> None:
    """Put them back, a tenth of them twice: as a writer leaves them that outlived its driver."""
    table.record(LATE_RUN, {"purpose": "caption"})
    for number, path in enumerate(sorted(aside.iterdir())):
        if number % 10 == 0:
            rows = pq.read_table(path).replace_schema_metadata()
            table.write_part("captions", rows, Stamp(LATE_RUN, table.digest))
        shutil.move(path, str(table.location / "captions"))
    aside.rmdir()


def step(name: str, folder: str) -> dict[str, Any]:
    """Run one step in this process; return what it took."""
    table = CaptionTable(folder)
    ways: dict[str, Callable[[], Any]] = {
        "resume": lambda: resume(table),
        "verify": lambda: verify(VerifyConfig(table=folder))["ok"],
        "repair": lambda: verify(VerifyConfig(table=folder, repair=True))["ok"],
        "compact": lambda: verify(VerifyConfig(table=folder, compact=True))["ok"],
    }
    start = time.perf_counter()
    with redirect_stderr(sys.stdout):
        result = ways[name]()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"step": name, "seconds": round(seconds, 1), "peak_mib": round(peak / MIB), "result": result}


def run_step(name: str, folder: Path) -> dict[str, Any]:
    """Run one step in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.tables", "--step", name, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {name:8} {found['seconds']:8.1f} s  {found['peak_mib']:6} MiB  {found['result']}", file=sys.stderr)
    return found


def measure(num_rows: int, folder: Path) -> dict[str, Any]:
    """Make one table and take every step over it."""
    images, output, aside = folder / "images", folder / "captions", folder / "aside"
    start = time.perf_counter()
    make_input(images, num_rows)
    table = make_table(output, images)
    num_parts = sum(len(table.parts(name)) for name in ("captions", "failures"))
    print(f"{num_rows:,} rows in {num_parts:,} parts, made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    steps = {"verify": run_step("verify", output)}
    take_parts(table, aside)
    steps["resume"] = run_step("resume", output)
    put_back(table, aside)
    steps |= {name: run_step(name, output) for name in ("repair", "compact")}
    assert all(steps[name]["result"] is True for name in ("verify", "repair", "compact")), steps
    assert 0 < steps["resume"]["result"] <= num_rows / 10 + PART_ROWS, steps
    return {"rows": num_rows, "parts": num_parts, **steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", help="where the tables are made; by default a temporary folder")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(step(given.step, given.folder)))
        return
    sizes = []
    for num_rows in given.rows:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            sizes.append(measure(num_rows, Path(folder)))
    targets = {}
    for small, large in pairwise(sizes):
        for name in ("resume", "verify", "repair", "compact"):
            growth = (large[name]["peak_mib"] - small[name]["peak_mib"]) * MIB / (large["rows"] - small["rows"])
            targets[f"{name}_bytes_a_row_at_{large['rows']}"] = at_most(round(growth, 2), BYTES_A_ROW)
    print(last_line("tables", targets, sizes=sizes))


if __name__ == "__main__":
    main()
