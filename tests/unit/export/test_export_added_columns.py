"""Columns of prompts that were added later, in every format, as the library that reads the format has them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from captioner.config import ExportConfig
from captioner.errors import ConfigError
from captioner.export import export_table
from captioner.tables import CaptionTable
from tests.caption_tables import add_answers, add_part, begin_table, caption_row, write_images
from tests.unit.export.test_export_hf import rows_of
from tests.unit.export.test_export_images import samples_of
from tests.unit.export.test_export_lakes import lance_rows

pytestmark = [  # the libraries' own
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
MOOD = {"text": "What is its {{mood}}?", "decoding": {}}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"people": {"type": "integer"}, "things": {"type": "array", "items": {"type": "string"}}},
}
SCENE = {"text": "JSON", "decoding": {}, "constraint": json.dumps({"json_schema": SCHEMA})}
DETAILS = {"num_tokens": 2, "finish_reason": "stop", "mean_logprob": -0.5, "min_logprob": -1.0, "is_repetitive": False}
ASKED = {"text_number": 0, "num_cut_values": 0}
MOODS = ["calm", 'gay, "bright"', None, "dull"]
SCENES = [{"people": 2, "things": ["cup", "hat"]}, None, None, {"people": 0, "things": []}]
"""Image 1 has a scene that was cut, image 2 neither answer: the job that adds both was killed."""


@pytest.fixture
def grown(tmp_path: Path) -> str:
    """A table of four images that got the columns mood and scene later."""
    images = str(write_images(tmp_path / "images", 4))
    prompts = {"caption": {"text": "Describe it.", "decoding": {}}}
    table, _ = begin_table(str(tmp_path / "table"), images, identity={"prompts": prompts})
    rows = [caption_row(at, f"{at:03d}.jpg", f"caption {at}", caption_details=ASKED) for at in range(4)]
    rows[0]["candidates"] = [{**DETAILS, "caption": text} for text in ("caption 0", "another")]
    add_part(table, rows)
    table.record("run-1", {})
    for name, prompt, answers in (("mood", MOOD, MOODS), ("scene", SCENE, SCENES)):
        said = [{**rows[at], name: answers[at], f"{name}_details": DETAILS | ASKED} for at in (0, 1, 3)]
        add_answers(table, name, prompt, said)
    return str(table.location)


def export(table: str, out: Path, **flags: Any) -> Path:
    """Export the table to a new folder and return that."""
    export_table(ExportConfig(table=table, output=str(out), **flags))
    return out


def objects_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "captions-00000.jsonl").read_text().splitlines()]


def cells_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of CSV, whose empty cells are null and whose structs are JSON."""
    with (out / "captions-00000.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = [
            {name: text or None for name, text in row.items()} for row in csv.DictReader(file)
        ]
    return [row | {"scene": json.loads(row["scene"] or "null")} for row in rows]


