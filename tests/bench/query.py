"""What do the views of jobs/query.py cost over plain DuckDB on the same files, at ten million captions?

    python -m tests.bench.query [--rows 10000000] [--rounds 7]

Each image has an answer to the prompt `is_photo`, a choice of yes and no, one in a hundred null: `choice` filters by it
and by its details, and so does the command as a user types it, from its start to its last row.

Both sides take turns within each round and each opens a connection of its own: ours lists the parts, makes the views
and locks itself up; plain DuckDB is `read_parquet('captions/*.parquet')`, as a user would write it. Wall clock on the
cores that there are, and beside it processor time, which neighbours on the machine blur less; medians. The table is
made as the job's sink makes it, in parts of 16,384 rows, and removed after.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.prompts import answer_fields
from captioner.query.summary import summarize
from captioner.query.views import ask, read_rows
from captioner.schema import captioned_schema
from captioner.tables import CaptionTable, Stamp
from tests.bench.report import at_most, last_line

PART_ROWS = 16_384
FAILED_SHARE = 0.01
TARGET = 1.3
QUERIES = {
    "count": "SELECT count(*) FROM {captions}",
    "filter": "SELECT key, image_id, caption FROM {captions} WHERE min_logprob < -11 AND finish_reason = 'stop'"
    " ORDER BY key",
    "group": "SELECT finish_reason, num_tokens, count(*) AS n, avg(mean_logprob) FROM {captions}"
    " GROUP BY ALL ORDER BY ALL",
    "choice": "SELECT key, image_id, caption FROM {captions} WHERE is_photo = 'yes'"
    " AND is_photo_details.mean_logprob > -0.05 ORDER BY key",
}
COMMANDS = {
    "command_count": "SELECT is_photo, count(*) AS n FROM captions GROUP BY ALL ORDER BY ALL",
    "command_choice": "SELECT image_id, caption FROM captions WHERE is_photo = 'yes'"
    " AND is_photo_details.mean_logprob > -0.05 ORDER BY key",
}
PROMPTS = {
    "caption": {"text": "Describe the image.", "decoding": {}},
    "is_photo": {"text": "Is it a photograph?", "decoding": {}, "constraint": json.dumps({"choice": ["yes", "no"]})},
}
QUERY = Path(__file__).parents[2] / "jobs" / "query.py"
_NULL_SHARE = 0.01
_TEXT = "a the large small red blue green old dog cat bird bus tree house man woman street table on in with near"
_NUM_TEXTS = 50_000


def write_table(folder: Path, num_rows: int, seed: int = 0) -> CaptionTable:
    """Write a table of made-up captions, one in a hundred a failure, as the job's sink would."""
    rng = np.random.default_rng(seed)
    table = CaptionTable(str(folder))
    table.claim({"input": "made up", "model": {"name": "none", "fingerprint": "0"}, "prompts": PROMPTS})
    table.record("run-1", {"model": {"name": "none"}, "summary": {"captioned": num_rows}})
    lengths = rng.integers(5, 22, _NUM_TEXTS)
    words = rng.choice(_TEXT.split(), (_NUM_TEXTS, lengths.max())).tolist()
    texts = pa.array(" ".join(row[:length]) for row, length in zip(words, lengths, strict=True))
    stamp, families = Stamp("run-1", table.digest), table.families()
    for first in range(0, num_rows, PART_ROWS):
        keys = np.arange(first, min(first + PART_ROWS, num_rows))
        table.write(_rows(keys, texts, rng), stamp, families=families)
    return table


def _rows(keys: np.ndarray, texts: pa.Array, rng: np.random.Generator) -> pa.Table:
    """Rows as model workers return them."""
    count = len(keys)
    failed = rng.random(count) < FAILED_SHARE
    captions = texts.take(pa.array(rng.integers(0, len(texts), count)))
    mean = -rng.gamma(2.0, 0.4, count).astype(np.float32)
    numbers = pc.utf8_lpad(pc.cast(pa.array(keys), pa.string()), 10, "0")
    made = {
        "key": pa.array(keys),
        "image_id": pc.binary_join_element_wise("s3://bucket/photos/", numbers, ".jpg", ""),
        "attempt": pa.array(np.ones(count, np.int32)),
        "reason": pa.array(np.where(failed, "corrupt", None)),
        "detail": pa.array(np.where(failed, "made up", None)),
        "caption": captions,
        "num_tokens": pc.add(pc.count_substring(captions, " "), 2),
        "finish_reason": pa.array(np.where(rng.random(count) < 0.02, "length", "stop")),
        "mean_logprob": pa.array(mean),
        "min_logprob": pa.array((mean * 3 - rng.gamma(2.0, 0.5, count)).astype(np.float32)),
        "clip_score": pa.array(rng.normal(0.7, 0.1, count).astype(np.float32)),
        "is_repetitive": pa.array(rng.random(count) < 0.01),
        "width": pa.array(rng.integers(64, 4000, count, np.int32)),
        "height": pa.array(rng.integers(64, 4000, count, np.int32)),
        "size_bytes": pa.array(rng.integers(5_000, 900_000, count)),
        **_answers(failed, rng),
    }
    schema = captioned_schema(answers=answer_fields(PROMPTS))
    return pa.table([_column(made.get(field.name), field, count) for field in schema], schema)


