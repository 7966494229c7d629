"""The file of a page: what it may hold, how large it gets, and wrong use."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioner.command_line import run
from captioner.config import GalleryConfig, ImageConfig
from captioner.gallery import Card, Page, Text
from captioner.gallery.caption_cards import caption_card, pair_card
from captioner.gallery.gallery_job import gallery
from captioner.gallery.page import page_html
from captioner.gallery.page_images import room_for
from captioner.images.thumbnails import Thumbnail, Thumbnailer
from captioner.schema import Reject, RejectReason
from captioner.tables import CaptionTable
from tests.caption_tables import caption_row
from tests.sample_images import encoded


def test_credentials_in_ids_columns_and_details_never_reach_the_page(tmp_path: Path) -> None:
    url = "https://user:pass-word@host/x.jpg?X-Amz-Signature=5ec4e7&size=2"
    refusal = Reject(RejectReason.FORBIDDEN, f"HTTP 403 for {url}")
    card = Card(image_id=url, image=refusal, texts=[Text.of(url, url)], facts={"source": url, url: 1}, tags=[url])
    rows = {"caption": url, "image_id": url}, {"caption": url.replace("5ec4e7", "5ec4e78"), "image_id": url}
    pair = pair_card(rows, ("one", "two"), refusal, 0.1)
    text = page_html(Page(title=url, cards=[card, pair], lines=[url]))
    assert "5ec4e7" not in text
    assert "pass-word" not in text
    assert "size=2" in text


def test_what_json_and_html_cannot_hold_is_written_so_that_both_can(tmp_path: Path) -> None:
    facts = {"nan": float("nan"), "inf": float("-inf"), "number": 2**53, "large": -(2**60)}
    card = Card(image_id="</script>\u2028\ud800", image=Reject(RejectReason.EMPTY, ""), texts=[], facts=facts)
    text = page_html(Page(title="</title><script>", cards=[card]))
    assert text.count("</script") == 2
    assert "\u2028" not in text
    [found] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])["cards"]
    assert found["id"] == "</script>\u2028\\ud800"
    assert found["facts"] == {"nan": "nan", "inf": "-inf", "number": 2**53, "large": str(-(2**60))}


def test_a_page_of_five_hundred_has_room_for_images_that_stay_below_fifteen_megabytes() -> None:
    for num_images in (1, 100, 499, 500):
        for page_bytes in (0, 500_000, 10_000_000):
            _, max_bytes = room_for(num_images, page_bytes)
            assert page_bytes + num_images * max_bytes * 4 / 3 < 14_600_000


def test_a_page_with_long_columns_stays_below_fifteen_megabytes_with_its_images(tmp_path: Path) -> None:
    vector, letters = "[" + "0.123456, " * 768 + "]", "一" * 5_000
    candidates = [{"caption": "a word " * 50, "clip_score": 0.5}] * 8
    row = {**caption_row(0, "a.jpg", "a word " * 50), "vector": vector, "letters": letters, "candidates": candidates}
    page = Page(title="Long", cards=[caption_card(row, Reject(RejectReason.EMPTY, ""))] * 500)
    text_bytes = len(page_html(page).encode())
    _, max_bytes = room_for(500, text_bytes)
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
    monkeypatch.chdir(Path(table.location.local_path).parent)
    assert run(GalleryConfig, gallery, flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_the_page_is_named_after_the_table_by_default() -> None:
    assert GalleryConfig(table="s3://bucket/captions/").output == "captions.html"