COLUMNS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "jsonl": objects_of,
    "csv": cells_of,
    "webdataset": lambda out: [json.loads(sample["json"]) for sample in samples_of(out)],
    "hf": lambda out: rows_of(out, out.with_name("cache")),
    "hf-folder": lambda out: rows_of(out, out.with_name("cache")),
    "lance": lambda out: lance_rows(str(out)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_format_with_columns_has_those_that_were_added_null_where_there_is_no_answer(
    name: str, grown: str, tmp_path: Path
) -> None:
    found = COLUMNS[name](export(grown, tmp_path / "out", format=name))
    assert [(row["image_id"], row["mood"], row["scene"]) for row in found] == [
        (f"{at:03d}.jpg", MOODS[at], SCENES[at]) for at in range(4)
    ]
    assert [row["caption"] for row in found] == [f"caption {at}" for at in range(4)]


def test_images_that_were_exported_before_their_answer_are_told_by_each_export_and_where_waits_for_them(
    grown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"table": grown, "columns": ("image_id", "mood"), "text": "{scene} {mood} {caption}"}
    for num_rows in (4, 0):
        found = export_table(ExportConfig(**flags, output=str(tmp_path / "early")))
        assert (found["rows"], found["unanswered"]) == (num_rows, {"mood": 1, "scene": 1})
        assert capsys.readouterr().err.splitlines()[1:] == [
            f"1 image exported without an answer to {name}, which these files never get: export to a new OUT once it is"
            f' there, or from the start with --where "{name}_details IS NOT NULL"'
            for name in ("mood", "scene")
        ]
    waits = ExportConfig(table=grown, output=str(tmp_path / "late"), where="mood_details IS NOT NULL", text="{mood}")
    found = export_table(waits)
    assert (found["rows"], "unanswered" in found) == (3, False)
    add_answers(
        CaptionTable(grown), "mood", MOOD, [caption_row(2, "002.jpg", "", mood="late", mood_details=DETAILS | ASKED)]
    )
    found = export_table(waits)
    assert (found["rows"], found["unanswered"]) == (1, {"scene": 1})


@pytest.mark.parametrize("name", ["hf", "hf-folder"])
def test_a_prompt_called_as_what_a_data_set_has_itself_gives_way(name: str, grown: str, tmp_path: Path) -> None:
    said = {"image": "an answer", "image_details": DETAILS | ASKED}
    add_answers(CaptionTable(grown), "image", MOOD, [caption_row(0, "000.jpg", "", **said)])
    [first, *_] = rows_of(export(grown, tmp_path / "out", format=name), tmp_path / "cache")
    assert first["image"]["path"].endswith("000000-000000000.jpg")
    assert first["mood"] == "calm"


def conversations_of(out: Path) -> list[str]:
    return [
        "|".join(said["value"] for said in one["conversations"])
        for one in json.loads((out / "captions-00000.json").read_text())
    ]


TEXTS: dict[str, Callable[[Path], list[str]]] = {
    "txt": lambda out: [path.read_text().strip() for path in sorted(out.glob("*.txt"))],
    "kohya": lambda out: [one["caption"] for one in json.loads((out / "captions-00000.json").read_text()).values()],
    "coco": lambda out: [
        one["caption"] for one in json.loads((out / "captions-00000.json").read_text())["annotations"]
    ],
    "llava": lambda out: [text.removeprefix("<image>\nWhat is its {mood}?|") for text in conversations_of(out)],
    "webdataset": lambda out: [sample["txt"].decode().strip() for sample in samples_of(out)],
    "hf": lambda out: [row["text"] for row in rows_of(out, out.with_name("cache"))],
    "hf-folder": lambda out: [row["text"] for row in rows_of(out, out.with_name("cache"))],
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_an_image_may_be_an_added_answer_and_an_image_without_one_is_left_out(
    name: str, grown: str, tmp_path: Path
) -> None:
    assert TEXTS[name](export(grown, tmp_path / "out", format=name, text="{mood}")) == [mood for mood in MOODS if mood]


def test_the_text_of_an_answer_with_a_schema_is_its_json(grown: str, tmp_path: Path) -> None:
    texts = TEXTS["txt"](export(grown, tmp_path / "out", format="txt", text="{scene}"))
    assert [json.loads(text) for text in texts] == [SCENES[0], SCENES[3]]


def test_a_conversation_asks_the_prompt_whose_answer_the_text_names_first(grown: str, tmp_path: Path) -> None:
    [first, *_] = conversations_of(export(grown, tmp_path / "both", format="llava", text="{caption} It is {mood}."))
    assert first == "<image>\nDescribe it.|caption 0 It is calm."
    [first, *_] = conversations_of(export(grown, tmp_path / "size", format="llava", text="{width} {mood}"))
    assert first == "<image>\nWhat is its {mood}?|48 calm"


def test_candidates_are_those_of_the_caption_and_no_other_answer_is_written_once_for_each(
    grown: str, tmp_path: Path
) -> None:
    [first, second, *_] = conversations_of(
        export(grown, tmp_path / "all", format="llava", text="{caption}: {mood}", captions="all")
    )
    assert [first.rpartition("|")[2], second.rpartition("|")[2]] == ["caption 0: calm", "another: calm"]
    with pytest.raises(ConfigError, match=r"--captions is all, and --text {mood} is the same for each .* {caption} in"):
        export(grown, tmp_path / "none", format="txt", text="{mood}", captions="all")
