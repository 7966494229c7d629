"""The gallery: which rows and images are on the page, and what it shows where there is none."""

import contextlib
import io
import re
import tarfile
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import GalleryConfig, ImageAccessConfig
from captioner.errors import ConfigError, InputError
from captioner.gallery import write_gallery
from captioner.gallery.caption_cards import caption_card
from captioner.gallery.gallery_job import gallery
from captioner.gallery.page_images import thumbnails
from captioner.gallery.table_rows import TableRows, choose_parts
from captioner.gallery.wording import doubt_words, model_name
from captioner.images.thumbnails import Thumbnail
from captioner.query.review import doubtful_sql
from captioner.schema import CAPTIONS, SCORES, Reject, RejectReason, row_key
from captioner.tables import CaptionTable
from captioner.tables.table_images import TableImages
from tests.caption_tables import add_part, begin_table, caption_row, failure_row
from tests.conftest import Bucket
from tests.http_server import PlainFolder, serving
from tests.sample_images import encoded
from tests.unit.gallery.conftest import add_moods, data_of, page_of


def test_every_row_of_a_small_table_comes_with_its_image_or_its_reason(table: CaptionTable, tmp_path: Path) -> None:
    cards = page_of(table, tmp_path)["cards"]
    assert [card["id"].rpartition("/")[2] for card in cards] == [f"{n:03d}.jpg" for n in range(12)]
    assert [card["texts"][0]["runs"] for card in cards[:2]] == [
        [["same", "a picture numbered 0"]],
        [["same", "a picture numbered 1"]],
    ]
    assert {(card["image"]["width"], card["image"]["height"]) for card in cards[:10]} == {(48, 40)}
    assert [card["image"] for card in cards[10:]] == [{"reason": "corrupt", "detail": "JPEG: cut short"}] * 2


def test_rows_of_a_query_come_in_their_order_with_their_own_columns_and_what_the_table_knows(
    table: CaptionTable, tmp_path: Path
) -> None:
    rows = pa.table({"key": [row_key(0, 7), row_key(0, 2), row_key(0, 10)], "doubt": [0.9, 0.5, 0.1]})
    summary = write_gallery(rows, str(tmp_path / "out.html"), table_url=str(table.location), title="Doubtful")
    cards = data_of(tmp_path / "out.html")["cards"]
    assert [card["id"].rpartition("/")[2] for card in cards] == ["007.jpg", "002.jpg", "010.jpg"]
    assert cards[0]["texts"][0]["runs"] == [["same", "a picture numbered 7"]]
    assert [card["facts"]["doubt"] for card in cards] == [0.9, 0.5, 0.1]
    assert (summary["rows"], summary["pictures"]) == (3, 2)


def test_rows_that_name_images_without_keys_are_found(table: CaptionTable, images: Path, tmp_path: Path) -> None:
    rows = pa.table({"image_id": [f"{images}/003.jpg"], "caption": ["another caption"]})
    write_gallery(rows, str(tmp_path / "out.html"), table_url=str(table.location))
    [card] = data_of(tmp_path / "out.html")["cards"]
    assert "data" in card["image"]
    assert card["texts"][0]["runs"] == [["same", "another caption"]]


