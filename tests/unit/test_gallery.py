"""The gallery: which rows and pictures come on the page, and what it says where there is none."""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from captioner.command_line import run
from captioner.config import GalleryConfig, ImageConfig
from captioner.errors import InputError, JobError
from captioner.gallery import Card, Page, Text, write_gallery
from captioner.gallery.caption_cards import caption_card, pair_card
from captioner.gallery.comparison import compare
from captioner.gallery.differences import change, difference
from captioner.gallery.page import page_html
from captioner.gallery.pictures import _room, thumbnails
from captioner.gallery.table_rows import TableRows, _some, ask_rows
from captioner.gallery_job import gallery
from captioner.images.thumbnails import Thumbnail, Thumbnailer
from captioner.rows import Reject, RejectReason, row_key
from captioner.table_images import TableImages
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images
from tests.conftest import Bucket
from tests.pictures import encoded


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    return dict(json.loads(found.group(1)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 12)


@pytest.fixture
def table(tmp_path: Path, images: Path) -> CaptionTable:
    """Ten captions and two failures."""
    table, _ = begin_table(str(tmp_path / "captions"), str(images))
    rows = [caption_row(n, f"{images}/{n:03d}.jpg", f"a picture numbered {n}") for n in range(10)]
    add_part(table, rows + [failure_row(n, f"{images}/{n:03d}.jpg", "corrupt", "JPEG: cut short") for n in (10, 11)])
    return table


def page_of(table: CaptionTable, tmp_path: Path, **flags: Any) -> dict[str, Any]:
    output = tmp_path / "out.html"
    gallery(GalleryConfig(table=table.url, output=str(output), **flags))
    return data_of(output)


def test_every_row_of_a_small_table_comes_with_its_picture_or_its_reason(table: CaptionTable, tmp_path: Path) -> None:
    cards = page_of(table, tmp_path)["cards"]
    assert [card["id"].rpartition("/")[2] for card in cards] == [f"{n:03d}.jpg" for n in range(12)]
    assert [card["texts"][0]["runs"] for card in cards[:2]] == [
        [["same", "a picture numbered 0"]],
        [["same", "a picture numbered 1"]],
    ]
    assert {(card["picture"]["width"], card["picture"]["height"]) for card in cards[:10]} == {(48, 40)}
    assert [card["picture"] for card in cards[10:]] == [{"reason": "corrupt", "detail": "JPEG: cut short"}] * 2


def test_rows_of_a_query_come_in_their_order_with_their_own_columns_and_what_the_table_knows(
    table: CaptionTable, tmp_path: Path
) -> None:
    rows = pa.table({"key": [row_key(0, 7), row_key(0, 2), row_key(0, 10)], "doubt": [0.9, 0.5, 0.1]})
    summary = write_gallery(rows, str(tmp_path / "out.html"), table_url=table.url, title="Doubtful")
    cards = data_of(tmp_path / "out.html")["cards"]
    assert [card["id"].rpartition("/")[2] for card in cards] == ["007.jpg", "002.jpg", "010.jpg"]
    assert cards[0]["texts"][0]["runs"] == [["same", "a picture numbered 7"]]
    assert [card["facts"]["doubt"] for card in cards] == [0.9, 0.5, 0.1]
    assert (summary["rows"], summary["pictures"]) == (3, 2)


def test_rows_that_name_images_without_keys_are_found(table: CaptionTable, images: Path, tmp_path: Path) -> None:
    rows = pa.table({"image_id": [f"{images}/003.jpg"], "caption": ["another caption"]})
    write_gallery(rows, str(tmp_path / "out.html"), table_url=table.url)
    [card] = data_of(tmp_path / "out.html")["cards"]
    assert "data" in card["picture"]
    assert card["texts"][0]["runs"] == [["same", "another caption"]]


@pytest.mark.parametrize("columns", ["key, image_id, caption", "key, caption", "image_id, caption, reason"])
def test_rows_of_some_columns_get_the_others_of_the_table(table: CaptionTable, tmp_path: Path, columns: str) -> None:
    first, *_, last = page_of(table, tmp_path, query=f"SELECT {columns} FROM images ORDER BY image_id")["cards"]
    assert first["facts"]["mean_logprob"] == -0.5
    assert last["picture"] == {"reason": "corrupt", "detail": "JPEG: cut short"}


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


def test_captions_that_were_not_chosen_stand_with_the_score_that_ranked_them() -> None:
    scored = [{"caption": text, "clip_score": score, "mean_logprob": -1.0} for text, score in (("a", 0.9), ("b", 0.5))]
    unscored = [{**one, "clip_score": None} for one in scored]
    for candidates, shown in ((scored, "b (0.500)"), (unscored, "b (-1.000)")):
        card = caption_card({"image_id": "x", "candidates": candidates}, Reject(RejectReason.EMPTY, ""))
        assert card.facts["caption 2"] == shown


def test_rows_that_name_no_image_are_refused(table: CaptionTable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="columns count; expected key or image_id"):
        write_gallery(pa.table({"count": [3]}), str(tmp_path / "out.html"), table_url=table.url)


def test_a_folder_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no caption table; expected the OUTPUT of jobs/caption\.py"):
        gallery(GalleryConfig(table=str(tmp_path), output=str(tmp_path / "out.html")))


def test_an_image_that_is_gone_is_a_placeholder_with_its_reason(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    (images / "004.jpg").unlink()
    (images / "005.jpg").write_bytes(b"<html>no longer a picture</html>")
    cards = page_of(table, tmp_path)["cards"]
    assert [cards[4]["picture"]["reason"], cards[5]["picture"]["reason"]] == ["missing", "not_an_image"]
    assert cards[4]["texts"][0]["runs"] == [["same", "a picture numbered 4"]]


def test_a_failure_that_was_mended_since_is_shown_as_its_caption_only(
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
    assert cards["never.jpg"]["picture"] == {"reason": "fetch_failed", "detail": "HTTP 503"}


def test_a_table_of_failures_alone_and_one_without_rows_give_a_page(tmp_path: Path, images: Path) -> None:
    failed, _ = begin_table(str(tmp_path / "failed"), str(images))
    add_part(failed, [failure_row(n, f"{n}.jpg", "forbidden", "HTTP 403") for n in range(3)])
    assert [card["picture"]["reason"] for card in page_of(failed, tmp_path)["cards"]] == ["forbidden"] * 3
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
    assert len(_some(rows.captions, 100, np.random.default_rng(0))) == 32


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
    for seed in range(30):
        counts[rows.draw(200, seed).column("key").to_numpy()] += 1
    by_part = counts.reshape(40, 50).sum(axis=1)
    assert counts.sum() == 30 * 200
    assert by_part.min() > 60  # of 150 expected; a part that were never chosen would have none
    assert by_part.max() < 260


def test_pictures_come_out_of_tars_and_parquet_and_only_the_wanted_rows_are_kept(tmp_path: Path) -> None:
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
        source = TableImages.of(table, {})
        assert sum(rows.num_rows for rows in source._rows(source.frozen.units[0], keys)) == len(keys)
        pictures = thumbnails(source, [*keys, 999])
        assert [pictures[key].width for key in keys if isinstance(pictures[key], Thumbnail)] == widths
        gone = pictures[999]
        assert isinstance(gone, Reject)
        assert gone.reason == RejectReason.MISSING


def test_a_unit_that_changed_or_went_away_costs_its_own_pictures_only(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pq.write_table(pa.table({"image": [encoded(seed=1)] * 3}), tmp_path / f"{name}.parquet")
    table, _ = begin_table(str(tmp_path / "captions"), str(tmp_path / "*.parquet"))
    pq.write_table(pa.table({"image": [encoded(seed=1)] * 9}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").unlink()
    pictures = thumbnails(TableImages.of(table, {}), [row_key(unit, 1) for unit in range(3)])
    assert isinstance(pictures[1], Thumbnail)
    assert [found.reason for found in pictures.values() if isinstance(found, Reject)] == ["changed", "fetch_failed"]
    changed = pictures[row_key(1, 1)]
    assert isinstance(changed, Reject)
    assert "changed since the job began" in changed.detail


def test_a_table_and_its_images_on_s3_need_no_more_than_the_options_of_the_table(s3: Bucket, tmp_path: Path) -> None:
    for seed in range(3):
        s3.put(f"photos/{seed}.jpg", encoded(seed=seed))
    table, _ = begin_table(f"{s3.url}/captions", f"{s3.url}/photos", options=s3.storage_options)
    add_part(table, [caption_row(n, f"{s3.url}/photos/{n}.jpg", f"caption {n}") for n in range(3)])
    config = GalleryConfig(table=table.url, output=f"{s3.url}/out.html", storage_options=dict(s3.storage_options))
    summary = gallery(config)
    assert (summary["pictures"], summary["output"]) == (3, f"{s3.url}/out.html")
    page = tmp_path / "out.html"
    page.write_bytes(s3.fs.cat_file(f"{s3.url}/out.html"))
    assert [card["texts"][0]["runs"][0][1] for card in data_of(page)["cards"]] == [
        "caption 0",
        "caption 1",
        "caption 2",
    ]


def test_columns_that_a_query_made_stand_on_the_cards(table: CaptionTable, tmp_path: Path) -> None:
    rows = pa.table({"key": [7], "doubt": [0.9], "why": ["low clip_score"]})
    write_gallery(rows, str(tmp_path / "out.html"), table_url=table.url)
    assert data_of(tmp_path / "out.html")["scores"] == ["doubt", "why", "mean_logprob"]


def test_rows_of_sql_come_in_its_order_and_the_page_says_so(table: CaptionTable, tmp_path: Path) -> None:
    sql = "SELECT image_id, length(caption) AS letters FROM captions WHERE caption LIKE '%picture%' ORDER BY key DESC"
    page = page_of(table, tmp_path, query=sql, sample=3)
    assert [card["id"].rpartition("/")[2] for card in page["cards"]] == ["009.jpg", "008.jpg", "007.jpg"]
    assert (page["lines"][0], page["scores"][0]) == (f"The first 3 rows of: {sql}", "letters")
    failed = page_of(table, tmp_path, query="SELECT * FROM images WHERE reason = 'corrupt'")
    assert [card["picture"]["reason"] for card in failed["cards"]] == ["corrupt", "corrupt"]


def test_references_stand_below_the_captions_of_their_images(table: CaptionTable, tmp_path: Path) -> None:
    (tmp_path / "references.csv").write_text("image_id,caption\n003,a first one\n003,another\nelsewhere,of no image\n")
    cards = page_of(table, tmp_path, references=str(tmp_path / "references.csv"))["cards"]
    told = [[(text["label"], text["runs"][0][1]) for text in card["texts"][1:]] for card in cards[:10]]
    assert told == [[], [], [], [("reference", "a first one"), ("reference", "another")], [], [], [], [], [], []]


def test_references_of_other_images_are_refused(table: CaptionTable, tmp_path: Path) -> None:
    (tmp_path / "references.csv").write_text("image_id,caption\nelsewhere,a caption\n")
    with pytest.raises(InputError, match=r"has a reference of none of 12 images, such as .*/000\.jpg"):
        page_of(table, tmp_path, references=str(tmp_path / "references.csv"))


# Two tables


def other_run(table: CaptionTable, images: Path, url: str, captions: dict[int, str], input_path: str = "") -> str:
    """Another run over the same images whose captions differ where `captions` says so."""
    other, _ = begin_table(url, input_path or str(images), identity={"decoding": {"num_beams": 4}})
    rows = [caption_row(n, f"{images}/{n:03d}.jpg", captions.get(n, f"a picture numbered {n}")) for n in range(10)]
    add_part(other, rows)
    return url


def test_the_largest_change_comes_first_with_what_differs_in_the_settings(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    captions = {3: "a picture numbered three", 5: "no word in common", 7: "one picture numbered 7 or eight"}
    other = other_run(table, images, str(tmp_path / "other"), captions)
    page = page_of(table, tmp_path, compare=other, sample=4)
    assert [card["id"].rpartition("/")[2] for card in page["cards"]] == ["005.jpg", "007.jpg", "003.jpg", "000.jpg"]
    assert page["cards"][2]["texts"][0]["runs"] == [["same", "a picture numbered "], ["removed", "3"]]
    assert page["cards"][2]["texts"][1]["runs"] == [["same", "a picture numbered "], ["added", "three"]]
    assert page["lines"] == [
        "Of 10 captions compared, 3 differ (30%); the 4 with the largest changes come first.",
        "2 more are not in other.",
        "decoding.num_beams: None in captions, 4 in other.",
    ]


def test_tables_of_one_set_of_images_in_another_order_are_matched_by_image(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    other, _ = begin_table(str(tmp_path / "other"), f"{images}/00*.jpg")
    rows = [caption_row(9 - n, f"{images}/{n:03d}.jpg", f"a picture numbered {n}") for n in range(10)]
    add_part(other, rows)
    page = page_of(table, tmp_path, compare=other.url)
    assert {card["facts"]["change"] for card in page["cards"]} == {0.0}
    assert len(page["cards"]) == 10


def test_a_listing_that_changed_between_two_runs_of_one_input_costs_no_pair(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    (images / "0.jpg").write_bytes(encoded())  # sorted first: each key means the image before it now
    other, _ = begin_table(str(tmp_path / "other"), str(images))
    add_part(other, [caption_row(n + 1, f"{images}/{n:03d}.jpg", f"a picture numbered {n}") for n in range(10)])
    page = page_of(table, tmp_path, compare=other.url)
    assert len(page["cards"]) == 10
    assert {card["facts"]["change"] for card in page["cards"]} == {0.0}


def test_tables_of_one_listing_are_matched_by_key_without_reading_every_name(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    other = other_run(table, images, str(tmp_path / "other"), {})
    first, second = TableRows.of(table), TableRows.of(CaptionTable(other))
    add_part(CaptionTable(other), [caption_row(10**6, "far off", "x")])
    far = next(part for part in TableRows.of(CaptionTable(other)).captions if part.keys == (10**6, 10**6))
    second.captions.append(far)
    Path(far.url).write_bytes(b"nothing that can be read")
    assert compare(first, second, 20, 0).num_compared == 10


@pytest.mark.parametrize("failures", [[], [failure_row(0, "000.jpg", "missing")]])
def test_a_table_without_captions_can_be_compared_with_its_like(
    images: Path, tmp_path: Path, failures: list[dict[str, Any]]
) -> None:
    tables = [begin_table(str(tmp_path / name), str(images))[0] for name in ("one", "two")]
    for one in tables:
        add_part(one, failures)
    page = page_of(tables[0], tmp_path, compare=tables[1].url)
    assert [card["facts"]["change"] for card in page["cards"]] == [0.0] * len(failures)


# While a job writes


@pytest.mark.parametrize("flags", [{}, {"query": "SELECT key FROM captions"}, {"compare": "other"}])
def test_a_page_of_a_table_whose_parts_are_moved_meanwhile_is_made_of_those_that_are_there(
    table: CaptionTable, images: Path, tmp_path: Path, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other_run(table, images, str(tmp_path / "other"), {})
    monkeypatch.chdir(tmp_path)
    made = []
    whole = TableRows.of

    def of(asked: CaptionTable) -> TableRows:
        found = whole(asked)
        if made.append(asked) or len(made) == 1:
            for part in Path(table.url, "captions").iterdir():
                part.rename(part.with_name(part.name.replace("part-", "part-moved-")))
        return found

    monkeypatch.setattr(TableRows, "of", of)
    assert len(page_of(table, tmp_path, **flags)["cards"]) >= 10
    assert len(made) > 1


def test_parts_that_go_away_all_the_time_end_in_an_error(table: CaptionTable) -> None:
    def question(rows: TableRows) -> pa.Table:
        for part in Path(table.url, "captions").iterdir():
            part.rename(part.with_name(part.name.replace("part-", "part-moved-")))
        return rows.draw(5, 0)

    with pytest.raises(JobError, match="was moved while it was read, 5 times"):
        ask_rows(table, question)


def test_a_failure_in_one_run_alone_is_a_whole_change(table: CaptionTable, images: Path, tmp_path: Path) -> None:
    other, _ = begin_table(str(tmp_path / "other"), str(images))
    add_part(other, [failure_row(0, f"{images}/000.jpg", "missing", "HTTP 404")])
    add_part(other, [failure_row(10, f"{images}/010.jpg", "corrupt", "JPEG: cut short")])
    cards = page_of(table, tmp_path, compare=other.url)["cards"]
    assert [card["facts"]["change"] for card in cards] == [1.0, 0.0]
    assert [text["missing"] for text in cards[0]["texts"]] == [False, True]
    assert cards[0]["texts"][1]["runs"] == [["same", "missing: HTTP 404"]]


def test_tables_without_a_common_image_are_refused(table: CaptionTable, images: Path, tmp_path: Path) -> None:
    other, _ = begin_table(str(tmp_path / "other"), f"{images}/00*.jpg")
    add_part(other, [caption_row(0, "elsewhere.jpg", "a caption")])
    with pytest.raises(InputError, match=r"has none of 12 images of .*; expected two runs over the same images"):
        page_of(table, tmp_path, compare=other.url)


@pytest.mark.parametrize(
    ("first", "second", "removed", "added"),
    [
        ("a dog", "a dog", [], []),
        ("a  dog\n", " a dog", [], []),
        ("a dog, sleeping", "a dog sleeping", [", "], []),
        ("the man's hat", "the hat", ["man's "], []),
        ("一只狗", "一只猫", ["狗"], ["猫"]),
        ("", "a dog", [], ["a dog"]),
    ],
)
def test_words_are_compared_not_spaces(first: str, second: str, removed: list[str], added: list[str]) -> None:
    found = difference(first, second)
    assert [words for kind, words in found.first if kind == "removed"] == removed
    assert [words for kind, words in found.second if kind == "added"] == added
    assert "".join(words for _, words in found.first) == first.strip()
    assert "".join(words for _, words in found.second) == second.strip()
    assert (change(first, second) == 0) == (not removed and not added)


# The page


def test_credentials_in_ids_columns_and_details_never_reach_the_page(tmp_path: Path) -> None:
    url = "https://user:pass-word@host/x.jpg?X-Amz-Signature=5ec4e7&size=2"
    refusal = Reject(RejectReason.FORBIDDEN, f"HTTP 403 for {url}")
    card = Card(image_id=url, picture=refusal, texts=[Text.of(url, url)], facts={"source": url, url: 1}, tags=[url])
    rows = {"caption": url, "image_id": url}, {"caption": url.replace("5ec4e7", "5ec4e78"), "image_id": url}
    pair = pair_card(rows, ("one", "two"), refusal, 0.1)
    text = page_html(Page(title=url, cards=[card, pair], lines=[url]))
    assert "5ec4e7" not in text
    assert "pass-word" not in text
    assert "size=2" in text


def test_what_json_and_html_cannot_hold_is_written_so_that_both_can(tmp_path: Path) -> None:
    facts = {"nan": float("nan"), "inf": float("-inf"), "number": 2**53, "large": -(2**60)}
    card = Card(image_id="</script>\u2028\ud800", picture=Reject(RejectReason.EMPTY, ""), texts=[], facts=facts)
    text = page_html(Page(title="</title><script>", cards=[card]))
    assert text.count("</script") == 2
    assert "\u2028" not in text
    [found] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])["cards"]
    assert found["id"] == "</script>\u2028\\ud800"
    assert found["facts"] == {"nan": "nan", "inf": "-inf", "number": 2**53, "large": str(-(2**60))}


def test_a_page_of_five_hundred_has_room_for_pictures_that_stay_below_fifteen_megabytes() -> None:
    for num_pictures in (1, 100, 499, 500):
        for page_bytes in (0, 500_000, 10_000_000):
            _, max_bytes = _room(num_pictures, page_bytes)
            assert page_bytes + num_pictures * max_bytes * 4 / 3 < 14_600_000


def test_a_page_with_long_columns_stays_below_fifteen_megabytes_with_its_pictures(tmp_path: Path) -> None:
    vector, letters = "[" + "0.123456, " * 768 + "]", "一" * 5_000
    candidates = [{"caption": "a word " * 50, "clip_score": 0.5}] * 8
    row = {**caption_row(0, "a.jpg", "a word " * 50), "vector": vector, "letters": letters, "candidates": candidates}
    page = Page(title="Long", cards=[caption_card(row, Reject(RejectReason.EMPTY, ""))] * 500)
    text_bytes = len(page_html(page).encode())
    _, max_bytes = _room(500, text_bytes)
    assert text_bytes + 500 * max_bytes * 4 / 3 < 14_600_000
    assert max_bytes > 12_000
    [card, *_] = json.loads(page_html(page).partition('id="data">')[2].partition("</script>")[0])["cards"]
    assert (len(card["facts"]["letters"]), card["facts"]["letters"][-2:]) == (500, "一…")


def test_a_thumbnail_keeps_the_shape_and_its_bytes_in_bounds_and_is_never_enlarged() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    with Thumbnailer(ImageConfig(), side=200, max_bytes=5_000) as thumbnailer:
        reject = Reject(RejectReason.MISSING, "gone")
        first, small, empty, gone = thumbnailer.make_all([buffer.getvalue(), encoded(size=(90, 10)), b"", reject])
    assert isinstance(first, Thumbnail)
    assert len(first.data) <= 5_000
    assert first.width / first.height == pytest.approx(4 / 3, rel=0.02)
    assert isinstance(small, Thumbnail)
    assert Image.open(io.BytesIO(small.data)).size == (small.width, small.height) == (90, 10)
    assert isinstance(empty, Reject)
    assert gone is reject


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere", "out.html"], "nowhere is no caption table; expected the OUTPUT of jobs/caption.py"),
        (["nowhere", "out.pdf"], "OUT.html is out.pdf; expected a name that ends in .html"),
        (["nowhere", "out.html", "--sample", "0"], "--sample is 0; expected 1 to 5,000"),
        (["nowhere", "out.html", "--compare", "b", "--query", "FROM captions"], "expected none with --compare"),
        (["captions", "out.html", "--query", "SELECT captoin FROM captions"], '"captoin" not found'),
        (["captions", "out.html", "--query", "SELECT count(*) AS n FROM captions"], "the rows have the columns n;"),
        (["captions", "out.html", "--query", "DROP TABLE captions"], "expected one SELECT"),
    ],
)
def test_wrong_use_says_what_was_expected_and_exits_with_2(
    flags: list[str],
    message: str,
    table: CaptionTable,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(table.url).parent)
    assert run(GalleryConfig, gallery, flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_the_page_is_named_after_the_table_by_default() -> None:
    assert GalleryConfig(table="s3://bucket/captions/").output == "captions.html"
