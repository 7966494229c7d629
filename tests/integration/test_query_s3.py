"""SQL over a caption table in a bucket, and the other readers that the guide names."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioner.config import GalleryConfig, QueryConfig
from captioner.errors import InputError, JobError
from captioner.gallery.gallery_job import gallery
from captioner.gallery.query_job import query_or_page
from captioner.query import query, read_rows
from captioner.query.part_files import PROTOCOL, PartFiles
from captioner.query.views import ask
from captioner.schema import RejectReason
from captioner.storage import Entry, Location
from captioner.storage.faults import Fault, StoreError
from captioner.tables import CaptionTable, open_table
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images
from tests.conftest import Bucket
from tests.pages import GUIDE
from tests.sample_images import encoded

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("kept_decode_children")


@pytest.fixture
def table(s3: Bucket) -> CaptionTable:
    """A table in a bucket, of images in the bucket: 30 captions and a failure."""
    for number in range(3):
        s3.put(f"photos/{number}.jpg", encoded(seed=number))
    table, _ = begin_table(f"{s3.url}/out", f"{s3.url}/photos", options=s3.storage_options)
    rows = [caption_row(key, f"{s3.url}/photos/{key}.jpg", f"caption {key % 7}") for key in range(30)]
    add_part(table, rows[:20])
    add_part(table, [*rows[20:], failure_row(40, "broken", "corrupt")])
    table.record("run-1", {"model": {"name": "demo"}, "summary": {"captioned": 30, "failed": 1}})
    return table


def config(s3: Bucket, **flags: Any) -> QueryConfig:
    return QueryConfig(table=f"{s3.url}/out", storage_options=s3.storage_options, **flags)


def test_every_view_of_a_table_in_a_bucket_answers(table: CaptionTable) -> None:
    counts = "SELECT (SELECT count(*) FROM captions) c, (SELECT count(*) FROM failures) f,"
    counts += " (SELECT count(*) FROM attempts) a, (SELECT count(*) FROM images) i, (SELECT captioned FROM runs) r"
    assert read_rows(table, counts).to_pylist() == [{"c": 30, "f": 1, "a": 1, "i": 31, "r": 30}]


def test_the_job_summarises_and_saves_into_the_bucket(table: CaptionTable, s3: Bucket) -> None:
    assert query(config(s3))["captioned"] == 30
    out = f"{s3.url}/results/frequent.parquet"
    sql = "SELECT caption, count(*) AS n FROM captions GROUP BY caption ORDER BY n DESC, caption"
    assert query(config(s3, sql=sql, out=out))["rows"] == 7
    with s3.fs.open(out) as file:
        assert pq.read_table(file).to_pylist()[0] == {"caption": "caption 0", "n": 5}


def test_a_large_export_goes_into_the_bucket_in_pieces(table: CaptionTable, s3: Bucket) -> None:
    out = f"{s3.url}/results/large.csv"
    sql = "SELECT range AS n, repeat('x', 10_000) AS text FROM range(11_000)"
    assert query(config(s3, sql=sql, out=out))["rows"] == 11_000
    assert s3.fs.info(out)["ETag"].strip('"').endswith("-3")  # S3's mark of an object made of three parts
    assert s3.fs.cat_file(out).count(b"\n") == 11_001


def test_doubtful_captions_of_a_bucket_become_a_page(table: CaptionTable, s3: Bucket, tmp_path: Path) -> None:
    summary = query_or_page(config(s3, review=3, out=str(tmp_path / "review.html")))
    assert (summary["rows"], summary["pictures"]) == (3, 3)


def test_rows_of_a_query_and_two_runs_in_a_bucket_become_pages(table: CaptionTable, s3: Bucket, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "table": str(table.location),
        "output": f"{s3.url}/out.html",
        "storage_options": s3.storage_options,
    }
    sql = "SELECT key, caption FROM captions ORDER BY key LIMIT 3"
    assert gallery(GalleryConfig(**flags, query=sql))["pictures"] == 3
    other, _ = begin_table(f"{s3.url}/other", f"{s3.url}/photos", options=s3.storage_options)
    add_part(other, [caption_row(key, f"{s3.url}/photos/{key}.jpg", "another") for key in range(3)])
    found = gallery(GalleryConfig(**flags, compare=str(other.location)))
    assert (found["rows"], found["pictures"]) == (3, 3)
    assert s3.fs.info(f"{s3.url}/out.html")["size"] == found["size_bytes"]


def test_the_command_finds_the_bucket_by_the_usual_environment_variables(table: CaptionTable, s3: Bucket) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "query.py"), f"{s3.url}/out", "FROM runs", "--format", "json"]
    environment = {"PYTHONPATH": str(ROOT), **s3.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["captioned"] == 30


def test_only_the_pieces_that_a_query_needs_are_fetched(table: CaptionTable, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    whole = table.store.read_range

    def counted(url: str, start: int, stop: int) -> bytes:
        fetched.append(stop - start)
        return whole(url, start, stop)

    add_part(table, [caption_row(key, str(key), hashlib.sha256(bytes(key)).hexdigest()) for key in range(100, 20_100)])
    size = sum(entry.size_bytes or 0 for entry in table.store.entries(f"{table.location}/captions"))
    monkeypatch.setattr(table.store, "read_range", counted)
    assert read_rows(table, "SELECT count(*) AS n FROM captions").to_pylist() == [{"n": 20_030}]
    assert sum(fetched) < size / 4
    fetched.clear()
    read_rows(table, "SELECT max(key) FROM captions")
    assert sum(fetched) < size / 2


def test_a_bucket_that_loses_parts_to_a_compaction_is_asked_again(table: CaptionTable, s3: Bucket) -> None:
    asked = []

    def question(connection: Any) -> int:
        asked.append(connection)
        if len(asked) == 1:
            first = s3.fs.ls(f"{s3.url}/out/captions")[0]
            s3.fs.copy(first, first.replace("part-", "part-moved-"))
            s3.fs.rm_file(first)
        return int(connection.execute("SELECT count(*) FROM captions").fetchall()[0][0])

    assert ask(table, question) == 30
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("reason", "kind"), [(RejectReason.FETCH_FAILED, JobError), (RejectReason.FORBIDDEN, InputError)]
)
def test_a_store_that_does_not_deliver_is_named_without_a_traceback(
    table: CaptionTable, monkeypatch: pytest.MonkeyPatch, reason: RejectReason, kind: type[Exception]
) -> None:
    def refused(url: str, start: int, stop: int) -> bytes:
        raise StoreError(Fault(reason, "the store says no"))

    monkeypatch.setattr(table.store, "read_range", refused)
    with pytest.raises(kind, match=r"^s3://\S+/out cannot be read: the store says no$"):
        read_rows(table, "SELECT max(key) FROM captions")


def test_a_prefix_that_holds_no_table_is_refused(s3: Bucket) -> None:
    s3.put("photos/a.jpg", b"x")
    with pytest.raises(InputError, match="/photos is no caption table"):
        open_table(Location(f"{s3.url}/photos", s3.storage_options))


def test_files_of_a_table_are_its_parts_and_can_only_be_read(table: CaptionTable) -> None:
    files = PartFiles(table.store, {"captions/a": Entry(f"{table.location}/_run/run.json", 10)})
    with files.open(f"{PROTOCOL}://captions/a") as file:
        assert len(file.read()) == 10
        file.seek(-4, 2)
        assert (file.tell(), len(file.read(100))) == (6, 4)
    with pytest.raises(FileNotFoundError):
        files.open(f"{PROTOCOL}://captions/../_run/run.json")
    with pytest.raises(PermissionError):
        files.open(f"{PROTOCOL}://captions/a", "wb")


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_the_lines_of_the_guide_read_the_table_with_pandas_pyarrow_and_ray_data(
    tmp_path: Path,
) -> None:
    images = write_images(tmp_path / "images", 2)
    table, _ = begin_table(str(tmp_path / "captions-demo"), str(images))
    add_part(table, [caption_row(0, "a", "a dog")])
    add_part(table, [caption_row(1, "b", "a cat")])
    section = (GUIDE / "query.md").read_text()
    code = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert code
    read = (
        "[sorted(frame.caption), sorted(table['caption'].to_pylist()), sorted(r['caption'] for r in rows.take_all())]"
    )
    answer = tmp_path / "read.json"  # not stdout, where Ray writes what it likes until the end
    script = f"{code[1].replace('/data', str(tmp_path))}\nimport json; json.dump({read}, open('{answer}', 'w'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(answer.read_text()) == [["a cat", "a dog"]] * 3