@pytest.mark.parametrize("columns", ["key, image_id, caption", "key, caption", "image_id, caption, reason"])
def test_rows_of_some_columns_get_the_others_of_the_table(table: CaptionTable, tmp_path: Path, columns: str) -> None:
    first, *_, last = page_of(table, tmp_path, query=f"SELECT {columns} FROM images ORDER BY image_id")["cards"]
    assert first["facts"]["mean_logprob"] == -0.5
    assert last["image"] == {"reason": "corrupt", "detail": "JPEG: cut short"}


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT key::VARCHAR AS key, image_id, caption FROM captions", "the rows' key is string; expected .*, int64"),
        ("SELECT key::UBIGINT AS key FROM captions", "the rows' key is uint64; expected the table's own, int64"),
        (
            "SELECT 7 AS image_id, caption FROM captions",
            "the rows' image_id is int32; expected the table's own, string",
        ),
    ],
)
def test_keys_and_names_of_another_type_are_refused(
    table: CaptionTable, tmp_path: Path, sql: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        page_of(table, tmp_path, query=sql)


def test_what_a_query_calls_candidates_is_shown_whatever_it_is(table: CaptionTable, tmp_path: Path) -> None:
    for made, shown in (("3", 3), ("{'a': 1}", "{'a': 1}"), ("['x']", "['x']"), ("NULL", None)):
        card = page_of(table, tmp_path, query=f"SELECT key, {made} AS candidates FROM captions")["cards"][0]
        assert card["facts"].get("candidates") == shown


def test_captions_that_were_not_chosen_are_shown_with_the_score_that_ranked_them() -> None:
    scored = [{"caption": text, "clip_score": score, "mean_logprob": -1.0} for text, score in (("a", 0.9), ("b", 0.5))]
    unscored = [{**one, "clip_score": None} for one in scored]
    for candidates, shown in ((scored, "b (0.500)"), (unscored, "b (-1.000)")):
        card = caption_card({"image_id": "x", "candidates": candidates}, Reject(RejectReason.EMPTY, ""))
        assert card.facts["caption 2"] == shown


def test_rows_that_name_no_image_are_refused(table: CaptionTable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="columns count; expected key or image_id"):
        write_gallery(pa.table({"count": [3]}), str(tmp_path / "out.html"), table_url=str(table.location))


def test_a_folder_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no caption table; expected the OUTPUT of jobs/caption\.py"):
        gallery(GalleryConfig(table=str(tmp_path), output=str(tmp_path / "out.html")))


def test_an_image_that_is_gone_is_a_placeholder_with_its_reason(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    (images / "004.jpg").unlink()
    (images / "005.jpg").write_bytes(b"<html>no longer a picture</html>")
    cards = page_of(table, tmp_path)["cards"]
    assert [cards[4]["image"]["reason"], cards[5]["image"]["reason"]] == ["missing", "not_an_image"]
    assert cards[4]["texts"][0]["runs"] == [["same", "a picture numbered 4"]]


def test_a_failure_that_was_captioned_since_is_shown_as_its_caption_only(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    add_part(table, [failure_row(12, "late.jpg", "fetch_failed"), failure_row(13, "never.jpg", "fetch_failed")])
    add_part(table, [{**failure_row(13, "never.jpg", "fetch_failed", "HTTP 503"), "attempt": 2}], run_id="run-2")
    add_part(table, [caption_row(12, "late.jpg", "at last")], run_id="run-2")
    cards = {card["id"]: card for card in page_of(table, tmp_path)["cards"]}
    assert len(cards) == len(page_of(table, tmp_path)["cards"]) == 14
    assert cards["late.jpg"]["texts"][0]["runs"] == [["same", "at last"]]
    for seed in range(6):  # in whatever order the parts are drawn
        drawn = TableRows.of(table).draw(200, seed).to_pylist()
        assert [row["detail"] for row in drawn if row["image_id"] == "never.jpg"] == ["HTTP 503"]
    assert cards["never.jpg"]["image"] == {"reason": "fetch_failed", "detail": "HTTP 503"}


def test_a_table_of_failures_alone_and_one_without_rows_give_a_page(tmp_path: Path, images: Path) -> None:
    failed, _ = begin_table(str(tmp_path / "failed"), str(images))
    add_part(failed, [failure_row(n, f"{n}.jpg", "forbidden", "HTTP 403") for n in range(3)])
    assert [card["image"]["reason"] for card in page_of(failed, tmp_path)["cards"]] == ["forbidden"] * 3
    empty, _ = begin_table(str(tmp_path / "empty"), str(images))
    page = page_of(empty, tmp_path)
    assert (page["cards"], page["lines"][0]) == ([], "The table has no rows yet.")


def test_a_sample_is_the_same_for_a_seed_and_has_failures_in_proportion(tmp_path: Path) -> None:
    rows = TableRows.of(table_of_many_parts(tmp_path))
    drawn = [rows.draw(100, seed) for seed in (0, 0, 1)]
    keys = [found.column("key").to_pylist() for found in drawn]
    assert keys[0] == keys[1] != keys[2]
    assert [len(set(found)) for found in keys] == [100] * 3
    assert drawn[0].column("reason").null_count == 90


def test_a_sample_of_many_parts_reads_some_of_them_and_a_key_only_its_own(tmp_path: Path) -> None:
    table = table_of_many_parts(tmp_path)
    rows = TableRows.of(table)
    for part in rows.captions[1:]:
        Path(part.url).write_bytes(b"nothing that can be read")
    with pytest.raises(InputError, match=r"cannot be read.*expected a part of a table"):
        rows.draw(100, 0)
    first = rows.captions[0]
    assert first.keys is not None
    assert rows.with_keys(np.array([first.keys[0]])).num_rows == 1
    assert len(choose_parts(rows.captions, 100, np.random.default_rng(0))) == 32


def table_of_many_parts(tmp_path: Path) -> CaptionTable:
    """Forty parts of 45 captions and 5 failures each."""
    table = CaptionTable(str(tmp_path / "many"))
    table.claim({"input": "nowhere"})
    for part in range(40):
        first = part * 50
        captions = [caption_row(n, f"{n}.jpg", f"caption {n}") for n in range(first, first + 45)]
        add_part(table, captions + [failure_row(n, f"{n}.jpg", "corrupt") for n in range(first + 45, first + 50)])
    return table


def test_each_row_is_drawn_about_as_often_as_any_other(tmp_path: Path) -> None:
    rows = TableRows.of(table_of_many_parts(tmp_path))
    counts = np.zeros(2000, int)
    for seed in range(15):
        counts[rows.draw(200, seed).column("key").to_numpy()] += 1
    by_part = counts.reshape(40, 50).sum(axis=1)
    assert counts.sum() == 15 * 200
    assert by_part.min() > 37  # of 75 expected; a part that were never chosen would have none
    assert by_part.max() < 130


def test_images_come_out_of_tars_and_parquet_and_only_the_wanted_rows_are_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for number in range(6):
            member = tarfile.TarInfo(f"{number}.jpg")
            data = encoded(seed=number, size=(30 + number, 20))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    values = [encoded(seed=number, size=(50 + number, 20)) for number in range(40)]
    pq.write_table(pa.table({"image": values}), tmp_path / "images.parquet", row_group_size=10)
    for place, keys, widths in (
        ("shard-0.tar", [1, 4], [31, 34]),
        ("images.parquet", [3, 12, 39], [53, 62, 89]),
    ):
        table, _ = begin_table(str(tmp_path / f"of-{place}"), str(tmp_path / place))
        source = TableImages.of(table)
        assert sum(rows.num_rows for rows in source.rows(source.frozen.units[0], keys)) == len(keys)
        images = thumbnails(source, [*keys, 999])
        assert [images[key].width for key in keys if isinstance(images[key], Thumbnail)] == widths
        gone = images[999]
        assert isinstance(gone, Reject)
        assert gone.reason == RejectReason.MISSING


def test_a_unit_that_changed_or_went_away_costs_its_own_images_only(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pq.write_table(pa.table({"image": [encoded(seed=1)] * 3}), tmp_path / f"{name}.parquet")
    table, _ = begin_table(str(tmp_path / "captions"), str(tmp_path / "*.parquet"))
    pq.write_table(pa.table({"image": [encoded(seed=1)] * 9}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").unlink()
    images = thumbnails(TableImages.of(table), [row_key(unit, 1) for unit in range(3)])
    assert isinstance(images[1], Thumbnail)
    assert [found.reason for found in images.values() if isinstance(found, Reject)] == ["changed", "fetch_failed"]
    changed = images[row_key(1, 1)]
    assert isinstance(changed, Reject)
    assert "changed since the job began" in changed.detail


@pytest.mark.parametrize("kind", ["images/*.jpg", "images.parquet", "images-0.tar"])
def test_a_table_on_a_store_leads_to_files_of_this_machine_only_where_that_is_allowed(
    s3: Bucket, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.jpg").write_bytes(encoded(seed=1))
    pq.write_table(pa.table({"image": [encoded(seed=1)]}), tmp_path / "images.parquet")
    with tarfile.open(tmp_path / "images-0.tar", "w") as tar:
        tar.add(tmp_path / "images/1.jpg", "1.jpg")
    table, _ = begin_table(f"{s3.url}/table", str(tmp_path / kind), options=s3.storage_options)
    refused = thumbnails(TableImages.of(table), [0])[0]
    assert isinstance(refused, Reject)
    assert refused.reason == RejectReason.UNSAFE_URI
    assert "--allow-local-uris" in refused.detail
    assert isinstance(thumbnails(TableImages.of(table, ImageAccessConfig(allow_local_uris=True)), [0])[0], Thumbnail)


@pytest.mark.parametrize("name", ["1.jpg", "images.parquet"])
def test_a_table_on_a_store_does_not_name_the_web_server_that_may_be_inside(
    s3: Bucket, tmp_path: Path, name: str
) -> None:
    (tmp_path / "1.jpg").write_bytes(encoded(seed=1))
    pq.write_table(pa.table({"image": [encoded(seed=1)]}), tmp_path / "images.parquet")
    with serving(server := ThreadingHTTPServer(("127.0.0.1", 0), partial(PlainFolder, directory=str(tmp_path)))):
        images = f"http://127.0.0.1:{server.server_port}/{name}"
        table, _ = begin_table(
            f"{s3.url}/table", images, options=s3.storage_options, input_options={"asynchronous": False}
        )
        [found] = thumbnails(TableImages.of(table), [0]).values()
    assert isinstance(found, Reject)
    assert found.reason == RejectReason.UNSAFE_URI


def test_a_table_and_its_images_on_s3_need_no_more_than_the_options_of_the_table(s3: Bucket, tmp_path: Path) -> None:
    for seed in range(3):
        s3.put(f"photos/{seed}.jpg", encoded(seed=seed))
    table, _ = begin_table(f"{s3.url}/captions", f"{s3.url}/photos", options=s3.storage_options)
    add_part(table, [caption_row(n, f"{s3.url}/photos/{n}.jpg", f"caption {n}") for n in range(3)])
    config = GalleryConfig(
        table=str(table.location), output=f"{s3.url}/out.html", storage_options=dict(s3.storage_options)
    )
    summary = gallery(config)
    assert (summary["pictures"], summary["output"]) == (3, f"{s3.url}/out.html")
    page = tmp_path / "out.html"
    page.write_bytes(s3.fs.cat_file(f"{s3.url}/out.html"))
    assert [card["texts"][0]["runs"][0][1] for card in data_of(page)["cards"]] == [
        "caption 0",
        "caption 1",
        "caption 2",
    ]


def test_columns_that_a_query_made_are_on_the_cards(table: CaptionTable, tmp_path: Path) -> None:
    rows = pa.table({"key": [7], "doubt": [0.9], "why": ["a reason of its own"]})
    write_gallery(rows, str(tmp_path / "out.html"), table_url=str(table.location))
    assert data_of(tmp_path / "out.html")["scores"] == ["doubt", "why", "mean_logprob"]


def test_what_makes_a_caption_doubtful_is_a_tag_in_words(table: CaptionTable, tmp_path: Path) -> None:
    rows = pa.table({"key": [7, 2], "doubt": [0.9, 0.2], "why": ["low clip_score, low min_logprob, truncated", ""]})
    write_gallery(rows, str(tmp_path / "out.html"), table_url=str(table.location))
    page = data_of(tmp_path / "out.html")
    assert page["scores"] == ["doubt", "mean_logprob"]
    assert page["cards"][0]["tags"] == ["complete", "poor match", "one unsure word", "cut off"]
    assert page["cards"][1]["tags"] == ["complete"]


def test_each_doubt_of_a_review_has_words(table: CaptionTable) -> None:
    with contextlib.closing(duckdb.connect()) as connection:
        connection.sql("CREATE TABLE captions AS SELECT range::BIGINT AS key, false AS is_repetitive FROM range(9)")
        for column in SCORES:
            connection.sql(f"ALTER TABLE captions ADD COLUMN {column} FLOAT")
            connection.sql(f"UPDATE captions SET {column} = -key")
        connection.sql("ALTER TABLE captions ADD COLUMN finish_reason VARCHAR")
        doubts = set(re.findall(r"THEN '([^']*)' END", doubtful_sql(connection, 1)))
    assert {f"low {score}" for score in SCORES} < doubts
    assert all(doubt_words(doubt) for doubt in doubts)


def test_a_caption_is_complete_or_cut_off(table: CaptionTable, images: Path, tmp_path: Path) -> None:
    add_part(table, [caption_row(12, "long.jpg", "a long caption that", finish_reason="length")])
    cards = page_of(table, tmp_path)["cards"]
    assert [card["tags"] for card in (cards[0], cards[-1])] == [["complete"], ["cut off"]]
    assert cards[-1]["facts"]["finish_reason"] == "cut off (length)"
    assert {tuple(card["tags"]) for card in cards if card["failed"]} == {("failed", "corrupt")}


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ("/usr/lib/python3/site-packages/captioner/demo/bundle", "the demo model"),
        ("/models/llava-1.5-7b-hf", "llava-1.5-7b-hf"),
        ("/runs/photos-3/bundle/", "photos-3/bundle"),
        ("/runs/photos-3/checkpoint-500", "photos-3/checkpoint-500"),
        ("/bundle", "bundle"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("s3://bucket/models/bundle", "s3://bucket/models/bundle"),
        ("/c/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/0ab1", "llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_a_page_names_the_model_as_people_do(recorded: str, shown: str) -> None:
    assert model_name(recorded) == shown


def test_each_card_has_the_path_of_its_image_to_copy_though_it_failed(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    cards = page_of(table, tmp_path)["cards"]
    assert [card["path"] for card in cards] == [f"{images}/{n:03d}.jpg" for n in range(12)]
    pq.write_table(pa.table({"image": [encoded()] * 3}), tmp_path / "images.parquet")
    packed, _ = begin_table(str(tmp_path / "packed"), str(tmp_path / "images.parquet"))
    add_part(packed, [caption_row(1, "images.parquet#1", "a dog")])
    assert [card["path"] for card in page_of(packed, tmp_path)["cards"]] == [str(tmp_path / "images.parquet")]


def test_rows_of_sql_come_in_its_order_and_the_page_says_so(table: CaptionTable, tmp_path: Path) -> None:
    sql = "SELECT image_id, length(caption) AS letters FROM captions WHERE caption LIKE '%picture%' ORDER BY key DESC"
    page = page_of(table, tmp_path, query=sql, sample=3)
    assert [card["id"].rpartition("/")[2] for card in page["cards"]] == ["009.jpg", "008.jpg", "007.jpg"]
    assert (page["lines"][0], page["scores"][0]) == (f"The first 3 rows of: {sql}", "letters")
    failed = page_of(table, tmp_path, query="SELECT * FROM images WHERE reason = 'corrupt'")
    assert [card["image"]["reason"] for card in failed["cards"]] == ["corrupt", "corrupt"]


def test_references_are_below_the_captions_of_their_images(table: CaptionTable, tmp_path: Path) -> None:
    (tmp_path / "references.csv").write_text("image_id,caption\n003,a first one\n003,another\nelsewhere,of no image\n")
    cards = page_of(table, tmp_path, references=str(tmp_path / "references.csv"))["cards"]
    told = [[(text["label"], text["runs"][0][1]) for text in card["texts"][1:]] for card in cards[:10]]
    assert told == [[], [], [], [("reference", "a first one"), ("reference", "another")], [], [], [], [], [], []]


def test_the_answers_to_another_prompt_stand_above_the_references_in_place_of_the_captions(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    add_moods(table, images, {3: "calm"})
    (tmp_path / "references.csv").write_text("image_id,said\n003,quiet\n004,loud\n")
    flags = {"references": str(tmp_path / "references.csv"), "reference_column": "said", "caption_column": "mood"}
    for columns in ("", "key", ", ".join(CAPTIONS.names)):
        query = f"SELECT {columns} FROM captions ORDER BY key" if columns else None
        cards = page_of(table, tmp_path, **flags, query=query)["cards"]
        assert [(text["label"], text["runs"]) for text in cards[3]["texts"]] == [
            ("", [["same", "calm"]]),
            ("reference", [["same", "quiet"]]),
        ]
        assert cards[3]["facts"]["mean_logprob"] == -3.0
        assert [text["runs"] for text in cards[4]["texts"]] == [[["same", "no answer"]], [["same", "loud"]]]
    own = page_of(table, tmp_path, references=str(table.location), reference_column="mood")["cards"]
    assert [text["label"] for text in own[3]["texts"]] == ["", "mood", "reference"]


def test_columns_that_are_not_there_are_refused(table: CaptionTable, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--caption-column is mod; expected a prompt that .* answers: caption\. To get"
    ):
        page_of(table, tmp_path, caption_column="mod")
    with pytest.raises(
        InputError, match=r"has no column mod of texts, for --reference-column; it has image_id, caption"
    ):
        page_of(table, tmp_path, references=str(table.location), reference_column="mod")
    for references in (None, "demo"):
        with pytest.raises(ConfigError, match="--reference-column is said; expected --references with it, a file or"):
            page_of(table, tmp_path, references=references, reference_column="said")


def test_references_of_other_images_are_refused(table: CaptionTable, tmp_path: Path) -> None:
    (tmp_path / "references.csv").write_text("image_id,caption\nelsewhere,a caption\n")
    with pytest.raises(InputError, match=r"has a reference of none of 12 images, such as .*/000\.jpg"):
        page_of(table, tmp_path, references=str(tmp_path / "references.csv"))
