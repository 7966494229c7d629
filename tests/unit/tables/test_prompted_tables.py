"""A table with answers to named prompts, as every reader sees it."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioner.config import ExportConfig, VerifyConfig
from captioner.export import export_table
from captioner.export.prompts import prompts_of
from captioner.gallery.caption_cards import caption_card
from captioner.gallery.gallery import write_gallery
from captioner.query import read_rows
from captioner.schema import Reject, RejectReason, captions_schema
from captioner.tables import CaptionTable, Stamp
from captioner.tables.verification import verify
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images
from tests.unit.query.conftest import rows

PROMPTS: dict[str, Any] = {
    "caption": {"text": "Describe {{it}}.", "decoding": {}},
    "tags": {"text": "List. {alt}", "decoding": {"do_sample": True, "num_captions": 2}, "max_value_tokens": 256},
    "is_photo": {"text": "?", "decoding": {}, "constraint": json.dumps({"choice": ["yes", "no"]})},
    "scene": {
        "text": "JSON",
        "decoding": {},
        "constraint": json.dumps(
            {
                "json_schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"people": {"type": "integer"}, "place": {"type": "string"}},
                }
            }
        ),
    },
}
SCORES = {"num_tokens": 3, "finish_reason": "stop", "mean_logprob": -0.5, "min_logprob": -1.0, "is_repetitive": False}
ASKED = {"text_number": 0, "num_cut_values": 1}
NO_IMAGE = Reject(RejectReason.MISSING, "")


def answered(position: int, scene: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    said = {**SCORES, **ASKED, "candidates": [{"caption": "a, b", **SCORES}, {"caption": "c", **SCORES}]}
    return caption_row(
        position,
        f"{position:03d}.jpg",
        f"caption {position}",
        caption_details=ASKED,
        tags="a, b",
        tags_details=said,
        is_photo="yes" if position % 2 else "no",
        is_photo_details=SCORES | ASKED,
        scene=scene,
        scene_details=SCORES | ASKED,
        **more,
    )


@pytest.fixture
def table(tmp_path: Path) -> CaptionTable:
    """Four images: three captions in two parts, one failure."""
    images = str(write_images(tmp_path / "images", 4))
    table, frozen = begin_table(str(tmp_path / "table"), images, identity={"prompts": PROMPTS})
    assert frozen.num_images == 4
    place = f"{images}/"
    rows = [answered(number, {"people": number, "place": "here"}) for number in (0, 1)]
    rows += [answered(2, None), failure_row(3, "003.jpg", "corrupt")]
    for row in rows:
        row["image_id"] = place + row["image_id"]
    table.record("run-1", {"purpose": "caption", "config": {}, "model": {"name": "demo", "template": "{image}"}})
    add_part(table, rows[:1])
    add_part(table, rows[1:])
    return table


def test_a_query_has_a_column_for_each_prompt(table: CaptionTable) -> None:
    sql = "SELECT caption, tags, is_photo, scene.people AS n, tags_details.num_tokens AS t FROM captions ORDER BY key"
    assert rows(table, sql)[0] == {"caption": "caption 0", "tags": "a, b", "is_photo": "no", "n": 0, "t": 3}
    assert rows(table, "SELECT count(*) AS n FROM captions WHERE scene IS NULL") == [{"n": 1}]
    [failed] = rows(table, "SELECT reason, tags FROM images WHERE reason IS NOT NULL")
    assert failed == {"reason": "corrupt", "tags": None}


def test_the_audit_knows_the_columns_of_the_prompts(table: CaptionTable) -> None:
    found = verify(VerifyConfig(table=str(table.location)))
    assert (found["ok"], found["captioned"], found["failed"]) == (True, 3, 1)
    [part, *_] = table.parts("captions")
    table.write_part("captions", pq.read_table(part).drop_columns(["tags"]), Stamp("run-1", table.digest))
    assert len(verify(VerifyConfig(table=str(table.location)))["foreign_parts"]) == 1


def test_a_compaction_keeps_every_answer(table: CaptionTable) -> None:
    before = rows(table, "SELECT * EXCLUDE run_id FROM captions ORDER BY key")
    found = verify(VerifyConfig(table=str(table.location), compact=True))
    assert (found["ok"], found["parts"]["captions"]) == (True, 1)
    assert rows(table, "SELECT * EXCLUDE run_id FROM captions ORDER BY key") == before
    assert pq.read_schema(table.parts("captions")[0]).equals(captions_schema((), table.answers()))


def test_a_card_shows_each_answer_and_how_it_came_about(table: CaptionTable) -> None:
    [row] = rows(table, "FROM captions WHERE key = 1")
    card = caption_card(row, NO_IMAGE)
    assert [(text.label, text.runs[0][1]) for text in card.texts] == [
        ("", "caption 1"),
        ("is_photo", "yes"),
        ("scene", '{"people": 1, "place": "here"}'),
        ("tags", "a, b"),
    ]
    assert (card.facts["tags_details.num_tokens"], card.facts["caption_details.num_cut_values"]) == (3, 1)
    assert not {"tags", "tags_details", "tags_details.candidates"} & set(card.facts)


def test_an_answer_that_is_null_has_no_text_on_its_card(table: CaptionTable, tmp_path: Path) -> None:
    [row] = rows(table, "FROM captions WHERE key = 2")
    assert [text.label for text in caption_card(row, NO_IMAGE).texts] == ["", "is_photo", "tags"]
    page = tmp_path / "page.html"
    summary = write_gallery(read_rows(table, "FROM images"), str(page), table_url=str(table.location))
    assert summary["rows"] == 4
    assert '"label":"tags"' in page.read_text().replace('": "', '":"')


def test_an_export_has_the_answers_that_it_is_asked_for(table: CaptionTable, tmp_path: Path) -> None:
    def export(name: str, **flags: Any) -> Path:
        export_table(ExportConfig(table=str(table.location), output=str(tmp_path / name), **flags))
        return tmp_path / name

    lines = (
        (export("lines", columns=("caption", "scene", "is_photo")) / "captions-00000.jsonl").read_text().splitlines()
    )
    assert json.loads(lines[1]) == {"caption": "caption 1", "scene": {"people": 1, "place": "here"}, "is_photo": "yes"}
    texts = sorted(export("texts", format="txt", text="{caption}: {tags}").rglob("*.txt"))
    assert texts[0].read_text() == "caption 0: a, b\n"
    [first, *_] = json.loads((export("talk", format="llava") / "captions-00000.json").read_text())
    assert first["conversations"][0]["value"] == "<image>\nDescribe {it}."


@pytest.mark.parametrize("asked", [{"text": "x {alt}", "max_value_tokens": 9}, {"texts": [["x", 1.0], ["y", 1.0]]}])
def test_what_images_were_asked_differently_is_no_prompt_of_a_conversation(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    images, prompts = str(write_images(tmp_path / "images", 1)), {"caption": {"decoding": {}, **asked}}
    table, _ = begin_table(str(tmp_path / "table"), images, identity={"prompts": prompts})
    table.record("run-1", {})
    assert prompts_of(table, ["caption"]) == {}
