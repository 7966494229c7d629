"""Pages of two tables, and of tables whose parts are moved while a page is made."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captioner.errors import ConfigError, InputError, JobError
from captioner.gallery.comparison import compare
from captioner.gallery.differences import change, difference, unmatched
from captioner.gallery.table_rows import TableRows, ask_rows
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row, failure_row
from tests.sample_images import encoded
from tests.unit.gallery.conftest import add_moods, page_of


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
        "Of 10 captions compared, 3 differ (30%); the largest changes come first.",
        "2 more are not in other.",
        "decoding.num_beams: None in captions, 4 in other.",
    ]


def test_the_answers_to_a_prompt_that_was_added_later_are_compared_where_it_is_named(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    other = other_run(table, images, str(tmp_path / "other"), {9: "another caption"})
    add_moods(table, images, {0: "calm", 1: "a calm sea", 2: "gay"})
    with pytest.raises(
        ConfigError, match=r"--caption-column is mood; expected a prompt that \S+other answers: caption\."
    ):
        page_of(table, tmp_path, compare=other, caption_column="mood")
    add_moods(CaptionTable(other), images, {0: "calm", 1: "a wild sea", 3: "dull"})
    page = page_of(table, tmp_path, compare=other, caption_column="mood", sample=4)
    assert page["lines"][:3] == [
        "The texts are the answers to the prompt mood.",
        "Of 2 answers compared, 1 differ (50%).",
        "Without an answer: 1 in captions alone, 1 in other alone, 6 in both; these come last.",
    ]
    assert [card["id"].rpartition("/")[2] for card in page["cards"]] == ["001.jpg", "000.jpg", "002.jpg", "003.jpg"]
    changed, same, *missing = page["cards"]
    assert changed["texts"][0]["runs"] == [["same", "a "], ["removed", "calm "], ["same", "sea"]]
    assert same["tags"] == ["same", "complete", "repetitive"]
    assert changed["facts"]["mean_logprob, captions"] == -3.0
    assert [text["runs"] for text in missing[0]["texts"]] == [[["same", "gay"]], [["same", "no answer"]]]
    assert [card["failed"] for card in page["cards"]] == [False, False, True, True]
    assert "changed" in page_of(table, tmp_path, compare=other)["cards"][0]["tags"]


def test_tables_of_one_set_of_images_in_another_order_are_matched_by_image(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    other, _ = begin_table(str(tmp_path / "other"), f"{images}/00*.jpg")
    rows = [caption_row(9 - n, f"{images}/{n:03d}.jpg", f"a picture numbered {n}") for n in range(10)]
    add_part(other, rows)
    page = page_of(table, tmp_path, compare=str(other.location))
    assert {card["facts"]["change"] for card in page["cards"]} == {0.0}
    assert len(page["cards"]) == 10


def test_a_listing_that_changed_between_two_runs_of_one_input_costs_no_pair(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    (images / "0.jpg").write_bytes(encoded())  # sorted first: each key means the image before it now
    other, _ = begin_table(str(tmp_path / "other"), str(images))
    add_part(other, [caption_row(n + 1, f"{images}/{n:03d}.jpg", f"a picture numbered {n}") for n in range(10)])
    page = page_of(table, tmp_path, compare=str(other.location))
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
def test_a_table_without_captions_can_be_compared_with_another_one(
    images: Path, tmp_path: Path, failures: list[dict[str, Any]]
) -> None:
    tables = [begin_table(str(tmp_path / name), str(images))[0] for name in ("one", "two")]
    for one in tables:
        add_part(one, failures)
    page = page_of(tables[0], tmp_path, compare=str(tables[1].location))
    assert [card["facts"]["change"] for card in page["cards"]] == [0.0] * len(failures)


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
            for part in Path(table.location.local_path, "captions").iterdir():
                part.rename(part.with_name(part.name.replace("part-", "part-moved-")))
        return found

    monkeypatch.setattr(TableRows, "of", of)
    assert len(page_of(table, tmp_path, **flags)["cards"]) >= 10
    assert len(made) > 1


def test_parts_that_go_away_all_the_time_end_in_an_error(table: CaptionTable) -> None:
    def question(rows: TableRows) -> pa.Table:
        for part in Path(table.location.local_path, "captions").iterdir():
            part.rename(part.with_name(part.name.replace("part-", "part-moved-")))
        return rows.draw(5, 0)

    with pytest.raises(JobError, match="was moved while it was read, 5 times"):
        ask_rows(table, question)


def test_a_failure_in_one_run_alone_is_a_whole_change(table: CaptionTable, images: Path, tmp_path: Path) -> None:
    other, _ = begin_table(str(tmp_path / "other"), str(images))
    add_part(other, [failure_row(0, f"{images}/000.jpg", "missing", "HTTP 404")])
    add_part(other, [failure_row(10, f"{images}/010.jpg", "corrupt", "JPEG: cut short")])
    cards = page_of(table, tmp_path, compare=str(other.location))["cards"]
    assert [card["facts"]["change"] for card in cards] == [1.0, 0.0]
    assert [text["missing"] for text in cards[0]["texts"]] == [False, True]
    assert cards[0]["texts"][1]["runs"] == [["same", "missing: HTTP 404"]]


def test_only_captions_are_counted_and_the_failures_come_last_by_where_they_are(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    other, _ = begin_table(str(tmp_path / "other"), str(images))
    changed = [caption_row(n, f"{images}/{n:03d}.jpg", f"no word of {n * 111} remains") for n in range(1, 4)]
    same = [caption_row(n, f"{images}/{n:03d}.jpg", f"a picture numbered {n}") for n in range(4, 11)]
    failed = [failure_row(n, f"{images}/{n:03d}.jpg", "not_an_image", "HTML") for n in (0, 11)]
    add_part(other, changed + same + failed)
    page = page_of(table, tmp_path, compare=str(other.location))
    assert page["lines"] == [
        "Of 9 captions compared, 3 differ (33%); the largest changes come first.",
        "Without a caption: 1 in captions alone, 1 in other alone, 1 in both; these come last.",
    ]
    assert [card["failed"] for card in page["cards"]] == [False] * 9 + [True] * 3
    assert [card["tags"][:1] for card in page["cards"][:4]] == [["changed"]] * 3 + [["same"]]
    assert page["cards"][-1]["texts"][1]["runs"] == [["same", "not an image: HTML"]]
    some = page_of(table, tmp_path, compare=str(other.location), sample=4)
    assert some["lines"][0] == "Of 9 captions compared, 3 differ (33%); the largest changes come first."
    assert [card["failed"] for card in some["cards"]] == [False, False, False, True]
    fewer = page_of(table, tmp_path, compare=str(other.location), sample=2)
    assert fewer["lines"][0] == "Of 9 captions compared, 3 differ (33%); the 2 with the largest changes are here."


def test_a_comparison_names_the_models_of_its_tables(images: Path, tmp_path: Path) -> None:
    folders = ("/data/llava-7b/bundle", "/data/llava-13b/bundle")
    for number, folder in enumerate(folders):
        model = {"name": folder, "fingerprint": f"{number:064x}"}
        made, _ = begin_table(str(tmp_path / f"run-{number}"), str(images), identity={"model": model})
        add_part(made, [caption_row(0, f"{images}/000.jpg", "a dog")])
    page = page_of(CaptionTable(str(tmp_path / "run-0")), tmp_path, compare=str(tmp_path / "run-1"))
    assert page["lines"] == [
        "Of 1 caption compared, 0 differ (0%).",
        "model.name: llava-7b/bundle in run-0, llava-13b/bundle in run-1.",
    ]


def test_tables_without_a_common_image_are_refused(table: CaptionTable, images: Path, tmp_path: Path) -> None:
    other, _ = begin_table(str(tmp_path / "other"), f"{images}/00*.jpg")
    add_part(other, [caption_row(0, "elsewhere.jpg", "a caption")])
    with pytest.raises(InputError, match=r"has none of 12 images of .*; expected two runs over the same images"):
        page_of(table, tmp_path, compare=str(other.location))


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


@pytest.mark.parametrize(
    ("text", "others", "marked"),
    [
        ("a red circle above a cross", ["A red cross", "Circle above a line."], []),
        ("a red circle above a cross", ["a blue circle"], ["red ", "above a cross"]),
        ("a dog", [], ["a dog"]),
        ("İ ß, straße", ["i STRASSE"], ["İ ß, "]),
        ("", ["a dog"], []),
    ],
)
def test_words_that_no_other_text_has_in_their_order_are_marked(
    text: str, others: list[str], marked: list[str]
) -> None:
    found = unmatched(text, others)
    assert "".join(words for _, words in found) == text
    assert [words for kind, words in found if kind == "added"] == marked
