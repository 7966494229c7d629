"""What jobs/query.py does: the summary, rows in a file or on stdout, pages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioner.command_line import run as command
from captioner.commands import COMMANDS
from captioner.config import ImageAccessConfig, QueryConfig
from captioner.errors import ConfigError, OutputError
from captioner.gallery.query_job import query_or_page
from captioner.query import query
from captioner.tables import CaptionTable
from captioner.terminal import visible_lines
from tests.caption_tables import add_part, begin_table, caption_row, failure_row
from tests.conftest import Bucket, JobHere
from tests.sample_images import encoded

ROOT = Path(__file__).parents[3]


def test_without_sql_the_table_is_summarised_and_the_last_line_is_json(
    full: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = query(QueryConfig(table=str(full.location)))
    assert (summary["images"], summary["captioned"], summary["failed"]) == (4, 3, 1)
    assert summary["failed_by_reason"] == {"decode_timeout": 1}
    assert summary["frequent_captions"] == [{"caption": "a dog", "n": 2}]
    assert (summary["repetitive_share"], summary["truncated_share"]) == (0.333333, 0.333333)
    assert summary["lowest"]["min_logprob"][0]["image_id"] == "d"
    assert summary["lowest"]["clip_score"] == []
    told = capsys.readouterr().err
    assert "4 images: 3 captioned, 1 failed" in told
    assert "run-1  demo  2 captioned, 1 failed" in told
    json.dumps(summary, allow_nan=False)


def test_a_table_without_captions_is_summarised_too(table: CaptionTable) -> None:
    empty = query(QueryConfig(table=str(table.location)))
    assert (empty["images"], empty["mean_tokens"], empty["tokens_histogram"]) == (0, None, [])
    add_part(table, [failure_row(1, "b", "empty")])
    assert query(QueryConfig(table=str(table.location)))["failed_by_reason"] == {"empty": 1}


def test_the_histogram_counts_each_caption_once_in_ten_bins_at_most(table: CaptionTable) -> None:
    add_part(table, [caption_row(key, str(key), "x", num_tokens=key) for key in range(1, 64)])
    bins = query(QueryConfig(table=str(table.location)))["tokens_histogram"]
    assert len(bins) <= 10
    assert sum(one["captions"] for one in bins) == 63
    assert (bins[0]["from"], bins[-1]["to"]) == (1, 63)


def test_one_very_long_caption_leaves_the_bins_of_the_others_as_they_are(table: CaptionTable) -> None:
    lengths = [*(5 + key % 27 for key in range(999)), 4_096]
    add_part(table, [caption_row(key, str(key), "x", num_tokens=length) for key, length in enumerate(lengths)])
    bins = query(QueryConfig(table=str(table.location)))["tokens_histogram"]
    assert [one["captions"] > 50 for one in bins] == [True] * 9 + [False]
    assert bins[-1] == {"from": 32, "to": 4_096, "captions": 1}
    assert sum(one["captions"] for one in bins) == 1_000


def test_scores_that_are_no_numbers_leave_the_summary_strict_json(table: CaptionTable, job_here: JobHere) -> None:
    scores = [-0.5, float("nan"), float("-inf")]
    add_part(table, [caption_row(key, str(key), "x", mean_logprob=score) for key, score in enumerate(scores)])
    done = job_here("query.py", str(table.location))
    summary = json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert summary["mean_logprob"] == -0.5
    assert [row["mean_logprob"] for row in summary["lowest"]["mean_logprob"]] == [None, -0.5]


def test_each_run_says_what_it_was_for_and_what_came_of_it(
    table: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"model": {"name": "m", "fingerprint": "f"}, "started": "2026-01-01T00:00:00Z"}
    counts = {"captioned": 4_998, "failed": 2, "images_per_s": 213.4}
    table.record("1", model | {"summary": counts})
    query(QueryConfig(table=str(table.location)))
    assert "1 run of 1 model" in capsys.readouterr().err
    table.record("2", model)
    table.record("3", model | {"summary": counts | {"captioned": 0, "failed": 0}})
    table.record("35", model | {"summary": counts, "interrupted": True})
    table.record("4", {"purpose": "compact", "started": "2026-01-01T00:00:00Z", "summary": {"parts": {}}})
    query(QueryConfig(table=str(table.location)))
    assert capsys.readouterr().err.splitlines()[-6:] == [
        "5 runs of 1 model",
        "  1  m  4,998 captioned, 2 failed, 213.4 images/s",
        "  2  m  not finished",
        "  3  m  finished, nothing was left to do",
        "  35  m  4,998 captioned, 2 failed, 213.4 images/s, interrupted",
        "  4  compact  finished",
    ]


def test_of_a_long_name_the_end_is_shown(table: CaptionTable, capsys: pytest.CaptureFixture[str]) -> None:
    add_part(table, [caption_row(key, f"s3://a-bucket/with/a/long/prefix/{key}.jpg", "x") for key in range(3)])
    query(QueryConfig(table=str(table.location)))
    told = capsys.readouterr().err
    assert all(f"/long/prefix/{key}.jpg" in told for key in range(3))


def test_a_query_that_is_interrupted_promises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: QueryConfig) -> dict[str, Any]:
        raise KeyboardInterrupt

    for continues, told in ((True, "continues where this one stopped"), (False, "starts over; nothing was written")):
        assert command(QueryConfig, interrupted, [], continues=continues) == 130
        assert told in capsys.readouterr().err
    assert not COMMANDS["query"].continues


def test_images_that_need_other_options_come_on_a_page_of_doubtful_captions(s3: Bucket, tmp_path: Path) -> None:
    s3.put("photos/0.jpg", encoded())
    uris = tmp_path / "uris.txt"
    uris.write_text(f"{s3.url}/photos/0.jpg\n")
    table, _ = begin_table(str(tmp_path / "table"), str(uris))
    add_part(table, [caption_row(0, "0.jpg", "x")])
    out = str(tmp_path / "review.html")
    options = dict(s3.storage_options)
    found = query_or_page(
        QueryConfig(
            table=str(table.location), review=1, out=out, image_access=ImageAccessConfig(image_storage_options=options)
        )
    )
    assert found["pictures"] == 1


def test_rows_go_to_stdout_and_nothing_else_does(full: CaptionTable) -> None:
    sql = "SELECT image_id, caption FROM captions ORDER BY key"
    command = [sys.executable, "-W", "error", str(ROOT / "jobs" / "query.py"), str(full.location), sql]
    done = subprocess.run(
        [*command, "--format", "csv"], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ['"image_id","caption"', '"a","a dog"', '"b","a cat"', '"d","a dog"']


def test_wrong_sql_exits_with_2_and_one_message(full: CaptionTable, job_here: JobHere) -> None:
    done = job_here("query.py", str(full.location), "SELECT nope FROM captions")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('error: Binder Error: Referenced column "nope" not found')


def test_rows_are_saved_whole_by_the_ending_of_the_file(full: CaptionTable, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.parquet"
    summary = query(QueryConfig(table=str(full.location), sql="FROM captions", out=str(out)))
    assert (summary["rows"], pq.read_metadata(out).num_rows) == (3, 3)
    with pytest.raises(ConfigError):
        query(QueryConfig(table=str(full.location), sql="SELECT caption::INTEGER FROM captions", out=str(out)))
    assert pq.read_metadata(out).num_rows == 3
    assert [path.name for path in out.parent.iterdir()] == ["rows.parquet"]


def test_a_place_that_cannot_be_written_is_named(full: CaptionTable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--out .*/file/rows.csv: .*; expected a file that can be written"):
        query(QueryConfig(table=str(full.location), sql="FROM captions", out=str(tmp_path / "file" / "rows.csv")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"review": 0}, "--review is 0; expected 1 to 5,000"),
        ({"review": 3, "sql": "FROM captions"}, "expected none with --review"),
        ({"out": "x.csv"}, "--out is x.csv; expected SQL or --review"),
        ({"format": "csv"}, "--format is csv; expected SQL or --review"),
        ({"sql": "FROM captions", "format": "parquet"}, "--format is parquet; expected --out FILE"),
        ({"sql": "FROM captions", "format": "table", "out": "x"}, "--format is table; expected csv"),
        ({"sql": "FROM captions", "out": "x.txt"}, "--out is x.txt; expected a name that ends in"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QueryConfig(**flags)


@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_rows_on_a_terminal_hold_no_control_character(
    table: CaptionTable, form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_part(table, [caption_row(0, "a\x1b[2J", "b\x9b31m\x07")])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    query(QueryConfig(table=str(table.location), sql="SELECT image_id, caption FROM captions", format=form))
    shown = capsys.readouterr().out
    assert "[2J" in shown
    assert visible_lines(shown) == shown


def test_the_summary_holds_no_control_character(table: CaptionTable, capsys: pytest.CaptureFixture[str]) -> None:
    add_part(table, [caption_row(0, "a\x1b[2J", "b\x9b31m\x07"), failure_row(1, "b", "corr\x1b[2Jupt")])
    table.record("run-1\x9b", {"model": {"name": "x\x1b[2J"}, "summary": {"captioned": 1}})
    query(QueryConfig(table=str(table.location)))
    told = capsys.readouterr().err
    assert "[2J" in told
    assert visible_lines(told) == told


def test_csv_safe_is_for_csv(full: CaptionTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--csv-safe is given; expected --format csv with it"):
        QueryConfig(table=str(full.location), sql="FROM captions", csv_safe=True)
    sql = "SELECT '=1' AS x"
    query(QueryConfig(table=str(full.location), sql=sql, out=str(tmp_path / "x.csv"), csv_safe=True))
    assert (tmp_path / "x.csv").read_text() == '"x"\n"\'=1"\n'