def _answers(failed: np.ndarray, rng: np.random.Generator) -> dict[str, pa.Array]:
    """The columns of the prompts, null where an image failed."""
    count = len(failed)
    is_null = rng.random(count) < _NULL_SHARE
    said = np.where(rng.random(count) < 0.7, "yes", "no")
    scores = {
        "num_tokens": np.ones(count, np.int32),
        "finish_reason": np.where(is_null, "length", "stop"),
        "mean_logprob": -rng.gamma(1.0, 0.3, count).astype(np.float32),
        "min_logprob": -rng.gamma(1.0, 0.5, count).astype(np.float32),
        "is_repetitive": np.zeros(count, bool),
    }
    asked = {name: np.zeros(count, np.int32) for name in ("text_number", "num_cut_values")}
    fields = {field.name: field.type for field in answer_fields(PROMPTS)}
    details = {"caption_details": asked, "is_photo_details": scores | asked}
    made = {name: _structs(fields[name], values, failed) for name, values in details.items()}
    return made | {"is_photo": pa.array(np.where(is_null | failed, None, said))}


def _structs(kind: pa.StructType, values: dict[str, np.ndarray], is_missing: np.ndarray) -> pa.Array:
    columns = [pa.array(values[field.name]).cast(field.type) for field in kind]
    return pa.StructArray.from_arrays(columns, fields=list(kind), mask=pa.array(is_missing))


def _column(values: pa.Array | None, field: pa.Field, count: int) -> pa.Array:
    return pa.nulls(count, field.type) if values is None else values.cast(field.type)


def plain(folder: Path, sql: str) -> pa.Table:
    with duckdb.connect() as connection:
        return connection.sql(sql.format(captions=f"read_parquet('{folder}/captions/*.parquet')")).to_arrow_table()


def timed(job: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor seconds, those of all threads."""
    start, start_cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - start, time.process_time() - start_cpu


def compare(table: CaptionTable, folder: Path, rounds: int) -> dict[str, float]:
    values = {}
    print(f"{'':8} {'plain':>10} {'views':>10} {'wall':>7} {'processor':>10}  spread of the ratio of wall time")
    for name, sql in QUERIES.items():
        ours = sql.format(captions="captions")
        assert read_rows(table, ours).equals(plain(folder, sql)), f"{name}: not the same rows"  # and a warm-up
        pairs = [
            (timed(lambda sql=sql: plain(folder, sql)), timed(lambda ours=ours: read_rows(table, ours)))
            for _ in range(rounds)
        ]
        (theirs, theirs_cpu), (own, own_cpu) = (np.median(side, axis=0).tolist() for side in zip(*pairs, strict=True))
        ratios = sorted(own[0] / theirs[0] for theirs, own in pairs)
        shares = f"{own / theirs:>6.2f}x {own_cpu / theirs_cpu:>9.2f}x"
        print(f"{name:8} {theirs:>9.3f}s {own:>9.3f}s {shares}  {ratios[0]:.2f} .. {ratios[-1]:.2f}")
        values |= {f"{name}_plain_s": theirs, f"{name}_s": own, f"{name}_ratio": own / theirs}
        values[f"{name}_cpu_ratio"] = own_cpu / theirs_cpu
    return values


def others(table: CaptionTable) -> dict[str, float]:
    """What plain DuckDB has no word for, once each: failures without their captions, all images, the summary."""
    values = {
        "failures_s": timed(lambda: read_rows(table, "SELECT reason, count(*) FROM failures GROUP BY reason"))[0],
        "images_s": timed(lambda: read_rows(table, "SELECT count(*) FROM images WHERE reason IS NULL"))[0],
        "summary_s": timed(lambda: ask(table, summarize))[0],
    }
    print(*(f"{name.removesuffix('_s'):10} {seconds:>8.2f} s" for name, seconds in values.items()), sep="\n")
    return values


def commands(folder: Path, rounds: int) -> dict[str, float]:
    """Time jobs/query.py with a filter by the choice, from its start to its last row; medians."""
    values = {}
    for name, sql in COMMANDS.items():
        command = [sys.executable, str(QUERY), str(folder), sql, "--format", "csv"]

        def run(command: list[str] = command) -> int:
            return subprocess.run(command, check=True, capture_output=True).stdout.count(b"\n") - 1

        num_rows = run()
        values[f"{name}_s"] = float(np.median([timed(run)[0] for _ in range(rounds)]))
        print(f"{name:15} {values[f'{name}_s']:>8.2f} s  {num_rows:,} rows")
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        table = write_table(folder, options.rows)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        num_parts = len(list(folder.glob("captions/*")))
        seconds = time.perf_counter() - start
        print(f"{options.rows:,} rows, {num_parts:,} parts, {size / 1e9:.2f} GB, made in {seconds:.0f} s")
        values = compare(table, folder, options.rounds) | others(table) | commands(folder, options.rounds)
    ratios = [f"{name}_{kind}" for name in QUERIES for kind in ("ratio", "cpu_ratio")]
    targets = {name: at_most(values[name], TARGET) for name in ratios}
    rounded = {name: round(value, 4) for name, value in values.items()}
    print(last_line("query", targets, rows=options.rows, values=rounded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
